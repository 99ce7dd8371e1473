"""What saves memory: each lever is one line of configuration, and changes neither the loss nor its gradients."""

import importlib.util
import json
import logging
import subprocess
import sys
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.memory import ROW_TEMPORARIES
from fastkd import chunking, levers, ops
from fastkd.config import load_config
from fastkd.hf import run_body
from fastkd.preparation import check_loss_buffer
from fastkd.teachers import Teachers, TeacherSource
from fastkd.trainer import KDTrainer

from .test_trainer import FirstGradients, config, trainer
from .tiny import VOCABULARY, rows, tiny_llama, tiny_tokenizer

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


class Counted(KDTrainer):
    """Counts the bytes that each micro-batch keeps for its backward pass."""

    def compute_loss(self, *args, **kwargs):
        saved: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            found = super().compute_loss(*args, **kwargs)
        self.saved_bytes = sum(saved.values())
        return found


def first_step(folder, student=None, adapted=False, kind=KDTrainer, **changes):
    """The trainer, and the gradients of its first step, of two micro-batches."""
    keep = FirstGradients()
    torch.manual_seed(7)
    run = kind(
        tiny_llama(1, layers=4) if student is None else student,
        tiny_llama(2, hidden=24, layers=3),
        config(folder, gradient_accumulation_steps=2, max_grad_norm=0.0, **changes),
        rows(16),
        processing_class=tiny_tokenizer(),
        callbacks=[keep],
        peft_config=LoraConfig(**LORA) if adapted else None,
    )
    run.train()
    return run, keep.found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Gradient checkpointing.


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("reentrant", [None, True])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(tmp_path, adapted, reentrant):
    plain, expected = first_step(tmp_path / "plain", adapted=adapted, kind=Counted)
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    with mock.patch.object(ops, "kd", wraps=ops.kd) as fused:
        run, found = first_step(
            tmp_path / "less", adapted=adapted, kind=Counted, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
        )
    assert_equal(found, expected)
    assert fused.call_count == 2, "the loss is computed once for each micro-batch"
    assert run.saved_bytes < 0.5 * plain.saved_bytes
    assert not run.teachers.model(run.teachers.names[0]).is_gradient_checkpointing


# Activations that wait in CPU memory.


