"""Run the benchmarks of the loss and write one JSON file: ``python benchmarks/run.py --out DIR [--quick] [--check]``."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # from a checkout, installed or not

import torch  # noqa: E402

from benchmarks.cells import CELLS, LIMITS, TARGETS, Cell, Target  # noqa: E402
from benchmarks.providers import PROVIDERS  # noqa: E402
from fastkd.files import write_whole  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl", "fla-core")
# A cell that takes longer, its first call included, is given up; with torch.compile it gets half as long again.
CELL_SECONDS = {"cuda": 60, "cpu": 300}
START_SECONDS = 120  # to import everything and begin the first cell
LATE = "not begun: no time left"
UNBEGUN = "not begun: the process that measures does not start"
NOTED_ERROR = 0.05  # of a gradient that a row's note tells
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="speed and memory of the loss against installed peers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", choices=tuple(CELLS), help="a list of cells.py; default: gpu or cpu, as the device is")
    parser.add_argument("--quick", action="store_true", help="--cells quick: shows that everything runs, measures nothing")
    parser.add_argument("--only", help="cells whose name has all these words; alternatives behind commas: 'jsd fastkd, jsd naive'")
    parser.add_argument("--deadline", type=float, help="begin no cell after so many seconds; the most important come first")
    parser.add_argument("--seconds", type=float, help="of measuring a cell, twice that for fastkd; default: 1 on a GPU, 6 on a CPU")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless fastkd keeps its limits (CPU) or targets (H100, H200)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")

    name = "quick" if options.quick else options.cells or {"cuda": "gpu"}.get(options.device, options.device)
    chosen = [i for i, cell in enumerate(CELLS[name]) if _matches(cell.name, options.only)]
    if not chosen:
        parser.error(f"--only {options.only!r}: none of the cells of {name!r} is named so")
    seconds = options.seconds or (0.01 if name == "quick" else 2 if name == "sweep" else 1 if options.device == "cuda" else 6)
    machine = "cpu" if options.device == "cpu" else gpu_name()
    path = options.out / f"{name if name in ('quick', 'sweep') else 'loss'}-{machine}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    report = stamp(argv, options.device)

    def write(rows: list[Row]) -> None:
        done = len(rows) == len(chosen) and not any(row.get("skipped") in (LATE, UNBEGUN) for row in rows)
        write_whole(path, json.dumps(report | {"complete": done, "rows": rows}, indent=1) + "\n")

    rows = run_cells(name, chosen, options.device, seconds, options.deadline, write)
    write(rows)
    print(table(rows))
    gpu = report["hardware"]["gpu"]
    broken = failures(rows)
    if gpu is not None:
        lines, missed = judge_all({CELLS[name][i] for i in chosen}, rows, meant="H100" in gpu or "H200" in gpu)
        for line in lines:
            print(line)
        broken += missed
    for line in broken:
        print("failed: " + line, file=sys.stderr)
    for drawn in _plots(path, rows):
        print(f"drawn: {drawn}")
    print(f"written: {path}")
    unbegun = any(row.get("skipped") == UNBEGUN for row in rows)
    return 1 if unbegun or (options.check and broken) else 0


def _matches(name: str, only: str | None) -> bool:
    return only is None or any(all(word in name for word in part.split()) for part in only.split(","))


def run_cells(
    name: str, chosen: list[int], device: str, seconds: float, deadline: float | None, write: Callable[[list[Row]], None]
) -> list[Row]:
    """Rows of the cells, in their order. They run in a process of their own: one that dies, or hangs, costs a row and not the run."""
    rows: dict[int, Row] = {}
    cells = CELLS[name]

    def note(index: int, row: Row) -> None:
        rows[index] = row
        text = row.get("skipped") or f"{row['ms']:.1f} ms"
        print(f"{cells[index].name}: {text}", file=sys.stderr, flush=True)
        write([describe(cells[i]) | rows[i] for i in chosen if i in rows])

    def limit(began: int | None) -> float:
        if began is None:
            return START_SECONDS
        return CELL_SECONDS[device] * (1.5 if PROVIDERS[cells[began].provider].compiles else 1)

    until = None if deadline is None else time.time() + deadline
    with tempfile.TemporaryDirectory() as folder:
        journal, log = Path(folder) / "journal", Path(folder) / "log"
        while waiting := [i for i in chosen if i not in rows]:
            if until is not None and time.time() > until:
                rows |= {i: {"skipped": LATE} for i in waiting}
                break
            journal.write_text("")
            command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks" / "bench_loss.py"), f"--rootdir={ROOT}", "-q", "--tb=short"]
            command += ["-p", "no:cacheprovider", "--benchmark-quiet", "-o", "timeout=0", f"--journal={journal}", f"--device={device}"]
            command += [f"--cells={name}", f"--indices={','.join(map(str, waiting))}", f"--seconds={seconds}"]
            command += [] if until is None else [f"--until={until}"]
            path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
            with log.open("w") as file:
                environment = os.environ | {"PYTHONPATH": path}
                # A group of its own: what the child starts ends with it, whatever ends this.
                child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
                try:
                    began = _watch(child, journal, limit, note)
                finally:
                    _kill_group(child)
                    child.wait()
            if began is not None and began not in rows:
                note(began, {"skipped": f"failed: the process ended with status {child.returncode}", "traceback": log.read_text()[-3000:]})
            elif began is None and not (until is not None and time.time() > until):
                said = log.read_text()
                last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
                print(f"no cell was begun: status {child.returncode}: {last.strip()}", file=sys.stderr, flush=True)
                rows |= {i: {"skipped": UNBEGUN, "traceback": said[-3000:]} for i in waiting}
                break
    return [describe(cells[i]) | rows[i] for i in chosen]


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _watch(child: subprocess.Popen, journal: Path, limit: Callable[[int | None], float], done: Callable[[int, Row], None]) -> int | None:
    """Hand on each finished cell of the child until it ends; kill it when a cell takes longer than ``limit`` of it, or the start than that
    of None. Returns the last cell begun.
    """
    began, read, since = None, 0, time.monotonic()
    while True:
        ended = child.poll() is not None
        lines = journal.read_text().splitlines(keepends=True)
        for line in (json.loads(x) for x in lines[read:] if x.endswith("\n")):
            read, since = read + 1, time.monotonic()
            if "began" in line:
                began = line["began"]
            else:
                done(line["done"], line["row"])
        if ended:
            return began
        if time.monotonic() - since > limit(began):
            _kill_group(child)
        time.sleep(0.2)


def describe(cell: Cell) -> Row:
    shape = cell.setting.size
    return {
        "shape": cell.setting.shape,
        "divergence": cell.setting.divergence,
        "setting": cell.setting.variant,
        "provider": cell.provider,
        "tokens": shape.tokens,
        "vocabulary": shape.vocabulary,
        "student_width": shape.student_width,
        "teacher_width": shape.teacher_width,
        "dtype": str(shape.dtype).removeprefix("torch."),
    }


def _plots(path: Path, rows: list[Row]) -> list[Path]:
    try:
        from benchmarks.plots import draw

        return draw(rows, path)
    except Exception as error:  # matplotlib is missing, or fails: no reason to lose what was measured
        print(f"no plots: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}", file=sys.stderr)
        return []


def gpu_name() -> str:
    """As part of a file's name."""
    return re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()


