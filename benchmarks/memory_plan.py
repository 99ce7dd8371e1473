"""Predicted against measured peak memory of whole runs on the CPU: ``python benchmarks/memory_plan.py --out DIR``.

For each setting `fastkd.memory.predict` says, from configs alone and in a process of its own, what ``fastkd distill`` will have resident at
its peak; others then train three steps and report what the kernel counted (VmHWM). Random weights, of a size at which tensors dominate.
A store is filled by a process of its own before, so that the measured one has it in full.

What is predicted is what tensors hold. glibc's malloc keeps much of what they give back, in holes of sizes that depend on their order;
``measured`` is therefore with `MALLOC_MMAP_THRESHOLD_`, which has each tensor's memory returned, ``default_malloc`` without.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.run import stamp  # noqa: E402

TARGET = 0.10
WORDS = [f"w{i}" for i in range(31996)]  # a run reads of a table of embeddings the pages of the tokens it has
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
BASE = {
    "student": {"model": "llama-60m"},
    "teacher": {"model": "llama-100m"},
    "data": {"train": "rows.jsonl", "max_length": 256, "completion_only_loss": False},
    "loss": {"kd_ratio": 0.5},
    "training": {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": True, "logging_steps": 1,
    },
}  # fmt: skip
SETTINGS: dict[str, list[str]] = {
    "base: 60M student, live 100M teacher, AdamW, 4 rows": [],
    "gradient checkpointing": ["training.gradient_checkpointing=true"],
    "LoRA": ["student.lora={r: 16, target_modules: all-linear}"],
    "hidden store": ["store={kind: hidden, path: store-hidden}"],
    "topk store, Adafactor": ["store={kind: topk, path: store-topk, top_k: 32}", "training.optim=adafactor"],
    "student of bf16 weights, 2 rows": ["student.dtype=bfloat16", "training.per_device_train_batch_size=2"],
    "padding_free": ["data.padding_free=true"],
    "student with a vocabulary of 64,000, 8 rows": ["student.model=llama-70m", "training.per_device_train_batch_size=8"],
    "GPT-2 student without a teacher, SGD": [
        "student.model=gpt2-70m", "teacher=null", "plan={stages: [{teacher: null, kd_ratio: 0}]}", "loss.kd_ratio=null",
        "training.optim=sgd",
    ],
    "6 of 8 layers, two micro-batches, plain AdamW, chunks of 64": [
        "student={model: llama-60m, layers: [0, 1, 2, 5, 6, 7]}", "training.gradient_accumulation_steps=2", "training.optim=adamw_torch",
        "training.per_device_train_batch_size=2", "loss.chunk_tokens=64",
    ],
    "packing, with evaluation": ["data.packing=true", "data.eval=rows.jsonl", "training.per_device_train_batch_size=2"],
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/memory_plan.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="settings whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="settings at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print("RESULT " + json.dumps(_one(*options.one)))
        return

    report = stamp(argv, "cpu", "benchmarks/memory_plan.py")
    report["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        make_problem(Path(folder))
        chosen = {name: overrides for name, overrides in SETTINGS.items() if not options.only or options.only in name}
        pool = ThreadPoolExecutor(options.jobs)  # what a process has resident does not depend on its neighbours
        for name, found in zip(chosen, pool.map(lambda overrides: compare(Path(folder), overrides), chosen.values()), strict=True):
            row: dict[str, Any] = {"setting": name, "overrides": chosen[name], **found}
            report["rows"].append(row)
            print(
                f"{name:60} {row['predicted'] / 1e6:6.0f} MB predicted {row['measured'] / 1e6:6.0f} measured {row['error']:+.1%}"
                f" {row['default_malloc'] / 1e6:6.0f} with malloc as it is",
                flush=True,
            )
    missed = [row["setting"] for row in report["rows"] if abs(row["error"]) > TARGET]
    report |= {"target": TARGET, "missed": missed}
    print(f"{len(report['rows']) - len(missed)} of {len(report['rows'])} within {TARGET:.0%}" + (f"; missed: {missed}" if missed else ""))
    if options.only:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "memory-cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")


def compare(folder: Path, overrides: list[str], default_malloc: bool = True) -> dict[str, Any]:
    """Predicted and measured bytes of one setting, each from a process of its own; ``default_malloc``: measure that too."""
    if any(word.startswith("store=") for word in overrides):
        _in_a_process(folder, "fill", overrides)
    found = _in_a_process(folder, "predict", overrides)
    began = time.perf_counter()
    measured = _in_a_process(folder, "measure", overrides, MAPPED)["peak"]
    seconds = time.perf_counter() - began
    return {
        "predicted": found["host_bytes"],
        "measured": measured,
        "error": found["host_bytes"] / measured - 1,
        "default_malloc": _in_a_process(folder, "measure", overrides)["peak"] if default_malloc else None,
        "seconds_to_predict": found["seconds"],
        "seconds_to_run": seconds,
        "peak": found["peak"],
        "dominant": found["dominant"],
        "rough": found["rough"],
        "parts": next(phase["host"] for phase in found["phases"] if phase["name"] == found["peak"]),
    }


def _in_a_process(folder: Path, what: str, overrides: list[str], environment: Mapping[str, str] = {}) -> dict[str, Any]:
    output = tempfile.mkdtemp(dir=folder)
    words = [sys.executable, __file__, "--one", what, f"output_dir={output}/run", *overrides]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{what} {overrides}: {done.stderr[-2000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def _one(what: str, *overrides: str) -> dict[str, Any]:
    from fastkd.begin import begin
    from fastkd.config import load_config
    from fastkd.run import distill, fill_stores

    config = load_config("run.yaml", overrides)
    if what == "fill":
        return fill_stores(config)
    if what == "predict":
        from fastkd.memory import predict

        began = time.perf_counter()
        found = predict(begin(config), device="cpu")
        return {**found.to_dict(), "seconds": time.perf_counter() - began}
    distill(config)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"peak": int(peak[1]) * 1024}


def make_problem(folder: Path, only: Sequence[str] = ()) -> None:
    """Models of random weights with a tokenizer, rows and a configuration."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    ids = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    common: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def sizes(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
        return {
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
            "intermediate_size": inner,
        }  # fmt: skip

    makers: dict[str, Any] = {
        "llama-60m": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=32000, tie_word_embeddings=True, **sizes(640, 8, 10, 1792), **common)),
        "llama-100m": lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **sizes(768, 8, 12, 2048), **common)
        ),
        "llama-70m": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=64000, tie_word_embeddings=True, **sizes(512, 10, 8, 1536), **common)),
        "gpt2-70m": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32000, n_embd=768, n_layer=6, n_head=12, n_positions=1024, **common)),
    }
    for name in only or makers:
        makers[name]().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw, place = random.Random(0), 0
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(16):
            length = draw.randint(40, 140)
            text = [WORDS[(place + i) * 19777 % len(WORDS)] for i in range(length)]  # spread evenly over the table
            place += length
            row = {"prompt": " ".join(text[: length // 4]), "completion": " " + " ".join(text[length // 4 :])}
            stream.write(json.dumps(row) + "\n")
    (folder / "run.yaml").write_text(json.dumps(BASE))  # JSON is YAML


if __name__ == "__main__":
    main()