@pytest.fixture
def moves(monkeypatch):
    """The CPU stands for a GPU, and small tensors for large ones: the tensors that are moved."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(levers, "LEAST_BYTES", 256)
    monkeypatch.setattr(levers, "_is_away", lambda tensor: True)
    pack = levers.Offloaded._pack

    def recorded(self, tensor):
        packed = pack(self, tensor)
        if not isinstance(packed, torch.Tensor):
            assert packed.values.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            assert torch.equal(packed.values, tensor)
            assert packed.values.stride() == tensor.stride()
            found.append(tensor.detach().clone())
        return packed

    monkeypatch.setattr(levers.Offloaded, "_pack", recorded)
    return found


def gpt2_with_dropout():
    torch.manual_seed(1)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    )


@pytest.mark.parametrize("case", ["autocast", "LoRA, autocast", "checkpointing", "dropout"])
def test_offloaded_activations_give_the_same_gradients(tmp_path, moves, case):
    changes = {"adapted": "LoRA" in case, "bf16": "autocast" in case, "gradient_checkpointing": case == "checkpointing"}
    make = gpt2_with_dropout if case == "dropout" else lambda: tiny_llama(1, layers=4)
    _, expected = first_step(tmp_path / "plain", student=make(), **changes)
    assert not moves
    run, found = first_step(tmp_path / "moved", student=make(), activation_offloading=True, **changes)
    assert_equal(found, expected)
    assert moves, "something waits in CPU memory"
    weights = [p.detach() for p in run.model.parameters() if p.ndim == 2]
    for tensor in moves:
        for weight in weights:
            for turned in (weight, weight.T):
                assert tensor.shape != turned.shape or not torch.equal(tensor, turned.to(tensor.dtype)), "no weight travels"
        assert tuple(tensor.shape) != (VOCABULARY, 16), "nor does the gradient of the head, which the backward pass wants at once"
    if case == "checkpointing":
        assert all(tensor.shape[-1] == 16 and tensor.ndim == 3 for tensor in moves if tensor.is_floating_point()), "inputs of layers"
        assert sum(tensor.ndim == 3 for tensor in moves) <= 2 * (4 + 3), "the layers', and what the last norm saves"


def test_what_several_operations_save_travels_once(moves):
    first, second = (torch.randn(32, 64, requires_grad=True) for _ in range(2))  # not weights of the model
    x = torch.randn(4, 8, 32, requires_grad=True) * 1.0
    offloaded = levers.Offloaded(torch.nn.Linear(1, 1))
    with offloaded:
        y = (x @ first).sum() + (x @ second).sum() + x.exp().sum() + (x.transpose(0, 1) ** 2).sum()
    assert len(moves) > 4
    once = x.nbytes + x.nbytes + first.nbytes + second.nbytes + x.nbytes  # x, x turned, the two others, exp's own output
    assert offloaded.moved == once
    y.backward()


def test_what_has_changed_since_it_was_copied_travels_again(moves):
    x = torch.randn(64, requires_grad=True) * 1.0
    offloaded = levers.Offloaded(torch.nn.Linear(1, 1))
    with offloaded:
        loss = (x**2).sum()
        loss = loss + (x.mul_(3.0) ** 2).sum()
    assert offloaded.moved == 2 * x.nbytes
    loss.backward()


def test_nothing_is_offloaded_from_a_cpu_and_that_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        first_step(tmp_path, activation_offloading=True)
    assert sum("activation_offloading: has no effect" in r.message for r in caplog.records) == 1
    offloaded = levers.Offloaded(tiny_llama(1))
    with offloaded:
        tiny_llama(1)(torch.arange(8)[None]).logits.sum()
    assert offloaded.moved == 0 < offloaded.kept


# Liger's kernels.


@pytest.fixture
def liger(monkeypatch):
    """Liger's kernels under Triton's interpreter, and transformers as it was afterwards."""
    pytest.importorskip("triton")
    try:
        from liger_kernel.transformers import monkey_patch  # noqa: F401
    except ImportError as error:
        pytest.skip(f"this liger-kernel does not go together with this transformers: {error}")
    from .interpreted_liger import make_ready

    make_ready(monkeypatch)
    for family in ("llama", "qwen2", "gemma2", "gpt2"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if hasattr(module, "apply_rotary_pos_emb"):
            monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)


def tiny_gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 1}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, **sizes))


@pytest.mark.parametrize("make", [lambda: tiny_llama(1, layers=1), tiny_gemma2], ids=["llama", "gemma2"])
def test_liger_computes_the_same(liger, make):
    from transformers.models.llama import modeling_llama

    model, ids = make(), torch.arange(12)[None]
    before, _ = run_body(model, input_ids=ids)
    upstream = torch.randn_like(before)
    before.backward(upstream)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    classes = modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm
    assert levers.apply_liger(model, levers.liger_config(None), "the student")
    assert "Liger" in repr(model.model.norm)
    assert "Liger" in repr(model.model.layers[0].mlp)
    assert (modeling_llama.LlamaMLP, modeling_llama.LlamaRMSNorm) == classes, "models to come are not patched unasked"
    after, _ = run_body(model, input_ids=ids)
    assert 0 < (after - before).abs().max() < 1e-5 * before.abs().max()
    after.backward(upstream)
    for name, value in expected.items():
        assert (model.get_parameter(name).grad - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert "forward" not in vars(model), "the loss is not Liger's"


def test_a_run_with_liger_is_the_run_without(liger, tmp_path):
    for part in (tiny_llama(2, hidden=24, layers=1), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "teacher")

    def train(name, **changes):
        run = trainer(tmp_path / name, tiny_llama(1, layers=1), tmp_path / "teacher", rows(2), max_steps=1, max_length=8, **changes)
        run.train()
        return run, {n: p.detach() for n, p in run.model.named_parameters()}

    _, expected = train("plain")
    run, found = train("liger", use_liger_kernel=True, save_strategy="steps", save_steps=1)
    assert "Liger" in repr(run.model)
    assert "Liger" in repr(run.teachers.model("teacher"))
    assert run.args.use_liger_kernel
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-5), name
    again = trainer(tmp_path / "liger", tiny_llama(1, layers=1), tmp_path / "teacher", rows(2), max_steps=1, max_length=8)
    with pytest.raises(ValueError, match="use_liger_kernel"):
        again.train(resume_from_checkpoint=True)


def test_families_that_liger_does_not_know_stay_as_they_are(liger, caplog):
    model = gpt2_with_dropout()
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        assert not levers.apply_liger(model, levers.liger_config(None), "the teacher 'old'")
    assert [r.message for r in caplog.records if "Liger has no kernels for the teacher 'old'" in r.message and "gpt2" in r.message]
    assert "Liger" not in repr(model)


def test_a_model_that_liger_would_change_is_refused(liger):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, **sizes, initializer_range=0.5))
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()  # Liger's has SiLU
    with pytest.raises(ValueError, match=r"the student: with liger-kernel .* the hidden states of qwen2 are .*% off"):
        levers.apply_liger(model, levers.liger_config(None), "the student")


def test_a_liger_that_does_not_fit_is_one_line(liger, monkeypatch):
    monkeypatch.setattr(levers, "apply_liger_kernel", mock.Mock(side_effect=AttributeError("no attribute 'block_sparse_moe'")))
    with pytest.raises(ValueError, match=r"use_liger_kernel: the student: liger-kernel .* do not agree on llama: AttributeError: no attr"):
        levers.apply_liger(tiny_llama(1), {}, "the student")


def test_teachers_that_liger_leaves_alone(liger, tmp_path, caplog):
    kernels = levers.liger_config(None)
    with caplog.at_level(logging.WARNING, logger="fastkd"):
        Teachers({"mine": tiny_llama(2)}, device="cpu", liger=kernels)
    assert "the teacher mine was given as a module" in caplog.text
    tiny_llama(2, layers=1).save_pretrained(tmp_path)
    source = TeacherSource(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"teacher 'slow': use_liger_kernel: .* expected training.liger_kernel_config: {rope: false}"):
        Teachers({"slow": source}, device="cuda", liger=kernels)
    teachers = Teachers({"slow": source}, device="cuda", liger={**kernels, "rope": False})
    assert "the teacher slow is on the cpu" in caplog.text
    assert "Liger" not in repr(teachers.model("slow"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fused_linear_cross_entropy": True}, "liger_kernel_config.fused_linear_cross_entropy: must be left off"),
        ({"cross_entropy": True}, "liger_kernel_config.cross_entropy: must be left off"),
        ({"swigloo": True}, "unknown kernel 'swigloo'; known are .*swiglu"),
    ],
)
def test_kernels_that_may_not_be_asked_for(liger, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, use_liger_kernel=True, liger_kernel_config=changes)
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert config(tmp_path, use_liger_kernel=True).liger_kernel_config == losses
    assert config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False}).liger_kernel_config == {"rope": False, **losses}


def test_liger_needs_a_gpu_and_its_package(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from fastkd_kernels import rows as kernels

    monkeypatch.setattr(kernels, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="use_liger_kernel: its kernels need a GPU, got the CPU"):
        config(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr(levers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"use_liger_kernel: needs .*pip install liger-kernel"):
        config(tmp_path, use_liger_kernel=True)


# The loss's buffers.


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("vocabulary", "shared"), [(32000, 0), (128256, 128256), (151936, 151936), (262144, 32000)])
def test_a_buffer_is_never_larger_than_asked_for(vocabulary, shared, device, logits_dtype):
    for megabytes in (2, 16, 100.5, 512, 4096):
        most = megabytes * 2**20
        if most < logits_dtype.itemsize * (vocabulary + shared):
            continue
        chunk = chunking.chunk_tokens_within(most, vocabulary, shared, logits_dtype)
        for tokens in (1, 63, chunk, chunk + 1, 3 * chunk + 5, 32768):
            arguments = (tokens, vocabulary, shared, torch.bfloat16, logits_dtype, torch.device(device))
            assert chunking.buffer_bytes(*arguments, chunk) <= most
        one_more = (chunk + 1, *arguments[1:], chunk + 1)
        assert chunking.buffer_bytes(*one_more) > most, "nor is there room for one more token"


PEAK = """
import json, sys
from pathlib import Path
import torch
from fastkd import TeacherHidden, chunking, fused_linear_kd

