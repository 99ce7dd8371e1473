"""How exact loss and gradients are in 16 bits, against float64: ``python benchmarks/accuracy.py --out DIR [--check]``.

Student and teacher share one head, and the teacher's hidden states are the student's, moved by a distance times a random normal: small
is late in distillation, where the gradient is a small difference. Errors are norms of the difference over norms, in percent. Everything
runs on a CPU; what a GPU does otherwise is done here as it does it there, and says so.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # for Liger's kernel; before Triton is imported

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.providers import Unavailable  # noqa: E402
from benchmarks.run import stamp  # noqa: E402
from fastkd import DIVERGENCES, TeacherHidden, TeacherLogits, fused_linear_kd, kd_loss  # noqa: E402
from fastkd.reference import divergence_per_token  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DISTANCES = (0.01, 0.05, 0.3, 1.0)
STDS = (3.0, 8.0)  # of the logits
TEMPERATURES = (1.0, 4.0)
CHUNKS = (1, 4, 16)
LIMIT = 0.5  # percent; what the default promises at every distance
# tvd's gradient is the sign of q - p. Where both are equal to six digits, the rounding of fp32 log-probabilities decides it.
LIMITS = {"tvd": 1.0}
# fp16 gradients are small: losses are scaled, as by torch's GradScaler.
FP16_BOOST = 64.0  # by which fastkd multiplies dz until the backward pass
LOSS_SCALE = {torch.bfloat16: 1.0, torch.float16: 8192.0}
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


@dataclass(frozen=True)
class Setting:
    dtype: str
    divergence: str
    temperature: float
    std: float
    distance: float


@dataclass(frozen=True)
class Problem:
    """hidden, teacher_hidden ``[N, D]`` and weight ``[V, D]``, the head of both."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    divergence: str
    temperature: float

    @property
    def options(self) -> dict[str, Any]:
        return {"divergence": self.divergence, "temperature": self.temperature}

    def logits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w = self.weight.to(dtype)
        return self.hidden.to(dtype) @ w.t(), self.teacher_hidden.to(dtype) @ w.t()


Result = tuple[Tensor, Tensor, Tensor]  # loss, d_hidden, d_weight
Loss = Callable[[Tensor, Tensor], Tensor]


