"""What a run shows while it goes on: plain lines in a file, a live display in a terminal; what trackers receive."""

import io
import logging
import re
import sys

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from fastkd.plan import Samples, Schedule
from fastkd.presets import make_plan
from fastkd.progress import TimeLeft, TrainingProgress, watch
from fastkd.report import duration
from fastkd.trainer import KDConfig, KDTrainer

from .tiny import rows, tiny_llama, tiny_tokenizer

STAGES = {"stages": [{"steps": 4, "teacher": "weak", "name": "easy"}, {"steps": 6, "teacher": "strong", "temperature": 2.0}]}


def schedule() -> Schedule:
    settings = {"epochs": 1, "steps": None, "temperature": 1.0, "kd_ratio": 0.5, "parameters": None, "order": "sequential"}
    plan = make_plan(STAGES).filled(teachers=["weak", "strong"], remainder="drop", **settings)
    return plan.schedule(Samples([f"s{i}" for i in range(20)], [10] * 20), batch_size=2, seed=0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Drive:
    """Calls a callback as the Trainer does."""

    def __init__(self, callback: TrainerCallback, main: bool = True):
        self.callback, self.state, self.control = callback, TrainerState(is_world_process_zero=main), TrainerControl()

    def __call__(self, event: str, **kwargs) -> None:
        getattr(self.callback, f"on_{event}")(None, self.state, self.control, **kwargs)

    def step(self, **logs) -> None:
        self.state.global_step += 1
        self("step_end")
        if logs:
            self("log", logs=logs)


def a_terminal(monkeypatch) -> Terminal:
    """Standard error from now on. (Not a fixture: pytest sets its own before the test begins.)"""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return stream


def tiny_trainer(folder, callbacks=None, **options) -> KDTrainer:
    settings = {
        "logging_steps": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "max_length": 16,
    }
    args = KDConfig(str(folder), **{**settings, "save_strategy": "no", **options})
    return KDTrainer(
        tiny_llama(1), {"big": tiny_llama(2)}, args, rows(12), rows(4, 1), processing_class=tiny_tokenizer(), callbacks=callbacks, plan="kd"
    )


def test_a_file_gets_a_plain_line_for_each_logging_step(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, eval_strategy="steps", eval_steps=4, kd_ratio=0.5)
    watch(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert not {PrinterCallback, ProgressCallback} & {*kinds}
    trainer.train()
    out, err = capsys.readouterr()
    assert "'loss'" not in out
    assert "\x1b" not in err
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 2/4", "step 4/4", "step 4/4"]
    for word in ("teacher big", r"loss \d", r"kd \d", r"ce \d", "temperature 1, kd_ratio 0.5", r"lr \d", r"\d tokens/s", "useful", "GB"):
        assert re.search(word, lines[0]), word
    assert lines[0].endswith(" left")
    assert "stage" not in lines[0]  # there is one
    assert re.search(r"held out: loss \d.*kl \d.*agreement [\d.]+%", lines[2])


def test_a_user_may_forbid_the_live_display(tmp_path, monkeypatch):
    terminal = a_terminal(monkeypatch)
    trainer = tiny_trainer(tmp_path, disable_tqdm=True)
    watch(trainer)
    trainer.train()
    assert "\x1b" not in terminal.getvalue()
    assert "step 4/4" in terminal.getvalue()


def test_a_terminal_shows_the_run_live(monkeypatch):
    terminal = a_terminal(monkeypatch)
    progress = TrainingProgress(schedule())
    drive = Drive(progress)
    drive("train_begin")
    for _ in range(5):
        drive.step(loss=1.5, kd=1.25, ce=2.0, learning_rate=1e-4, tokens_per_second=12345.6, useful_tokens=0.875, memory_gb=12.34)
    drive("log", logs={"eval_loss": 1.0, "eval_kl": 0.25, "eval_runtime": 3.0})
    drive("train_end")
    shown = terminal.getvalue()
    for text in (
        "step 5/10", "50%", "stage 2 of 2 · teacher strong", "loss 1.5  kd 1.25  ce 2", "temperature 2  kd_ratio 0.5  lr 0.0001",
        "12,346 tokens/s  88% useful  12.3 GB", "held out at step 5: loss 1  kl 0.25", " left",
    ):  # fmt: skip
        assert text in shown, text
    assert "runtime" not in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back
    assert sys.stderr is terminal


def test_an_evaluation_before_training_is_shown_and_leaves_nothing(monkeypatch):
    terminal = a_terminal(monkeypatch)
    drive = Drive(TrainingProgress(schedule()))
    for _ in range(2):
        drive("prediction_step", eval_dataloader=[0, 1, 2])
    drive("evaluate")
    assert "batch 1 of 3" in terminal.getvalue()
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[1A\x1b[2K")  # its line is cleared
    assert sys.stderr is terminal


def test_what_is_logged_meanwhile_does_not_tear_the_display(monkeypatch):
    terminal = a_terminal(monkeypatch)
    handler = logging.StreamHandler()  # holds the stream that is there now, as transformers' does
    logger = logging.getLogger("fastkd.test_progress")
    logger.addHandler(handler)
    try:
        drive = Drive(TrainingProgress(schedule()))
        drive("train_begin")
        drive.step(loss=1.0)
        before = len(terminal.getvalue())
        logger.warning("something happened")
        print("to standard error", file=sys.stderr)
        written = terminal.getvalue()[before:]
        assert handler.stream is not terminal
        # Each begins on a line that has been cleared, and the display is drawn again below it.
        for text in ("something happened", "to standard error"):
            assert re.search(r"\x1b\[2K" + text + r"\n.*step 1/10", written, re.DOTALL), written
        drive("train_end")
        assert handler.stream is terminal
    finally:
        logger.removeHandler(handler)


def test_other_processes_show_nothing(monkeypatch, capsys):
    terminal = a_terminal(monkeypatch)
    drive = Drive(TrainingProgress(schedule()), main=False)
    drive("train_begin")
    drive.step(loss=1.0)
    drive("log", logs={"eval_loss": 1.0})
    drive("train_end")
    assert terminal.getvalue() == ""
    assert capsys.readouterr().out == ""


def test_the_time_left_looks_at_recent_steps_and_at_what_the_stages_hold():
    clock = [0.0]
    whole = schedule()
    left = TimeLeft(whole, clock=lambda: clock[0])
    assert left.seconds(0) is None
    clock[0] = 5.0
    left.pause()  # before the first step: loading, say
    for _ in range(2):
        clock[0] += 3.0
        left.step(0)
    assert left.seconds(2) == pytest.approx(2 * 3.0 + 6 * 3.0)  # all steps hold as many tokens
    clock[0] += 10.0
    left.pause()  # an evaluation: 10 s for 2 steps, and so on
    assert left.seconds(2) == pytest.approx(8 * 3.0 + 8 * 5.0)
    for _ in range(4):
        clock[0] += 1.0
        left.step(1)
    assert left.seconds(6) == pytest.approx(4 * 1.0 + 4 * 10 / 6)
    rows = [dict(row) for row in whole.table()]
    rows[1]["tokens"] *= 3  # a step of the second stage holds three times as much
    left = TimeLeft(whole, clock=lambda: clock[0])
    left._rows = rows
    clock[0] += 2.0
    left.step(0)
    assert left.seconds(1) == pytest.approx(3 * 2.0 + 6 * 6.0)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (12345, "3:25:45"), (2 * 86400 + 12345, "2 d 03:25")])
def test_durations(seconds, text):
    assert duration(seconds) == text


class Tracker(TrainerCallback):
    def __init__(self):
        self.rows: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def test_trackers_get_the_same_numbers(tmp_path):
    tracker = Tracker()
    trainer = tiny_trainer(tmp_path, [tracker], divergence="jsd", divergence_parameters={"beta": 0.3}, kd_ratio=0.5)
    trainer.train()
    row = next(row for row in tracker.rows if "loss" in row)
    wanted = {
        "loss",
        "kd",
        "ce",
        "tokens",
        "temperature",
        "kd_ratio",
        "beta",
        "stage",
        "learning_rate",
        "tokens_per_second",
        "useful_tokens",
    }
    assert wanted <= row.keys()
    assert all(isinstance(value, int | float) for value in row.values())  # others are dropped by most of them, with a warning each time
    assert row["stage"] == 0


def test_tensorboard_gets_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = tiny_trainer(tmp_path, report_to="tensorboard", kd_ratio=0.5)
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    found = accumulator.EventAccumulator(str(events))
    found.Reload()
    tags = {*found.Tags()["scalars"]}
    names = ("loss", "kd", "ce", "tokens", "temperature", "kd_ratio", "stage", "tokens_per_second", "useful_tokens", "memory_gb")
    assert {f"train/{name}" for name in names} <= tags
    assert [event.step for event in found.Scalars("train/kd")] == [2, 4]
