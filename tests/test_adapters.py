"""Quantised teachers and students, LoRA and QLoRA, the merged student, and the choice of an attention implementation."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, TorchAoConfig, TrainerCallback
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from fastkd import models
from fastkd.cli import main
from fastkd.hf import head_of, verify_head
from fastkd.models import fingerprint, is_quantized, load_model, outline
from fastkd.preparation import load_student
from fastkd.teachers import Teachers, TeacherSource
from fastkd.trainer import KDConfig, KDTrainer

from .tiny import VOCABULARY, rows, tiny_llama, tiny_tokenizer

peft = pytest.importorskip("peft")

from fastkd.adapters import adapted, adapter_facts, lora_config, merged  # noqa: E402

BITS = [
    pytest.param("8bit", marks=pytest.mark.skipif(not (is_bitsandbytes_available() or is_torchao_available()), reason="no quantiser here")),
    pytest.param("4bit", marks=pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")),
]
# Where one of the two will do.
ANY = BITS[1] if is_bitsandbytes_available() else BITS[0]
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def saved(folder: Path, seed: int = 1, **config: Any) -> Path:
    """A model whose matrices are large enough to be quantised in blocks."""
    tiny_llama(seed, **{"hidden": 64, "layers": 3, **config}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def settings(folder: Path, **changes: Any) -> KDConfig:
    options = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "max_steps": 4,
        "disable_tqdm": True,
        "max_length": 16,
    }
    return KDConfig(**{**options, **changes})


def trainer(folder: Path, student: Any = None, teacher: Any = None, lora: dict | None = None, callbacks=None, **changes: Any) -> KDTrainer:
    return KDTrainer(
        tiny_llama(1) if student is None else student,
        tiny_llama(2) if teacher is None else teacher,
        settings(folder, **changes),
        rows(16),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        peft_config=None if lora is None else lora_config(lora),
    )


def disturbed(model: Any) -> Any:
    """An adapter that does something, as after some training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