def status(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))

found = []
tokens, vocabulary, width = 417, 30000, 64
hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
teacher = TeacherHidden(torch.randn(tokens, width), torch.randn(vocabulary, width))
run = lambda n, chunk: fused_linear_kd(hidden[:n], weight, TeacherHidden(teacher.hidden[:n], teacher.weight), chunk_tokens=chunk)
for megabytes in (32.0, 96.0):
    chunk = chunking.chunk_tokens_within(megabytes * 2**20, vocabulary, vocabulary, torch.float32)
    run(8, 8).backward()
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run(tokens, chunk).backward()
    gradients = 2 * weight.nbytes + 2 * hidden.nbytes  # of the forward pass, and scaled
    found.append((megabytes, chunk, (status("VmHWM") - before - gradients) / 2**20))
    hidden.grad = weight.grad = None
print(json.dumps(found))
"""


def test_the_measured_peak_stays_within_the_buffer():
    """On a CPU the row function's temporaries come on top, whatever the buffer is."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system does not tell peaks")
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for megabytes, chunk, used in found:
        assert used <= megabytes + ROW_TEMPORARIES / 2**20, (megabytes, chunk, used)
    (low, _, less), (high, _, more) = found
    assert more - less > 0.5 * (high - low), "what is measured is the buffer"