@cache
def _head(dtype: torch.dtype, std: float, tokens: int, vocabulary: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, noise = (torch.randn(tokens, width, generator=generator) for _ in range(2))
    weight = torch.randn(vocabulary, width, generator=generator) * (std / width**0.5)
    return hidden, noise, weight.to(dtype)


def problem(setting: Setting, size: tuple[int, int, int]) -> Problem:
    dtype = DTYPES[setting.dtype]
    hidden, noise, weight = _head(dtype, setting.std, *size)
    hidden = hidden.to(dtype)
    teacher = (hidden.float() + setting.distance * noise).to(dtype)
    return Problem(hidden, weight, teacher, setting.divergence, setting.temperature)


def truth(p: Problem) -> Result:
    zs, zt = p.logits(torch.float64)
    zs.requires_grad_()
    loss = p.temperature**2 * divergence_per_token(zs, zt, p.divergence, temperature=p.temperature).mean()
    (dz,) = torch.autograd.grad(loss, zs)
    return loss.detach(), dz @ p.weight.double(), dz.t() @ p.hidden.double()


# Providers.


def _gradients(p: Problem, loss: Loss, factor: float = 1.0, scale: float | None = None) -> Result:
    """By autograd, in the dtype of the problem, from a loss of hidden states and head; ``factor``: what is left to multiply it by."""
    scale = scale or LOSS_SCALE[p.hidden.dtype]
    hidden, weight = (x.clone().requires_grad_() for x in (p.hidden, p.weight))
    value = factor * loss(hidden, weight)
    value.backward(torch.full_like(value, scale))
    assert hidden.grad is not None
    assert weight.grad is not None
    return value.detach(), hidden.grad.double() / scale, weight.grad.double() / scale


def naive(p: Problem) -> Result:
    """The models' own logits in 16 bits, softmax in fp32, autograd."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        zt = (p.teacher_hidden @ weight.detach().t()).float()
        return divergence_per_token((hidden @ weight.t()).float(), zt, p.divergence, temperature=p.temperature).mean()

    return _gradients(p, loss, p.temperature**2)


def _beta(p: Problem) -> float:
    if p.divergence not in PEER_BETA:
        raise Unavailable(f"has no {p.divergence}")
    return PEER_BETA[p.divergence]


def liger_chunked(p: Problem) -> Result:
    beta, tokens = _beta(p), p.hidden.shape[0]
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=p.temperature, compiled=False, chunk_size=tokens
    )
    labels = torch.zeros(tokens, dtype=torch.int64)
    return _gradients(p, lambda hidden, weight: module(hidden, weight, p.teacher_hidden, p.weight, labels), p.temperature**2)


def liger_triton(p: Problem) -> Result:
    """Its Triton kernel, interpreted. On a GPU it multiplies into fp32 logits; on a CPU it would round them, so they are given to it."""
    beta = _beta(p)
    from liger_kernel.ops import fused_linear_jsd
    from liger_kernel.transformers import LigerFusedLinearJSD

    own = getattr(fused_linear_jsd, "_project_to_float32", None)
    if own is not None:  # older versions round everywhere
        fused_linear_jsd._project_to_float32 = lambda x, w: x.float() @ w.float().t()
    module = LigerFusedLinearJSD(jsd_beta=beta, temperature=p.temperature)
    try:
        # Its kernel that multiplies finished gradients by what comes from above makes them no better, and takes minutes when interpreted.
        loss, *gradients = _gradients(p, lambda hidden, weight: module(hidden, weight, p.teacher_hidden, p.weight, None), scale=1.0)
        return loss * p.temperature**2, gradients[0] * p.temperature**2, gradients[1] * p.temperature**2
    finally:
        if own is not None:
            fused_linear_jsd._project_to_float32 = own


def trl(p: Problem) -> Result:
    """Its tiles in torch, which on a CPU too have fp32 logits and round dz."""
    beta = _beta(p)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        arguments = (hidden, weight, None, p.teacher_hidden, p.weight, None, beta, p.temperature)
        return ChunkedDivergenceFunction.apply(*arguments)[0].mean()

    return _gradients(p, loss, p.temperature**2)


def fastkd_16_bit(p: Problem) -> Result:
    """`logits_dtype` is the hidden states' own."""
    teacher = TeacherHidden(p.teacher_hidden, p.weight)
    return _gradients(p, lambda h, w: fused_linear_kd(h, w, teacher, logits_dtype=h.dtype, **p.options))


def fastkd(p: Problem) -> Result:
    """The default: fp32 logits. On a CPU dz is fp32 in the last two products, too."""
    return _gradients(p, lambda h, w: fused_linear_kd(h, w, TeacherHidden(p.teacher_hidden, p.weight), **p.options))


def fastkd_gpu(p: Problem) -> Result:
    """The default as a GPU computes it: dz is rounded to the operands' dtype; dX is rounded before it is scaled and after."""
    loss, dz, factor = _rounded_dz(p)
    d_hidden = (dz.float() @ p.weight.float()).to(dz.dtype)
    return loss, _scaled(d_hidden, factor, dz.dtype), _scaled(dz.float().t() @ p.hidden.float(), factor, dz.dtype)


def _rounded_dz(p: Problem) -> tuple[Tensor, Tensor, float]:
    """The loss, and dz of a multiple of it in the operands' dtype, with that factor."""
    factor = p.hidden.shape[0] * (FP16_BOOST if p.hidden.dtype == torch.float16 else 1.0)
    zs, zt = p.logits(torch.float32)
    zs.requires_grad_()
    loss = kd_loss(zs, TeacherLogits(zt), **p.options)
    (dz,) = torch.autograd.grad(loss, zs, torch.tensor(factor))
    return loss.detach(), dz.to(p.hidden.dtype), factor


def _scaled(gradient: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """What a multiple of a gradient becomes in the backward pass."""
    scale = LOSS_SCALE[dtype]
    return (gradient.float() * (scale / factor)).to(dtype).double() / scale


PROVIDERS: dict[str, Callable[[Problem], Result]] = {
    "naive": naive,
    "liger chunked": liger_chunked,
    "liger Triton": liger_triton,
    "trl": trl,
    "fastkd, 16-bit logits": fastkd_16_bit,
    "fastkd": fastkd,
    "fastkd as on a GPU": fastkd_gpu,
}
PROMISED = ("fastkd", "fastkd as on a GPU")


# The study.


def errors(result: Result, exact: Result) -> list[float]:
    """Of loss, d_hidden and d_weight, in percent."""
    return [100 * float((a.double() - b).norm() / b.norm()) for a, b in zip(result, exact, strict=True)]


def settings() -> Iterator[Setting]:
    for values in itertools.product(DTYPES, DIVERGENCES, TEMPERATURES, STDS, DISTANCES):
        yield Setting(*values)


def study(size: tuple[int, int, int], names: list[str], chosen: list[Setting]) -> list[dict[str, Any]]:
    """A row for each setting: the errors by provider. One that does not compute the divergence is missing; one that fails says why."""
    rows = []
    for index, setting in enumerate(chosen):
        if index % 32 == 0:
            print(f"{index} of {len(chosen)} settings", file=sys.stderr, flush=True)
        p = problem(setting, size)
        exact = truth(p)
        row: dict[str, Any] = {**vars(setting), "loss": float(exact[0]), "errors": {}}
        for name in names:
            try:
                row["errors"][name] = [float(f"{e:.3g}") for e in errors(PROVIDERS[name](p), exact)]
            except Unavailable:
                continue
            except Exception as error:
                if name.startswith("fastkd"):
                    raise
                row["errors"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        rows.append(row)
    return rows


def accumulation(size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """dW of forward KL summed over chunks of tokens, in fp32 and in the operands' dtype; the products themselves have fp32 sums."""
    rows = []
    for dtype, distance, chunks in itertools.product(DTYPES, (DISTANCES[0], DISTANCES[-1]), CHUNKS):
        p = problem(Setting(dtype, "forward_kl", 1.0, STDS[0], distance), size)
        exact = truth(p)
        _, dz, factor = _rounded_dz(p)
        row: dict[str, Any] = {"dtype": dtype, "distance": distance, "chunks": chunks}
        for name, kept in (("in fp32", torch.float32), ("in 16 bits", p.hidden.dtype)):
            total = torch.zeros(p.weight.shape, dtype=kept)
            for part in torch.arange(size[0]).chunk(chunks):
                product = dz[part].float().t() @ p.hidden[part].float()
                # In 16 bits fp16 must hold the sum of all tokens: without the factor, as gradients that are scaled by GradScaler.
                total = (total.float() + product * (1.0 if kept == torch.float32 else LOSS_SCALE[kept] / factor)).to(kept)
            result = total.double() / LOSS_SCALE[kept] if kept == p.hidden.dtype else _scaled(total, factor, p.hidden.dtype)
            row[name] = float(f"{errors((*exact[:2], result), exact)[2]:.3g}")
        rows.append(row)
    return rows


def over_the_limit(rows: list[dict[str, Any]]) -> list[str]:
    """Where the default's gradients are off by more than it promises."""
    found = []
    for row, name in itertools.product(rows, PROMISED):
        _, *gradients = row["errors"].get(name, [0.0])
        if any(not e <= LIMITS.get(row["divergence"], LIMIT) for e in gradients):
            found.append(f"{name}: {gradients} % at " + ", ".join(f"{k} {row[k]}" for k in Setting.__annotations__))
    return found


def summary(rows: list[dict[str, Any]], what: str, by: str = "distance") -> str:
    """A table: for each dtype and provider the median and the worst error over the settings, a column for each value of ``by``."""
    index = ("loss", "d_hidden", "d_weight").index(what)
    values = list(dict.fromkeys(row[by] for row in rows))
    head = "".join(f"{f'{by} {v}' if by == 'distance' else v:>20}" for v in values)
    lines = [f"{what}: median / worst error in %", f"{'':28}{head}"]
    for dtype, name in itertools.product(DTYPES, PROVIDERS):
        cells = []
        for value in values:
            found = [r["errors"][name] for r in rows if r["dtype"] == dtype and r[by] == value and name in r["errors"]]
            numbers = [f[index] for f in found if not isinstance(f, str)]
            failed = "failed" if found else "-"
            cells.append(f"{statistics.median(numbers):.2g} / {max(numbers):.2g}" if numbers else failed)
        lines.append(f"{dtype:5} {name:22}" + "".join(f"{c:>20}" for c in cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/accuracy.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=list(PROVIDERS), choices=PROVIDERS, help="these providers")
    parser.add_argument("--divergences", nargs="*", default=list(DIVERGENCES), choices=DIVERGENCES)
    parser.add_argument("--check", action="store_true", help=f"exit with 1 where the default's gradients are off by more than {LIMIT} %%")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's
    size = options.tokens, options.vocabulary, options.width
    report = stamp(argv, "cpu", "benchmarks/accuracy.py")
    began = time.perf_counter()
    rows = study(size, options.only, [s for s in settings() if s.divergence in options.divergences])
    chunked = accumulation((256, min(8000, options.vocabulary), options.width))
    report |= {"size": dict(zip(("tokens", "vocabulary", "width"), size, strict=True)), "seconds": round(time.perf_counter() - began)}
    report |= {"unit": "percent: loss, d_hidden, d_weight", "limit": LIMIT}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "accuracy.json"
    path.write_text(_lines(report | {"accumulation": chunked, "rows": rows}))
    for what in ("d_hidden", "d_weight", "loss"):
        print(summary(rows, what), end="\n\n")
    print("dW over chunks, error in %")
    for row in chunked:
        print("  " + ", ".join(f"{k} {v}" for k, v in row.items()))
    print(f"written: {path}, {report['seconds']} s")
    broken = over_the_limit(rows)
    for line in broken:
        print("over the limit: " + line, file=sys.stderr)
    return 1 if options.check and broken else 0


def _lines(report: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    parts = []
    for key, value in report.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