class TestQuantisation:
    @pytest.mark.parametrize("bits", BITS)
    def test_the_linear_layers_are_quantised_and_the_head_is_not(self, bits: str, tmp_path: Path) -> None:
        place = saved(tmp_path)
        whole, model = load_model(place), load_model(place, quantization=bits)
        held = {name for name, module in model.named_modules() if is_quantized(module)}
        assert held == {name for name, m in whole.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
        assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
        assert torch.equal(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)
        assert verify_head(model, IDS) == 0
        hidden = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
        exact = whole.model.layers[0].mlp.down_proj(hidden)
        error = (model.model.layers[0].mlp.down_proj(hidden) - exact).norm() / exact.norm()
        assert 0 < error < {"8bit": 0.02, "4bit": 0.15}[bits]
        ours = logits(model)
        assert torch.equal(logits(model), ours)  # whether it was asked before or not
        assert torch.equal(model(input_ids=IDS).logits, ours)  # with or without gradients
        alone = torch.cat([model(input_ids=row[None]).logits for row in IDS])
        if bits == "8bit" and is_bitsandbytes_available():
            assert (alone - ours).norm() > 1e-3 * ours.norm()  # as `load_model` says
        else:
            torch.testing.assert_close(alone, ours, rtol=1e-4, atol=1e-4)
        assert fingerprint(model) == fingerprint(load_model(place, quantization=bits)) != fingerprint(whole)

    @pytest.mark.parametrize("bits", BITS)
    def test_layers_are_kept(self, bits: str, tmp_path: Path) -> None:
        place = saved(tmp_path / "whole")
        full, cut = load_model(place, quantization=bits), load_model(place, quantization=bits, layers=[0, 2])
        full.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
        assert torch.equal(logits(cut), logits(full))
        cut.save_pretrained(tmp_path / "cut")
        again = load_model(tmp_path / "cut")  # as it is held
        assert any(map(is_quantized, again.modules()))
        assert torch.equal(logits(again), logits(cut))
        with pytest.raises(ValueError, match=r"quantization: .*cut' is quantised already \(\w+\).*leave quantization out"):
            load_model(tmp_path / "cut", quantization=bits)

    @pytest.mark.parametrize("bits", [ANY])
    def test_outline(self, bits: str, tmp_path: Path) -> None:
        drawn = outline(saved(tmp_path), quantization=bits, attn_implementation="eager", dtype="bfloat16")
        assert {(p.device.type, p.dtype) for p in drawn.parameters()} == {("meta", torch.bfloat16)}
        assert drawn.config._attn_implementation == "eager"

    def test_neither_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place = saved(tmp_path)
        monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
        with pytest.raises(ValueError, match=r"^quantization: 4bit needs the package bitsandbytes: pip install bitsandbytes$"):
            load_model(place, quantization="4bit")
        monkeypatch.setattr(models, "is_torchao_available", lambda: False)
        with pytest.raises(ValueError, match=r"^quantization: 8bit needs the package bitsandbytes or torchao: pip install bitsandbytes$"):
            load_model(place, quantization="8bit")
        with pytest.raises(ValueError, match="quantization: expected one of 8bit, 4bit, got '2bit'"):
            load_model(place, quantization="2bit")

    @pytest.mark.parametrize("bits", [ANY])
    def test_both_arguments(self, bits: str, tmp_path: Path) -> None:
        own = BitsAndBytesConfig(load_in_4bit=True)
        with pytest.raises(ValueError, match="quantization: given together with quantization_config"):
            load_model(saved(tmp_path), quantization=bits, quantization_config=own)

    @pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")
    def test_a_quantised_head_is_refused(self, tmp_path: Path) -> None:
        own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
        with pytest.raises(ValueError, match=r"the LM head of LlamaForCausalLM is quantised, .* left out"):
            load_model(saved(tmp_path), quantization_config=own)

    @pytest.mark.skipif(not is_torchao_available(), reason="torchao is not installed")
    def test_a_head_quantised_by_torchao_is_refused(self, tmp_path: Path) -> None:
        from torchao.quantization import Int8WeightOnlyConfig

        own = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
        with pytest.raises(ValueError, match=r"the LM head of LlamaForCausalLM is quantised, .* left out"):
            load_model(saved(tmp_path), quantization_config=own)

    def test_a_gguf_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is converted to plain weights, and these are quantised."""
        if not is_bitsandbytes_available():
            pytest.skip("bitsandbytes is not installed")
        place = saved(tmp_path / "converted")
        (tmp_path / "model.gguf").write_bytes(b"")
        monkeypatch.setattr(models, "_converted_gguf", lambda *_: place)
        model = load_model(tmp_path / "model.gguf", quantization="4bit")
        assert torch.equal(logits(model), logits(load_model(place, quantization="4bit")))


class TestQuantisedTeacher:
    @pytest.mark.parametrize("bits", [ANY])
    def test_it_teaches(self, bits: str, tmp_path: Path) -> None:
        place = saved(tmp_path / "teacher")
        run = trainer(tmp_path / "run", teacher=place, teacher_model_init_kwargs={"quantization": bits})
        body = run.teachers.model("teacher")
        assert any(map(is_quantized, body.modules()))
        run.train()
        assert run.teachers.identity("teacher")["options"]["quantization"].startswith(f"{bits}, ")

    @pytest.mark.parametrize("bits", [ANY])
    def test_a_store_is_of_one_quantisation(self, bits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        place, store = saved(tmp_path / "teacher"), {"path": str(tmp_path / "store")}
        options = {"teacher": place, "store": store, "teacher_model_init_kwargs": {"quantization": bits}}
        run = trainer(tmp_path / "run", **options)
        run.teachers.fill("teacher", progress=False)
        head = head_of(load_model(place)).weight
        manifest = json.loads(next((tmp_path / "store").rglob("manifest.json")).read_text())
        assert bits in json.dumps(manifest)
        with pytest.raises(ValueError, match="quantization"):
            trainer(tmp_path / "other", teacher=place, store=store)
        # Full: the head is all that is loaded.
        monkeypatch.setattr("fastkd.teachers.load_model", lambda *_, **__: pytest.fail("the teacher was loaded"))
        again = trainer(tmp_path / "again", **options)
        again.train()
        assert torch.equal(again.teachers.head("teacher").weight, head)

    @pytest.mark.parametrize("bits", [ANY])
    def test_it_is_parked_and_comes_back(self, bits: str, tmp_path: Path) -> None:
        source = TeacherSource(saved(tmp_path), park=True, options={"quantization": bits})
        teachers = Teachers({"one": source}, device="cpu")
        before = logits(teachers.model("one"))
        teachers.stage([])
        assert teachers.loaded == {"one": "parked"}
        teachers.stage(["one"])
        assert torch.equal(logits(teachers.model("one")), before)


class Allocations(TorchDispatchMode):
    """Counts results of the head's shape that are not views."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape == self.shape and func.namespace == "aten":
            given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if out.untyped_storage().data_ptr() not in given:
                self.found.append(str(func))
        return out


class TestLora:
    def test_defaults(self) -> None:
        found = lora_config({"r": 4})
        assert (found.r, found.lora_alpha, found.target_modules, found.task_type) == (4, 32, "all-linear", "CAUSAL_LM")
        wrapped = adapted(tiny_llama(1), found)
        on = {name.rpartition(".")[2] for name, m in wrapped.get_base_model().named_modules() if hasattr(m, "lora_A")}
        assert on == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        # Plain values, the same in every process, of what was said.
        assert json.loads(json.dumps(adapter_facts(wrapped)))["default"]["r"] == 4

    def test_adapters_are_float32_on_a_base_that_is_not(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, student=tiny_llama(1).bfloat16(), lora={})
        assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {torch.float32}
        assert {p.dtype for p in run.model.parameters() if not p.requires_grad} == {torch.bfloat16}
        run.train()

    def test_the_seed_is_the_adapters_too(self, tmp_path: Path) -> None:
        def begins(seed: int) -> Tensor:
            student = tiny_llama(1)
            torch.seed()
            model = load_student(student, settings(tmp_path, seed=seed), lora_config({}))
            return next(p for p in model.parameters() if p.requires_grad)

        assert torch.equal(begins(3), begins(3))
        assert not torch.equal(begins(3), begins(4))

    @pytest.mark.parametrize("lora", [{}, None])
    def test_a_frozen_head_costs_no_gradient(self, tmp_path: Path, lora: dict | None) -> None:
        run = trainer(tmp_path, student=tiny_llama(1, hidden=24, layers=1), lora=lora)
        batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
        assert batch["input_ids"].numel() != VOCABULARY  # nothing else of the step is 40 x 24
        run.compute_loss(run.model, dict(batch)).backward()  # what is done once, the head's probe
        run.model.zero_grad()
        with Allocations((VOCABULARY, 24)) as seen:
            run.compute_loss(run.model, dict(batch)).backward()
        assert bool(seen.found) is (lora is None)
        assert (head_of(run.model).weight.grad is None) is (lora is not None)

    def test_the_optimizer_holds_the_adapters_alone(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, lora={"r": 2})
        run.train()
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        held = sum(v.numel() for state in run.optimizer.state.values() for v in state.values() if v.dim() > 0)
        assert held == 2 * trained < 0.5 * sum(p.numel() for p in run.model.parameters())

    @pytest.mark.parametrize("bits", [None, ANY])
    def test_gradients_through_checkpoints(self, bits: str | None, tmp_path: Path) -> None:
        place = saved(tmp_path / "student", seed=1)

        def gradients(**changes: Any) -> dict[str, Tensor]:
            options = {"model_init_kwargs": {"quantization": bits}} if bits else {}
            run = trainer(tmp_path, student=str(place), lora={"lora_alpha": 1}, **options, **changes)
            if changes:
                run.model.gradient_checkpointing_enable(run.args.gradient_checkpointing_kwargs)  # as the Trainer does when it begins
            disturbed(run.model).train()
            batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
            run.compute_loss(run.model, batch).backward()
            return {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}

        plain = gradients()
        for reentrant in (False, True):
            kept = gradients(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            for name, gradient in plain.items():
                assert gradient.abs().max() > 0, name
                torch.testing.assert_close(kept[name], gradient)

    def test_resumed_bit_for_bit(self, tmp_path: Path) -> None:
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 2

        options = {"lora": {"r": 2, "lora_dropout": 0.2}, "save_strategy": "steps", "save_steps": 2}
        whole = trainer(tmp_path / "whole", **options)
        whole.train()
        trainer(tmp_path / "cut", callbacks=[Stop()], **options).train()
        files = {f.name for f in (tmp_path / "cut" / "checkpoint-2").iterdir()}
        assert "adapter_model.safetensors" in files
        assert "model.safetensors" not in files
        resumed = trainer(tmp_path / "cut", **options)
        resumed.train(resume_from_checkpoint=True)
        state = resumed.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in whole.model.state_dict().items())
        # Another adapter, or none, is another run.
        for change, message in (
            ({"lora": {"r": 2, "lora_dropout": 0.2, "lora_alpha": 8}}, "adapter.default.lora_alpha was 32, now it is 8"),
            ({"lora": {"r": 4, "lora_dropout": 0.2}}, "adapter.default.r was 2, now it is 4"),
            ({"lora": None}, "adapter was {.*now it is None"),
        ):
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path / "cut", **{**options, **change}).train(resume_from_checkpoint=True)
        eager = tiny_llama(1)
        eager.set_attn_implementation("eager")
        with pytest.raises(ValueError, match=r"student.attn_implementation was 'sdpa', now it is 'eager'"):
            trainer(tmp_path / "cut", student=eager, **options).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("bits", [ANY])
    def test_another_quantisation_is_another_run(self, bits: str, tmp_path: Path) -> None:
        place = str(saved(tmp_path / "student"))
        options = {"student": place, "lora": {"r": 2}, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        trainer(tmp_path / "run", model_init_kwargs={"quantization": bits}, **options).train()
        with pytest.raises(ValueError, match=r"student.quantization_config was"):
            trainer(tmp_path / "run", **options).train(resume_from_checkpoint=True)

    def test_not_on_the_head(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"target_modules: includes the LM head, 'lm_head', .* modules_to_save: \[lm_head\]"):
            trainer(tmp_path, lora={"target_modules": ["q_proj", "lm_head"]})
        run = trainer(tmp_path, lora={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
        before = head_of(run.model).weight.clone()
        run.train()
        assert not torch.equal(head_of(run.model).weight, before)


MERGED: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "tied": ({}, True),
    "dora": ({"use_dora": True}, False),
    "rslora": ({"use_rslora": True, "r": 4}, False),
    "pissa": ({"init_lora_weights": "pissa"}, False),
    "head": ({"modules_to_save": ["lm_head"]}, False),
    "head of a tied model": ({"modules_to_save": ["lm_head"]}, True),
    "embeddings of a tied model": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3, 4]}}, False),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied weights
