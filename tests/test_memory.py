"""Memory before loading: what is counted is what a hand counts, levers lower it, proposals fit, and whole runs come to what was said."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory_plan
from fastkd import chunking, memory, models, ops, tracing
from fastkd.begin import begin
from fastkd.cli import main
from fastkd.config import load_config
from fastkd.fitting import proposals
from fastkd.memory import GB, predict, setting_of
from tests.tiny import rows, tiny_llama, tiny_tokenizer

PARAMETERS = 2 * 40 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16  # of tiny_llama: two tables, two layers, a norm


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed, hidden, layers in (("student", 0, 16, 2), ("teacher", 1, 24, 3)):
        tiny_llama(seed, hidden=hidden, layers=layers).save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
        (tmp_path / name / "model.safetensors").unlink()  # what is not there cannot be read
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(16)))
    config = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "data": {"train": "rows.jsonl", "max_length": 32},
        "training": {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True},
    }
    Path("run.yaml").write_text(json.dumps(config))
    return tmp_path


def setting(*overrides: str, device: str = "cuda", path: str | Path = "run.yaml") -> memory.Setting:
    return setting_of(begin(load_config(path, overrides)), device=device, base=0)


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)


def part(estimate: memory.MemoryEstimate, phase: str, name: str) -> int:
    found = next(p for p in estimate.phases if p.name == phase)
    return found.gpu.get(name, 0)


def test_weights_gradients_and_state_are_those_of_a_hand_count(place, no_loading):
    estimate = predict(setting())
    assert part(estimate, "optimizer step", "gradients") == 4 * PARAMETERS
    assert part(estimate, "optimizer step", "optimizer state") == 8 * PARAMETERS
    weights = part(estimate, "optimizer step", "student weights")
    assert 4 * PARAMETERS <= weights <= 4 * PARAMETERS + 64  # and the frequencies of the rotary positions
    assert estimate.rough is None


@pytest.mark.parametrize(
    ("optim", "dtype", "state"),
    [
        ("sgd", None, 0),
        ("adamw_8bit", None, 2.04 * PARAMETERS),
        ("adamw_torch", "bfloat16", 4 * PARAMETERS),
        # A row and a column for each matrix, an entry for each weight of a norm.
        ("adafactor", None, 4 * (2 * (40 + 16) + 2 * (4 * 32 + 3 * 48 + 32) + 16)),
    ],
)
def test_state_of_each_optimizer(place, optim, dtype, state):
    start = setting()  # replaced here, as a configuration wants the packages to be installed
    start = dataclasses.replace(start, optim=optim, student=dataclasses.replace(start.student, dtype=dtype))
    assert part(predict(start), "optimizer step", "optimizer state") == int(state)


def test_the_ledger_counts_storages_once_and_their_end():
    with FakeTensorMode():
        layer = torch.nn.Linear(5, 7, bias=False)
        x = torch.ones(3, 5)
        with tracing.Ledger(layer) as ledger:
            y = layer(x)  # [3, 7]; the transposed weight is a view of what is counted elsewhere
            assert ledger.total == 3 * 7 * 4
            z = y.relu()
            assert ledger.total == 2 * 3 * 7 * 4
            view = z.view(-1)
            assert ledger.total == 2 * 3 * 7 * 4
            del y, view  # relu saves its result
            assert ledger.total == 3 * 7 * 4
            z.sum().backward()
            assert ledger.now["gradients"] == 7 * 5 * 4
            del z
        assert sum(ledger.at_peak.values()) >= 3 * 7 * 4 + 7 * 5 * 4


def test_a_mask_is_counted_in_each_layer(place):
    """transformers makes none where no row is padded; torch's attention keeps one of fp32 for each layer."""
    found = memory.Prediction(setting())
    args = ("train", tracing.model_key(found.setting.student, True), None, 8, 16)
    even, padded = (sum(found._pass(*args, padded, False).parts.values()) for padded in (False, True))
    assert padded - even >= 2 * 8 * 16 * 16 * 4


@pytest.mark.parametrize("chunk_tokens", [0, 7])
@pytest.mark.parametrize("shared", [0, 300])
def test_loss_buffers_are_those_that_the_loss_makes(chunk_tokens, shared):
    hidden, weight = torch.zeros(50, 8), torch.zeros(400, 8)
    teacher = (torch.zeros(50, 8), torch.zeros(300, 8)) if shared else (None, None)
    chunks = ops._Chunks(hidden, weight, *teacher, 400, 50, chunk_tokens, torch.float32)
    made = sum(t.nbytes for t in (chunks.student, chunks.teacher) if t is not None)
    assert chunking.buffer_bytes(50, 400, shared, torch.float32, torch.float32, torch.device("cpu"), chunk_tokens) == made


def test_levers_lower_what_they_are_said_to(place, no_loading):
    before = predict(setting())
    for overrides in (
        ["training.gradient_checkpointing=true"],
        ["training.per_device_train_batch_size=4"],
        ["training.optim=sgd"],
        ["student.dtype=bfloat16"],
        ["student.lora={r: 2}"],
        ["data.padding_free=true"],
        ["loss.chunk_tokens=4"],
        ["teacher.device=cpu"],
    ):
        assert predict(setting(*overrides)).gpu < before.gpu, overrides
    longer = predict(setting("training.per_device_train_batch_size=16"))
    assert longer.gpu > before.gpu
    paged = predict(dataclasses.replace(setting(), optim="paged_adamw_8bit"))
    assert paged.gpu < before.gpu
    step = next(p for p in paged.phases if p.name == "training step")
    assert step.host["optimizer state"] == int(2.04 * PARAMETERS)
    full = dataclasses.replace(setting("store={kind: hidden}"), store_full=True)
    assert predict(full).gpu < before.gpu
    assert part(predict(full), "training step", "teacher weights") == 0


