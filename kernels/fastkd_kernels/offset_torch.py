"""Logits in fp16 against the maximum of their tile: the record, and what the Triton kernels of `offset_gemm` compute, in plain torch.

A row is cut into tiles of ``tile`` columns. With m the largest final logit z of a tile, what is kept of z is ``r = fp16(z - m)``; m and the
tile's sum of ``exp((z - m) / T)``, taken before rounding, are fp32. The row's normaliser follows from the tiles', so the first sweep over
the logits is gone, and its precision is that of fp32.

What the rounding costs: z is off by at most ``2**-11 * (m - z)`` (or half of fp16's smallest step, 2**-25), and so a probability q by about
``q * (m - z) / (2048 * T)``. As ``x * exp(-x) <= 1 / e``, that is at most 1.8e-4 of the largest probability *of the tile*: nothing for that
one itself, and little in absolute terms for all of a tile that lies far below the row's maximum. A tile's maximum is never above the row's:
element by element the bound is at most that of residuals against the row's maximum. The gradient q - p inherits the errors of both, whose
share in it grows as student and teacher come close. A residual below -65504 is -inf, as that of a probability of 0 is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .spec import Head, RowSpec

__all__ = ["OffsetLogits", "offset_logits", "row_losses"]

_LOWEST = -1.0e30  # the maximum of a tile all of -inf: -inf minus it is no NaN, and it may still be divided by a temperature


@dataclass(frozen=True)
class OffsetLogits:
    """Final logits ``[C, V]``: after bias, scale and softcap.

    residuals: ``[C, V]`` fp16; rows start at multiples of 128 bytes, and the padding between them is -inf.
    maxima: ``[C, ceil(V / tile)]`` fp32.
    sums: likewise, of the exponentials at the temperature over the shared vocabulary. (In the one tile where it ends, an id beyond it whose
        logit is more than 87 T above all shared ones would make their sum 0.)
    sums_1: likewise at temperature 1 over the whole vocabulary, for the CE term; ``sums`` itself where that is the same.
    """

    residuals: Tensor
    maxima: Tensor
    sums: Tensor
    sums_1: Tensor
    tile: int

    @classmethod
    def empty(cls, rows: int, width: int, tile: int, device: torch.device | str, two_sums: bool = False) -> "OffsetLogits":
        """Buffers for ``rows`` rows. two_sums: a CE term is asked for, and its sums differ: T is not 1, or not all ids are shared."""
        residuals = torch.empty(rows, math.ceil(width / 64) * 64, dtype=torch.float16, device=device)[:, :width]
        maxima, sums, *more = torch.empty(3 if two_sums else 2, rows, math.ceil(width / tile), device=device).unbind()
        return cls(residuals, maxima, sums, more[0] if two_sums else sums, tile)

    def first(self, rows: int) -> "OffsetLogits":
        """Views of the first rows, for a chunk that is not full."""
        sums = self.sums[:rows]
        sums_1 = self.sums_1[:rows] if self.two_sums else sums
        return OffsetLogits(self.residuals[:rows], self.maxima[:rows], sums, sums_1, self.tile)

    @property
    def padded(self) -> Tensor:
        """The residuals with the padding of their rows."""
        stride = self.residuals.stride(0)
        return self.residuals.as_strided((self.residuals.shape[0], stride), (stride, 1))

    @property
    def two_sums(self) -> bool:
        return self.sums_1 is not self.sums


def offset_logits(
    hidden: Tensor, weight: Tensor, out: OffsetLogits, head: Head, *, temperature: float, shared: int, bias: Tensor | None = None
) -> None:
    """Write ``softcap(scale * (hidden @ weight.T + bias))`` to ``out``.

    Args:
        hidden: ``[C, D]``. weight: ``[V, D]``. bias: ``[V]``. The product is fp32.
        shared: how many first ids the divergence covers; the others count for ``sums_1`` alone.
    """
    z = hidden.float() @ weight.float().t()
    if bias is not None:
        z += bias.float()
    z *= head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    width, tiles = z.shape[1], out.maxima.shape[1]
    z = torch.nn.functional.pad(z, (0, tiles * out.tile - width), value=-math.inf).unflatten(1, (tiles, out.tile))
    torch.clamp(z.amax(-1), min=_LOWEST, out=out.maxima)
    z -= out.maxima[:, :, None]
    out.padded.fill_(-math.inf)[:, :width] = z.flatten(1)[:, :width]
    if out.two_sums:
        torch.sum(z.exp(), -1, out=out.sums_1)
    z.flatten(1)[:, shared:] = -math.inf
    torch.sum((z / temperature).exp(), -1, out=out.sums)


def _log_probs(x: OffsetLogits, sums: Tensor, width: int, temperature: float) -> Tensor:
    tiles = math.ceil(width / x.tile)
    maxima, sums = x.maxima[:, :tiles] / temperature, sums[:, :tiles]
    top = maxima.amax(1, keepdim=True)
    maxima = maxima - top
    maxima -= (sums * maxima.exp()).sum(1, keepdim=True).log()
    return x.residuals[:, :width].float() / temperature + maxima.repeat_interleave(x.tile, 1)[:, :width]


def row_losses(
    student: OffsetLogits,
    teacher: OffsetLogits,
    labels: Tensor | None,
    weight: Tensor,
    spec: RowSpec,
    *,
    dz: Tensor | None,
    kd: Tensor,
    ce: Tensor | None,
) -> None:
    """`rows_torch.row_losses` for such logits: same terms, same gradient (with respect to the head's product), same outputs.

    There is always a teacher, with the student's tile; ``spec.definition`` has no row statistic, and ``spec.target_share`` is 1. Bias,
    scale and softcap are in the logits already; those of ``spec.student`` are needed for the chain rule. ``dz`` may be a 16-bit view of
    the student's residuals.
    """
    shared = teacher.residuals.shape[1]
    z = student.residuals.float() + student.maxima.repeat_interleave(student.tile, 1)[:, : student.residuals.shape[1]]
    log_q = _log_probs(student, student.sums, shared, spec.temperature)
    log_p = _log_probs(teacher, teacher.sums, shared, spec.temperature)
    q = log_q.exp()
    g, h = spec.definition.torch_tile(log_p, log_q, spec.a, spec.b, None)
    torch.mul(g.sum(1).clamp(min=0.0), spec.kd_factor, out=kd)
    if not spec.definition.centered:
        h -= q * h.sum(1, keepdim=True)
    gradient = torch.zeros_like(z)
    gradient[:, :shared] = (spec.kd_share * spec.kd_factor / spec.temperature) * h
    if ce is not None:
        assert labels is not None
        log_probs = _log_probs(student, student.sums_1, z.shape[1], 1.0)
        ce.copy_(-log_probs.gather(1, labels[:, None]).squeeze(1))
        gradient += spec.ce_share * (log_probs.exp() - torch.nn.functional.one_hot(labels, z.shape[1]))
    if dz is not None:
        if spec.student.softcap is not None:
            gradient *= 1.0 - (z / spec.student.softcap) ** 2
        dz.copy_(weight[:, None] * spec.student.scale * gradient)
