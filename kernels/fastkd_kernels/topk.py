"""Loss and gradient of rows of logits against sparse teachers in one Triton kernel: `topk_torch`'s arithmetic, one program a row.

Two sweeps over the row, whatever the divergence: the tail's log-sum-exp, and the gradient. In between come loops over the K listed tokens
alone, of which there may be any number.

The tail must be summed without the listed tokens (1 - sum(q) has no digits left where it is nearly 0), and not by comparing V ids with K.
So a row has a set of bits beside its logits, one a token, 1 where it is listed: a 32nd of the traffic of fp32 logits. Overwriting the
listed logits by a marker would save that, but it needs a row that may be written to, which a caller's own logits are not, and it
orders reads after writes of other threads; walking sorted ids makes each block's work depend on what is listed in it.

Everything of size [C, K] is prepared in torch: the buckets in float64, the bits, and the listed logits, which the gradient may overwrite
long before the listed tokens' own gradients are due.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows
from .configs import row_config
from .divergences import MASS_TOLERANCE
from .rows import _load_logits, _log_prob
from .rows_torch import _final_logits
from .spec import RowSpec
from .topk_torch import _teacher_buckets

__all__ = ["row_losses"]

_TOLERANCE = tl.constexpr(MASS_TOLERANCE)
_LOWEST = tl.constexpr(-3.0e38)  # a finite start for running maxima: -inf would make exp(-inf - -inf) = NaN
BLOCK_K = 1024  # listed tokens at a time, at most


@triton.jit
def _load_unlisted(zs_ptr, bs_ptr, bits_ptr, o, V, words, scale, softcap, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Ids ``[BLOCK / 32, 32]`` from ``o`` on and their final logits, -inf where listed; a row of ids shares its 32 bits."""
    o_bit = tl.arange(0, 32)[None, :]
    o_word = o // 32 + tl.arange(0, BLOCK // 32)[:, None]
    o_v = 32 * o_word + o_bit
    z = _load_logits(zs_ptr, bs_ptr, o_v, V, scale, softcap, BIAS, CAP)
    listed = (tl.load(bits_ptr + o_word, mask=o_word < words, other=0) >> o_bit) & 1
    return o_v, tl.where(listed == 1, float("-inf"), z)


@triton.jit
def _load_entries(x_ptr, o_k, K):
    return tl.load(x_ptr + o_k, mask=o_k < K, other=float("-inf"))