class TestMerged:
    @pytest.mark.parametrize("case", MERGED)
    def test_it_computes_the_same_and_loads_alone(self, case: str, tmp_path: Path) -> None:
        lora, tied = MERGED[case]
        student = disturbed(adapted(tiny_llama(1, tied=tied), lora_config(lora)))
        student.enable_input_require_grads()
        wanted, before = logits(student), fingerprint(student)
        found = merged(student)
        assert fingerprint(student) == before
        assert not any("lora" in name or "base_layer" in name for name, _ in found.named_modules())
        assert not {p.data_ptr() for p in found.parameters()} & {p.data_ptr() for p in student.parameters()}
        torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-4)
        assert (wanted - logits(tiny_llama(1, tied=tied))).abs().max() > 0.1  # the adapter did something
        found.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(found))

    def test_each_weight_is_rounded_once(self) -> None:
        student = disturbed(adapted(tiny_llama(1).bfloat16(), lora_config({})))
        found = merged(student)
        for name, module in student.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                delta = module.get_delta_weight("default").double()
                exact = module.base_layer.weight.double() + delta
                weight = found.get_submodule(name).weight
                assert weight.dtype == torch.bfloat16
                assert ((weight.double() - exact).abs() <= 2**-8 * (1.01 * exact.abs() + 1.02 * delta.abs())).all()

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_of_quantised_weights_it_is_plain(self, bits: str, family: str, tmp_path: Path) -> None:
        if family == "llama":
            saved(tmp_path / "base")
        else:  # whose layers hold their weights the other way round
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=2, n_positions=32)).save_pretrained(tmp_path / "base")
            if not is_bitsandbytes_available():
                pytest.skip("torchao has none of GPT-2's layers")
        student = disturbed(adapted(load_model(tmp_path / "base", quantization=bits), lora_config({})))
        wanted = logits(student)
        found = merged(student)
        assert torch.equal(logits(student), wanted)
        assert any(map(is_quantized, student.modules()))
        assert not any(map(is_quantized, found.modules()))
        # bitsandbytes rounds the activations to 8 bits too.
        exact = bits == "4bit" or not is_bitsandbytes_available()
        error = (logits(found) - wanted).norm() / wanted.norm()
        assert error < (1e-5 if exact else 0.1), error
        found.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert not hasattr(again.config, "quantization_config")
        assert torch.equal(logits(again), logits(found))

    def test_not_of_a_plain_model(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"model: expected a peft.PeftModel, got LlamaForCausalLM"):
            merged(tiny_llama(1))
        with pytest.raises(TypeError, match=r"expected a peft.PeftModel"):
            trainer(tmp_path).save_merged(tmp_path)


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out")
assert AutoTokenizer.from_pretrained("out").eos_token == "</s>"
with torch.no_grad():
    torch.save(model(torch.load("ids.pt")).logits, "found.pt")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    saved(Path("teacher"), seed=2)
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16)))
    Path("run.yaml").write_text(
        """
student: {from: teacher, layers: [0, 2], lora: {r: 4}}
teacher: teacher
data: {train: train.jsonl, max_length: 16}
training: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-2, logging_steps: 2, save_steps: 2, use_cpu: true,
  disable_tqdm: true}
output_dir: out
"""
    )
    return tmp_path


