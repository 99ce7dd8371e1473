"""Checkpoints: whole or not there, verified, and exact to resume from."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from fastkd import checkpoints
from fastkd.report import VOLATILE, read_metrics

from .test_trainer import trainer
from .tiny import rows, tiny_llama


def make(folder, step: int, content: str = "weights"):
    staging = folder / ".incomplete" / f"checkpoint-{step}"
    (staging / "deep").mkdir(parents=True)
    (staging / "model.bin").write_text(content)
    (staging / "deep" / "optimizer.bin").write_text("state")
    final = folder / f"checkpoint-{step}"
    checkpoints.commit(staging, final)
    return final


def test_commit_moves_whole_and_verifies(tmp_path):
    final = make(tmp_path, 3)
    assert checkpoints.find_problems(final) == []
    assert not (tmp_path / ".incomplete" / "checkpoint-3").exists()
    assert make(tmp_path, 3, "other") == final
    assert (final / "model.bin").read_text() == "other"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda c: (c / "deep" / "optimizer.bin").unlink(), "optimizer.bin: missing"),
        (lambda c: (c / "model.bin").write_text("weightz"), "model.bin: its checksum differs"),
        (lambda c: (c / "model.bin").write_text("w"), "model.bin: 1 bytes where the manifest says 7"),
        (lambda c: (c / checkpoints.MANIFEST).unlink(), "not finished"),
        (lambda c: (c / checkpoints.MANIFEST).write_text("{"), "not readable"),
    ],
)
def test_damage_is_found_named_and_passed_over(tmp_path, damage, problem, caplog):
    old, new = make(tmp_path, 9), make(tmp_path, 10)
    damage(new)
    assert problem in checkpoints.find_problems(new)[0]
    assert checkpoints.newest_complete(tmp_path) == old
    assert "checkpoint-10" in caplog.text


def test_newest_is_by_number(tmp_path):
    assert checkpoints.newest_complete(tmp_path / "nowhere") is None
    for step in (100, 20, 3):
        make(tmp_path, step)
    assert checkpoints.newest_complete(tmp_path).name == "checkpoint-100"


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path / "checkpoint-4", None, None)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 4
    checkpoints.rotate(tmp_path / "checkpoint-4", 2, str(tmp_path / "checkpoint-1"))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]


def test_rotation_deletes_later_steps_of_an_earlier_run_first(tmp_path):
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path / "checkpoint-4", 2, None)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    checkpoints.rotate(tmp_path / "checkpoint-4", 1, str(tmp_path / "checkpoint-4"))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


class Crash(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(folder, crash_at: int | None = None, **changes):
    """Eight steps of two accumulated micro-batches over an odd number of rows, with dropout."""
    settings = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }  # fmt: skip
    return trainer(
        folder,
        student=tiny_llama(1, attention_dropout=0.2),
        data=rows(13),
        callbacks=[] if crash_at is None else [Crash(crash_at)],
        **{**settings, **changes},
    )


def training_rows(folder):
    rows = [row for row in read_metrics(folder) if "loss" in row]
    return [{k: v for k, v in row.items() if not any(part in k for part in VOLATILE)} for row in rows]


@pytest.mark.parametrize("order", ["random", "group_by_length", "sequential"])
@pytest.mark.parametrize("crash_at", [4, 5, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, crash_at, order):
    """Bit for bit: the weights, and the logged rows too, though the checkpoints do not fall on logging steps."""
    whole = run(tmp_path / "whole", train_sampling_strategy=order)
    whole.train()
    first = run(tmp_path / "cut", crash_at, train_sampling_strategy=order, eval_data=rows(3))
    first.evaluate()  # an evaluation may not disturb the order
    with pytest.raises(KeyboardInterrupt):
        first.train()
    resumed = run(tmp_path / "cut", train_sampling_strategy=order)
    resumed.train(resume_from_checkpoint=True)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert training_rows(tmp_path / "cut") == training_rows(tmp_path / "whole")


def test_a_crash_while_saving_leaves_no_checkpoint(tmp_path, monkeypatch):
    first = run(tmp_path)
    real, calls = checkpoints.flush, []

    def flush(path):
        calls.append(path)
        if len(calls) > 20:  # in the second checkpoint
            raise KeyboardInterrupt
        real(path)

    monkeypatch.setattr(checkpoints, "flush", flush)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    again = run(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8
    assert not (tmp_path / ".incomplete").exists()


def test_a_damaged_checkpoint_is_refused_by_name_and_skipped_by_true(tmp_path):
    run(tmp_path).train()
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt: missing"):
        run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    again = run(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert checkpoints.find_problems(tmp_path / "checkpoint-8") == []
    with pytest.raises(ValueError, match="no complete checkpoint"):
        run(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_kept_and_known_by_its_place(tmp_path):
    best = run(
        tmp_path, eval_data=rows(4, seed=3), eval_strategy="steps", eval_steps=1, save_steps=1, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="kl", greater_is_better=False, learning_rate=0.3,
    )  # fmt: skip
    best.train()
    kept = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    place = best.state.best_model_checkpoint
    assert os.path.basename(place) in kept
    assert ".incomplete" not in place
    state = json.loads((tmp_path / kept[-1] / "trainer_state.json").read_text())
    assert ".incomplete" not in str(state["best_model_checkpoint"])
    assert checkpoints.find_problems(tmp_path / kept[0]) == []


@pytest.mark.parametrize("steps", [6, 7, 8])
def test_a_run_resumed_at_its_end_takes_no_further_step(tmp_path, steps):
    whole = run(tmp_path, max_steps=steps, lr_scheduler_type="constant")
    whole.train()
    again = run(tmp_path, max_steps=steps, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_a_new_run_does_not_mix_with_an_earlier_ones_checkpoints(tmp_path):
    run(tmp_path).train()
    with pytest.raises(ValueError, match=r"output_dir: .*checkpoint-8 is of an earlier run"):
        run(tmp_path).train()


def test_without_the_optimizers_state_there_is_no_resuming(tmp_path):
    run(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match="save_only_model"):
        run(tmp_path, save_only_model=True).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """It knew nothing of some options, which were off, and did not count padding."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, crash_at=4).train()
    staging, final = tmp_path / ".incomplete" / "checkpoint-3", tmp_path / "checkpoint-3"
    staging.parent.mkdir()
    final.rename(staging)
    state = json.loads((staging / "0-kd_state.json").read_text())
    for name in ("use_liger_kernel", "liger_kernel_config"):
        del state["run"]["training"][name]
    del state["run"]["student"]["attn_implementation"], state["sums"]["useful"], state["sums"]["computed"]
    (staging / "0-kd_state.json").write_text(json.dumps(state))
    checkpoints.commit(staging, final)
    with pytest.raises(ValueError, match=r"training\.optim was 'adamw_torch_fused', now it is 'sgd'"):
        run(tmp_path, optim="sgd").train(resume_from_checkpoint=True)
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert all(0 < row["useful_tokens"] <= 1 for row in training_rows(tmp_path))


def test_an_old_checkpoint_stays_until_the_new_one_stands(tmp_path, monkeypatch):
    seen = []
    real = checkpoints.commit

    def commit(staging, final):
        seen.append((final.name, sorted(p.name for p in tmp_path.glob("checkpoint-*"))))
        real(staging, final)

    monkeypatch.setattr(checkpoints, "commit", commit)
    run(tmp_path, save_total_limit=1).train()
    assert seen == [("checkpoint-3", []), ("checkpoint-6", ["checkpoint-3"]), ("checkpoint-8", ["checkpoint-6"])]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_only_whole_checkpoints_are_pushed(tmp_path, monkeypatch):
    pushed = []
    unfinished = run(tmp_path)
    unfinished.args.push_to_hub = True
    monkeypatch.setattr(
        type(unfinished), "_push_from_checkpoint", lambda self, folder: pushed.append((folder, checkpoints.find_problems(Path(folder))))
    )
    monkeypatch.setattr(type(unfinished), "_finish_current_push", lambda self: None)
    unfinished.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{n}"), []) for n in (3, 6, 8)]
