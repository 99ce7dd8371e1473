"""The implementations that are measured, and the problems they solve.

A provider turns a problem into a step: a function without arguments that computes the loss and its gradients with respect to the
student's hidden states and head, and returns all three. A provider that cannot raises `Unavailable` and says why.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cells import Setting
from fastkd import DIVERGENCES, TeacherHidden, TeacherTopK, fused_linear_kd
from fastkd.reference import divergence_per_token
from fastkd_kernels.spec import RowSpec

__all__ = ["FLOORS", "PROVIDERS", "Problem", "Provider", "Truth", "Unavailable", "truth"]

SMALL_CHUNK = 768  # tokens of a group on a GPU, in parts of 256: about half of the default's memory at shapes A and B
IGNORED = -100


class Unavailable(Exception):
    """The provider is not installed, or does not compute what is asked for."""


Result = tuple[Tensor, Tensor, Tensor | None]  # loss, d_hidden, d_weight
Step = Callable[[], Any]  # -> Result, of a provider that computes a loss


class Problem:
    """Random hidden states and heads whose logits have a standard deviation of 3, as a language model's have."""

    def __init__(self, setting: Setting, device: torch.device):
        shape = setting.size

        def normal(rows: int, width: int, scale: float) -> Tensor:
            x = torch.empty(rows, width, dtype=shape.dtype, device=device)
            return x.normal_(std=scale, generator=generator)

        generator = torch.Generator(device).manual_seed(0)
        self.setting, self.device = setting, device
        self.hidden = normal(shape.tokens, shape.student_width, 1.0).requires_grad_()
        self.weight = normal(shape.vocabulary, shape.student_width, 3 * shape.student_width**-0.5)
        self.weight.requires_grad_(not setting.frozen_head)
        self.teacher_hidden = normal(shape.tokens, shape.teacher_width, 1.0)
        self.teacher_weight = normal(shape.vocabulary, shape.teacher_width, 3 * shape.teacher_width**-0.5)
        self.labels = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator, device=device)
        order = torch.randperm(shape.tokens, generator=generator, device=device)
        self.labels[order[setting.counted_tokens :]] = IGNORED
        self.counted = order[: setting.counted_tokens].sort().values
        self.top = None if setting.top_k is None else self._top(setting.top_k)

    def _top(self, k: int) -> TeacherTopK:
        parts = []
        for rows in self.teacher_hidden.split(512):
            top = TeacherTopK.from_logits(rows @ self.teacher_weight.t(), k)
            assert top.log_tail is not None
            parts.append((top.ids, top.log_probs, top.log_tail))
        ids, log_probs, tail = (torch.cat(x) for x in zip(*parts, strict=True))
        return TeacherTopK(ids, log_probs, log_tail=tail)

    def step(self, loss: Callable[[], Tensor]) -> Step:
        def run() -> Result:
            value = loss()
            self.forget()
            value.backward()
            assert self.hidden.grad is not None
            return value.detach(), self.hidden.grad, self.weight.grad if self.weight.requires_grad else None

        return run

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def require(self, who: str, *, divergences: tuple[str, ...], ce: bool = False, mask: bool = False, gpu: bool = False) -> None:
        """Raise what of the setting a peer cannot do."""
        setting = self.setting
        if setting.top_k is not None:
            raise Unavailable(f"{who} takes no list of tokens from the teacher")
        if setting.divergence not in divergences:
            raise Unavailable(f"{who} has no {setting.divergence}")
        if setting.ce and not ce:
            raise Unavailable(f"{who} adds no cross-entropy")
        if setting.counted < 1 and not mask:
            raise Unavailable(f"{who} takes no mask: its caller would have to gather the counted tokens")
        if gpu and self.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise Unavailable(f"{who} is made of Triton kernels and needs a GPU")


# Ours.


def _fastkd(problem: Problem, rounded: bool = False, small: bool = False) -> Step:
    setting, shape = problem.setting, problem.setting.size
    if rounded and shape.dtype.itemsize != 2:
        raise Unavailable(f"logits are kept in 16 bits for 16-bit inputs alone, not for {shape.dtype}")
    return problem.step(
        partial(
            fused_linear_kd,
            problem.hidden,
            problem.weight,
            problem.top or TeacherHidden(problem.teacher_hidden, problem.teacher_weight),
            problem.labels if setting.ce or setting.counted < 1 else None,
            divergence=setting.divergence,
            kd_ratio=0.5 if setting.ce else 1.0,
            chunk_tokens=SMALL_CHUNK if small else shape.chunk_tokens,
            logits_dtype=shape.dtype if rounded else None,
        )
    )


