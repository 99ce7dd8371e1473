"""What a run is doing, while it does it: a live display in a terminal, a plain line per logging step in a log file."""

import atexit
import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import logging as progress_bars

from .plan import Schedule
from .report import duration, stage_title

__all__ = ["TimeLeft", "TrainingProgress", "watch"]


def watch(trainer: Trainer, *, live: bool | None = None) -> "TrainingProgress":
    """Show a `fastkd.trainer.KDTrainer`'s training with `TrainingProgress`, in place of the callback that transformers shows it with.

    Args:
        live: False: plain lines even in a terminal. Default: what ``disable_tqdm`` of the trainer's arguments does not forbid.
    """
    for callback in (ProgressCallback, PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
        trainer.remove_callback(callback)
    if live is None:
        live = None if not trainer.args.disable_tqdm else False
    progress = TrainingProgress(trainer.schedule, live=live)  # type: ignore[attr-defined]
    trainer.add_callback(progress)
    return progress


class TimeLeft:
    """How long the rest of a plan takes, from the steps that were made lately.

    A step of another stage is taken to last as long as one of this stage for each token that counts; what lies between steps, evaluation
    and checkpoints, to go on at its mean rate.
    """

    def __init__(self, schedule: Schedule, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._rows = schedule.table()
        self._total = schedule.total_steps
        self._steps: deque[tuple[int, float]] = deque(maxlen=30)  # (stage, seconds)
        self._between, self._made = 0.0, 0
        self._mark = clock()

    def pause(self) -> None:
        """What is not a step begins with the last step's end, and has ended now."""
        now = self.clock()
        if self._made:
            self._between += now - self._mark
        self._mark = now

    def step(self, stage: int) -> None:
        """A step of ``stage`` has ended now."""
        now = self.clock()
        self._steps.append((stage, now - self._mark))
        self._mark, self._made = now, self._made + 1

    def seconds(self, done: int) -> float | None:
        """After ``done`` steps of the run; None before the first step of this process."""
        if not self._steps:
            return None
        stage = self._steps[-1][0]
        here = [seconds for s, seconds in self._steps if s == stage]
        per_step = statistics.median(here)
        size = self._size(stage)
        left = 0.0
        for row in self._rows:
            steps = row["first_step"] + row["steps"] - max(done, row["first_step"])
            if steps > 0:
                left += steps * per_step * (self._size(row["stage"]) / size if size else 1.0)
        return left + (self._total - done) * self._between / self._made

    def _size(self, stage: int) -> float:
        """Counted tokens in a step of the stage."""
        return self._rows[stage]["tokens"] / self._rows[stage]["steps"]


class TrainingProgress(TrainerCallback):
    """Shows the stage, the teacher, the loss's parts, the knobs, the speed, the memory and the time left. Only the main process shows it.

    Args:
        schedule: the run's.
        live: redraw a few lines in the terminal; False: print a line per logging step and evaluation, without control codes.
            Default: whether ``stream`` is a terminal.
        stream: default: standard error.

    While the lines are live, what is printed or logged goes above them. `close` leaves the last state of them; it is called when training
    ends, and at the latest when Python does.
    """

    def __init__(self, schedule: Schedule, *, live: bool | None = None, stream: TextIO | None = None):
        self.schedule = schedule
        self._stream, self._live_wanted = stream, live
        self._stages = {row["stage"]: row for row in schedule.table()}
        self._live: Live | None = None
        self._streams: list[tuple[logging.StreamHandler, TextIO]] = []
        self._time = TimeLeft(schedule)
        self._step = 0
        self._row: dict[str, Any] = {}
        self._evaluation: tuple[int, dict[str, Any]] | None = None
        self._evaluating: tuple[int, int | None] | None = None
        self._training = self._bars = False

    # What the Trainer calls.

    def on_train_begin(self, args, state, control, **kwargs):
        self._training, self._step, self._time = True, state.global_step, TimeLeft(self.schedule)
        if not state.is_world_process_zero:
            return
        if progress_bars.is_progress_bar_enabled():
            progress_bars.disable_progress_bar()  # a line for each checkpoint
            self._bars = True
        if self._is_live():
            self._open()

    def on_step_end(self, args, state, control, **kwargs):
        self._step = state.global_step
        self._time.step(self.schedule.at(self._step - 1).stage)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._training:
            self._time.pause()
        if not state.is_world_process_zero or logs is None:
            return
        if "loss" in logs:
            self._row = dict(logs)
            if self._live is None:
                self._print(self.line(self._step, self._row))
        elif any(name.startswith("eval_") for name in logs):
            self._evaluation = (state.global_step, dict(logs))
            if self._live is None and self._training:  # before and after, the caller says it
                self._print(f"step {state.global_step:,}/{self.schedule.total_steps:,}, held out: {_pairs(_evaluation_pairs(logs))}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        done = 0 if self._evaluating is None else self._evaluating[0]
        try:
            total = None if eval_dataloader is None else len(eval_dataloader)
        except TypeError:
            total = None
        self._evaluating = (done + 1, total)
        if not self._training and self._live is None and state.is_world_process_zero and self._is_live():
            self._open(transient=True)

    def on_evaluate(self, args, state, control, **kwargs):
        self._evaluating = None
        if self._training:
            self._time.pause()
        else:
            self.close()

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.on_evaluate(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        self._time.pause()

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        self.close()

    # The lines.

    def line(self, step: int, row: Mapping[str, Any]) -> str:
        """The plain line of a row that was logged after ``step`` steps."""
        point = self.schedule.at(step - 1)
        parts = [f"step {step:,}/{self.schedule.total_steps:,}", *self._place(point), _pairs(_loss_pairs(row))]
        parts += [_pairs(_knob_pairs(point, row)), *_speed(row)]
        left = self._time.seconds(step)
        if left is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join(filter(None, parts))

    def _place(self, point: Any) -> list[str]:
        found = []
        if len(self._stages) > 1:
            number, _, name = stage_title(self._stages[point.stage]).partition(" ")
            found.append(f"stage {number} of {len(self._stages)}" + (f" ({name})" if name else ""))
        return [*found, f"teacher {point.teacher}" if point.teacher else "no teacher"]

    def __rich__(self) -> Group:
        if not self._training and self._evaluating is not None:  # before and after
            done, batches = self._evaluating
            return Group(_bar("evaluating", done, batches, f"batch {done:,}" + (f" of {batches:,}" if batches else "")))
        step, total = self._step, self.schedule.total_steps
        point = self.schedule.at(step)
        left = self._time.seconds(step)
        time_left = "done" if step >= total else "" if left is None else f"{duration(left)} left"
        head = _bar(f"step {step:,}/{total:,}", step, total, f"{step / total:.0%}  {time_left}")
        lines = [
            " · ".join(self._place(point)),
            "  ".join(filter(None, (_pairs(_loss_pairs(self._row), "  "), _pairs(_knob_pairs(point, self._row), "  ")))),
            "  ".join(_speed(self._row)),
        ]
        if self._evaluating is not None:
            done, batches = self._evaluating
            lines.append(f"evaluating: batch {done:,}" + (f" of {batches:,}" if batches else ""))
        elif self._evaluation is not None:
            at, found = self._evaluation
            lines.append(f"held out at step {at:,}: {_pairs(_evaluation_pairs(found), '  ')}")
        return Group(head, *(Text(line, overflow="ellipsis", no_wrap=True) for line in lines if line))

    # The terminal.

    def _is_live(self) -> bool:
        stream = self._stream or sys.stderr
        return stream.isatty() if self._live_wanted is None else self._live_wanted and stream.isatty()

    def _open(self, transient: bool = False) -> None:
        console = Console(file=self._stream or sys.stderr)
        if console.is_dumb_terminal:
            return
        before = {sys.stdout, sys.stderr}
        self._live = Live(
            self, console=console, refresh_per_second=4, transient=transient, redirect_stdout=sys.stdout.isatty(), vertical_overflow="crop"
        )
        self._live.start(refresh=True)
        atexit.register(self.close)
        # Handlers keep the stream that they began with, around which rich cannot reach: their lines would tear the display.
        for handler in _stream_handlers():
            if handler.stream in before:
                self._streams.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was, the last state of the lines in it."""
        if self._bars:
            progress_bars.enable_progress_bar()
            self._bars = False
        if self._live is None:
            return
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams = []
        live, self._live = self._live, None
        live.stop()
        atexit.unregister(self.close)

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stderr, flush=True)


def _bar(before: str, done: int, total: int | None, after: str) -> Table:
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    line.add_row(before, ProgressBar(total=total, completed=done), after)
    return line


def _loss_pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("loss", "kd", "ce")}


def _knob_pairs(point: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    knobs = {"temperature": point.temperature, "kd_ratio": point.kd_ratio, **point.parameters} if point.teacher else {}
    return {**knobs, "lr": row.get("learning_rate")}


def _evaluation_pairs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation, of a named set too; not how long it took."""
    timing = ("_runtime", "_per_second", "_tokens")
    found = {name.removeprefix("eval_"): v for name, v in logs.items() if name.startswith("eval_") and not name.endswith(timing)}
    return {name: f"{v:.1%}" if name.endswith("agreement") else v for name, v in found.items()}


def _speed(row: Mapping[str, Any]) -> list[str]:
    tokens, useful, memory = (row.get(name) for name in ("tokens_per_second", "useful_tokens", "memory_gb"))
    found = [] if tokens is None else [f"{tokens:,.0f} tokens/s"]
    found += [] if useful is None else [f"{useful:.0%} useful"]
    return found + ([] if memory is None else [f"{memory:.1f} GB"])


def _pairs(values: Mapping[str, Any], between: str = ", ") -> str:
    return between.join(f"{name} {_number(value)}" for name, value in values.items() if value is not None)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    loggers = [logging.getLogger(), *(found for found in logging.root.manager.loggerDict.values() if isinstance(found, logging.Logger))]
    for logger in loggers:
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                yield handler
