"""Batches without padding: the losses and gradients of padded ones, and what is said of how much of a batch is useful."""

import math
import time
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from fastkd.data import KDCollator
from fastkd.hf import head_of
from fastkd.pacing import DUMMY
from fastkd.packing import Layout, joined, keeps_documents_apart, pack
from fastkd.plan import Plan, Samples
from fastkd.presets import curriculum, kd
from fastkd.preview import preview
from fastkd.report import VOLATILE, read_metrics
from fastkd.teachers import Teachers
from fastkd.trainer import KDConfig, KDTrainer, NonFiniteLossError

from .test_hf import tiny
from .tiny import VOCABULARY, tiny_llama, tiny_tokenizer


def ragged(n: int, longest: int = 20, seed: int = 0) -> Dataset:
    """Rows of very different lengths; of each a prompt, and some tokens of the rest, do not count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(4, longest + 1, (), generator=generator)),), generator=generator).tolist()
        prompt = 1 + len(ids) // 3
        labels = [-100] * prompt + [-100 if (j + i) % 4 == 0 else t for j, t in enumerate(ids[prompt:])]
        labels[-1] = ids[-1]
        made.append({"input_ids": ids, "labels": labels, "sample_index": i, "sample_id": f"s{i}", "score": (7 * i) % 10 / 10})
    return Dataset.from_list(made)


def model_of(family: str, seed: int):
    torch.manual_seed(seed)
    off = {"gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, "opt": {"dropout": 0}}.get(family, {})
    return tiny_llama(seed) if family == "llama" else tiny(family, vocab_size=VOCABULARY, **off)


def trainer(
    folder, family="llama", data=None, plan=None, eval_data=None, student=None, teacher=None, callbacks=None, collator=None, **changes
):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 4,
        "disable_tqdm": True,
        "kd_ratio": 0.6,
        "temperature": 2.0,
    }
    return KDTrainer(
        model_of(family, 1) if student is None else student,
        model_of(family, 2) if teacher is None else teacher,
        KDConfig(**{**settings, **changes}),
        ragged(14) if data is None else data,
        eval_data,
        processing_class=tiny_tokenizer(),
        data_collator=collator,
        callbacks=callbacks,
        plan=plan,
    )


def gradients(run: KDTrainer, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    run.model.zero_grad()
    run.model.train()
    loss = run.compute_loss(run.model, batch)
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        error = float((found[name] - value).abs().max()) / max(float(value.abs().max()), 1e-3 * largest)
        assert error < tolerance, f"{name}: {error:.1e}"


def batches(run: KDTrainer) -> list[dict]:
    return list(run.get_train_dataloader())


# The batch.


def test_a_joined_batch_written_out():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_index": 3},
        {"input_ids": [8], "labels": [-100], "sample_index": 4},
        {"input_ids": [9, 10, 11, 12], "labels": [-100, -100, 11, 12], "sample_index": 5},
    ]
    padded = KDCollator(0)(rows)
    flat = joined(padded)
    assert set(flat) == {"input_ids", "position_ids", "labels", "shift_labels", "sample_index", "kept"}
    assert flat["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert flat["kept"].tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    for name in ("labels", "shift_labels", "sample_index"):
        assert torch.equal(flat[name], padded[name])
    layout = Layout(padded["labels"].shape, flat["kept"])
    assert layout.join(padded["shift_labels"]).tolist() == [[6, 7, -100, -100, -100, 11, 12, -100]]
    assert torch.equal(layout.spread(flat["input_ids"]), padded["input_ids"])
    assert layout.spread(layout.join(padded["shift_labels"]), -100).tolist() == padded["shift_labels"].tolist()
    whole = Layout(padded["labels"].shape)
    assert whole.join(padded["labels"]) is whole.spread(padded["labels"]) is padded["labels"]


def test_padding_may_be_anywhere():
    padded = KDCollator(0)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_index": 0}] * 2)
    left = {
        name: torch.nn.functional.pad(value, (2, 0), value=-100 if "labels" in name else 0)
        for name, value in padded.items()
        if value.ndim > 1
    }
    left["token_type_ids"] = torch.arange(10).view(2, 5)
    flat = joined({**left, "sample_index": padded["sample_index"]})
    assert flat["input_ids"].tolist() == [[5, 6, 7, 5, 6, 7]]
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert flat["token_type_ids"].tolist() == [[2, 3, 4, 7, 8, 9]]
    assert flat["kept"].tolist() == [2, 3, 4, 7, 8, 9]


def test_batches_that_cannot_be_joined_are_refused():
    good = KDCollator(0)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_index": 0}] * 2)
    for changed, message in (
        ({"attention_mask": None}, r"padding_free: expected of data_collator an attention_mask \(2, 3\) that tells padding, got none"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"got one of shape \(2, 1, 3, 3\)"),
        ({"position_ids": torch.arange(3).expand(2, 3)}, "padding_free: the batch has position_ids, its rows are packed already"),
        ({"weights": torch.ones(2)}, r"padding_free: data_collator: weights: expected \[B, S, ...\] = \[2, 3\], got \[2\]"),
        (
            {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])},
            "padding_free: row 1 of the batch: a token counts that would be predicted from padding, at position 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            joined({name: value for name, value in {**good, **changed}.items() if value is not None})


# Loss and gradients.


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma3_text", "mixtral"])
def test_each_sample_has_the_gradients_it_has_in_a_padded_batch(tmp_path, family):
    """Of each sample by itself: the others of the batch are there, but do not count."""
    padded, free = (trainer(tmp_path, family, padding_free=free) for free in (False, True))
    assert (family == "mixtral") == bool(getattr(padded.model.config, "output_router_logits", False)), "its auxiliary loss too"
    for a, b in zip(batches(padded)[:1], batches(free)[:1], strict=True):
        assert a["attention_mask"].sum() < a["attention_mask"].numel()
        assert b["input_ids"].shape == b["position_ids"].shape == (1, a["attention_mask"].sum())
        assert "attention_mask" not in b
        assert torch.equal(a["sample_index"], b["sample_index"]), "the plan's order"
        for row in [None, *range(len(a["labels"]))]:
            pair = []
            for run, batch in ((padded, a), (free, b)):
                one = dict(batch)
                if row is not None:
                    one["shift_labels"] = torch.full_like(batch["shift_labels"], -100)
                    one["shift_labels"][row] = batch["shift_labels"][row]
                pair.append(gradients(run, one))
            assert pair[0][0] == pytest.approx(pair[1][0], rel=1e-5)
            assert_close(pair[1][1], pair[0][1])


def test_rows_do_not_see_each_other(tmp_path):
    """Another row beside it changes nothing in a sample's gradient; the test would see it if it did."""
    run = trainer(tmp_path, padding_free=True)
    first, second, third = (dict(row) for row in ragged(3).to_list())
    found = []
    for other in (first, second):
        other["labels"] = [-100] * len(other["labels"])
        found.append(gradients(run, joined(KDCollator(0)([other, third])))[1])
    assert_close(found[1], found[0])
    mixed = []
    for other in (first, second):
        batch = joined(KDCollator(0)([other, third]))
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        mixed.append(gradients(run, batch)[1])
    with pytest.raises(AssertionError):
        assert_close(mixed[1], mixed[0], 1e-2)