# Plain torch.


def _forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    return torch.logaddexp(p + math.log(share), q + math.log(1 - share))


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    mixture = _mixture(p, q, 0.5)
    return 0.5 * _forward_kl(p, mixture) + 0.5 * _forward_kl(q, mixture)


def _skew_forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return _forward_kl(p, _mixture(p, q, 0.1))


def _adaptive_kl(p: Tensor, q: Tensor) -> Tensor:
    with torch.no_grad():
        mass, order = p.exp().sort(-1, descending=True)
        head = mass.cumsum(-1) <= 0.5
        head[:, 0] = True
        gap = (mass - q.exp().gather(-1, order)).abs()
        share = (gap * head).sum(-1) / gap.sum(-1)
    return share * _forward_kl(p, q) + (1 - share) * _forward_kl(q, p)


_NAIVE = {"forward_kl": _forward_kl, "jsd": _jsd, "adaptive_kl": _adaptive_kl, "skew_forward_kl": _skew_forward_kl}


def _naive_loss(problem: Problem) -> Tensor:
    setting = problem.setting
    hidden, teacher_hidden, labels, top = problem.hidden, problem.teacher_hidden, problem.labels, problem.top
    if setting.counted < 1:
        hidden, teacher_hidden, labels = (x[problem.counted] for x in (hidden, teacher_hidden, labels))
    q = F.log_softmax((hidden @ problem.weight.t()).float(), -1)
    if top is None:
        with torch.no_grad():
            p = F.log_softmax((teacher_hidden @ problem.teacher_weight.t()).float(), -1)
        loss = _NAIVE[setting.divergence](p, q).mean()
    else:
        assert top.log_tail is not None
        listed = q.gather(-1, top.ids)
        rest = torch.log1p(-listed.exp().sum(-1, keepdim=True))
        loss = _forward_kl(torch.cat([top.log_probs, top.log_tail[:, None]], -1), torch.cat([listed, rest], -1)).mean()
    return 0.5 * loss + 0.5 * F.nll_loss(q, labels) if setting.ce else loss


def _naive(problem: Problem, compiled: bool = False) -> Step:
    """The full logits of both models in fp32, and autograd."""

    def loss() -> Tensor:
        return _naive_loss(problem)

    return problem.step(torch.compile(loss) if compiled else loss)


# The peers. In those with a beta, JSD at beta = 0 is the forward KL.

_BETA = {"forward_kl": 0.0, "jsd": 0.5}


def _import(module: str, name: str, needs: str) -> Any:
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{needs} cannot be imported: {error}") from error


def _liger(problem: Problem, compiled: bool = False) -> Step:
    problem.require("Liger's chunked loss", divergences=tuple(_BETA), ce=True, mask=True)
    made = _import("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss", "liger-kernel")
    hard = 0.5 if problem.setting.ce else 0.0
    loss = made(weight_hard_loss=hard, weight_soft_loss=1 - hard, beta=_BETA[problem.setting.divergence], compiled=compiled)
    return problem.step(lambda: loss(problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, problem.labels))


def _liger_jsd(problem: Problem) -> Step:
    problem.require("FusedLinearJSD", divergences=tuple(_BETA), mask=True, gpu=True)
    loss = _import("liger_kernel.transformers", "LigerFusedLinearJSD", "liger-kernel")(jsd_beta=_BETA[problem.setting.divergence])
    labels = problem.labels if problem.setting.counted < 1 else None
    return problem.step(lambda: loss(problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, labels))


def _liger_kl(problem: Problem) -> Step:
    """It wants the teacher's probabilities in full: the product and the softmax that make them are part of the step."""
    problem.require("FusedLinearKLDiv", divergences=("forward_kl",), mask=True, gpu=True)
    loss = _import("liger_kernel.transformers.fused_linear_kl_div", "LigerFusedLinearKLDivLoss", "liger-kernel >= 0.8.5")()
    labels = problem.labels if problem.setting.counted < 1 else None

    def run() -> Tensor:
        target = torch.softmax(problem.teacher_hidden @ problem.teacher_weight.t(), -1, dtype=torch.float32)
        return loss(problem.hidden, problem.weight, target, labels)

    return problem.step(run)


