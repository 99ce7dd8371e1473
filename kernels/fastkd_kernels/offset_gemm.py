"""Logits in fp16 against their tile's maximum, by Triton: a matrix product that writes them, and a row kernel that reads them.

`offset_torch` says what they are and what they cost in exactness. The product's epilogue has each tile in registers anyway. It leaves
2 bytes per element and, per row and tile, a maximum and a sum. The row kernel therefore starts with the normalisers, and forward KL is one
sweep: two residuals read, dz written over the student's, 6 bytes per element (two sweeps, 10 bytes, where sum h is not known beforehand).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .offset_torch import OffsetLogits
from .spec import Head, RowSpec

__all__ = ["GemmConfig", "device_config", "gemm_config", "offset_logits", "row_losses", "supported"]

_LOWEST = tl.constexpr(-1.0e30)  # as in `offset_torch`
_LOG2_E = tl.constexpr(1.4426950408889634)
# Elements per step of the row kernel: 8 a thread, one 16-byte load of each buffer. It leaves registers for two dozen warps and more.
_ROW_BLOCK, _ROW_WARPS = 2048, 8


@dataclass(frozen=True)
class GemmConfig:
    """block_n is also the tile of the residuals.

    persistent: one program a multiprocessor, which loads the operands of its next tile during the epilogue of this one.
    tma: operands by tensor descriptors, whose loads need neither registers nor masks.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    persistent: bool = False
    tma: bool = False


def gemm_config(backend: str, arch: int | str) -> GemmConfig:
    """The choice for a target as `triton.backends.compiler.GPUTarget` names it: ("cuda", 90), ("hip", "gfx942"). Not timed yet.

    128 x 256 is the largest tile whose sums fit the registers of 8 warps, so the one that reads least from L2 per product; all four stages
    that fit Hopper's 227 KB of shared memory hide the latency. On the others two programs of half the tile share a multiprocessor: one's
    epilogue runs during the other's products. AMD's 64 KB hold one stage beside the one in registers.
    """
    if backend == "hip":
        return GemmConfig(128, 256, 64, warps=8, stages=2)
    if arch in (90, 100, 103):
        return GemmConfig(128, 256, 64, warps=8, stages=4, persistent=True, tma=True)
    return GemmConfig(128, 128, 32, warps=4, stages=4)


def device_config(device: torch.device) -> GemmConfig:
    """The choice for a device; its block_n is the tile of the buffers to allocate."""
    if device.type != "cuda" or torch.version.hip:  # AMD's GPUs are called cuda, too; the interpreter takes anything
        return gemm_config("hip", "")
    major, minor = torch.cuda.get_device_capability(device)
    return gemm_config("cuda", 10 * major + minor)


@triton.jit
def _sum_exp2(z, top, factor):
    # One multiply-add per element. Its rounding, of top * factor, is no larger than that of fp32 logits themselves.
    return tl.sum(tl.exp2(z * factor - (top * factor)[:, None]), 1)


