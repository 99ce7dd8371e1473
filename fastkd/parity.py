"""The fused loss against the naive one, on a few tokens of the models that a run will train: their logits in float64, and autograd."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import divergence as make_divergence
from .functional import fused_linear_kd
from .hf import Head
from .reference import divergence_per_token
from .signals import Signal, TeacherHidden, TeacherTopK

__all__ = ["BOUNDS", "Parity", "loss_parity"]

# The largest relative errors of the loss and of its gradients that rounding explains, by the dtype that the head's products are in. The
# loss is an fp32 figure of the very tensors that the naive one sees: measured 4e-6 at most. The gradients are rounded once when they are
# handed out (measured 2e-3 in 16 bits), and lose more where student and teacher nearly agree (1e-2), or a total variation has its kink.
BOUNDS = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-3, 5e-3), torch.float16: (1e-3, 5e-2), torch.bfloat16: (1e-3, 5e-2)}
ROUNDED_LOGITS = (0.1, 0.3)  # with `logits_dtype` of 16 bits, as `fused_linear_kd` says
_BLOCK_BYTES = 256 << 20  # of the head in float64


@dataclass(frozen=True)
class Parity:
    """Relative errors of the fused loss, and of its gradients for the hidden states and the head's weight (Frobenius norms)."""

    loss: float
    hidden: float
    weight: float
    bounds: tuple[float, float]  # of the loss, and of the gradients

    @property
    def holds(self) -> bool:
        loss, gradient = self.bounds
        return self.loss <= loss and self.hidden <= gradient and self.weight <= gradient  # nan is not


def loss_parity(
    hidden: Tensor,
    head: Head,
    teacher: tuple[Tensor, Head] | None,
    labels: Tensor,
    *,
    divergence: str = "forward_kl",
    parameters: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    kd_ratio: float = 1.0,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
    top_k: int | None = None,
) -> Parity:
    """Compare `fastkd.fused_linear_kd` with the loss written out in float64, in at least two chunks.

    The gradients' errors are relative to the gradients' norms, or where student and teacher hardly differ to a hundredth of those that the
    student's own probabilities have: what is left of two large numbers is no measure.

    Args:
        hidden, head: the student's, ``[N, D_s]``, in the dtype in which they meet.
        teacher: hidden states ``[N, D_t]`` and head of the teacher; None with ``kd_ratio`` 0.
        labels: ``[N]`` int64, all of which count.
        top_k: give the loss the teacher's most probable tokens and a tail instead, as a store of them does.
        The others: as in `fastkd.fused_linear_kd`.

    Holds ``[N, V]`` float64 tensors: a few dozen tokens will do.
    """
    x = hidden.detach().clone().requires_grad_()
    w = head.weight.detach().clone().requires_grad_()
    signal, given = _teacher(teacher, top_k, temperature)
    fused = fused_linear_kd(
        x,
        w,
        signal,
        labels,
        divergence=make_divergence(divergence, **(parameters or {})),
        temperature=temperature,
        temperature_squared=temperature_squared,
        kd_ratio=kd_ratio,
        student_bias=None if head.bias is None else head.bias.detach(),
        student_softcap=head.softcap,
        student_scale=head.scale,
        chunk_tokens=max(1, min(chunk_tokens or len(x), (len(x) + 1) // 2)),
        logits_dtype=logits_dtype,
    )
    fused.backward()
    assert x.grad is not None
    assert w.grad is not None

    z = _raw_logits(x, head).requires_grad_()
    logits = head.finish(z)
    loss, share = logits.new_zeros(()), kd_ratio * (temperature**2 if temperature_squared else 1.0)
    if kd_ratio > 0:
        assert given is not None
        loss = loss + share * divergence_per_token(logits, given, divergence, parameters, temperature).mean()
    if kd_ratio < 1:
        loss = loss + (1 - kd_ratio) * torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    assert z.grad is not None
    own = torch.softmax(logits.detach(), -1) / len(x)

    dx, dx_own = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64)
    off, right, large = 0.0, 0.0, 0.0
    for block, rows in _blocks(head.weight):
        dx += z.grad[:, block] @ rows
        dx_own += own[:, block] @ rows
        dw = z.grad[:, block].t() @ x.detach().double()
        off += float((w.grad[block].double() - dw).square().sum())
        right += float(dw.square().sum())
        large += float((own[:, block].t() @ x.detach().double()).square().sum())
    tiny = 1e-300
    return Parity(
        loss=float(abs(fused.detach().double() - loss.detach()) / max(abs(loss.item()), 1e-4)),
        hidden=float((x.grad.double() - dx).norm() / (max(dx.norm().item(), 1e-2 * dx_own.norm().item()) + tiny)),
        weight=off**0.5 / (max(right**0.5, 1e-2 * large**0.5) + tiny),
        bounds=ROUNDED_LOGITS if logits_dtype in (torch.float16, torch.bfloat16) else BOUNDS[hidden.dtype],
    )


def _teacher(
    teacher: tuple[Tensor, Head] | None, top_k: int | None, temperature: float
) -> tuple[Signal | None, Tensor | TeacherTopK | None]:
    """What the fused loss is given, and the same for the naive one."""
    if teacher is None:
        return None, None
    hidden, head = teacher
    logits = head.finish(_raw_logits(hidden, head))
    if top_k is None:
        return TeacherHidden(hidden, head.weight, head.bias, head.softcap, head.scale), logits
    found = TeacherTopK.from_logits(logits.float(), min(top_k, logits.shape[-1]), temperature)
    return found, found


@torch.no_grad()
def _raw_logits(hidden: Tensor, head: Head) -> Tensor:
    """``hidden @ weight.T + bias``, ``[N, V]`` in float64."""
    x = hidden.detach().double()
    z = torch.cat([x @ rows.t() for _, rows in _blocks(head.weight)], -1)
    return z if head.bias is None else z + head.bias.detach().double()


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, _BLOCK_BYTES // (8 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        yield block, weight[block].detach().double()
