"""Kills `fastkd distill` again and again, resumes it each time, and compares the end with that of a run that was never killed.

    python -m tests.faults --kills 50 --seed 0

The models are tiny; scoring, shards and checkpoints are slowed down, so that kills fall into them too. Each attempt is a process of its
own, forked from this one, which has the imports behind it, and is ended by SIGKILL. Kills come as likely at one moment as at any other, on
average one in a third of the time that a whole run takes. The exit status is 1 if any byte of a student, a store or the scores differs, or
any row of the metrics.
"""

import argparse
import contextlib
import gc
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# A forked process has none of the threads of its parent.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.backends.backend_svg  # noqa: F401  # for the report
import torch
from transformers import Trainer

from fastkd import checkpoints, cli, difficulty, files, report, run, store, trainer

from .tiny import rows, tiny_llama, tiny_tokenizer

CONFIG = """
student: student
teachers: {weak: weak, middle: middle, strong: strong}
data: {train: train.jsonl, eval: eval.jsonl, max_length: 16}
difficulty: {max_new_tokens: 4, batch_size: 4}
plan:
  fractions: [0.34, 0.33, 0.33]
  stages:
    - {name: easy, buckets: [0], epochs: 3, teacher: weak, kd_ratio: 0.7, temperature: 1}
    - {name: half, buckets: [0, 1], epochs: 2, teacher: middle, kd_ratio: 0.8, temperature: {from: 1, to: 2}, restart_lr: true}
    - {name: all, buckets: [0, 1, 2], epochs: 2, teacher: strong, kd_ratio: 1, temperature: 2, restart_lr: true, reset_optimizer: true}
store: {kind: hidden, batch_size: 4}
training: {per_device_train_batch_size: 2, gradient_accumulation_steps: 2, learning_rate: 3e-3, lr_scheduler_type: cosine,
  warmup_steps: 1, logging_steps: 2, save_steps: 3, eval_strategy: steps, eval_steps: 5, use_cpu: true, disable_tqdm: true}
output_dir: whole
"""
PHASES = ("start-up", "scoring", "training", "filling the store", "evaluation", "checkpoint", "resuming", "end of the run")


def prepare(folder: Path) -> None:
    """A student with dropout, three teachers, data and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_llama(1, attention_dropout=0.2).save_pretrained(folder / "student")
    for layers, name in enumerate(("weak", "middle", "strong"), 1):
        tiny_llama(1 + layers, hidden=24, layers=layers).save_pretrained(folder / name)
    for name in ("student", "weak", "middle", "strong"):
        tiny_tokenizer().save_pretrained(folder / name)
    for name, n, seed in (("train", 23, 0), ("eval", 6, 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(n, seed)))
    (folder / "run.yaml").write_text(CONFIG)


def differences(expected: Path, found: Path) -> list[str]:
    """In what the folders of two finished runs differ, one line each."""
    problems = []
    one, other = ({p.relative_to(folder): p.read_bytes() if p.is_file() else b"" for p in _lasting(folder)} for folder in (expected, found))
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            problems.append(f"{name}: only in {(expected if name in one else found).name}")
        elif one[name] != other[name]:
            problems.append(f"{name}: differs")
    before, now = timeless(expected), timeless(found)
    if len(before) != len(now):
        problems.append(f"{report.METRICS}: {len(before)} and {len(now)} rows")
    return problems + [f"{report.METRICS}: {a} and {b}" for a, b in zip(before, now, strict=False) if a != b][:1]


def _lasting(folder: Path) -> list[Path]:
    """What a run leaves that may not depend on interruptions: the student, the scores, the store; and what it may not leave."""
    files = [*folder.glob("*.safetensors"), *folder.glob("difficulty*"), *folder.glob(".*"), *(folder / "store").rglob("*")]
    return [path for path in files if path.is_file() or path.name.startswith(".")]


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock gave, and without the last row of a training, which sums up one process."""
    kept = [row for row in report.read_metrics(folder) if "train_runtime" not in row]
    return [{name: value for name, value in row.items() if not any(part in name for part in report.VOLATILE)} for row in kept]


# In the forked process.