@triton.jit
def _gemm_kernel(
    a, b, r_ptr, bias_ptr, top_ptr, sum_ptr, sum_1_ptr, s_a, s_b, s_r, s_stat, C, V, shared, D, inv_t, scale, softcap,
    TMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SCALED: tl.constexpr, TWO_SUMS: tl.constexpr, SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(C, BLOCK_M)
    # Tiles that are computed together share rows of the head, the operand that is too large for L2: it is read from memory once.
    for i_tile in tl.range(tl.program_id(0), tiles_m * tl.cdiv(V, BLOCK_N), tl.num_programs(0), flatten=FLATTEN):
        i_m = i_tile % tiles_m
        i_n = i_tile // tiles_m
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TMA:
            for k in range(0, D, BLOCK_K):
                z = tl.dot(a.load([i_m * BLOCK_M, k]), b.load([i_n * BLOCK_N, k]).T, z)  # 0 beyond the ends
        else:
            # Rows beyond the ends are the first ones again: nothing of them is stored, and loads need no second mask.
            a_ptrs = a + (o_m % C).to(tl.int64)[:, None] * s_a
            b_ptrs = b + (o_n % V).to(tl.int64)[None, :] * s_b
            for k in range(0, D, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                x = tl.load(a_ptrs + o_k[None, :], mask=(o_k < D)[None, :], other=0.0)
                z = tl.dot(x, tl.load(b_ptrs + o_k[:, None], mask=(o_k < D)[:, None], other=0.0), z)
        if HAS_BIAS:
            z += tl.load(bias_ptr + o_n, mask=o_n < V, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            z *= scale
        if HAS_CAP:
            z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
        # Not in a branch that only the last tile takes: it would make ptxas wait for every single product of the main loop.
        z = tl.where((o_n < V)[None, :], z, float("-inf"))
        top = tl.maximum(tl.max(z, 1), _LOWEST)
        # To the end of the padded row, which is aligned as the width need not be: a mask at the width would make it one store per element.
        o_r = o_m.to(tl.int64)[:, None] * s_r + o_n[None, :]
        tl.store(r_ptr + o_r, (z - top[:, None]).to(tl.float16), mask=(o_m < C)[:, None] & (o_n < s_r)[None, :])
        o_stat = o_m.to(tl.int64) * s_stat + i_n
        tl.store(top_ptr + o_stat, top, mask=o_m < C)
        if TWO_SUMS:
            tl.store(sum_1_ptr + o_stat, _sum_exp2(z, top, _LOG2_E), mask=o_m < C)
        if SPLIT:
            z = tl.where((o_n < shared)[None, :], z, float("-inf"))
        tl.store(sum_ptr + o_stat, _sum_exp2(z, top, inv_t * _LOG2_E), mask=o_m < C)


@triton.jit
def _normaliser(top_ptr, sum_ptr, n, inv_t, BLOCK_TILES: tl.constexpr):
    o = tl.arange(0, BLOCK_TILES)
    tops = tl.load(top_ptr + o, mask=o < n, other=_LOWEST)
    sums = tl.load(sum_ptr + o, mask=o < n, other=0.0)
    top = tl.max(tops, 0)
    return top, tl.log(tl.sum(sums * tl.exp((tops - top) * inv_t), 0))


@triton.jit
def _load_tiles(r_ptr, top_ptr, o_tile, o, s_r, top_row, log_sum, inv_t):
    """(logits against the row's maximum, log-probabilities) of tiles of a padded row of ``s_r``: -inf beyond the vocabulary."""
    r = tl.load(r_ptr + o, mask=o < s_r, other=float("-inf")).to(tl.float32)
    z = r + (tl.load(top_ptr + o_tile, mask=o_tile * o.shape[1] < s_r, other=0.0) - top_row)[:, None]
    return z, z * inv_t - log_sum


@triton.jit
def _row_kernel(
    rs_ptr, rt_ptr, dz_ptr, top_s_ptr, top_t_ptr, sum_s_ptr, sum_t_ptr, sum_1_ptr, label_ptr, weight_ptr, kd_ptr, ce_ptr,
    s_rs, s_rt, s_stat, s_stat_t, V_s, V, inv_t, a, b, kd_factor, kd_share, ce_share, scale, softcap,
    KD_TILE: tl.constexpr, CENTERED: tl.constexpr, NEED_CE: tl.constexpr, NEED_DZ: tl.constexpr, HAS_CAP: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    rs_ptr += i_row * s_rs
    rt_ptr += i_row * s_rt
    top_s_ptr += i_row * s_stat
    top_t_ptr += i_row * s_stat_t
    n = tl.cdiv(V, TILE)
    n_s = tl.cdiv(V_s, TILE)
    top_s, log_s = _normaliser(top_s_ptr, sum_s_ptr + i_row * s_stat, n, inv_t, BLOCK_TILES)
    top_t, log_t = _normaliser(top_t_ptr, sum_t_ptr + i_row * s_stat_t, n, inv_t, BLOCK_TILES)
    top_1 = 0.0
    log_1 = 0.0
    label = -1
    if NEED_CE:
        top_1, log_1 = _normaliser(top_s_ptr, sum_1_ptr + i_row * s_stat, n_s, 1.0, BLOCK_TILES)
        label = tl.load(label_ptr + i_row)
        z_label = tl.load(rs_ptr + label).to(tl.float32) + (tl.load(top_s_ptr + label // TILE) - top_1)
        tl.store(ce_ptr + i_row, log_1 - z_label)
        tl.debug_barrier()  # dz may overwrite the label's residual while other threads have yet to read it

    o_tiles = tl.arange(0, TILES)
    o_block = o_tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    sum_g = tl.zeros([TILES, TILE], tl.float32)
    sum_h = 0.0
    if not (CENTERED and NEED_DZ):
        sums_h = tl.zeros([TILES, TILE], tl.float32)
        for i in range(0, n, TILES):
            o = i * TILE + o_block
            z, log_q = _load_tiles(rs_ptr, top_s_ptr, i + o_tiles, o, s_rs, top_s, log_s, inv_t)
            _, log_p = _load_tiles(rt_ptr, top_t_ptr, i + o_tiles, o, s_rt, top_t, log_t, inv_t)
            g, h = KD_TILE(log_p, tl.where(o < V, log_q, float("-inf")), a, b, 0.0)
            sum_g += g
            sums_h += h
        sum_h = tl.sum(tl.sum(sums_h, 1), 0)

    if NEED_DZ:
        dz_ptr += i_row * s_rs
        w = tl.load(weight_ptr + i_row).to(tl.float32) * scale
        w_kd = w * kd_share * kd_factor * inv_t
        w_ce = w * ce_share
        for i in range(0, n_s, TILES):
            o = i * TILE + o_block
            z, log_q = _load_tiles(rs_ptr, top_s_ptr, i + o_tiles, o, s_rs, top_s, log_s, inv_t)
            _, log_p = _load_tiles(rt_ptr, top_t_ptr, i + o_tiles, o, s_rt, top_t, log_t, inv_t)
            # Beyond the shared vocabulary both log-probabilities are -inf, which makes g and h 0.
            log_q = tl.where(o < V, log_q, float("-inf"))
            g, h = KD_TILE(log_p, log_q, a, b, 0.0)
            if CENTERED:
                sum_g += g
            else:
                h -= tl.exp(log_q) * sum_h
            d = w_kd * h
            if NEED_CE:
                d += w_ce * (tl.exp(z + (top_s - top_1 - log_1)) - tl.where(o == label, 1.0, 0.0))
            if HAS_CAP:
                d *= 1.0 - ((z + top_s) / softcap) * ((z + top_s) / softcap)
            tl.store(dz_ptr + o, d.to(dz_ptr.dtype.element_ty), mask=o < s_rs)
    kd = tl.sum(tl.sum(sum_g, 1), 0)
    # No divergence is negative; where it is nearly 0, rounding may say so.
    tl.store(kd_ptr + i_row, tl.where(kd < 0.0, 0.0, kd) * kd_factor)


def supported(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the product can take these operands: 16-bit, alike, and with rows that start at multiples of 16 bytes."""
    aligned = all(x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, weight))
    return aligned and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)


def offset_logits(
    hidden: Tensor, weight: Tensor, out: OffsetLogits, head: Head, *, temperature: float, shared: int, bias: Tensor | None = None,
    config: GemmConfig | None = None,
) -> None:  # fmt: skip
    """`offset_torch.offset_logits` on a GPU, for operands that are `supported`. ``out.tile`` must be the configuration's block_n."""
    config = config or device_config(hidden.device)
    rows, width = out.residuals.shape
    programs = triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n)
    if config.persistent:  # two, where the interpreter runs one after the other
        processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 2
        programs = min(programs, processors)
    a: Tensor | TensorDescriptor = hidden
    b: Tensor | TensorDescriptor = weight
    if config.tma:
        a = TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k])
        b = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        _gemm_kernel[(programs,)](
            a, b, out.residuals, bias if bias is None else bias.contiguous(), out.maxima, out.sums, out.sums_1,
            hidden.stride(0), weight.stride(0), out.residuals.stride(0), out.maxima.stride(0), rows, width, shared, hidden.shape[1],
            # Floats stay floats: Triton would specialise an int 1.
            1.0 / temperature, float(head.scale), float(head.softcap or 0.0),
            TMA=config.tma, HAS_BIAS=bias is not None, HAS_CAP=head.softcap is not None, SCALED=head.scale != 1.0,
            TWO_SUMS=out.two_sums, SPLIT=shared < width,
            FLATTEN=config.persistent, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def row_losses(
    student: OffsetLogits, teacher: OffsetLogits, labels: Tensor | None, weight: Tensor, spec: RowSpec,
    *, dz: Tensor | None, kd: Tensor, ce: Tensor | None,
) -> None:  # fmt: skip
    """`offset_torch.row_losses` on a GPU. ``dz`` is ``student.residuals.view(dtype)``."""
    rows, width = student.residuals.shape
    if dz is not None and (dz.data_ptr(), dz.stride()) != (student.residuals.data_ptr(), student.residuals.stride()):
        raise ValueError(f"dz: expected a 16-bit view of the student's residuals, got {dz.dtype} {tuple(dz.shape)} elsewhere")
    knobs = (1.0 / spec.temperature, spec.a, spec.b, spec.kd_factor, spec.kd_share, spec.ce_share, spec.student.scale,
             spec.student.softcap or 0.0)  # fmt: skip
    with torch.cuda.device_of(student.residuals):
        _row_kernel[(rows,)](
            student.residuals, teacher.residuals, dz, student.maxima, teacher.maxima, student.sums, teacher.sums, student.sums_1,
            labels if labels is None else labels.contiguous(), weight.contiguous(), kd, ce,
            student.residuals.stride(0), teacher.residuals.stride(0), student.maxima.stride(0), teacher.maxima.stride(0),
            width, teacher.residuals.shape[1], *(float(k) for k in knobs),
            KD_TILE=spec.definition.tile, CENTERED=spec.definition.centered, NEED_CE=ce is not None, NEED_DZ=dz is not None,
            HAS_CAP=spec.student.softcap is not None, TILE=student.tile, TILES=max(1, _ROW_BLOCK // student.tile),
            BLOCK_TILES=triton.next_power_of_2(student.maxima.shape[1]), num_warps=_ROW_WARPS,
        )  # fmt: skip