def stamp(argv: list[str] | None, device: str, script: str = "benchmarks/run.py") -> dict[str, Any]:
    """What a reader needs to judge the numbers."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([script, *(sys.argv[1:] if argv is None else argv)]),
        "commit": os.environ.get("FASTKD_COMMIT") or git("rev-parse", "HEAD"),  # the variable is for a copy with another history, or none
        "dirty": None if changes is None else bool(changes),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            **(_gpu() if device == "cuda" else {}),
        },
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **{p: version(p) for p in PACKAGES}},
    }


GPU_FACTS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")


def _gpu() -> dict[str, str]:
    """What nvidia-smi says of the GPU that torch uses; nothing where it is missing or says something else."""
    uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None))
    command = ["nvidia-smi", f"--query-gpu={','.join(('uuid', *GPU_FACTS))}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}
    for line in said.splitlines():
        of, *facts = (x.strip() for x in line.split(","))
        if of.removeprefix("GPU-") == uuid and len(facts) == len(GPU_FACTS):
            return dict(zip(GPU_FACTS, facts, strict=True))
    return {}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def failures(rows: list[Row]) -> list[str]:
    """fastkd's rows that break a promise, fail or do not compute the same: a sentence each. A peer that does not is none."""
    found = []
    for row in rows:
        name = _name(row)
        if not row["provider"].startswith("fastkd"):
            continue
        if row.get("agrees") is False:
            found.append(f"{name}: errors {row['error']}")
        if row.get("skipped", "").startswith("failed"):
            found.append(f"{name}: {row['skipped']}")
        if row["shape"] != "cpu" or row["provider"] != "fastkd" or "ratio" not in row:
            continue
        limit = LIMITS.get(row["divergence"])
        if not row["setting"] and limit is not None and row["ratio"] > limit:
            found.append(f"{name}: {row['ratio']:.2f} times the GEMMs, limit {limit}")
        extra = row.get("peak_extra_bytes")
        if extra is not None and extra > row["bound_bytes"] + row["output_bytes"]:
            found.append(f"{name}: {_mb(extra)} MB at the peak, limit {_mb(row['bound_bytes'] + row['output_bytes'])}")
    return found


