"""Run the benchmarks of the loss and write one JSON file: ``python benchmarks/run.py --out DIR [--quick] [--check]``."""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # from a checkout, installed or not

import pytest  # noqa: E402
import torch  # noqa: E402

PACKAGES = ("torch", "triton", "transformers", "liger-kernel", "trl")
# What fastkd promises on a CPU: time divided by that of the four bare GEMMs.
LIMITS = {"forward_kl": 1.25, "jsd": 1.25, "adaptive_kl": 2.5}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="speed and memory of the loss against installed peers")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--quick", action="store_true", help="a tiny problem, once: shows that everything runs, measures nothing")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless fastkd keeps its limits on time and memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="run the cases whose name matches this expression of pytest's -k")
    options = parser.parse_args(argv)

    shapes = "quick" if options.quick else "cpu" if options.device == "cpu" else "A,B,C"
    collector = _Collector()
    arguments = [str(ROOT / "benchmarks" / "bench_loss.py"), f"--rootdir={ROOT}", "-q", "-p", "no:cacheprovider", "--benchmark-quiet"]
    arguments += [f"--device={options.device}", f"--shapes={shapes}", f"--rounds={1 if options.quick else 4}"]
    arguments += ["-k", options.only] if options.only else []
    report = stamp(argv, options.device)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        status = pytest.main(arguments, plugins=[collector])
    if status != pytest.ExitCode.OK:
        print(log.getvalue(), file=sys.stderr)
    report["rows"] = collector.rows  # of a run that failed half way too: what was measured is not lost
    report["complete"] = status == pytest.ExitCode.OK
    name = "cpu" if options.device == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"loss-{name}{'-quick' if options.quick else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(collector.rows))
    print(f"written: {path}")
    if status != pytest.ExitCode.OK:
        return int(status)
    broken = failures(collector.rows)
    for line in broken:
        print("over the limit: " + line, file=sys.stderr)
    return 1 if options.check and broken else 0


class _Collector:
    """A pytest plugin that keeps the cases' rows and prints one line of progress for each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            rows = [value for key, value in report.user_properties if key == "row"]
            self.rows += rows
            for row in rows:
                print(f"{row['shape']} {row['divergence']} {row['provider']}: {report.duration:.0f} s", file=sys.stderr)


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
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """fastkd's rows that break a promise, and peers that do not compute the same: a sentence each."""
    found = []
    for row in rows:
        name = f"{row['shape']} {row['divergence']} {row['provider']}"
        if row.get("agrees") is False:
            found.append(f"{name}: differs from fastkd by {row['difference']}")
        if row["provider"] != "fastkd" or row["shape"] != "cpu":
            continue
        if row["ratio"] > LIMITS[row["divergence"]]:
            found.append(f"{name}: {row['ratio']:.2f} times the GEMMs, limit {LIMITS[row['divergence']]}")
        extra = row["peak_extra_bytes"]
        if extra is not None and extra > row["bound_bytes"] + row["output_bytes"]:
            found.append(f"{name}: {_mb(extra)} MB at the peak, limit {_mb(row['bound_bytes'] + row['output_bytes'])}")
    return found


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text. MB: peak beyond the inputs, the gradients included; bound: chunk buffers, dW and gradients."""
    lines = [f"{'shape':6} {'divergence':12} {'provider':19} {'ms':>9} {'/ GEMMs':>8} {'MB':>7} {'bound':>7}  note"]
    for row in rows:
        start = f"{row['shape']:6} {row['divergence']:12} {row['provider']:19}"
        if "ms" not in row:
            lines.append(f"{start} {'':9} {'':8} {'':7} {'':7}  {row.get('skipped', 'failed')}")
            continue
        bound = _mb(row["bound_bytes"] + row["output_bytes"]) if row.get("bound_bytes") else ""
        note = "" if row.get("agrees", True) else "computes something else"
        lines.append(f"{start} {row['ms']:9.1f} {row['ratio']:8.2f} {_mb(row.get('peak_extra_bytes')):>7} {bound:>7}  {note}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
