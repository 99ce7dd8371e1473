"""What padding costs: ``python benchmarks/padding.py --teacher FILE.gguf --data ROWS.jsonl --out DIR``.

One epoch of the same rows, in batches that are padded as they come, padded but by length, dealt to several micro-batches by length, and
joined to one row without padding. On a CPU attention is `scaled_dot_product_attention`, which masks what lies between joined rows but
computes it all the same: its forward and backward pass on one batch is timed by itself.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.run import stamp  # noqa: E402

# Order of the samples, micro-batches that a step is dealt to, padding_free.
MODES = {
    "padded": ("random", 1, False),
    "without padding": ("random", 1, True),
    "by length": ("group_by_length", 1, False),
    "padded, 4 micro-batches": ("random", 4, False),
    "without padding, 4 micro-batches": ("random", 4, True),
}
BATCH = 8


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/padding.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--teacher", required=True, help="a name, a folder or a GGUF file")
    parser.add_argument("--data", required=True, help="rows of question and answer, or of prompt and completion")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--teacher-layers", type=int, default=4)
    parser.add_argument("--student-layers", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)

    report = stamp(argv, "cpu", "benchmarks/padding.py")
    runs = {name: _trainer(options, *mode) for name, mode in MODES.items()}
    samples = next(iter(runs.values())).schedule.samples
    report |= {"batch": BATCH, "tokens": sum(samples.lengths), "longest": max(samples.lengths), "shortest": min(samples.lengths)}
    report["rows"] = []
    for name, trainer in runs.items():
        row = {"batches": name, **_epoch(trainer)}
        print(json.dumps(row), flush=True)
        report["rows"].append(row)
    report["attention"] = _attention(runs["padded"])
    print(json.dumps(report["attention"]))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "padding-cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")


def _trainer(options: argparse.Namespace, order: str, accumulation: int, padding_free: bool) -> Any:
    from fastkd.data import load_rows
    from fastkd.models import load_model, load_tokenizer
    from fastkd.trainer import KDConfig, KDTrainer

    rows = load_rows(options.data)
    if "question" in rows.column_names:
        rows = load_rows(options.data, columns={"prompt": "question", "completion": "answer"})
    args = KDConfig(
        output_dir=tempfile.mkdtemp(prefix="padding-"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-4,
        max_length=options.max_length,
        chat_template=True,
        train_sampling_strategy=order,
        padding_free=padding_free,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    student, teacher = (
        load_model(options.teacher, dtype="float32", layers=list(range(n))) for n in (options.student_layers, options.teacher_layers)
    )
    rows = rows.select(range(min(options.rows, len(rows))))
    return KDTrainer(student, teacher, args, rows, processing_class=load_tokenizer(options.teacher))


def _epoch(trainer: Any) -> dict[str, Any]:
    """Tokens that are no padding, by the clock and by the processor's time, which other processes disturb less."""
    from fastkd.report import read_metrics

    began = time.process_time()
    trainer.train()
    cpu = time.process_time() - began
    (row,) = [row for row in read_metrics(trainer.args.output_dir) if "loss" in row]
    tokens = sum(trainer.schedule.samples.lengths)
    return {
        "useful_tokens": row["useful_tokens"],
        "tokens_per_second": row["tokens_per_second"],
        "tokens_per_cpu_second": tokens / cpu,
        "loss": row["loss"],
    }


def _attention(trainer: Any) -> dict[str, Any]:
    """One layer's attention, forward and backward, on the first batch: ``[B, S]`` padded and ``[1, T]`` with a block-diagonal mask."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from fastkd.packing import joined

    config = trainer.model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    rows = [trainer.train_dataset[i] for i in trainer.schedule.batch(0)]
    padded = trainer.data_collator(rows)
    flat = joined(padded)
    b, s = padded["input_ids"].shape
    t = flat["input_ids"].shape[1]
    row = flat["kept"] // s
    mask = (row[:, None] == row[None]).tril()[None, None]
    found: dict[str, Any] = {"B": b, "S": s, "T": t, "heads": heads, "head_width": width}
    keep = padded["attention_mask"].bool()[:, None, None] & torch.ones(s, s, dtype=torch.bool).tril()  # as transformers makes it
    for name, shape, allowed in (("padded", (b, heads, s, width), keep), ("joined", (1, heads, t, width), mask)):
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            scaled_dot_product_attention(q, k, v, attn_mask=allowed).sum().backward()
            times.append(time.perf_counter() - start)
        found[f"{name}_ms"] = 1e3 * min(times)
    return found


if __name__ == "__main__":
    main()