def _trl(problem: Problem) -> Step:
    """Triton kernels on a GPU, the same tiles in torch on a CPU."""
    problem.require("TRL's chunked divergence", divergences=tuple(_BETA))
    function = _import("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", "TRL >= 1.16")
    beta = _BETA[problem.setting.divergence]
    return problem.step(
        lambda: function.apply(problem.hidden, problem.weight, None, problem.teacher_hidden, problem.teacher_weight, None, beta)[0].mean()
    )


def _fla(problem: Problem, **options: bool) -> Step:
    """By default dz and hidden states are widened for dW: a product of fp32 operands, several times slower than one of 16-bit operands."""
    problem.require("fla's fused_kl_div_loss", divergences=("forward_kl",), gpu=True)
    loss = _import("fla.modules.fused_kl_div", "fused_kl_div_loss", "fla-core")
    return problem.step(lambda: loss(problem.hidden, problem.teacher_hidden, problem.weight, problem.teacher_weight, **options))


# Floors, and parts of a step.


def _gemms(problem: Problem) -> Step:
    """The products that no implementation can do without, each into memory of its own, as `torch.mm` returns it."""
    setting = problem.setting
    hidden, teacher_hidden = problem.hidden[: setting.counted_tokens], problem.teacher_hidden[: setting.counted_tokens]

    @torch.no_grad()
    def run() -> tuple[Tensor | None, ...]:
        teacher = teacher_hidden @ problem.teacher_weight.t() if setting.top_k is None else None
        student = hidden @ problem.weight.t()
        return teacher, student @ problem.weight, None if setting.frozen_head else student.t() @ hidden

    return run


def _gemms_preallocated(problem: Problem) -> Step:
    """The four into memory that is already there: nothing is left but arithmetic."""
    with torch.no_grad():
        teacher, student = (torch.zeros_like(problem.hidden @ problem.weight.t()) for _ in range(2))
    d_hidden, d_weight = torch.zeros_like(problem.hidden), torch.zeros_like(problem.weight)

    @torch.no_grad()
    def run() -> None:
        torch.mm(problem.teacher_hidden, problem.teacher_weight.t(), out=teacher)
        torch.mm(problem.hidden, problem.weight.t(), out=student)
        torch.mm(student, problem.weight, out=d_hidden)
        torch.mm(student.t(), problem.hidden, out=d_weight)

    return run


# Sweeps of the row kernel over both rows of logits.
_SWEEPS = {"forward_kl": 2, "jsd": 3}
_KERNEL_ROWS = 384  # a chunk of shapes A and B


def _kernel_bytes(problem: Problem, rounded: bool) -> int:
    """What the kernel reads and writes: both rows of logits in every sweep, and the 16-bit gradient once."""
    shape = problem.setting.size
    return min(_KERNEL_ROWS, shape.tokens) * shape.vocabulary * (_SWEEPS[problem.setting.divergence] * 2 * (2 if rounded else 4) + 2)


def _row_kernel(problem: Problem, rounded: bool = False) -> Step:
    """Student's and teacher's logits of one chunk to the gradient."""
    problem.require("the row kernel's benchmark", divergences=tuple(_SWEEPS), gpu=True)
    row_losses = _import("fastkd_kernels.rows", "row_losses", "Triton")
    rows, device = min(_KERNEL_ROWS, problem.setting.size.tokens), problem.device
    with torch.no_grad():
        student, teacher = (
            (x[:rows] @ w.t()).to(torch.bfloat16 if rounded else torch.float32)
            for x, w in ((problem.hidden, problem.weight), (problem.teacher_hidden, problem.teacher_weight))
        )
    definition = DIVERGENCES[problem.setting.divergence]
    values = tuple(p.default for p in definition.parameters)
    a, b = (*values, 0.0, 0.0)[:2]
    spec = RowSpec(definition.at(values), a, b)
    dz = torch.empty(student.shape, dtype=torch.bfloat16, device=device)
    kd, weight = torch.empty(rows, device=device), torch.ones(rows, device=device)
    return lambda: row_losses(student, teacher, None, weight, spec, dz=dz, kd=kd, ce=None)


