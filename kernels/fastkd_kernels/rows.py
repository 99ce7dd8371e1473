"""Loss and gradient of rows of logits in one Triton kernel: one program a row, three sweeps over it (two where sum h is 0).

1. the maximum and normaliser of student and teacher at the temperature over the shared vocabulary, and of the student at temperature 1
   over its whole vocabulary where a CE term is asked for;
2. sum g, sum h (and, before it, the row statistic);
3. the gradient, which may overwrite the student's logits, in a narrower dtype too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import row_config
from .divergences import MASS_TOLERANCE
from .spec import RowSpec

__all__ = ["interpreted", "row_losses"]

_TOLERANCE = tl.constexpr(MASS_TOLERANCE)
_LOWEST = tl.constexpr(-3.0e38)  # a finite start for running maxima: -inf would make exp(-inf - -inf) = NaN


@triton.jit
def _load_logits(x_ptr, bias_ptr, o, width, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    mask = o < width
    z = tl.load(x_ptr + o, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + o, mask=mask, other=0.0).to(tl.float32)
    z *= scale
    if HAS_CAP:
        # tanh by the sigmoid: libdevice's cannot be interpreted.
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return tl.where(mask, z, float("-inf"))


@triton.jit
def _load_target(
    zt_ptr, bias_ptr, zs, o, width, scale, softcap, share, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, MOVING: tl.constexpr
):  # fmt: skip
    """The teacher's final logits; with MOVING interpolated with the student's, ``zs``."""
    z = _load_logits(zt_ptr, bias_ptr, o, width, scale, softcap, HAS_BIAS, HAS_CAP)
    if MOVING:
        z = tl.where(share == 0.0, zs, (1.0 - share) * zs + share * z)
    return z


@triton.jit
def _log_prob(z, top, log_sum, inv_t):
    return (z - top) * inv_t - log_sum


@triton.jit
def _row_kernel(
    zs_ptr, zt_ptr, dz_ptr, bs_ptr, bt_ptr, label_ptr, weight_ptr, kd_ptr, ce_ptr,
    s_zs, s_zt, s_dz, V_s, V,
    inv_t, a, b, kd_factor, kd_share, ce_share, scale_s, softcap_s, scale_t, softcap_t, target_share,
    TILE: tl.constexpr, CENTERED: tl.constexpr, STATISTIC: tl.constexpr,
    NEED_KD: tl.constexpr, NEED_CE: tl.constexpr, NEED_DZ: tl.constexpr,
    BIAS_S: tl.constexpr, BIAS_T: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    MOVING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    zs_ptr += i_row * s_zs
    if NEED_KD:
        zt_ptr += i_row * s_zt
    if NEED_DZ:
        dz_ptr += i_row * s_dz
    o_block = tl.arange(0, BLOCK)

    top_s = _LOWEST
    top_t = _LOWEST
    top_1 = _LOWEST
    sum_s = 0.0
    sum_t = 0.0
    sum_1 = 0.0
    if NEED_KD:
        for o in range(0, V, BLOCK):
            zs = _load_logits(zs_ptr, bs_ptr, o + o_block, V, scale_s, softcap_s, BIAS_S, CAP_S)
            top = tl.maximum(top_s, tl.max(zs, 0))
            sum_s = sum_s * tl.exp((top_s - top) * inv_t) + tl.sum(tl.exp((zs - top) * inv_t), 0)
            if NEED_CE:
                sum_1 = sum_1 * tl.exp(top_s - top) + tl.sum(tl.exp(zs - top), 0)
            top_s = top
            z = _load_target(zt_ptr, bt_ptr, zs, o + o_block, V, scale_t, softcap_t, target_share, BIAS_T, CAP_T, MOVING)
            top = tl.maximum(top_t, tl.max(z, 0))
            sum_t = sum_t * tl.exp((top_t - top) * inv_t) + tl.sum(tl.exp((z - top) * inv_t), 0)
            top_t = top
        top_1 = top_s
    log_s = tl.log(sum_s)
    log_t = tl.log(sum_t)

    if NEED_CE:
        # What lies beyond the shared vocabulary belongs to the student's CE alone; without a KD term that is the whole row.
        for o in range(V if NEED_KD else 0, V_s, BLOCK):
            z = _load_logits(zs_ptr, bs_ptr, o + o_block, V_s, scale_s, softcap_s, BIAS_S, CAP_S)
            top = tl.maximum(top_1, tl.max(z, 0))
            sum_1 = sum_1 * tl.exp(top_1 - top) + tl.sum(tl.exp(z - top), 0)
            top_1 = top
        label = tl.load(label_ptr + i_row)
        z_label = _load_logits(zs_ptr, bs_ptr, label, V_s, scale_s, softcap_s, BIAS_S, CAP_S)
        log_1 = tl.log(sum_1)
        tl.store(ce_ptr + i_row, log_1 - (z_label - top_1))

    share = 0.0
    if NEED_KD and STATISTIC:
        share = _forward_share(zs_ptr, zt_ptr, bs_ptr, bt_ptr, V, inv_t, a, top_s, log_s, top_t, log_t,
                               scale_s, softcap_s, scale_t, softcap_t, target_share,
                               BIAS_S, BIAS_T, CAP_S, CAP_T, MOVING, BLOCK)  # fmt: skip

    sum_g = 0.0
    sum_h = 0.0
    if NEED_KD and not (CENTERED and NEED_DZ):
        for o in range(0, V, BLOCK):
            zs = _load_logits(zs_ptr, bs_ptr, o + o_block, V, scale_s, softcap_s, BIAS_S, CAP_S)
            log_q = _log_prob(zs, top_s, log_s, inv_t)
            z = _load_target(zt_ptr, bt_ptr, zs, o + o_block, V, scale_t, softcap_t, target_share, BIAS_T, CAP_T, MOVING)
            g, h = TILE(_log_prob(z, top_t, log_t, inv_t), log_q, a, b, share)
            sum_g += tl.sum(g, 0)
            sum_h += tl.sum(h, 0)

    if NEED_DZ:
        w = tl.load(weight_ptr + i_row).to(tl.float32)
        if NEED_KD:
            w_kd = w * kd_share * kd_factor * inv_t
            for o in range(0, V, BLOCK):
                o_v = o + o_block
                zs = _load_logits(zs_ptr, bs_ptr, o_v, V, scale_s, softcap_s, BIAS_S, CAP_S)
                log_q = _log_prob(zs, top_s, log_s, inv_t)
                z = _load_target(zt_ptr, bt_ptr, zs, o_v, V, scale_t, softcap_t, target_share, BIAS_T, CAP_T, MOVING)
                g, h = TILE(_log_prob(z, top_t, log_t, inv_t), log_q, a, b, share)
                if CENTERED:
                    sum_g += tl.sum(g, 0)
                else:
                    h -= tl.exp(log_q) * sum_h
                d = w_kd * h
                if NEED_CE:
                    d += w * ce_share * (tl.exp(zs - top_1 - log_1) - tl.where(o_v == label, 1.0, 0.0))
                if CAP_S:
                    d *= 1.0 - (zs / softcap_s) * (zs / softcap_s)
                # A gradient in a narrower dtype lands on logits that other threads of this block may still have to read.
                tl.debug_barrier()
                tl.store(dz_ptr + o_v, (d * scale_s).to(dz_ptr.dtype.element_ty), mask=o_v < V)
        for o in range(V if NEED_KD else 0, V_s, BLOCK):
            o_v = o + o_block
            d = tl.zeros([BLOCK], tl.float32)
            if NEED_CE:
                zs = _load_logits(zs_ptr, bs_ptr, o_v, V_s, scale_s, softcap_s, BIAS_S, CAP_S)
                d = w * ce_share * (tl.exp(zs - top_1 - log_1) - tl.where(o_v == label, 1.0, 0.0))
                if CAP_S:
                    d *= 1.0 - (zs / softcap_s) * (zs / softcap_s)
            tl.debug_barrier()
            tl.store(dz_ptr + o_v, (d * scale_s).to(dz_ptr.dtype.element_ty), mask=o_v < V_s)
    if NEED_KD:
        # No divergence is negative; where it is nearly 0, rounding may say so.
        tl.store(kd_ptr + i_row, tl.where(sum_g < 0.0, 0.0, sum_g) * kd_factor)


@triton.jit
def _forward_share(
    zs_ptr, zt_ptr, bs_ptr, bt_ptr, V, inv_t, mu, top_s, log_s, top_t, log_t, scale_s, softcap_s, scale_t, softcap_t, target_share,
    BIAS_S: tl.constexpr, BIAS_T: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, MOVING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """adaptive_kl's weight of the forward KL; the steps are those of `rows_torch._forward_share`."""
    limit = mu + _TOLERANCE
    o_block = tl.arange(0, BLOCK)
    top = tl.exp(-log_t)
    high = top.to(tl.int32, bitcast=True)
    low = high * 0
    for _ in range(31):
        middle = low + (high - low) // 2
        threshold = middle.to(tl.float32, bitcast=True)
        mass = _mass_above(threshold, zs_ptr, zt_ptr, bs_ptr, bt_ptr, V, inv_t, top_t, log_t, scale_s, softcap_s, scale_t, softcap_t,
                           target_share, BIAS_S, BIAS_T, CAP_S, CAP_T, MOVING, BLOCK)  # fmt: skip
        fits = mass <= limit
        low = tl.where(fits, low, middle + 1)
        high = tl.where(fits, middle, high)
    threshold = high.to(tl.float32, bitcast=True)
    mass = _mass_above(threshold, zs_ptr, zt_ptr, bs_ptr, bt_ptr, V, inv_t, top_t, log_t, scale_s, softcap_s, scale_t, softcap_t,
                       target_share, BIAS_S, BIAS_T, CAP_S, CAP_T, MOVING, BLOCK)  # fmt: skip
    ties = tl.where(threshold > 0.0, (limit - mass) / tl.maximum(threshold, 1e-45), V + 0.0)
    ties = tl.floor(tl.where(threshold == top, tl.maximum(ties, 1.0), ties))
    seen = 0.0
    g_head = 0.0
    g_all = 0.0
    for o in range(0, V, BLOCK):
        zs = _load_logits(zs_ptr, bs_ptr, o + o_block, V, scale_s, softcap_s, BIAS_S, CAP_S)
        z = _load_target(zt_ptr, bt_ptr, zs, o + o_block, V, scale_t, softcap_t, target_share, BIAS_T, CAP_T, MOVING)
        p = tl.exp(_log_prob(z, top_t, log_t, inv_t))
        gap = tl.abs(p - tl.exp(_log_prob(zs, top_s, log_s, inv_t)))
        at = tl.where(p == threshold, 1.0, 0.0)
        head = (p > threshold) | ((at > 0.0) & (seen + tl.cumsum(at, 0) <= ties))
        seen += tl.sum(at, 0)
        g_head += tl.sum(tl.where(head, gap, 0.0), 0)
        g_all += tl.sum(gap, 0)
    return tl.where(g_all == 0.0, 0.5, g_head / tl.where(g_all == 0.0, 1.0, g_all))