class Progress:
    """What an attempt is doing, in memory that it shares with the process that kills it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 2)

    def begin(self, phase: str) -> None:
        self._shared[:] = bytes((PHASES.index(phase), 0))

    @property
    def phase(self) -> str:
        return PHASES[self._shared[0]]

    @property
    def writing(self) -> bool:
        """Whether a file is being written, or some of several that belong together."""
        return bool(self._shared[1])

    @contextlib.contextmanager
    def within(self, phase: str, seconds: float) -> Iterator[None]:
        before = self._shared[0]
        if self.phase != "checkpoint":  # of which all parts are parts
            self._shared[0] = PHASES.index(phase)
        time.sleep(seconds)
        try:
            yield
        finally:
            self._shared[0] = before

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        self._shared[1] = 1
        time.sleep(seconds)
        try:
            yield
        finally:
            self._shared[1] = 0


def instrument(progress: Progress) -> None:
    """Let the library tell what it does, and take its time where it writes. What it computes and writes is the same."""

    def wrap(owner: Any, name: str, around: Callable[[], contextlib.AbstractContextManager]) -> None:
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            with around():
                return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    def step(*args, **kwargs):
        progress.begin("training")
        time.sleep(0.03)
        return real_step(*args, **kwargs)

    real_step = trainer.KDTrainer.training_step
    trainer.KDTrainer.training_step = step  # type: ignore[method-assign]
    for owner, name, phase, seconds in (
        (difficulty, "score", "scoring", 0),
        (store.Store, "fill", "filling the store", 0),
        (trainer.KDTrainer, "evaluation_loop", "evaluation", 0.1),
        (trainer.KDTrainer, "_save_checkpoint", "checkpoint", 0),
        (trainer.KDTrainer, "save_model", "end of the run", 0),
        (run, "write_report", "end of the run", 0),
    ):
        wrap(owner, name, lambda phase=phase, seconds=seconds: progress.within(phase, seconds))
    for owner, name, seconds in (
        (difficulty._Partial, "add", 0.03),
        (Trainer, "save_model", 0.03),
        (Trainer, "_save_optimizer_and_scheduler", 0.03),
        (Trainer, "_save_rng_state", 0.03),
        (checkpoints, "flush", 0.01),
    ):
        wrap(owner, name, lambda seconds=seconds: progress.slow(seconds))

    def write(descriptor: int, data: Any) -> int:
        with progress.slow(0.02):
            return os.write(descriptor, data[:1000])  # most files take several

    def rmtree(folder: Path, **options: Any) -> None:
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            with progress.slow(0.005):
                path.unlink()
        shutil.rmtree(folder, **options)

    files.os = SimpleNamespace(**{**vars(os), "write": write})  # type: ignore[attr-defined]
    checkpoints.shutil = SimpleNamespace(rmtree=rmtree)  # type: ignore[attr-defined]


# In the process that kills.


@dataclass(frozen=True)
class Kill:
    """One kill: what was going on, and what it left on the disk."""

    phase: str
    writing: bool
    unfinished: bool  # a checkpoint or shard under its temporary name
    checkpoints: int


def attempt(folder: Path, output: str, progress: Progress, resume: bool, patience: float | None) -> float | None:
    """Run `fastkd distill` in a process of its own; kill it after ``patience`` seconds.

    Returns:
        The seconds that it took, or None if it was killed.

    Raises:
        RuntimeError: it failed by itself; with the end of what it wrote.
    """
    progress.begin("resuming" if resume else "start-up")
    log, start = folder / f"{output}.log", time.monotonic()
    process = os.fork()
    if process == 0:
        try:
            with log.open("ab", buffering=0) as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            os.chdir(folder)
            instrument(progress)
            status = cli.main(["distill", "run.yaml", f"output_dir={output}", "--debug", *(["--resume"] if resume else [])])
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)  # nothing of the parent's is to run here
    done = 0
    while patience is None or time.monotonic() - start < patience:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    if not done:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            return None
    if status != 0:
        raise RuntimeError(f"{output}: {'resumed' if resume else 'begun'}, it failed by itself:\n{log.read_text()[-3000:]}")
    return time.monotonic() - start


def kill_and_resume(folder: Path, kills: int, seed: int, say: Callable[[str], None] = print) -> tuple[list[Kill], list[str]]:
    """Kill and resume runs in ``folder`` until there were ``kills``; a run that ends before is followed by another.

    Returns:
        The kills, and what differs from a run that was not killed, one line each.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prepare(folder)
        gc.collect()
        gc.freeze()  # else each attempt spends most of its time going through what was imported
        progress, drawn = Progress(), random.Random(seed)
        whole = attempt(folder, "whole", progress, False, None)
        assert whole is not None
        say(f"not killed, a run takes {whole:.1f} s")
        found: list[Kill] = []
        problems: list[str] = []
        number = 0
        while len(found) < kills:
            number += 1
            output, tries = folder / f"killed-{number}", 0
            while True:
                patience = drawn.expovariate(3 / whole) if len(found) < kills else None
                if attempt(folder, output.name, progress, tries > 0, patience) is not None:
                    break
                tries += 1
                left = [*output.glob(".incomplete/*/*"), *output.rglob(".*.tmp")]
                found.append(Kill(progress.phase, progress.writing, bool(left), len(list(output.glob("checkpoint-*")))))
            different = differences(folder / "whole", output)
            problems += [f"{output.name}: {line}" for line in different]
            say(f"run {number}: killed {tries} times, then {'DIFFERENT' if different else 'equal bit for bit'}")
        return found, problems
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def table(kills: Sequence[Kill]) -> str:
    lines = [f"{'phase':<20}{'kills':>6}{'while writing':>15}{'unfinished files left':>23}"]
    for phase in PHASES:
        those = [kill for kill in kills if kill.phase == phase]
        lines.append(f"{phase:<20}{len(those):>6}{sum(k.writing for k in those):>15}{sum(k.unfinished for k in those):>23}")
    early = sum(kill.checkpoints == 0 for kill in kills)
    lines.append(f"{'all':<20}{len(kills):>6}{sum(k.writing for k in kills):>15}{sum(k.unfinished for k in kills):>23}")
    return "\n".join([*lines, f"{early} of them before the first checkpoint"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs; default: a temporary one")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.keep is None else arguments.keep
        kills, problems = kill_and_resume(folder, arguments.kills, arguments.seed)
    print(table(kills))
    print("\n".join(problems) or "students, metrics, scores and stores are equal to those of the run that was not killed")
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
