"""The product that writes fp16 logits against their tile's maximum, on a GPU: ``python benchmarks/offset_gemm.py --out DIR``.

Rows, for shape B first, until the time is up: the product beside `torch.mm` of the same shape, the row kernel alone, and forward KL with
its gradients over N tokens, beside the same chunk loop with fp32 and with 16-bit logits. The last decides whether it is worth having.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.bench_loss import milliseconds  # noqa: E402
from benchmarks.cells import Setting  # noqa: E402
from benchmarks.providers import FLOORS, Problem  # noqa: E402
from benchmarks.run import gpu_name, stamp  # noqa: E402
from fastkd_kernels.divergences import DEFINITIONS  # noqa: E402
from fastkd_kernels.offset_torch import OffsetLogits  # noqa: E402
from fastkd_kernels.spec import Head, RowSpec  # noqa: E402

# Rows of a chunk, so that all buffers are of one size; multiples of the product's block, divisors of N.
CHUNKS = {"fp32": 1024, "16 bits": 2048, "offset": 2048}
ROUNDS = 8
CALLS = 10  # timed together, of what is not long beside its launch
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/offset_gemm.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--seconds", type=float, default=55, help="measure nothing more after this time")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks/offset_gemm.py: measures GPU kernels, and torch.cuda.is_available() is False on this machine", file=sys.stderr)
        return 2
    device, started = torch.device("cuda"), time.perf_counter()
    report = stamp(argv, "cuda", "benchmarks/offset_gemm.py") | {"rows": [], "complete": False}
    path = options.out / f"offset-{gpu_name()}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    for row in _rows(device):
        report["rows"].append(row)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(row), flush=True)
        if time.perf_counter() - started > options.seconds:
            break
    else:
        report["complete"] = True
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {path}")
    return 0


def _rows(device: torch.device) -> Iterator[Row]:
    from fastkd_kernels import offset_gemm

    chosen = offset_gemm.device_config(device)
    half = replace(chosen, block_n=128, warps=4, stages=3, persistent=False)
    others = {"3 stages": replace(chosen, stages=3), "one tile a program": replace(chosen, persistent=False), "two programs": half,
              "pointers": replace(chosen, tma=False), "two programs, pointers": replace(half, tma=False)}  # fmt: skip
    for name in ("B", "A", "C"):
        problem = Problem(Setting(name), device)
        for row in itertools.chain(products(problem, {"chosen": chosen}), row_kernels(problem), whole(problem)):
            yield {"shape": name, **row}
        if name == "B":
            for row in products(problem, {key: c for key, c in others.items() if c != chosen}):
                yield {"shape": name, **row}


def timed(calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS, at_once: int = 1) -> dict[str, float]:
    """The least time of each in ms; they take turns, so that what slows the machine slows all."""
    best: dict[str, float] = {}
    for i in range(rounds + 1):
        for key, call in calls.items():
            ms = milliseconds(call, device, at_once)
            if i:  # the first one compiles
                best[key] = min(ms, best.get(key, ms))
    return best


def _mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b; the sums are fp32, or of the dtype of ``out`` on a CPU, where this only has to run."""
    if not a.is_cuda:
        out.copy_(a.to(out.dtype) @ b.to(out.dtype) + (out if add else 0.0))
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def products(problem: Problem, configs: dict[str, Any], chunk: int = CHUNKS["offset"], rounds: int = ROUNDS) -> Iterator[Row]:
    """One chunk's logits of the student and of the teacher: by cuBLAS into 16 bits and into fp32, and by each configuration."""
    from fastkd_kernels import offset_gemm

    for side, x, w in (("student", problem.hidden, problem.weight), ("teacher", problem.teacher_hidden, problem.teacher_weight)):
        hidden, weight = x.detach()[:chunk], w.detach()
        narrow = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        wide = torch.empty_like(narrow, dtype=torch.float32)
        for key, config in configs.items():
            row: Row = {"what": "product", "side": side, "config": key, **vars(config)}
            out = OffsetLogits.empty(hidden.shape[0], weight.shape[0], config.block_n, hidden.device)

            ours = partial(offset_gemm.offset_logits, hidden, weight, out, Head(), temperature=1.0, shared=weight.shape[0], config=config)
            calls = {"ours": ours, **{name: partial(_mm, hidden, weight.t(), z) for name, z in (("mm", narrow), ("mm_fp32", wide))}}
            try:
                ms = timed(calls, problem.device, rounds, CALLS)
            except Exception as error:  # a configuration that does not fit this GPU is a row that says so
                yield row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
                continue
            flop = 2 * hidden.shape[0] * weight.numel()
            yield row | {f"{k}_ms": v for k, v in ms.items()} | {"ratio": ms["ours"] / ms["mm"], "tflops": flop / ms["ours"] / 1e9}