def _copy(problem: Problem, rounded: bool = False) -> Step:
    """A copy that reads and writes together as many bytes as the row kernel."""
    source = torch.zeros(_kernel_bytes(problem, rounded) // 8, dtype=torch.float32, device=problem.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@dataclass(frozen=True)
class Provider:
    """floor: a name in `FLOORS`, measured beside it. loss: its step returns a loss and gradients. compiles: by torch.compile.
    calls: so many are timed together on a GPU, where one alone is not long beside its launch.
    """

    build: Callable[[Problem], Step]
    floor: str = "gemms"
    loss: bool = True
    compiles: bool = False
    calls: int = 1


FLOORS: dict[str, Callable[[Problem], Step]] = {"gemms": _gemms, "copy": _copy, "copy, 16-bit": partial(_copy, rounded=True)}

PROVIDERS = {
    "fastkd": Provider(_fastkd),
    "fastkd 16-bit logits": Provider(partial(_fastkd, rounded=True)),
    "fastkd small chunks": Provider(partial(_fastkd, small=True)),
    "naive torch": Provider(_naive),
    "naive compiled": Provider(partial(_naive, compiled=True), compiles=True),
    "liger": Provider(_liger),
    "liger compiled": Provider(partial(_liger, compiled=True), compiles=True),
    "liger FusedLinearJSD": Provider(_liger_jsd),
    "liger FusedLinearKLDiv": Provider(_liger_kl),
    "trl": Provider(_trl),
    "fla": Provider(_fla),
    "fla 16-bit dW": Provider(partial(_fla, accumulate_grad_in_fp32=False)),
    "row kernel": Provider(_row_kernel, floor="copy", loss=False, calls=20),
    "row kernel 16-bit logits": Provider(partial(_row_kernel, rounded=True), floor="copy, 16-bit", loss=False, calls=20),
    "gemms preallocated": Provider(_gemms_preallocated, loss=False),
}


# What all of them are judged by.


@dataclass(frozen=True)
class Truth:
    """A problem's loss in float64, and some rows of its gradients. ``columns`` are ids; d_weight is None for a frozen head."""

    loss: Tensor
    rows: Tensor
    d_hidden: Tensor
    columns: Tensor
    d_weight: Tensor | None

    def errors(self, result: Result) -> dict[str, float]:
        """Norm of the difference over the norm of the truth; nan where the result is."""

        def relative(x: Tensor, y: Tensor) -> float:
            return ((x.double() - y).norm() / y.norm()).item()

        loss, d_hidden, d_weight = result
        found = {"loss": relative(loss, self.loss), "d_hidden": relative(d_hidden[self.rows], self.d_hidden)}
        if self.d_weight is not None and d_weight is not None:
            found["d_weight"] = relative(d_weight[self.columns], self.d_weight)
        return found


LOGITS_BYTES = 128 << 20  # of one float64 [tokens, V] of the oracle; about fifteen are alive at a time


def truth(problem: Problem, rows: int = 64, columns: int = 512) -> Truth:
    """The loss of all tokens by the oracle in float64; the hidden states' gradient at ``rows`` of the counted tokens, each of which needs
    that token alone; the head's at ``columns`` ids, summed over all tokens. Both lie evenly spread.
    """
    setting, counted = problem.setting, problem.counted
    head, teacher_head = problem.weight.detach().double(), problem.teacher_weight.double()

    def spread(n: int, most: int) -> Tensor:
        return torch.linspace(0, n - 1, min(n, most), device=problem.device).round().long()

    chosen, ids = counted[spread(len(counted), rows)], spread(len(head), columns)
    loss = torch.zeros((), dtype=torch.float64, device=problem.device)
    d_weight = torch.zeros(len(ids), head.shape[1], dtype=torch.float64, device=problem.device)
    d_hidden = []
    for part in counted.split(max(1, LOGITS_BYTES // (8 * len(head)))):
        hidden = problem.hidden.detach()[part].double()
        logits = (hidden @ head.t()).requires_grad_()
        top = problem.top
        if top is None:
            teacher: Tensor | TeacherTopK = problem.teacher_hidden[part].double() @ teacher_head.t()
        else:
            assert top.log_tail is not None
            teacher = TeacherTopK(top.ids[part], top.log_probs[part].double(), log_tail=top.log_tail[part].double())
        with torch.enable_grad():
            value = divergence_per_token(logits, teacher, setting.divergence).sum()
            if setting.ce:
                value = 0.5 * value + 0.5 * F.cross_entropy(logits, problem.labels[part], reduction="sum")
            (dz,) = torch.autograd.grad(value / len(counted), logits)
        loss += value.detach() / len(counted)
        d_weight += dz[:, ids].t() @ hidden
        d_hidden.append(dz[torch.isin(part, chosen)] @ head)
    return Truth(loss, chosen, torch.cat(d_hidden), ids, None if setting.frozen_head else d_weight)