def test_a_buffer_in_mb_changes_no_gradient(tmp_path, caplog):
    _, expected = first_step(tmp_path / "plain")
    with mock.patch.object(ops, "kd", wraps=ops.kd) as fused, caplog.at_level(logging.WARNING, logger="fastkd"):
        run, found = first_step(tmp_path / "small", max_loss_buffer_mb=4 * 2 * VOCABULARY * 3.5 / 2**20)
    assert {call.args[15] for call in fused.call_args_list} == {3}, "three tokens at a time"
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert sum("max_loss_buffer_mb: holds 3 tokens at a time" in r.message for r in caplog.records) == 1
    args = config(tmp_path, max_loss_buffer_mb=0.0001)
    with pytest.raises(ValueError, match=r"max_loss_buffer_mb: expected at least 0.015625, .* got 0.0001"):
        check_loss_buffer(args, run.model, [])


def test_a_store_of_probabilities_has_no_buffer_of_teacher_logits(tmp_path):
    changes = {
        "max_loss_buffer_mb": 4 * VOCABULARY * 3.5 / 2**20 * 2,
        "store": {"path": str(tmp_path / "store"), "kind": "topk", "top_k": 4},
    }
    with mock.patch.object(ops, "kd", wraps=ops.kd) as fused:
        first_step(tmp_path / "run", **changes)
    assert {call.args[15] for call in fused.call_args_list} - {0} == {7}  # 0: the check of the divergence


# Optimizers.


def installed(module):
    return importlib.util.find_spec(module) is not None


