"""The trainer follows the plan: batches, knobs, teachers, learning rate, resets; and a resumed run is the same run."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from fastkd.plan import Plan, Ramp, Stage
from fastkd.presets import clpd, curriculum, pocl, progressive
from fastkd.report import read_metrics
from fastkd.trainer import KDTrainer

from . import two_processes
from .test_trainer import config
from .tiny import rows, tiny_llama, tiny_tokenizer


def scored(n: int = 22):
    return rows(n).add_column("score", [float((7 * i) % n) for i in range(n)])


def trainer(folder, plan, teacher=None, data=None, eval_data=None, callbacks=None, student=None, **changes) -> KDTrainer:
    changes = {"max_steps": -1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 3, **changes}
    return KDTrainer(
        tiny_llama(1, attention_dropout=0.2) if student is None else student,
        tiny_llama(2, hidden=24, layers=3) if teacher is None else teacher,
        config(folder, **changes),
        scored() if data is None else data,
        eval_data,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        plan=plan,
    )


def saved_teachers(folder: Path) -> dict[str, Path]:
    for name, seed in (("weak", 2), ("strong", 3)):
        tiny_llama(seed, hidden=24, layers=3).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in ("weak", "strong")}


PLAN = pocl(buckets=3, epochs=[2, 1, 1], temperature=[1.0, Ramp(1.0, 2.0), 2.0])


class Watch(TrainerCallback):
    """What each step had: learning rate, samples, and how often the optimizer had stepped."""

    def __init__(self):
        self.rates, self.steps, self.seen = [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.steps.append({int(s["step"]) for s in optimizer.state.values()})


def test_the_trainer_does_what_the_plan_says(tmp_path, monkeypatch):
    watch, loss = Watch(), KDTrainer.compute_loss
    training = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    run = trainer(tmp_path, PLAN, callbacks=[watch], **training)
    seen: dict[int, list[int]] = {}

    def spy(self, model, inputs, *args, **kwargs):
        seen.setdefault(self.state.global_step, []).extend(i for i in inputs["sample_index"].tolist() if i >= 0)
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(KDTrainer, "compute_loss", spy)
    run.train()
    schedule = run.schedule
    assert schedule.pools == [7, 14, 22]
    assert run.state.global_step == schedule.total_steps == 4 + 4 + 6
    index = run.train_dataset["sample_index"][:]
    assert {step: sorted(found) for step, found in seen.items()} == {s: sorted(index[p] for p in schedule.batch(s)) for s in range(14)}
    # AdamW and the cosine begin anew in each stage.
    assert watch.steps == [{step - start + 1} for start, steps in schedule.segments for step in range(start, start + steps)]
    for start, steps in schedule.segments:
        expected = [1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * i / steps)) / 2 for i in range(steps)]
        assert watch.rates[start : start + steps] == pytest.approx(expected, rel=1e-3)
    found = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert [row["step"] for row in found] == [3, 4, 6, 8, 9, 12, 14]  # every third, and where a stage ends
    assert [row["stage"] for row in found] == [0, 0, 1, 1, 2, 2, 2]
    assert [row["kd_ratio"] for row in found] == [0.7, 0.7, 0.85, 0.85, 1.0, 1.0, 1.0]
    assert [row["temperature"] for row in found] == [1.0, 1.0, pytest.approx(4 / 3), 2.0, 2.0, 2.0, 2.0]
    assert [row["epoch"] for row in found] == pytest.approx([1.5, 2, 2.5, 3, 3 + 1 / 6, 3 + 4 / 6, 4])
    for row in found[:2]:
        assert math.isclose(row["loss"], 0.7 * row["kd"] + 0.3 * row["ce"], rel_tol=1e-6)


@pytest.mark.parametrize("remainder", ["short", "drop"])
def test_resumed_at_every_step_it_is_the_same_run(tmp_path, remainder):
    plan = pocl(buckets=3, epochs=[2, 1, 1], temperature=[1.0, Ramp(1.0, 2.0), 2.0], remainder=remainder)
    settings = {"save_strategy": "steps", "save_steps": 1, "warmup_steps": 1, "lr_scheduler_type": "cosine"}
    whole = trainer(tmp_path / "whole", plan, **settings)
    whole.train()
    weights, log = whole.model.state_dict(), timeless(tmp_path / "whole")
    total = whole.schedule.total_steps
    assert total == (14 if remainder == "short" else 2 + 3 + 5)
    for step in range(1, total + 1):
        resumed = trainer(tmp_path / "whole", plan, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == total
        different = [name for name, value in resumed.model.state_dict().items() if not torch.equal(value, weights[name])]
        assert not different, f"resumed at step {step}: {different}"
        assert timeless(tmp_path / "whole") == log, step


def timeless(folder) -> list[dict]:
    kept = ("step", "stage", "loss", "kd", "ce", "tokens", "lr", "teacher")
    return [{k: v for k, v in row.items() if k in kept} for row in read_metrics(folder) if "loss" in row]


def test_teachers_come_and_go(tmp_path, monkeypatch):
    loaded, at = [], KDTrainer.compute_loss

    def spy(self, *args, **kwargs):
        out = at(self, *args, **kwargs)
        loaded.append((self.state.global_step, dict(self.teachers.loaded)))
        return out

    monkeypatch.setattr(KDTrainer, "compute_loss", spy)
    run = trainer(
        tmp_path / "run", clpd(epochs=1), saved_teachers(tmp_path), eval_data=rows(5, seed=3), eval_strategy="steps", eval_steps=2
    )
    run.train()
    second = run.schedule.starts[1]
    for step, held in loaded:
        assert held == ({"weak": "body"} if step < second else {"strong": "body"}), step
    found = read_metrics(tmp_path / "run")
    steps = {row["step"]: row["teacher"] for row in found if "loss" in row}
    assert steps == {step: "weak" if step <= second else "strong" for step in steps}
    events = [(m["event"], m["teacher"]) for m in run.teachers.memory]
    assert events[0] == ("load", "weak")
    assert ("free", "weak") in events
    # The evaluation is against the last teacher, at every stage.
    alone = config(tmp_path / "alone")
    last = KDTrainer(run.model, str(tmp_path / "strong"), alone, None, rows(5, seed=3), processing_class=tiny_tokenizer())
    kl = [row["eval_kl"] for row in found if "eval_kl" in row]
    assert last.evaluate()["eval_kl"] == pytest.approx(kl[-1], rel=1e-6)
    assert len(kl) == run.schedule.total_steps // 2


def test_each_stage_learns_from_its_own_teacher(tmp_path):
    """With a student that does not move, the divergence of a stage is that to its teacher."""
    teachers = {"weak": tiny_llama(2), "strong": tiny_llama(3)}
    settings = {"learning_rate": 0.0, "kd_ratio": 1.0, "temperature": 1.0}
    student = tiny_llama(1)
    trainer(tmp_path / "run", progressive(epochs=1), teachers, student=student, logging_steps=100, **settings).train()
    found = [row["kd"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    for name, kd in zip(teachers, found, strict=True):
        alone = KDTrainer(student, teachers[name], config(tmp_path / name), None, scored(), processing_class=tiny_tokenizer())
        assert alone.evaluate()["eval_kl"] == pytest.approx(kd, rel=1e-5)


def test_without_a_teacher(tmp_path):
    run = KDTrainer(tiny_llama(1), None, config(tmp_path, kd_ratio=1.0), rows(9), rows(4), processing_class=tiny_tokenizer(), plan="sft")
    run.train()
    found = run.evaluate()
    assert "eval_kl" not in found
    assert found["eval_loss"] == pytest.approx(found["eval_ce"])
    row = next(row for row in read_metrics(tmp_path) if "loss" in row)
    assert (row["teacher"], row["kd"], row["kd_ratio"]) == (None, None, 0.0)
    assert row["loss"] == pytest.approx(row["ce"])
    with pytest.raises(ValueError, match=r"stages\[0\].teacher: number -1 of 0 teachers"):
        KDTrainer(tiny_llama(1), None, config(tmp_path, kd_ratio=1.0), rows(9), processing_class=tiny_tokenizer())


def test_a_ramp_that_begins_without_the_teacher(tmp_path):
    run = trainer(tmp_path, Plan((Stage(epochs=1, kd_ratio=Ramp(0.0, 1.0)),)), logging_steps=1)
    run.train()
    found = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert found[0]["kd"] is None
    assert found[-1]["ce"] is None
    assert all(row["kd"] > 0 for row in found[1:])


def test_epochs_of_the_plan_are_the_trainers(tmp_path):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    run = trainer(tmp_path, curriculum(buckets=2, epochs=[2, 1]), eval_data=rows(3, seed=4), **settings)
    run.train()
    ends = [3, 6, 12]  # 11 samples twice, then 22
    found = read_metrics(tmp_path)
    assert [row["step"] for row in found if "loss" in row] == ends
    assert [row["step"] for row in found if "eval_kl" in row] == ends
    assert sorted(int(p.name.split("-")[1]) for p in tmp_path.glob("checkpoint-*")) == ends


def test_max_steps_cuts_the_plan(tmp_path):
    run = trainer(tmp_path, PLAN, max_steps=5)
    run.train()
    assert run.state.global_step == 5
    assert run.schedule.at(4).stage == 1


def changed_run(folder, key):
    data, plan, settings = scored(), PLAN, {}
    if key == "plan":
        plan = pocl(buckets=3, epochs=[2, 1, 1], temperature=[1.0, Ramp(1.0, 2.5), 2.0])
    elif key == "data":
        data = data.map(lambda row: {"completion": row["completion"] + " cat" if row["id"] == "s5" else row["completion"]})
    elif key == "scores":
        data = data.remove_columns("score").add_column("score", [float(i) for i in range(22)])
    elif key == "seed":
        settings["seed"] = 5
    else:
        settings["per_device_train_batch_size"] = 4
    return trainer(folder, plan, data=data, save_strategy="steps", save_steps=4, **settings)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("plan", r"plan.stages\[1\].temperature.to was 2.0, now it is 2.5"),
        ("data", "data was"),
        ("scores", "scores was"),
        ("seed", "seed was 42, now it is 5"),
        ("batch", "batch_size was 4, now it is 8"),
    ],
)
def test_a_run_that_was_changed_is_not_resumed(tmp_path, key, message):
    trainer(tmp_path, PLAN, save_strategy="steps", save_steps=4, max_steps=5).train()
    with pytest.raises(ValueError, match=f"is of another run: {message}"):
        changed_run(tmp_path, key).train(resume_from_checkpoint=True)


def test_the_number_of_micro_batches_is_free_to_change_on_resuming(tmp_path):
    trainer(tmp_path / "a", PLAN, save_strategy="steps", save_steps=4, max_steps=4, student=tiny_llama(1)).train()
    other = trainer(tmp_path / "a", PLAN, per_device_train_batch_size=4, gradient_accumulation_steps=1, student=tiny_llama(1))
    other.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "b", PLAN, student=tiny_llama(1))
    whole.train()
    for name, value in other.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name], rtol=1e-3, atol=2e-5)


def two_teachers_run(folder, **changes) -> KDTrainer:
    """Without dropout, which would differ from process to process; with a short batch at the end of each epoch."""
    teachers = {"weak": tiny_llama(2, hidden=24), "strong": tiny_llama(3, hidden=24, layers=3)}
    store = {"path": str(folder / "store"), "batch_size": 3}
    plan = clpd(epochs=[2, 1], restart_lr=True, reset_optimizer=True)
    return trainer(folder, plan, teachers, eval_data=rows(5, seed=3), student=tiny_llama(1), store=store, **changes)


def test_two_processes_follow_the_plan_as_one(tmp_path):
    """22 samples in two buckets of 11, batches of 4: the last batch of an epoch has 3 rows for two processes and two micro-batches."""
    one = two_teachers_run(tmp_path / "one")
    one.train()
    two_processes.run("tests.ddp_stages", tmp_path)
    two = torch.load(tmp_path / "two.pt")
    assert two["wrapped"] == "DistributedDataParallel"
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=2e-5)
    assert two["kl"] == pytest.approx(one.evaluate()["eval_kl"], rel=1e-4)
    alone, both = timeless(tmp_path / "one"), timeless(tmp_path / "two")
    assert [{k: row[k] for k in ("step", "stage", "tokens", "teacher")} for row in alone] == [
        {k: row[k] for k in ("step", "stage", "tokens", "teacher")} for row in both
    ]
    assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in alone], rel=1e-4)
    assert [row["lr"] for row in both] == [row["lr"] for row in alone]
    # Without padding there; but where a process has no row for a micro-batch, it takes the first one, which does not count.
    lengths, begun = one.schedule.samples.lengths, 0
    for row in (row for row in read_metrics(tmp_path / "two") if "loss" in row):
        batches = [one.schedule.batch(step) for step in range(begun, row["step"])]
        real, begun = sum(lengths[p] for batch in batches for p in batch), row["step"]
        assert row["useful_tokens"] == pytest.approx(real / (real + sum(4 - len(batch) for batch in batches) * lengths[0]))


def test_the_plan_goes_into_the_checkpoint(tmp_path):
    run = trainer(tmp_path, "pocl", save_strategy="steps", save_steps=1, max_steps=1)
    run.train()
    kept = json.loads((tmp_path / "checkpoint-1" / "0-kd_state.json").read_text())["run"]
    assert kept["plan"]["name"] == "pocl"
    assert kept["plan"] == json.loads(json.dumps(run.schedule.plan.to_dict()))


# The store.


def wide_teacher():
    """Wide enough that the composition of a batch shows in the last bits."""
    return tiny_llama(2, hidden=576, layers=2, heads=9)


def test_training_from_the_store_does_not_depend_on_when_it_was_filled(tmp_path):
    def made(folder, **changes) -> KDTrainer:
        store = {"path": str(tmp_path / folder / "store"), "batch_size": 4}
        return trainer(tmp_path / folder, PLAN, wide_teacher(), eval_data=rows(5, seed=3), store=store, **changes)

    lazily = made("lazily")
    lazily.train()
    before = made("before")
    for name, split in list(before.teachers.stores):
        assert before.teachers.fill(name, split, progress=False) > 0
    before.train()
    # Stopped in the middle, a shard lost and one damaged, then resumed.
    made("again", max_steps=9, save_strategy="steps", save_steps=9).train()
    shards = sorted((tmp_path / "again" / "store").rglob("train/*.safetensors"))
    assert len(shards) > 2
    shards[0].unlink()
    data = bytearray(shards[1].read_bytes())
    data[-5] ^= 1
    shards[1].write_bytes(data)
    again = made("again", save_strategy="steps", save_steps=9)
    again.train(resume_from_checkpoint=True)
    for other in (before, again):
        assert all(torch.equal(value, lazily.model.state_dict()[name]) for name, value in other.model.state_dict().items())
    assert len({run.evaluate()["eval_kl"] for run in (lazily, before, again)}) == 1
    stores = [
        {p.relative_to(tmp_path / f): p.read_bytes() for p in (tmp_path / f / "store").rglob("*.safetensors")} for f in ("lazily", "again")
    ]
    assert stores[0] == stores[1]


def test_with_a_full_store_only_the_head_is_loaded(tmp_path):
    teachers = saved_teachers(tmp_path)
    store = {"path": str(tmp_path / "store"), "batch_size": 4}
    first = trainer(tmp_path / "a", clpd(epochs=1), teachers, eval_data=rows(5, seed=3), store=store)
    for name, split in list(first.teachers.stores):
        first.teachers.fill(name, split, progress=False)
    first.train()
    held = []

    class Held(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held.append(dict(second.teachers.loaded))

    second = trainer(tmp_path / "b", clpd(epochs=1), teachers, eval_data=rows(5, seed=3), store=store, callbacks=[Held()])
    second.evaluate()
    second.train()
    assert all(set(h.values()) == {"head"} for h in held)
    assert not [m for m in second.teachers.memory if m["event"] == "load"]
    assert all(torch.equal(v, first.model.state_dict()[k]) for k, v in second.model.state_dict().items())


@pytest.mark.parametrize("kind", ["topk", "sampled"])
def test_probabilities_hold_for_one_temperature(tmp_path, kind):
    store = {"path": str(tmp_path / "store"), "kind": kind, "batch_size": 4, "top_k": 40, "samples": 20}
    with pytest.raises(ValueError, match="one temperature, the plan has 1, 2"):
        trainer(tmp_path / "a", PLAN, store=store)
    run = trainer(tmp_path / "b", curriculum(epochs=1), eval_data=rows(4, seed=2), store=store)
    run.train()
    found = run.evaluate()
    assert run.state.global_step == run.schedule.total_steps
    live = trainer(tmp_path / "c", curriculum(epochs=1), eval_data=rows(4, seed=2))
    live.train()
    if kind == "topk":  # all 40 tokens of the vocabulary: nothing is left out
        # `kl` is at temperature 1, a store's at its own.
        assert found["eval_loss"] == pytest.approx(live.evaluate()["eval_loss"], rel=1e-3)
    assert found["eval_ce"] == pytest.approx(live.evaluate()["eval_ce"], rel=0.05)


# What a fresh reader found.


def test_evaluation_has_the_objective_with_which_the_plan_ends(tmp_path):
    """So that the best checkpoint is not the one with the mildest knobs."""
    student, held_out = tiny_llama(1), rows(5, seed=3)
    run = trainer(
        tmp_path / "a", Plan((Stage(steps=2, temperature=1.0), Stage(steps=2, temperature=4.0))), eval_data=held_out, student=student
    )
    alone = config(tmp_path / "b", temperature=4.0)
    constant = KDTrainer(student, tiny_llama(2, hidden=24, layers=3), alone, None, held_out, processing_class=tiny_tokenizer())
    assert run.evaluate()["eval_loss"] == pytest.approx(constant.evaluate()["eval_loss"], rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"divergence": "reverse_kl"},
        {"temperature_squared": False},
        {"learning_rate": 5e-3},
        {"optim": "sgd"},
        {"max_grad_norm": 0.1},
        {"store": {"batch_size": 3}},
    ],
)
def test_another_objective_is_not_resumed(tmp_path, change):
    trainer(tmp_path, PLAN, save_strategy="steps", save_steps=4, max_steps=4).train()
    if "store" in change:
        change = {"store": {"path": str(tmp_path / "store"), **change["store"]}}
    with pytest.raises(ValueError, match=rf"is of another run: (training\.)?{next(iter(change))}"):
        trainer(tmp_path, PLAN, **change).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_a_callback_asked_for_can_be_resumed(tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 3

    trainer(tmp_path, PLAN, callbacks=[Save()], max_steps=4).train()
    again = trainer(tmp_path, PLAN)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == again.schedule.total_steps


def test_max_steps_shows_in_the_table(tmp_path):
    run = trainer(tmp_path, PLAN, max_steps=6)
    assert [(row["stage"], row["steps"]) for row in run.schedule.table()] == [(0, 4), (1, 2)]
    assert (run.schedule.total_steps, run.schedule.planned_steps) == (6, 14)
    assert run.schedule.at(5).temperature == pytest.approx(4 / 3)  # the ramp is the whole plan's
    assert run.schedule.at(5).ends


def test_the_trainers_own_remainder(tmp_path):
    assert trainer(tmp_path, "kd", dataloader_drop_last=True, num_train_epochs=1).schedule.total_steps == 5
    assert trainer(tmp_path, "kd", num_train_epochs=1).schedule.total_steps == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: trainer(f, PLAN, accelerator_config={"split_batches": True}), "accelerator_config.split_batches"),
        (lambda f: trainer(f, {"preset": "pocl", "buckets": 3, "fractions": [0.5, 0.5]}), "fractions: given together with buckets"),
        (lambda f: trainer(f, {"stages": [{"parameters": {1: 0.5}}]}), r"stages\[0\].parameters: expected names"),
        (
            lambda f: trainer(f, Plan((Stage(), Stage(parameters={"beta": Ramp(0.5, 1.5)}))), divergence="jsd"),
            r"stages\[1\].parameters.beta: .*expected beta in",
        ),
        (lambda f: trainer(f, Plan((Stage(parameters={"betta": 0.5}),)), divergence="jsd"), "unknown parameter 'betta'"),
        (lambda f: trainer(f, PLAN, lr_scheduler_type="linear", lr_scheduler_kwargs={"min_lr": 1e-7}), "lr_scheduler_kwargs: "),
        (
            lambda f: trainer(f, PLAN, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_data=rows(3)),
            "lr_scheduler_type",
        ),
        (lambda f: trainer(f, PLAN, data=rows(9).add_column("score", ["good"] * 9)), "train_dataset: column 'score': expected numbers"),
        (lambda f: trainer(f, PLAN, eval_data={"a": rows(3)}, metric_for_best_model="kl"), "metric_for_best_model: expected one of a_loss"),
        (lambda f: trainer(f, "sft", eval_data=rows(3), teacher={}, metric_for_best_model="kl"), "teacher_model: expected at least one"),
        (
            lambda f: trainer(f, "kd", store={"path": str(f), "kind": "sampled"}, divergence="reverse_kl"),
            "store.kind: sampled gives tokens",
        ),
        (
            lambda f: trainer(
                f, "kd", store={"path": str(f), "kind": "topk"}, divergence="alpha_beta", divergence_parameters={"alpha": 1.0}
            ),
            "store.kind: topk: ",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_null_is_absent_in_a_preset():
    from fastkd.presets import make_plan

    assert make_plan({"preset": "pocl", "cumulative": None, "epochs": None, "buckets": None, "remainder": None}) == pocl()
    assert make_plan({"preset": "pretrain", "kd_ratio": None}).stages[0].kd_ratio == 0.5
    assert make_plan({"stages": [{"teacher": None, "kd_ratio": 0}]}).stages[0].teacher is None


def test_a_column_named_score_is_left_alone_where_no_plan_asks(tmp_path):
    trainer(tmp_path, "kd", data=rows(9).add_column("score", ["good"] * 9), max_steps=1).train()


def test_a_dummy_row_does_not_count_whatever_the_collator(tmp_path):
    from fastkd.data import KDCollator

    def own(batch):  # labels of its own making
        made = KDCollator(0)(batch)
        labels = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"], "labels": labels}

    settings = config(
        tmp_path, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1
    )
    run = KDTrainer(tiny_llama(1), tiny_llama(2), settings, rows(5), processing_class=tiny_tokenizer(), data_collator=own)
    run.train()
    tokens = [row["tokens"] for row in read_metrics(tmp_path) if "loss" in row]
    last = run.train_dataset[run.schedule.batch(1)[0]]
    assert tokens[1] - tokens[0] == len(last["input_ids"]) - 1


def test_teachers_are_asked_one_at_a_time_whether_they_keep_documents_apart(tmp_path):
    teachers, data = saved_teachers(tmp_path), rows(40)
    run = trainer(tmp_path / "run", "progressive", teachers, data=data, packing=True, num_train_epochs=1)
    events = [(m["event"], m["teacher"]) for m in run.teachers.memory]
    assert events.index(("free", "weak")) < events.index(("load", "strong"))
    assert "position_ids" in run.train_dataset.column_names
    run.train()
    assert run.state.global_step == run.schedule.total_steps


def test_packed_rows_of_a_model_that_cannot_keep_apart_are_packed_once(tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    def opt(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
        return OPTForCausalLM(OPTConfig(vocab_size=40, max_position_embeddings=64, pad_token_id=0, **sizes))

    store = {"path": str(tmp_path / "store")}
    with pytest.warns(UserWarning, match="OPTForCausalLM cannot keep the documents of a row apart"):
        run = trainer(
            tmp_path, "kd", opt(2), student=opt(1), data=rows(20), eval_data=rows(6, seed=2), packing=True, max_steps=1, store=store
        )
    assert "position_ids" not in run.eval_dataset.column_names
    run.evaluate()
    assert run.teachers.stores["OPTForCausalLM", "eval"].complete


def test_a_resumed_run_does_not_load_the_teacher_of_a_stage_that_is_over(tmp_path):
    teachers = saved_teachers(tmp_path)
    settings = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 8}
    trainer(tmp_path / "run", "progressive", teachers, **settings).train()
    again = trainer(tmp_path / "run", "progressive", teachers, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert {m["teacher"] for m in again.teachers.memory} == {"strong"}


def test_evaluation_with_a_store_of_probabilities_in_a_stage_at_another_temperature(tmp_path):
    plan = Plan((Stage(steps=2, kd_ratio=0.0), Stage(steps=2, temperature=2.0, kd_ratio=1.0)))
    store = {"path": str(tmp_path / "store"), "kind": "topk", "batch_size": 4}
    run = trainer(tmp_path, plan, eval_data=rows(4, seed=2), store=store, eval_strategy="steps", eval_steps=1, temperature=1.0)
    run.train()
    assert [row["step"] for row in read_metrics(tmp_path) if "eval_kl" in row] == [1, 2, 3, 4]