def test_runs_end_with_the_same_weights_and_evaluations(tmp_path):
    plan, runs = curriculum(buckets=2, epochs=[1, 1]), []
    for free in (False, True):
        seen = []
        run = trainer(
            tmp_path / str(free),
            plan=plan,
            eval_data=ragged(7, seed=3),
            eval_strategy="steps",
            eval_steps=2,
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=4,
            padding_free=free,
        )
        run.compute_metrics = lambda found, seen=seen: seen.append(found) or {"right": float((found.predictions == found.label_ids).mean())}
        run.train()
        runs.append((run, seen, read_metrics(tmp_path / str(free))))
    (padded, seen, rows), (free, found, free_rows) = runs
    assert_close(dict(free.model.named_parameters()), dict(padded.model.named_parameters()), 2e-5)
    assert len(rows) == len(free_rows)
    for a, b in zip(rows, free_rows, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if name == "useful_tokens":
                assert value <= b[name] <= 1
            elif not any(part in name for part in VOLATILE):
                assert b[name] == (pytest.approx(value, rel=2e-4) if isinstance(value, float) else value), name
    for a, b in zip(seen, found, strict=True):
        assert a.label_ids.shape == b.label_ids.shape
        assert (a.label_ids == b.label_ids).all()
        assert (a.predictions == b.predictions).all()


def test_a_step_without_a_full_batch(tmp_path):
    """13 samples, 8 a step: the last step has micro-batches of which one holds a row that only fills up."""
    runs = []
    for free in (False, True):
        run = trainer(
            tmp_path / str(free),
            data=ragged(9),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            max_steps=2,
            padding_free=free,
        )
        assert batches(run)[-1]["sample_index"].tolist() == [DUMMY]
        run.train()
        runs.append(run)
        last = [row for row in read_metrics(tmp_path / str(free)) if "loss" in row][-1]
        lengths = [len(row) for row in ragged(9)["input_ids"]]
        (position,) = run.schedule.batch(1)
        assert last["useful_tokens"] == pytest.approx(lengths[position] / (lengths[position] + 3 * lengths[0]))
    assert_close(dict(runs[1].model.named_parameters()), dict(runs[0].model.named_parameters()))


def test_a_store_serves_both(tmp_path):
    """Its batches are padded however it is filled, and what it holds is what the live teacher says, but for rounding."""
    ends, manifests = [], []
    settings = {"eval_data": ragged(5, seed=3), "max_steps": 2}
    for name, free, store in (("live", False, None), ("padded", False, "a"), ("free", True, "b"), ("taken over", True, "a")):
        run = trainer(
            tmp_path / name,
            padding_free=free,
            **settings,
            store=None if store is None else {"path": str(tmp_path / store), "batch_size": 4},
        )
        run.train()
        found = run.evaluate()
        ends.append((dict(run.model.named_parameters()), found))
        if store is not None:
            manifests.append(
                {p.relative_to(tmp_path / store).as_posix(): p.read_bytes() for p in (tmp_path / store).rglob("*.safetensors")}
            )
    assert manifests[0] == manifests[1] == manifests[2]
    for weights, found in ends[1:]:
        assert_close(weights, ends[0][0], 2e-5)
        for name in ("eval_loss", "eval_kl", "eval_ce", "eval_agreement", "eval_tokens"):
            assert found[name] == pytest.approx(ends[0][1][name], rel=1e-5), name
    topk = [
        trainer(tmp_path / f"k{free}", padding_free=free, max_steps=2, store={"kind": "topk", "top_k": 5, "path": str(tmp_path / "k")})
        for free in (False, True)
    ]
    for run in topk:
        run.train()
    assert_close(dict(topk[1].model.named_parameters()), dict(topk[0].model.named_parameters()), 2e-5)


def test_resumed_bit_for_bit(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    settings = {
        "padding_free": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 2,
    }
    settings |= {"save_strategy": "steps", "save_steps": 1, "data": ragged(16)}
    whole = trainer(tmp_path / "whole", student=tiny_llama(1, attention_dropout=0.2), **settings)
    whole.train()
    cut = trainer(tmp_path / "cut", student=tiny_llama(1, attention_dropout=0.2), callbacks=[Stop()], **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    again = trainer(tmp_path / "cut", student=tiny_llama(1, attention_dropout=0.2), **settings)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, dict(whole.model.named_parameters())[name]) for name, p in again.model.named_parameters())
    kept = [
        [{k: v for k, v in row.items() if not any(p in k for p in VOLATILE)} for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("whole", "cut")
    ]
    assert kept[0] == kept[1]
    assert all(row["useful_tokens"] == 1 for row in kept[0])


def test_a_sample_whose_loss_is_not_finite_is_named(tmp_path):
    for free in (False, True):
        run = trainer(tmp_path / str(free), padding_free=free)
        batch = batches(run)[0]
        run.teachers.model(run.eval_teacher).model.embed_tokens.weight.data[3:] = 0.1
        run.model.model.embed_tokens.weight.data[39] = math.nan
        layout = Layout(batch["labels"].shape, batch.get("kept"))
        holds = (layout.spread(batch["input_ids"]) == 39).any(1)
        run.model.train()
        if not holds.any():
            pytest.skip("no row of the first batch has that token")
        with pytest.raises(NonFiniteLossError, match=", ".join(f"s{i}" for i in batch["sample_index"][holds].tolist())):
            run.compute_loss(run.model, batch)


# Models and settings that do not go with it.


@pytest.mark.parametrize(("student", "teacher"), [("mamba", "llama"), ("llama", "opt")])
def test_a_model_that_ignores_positions_keeps_its_padding(tmp_path, student, teacher):
    models = {"student": model_of(student, 1), "teacher": model_of(teacher, 2)}
    with pytest.warns(
        UserWarning, match=r"padding_free: (Mamba|OPT)ForCausalLM cannot keep rows apart by their positions: batches stay padded"
    ):
        run = trainer(tmp_path, padding_free=True, **models)
    batch = batches(run)[0]
    assert "kept" not in batch
    assert batch["attention_mask"].shape == batch["labels"].shape == batch["input_ids"].shape
    plain = trainer(tmp_path, **models)
    assert gradients(run, batch)[0] == gradients(plain, batches(plain)[0])[0]


def test_a_teacher_in_a_store_is_not_asked(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(tmp_path / "run", teacher=model_of("opt", 2), padding_free=True, store={"path": str(tmp_path / "store")}, max_steps=1)
        assert "kept" in batches(run)[0]
        run.train()
    other = ragged(4, seed=9)
    assert not any("kept" in batch for batch in run.get_eval_dataloader(other)), "which the live teacher would be given"
    assert run.evaluate(other)["eval_tokens"] > 0


def test_attention_in_chunks_is_not_for_joined_rows():
    model = tiny_llama(1)
    assert keeps_documents_apart(model, one_row=True)
    model.config.attention_chunk_size = 64
    assert keeps_documents_apart(model)
    assert not keeps_documents_apart(model, one_row=True)


def test_models_are_asked_in_the_precision_they_run_in():
    seen = []
    model = tiny_llama(1)
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, out: seen.append((out.dtype, len(out))))
    head_of(model)  # which runs it too, once
    seen.clear()
    assert keeps_documents_apart(model, one_row=True, autocast=torch.bfloat16)
    assert set(seen) == {(torch.bfloat16, 1)}
    seen.clear()
    assert keeps_documents_apart(model)
    assert set(seen) == {(torch.float32, 2)}


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="padding_free: given together with packing, whose rows are full as they are"):
        KDConfig(output_dir=str(tmp_path), padding_free=True, packing=True)
    with pytest.raises(ValueError, match="padding_free: neftune_noise_alpha scales its noise by the length of a row"):
        KDConfig(output_dir=str(tmp_path), padding_free=True, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="padding_free: the data has a column position_ids, its rows are packed already"):
        trainer(tmp_path, data=pack(ragged(8), 16), padding_free=True)


def test_a_collator_of_ones_own_that_pads_left(tmp_path):
    def left(rows):
        batch = KDCollator(0)(rows)
        width = batch["labels"].shape[1]
        shifts = [width - int(n) for n in batch["attention_mask"].sum(1)]
        rolled = {
            k: torch.stack([r.roll(s) for r, s in zip(batch[k], shifts, strict=True)]) for k in ("input_ids", "attention_mask", "labels")
        }
        return {**rolled, "sample_index": batch["sample_index"]}

    run, plain = trainer(tmp_path, padding_free=True, collator=left), trainer(tmp_path, padding_free=True)
    for a, b in zip(batches(run)[:2], batches(plain)[:2], strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert gradients(run, a)[0] == gradients(plain, b)[0]


# What is said of it.


def test_columns_of_speed_memory_and_useful_tokens(tmp_path):
    logged = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(dict(logs))

    run = trainer(tmp_path, callbacks=[Keep()], logging_steps=2)
    begun = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - begun
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    lengths = run.schedule.samples.lengths
    for i, row in enumerate(rows):
        steps = [run.schedule.batch(step) for step in (2 * i, 2 * i + 1)]
        real = sum(lengths[p] for step in steps for p in step)
        computed = sum(len(step) * max(lengths[p] for p in step) for step in steps)
        assert row["useful_tokens"] == pytest.approx(real / computed)
        assert row["tokens_per_second"] > real / seconds
        assert 0.05 < row["memory_gb"] < 100
        assert {name: logged[i][name] for name in ("useful_tokens", "tokens_per_second", "memory_gb")} == {
            name: row[name] for name in ("useful_tokens", "tokens_per_second", "memory_gb")
        }


def test_evaluating_saving_and_loading_teachers_is_not_in_the_speed(tmp_path, monkeypatch):
    """Each lasts longer than a step here."""
    inside, saving, model = KDTrainer._evaluation_loop, KDTrainer._get_output_dir, Teachers.model
    loaded = False

    def enter(self, stage):  # after an evaluation too
        nonlocal loaded
        loaded = False

    def load(self, name):
        nonlocal loaded
        if not loaded:
            time.sleep(0.3)
        loaded = True
        return model(self, name)

    monkeypatch.setattr(KDTrainer, "_evaluation_loop", lambda self, *a: time.sleep(0.3) or inside(self, *a))
    monkeypatch.setattr(KDTrainer, "_get_output_dir", lambda self, trial: time.sleep(0.15) or saving(self, trial))
    monkeypatch.setattr(KDTrainer, "_enter", enter)
    monkeypatch.setattr(Teachers, "model", load)
    settings = {"eval_data": ragged(4), "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, **settings)
    run.train()
    speeds = [row["tokens_per_second"] for row in read_metrics(tmp_path) if "loss" in row]
    lengths = run.schedule.samples.lengths
    seconds = [sum(lengths[p] for p in run.schedule.batch(step)) / speed for step, speed in enumerate(speeds)]
    assert len(seconds) == 4
    assert min(seconds[1:]) < 0.3  # a busy machine may hold some of them up


def test_batches_by_length_have_less_padding(tmp_path):
    shares = {}
    for order in ("random", "group_by_length"):
        run = trainer(
            tmp_path / order,
            data=ragged(128, longest=40),
            plan=curriculum(buckets=2, epochs=1),
            train_sampling_strategy=order,
            logging_steps=100,
            gradient_accumulation_steps=2,
            max_steps=-1,
            num_train_epochs=1,
        )
        if order == "group_by_length":
            run.train()
        # By the plan alone: a pure function of the step, asked in any order. `fastkd plan` shows it.
        lengths, schedule = run.schedule.samples.lengths, run.schedule
        micros = {
            (s, m): schedule.micro_batch(s, m, process=0, processes=1, size=4)
            for s in reversed(range(schedule.total_steps))
            for m in (0, 1)
        }
        shares[order] = []
        for first, last in zip(schedule.starts, [*schedule.starts[1:], schedule.total_steps], strict=True):
            found = [[lengths[i] for i in micros[s, m]] for s in range(first, last) for m in (0, 1)]
            shares[order].append(sum(map(sum, found)) / sum(max(micro) * len(micro) for micro in found))
        table = preview(schedule, run.args)
        assert all(f"{1 - share:.0%}" in table for share in shares[order])
        assert "0%" in preview(schedule, KDConfig(output_dir=str(tmp_path), padding_free=True, use_cpu=True, report_to=[]))
    logged = [row["useful_tokens"] for row in read_metrics(tmp_path / "group_by_length") if "loss" in row]
    assert logged == pytest.approx(shares["group_by_length"])
    assert all(by_length > shuffled + 0.05 for shuffled, by_length in zip(*shares.values(), strict=True))


def test_a_step_is_dealt_to_micro_batches_by_length():
    lengths = [3, 9, 5, 9, 1, 7, 2, 8, 4, 6, 10, 5]
    schedule = Plan(kd().stages, order="sequential").filled(
        teachers=["t"], epochs=1, steps=None, temperature=1.0, kd_ratio=1.0, parameters={}, order="sequential", remainder="short"
    )
    run = schedule.schedule(Samples([str(i) for i in range(12)], lengths), batch_size=8, seed=0)
    assert run.batch(0) == list(range(8)), "a step's samples are the plan's"
    assert [run.micro_batch(0, m, process=p, processes=2, size=2) for m in range(2) for p in range(2)] == [[1, 3], [7, 5], [2, 0], [6, 4]]
    assert [run.micro_batch(0, m, process=0, processes=1, size=4) for m in range(2)] == [[1, 3, 7, 5], [2, 0, 6, 4]]
    assert [run.micro_batch(1, m, process=0, processes=1, size=4) for m in range(2)] == [[10, 9, 11, 8], []]
