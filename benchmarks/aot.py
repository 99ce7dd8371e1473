"""Registers and stack of the kernels for several GPUs, compiled without one: ``python benchmarks/aot.py --out DIR`` writes aot.json."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.run import stamp  # noqa: E402
from tests.aot import report_in_subprocess  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/aot.py", description="registers and stack of the kernels, compiled ahead of time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of aot.json")
    options = parser.parse_args(argv)
    report = stamp(argv, "cpu", "benchmarks/aot.py")
    rows = report_in_subprocess(few=False)
    columns = ("kernel", "divergence", "target", "block", "warps", "registers", "stack_bytes", "spills")
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print(" ".join(f"{row[c]!s:>{max(len(c), 18 if c == 'divergence' else 6)}}" for c in columns))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "aot.json"
    path.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