def row_kernels(problem: Problem, chunks: dict[str, int] = CHUNKS, rounds: int = ROUNDS) -> Iterator[Row]:
    """The row kernel alone, dz over the logits, and the bandwidth that its bytes and its time make."""
    for kind, size in (("offset", 6), ("fp32", 18), ("16 bits", 10)):
        step, part = Chunks(problem, kind, chunks[kind]), slice(0, chunks[kind])
        step.logits(part)
        ms = timed({kind: partial(step.rows, part)}, problem.device, rounds, CALLS)[kind]
        yield {"what": "row kernel", "logits": kind, "chunk": chunks[kind], "ms": ms,
               "gb_per_s": size * chunks[kind] * problem.weight.shape[0] / ms / 1e6}  # fmt: skip


def whole(problem: Problem, chunks: dict[str, int] = CHUNKS, rounds: int = ROUNDS) -> Iterator[Row]:
    """Forward KL and its gradients of all tokens, beside the four bare products; and how far the results are from those of fp32 logits."""
    steps = {kind: Chunks(problem, kind, chunk).run for kind, chunk in chunks.items()}
    reference = [t.clone() for t in steps["fp32"]()]
    differences = {}
    for kind, step in steps.items():
        pairs = zip(("loss", "d_hidden", "d_weight"), step(), reference, strict=True)
        differences[kind] = {key: float((a.float() - b.float()).norm() / b.float().norm()) for key, a, b in pairs}
    ms = timed({"gemms": FLOORS["gemms"](problem), **steps}, problem.device, rounds)
    for kind, chunk in chunks.items():
        yield {"what": "forward KL", "logits": kind, "chunk": chunk, "ms": ms[kind], "gemms_ms": ms["gemms"],
               "ratio": ms[kind] / ms["gemms"], "difference": differences[kind]}  # fmt: skip


class Chunks:
    """The loss's chunk loop with buffers that are there already: ``kind`` is "fp32", "16 bits" or "offset"."""

    def __init__(self, problem: Problem, kind: str, chunk: int):
        from fastkd_kernels import offset_gemm

        self.x, self.w = problem.hidden.detach(), problem.weight.detach()
        self.y, self.v = problem.teacher_hidden, problem.teacher_weight
        self.chunk, (tokens, width), dtype = chunk, (self.x.shape[0], self.w.shape[0]), self.x.dtype
        if tokens % chunk:
            raise ValueError(f"chunk: expected a divisor of the {tokens} tokens, got {chunk}")
        self.spec = RowSpec(DEFINITIONS["forward_kl"])
        self.ones = torch.ones(chunk, device=problem.device)
        self.kd = torch.empty(tokens, device=problem.device)
        self.d_hidden = torch.empty_like(self.x)
        self.d_weight = torch.empty(self.w.shape, device=problem.device)
        self.zs: Any
        self.zt: Any
        if kind == "offset":
            tile = offset_gemm.device_config(problem.device).block_n
            self.zs, self.zt = (OffsetLogits.empty(chunk, width, tile, problem.device) for _ in range(2))
            self.dz = self.zs.residuals.view(dtype)
        else:
            stored = torch.float32 if kind == "fp32" else dtype
            self.zs, self.zt = (torch.empty(chunk, width, dtype=stored, device=problem.device) for _ in range(2))
            self.dz = self.zs.view(dtype)[:, :width]

    def logits(self, part: slice) -> None:
        from fastkd_kernels import offset_gemm

        for x, w, z in ((self.x[part], self.w, self.zs), (self.y[part], self.v, self.zt)):
            if isinstance(z, OffsetLogits):
                offset_gemm.offset_logits(x, w, z, Head(), temperature=1.0, shared=w.shape[0])
            else:
                _mm(x, w.t(), z)

    def rows(self, part: slice) -> None:
        from fastkd_kernels import offset_gemm, rows

        row_losses: Callable[..., None] = offset_gemm.row_losses if isinstance(self.zs, OffsetLogits) else rows.row_losses
        row_losses(self.zs, self.zt, None, self.ones, self.spec, dz=self.dz, kd=self.kd[part], ce=None)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        for start in range(0, self.x.shape[0], self.chunk):
            part = slice(start, start + self.chunk)
            self.logits(part)
            self.rows(part)
            _mm(self.dz, self.w, self.d_hidden[part])
            _mm(self.dz.t(), self.x[part], self.d_weight, add=start > 0)
        return self.kd.mean(), self.d_hidden, self.d_weight


if __name__ == "__main__":
    sys.exit(main())
