"""Liger's kernels under Triton's interpreter, which has no libdevice, and leaves as floats what are tensors to a compiled kernel."""

import numpy as np
import pytest
import triton
import triton.language as tl
from liger_kernel.ops import geglu, rms_norm
from triton.runtime import interpreter

__all__ = ["make_ready"]


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


def make_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)
    monkeypatch.setattr(geglu, "tanh", tanh)
    convert = interpreter._implicit_cvt

    def with_floats(value):
        if type(value) is float:
            return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
        return convert(value)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
