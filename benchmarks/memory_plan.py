"""Predicted against measured peak memory of whole runs: ``python benchmarks/memory_plan.py --out DIR [--device cuda]``.

For each setting `fastkd.memory.predict` says, from configs alone and in a process of its own, what ``fastkd distill`` will have resident at
its peak; others then train three steps and report what the kernel counted (VmHWM). Random weights, of a size at which tensors dominate.
A store is filled by a process of its own before, so that the measured one has it in full.

What is predicted is what tensors hold. glibc's malloc keeps much of what they give back, in holes of sizes that depend on their order;
``measured`` is therefore with `MALLOC_MMAP_THRESHOLD_`, which has each tensor's memory returned, ``default_malloc`` without.

On a GPU ``measured`` is what torch reserved at its peak, and what the driver counts beyond that (context and libraries); ``allocated`` is
what tensors held. Larger models, and the levers that need a GPU. ``--headline`` trains the 80 GB example with random weights.
"""

import argparse
import json
import os
import random
import re
import shutil
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

GPU_BASE = BASE | {
    "student": {"model": "llama-0.5b", "dtype": "float32"},
    "teacher": {"model": "llama-1.5b"},
    "data": {"train": "long.jsonl", "max_length": 512, "completion_only_loss": False},
    "training": {
        "max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-5, "save_strategy": "no", "disable_tqdm": True,
        "bf16": True, "logging_steps": 10,
    },
}  # fmt: skip
GPU_SETTINGS: dict[str, list[str]] = {
    "base: 0.5B student in bf16 autocast, 1.5B teacher, AdamW, 8 rows of 512": [],
    "gradient checkpointing": ["training.gradient_checkpointing=true"],
    "loss buffer of 128 MB, 2 rows, 4 micro-batches": [
        "loss.max_loss_buffer_mb=128", "training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4",
    ],
    "LoRA": ["student.lora={r: 16, target_modules: all-linear}"],
    "hidden store": ["store={kind: hidden, path: store-hidden}"],
    "bf16 weights, AdamW in 8 bits": ["student.dtype=bfloat16", "training.optim=adamw_8bit"],
    "teacher in 4 bits, checkpointing, paged AdamW in 8 bits": [
        "teacher.quantization=4bit", "training.gradient_checkpointing=true", "training.optim=paged_adamw_8bit",
    ],
    "QLoRA: student in 4 bits": ["student={model: llama-0.5b, quantization: 4bit, lora: true}"],
    "activation offloading": ["training.activation_offloading=true"],
    "padding_free, with evaluation": ["data.padding_free=true", "data.eval=long.jsonl"],
    "Liger kernels (not modelled)": ["training.use_liger_kernel=true"],
    "teacher on the CPU, SGD": ["teacher.device=cpu", "training.optim=sgd", "training.max_steps=2"],
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/memory_plan.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", help="settings whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="settings at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--headline", action="store_true", help="the example for 80 GB alone")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print("RESULT " + json.dumps(_one(*options.one)))
        return

    if options.device == "cuda":
        return _on_gpu(argv, options)
    report = stamp(argv, "cpu", "benchmarks/memory_plan.py")
    report["rows"] = []
    with tempfile.TemporaryDirectory() as folder:
        make_problem(Path(folder), ["llama-60m", "llama-100m", "llama-70m", "gpt2-70m"])
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