OPTIMIZERS = [
    *("adamw_torch_fused", "adafactor", "sgd"),
    *(
        pytest.param(name, marks=pytest.mark.skipif(not installed("bitsandbytes"), reason="needs bitsandbytes"))
        for name in ("adamw_8bit", "paged_adamw_32bit", "lion_8bit")  # on a CPU nothing is paged
    ),
    *(
        pytest.param(name, marks=pytest.mark.skipif(not installed("torchao"), reason="needs torchao"))
        for name in ("adamw_torch_8bit", "adamw_torch_4bit")
    ),
]


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def wide():
    """8-bit states begin at 4096 elements."""
    return tiny_llama(1, hidden=128, layers=1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_trains_and_resumes_bit_for_bit(tmp_path, name):
    saved = {"optim": name, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", student=wide(), **saved)
    whole.train()
    expected = weights(whole)
    assert all((expected[n] != p).any() for n, p in wide().named_parameters())
    resumed = trainer(tmp_path / "whole", student=wide(), **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(weights(resumed), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_reset_optimizer_is_a_fresh_one(tmp_path, name):
    """Its second stage from the weights of its first is a run of its own."""
    data, common = rows(8), {"optim": name, "max_steps": -1, "lr_scheduler_type": "constant"}
    stage = {"epochs": 1}
    plan = {"stages": [stage, {**stage, "reset_optimizer": True}], "order": "sequential"}
    both = trainer(tmp_path / "both", student=wide(), data=data, plan=plan, **common)
    both.train()
    once = trainer(tmp_path / "once", student=wide(), data=data, num_train_epochs=1, train_sampling_strategy="sequential", **common)
    once.train()
    then = trainer(tmp_path / "then", student=once.model, data=data, num_train_epochs=1, train_sampling_strategy="sequential", **common)
    then.train()
    assert_equal(weights(both), weights(then))


def test_optimizers_that_cannot_be_reset_are_refused(tmp_path):
    stage = {"epochs": 1}
    plan = {"stages": [stage, {**stage, "reset_optimizer": True}]}
    with pytest.raises(ValueError, match="optim: adagrad keeps more than the state that a plan's reset_optimizer clears"):
        trainer(tmp_path, plan=plan, optim="adagrad")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw_8bit", "bitsandbytes"),
        ("paged_adamw_32bit", "bitsandbytes"),
        ("adamw_torch_4bit", "torchao"),
        ("galore_adamw_8bit", "galore-torch"),
    ],
)
def test_a_missing_package_is_named_before_a_model_is_loaded(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr(levers, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"optim: {name} needs the package {package}: pip install {package}"):
        config(tmp_path, optim=name)


# A teacher elsewhere.


def test_signals_of_a_teacher_on_the_cpu_come_to_the_student(tmp_path):
    """The meta device stands for a GPU: what arrives there has shapes alone."""
    model = tiny_llama(2, hidden=24).save_pretrained(tmp_path) or tmp_path
    batch = {"input_ids": torch.arange(6)[None], "attention_mask": torch.ones(1, 6, dtype=torch.int64)}
    teachers = Teachers({"slow": TeacherSource(model, device="cpu")}, device="meta")
    signal = teachers.signal("slow", batch, torch.zeros(1, 6, dtype=torch.int64))
    assert {p.device.type for p in teachers.model("slow").parameters()} == {"cpu"}
    assert (signal.hidden.device.type, signal.weight.device.type) == ("meta", "meta")
    assert (signal.hidden.shape, signal.weight.shape) == ((1, 6, 24), (VOCABULARY, 24))


# A configuration file has each of them in one line.


def test_each_lever_is_one_line(tmp_path, monkeypatch):
    from fastkd import begin

    text = """
student: s
teacher: {model: t, device: cpu}
data: {train: rows.jsonl}
loss: {max_loss_buffer_mb: 64}
training:
  gradient_checkpointing: true
  activation_offloading: true
  use_liger_kernel: true
  optim: adafactor
output_dir: out
"""
    (tmp_path / "c.yaml").write_text(text)
    monkeypatch.setattr("fastkd.arguments.check_liger", lambda device: None)
    monkeypatch.setattr("fastkd.arguments.liger_config", lambda config: {"rope": False})
    args = begin._arguments(load_config(tmp_path / "c.yaml"), elsewhere=False)
    assert (args.max_loss_buffer_mb, args.gradient_checkpointing, args.activation_offloading) == (64, True, True)
    assert (args.use_liger_kernel, args.liger_kernel_config, args.optim) == (True, {"rope": False}, "adafactor")
