"""The chunk loop's matrix products: fp32 results from 16-bit operands, into preallocated buffers.

Where the device multiplies 16-bit operands into an fp32 output (`torch.mm(out_dtype=)`), that is one call. Elsewhere (CPU, older torch)
blocks of the vocabulary are widened one at a time.
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["grad_hidden", "grad_weight", "has_mixed_mm", "logits"]

WIDENED_BYTES = 32 << 20  # of one widened block of the head


@cache
def has_mixed_mm(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type == "cpu":
        return False
    try:
        a = torch.zeros(16, 16, dtype=dtype, device=device)
        out = torch.zeros(16, 16, dtype=torch.float32, device=device)
        torch.mm(a, a, out_dtype=torch.float32, out=out)
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:
        raise  # says nothing of what the device can do, and would be remembered
    except (RuntimeError, TypeError):
        return False
    return True


def _vocabulary_blocks(weight: Tensor):
    step = max(1, WIDENED_BYTES // (4 * weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[C, V] = hidden[C, D] @ weight[V, D].T"""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.dtype.itemsize == 2 and out.dtype == torch.float32 and has_mixed_mm(hidden.device, hidden.dtype):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for block in _vocabulary_blocks(weight):
            out[:, block] = wide @ weight[block].to(out.dtype).t()


def grad_hidden(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[C, D] = dz[C, V] @ weight[V, D]"""
    if dz.dtype == weight.dtype == out.dtype:
        torch.mm(dz, weight, out=out)
        return
    if dz.dtype == weight.dtype and has_mixed_mm(dz.device, dz.dtype):
        torch.mm(dz, weight, out_dtype=out.dtype, out=out)
        return
    wide = torch.promote_types(dz.dtype, out.dtype)
    total = torch.zeros(out.shape, dtype=wide, device=out.device)
    for block in _vocabulary_blocks(weight):
        total.addmm_(dz[:, block].to(wide), weight[block].to(wide))
    out.copy_(total)


def grad_weight(dz: Tensor, hidden: Tensor, out: Tensor, first: bool) -> None:
    """out[V, D] = dz[C, V].T @ hidden[C, D], added to what is there unless this is the first chunk. ``out`` is fp32 or wider."""
    if dz.dtype != hidden.dtype:
        hidden = hidden.to(dz.dtype)
    if out.dtype == dz.dtype:
        if first:
            torch.mm(dz.t(), hidden, out=out)
        else:
            out.addmm_(dz.t(), hidden)
    elif has_mixed_mm(dz.device, dz.dtype):
        if first:
            torch.mm(dz.t(), hidden, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, dz.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for block in _vocabulary_blocks(out):
            product = dz[:, block].to(out.dtype).t() @ wide
            if first:
                out[block] = product
            else:
                out[block] += product