def _on_gpu(argv: list[str] | None, options: argparse.Namespace) -> None:
    report, settings = stamp(argv, "cuda", "benchmarks/memory_plan.py"), GPU_SETTINGS
    report["rows"] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.headline:
            example = ROOT / "examples" / "one-gpu-80gb.yaml"
            shutil.copy(example, folder / "run.yaml")
            _in_a_process(folder, "make", ["headline"])  # this process is to hold nothing on the GPU
            settings = {
                example.name: [
                    "student.model=llama-7b", "teacher.model=llama-14b", "training.max_steps=2", "training.report_to=none",
                    "training.gradient_accumulation_steps=4", "training.save_strategy=no", "training.logging_steps=10",
                    "data.completion_only_loss=false",
                ]
            }  # fmt: skip
        else:
            _in_a_process(folder, "make", [])
        settings = {name: words for name, words in settings.items() if not options.only or options.only in name}
        for overrides in settings.values():  # whether a store is full is part of what is predicted
            if any(word.startswith("store=") for word in overrides):
                _in_a_process(folder, "fill", overrides)
        pool = ThreadPoolExecutor(6)
        predicted = list(pool.map(lambda words: _in_a_process(folder, "predict-cuda", words), settings.values()))
        for (name, overrides), found in zip(settings.items(), predicted, strict=True):
            row: dict[str, Any] = {"setting": name, "overrides": overrides, "predicted": found["gpu_bytes"], "peak": found["peak"]}
            try:
                row |= _in_a_process(folder, "measure-cuda", overrides)
                row["measured"] = row["reserved"] + row["context"]
                row["error"] = row["predicted"] / row["measured"] - 1
            except RuntimeError as error:
                row["failed"] = str(error)[-1500:]
            row |= {"dominant": found["dominant"], "rough": found["rough"], "seconds_to_predict": found["seconds"]}
            row["parts"] = next(phase["gpu"] for phase in found["phases"] if phase["name"] == found["peak"])
            row["predicted_host"] = found["host_bytes"]
            report["rows"].append(row)
            print(
                {key: value if not isinstance(value, int) else round(value / 1e6) for key, value in row.items() if key != "overrides"},
                flush=True,
            )
    good = [row for row in report["rows"] if "error" in row]
    report |= {"target": TARGET, "missed": [row["setting"] for row in good if abs(row["error"]) > TARGET]}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"memory-gpu{'-headline' if options.headline else ''}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}; missed: {report['missed']}")


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
    if what == "make":
        if "headline" in overrides:
            make_problem(Path(), ["llama-7b", "llama-14b"], rows={"train.jsonl": (16, 1000, 1300)})
        else:
            make_problem(Path(), ["llama-0.5b", "llama-1.5b"], rows={"long.jsonl": (32, 300, 500)}, base=GPU_BASE)
        return {}
    from fastkd import run
    from fastkd.begin import begin
    from fastkd.config import load_config
    from fastkd.run import distill, fill_stores

    config = load_config("run.yaml", overrides)
    if what == "fill":
        return fill_stores(config)
    if what.startswith("predict"):
        from fastkd.memory import predict

        began = time.perf_counter()
        found = predict(begin(config), device="cuda" if what.endswith("cuda") else "cpu")
        return {**found.to_dict(), "seconds": time.perf_counter() - began}
    if what == "measure-cuda":
        import torch

        torch.cuda.reset_peak_memory_stats = lambda *_: None  # type: ignore[assignment]  # the trainer's own figures start anew
        run._save = lambda trainer: None  # type: ignore[assignment]  # gigabytes that nobody reads
        began = time.perf_counter()
        distill(config)
        free, total = torch.cuda.mem_get_info()
        metrics = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
        host = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return {
            "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
            "context": total - free - torch.cuda.memory_reserved(), "host": int(host[1]) * 1024 if host else None,
            "seconds_to_run": time.perf_counter() - began, "metrics": metrics[-1],
        }  # fmt: skip
    distill(config)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"peak": int(peak[1]) * 1024}


def make_problem(
    folder: Path,
    only: Sequence[str],
    rows: Mapping[str, tuple[int, int, int]] = {"rows.jsonl": (16, 40, 140)},
    base: Mapping[str, Any] = BASE,
) -> None:
    """Models of random weights with a tokenizer, rows (number, least and most words by file) and a configuration."""
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
    # The shapes of Qwen2.5's 0.5B, 1.5B, 7B and 14B, in Llama's architecture.
    large = {
        "llama-0.5b": (151936, True, 896, 24, 14, 4864, 2), "llama-1.5b": (151936, True, 1536, 28, 12, 8960, 2),
        "llama-7b": (152064, False, 3584, 28, 28, 18944, 4), "llama-14b": (152064, False, 5120, 48, 40, 13824, 8),
    }  # fmt: skip

    def drawn(name: str) -> Any:
        import torch

        if name in makers:
            return makers[name]()
        vocabulary, tied, width, layers, heads, inner, kv = large[name]
        config = LlamaConfig(
            vocab_size=vocabulary, tie_word_embeddings=tied, dtype="bfloat16",
            **sizes(width, layers, heads, inner) | {"num_key_value_heads": kv}, **common,
        )  # fmt: skip
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                return LlamaForCausalLM(config)
            finally:
                torch.set_default_dtype(before)

    for name in only:
        drawn(name).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw, place = random.Random(0), 0
    for file, (number, least, most) in rows.items():
        with (folder / file).open("w") as stream:
            for _ in range(number):
                length = draw.randint(least, most)
                text = [WORDS[(place + i) * 19777 % len(WORDS)] for i in range(length)]  # spread evenly over the table
                place += length
                row = {"prompt": " ".join(text[: length // 4]), "completion": " " + " ".join(text[length // 4 :])}
                stream.write(json.dumps(row) + "\n")
    if not (folder / "run.yaml").exists():
        (folder / "run.yaml").write_text(json.dumps(base))  # JSON is YAML


if __name__ == "__main__":
    main()
