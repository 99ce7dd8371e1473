"""Packed rows: no token lost, documents kept apart where the model can, and the loss that separate documents have."""

import itertools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

pytest.importorskip("transformers")

from fastkd import TeacherHidden, fused_linear_kd
from fastkd.data import DataError, KDCollator, tokenize
from fastkd.hf import head_of, run_body
from fastkd.packing import keeps_documents_apart, pack, suited_to
from fastkd.trainer import KDConfig, KDTrainer

from .test_hf import FAMILIES, tiny
from .tiny import VOCABULARY, tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def documents(*rows: list[int], labels: list[list[int]] | None = None) -> Dataset:
    """Rows as `tokenize` returns them, named a, b, c, ..."""
    labels = labels or [[-100, *row[1:]][: len(row)] for row in rows]
    names = [chr(ord("a") + i) for i in range(len(rows))]
    return Dataset.from_dict({"input_ids": list(rows), "labels": labels, "sample_index": range(len(rows)), "sample_id": names})


def some_documents(n: int, longest: int, seed: int = 0, shortest: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    return documents(*(generator.integers(3, VOCABULARY, generator.integers(shortest, longest + 1)).tolist() for _ in range(n)))


# The rows.


def test_rows_written_out():
    packed = pack(documents([10, 11, 12], [20, 21], [30, 31, 32, 33, 34, 35]), 4)
    assert packed.to_dict() == {
        "input_ids": [[10, 11, 12, 20], [21, 30, 31, 32], [33, 34, 35]],
        "labels": [[-100, 11, 12, -100], [-100, -100, 31, 32], [-100, 34, 35]],
        "position_ids": [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2]],
        "sample_index": [0, 1, 2],
        "sample_id": ["pack 0: a..b", "pack 1: b..c", "pack 2: c"],
    }