@triton.jit
def _topk_kernel(
    zs_ptr, dz_ptr, bs_ptr, bits_ptr, id_ptr, zk_ptr, lp_ptr, tail_ptr, shift_ptr, label_ptr, weight_ptr, kd_ptr, ce_ptr,
    s_zs, s_dz, words, V, K,
    inv_t, a, b, kd_factor, kd_share, ce_share, scale, softcap,
    TILE: tl.constexpr, STATISTIC: tl.constexpr, NEED_CE: tl.constexpr, NEED_DZ: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    zs_ptr += i_row * s_zs
    bits_ptr += i_row * words
    id_ptr += i_row * K
    zk_ptr += i_row * K
    lp_ptr += i_row * K
    if NEED_DZ:
        dz_ptr += i_row * s_dz
    o_block = tl.arange(0, BLOCK_K)

    # Maxima and normalisers at the temperature and, for the CE term, at temperature 1: of the tail, then of all.
    top_tail = _LOWEST
    sum_tail = 0.0
    sum_1 = 0.0
    for o in range(0, V, BLOCK):
        o_v, z = _load_unlisted(zs_ptr, bs_ptr, bits_ptr, o, V, words, scale, softcap, BIAS, CAP, BLOCK)
        top = tl.maximum(top_tail, tl.max(z))
        sum_tail = sum_tail * tl.exp((top_tail - top) * inv_t) + tl.sum(tl.exp((z - top) * inv_t))
        if NEED_CE:
            sum_1 = sum_1 * tl.exp(top_tail - top) + tl.sum(tl.exp(z - top))
        top_tail = top
    top_s = top_tail
    sum_s = sum_tail
    for o in range(0, K, BLOCK_K):
        z = _load_entries(zk_ptr, o + o_block, K)
        top = tl.maximum(top_s, tl.max(z, 0))
        sum_s = sum_s * tl.exp((top_s - top) * inv_t) + tl.sum(tl.exp((z - top) * inv_t), 0)
        if NEED_CE:
            sum_1 = sum_1 * tl.exp(top_s - top) + tl.sum(tl.exp(z - top), 0)
        top_s = top
    log_s = tl.log(sum_s)

    if NEED_CE:
        log_1 = tl.log(sum_1)
        label = tl.load(label_ptr + i_row).to(tl.int32)
        z_label = _load_logits(zs_ptr, bs_ptr, label, V, scale, softcap, BIAS, CAP)
        tl.store(ce_ptr + i_row, log_1 - (z_label - top_s))

    # A tail without tokens (not one whose sum is NaN) has no mass in the teacher either.
    empty = sum_tail == 0.0
    log_tail = tl.where(empty, 0.0, tl.log(sum_tail))
    lp_tail = tl.where(empty, float("-inf"), tl.load(tail_ptr + i_row))
    lq_tail = tl.where(empty, float("-inf"), (top_tail - top_s) * inv_t + log_tail - log_s)
    shift = tl.where(empty, tl.load(shift_ptr + i_row), 0.0)

    share = 0.0
    if STATISTIC:
        share = _forward_share(zk_ptr, lp_ptr, K, a, shift, lp_tail, lq_tail, top_s, log_s, inv_t, BLOCK_K)
    sum_g, h_tail = TILE(lp_tail, lq_tail, a, b, share)
    sum_h = h_tail
    for o in range(0, K, BLOCK_K):
        lq = _log_prob(_load_entries(zk_ptr, o + o_block, K), top_s, log_s, inv_t)
        g, h = TILE(_load_entries(lp_ptr, o + o_block, K) + shift, lq, a, b, share)
        sum_g += tl.sum(g, 0)
        sum_h += tl.sum(h, 0)
    # No divergence is negative; where it is nearly 0, rounding may say so.
    tl.store(kd_ptr + i_row, tl.where(sum_g < 0.0, 0.0, sum_g) * kd_factor)

    if NEED_DZ:
        w = tl.load(weight_ptr + i_row).to(tl.float32)
        w_kd = w * kd_share * kd_factor * inv_t
        d_tail = w_kd * (h_tail - tl.exp(lq_tail) * sum_h)
        for o in range(0, V, BLOCK):
            o_v, z = _load_unlisted(zs_ptr, bs_ptr, bits_ptr, o, V, words, scale, softcap, BIAS, CAP, BLOCK)
            d = d_tail * tl.exp(_log_prob(z, top_tail, log_tail, inv_t))
            if NEED_CE:
                d += w * ce_share * (tl.exp(z - top_s - log_1) - tl.where(o_v == label, 1.0, 0.0))
            if CAP:
                d *= 1.0 - (z / softcap) * (z / softcap)
            # A gradient in a narrower dtype lands on logits that other threads of this block may still have to read.
            tl.debug_barrier()
            # On listed tokens too, for the time being: a store with gaps would go element by element.
            tl.store(dz_ptr + o_v, (d * scale).to(dz_ptr.dtype.element_ty), mask=o_v < V)
        tl.debug_barrier()
        for o in range(0, K, BLOCK_K):
            o_k = o + o_block
            o_v = tl.load(id_ptr + o_k, mask=o_k < K, other=-1)
            z = _load_entries(zk_ptr, o_k, K)
            lq = _log_prob(z, top_s, log_s, inv_t)
            g, h = TILE(_load_entries(lp_ptr, o_k, K) + shift, lq, a, b, share)
            d = w_kd * (h - tl.exp(lq) * sum_h)
            if NEED_CE:
                d += w * ce_share * (tl.exp(z - top_s - log_1) - tl.where(o_v == label, 1.0, 0.0))
            if CAP:
                d *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(dz_ptr + o_v, (d * scale).to(dz_ptr.dtype.element_ty), mask=o_v >= 0)


@triton.jit
def _forward_share(zk_ptr, lp_ptr, K, mu, shift, lp_tail, lq_tail, top_s, log_s, inv_t, BLOCK_K: tl.constexpr):
    """adaptive_kl's weight of the forward KL; the steps are those of `rows_torch._forward_share`, the tail is never in the head."""
    limit = mu + _TOLERANCE
    o_block = tl.arange(0, BLOCK_K)
    top = tl.full((), 0.0, tl.float32)
    for o in range(0, K, BLOCK_K):
        top = tl.maximum(top, tl.max(tl.exp(_load_entries(lp_ptr, o + o_block, K) + shift), 0))
    high = top.to(tl.int32, bitcast=True)
    low = high * 0
    for _ in range(31):
        middle = low + (high - low) // 2
        fits = _mass_above(middle.to(tl.float32, bitcast=True), lp_ptr, K, shift, BLOCK_K) <= limit
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    threshold = high.to(tl.float32, bitcast=True)
    room = limit - _mass_above(threshold, lp_ptr, K, shift, BLOCK_K)
    ties = tl.where(threshold > 0.0, room / tl.maximum(threshold, 1e-45), K + 0.0)
    ties = tl.floor(tl.where(threshold == top, tl.maximum(ties, 1.0), ties))
    seen = 0.0
    g_head = 0.0
    g_all = tl.abs(tl.exp(lp_tail) - tl.exp(lq_tail))
    for o in range(0, K, BLOCK_K):
        p = tl.exp(_load_entries(lp_ptr, o + o_block, K) + shift)
        gap = tl.abs(p - tl.exp(_log_prob(_load_entries(zk_ptr, o + o_block, K), top_s, log_s, inv_t)))
        at = tl.where(p == threshold, 1.0, 0.0)
        head = (p > threshold) | ((at > 0.0) & (seen + tl.cumsum(at, 0) <= ties))
        seen += tl.sum(at, 0)
        g_head += tl.sum(tl.where(head, gap, 0.0), 0)
        g_all += tl.sum(gap, 0)
    return tl.where(g_all == 0.0, 0.5, g_head / tl.where(g_all == 0.0, 1.0, g_all))


@triton.jit
def _mass_above(threshold, lp_ptr, K, shift, BLOCK_K: tl.constexpr):
    mass = 0.0
    for o in range(0, K, BLOCK_K):
        p = tl.exp(_load_entries(lp_ptr, o + tl.arange(0, BLOCK_K), K) + shift)
        mass += tl.sum(tl.where(p > threshold, p, 0.0), 0)
    return mass


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
    """`topk_torch.row_losses` on a GPU. ``dz`` may also be a 16-bit view of ``student``'s first bytes, row by row."""
    if kd is None:
        return rows.row_losses(student, None, labels, weight, spec, dz=dz, kd=None, ce=ce, student_bias=student_bias)
    # The kernel steps through rows and vectors by one element.
    weight = weight.contiguous()
    labels, student_bias = (None if x is None else x.contiguous() for x in (labels, student_bias))
    student = student if student.stride(1) == 1 else student.contiguous()
    width = student.shape[1]

    padding = log_probs == -torch.inf
    index = ids.long().contiguous()
    bias = None if student_bias is None else student_bias[index]
    listed = _final_logits(student.gather(1, index), bias, spec.student, torch.float32).masked_fill_(padding, -torch.inf)
    # Normalised with the tail, and what makes them normalised without it: which of the two, the student's tail decides.
    buckets = _teacher_buckets(log_probs, None if log_tail is None else log_tail[:, None], torch.zeros_like(padding[:, :1]))
    shift = -buckets[:, :-1].logsumexp(-1)
    bits = torch.zeros(len(index), -(-width // 32), dtype=torch.int32, device=student.device)
    one = torch.ones_like(index, dtype=torch.int32).masked_fill_(padding, 0)
    bits.scatter_add_(1, index >> 5, one << (index & 31).int())  # the ids are distinct: a sum of bits is their union

    k = ids.shape[1]
    block, warps = row_config(width)
    # Floats stay floats: Triton would specialise an int 1.
    knobs = (1.0 / spec.temperature, spec.a, spec.b, spec.kd_factor, spec.kd_share, spec.ce_share,
             spec.student.scale, spec.student.softcap or 0.0)  # fmt: skip
    with torch.cuda.device_of(student):  # Triton launches on the current device
        _topk_kernel[(student.shape[0],)](
            student, dz, student_bias, bits, index.masked_fill(padding, -1).int(), listed,
            buckets[:, :-1].float().contiguous(), buckets[:, -1].float(), shift.float(), labels, weight, kd, ce,
            student.stride(0), 0 if dz is None else dz.stride(0), bits.shape[1], width, k,
            *(float(x) for x in knobs),
            TILE=spec.definition.tile,
            STATISTIC=spec.definition.statistic is not None,
            NEED_CE=ce is not None,
            NEED_DZ=dz is not None,
            BIAS=student_bias is not None,
            CAP=spec.student.softcap is not None,
            BLOCK=block,
            BLOCK_K=min(BLOCK_K, max(32, triton.next_power_of_2(k))),
            num_warps=warps,
        )  # fmt: skip