def fails(capsys: pytest.CaptureFixture, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastkd: ")]
    return line


class TestCommand:
    def test_the_student_of_a_run_needs_no_peft(self, place: Path) -> None:
        assert main(["distill", "run.yaml"]) == 0
        assert not Path("out/adapter_config.json").exists()
        base = load_model("teacher", layers=[0, 2])
        student = peft.PeftModel.from_pretrained(base, "out/adapter").eval()
        wanted = logits(student)
        assert (wanted - logits(load_model("teacher", layers=[0, 2]))).abs().max() > 1e-3
        torch.save(IDS, "ids.pt")
        child = subprocess.run([sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True)
        assert child.returncode == 0, child.stderr[-2000:]
        torch.testing.assert_close(torch.load("found.pt"), wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("bits", [ANY])
    def test_qlora(self, bits: str, place: Path) -> None:
        words = [f"student.quantization={bits}", f"teacher={{model: teacher, quantization: {bits}, attn_implementation: eager}}"]
        assert main(["distill", "run.yaml", *words]) == 0
        student = load_model("out")
        assert not any(map(is_quantized, student.modules()))
        base = load_model("teacher", quantization=bits, layers=[0, 2])
        wanted = logits(peft.PeftModel.from_pretrained(base, "out/adapter").eval())
        exact = bits == "4bit" or not is_bitsandbytes_available()
        assert (logits(student) - wanted).norm() / wanted.norm() < (1e-5 if exact else 0.1)

    def test_refused_before_any_model_is_loaded(self, place: Path, capsys, monkeypatch) -> None:
        monkeypatch.setattr("fastkd.begin.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
        lora = "student.lora={target_modules: [q_proj, lm_head]}"
        assert "run.yaml: student.lora: target_modules: includes the LM head" in fails(capsys, "distill", "run.yaml", lora)
        assert "student.lora: " in fails(capsys, "distill", "run.yaml", "student.lora={target_modules: [absent]}")
        assert "student.lora: " in fails(capsys, "distill", "run.yaml", "student.lora={r: 0}")
        monkeypatch.setattr(models, "is_bitsandbytes_available", lambda: False)
        line = fails(capsys, "distill", "run.yaml", "student.quantization=4bit")
        assert line.endswith("run.yaml: student.quantization: 4bit needs the package bitsandbytes: pip install bitsandbytes")
        line = fails(capsys, "distill", "run.yaml", "teacher={model: teacher, quantization: 4bit}")
        assert "run.yaml: teacher.quantization: 4bit needs" in line

    def test_the_attention_that_was_asked_for(self, place: Path, monkeypatch) -> None:
        kept = {}
        monkeypatch.setattr("fastkd.run._save", lambda trainer: kept.update(run=trainer))
        words = ["student.attn_implementation=eager", "teacher={model: teacher, attn_implementation: eager}", "student.lora=false"]
        assert main(["distill", "run.yaml", *words]) == 0
        run = kept["run"]
        assert run.model.config._attn_implementation == "eager"
        assert run.teachers.model("teacher").config._attn_implementation == "eager"
        assert run.teachers.identity("teacher")["options"]["attn_implementation"] == "eager"
