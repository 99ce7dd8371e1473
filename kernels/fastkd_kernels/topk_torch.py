"""Loss and gradient of rows of logits against sparse teachers: some tokens and a tail bucket, in plain torch.

The listed tokens and the tail are K + 1 buckets with probabilities p and q. A divergence is a function of both, summed over the buckets by
the tile function that also serves dense teachers. With its h = dg / dlog q of each bucket and S = sum h, the gradient is ``h_v - q_v S`` on
a listed token v, and on one in the tail its share of the tail's: ``q_v / q_tail * (h_tail - q_tail S)``.
"""

import torch
from torch import Tensor

from .rows_torch import _forward_share, _log_softmax, row_losses_in_blocks
from .spec import RowSpec

__all__ = ["row_losses"]


def row_losses(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor | None,
    labels: Tensor | None,
    weight: Tensor,
    spec: RowSpec,
    *,
    dz: Tensor | None,
    kd: Tensor | None,
    ce: Tensor | None,
    student_bias: Tensor | None = None,
) -> None:
    """`rows_torch.row_losses` for a teacher of listed tokens.

    Args:
        ids: ``[C, K]`` integers in [0, V_s), distinct in each row but for padding.
        log_probs: ``[C, K]`` at the temperature of ``spec``, -inf is padding.
        log_tail: ``[C]``, or None for what ``log_probs`` leave.
        The others are those of `rows_torch.row_losses`.
    """

    def divergence(part: slice, zs: Tensor, out: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        log_q = _log_softmax(zs, spec.temperature)
        tail = None if log_tail is None else log_tail[part, None]
        keep = ce is not None and spec.temperature == 1.0
        return log_q, _divergence(log_q, ids[part].long(), log_probs[part], tail, spec, out, w, keep)

    row_losses_in_blocks(student, divergence, labels, weight, spec, dz=dz, kd=kd, ce=ce, student_bias=student_bias)


def _divergence(
    log_q: Tensor, ids: Tensor, log_p: Tensor, log_tail: Tensor | None, spec: RowSpec, kd: Tensor, weight: Tensor | None, keep: bool
) -> Tensor | None:
    """Write the divergence to ``kd``; return the gradient with respect to the final logits, or None without ``weight``.

    ``log_q`` is overwritten unless ``keep``.
    """
    padding = log_p == -torch.inf
    listed = log_q.gather(1, ids)
    # Take the listed tokens out, and add up the rest: 1 - sum(q) has no digits left where it is nearly 0. The minimum leaves the token
    # of a padding entry as it is, listed by another entry or not.
    log_q.scatter_reduce_(1, ids, _where(padding, torch.inf, -torch.inf, log_q.dtype), "amin")
    tail_q = log_q.logsumexp(-1, keepdim=True)
    buckets_q = torch.cat([listed.masked_fill(padding, -torch.inf), tail_q], 1)
    buckets_p = _teacher_buckets(log_p, log_tail, tail_q == -torch.inf).to(log_q.dtype)

    statistic = None
    if spec.definition.statistic is not None:
        rest = (buckets_p[:, -1:].exp() - tail_q.exp()).abs_()
        statistic = _forward_share(buckets_p[:, :-1], buckets_q[:, :-1], spec.a, rest)
    g, h = spec.definition.torch_tile(buckets_p, buckets_q, spec.a, spec.b, statistic)
    # No divergence is negative; where it is nearly 0, rounding may say so.
    torch.mul(g.sum(-1).clamp_(min=0.0), spec.kd_factor, out=kd)

    gradient = None
    if weight is not None:
        h = h - buckets_q.exp() * h.sum(-1, keepdim=True)
        h *= weight * (spec.kd_share * spec.kd_factor / spec.temperature)
        # Finite, so that no tail gives exp(-inf).
        gradient = torch.sub(log_q, tail_q.clamp(min=-1e30), out=torch.empty_like(log_q) if keep else log_q).exp_().mul_(h[:, -1:])
        gradient.scatter_add_(1, ids, h[:, :-1].masked_fill(padding, 0.0))
    if keep:
        log_q.scatter_reduce_(1, ids, listed.masked_fill(padding, -torch.inf), "amax")
    return gradient


def _teacher_buckets(log_p: Tensor, log_tail: Tensor | None, no_tail: Tensor) -> Tensor:
    """Log-probabilities of the K + 1 buckets, ``[R, K + 1]``, float64: a tail that is what the others leave has few digits to lose.

    They are divided by their sum, which is 1 but for rounding, or but for ids that only the teacher has, where there is no tail.
    """
    log_p = log_p.double()
    tail = torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp_(max=1.0)) if log_tail is None else log_tail.double()
    buckets = torch.cat([log_p, tail.masked_fill(no_tail, -torch.inf)], 1)
    return buckets - buckets.logsumexp(-1, keepdim=True)


def _where(condition: Tensor, yes: float, no: float, dtype: torch.dtype) -> Tensor:
    return torch.full(condition.shape, no, dtype=dtype, device=condition.device).masked_fill_(condition, yes)