@triton.jit
def _mass_above(
    threshold, zs_ptr, zt_ptr, bs_ptr, bt_ptr, V, inv_t, top_t, log_t, scale_s, softcap_s, scale_t, softcap_t, target_share,
    BIAS_S: tl.constexpr, BIAS_T: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, MOVING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the target's probabilities that are greater than the threshold."""
    o_block = tl.arange(0, BLOCK)
    mass = 0.0
    for o in range(0, V, BLOCK):
        zs = 0.0
        if MOVING:
            zs = _load_logits(zs_ptr, bs_ptr, o + o_block, V, scale_s, softcap_s, BIAS_S, CAP_S)
        z = _load_target(zt_ptr, bt_ptr, zs, o + o_block, V, scale_t, softcap_t, target_share, BIAS_T, CAP_T, MOVING)
        p = tl.exp(_log_prob(z, top_t, log_t, inv_t))
        mass += tl.sum(tl.where(p > threshold, p, 0.0), 0)
    return mass


def interpreted() -> bool:
    """Whether Triton was imported in interpreter mode, in which kernels take CPU tensors."""
    return not isinstance(_row_kernel, triton.JITFunction)


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
    """`rows_torch.row_losses` on a GPU. ``dz`` may also be a 16-bit view of ``student``'s first bytes, row by row."""
    # The kernel steps through rows and vectors by one element.
    weight = weight.contiguous()
    labels, student_bias, teacher_bias = (None if x is None else x.contiguous() for x in (labels, student_bias, teacher_bias))
    student = student if student.stride(1) == 1 else student.contiguous()
    teacher = teacher if teacher is None or teacher.stride(1) == 1 else teacher.contiguous()
    width = student.shape[1]
    shared = width if teacher is None else min(width, teacher.shape[1])
    block, warps = row_config(width)
    # Floats stay floats: Triton would specialise an int 1.
    knobs = (1.0 / spec.temperature, spec.a, spec.b, spec.kd_factor, spec.kd_share, spec.ce_share,
             spec.student.scale, spec.student.softcap or 0.0, spec.teacher.scale, spec.teacher.softcap or 0.0,
             spec.target_share)  # fmt: skip
    with torch.cuda.device_of(student):  # Triton launches on the current device
        _row_kernel[(student.shape[0],)](
            student, teacher, dz, student_bias, teacher_bias, labels, weight, kd, ce,
            student.stride(0), 0 if teacher is None else teacher.stride(0), 0 if dz is None else dz.stride(0), width, shared,
            *(float(k) for k in knobs),
            TILE=spec.definition.tile,
            CENTERED=spec.definition.centered,
            STATISTIC=spec.definition.statistic is not None,
            NEED_KD=kd is not None,
            NEED_CE=ce is not None,
            NEED_DZ=dz is not None,
            BIAS_S=student_bias is not None,
            BIAS_T=teacher_bias is not None,
            CAP_S=spec.student.softcap is not None,
            CAP_T=spec.teacher.softcap is not None,
            MOVING=spec.target_share != 1.0,
            BLOCK=block,
            num_warps=warps,
        )  # fmt: skip