def test_offloaded_activations_are_on_the_host(place, monkeypatch):
    monkeypatch.setattr(tracing, "LEAST_BYTES", 1)
    tracing.trace.cache_clear()
    before, after = predict(setting()), predict(setting("training.activation_offloading=true"))
    step = next(p for p in after.phases if p.name == "training step")
    moved = step.host["offloaded activations"]
    assert moved > 0
    assert after.gpu < before.gpu
    tracing.trace.cache_clear()


@pytest.mark.parametrize("share", [0.97, 0.9, 0.8])
def test_proposals_fit_the_card_that_they_claim(place, no_loading, monkeypatch, share):
    for name in ("CUDA_CONTEXT", "CUDA_HOST"):
        monkeypatch.setattr(memory, name, 0)
    start = setting()
    before = predict(start)
    assert proposals(start, before.gpu) == []
    found = proposals(start, int(share * before.gpu))
    assert found[-1].fits
    assert all(p.estimate.gpu > share * before.gpu for p in found[:-1])
    # What is proposed is what the configuration with these words comes to.
    words = [word for p in found for word in p.change.split()]
    if not any(word.startswith("store") for word in words):
        assert predict(setting(*words)).gpu == found[-1].estimate.gpu


def test_what_fits_no_card_is_said(place, no_loading, capsys):
    assert main(["plan", "run.yaml", "--card", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "does not fit 0.2 GB" in text
    assert "are lacking: a smaller model" in text
    assert main(["plan", "run.yaml", "--card", "24"]) == 0
    assert "fits 24 GB" in capsys.readouterr().out
    assert main(["plan", "run.yaml"]) == 0
    assert "memory (CPU; largest micro-batch 8 x " in capsys.readouterr().out


def test_what_cannot_be_traced_is_rough_and_says_so(place, monkeypatch):
    exact = predict(setting())

    def fail(*args):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(tracing, "_train", fail)
    tracing.trace.cache_clear()
    estimate = predict(setting())
    tracing.trace.cache_clear()
    assert "RuntimeError: data-dependent" in str(estimate.rough)
    assert "rough" in str(estimate)
    assert 0.5 < estimate.gpu / exact.gpu < 2
    assert json.loads(json.dumps(estimate.to_dict()))["rough"] == estimate.rough


def test_the_largest_micro_batch_is_that_of_the_plan(place):
    start = setting()
    schedule = start.schedule
    lengths = schedule.samples.lengths
    batches = [schedule.micro_batch(s, 0, process=0, processes=1, size=8) for s in range(4)]
    shapes = [(len(b), max(lengths[i] for i in b)) for b in batches]
    found = memory.largest_micro_batch(schedule, 8)
    assert found[:2] == max(shapes, key=lambda s: s[0] * s[1])
    joined = memory.largest_micro_batch(schedule, 8, True)
    assert joined[:3] == (1, max(sum(lengths[i] for i in b) for b in batches), False)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell the peak")
@pytest.mark.parametrize("overrides", [[], ["training.gradient_checkpointing=true", "training.optim=sgd"]])
def test_a_whole_run_comes_to_what_was_predicted(tmp_path, overrides):
    memory_plan.make_problem(tmp_path, ["llama-60m", "llama-100m"])
    found = memory_plan.compare(tmp_path, [*overrides, "training.per_device_train_batch_size=2"], default_malloc=False)
    assert abs(found["error"]) < memory_plan.TARGET, found
    assert found["measured"] > GB


QWEN = {  # of the models' public configurations: width, inner width, layers, heads, key-value heads, vocabulary, tied
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-14B-Instruct": (5120, 13824, 48, 40, 8, 152064, False),
}


@pytest.mark.parametrize("card", [24, 80])
def test_the_examples_for_one_gpu_fit_it(tmp_path, monkeypatch, no_loading, card):
    """By the prediction; rows are as long as the example allows."""
    pytest.importorskip("bitsandbytes")
    path = Path(__file__).parents[1] / "examples" / f"one-gpu-{card}gb.yaml"
    given = load_config(path)
    monkeypatch.chdir(tmp_path)
    names = {"student": given.student.model, "teacher": given.teachers["teacher"].model}
    for place, name in names.items():
        width, inner, layers, heads, groups, vocabulary, tied = QWEN[name]
        transformers.Qwen2Config(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
            vocab_size=vocabulary, tie_word_embeddings=tied, dtype="bfloat16", architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(place)  # fmt: skip
        tiny_tokenizer().save_pretrained(place)
    row = json.dumps({"input_ids": [5] * given.data.max_length})
    Path("rows.jsonl").write_text(f"{row}\n" * 16)
    # What is found is remembered by the model's name: here that of a folder of its own.
    words = [f"{role}.model={tmp_path}/{role}" for role in names]
    words += ["data.train=rows.jsonl", "training.max_steps=1", "training.use_cpu=true"]
    estimate = predict(setting(*words, path=path))
    assert estimate.rough is None
    assert estimate.tokens == given.data.max_length
    assert 0.5 * card * GB < estimate.gpu < 0.95 * card * GB, str(estimate)


def test_what_is_not_modelled_is_said(place):
    start = setting(device="cpu")
    assert "not modelled: what malloc keeps" in str(predict(start))
    assert predict(setting()).notes == ()
    other = predict(dataclasses.replace(setting(), optim="lomo", shards="FSDP"))
    assert len(other.notes) == 2
    assert "FSDP: each process is taken to hold the whole student" in str(other)
    assert "training.optim lomo: counted as adamw_torch" in str(other)
