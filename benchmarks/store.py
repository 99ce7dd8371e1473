"""What a store of teacher signals saves: ``python benchmarks/store.py --teacher FILE.gguf --data ROWS.jsonl --out DIR``.

One epoch of the same training three times, each in a process of its own: with the live teacher, filling a store on the way, and from the
full store. The least that an epoch can take is that without the teacher's body; (S + T) / (S + T_head) is how many times faster that is.
"""

import argparse
import contextlib
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.run import stamp  # noqa: E402

# Layers of the teacher that the student keeps: two thirds, as in the demo, and four, a teacher much larger than its student.
STUDENTS = {
    "20 of 30 layers": [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 15, 19, 20, 21, 22, 23, 24, 27, 28, 29],
    "4 of 30 layers": [0, 1, 28, 29],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/store.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", required=True, help="a name, a folder or a GGUF file")
    parser.add_argument("--data", required=True, help="rows of prompt and completion")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print("RESULT " + json.dumps(_epoch(options, **json.loads(options.one))))
        return

    report = stamp(argv, "cpu", "benchmarks/store.py")
    report["rows"] = []
    for name, layers in STUDENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs = {}
            for mode in ("live", "filling", "stored"):
                print(f"{name}: {mode}", file=sys.stderr)
                runs[mode] = _in_a_process(argv, {"layers": layers, "store": None if mode == "live" else folder})
        live, stored = runs["live"], runs["stored"]
        row = {
            "student": name,
            **{f"seconds_{mode}": run["seconds"] for mode, run in runs.items()},
            "teacher_body_seconds": live["teacher_seconds"],
            "ceiling": live["seconds"] / (live["seconds"] - live["teacher_seconds"]),
            "speedup": live["seconds"] / stored["seconds"],
            **{f"peak_mb_{mode}": run["peak_mb"] for mode, run in runs.items()},
            **{f"loaded_{mode}": run["loaded"] for mode, run in runs.items()},
            "same_weights": runs["filling"]["weights"] == stored["weights"],
            **{key: live[key] for key in ("rows", "tokens", "counted_tokens", "student_parameters", "teacher_parameters")},
            "store_mb": stored["store_mb"],
        }
        report["rows"].append(row)
        print(json.dumps(row, indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "store-cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")


def _in_a_process(argv: list[str] | None, one: dict[str, Any]) -> dict[str, Any]:
    words = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--one", json.dumps(one)]
    out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(next(line for line in out.splitlines() if line.startswith("RESULT "))[7:])


def _epoch(options: argparse.Namespace, layers: list[int], store: str | None) -> dict[str, Any]:
    """One epoch in this process. The teacher's body counts as long as the hidden states of a batch take."""
    import hashlib

    import fastkd.teachers
    from fastkd.data import load_rows
    from fastkd.models import load_model, load_tokenizer
    from fastkd.trainer import KDConfig, KDTrainer

    tokenizer = load_tokenizer(options.teacher)
    rows = load_rows(options.data)
    rows = rows.select(range(min(options.rows, len(rows))))
    teacher_seconds = 0.0
    body = fastkd.teachers.run_body

    def timed(*args, **kwargs):
        nonlocal teacher_seconds
        began = time.perf_counter()
        try:
            return body(*args, **kwargs)
        finally:
            teacher_seconds += time.perf_counter() - began

    fastkd.teachers.run_body = timed  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        args = KDConfig(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=options.batch_size,
            learning_rate=1e-4,
            max_length=options.max_length,
            chat_template=True,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            store=None if store is None else {"path": store},
        )
        student = load_model(options.teacher, dtype="float32", layers=layers)
        trainer = KDTrainer(student, {"teacher": options.teacher}, args, rows, processing_class=tokenizer)
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading the student is over
        teacher_seconds, began = 0.0, time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    digest = hashlib.sha256()
    for name, value in student.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).numpy().tobytes())
    samples = trainer.schedule.samples
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {
        "seconds": seconds,
        "teacher_seconds": teacher_seconds,
        "peak_mb": int(peak[1]) / 1e3 if peak else None,
        "loaded": trainer.teachers.loaded.get("teacher"),
        "weights": digest.hexdigest(),
        "rows": len(samples),
        "tokens": sum(samples.lengths),
        "counted_tokens": sum(samples.counted or ()),
        "student_parameters": student.num_parameters(),
        "teacher_parameters": sum(p.numel() for p in trainer.teachers.outline("teacher").parameters()),
        "store_mb": None if store is None else sum(f.stat().st_size for f in Path(store).rglob("*") if f.is_file()) / 1e6,
    }


if __name__ == "__main__":
    main()