@pytest.mark.parametrize("max_length", [2, 7, 16, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_token_is_lost_or_doubled(max_length, seed):
    given = some_documents(26, 40, seed).select([*range(20, 26), *range(3, 18)])  # an order that is not the one in memory
    stream, expected = [], []
    for ids, labels in zip(given["input_ids"], given["labels"], strict=True):
        for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
            starts = i == 0 or len(stream) % max_length == 0
            position = 0 if starts else expected[-1][2] + 1
            stream.append(token)
            expected.append((token, -100 if starts else label, position))
    cut = [expected[i : i + max_length] for i in range(0, len(expected), max_length)]
    rows = [row for row in cut if any(label != -100 for _, label, _ in row)]
    packed = pack(given, max_length)
    found = [list(zip(r["input_ids"], r["labels"], r["position_ids"], strict=True)) for r in packed]
    assert found == rows
    left_out = len(stream) - sum(map(len, found))
    assert left_out == sum(len(row) for row in cut if row not in rows)
    if max_length == 1000:
        assert [token for token, _, _ in found[0]] == stream


def test_labels_that_do_not_count_stay_so():
    given = documents([10, 11, 12, 13], [20, 21, 22], labels=[[-100, -100, 12, 13], [-100, 21, -100]])
    assert pack(given, 4)["labels"][:] == [[-100, -100, 12, 13], [-100, 21, -100]]


def test_rows_without_a_counted_token_are_left_out():
    given = documents([10, 11, 12], [20, 21, 22], [30], labels=[[-100, 11, 12], [-100, -100, -100], [-100]])
    packed = pack(given, 3)
    assert packed["sample_id"][:] == ["pack 0: a"]
    with pytest.raises(DataError, match=r"train: no row has a token to train on within max_length=3 \(2 documents\)"):
        pack(given.select([1, 2]), 3)


def test_an_empty_document_is_no_neighbour():
    packed = pack(documents([], [10, 11], [], [20, 21], []), 4)
    assert packed["sample_id"][:] == ["pack 0: b..d"]
    assert packed["position_ids"][:] == [[0, 1, 0, 1]]


def test_text_from_the_tokenizer_to_packs():
    texts = Dataset.from_dict({"id": ["x", "y"], "text": ["a cat sat", "the dog ran on the mat"]})
    tokenizer = tiny_tokenizer()
    rows = tokenize(texts, tokenizer, max_length=None)
    packed = pack(rows, 6)
    end = tokenizer.eos_token_id
    assert [token for row in packed["input_ids"][:] for token in row] == [*rows[0]["input_ids"], *rows[1]["input_ids"]]
    assert packed[0]["input_ids"][3] == end
    assert packed[0]["labels"][3] == end, "a document's end counts"
    assert packed[0]["labels"][4] == -100, "the next one's start does not"
    assert packed[0]["sample_id"] == "pack 0: x..y"


def test_bad_input_is_refused():
    good = documents([1, 2, 3])
    for bad in (1, True, 2.0, None):
        with pytest.raises(ValueError, match=r"max_length: expected a whole number >= 2, got"):
            pack(good, bad)
    with pytest.raises(TypeError, match=r"train: expected a datasets.Dataset, got list"):
        pack([{"input_ids": [1]}], 4)
    with pytest.raises(DataError, match="eval: expected the columns input_ids, labels, sample_id; found text"):
        pack(Dataset.from_dict({"text": ["a"]}), 4, name="eval")
    with pytest.raises(DataError, match="train: the rows are packed already"):
        pack(pack(good, 4), 4)
    with pytest.raises(DataError, match="train: the data set has no rows"):
        pack(good.select([]), 4)
    with pytest.raises(DataError, match="train: b: labels: expected as many values as input_ids"):
        pack(documents([1, 2], [3, 4], labels=[[-100, 2], [-100, 4, 5]]), 4)
    for nothing in (documents([], [1]), documents([], []).cast(good.features)):
        with pytest.raises(DataError, match="no row has a token to train on"):
            pack(nothing, 4)


# The batch.


def test_batches_of_packed_rows():
    packed = pack(documents([10, 11, 12], [20, 21], [30, 31]), 5)
    batch = KDCollator(0, pad_to_multiple_of=4)(packed.to_list())
    assert set(batch) == {"input_ids", "position_ids", "labels", "shift_labels", "sample_index"}, "no mask: it would hide the restarts"
    assert batch["position_ids"].dtype == torch.int64
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch["input_ids"][1].tolist() == [30, 31, 0, 0, 0, 0, 0, 0]
    assert batch["shift_labels"].tolist() == [[11, 12, -100, 21, -100, -100, -100, -100], [31, *[-100] * 7]]
    with pytest.raises(ValueError, match="rows: position_ids: expected in all rows of a batch or in none"):
        KDCollator(0)([packed[0], {k: v for k, v in packed[1].items() if k != "position_ids"}])


# Which models keep documents apart. Falcon does since some release after 5.10.

APART = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "vaultgemma", "nanochat", "phi", "phi3", "cohere", "cohere2"),
    *("granite", "hyperclovax", "minicpm3", "gpt2", "gptj", "codegen", "gpt_neo", "gpt_neox", "gpt_bigcode", "stablelm", "starcoder2"),
    *("olmo", "olmo2", "smollm3", "glm4", "nemotron", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "jetmoe", "dbrx"),
    *("deepseek_v2", "deepseek_v3"),
]
MIXED = ["opt", "xglm", "biogpt", "bloom", "mpt", "mamba", "mamba2", "rwkv", "recurrent_gemma", "falcon_h1", "gpt_oss"]
WINDOWED = ("mistral", "gemma2", "gemma3_text", "cohere2", "starcoder2", "mixtral")


