"""Loss and gradient of rows of logits in plain torch: the Triton row kernel's arithmetic, on blocks of rows that stay in cache."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .divergences import MASS_TOLERANCE
from .spec import Head, Ranks, RowSpec

__all__ = ["row_losses", "row_losses_in_blocks"]

BLOCK_BYTES = 2 << 20  # of one [rows, V] temporary, where that is a row per thread; about ten are alive at a time
BLOCK_BYTES_GPU = 128 << 20  # where this runs on a GPU, for want of Triton: blocks large enough to fill it
RETAINED_BYTES = 31 << 20  # glibc follows blocks of up to 32 MiB


def row_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weight: Tensor,
    spec: RowSpec,
    *,
    dz: Tensor | None,
    kd: Tensor | None,
    ce: Tensor | None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> None:
    """Write each row's divergence and cross-entropy, and the gradient of their weighted sum.

    Args:
        student: ``[C, V_s]``, products of hidden states and head, before bias, scale and softcap.
        teacher: ``[C, V_t]`` likewise, or None when no KD term is asked for.
        labels: ``[C]`` int64 in [0, V_s), or None when no CE term is asked for.
        weight: ``[C]``, the rows' weights.
        dz: ``[C, V_s]``, receives the gradient with respect to ``student``; may be ``student`` itself. None: no gradient.
        kd, ce: ``[C]``, receive the terms in nats, unweighted, ``kd`` times `RowSpec.kd_factor`. None where not asked for.
    """

    def divergence(part: slice, zs: Tensor, out: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert teacher is not None
        shared = min(zs.shape[1], teacher.shape[1])
        zt = _final_logits(teacher[part, :shared], None if teacher_bias is None else teacher_bias[:shared], spec.teacher, zs.dtype)
        log_q = _log_softmax(zs[:, :shared], spec.temperature)
        zt = _target_logits(zt, zs[:, :shared], spec.target_share)
        return log_q, _divergence(_log_softmax(zt, spec.temperature), log_q, spec, out, w)

    row_losses_in_blocks(student, divergence, labels, weight, spec, dz=dz, kd=kd, ce=ce, student_bias=student_bias)


def row_losses_in_blocks(
    student: Tensor,
    divergence: Callable[[slice, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    labels: Tensor | None,
    weight: Tensor,
    spec: RowSpec,
    *,
    dz: Tensor | None,
    kd: Tensor | None,
    ce: Tensor | None,
    student_bias: Tensor | None,
) -> None:
    """`row_losses` for any kind of teacher.

    Args:
        divergence: ``(part, zs, out, w) -> (log_q, gradient)``: of the rows ``part`` with final student logits ``zs``, write the divergence
            to ``out``; return the student's log-probabilities over its first ids at the temperature and, unless ``w`` (the rows' weights)
            is None, the gradient of ``w * kd_share * kd`` with respect to the first final logits. ``zs`` is not to be written to.
        The others are those of `row_losses`.
    """
    width = student.shape[1]
    compute = torch.promote_types(student.dtype, torch.float32)
    for part in _row_blocks(student):
        zs = _final_logits(student[part], student_bias, spec.student, compute)
        w = weight[part, None]
        gradient = log_q = None
        if kd is not None:
            log_q, gradient = divergence(part, zs, kd[part], w if dz is not None else None)
        if ce is not None:
            assert labels is not None
            whole = log_q is not None and spec.temperature == 1.0 and log_q.shape[1] == width
            log_probs = log_q if whole and log_q is not None else torch.log_softmax(zs, -1)
            target = labels[part, None]
            torch.neg(log_probs.gather(1, target).squeeze(1), out=ce[part])
            if dz is not None:
                gradient = _add_cross_entropy(gradient, log_probs, target, w * spec.ce_share)
        if dz is None:
            continue
        assert gradient is not None
        _write_gradient(gradient, zs, spec.student, dz[part])


def _row_blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of the rows of ``[C, V]`` whose temporaries stay in cache."""
    rows, width = x.shape
    itemsize = torch.promote_types(x.dtype, torch.float32).itemsize
    step = max(1, BLOCK_BYTES_GPU // (width * itemsize))
    if x.device.type == "cpu":
        # As many rows for each thread: softmaxes and sums are shared out by rows.
        threads = torch.get_num_threads()
        step = max(1, BLOCK_BYTES // (width * itemsize * threads)) * threads
        # glibc returns memory to the system once more of it is free than twice the largest mapped block freed so far; the temporaries
        # would then be faulted in anew for every block of rows. Freeing one large block, never touched, keeps them.
        torch.empty(RETAINED_BYTES, dtype=torch.uint8)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _write_gradient(gradient: Tensor, zs: Tensor, head: Head, dz: Tensor) -> None:
    """From the gradient of the first final logits, which is overwritten, to that of the products before bias, scale and softcap."""
    n = gradient.shape[1]
    if head.softcap is not None:
        gradient -= gradient * (zs[:, :n] / head.softcap).square_()
    if head.scale != 1.0:
        gradient *= head.scale
    dz[:, :n] = gradient
    dz[:, n:] = 0


def _final_logits(x: Tensor, bias: Tensor | None, head: Head, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    if bias is not None:
        x = x + bias
    if head.scale != 1.0:
        x = x * head.scale
    return x if head.softcap is None else (x / head.softcap).tanh_().mul_(head.softcap)


def _target_logits(zt: Tensor, zs: Tensor, share: float) -> Tensor:
    if share == 0.0:
        return zs
    return zt if share == 1.0 else torch.mul(zt, share).add_(zs, alpha=1.0 - share)


def _log_softmax(z: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(z if temperature == 1.0 else z / temperature, -1)


def _divergence(log_p: Tensor, log_q: Tensor, spec: RowSpec, kd: Tensor, weight: Tensor | None) -> Tensor | None:
    """Write the divergence to ``kd``; return the gradient with respect to the final logits, or None without ``weight``."""
    statistic = None
    if spec.definition.statistic is not None:
        statistic = _forward_share(log_p, log_q, spec.a)
    g, h = spec.definition.torch_tile(log_p, log_q, spec.a, spec.b, statistic)
    # No divergence is negative; where it is nearly 0, rounding may say so.
    torch.mul(g.sum(-1).clamp_(min=0.0), spec.kd_factor, out=kd)
    if weight is None:
        return None
    if not spec.definition.centered:
        h.addcmul_(torch.exp(log_q, out=g), h.sum(-1, keepdim=True), value=-1)
    return h.mul_(weight * (spec.kd_share * spec.kd_factor / spec.temperature))


def _add_cross_entropy(gradient: Tensor | None, log_probs: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    softmax = log_probs.exp().mul_(weight)
    softmax.scatter_add_(1, target, -weight)
    if gradient is not None:
        softmax[:, : gradient.shape[1]] += gradient
    return softmax


def _forward_share(log_p: Tensor, log_q: Tensor, mu: float, rest: Tensor | float = 0.0, ranks: Ranks | None = None) -> Tensor:
    """adaptive_kl's weight of the forward KL, ``[R, 1]``: g_head / (g_head + g_tail), g = sum abs(p - q).

    ``rest`` is abs(p - q) of what can only be in the tail, ``[R, 1]``. ``ranks`` hold slices of the vocabulary, if not all of it is here.

    The head is found without a sort: positive floats compare as their bit patterns do, so 31 halvings find the smallest threshold
    above which the mass is at most mu. Of the tokens exactly at the threshold, as many as still fit come in, in index order.
    """
    p = log_p.exp()
    bits = torch.int32 if p.dtype == torch.float32 else torch.int64
    mask = torch.empty_like(p)  # 0 or 1: on a CPU boolean masks are several times slower

    def mass_above(threshold: Tensor) -> Tensor:
        return total(torch.gt(p, threshold, out=mask).mul_(p).sum(-1, keepdim=True))

    def total(x: Tensor) -> Tensor:
        return x if ranks is None else ranks.sum(x)

    limit = mu + MASS_TOLERANCE
    top = p.amax(-1, keepdim=True)
    if ranks is not None:
        top = ranks.gather(top).amax(0)
    high = top.view(bits)
    low = torch.zeros_like(high)
    for _ in range(31 if bits == torch.int32 else 63):
        middle = (low + high) // 2
        fits = mass_above(middle.view(p.dtype)) <= limit
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle + 1)
    threshold = high.view(p.dtype)
    room = limit - mass_above(threshold)
    ties = torch.where(threshold > 0, room / threshold, torch.inf)
    ties = torch.where(threshold == top, ties.clamp(min=1.0), ties).floor_()
    at = torch.eq(p, threshold, out=mask)
    if ranks is not None:
        ties -= ranks.gather(at.sum(-1, keepdim=True))[: ranks.rank].sum(0)
    at *= at.cumsum(-1) <= ties
    gap = (p - log_q.exp()).abs_()
    head = torch.gt(p, threshold, out=p).add_(at)
    head_gap, all_gap = total(torch.stack([head.mul_(gap).sum(-1, keepdim=True), gap.sum(-1, keepdim=True)]))
    all_gap += rest
    return torch.where(all_gap == 0, 0.5, head_gap / all_gap)