def judge(target: Target, rows: list[Row]) -> tuple[str, bool | None]:
    """A line that says whether the rows meet a target, and whether they do; None where a row is missing."""

    def value(cell: Cell) -> float | None:
        row = next((r for r in rows if describe(cell).items() <= r.items()), {})
        if not row.get("agrees", True):
            others.append(cell.provider)
        return row.get(target.field)

    others: list[str] = []
    limit = f"at most {target.at_most:.2f}" if target.at_most is not None else f"at least {target.at_least:.2f}"
    found, over = value(target.cell), 1.0 if target.over is None else value(target.over)
    if others:
        return f"target {target.text}: {limit}: not measured: {', '.join(others)} computes something else", None
    if found is None or not over:
        return f"target {target.text}: {limit}: not measured", None
    met = found / over <= target.at_most if target.at_most is not None else found / over >= (target.at_least or 0.0)
    return f"target {target.text}: {limit}: {found / over:.2f}, {'met' if met else 'missed'}", met


def judge_all(chosen: set[Cell], rows: list[Row], *, meant: bool) -> tuple[list[str], list[str]]:
    """Lines on the targets whose cells were chosen, and those that fail a check: what is missed, on a GPU that the targets are meant for,
    and what of our own was not measured, on any.
    """
    judged = [(target, *judge(target, rows)) for target in TARGETS if chosen.issuperset(target.cells)]
    lines = [line for _, line, met in judged if meant or met is None]
    return lines, [line for target, line, met in judged if (met is False and meant) or (met is None and target.ours)]


def _name(row: Row) -> str:
    return ", ".join(filter(None, (f"{row['shape']} {row['divergence']}", row["setting"], row["provider"])))


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def table(rows: list[Row]) -> str:
    """The rows as text. / floor: over the GEMMs, or a copy; MB: peak beyond the inputs, the gradients included; bound: of chunk buffers, dW
    and gradients; errors of the gradients against float64, in percent.
    """
    lines = [f"{'':56} {'ms':>9} {'/ floor':>8} {'MB':>7} {'bound':>6} {'dH %':>7} {'dW %':>7}  note"]
    for row in rows:
        start = f"{_name(row):56}"
        errors = row.get("error", {})
        percent = [f"{100 * errors[k]:.2g}" if k in errors else "" for k in ("d_hidden", "d_weight")]
        note = row.get("skipped", "")
        worst = max((errors[k] for k in ("d_hidden", "d_weight") if k in errors), default=0.0)
        if not row.get("agrees", True):
            note = "computes something else" + (f", loss off by {100 * errors['loss']:.2g} %" if "loss" in errors else "")
        elif worst > NOTED_ERROR and not note:
            note = f"gradients off by {100 * worst:.0f} %"
        bound = _mb(row["bound_bytes"] + row["output_bytes"]) if row.get("bound_bytes") else ""
        times = f"{row['ms']:9.1f} {row['ratio']:8.2f}" if "ms" in row else f"{'':18}"
        lines.append(f"{start} {times} {_mb(row.get('peak_extra_bytes')):>7} {bound:>6} {percent[0]:>7} {percent[1]:>7}  {note}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as an exception, which ends the cell in progress, too
    sys.exit(main())