def test_every_family_is_listed():
    assert {*APART, *MIXED, "falcon"} == set(FAMILIES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", APART)
def test_documents_are_as_if_alone(family, attention):
    window = {"sliding_window": 5} if family in WINDOWED else {}  # shorter than the documents
    model = tiny(family, **window)
    try:
        model.set_attn_implementation(attention)
    except ValueError as error:
        pytest.skip(str(error))
    assert keeps_documents_apart(model)
    packed = pack(documents(*(torch.randint(3, 101, (n,)).tolist() for n in (12, 1, 9, 7, 11))), 32)
    assert len(packed) == 2  # the second row is padded
    batch = KDCollator(0)(packed.to_list())
    with torch.no_grad():
        hidden, _ = run_body(model, input_ids=batch["input_ids"], position_ids=batch["position_ids"])
        for row in range(2):
            starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
            for a, b in itertools.pairwise(starts):
                alone, _ = run_body(model, input_ids=batch["input_ids"][row : row + 1, a:b])
                torch.testing.assert_close(hidden[row, a:b], alone[0], rtol=1e-4, atol=1e-5 * float(hidden.abs().max()))


@pytest.mark.parametrize("family", MIXED)
def test_models_that_cannot_are_found_out(family):
    assert not keeps_documents_apart(tiny(family))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_probe_in_other_dtypes(dtype):
    for family in ("llama", "gpt2", "gemma2") + (("qwen3_moe",) if dtype != torch.float64 else ()):  # which experts do not run in
        assert keeps_documents_apart(tiny(family).to(dtype)), family
    for family in ("opt", "falcon_h1", "mamba"):
        assert not keeps_documents_apart(tiny(family).to(dtype)), family


def test_the_probe_sees_a_window_that_leaks_and_positions_that_run_on():
    from transformers import LlamaForCausalLM

    class OwnPositions(LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **inputs):
            return super().forward(input_ids, **inputs)

    class NoPositions(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None, return_dict=None):
            return super().forward(input_ids, use_cache=use_cache, return_dict=return_dict)

    for cls in (OwnPositions, NoPositions):
        assert not keeps_documents_apart(cls(tiny_llama(0).config))
    # Learned positions that run on, with a mask that is right.
    model = tiny("gpt2")
    table = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: table(torch.arange(ids.shape[-1]).expand(ids.shape))
    assert not keeps_documents_apart(model)


def test_the_probe_leaves_no_trace():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert keeps_documents_apart(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_the_probe_looks_inside_peft():
    peft = pytest.importorskip("peft")
    for family, targets, apart in (("llama", ["q_proj"], True), ("mamba", ["in_proj"], False)):
        wrapped = peft.get_peft_model(tiny(family), peft.LoraConfig(r=2, target_modules=targets))
        assert keeps_documents_apart(wrapped) is apart


def test_one_model_that_cannot_is_enough_to_fall_back():
    packed = pack(some_documents(5, 9, shortest=4), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert suited_to(packed, tiny("llama"), tiny("gpt2")) is packed
    with pytest.warns(UserWarning, match="packing: MambaForCausalLM, OPTForCausalLM cannot keep the documents of a row apart: tokens see"):
        plain = suited_to(packed, tiny("llama"), tiny("opt"), tiny("mamba"))
    assert plain.column_names == [c for c in packed.column_names if c != "position_ids"]
    assert plain["labels"][:] == packed["labels"][:]
    batch = KDCollator(0)(plain.to_list())
    assert "position_ids" not in batch
    assert batch["attention_mask"].sum() == sum(map(len, packed["input_ids"]))


# The loss.


def total(student, teacher, batch) -> torch.Tensor:
    """The sum, not the mean, over a batch's counted tokens, with its gradients."""
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask") if key in batch}
    hidden, _ = run_body(student, **inputs)
    with torch.no_grad():
        theirs, _ = run_body(teacher, **inputs)
    head = head_of(student)
    loss = fused_linear_kd(
        hidden, head.weight, TeacherHidden(theirs, head_of(teacher).weight), batch["shift_labels"], kd_ratio=0.4, normalizer=1
    )
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_loss_and_gradients_of_a_row_are_those_of_its_documents(family):
    def built(seed: int):
        torch.manual_seed(seed)
        window = {"sliding_window": 5} if family in WINDOWED else {}
        return tiny(family, **window).double()

    given = some_documents(7, 12, seed=3, shortest=2)
    packed = pack(given, sum(map(len, given["input_ids"])))
    assert len(packed) == 1
    teacher, together, apart = built(1), built(0), built(0)
    loss = total(together, teacher, KDCollator(0)(packed.to_list()))
    separate = sum(total(apart, teacher, KDCollator(0)([row])) for row in given)
    assert loss.item() == pytest.approx(separate.item(), rel=1e-6)
    for (name, a), b in zip(together.named_parameters(), apart.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6 * float(b.grad.abs().max()), msg=name)

    plain = total(built(0), teacher, KDCollator(0)(packed.remove_columns("position_ids").to_list()))
    assert abs(plain - loss) > 1e-3 * loss, "boundaries matter here"


def trained(rows: Dataset, folder: Path, **settings) -> tuple[KDTrainer, dict]:
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        **settings,
    }
    trainer = KDTrainer(
        tiny_llama(0),
        tiny_llama(1, hidden=24),
        KDConfig(output_dir=str(folder), kd_ratio=0.5, disable_tqdm=True, **options),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    before = trainer.evaluate()
    trainer.train()
    return trainer, before


def test_the_trainer_reads_packed_rows_as_it_reads_documents(tmp_path):
    given = some_documents(8, 12, shortest=3)
    packed = pack(given, 2 * sum(map(len, given["input_ids"])))  # one row: nothing is cut
    _, alone = trained(given, tmp_path / "documents")
    trainer, joined = trained(packed, tmp_path / "packed", per_device_train_batch_size=1)
    assert joined["eval_tokens"] == alone["eval_tokens"]
    for name in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement"):
        assert joined[name] == pytest.approx(alone[name], rel=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "packed" / "metrics.jsonl").read_text().splitlines()]
    assert trainer.state.global_step == 3
    assert [row["tokens"] for row in rows if "lr" in row] == [joined["eval_tokens"] * step for step in (1, 2, 3)]


# The example.


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    words = [" ".join(f"w{(i * k) % 23}" for i in range(400)) for k in range(1, 12)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("".join(f" = Title {i} = \n {text} \n" for i, text in enumerate(words)))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"question": text, "answer": "42"}) + "\n" for text in words))
    out = tmp_path / "out.json"
    command = [sys.executable, "examples/pretrain.py", "--steps", "4", "--seeds", "1", "--eval-tokens", "512", "--out", str(out)]
    command += [f"--{name}={tmp_path / file}" for name, file in (("train", "train.txt"), ("test", "test.txt"), ("other", "other.jsonl"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "strong-to-weak" in done.stdout
    assert "one seed: nothing can be said to be significant" in done.stdout
    report = json.loads(out.read_text())
    assert {"date", "command", "commit", "hardware", "versions", "rows", "comparisons"} <= report.keys()
    assert len(report["rows"]) == 3 + 1 + 3 * 5
    assert all(np.isfinite([row["test"], row["other"]]).all() for row in report["rows"])
    by = {(row.get("regime"), row.get("kd_ratio")): row["test"] for row in report["rows"]}
    assert len(set(by.values())) == len(by), "each teacher and each kd_ratio makes a difference"


def test_the_example_says_what_it_misses(tmp_path):
    command = [sys.executable, "examples/pretrain.py", f"--train={tmp_path / 'none.txt'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "none.txt: no such file; name the texts with --train, --test and --other" in done.stderr


def test_the_example_tells_significant_from_not(monkeypatch):
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pretrain

    # Against kd_ratio 0: same-level 0.4 better by 0.1 in each seed, but for a little; all else differs by noise that changes sign.
    noise, rows = (0.05, -0.04, -0.01), []
    for seed, wave in enumerate(noise):
        rows.append({"regime": "none", "kd_ratio": 0.0, "seed": seed, "test": 5.0 + seed, "other": 7.0 + seed})
        for regime in pretrain.TEACHERS:
            for ratio in pretrain.RATIOS[1:]:
                change = -0.1 + wave / 100 if (regime, ratio) == ("same-level", 0.4) else wave
                rows.append({"regime": regime, "kd_ratio": ratio, "seed": seed, "test": 5 + seed + change, "other": 7 + seed + wave})
    found = pretrain.compare(rows)
    assert len(found) == 30
    sure = [c for c in found if c["p"] < 0.05]
    assert [(c["regime"], c["kd_ratio"], c["text"]) for c in sure] == [("same-level", 0.4, "test")]
    assert sure[0]["difference"] == pytest.approx(-0.1)
    rows += [{"teacher_of": regime, "parameters": 10**6, "test": 5.0, "other": 7.0} for regime in pretrain.TEACHERS]
    text = pretrain.table({"rows": rows, "comparisons": found})
    assert "in domain, better than kd_ratio 0 (nats per token): same-level 0.4 (-0.100) **" in text
    assert "in domain, worse than kd_ratio 0 (nats per token): none" in text
    assert "in domain, no significant difference: 14 of 15" in text
    assert "out of domain, no significant difference: 15 of 15" in text
