"""What is measured: problems of given shapes, and the implementations that solve them.

A provider turns a problem and a divergence into a step: a function without arguments that computes the loss and its gradients with
respect to the student's hidden states and head, and returns all three. A provider that cannot raises `Unavailable` and says why.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import TeacherHidden, fused_linear_kd

__all__ = ["FLOOR", "PROVIDERS", "SHAPES", "Problem", "Provider", "Shape", "Unavailable"]


class Unavailable(Exception):
    """The provider is not installed, or does not compute what is asked for."""


@dataclass(frozen=True)
class Shape:
    """N tokens, V, D_s, D_t, and the dtype of hidden states and heads."""

    tokens: int
    vocabulary: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype
    chunk_tokens: int | None = None  # of ours; None: its default


SHAPES = {
    "quick": Shape(64, 1000, 32, 48, torch.float32, 32),
    "cpu": Shape(1024, 49152, 576, 960, torch.float32, 512),  # SmolLM2 135M and 360M; 512 is the default chunk there
    # None of these three has been run yet.
    "A": Shape(8192, 151936, 896, 3584, torch.bfloat16),
    "B": Shape(8192, 151936, 2048, 3584, torch.bfloat16),
    "C": Shape(8192, 128256, 2048, 4096, torch.bfloat16),
}


class Problem:
    """Random hidden states and heads whose logits have a standard deviation of 1; every token counts."""

    def __init__(self, shape: Shape, device: torch.device):
        def normal(rows: int, width: int, scale: float) -> Tensor:
            x = torch.empty(rows, width, dtype=shape.dtype, device=device)
            return x.normal_(std=scale, generator=generator)

        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.device = shape, device
        self.hidden = normal(shape.tokens, shape.student_width, 1.0).requires_grad_()
        self.weight = normal(shape.vocabulary, shape.student_width, shape.student_width**-0.5).requires_grad_()
        self.teacher_hidden = normal(shape.tokens, shape.teacher_width, 1.0)
        self.teacher_weight = normal(shape.vocabulary, shape.teacher_width, shape.teacher_width**-0.5)
        self.labels = torch.zeros(shape.tokens, dtype=torch.int64, device=device)

    def step(self, loss: Callable[[], Tensor]) -> "Step":
        def run() -> Result:
            value = loss()
            self.hidden.grad = self.weight.grad = None
            value.backward()
            assert self.hidden.grad is not None
            assert self.weight.grad is not None
            return value.detach(), self.hidden.grad, self.weight.grad

        return run


Result = tuple[Tensor, Tensor, Tensor]  # loss, d_hidden, d_weight
Step = Callable[[], Result]


def _ours(problem: Problem, divergence: str) -> Step:
    teacher = TeacherHidden(problem.teacher_hidden, problem.teacher_weight)
    chunk = problem.shape.chunk_tokens
    return problem.step(lambda: fused_linear_kd(problem.hidden, problem.weight, teacher, divergence=divergence, chunk_tokens=chunk))


def _forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _jsd(p: Tensor, q: Tensor) -> Tensor:
    mixture = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, device=p.device))
    return 0.5 * _forward_kl(p, mixture) + 0.5 * _forward_kl(q, mixture)


def _adaptive_kl(p: Tensor, q: Tensor) -> Tensor:
    with torch.no_grad():
        mass, order = p.exp().sort(-1, descending=True)
        head = mass.cumsum(-1) <= 0.5
        head[:, 0] = True
        gap = (mass - q.exp().gather(-1, order)).abs()
        share = (gap * head).sum(-1) / gap.sum(-1)
    return share * _forward_kl(p, q) + (1 - share) * _forward_kl(q, p)


_NAIVE = {"forward_kl": _forward_kl, "jsd": _jsd, "adaptive_kl": _adaptive_kl}


def _naive(problem: Problem, divergence: str) -> Step:
    """The full logits of both models in fp32, and autograd."""

    def loss() -> Tensor:
        with torch.no_grad():
            p = F.log_softmax((problem.teacher_hidden @ problem.teacher_weight.t()).float(), -1)
        q = F.log_softmax((problem.hidden @ problem.weight.t()).float(), -1)
        return _NAIVE[divergence](p, q).mean()

    return problem.step(loss)


# In both peers JSD at beta = 0 is the forward KL.
_PEER_BETA = {"forward_kl": 0.0, "jsd": 0.5}


def _liger(problem: Problem, divergence: str, compiled: bool) -> Step:
    if divergence not in _PEER_BETA:
        raise Unavailable(f"liger-kernel has no {divergence}")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError as error:
        raise Unavailable(f"liger-kernel cannot be imported: {error}") from error
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_PEER_BETA[divergence], compiled=compiled)
    return problem.step(
        lambda: loss(problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, problem.labels),
    )


def _liger_eager(problem: Problem, divergence: str) -> Step:
    return _liger(problem, divergence, compiled=False)


def _liger_compiled(problem: Problem, divergence: str) -> Step:
    return _liger(problem, divergence, compiled=True)


def _trl(problem: Problem, divergence: str) -> Step:
    """Triton kernels on a GPU, the same tiles in torch on a CPU."""
    if divergence not in _PEER_BETA:
        raise Unavailable(f"TRL's chunked divergence has no {divergence}")
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ImportError as error:
        raise Unavailable(f"TRL >= 1.16 cannot be imported: {error}") from error

    def loss() -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(
            problem.hidden, problem.weight, None, problem.teacher_hidden, problem.teacher_weight, None, _PEER_BETA[divergence]
        )
        return per_token.mean()

    return problem.step(loss)


@dataclass(frozen=True)
class Provider:
    build: Callable[[Problem, str], Step]
    compiles: bool = False  # its first call of a shape compiles


PROVIDERS = {
    "fastkd": Provider(_ours),
    "naive torch": Provider(_naive),
    "liger": Provider(_liger_eager),
    "liger compiled": Provider(_liger_compiled, compiles=True),
    "trl": Provider(_trl),
}


def _gemms(problem: Problem) -> Callable[[], Result]:
    """The four products that no implementation can do without, each into memory of its own, as `torch.mm` returns it."""

    @torch.no_grad()
    def run() -> Result:
        teacher = problem.teacher_hidden @ problem.teacher_weight.t()
        student = problem.hidden @ problem.weight.t()
        return teacher, student @ problem.weight, student.t() @ problem.hidden

    return run


def _gemms_preallocated(problem: Problem) -> Callable[[], Result]:
    """The same into memory that is already there: nothing is left but arithmetic."""
    shape = problem.shape

    def empty(rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=shape.dtype, device=problem.device)

    teacher, student = empty(shape.tokens, shape.vocabulary), empty(shape.tokens, shape.vocabulary)
    d_hidden, d_weight = empty(shape.tokens, shape.student_width), empty(shape.vocabulary, shape.student_width)

    @torch.no_grad()
    def run() -> Result:
        torch.mm(problem.teacher_hidden, problem.teacher_weight.t(), out=teacher)
        torch.mm(problem.hidden, problem.weight.t(), out=student)
        torch.mm(student, problem.weight, out=d_hidden)
        torch.mm(student.t(), problem.hidden, out=d_weight)
        return teacher, d_hidden, d_weight

    return run


FLOOR = {"gemms": _gemms, "gemms preallocated": _gemms_preallocated}
