"""The operator `fastkd::kd`: the chunk loop, its host checks, and its gradient.

Loss and gradients are computed together in the forward pass: for each chunk of counted tokens two GEMMs write student and teacher logits
into two buffers, the row function turns the student's into dz, two more GEMMs take dz to dX and dW. The backward pass only multiplies by
the upstream gradient and 1 / normalizer, in fp32: folded into dz earlier they would underflow in fp16.

It is a `torch.library.custom_op` so that `torch.compile(fullgraph=True)` sees one node, though counting tokens needs the host. The knobs
come in as one small tensor, so that none of them is a guard.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd_kernels import rows_torch
from fastkd_kernels.divergences import DEFINITIONS
from fastkd_kernels.spec import Head, RowSpec

from . import gemm

__all__ = ["KNOBS", "kd"]

# The knobs' order in the tensor; then the divergence's parameters. A knob that is None has any value there and is named in `absent`.
KNOBS = (
    "temperature",
    "kd_ratio",
    "kd_factor",
    "student_scale",
    "student_softcap",
    "teacher_scale",
    "teacher_softcap",
    "normalizer",
)

# Bytes of the two logit buffers together, and the most tokens a chunk holds: larger chunks gain nothing that was measured (kernels want
# about 1000 rows to fill a GPU; on CPUs the GEMMs are at full speed from about 256 rows).
CHUNK_BYTES = {"cpu": 256 << 20}
CHUNK_BYTES_GPU = 1 << 30
CHUNK_TOKENS = 2048
FP16_BOOST = 64.0  # a gradient of a logit stays far below 65504 / 64


class _Host(NamedTuple):
    """What is known on the host after one read from the device."""

    knobs: dict[str, Any]  # float, or None where absent
    parameters: tuple[float, ...]
    tokens: int
    weight_sum: float
    weight_max: float


def _read_host(labels, token_weight, counted, knobs, absent, divergence, vocabulary, ignore_index, tokens) -> _Host:
    """Read counts, ranges and knobs in one transfer and check them."""
    facts: list[Tensor] = []
    if counted is not None:
        facts.append(counted.sum())
    if labels is not None and labels.numel():
        valid = torch.where(labels == ignore_index, 0, labels)
        facts += [valid.amin(), valid.amax()]
    if token_weight is not None and token_weight.numel():
        w = torch.where(counted, token_weight, 0)
        # A NaN makes the minimum NaN; an infinite weight makes the maximum infinite, counted or not.
        facts += [token_weight.amin(), token_weight.amax(), w.sum(dtype=torch.float64), w.amax()]
    values = [f.to(torch.float64).reshape(1) for f in facts]
    if knobs.device == (values[0].device if values else knobs.device):
        read = torch.cat([*values, knobs]).tolist()
    else:
        read = torch.cat(values).tolist() + knobs.tolist()
    numbers = iter(read)

    if counted is not None:
        tokens = int(next(numbers))
    if labels is not None and labels.numel():
        low, high = int(next(numbers)), int(next(numbers))
        if low < 0 or high >= vocabulary:
            bad = low if low < 0 else high
            raise ValueError(
                f"labels: expected ignore_index ({ignore_index}) or an id in [0, {vocabulary}), the student's vocabulary, got {bad}"
            )
    weight_sum, weight_max = float(tokens), 1.0
    if token_weight is not None and token_weight.numel():
        low, high = next(numbers), next(numbers)
        weight_sum, weight_max = next(numbers), next(numbers)
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(f"token_weight: expected finite values >= 0, got {low if not low >= 0 else high:g}")
    named: dict[str, Any] = {name: next(numbers) for name in KNOBS}
    named.update(dict.fromkeys(absent.split()))
    host = _Host(named, tuple(numbers), tokens, weight_sum, weight_max)
    _check_knobs(host, divergence, labels is not None)
    return host


def _check_knobs(host: _Host, divergence: str, has_labels: bool) -> None:
    knobs = host.knobs
    if not (knobs["temperature"] > 0 and math.isfinite(knobs["temperature"])):
        raise ValueError(f"temperature: expected a finite number > 0, got {knobs['temperature']:g}")
    if not 0 <= knobs["kd_ratio"] <= 1:
        raise ValueError(f"kd_ratio: expected a number in [0, 1], got {knobs['kd_ratio']:g}")
    if knobs["kd_ratio"] < 1 and not has_labels:
        raise ValueError(f"labels: kd_ratio = {knobs['kd_ratio']:g} < 1 adds a cross-entropy term, which needs labels, got None")
    for side, argument in (("student", "student_"), ("teacher", "teacher.")):
        scale, cap = knobs[f"{side}_scale"], knobs[f"{side}_softcap"]
        if not math.isfinite(scale):
            raise ValueError(f"{argument}scale: expected a finite number, got {scale:g}")
        if cap is not None and not (cap > 0 and math.isfinite(cap)):
            raise ValueError(f"{argument}softcap: expected a finite number > 0 or None, got {cap:g}")
    for parameter, value in zip(DEFINITIONS[divergence].parameters, host.parameters, strict=True):
        if not parameter.contains(value):
            raise ValueError(f"divergence {divergence!r}: expected {parameter.name} in {parameter.domain}, got {value:g}")
    normalizer = knobs["normalizer"]
    if host.tokens and normalizer is not None and not (0 < normalizer < math.inf):
        raise ValueError(f"normalizer: expected a finite number > 0, got {normalizer:g}")


def _row_spec(host: _Host, divergence: str) -> RowSpec:
    knobs = host.knobs
    a, b = (*host.parameters, 0.0, 0.0)[:2]

    def head(side: str) -> Head:
        return Head(knobs[f"{side}_softcap"], knobs[f"{side}_scale"])

    return RowSpec(
        DEFINITIONS[divergence].at(host.parameters),
        a,
        b,
        temperature=knobs["temperature"],
        kd_factor=knobs["temperature"] ** 2 if knobs["kd_factor"] else 1.0,
        kd_share=knobs["kd_ratio"],
        ce_share=1.0 - knobs["kd_ratio"],
        student=head("student"),
        teacher=head("teacher"),
    )


def _chunk_size(tokens: int, bytes_per_token: int, device: torch.device, chunk_tokens: int) -> int:
    """Balanced chunks: their number first, from the budget, then equal sizes."""
    most = chunk_tokens
    if most <= 0:
        budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES_GPU)
        most = min(CHUNK_TOKENS, max(64, budget // max(1, bytes_per_token)))
    return math.ceil(tokens / math.ceil(tokens / most))


def _gather(x: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """The rows of a chunk; of ``[N]``, ``[N, D]``, or a tensor of more dimensions, whose leading ones do not flatten without a copy."""
    if x.ndim <= 2:
        return x[part] if rows is None else x.index_select(0, rows[part])
    index = torch.arange(part.start, part.stop, device=x.device) if rows is None else rows[part]
    return x[torch.unravel_index(index, x.shape[:-1])]


@torch.library.custom_op("fastkd::kd", mutates_args=())
def kd(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    knobs: Tensor,
    absent: str,
    divergence: str,
    impl: str,
    ignore_index: int,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    need_student: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, parts and unscaled gradients of N tokens.

    Args:
        student: ``[N, D_s]`` hidden states, or, with ``weight`` None, ``[N, V_s]`` logits. ``teacher`` likewise. Tensors that do not
            flatten without a copy, such as ``logits[:, :-1]``, keep their leading dimensions: rows are gathered chunk by chunk.
        knobs: float64, `KNOBS` and then the divergence's parameters, on the host or on the device. absent: those that are None.
        need_*: which gradients to compute.

    Returns:
        loss [], tokens [] int64, mean kd [], mean ce [], kd [N], ce [N], d_student, d_weight (fp32), d_bias (fp32), scale []: the gradients
        are ``scale`` times these; one that is not needed is empty.
    """
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        return _kd(student, weight, bias, teacher, teacher_weight, teacher_bias, labels, token_weight, knobs, absent, divergence, impl,
                   ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias)  # fmt: skip


def _kd(
    student, weight, bias, teacher, teacher_weight, teacher_bias, labels, token_weight, knobs, absent, divergence, impl,
    ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias,
):  # fmt: skip
    total = student.shape[:-1].numel()
    vocabulary = student.shape[-1] if weight is None else weight.shape[0]
    compute = torch.promote_types(student.dtype, torch.float32)
    counted = _counted(labels, token_weight, ignore_index)
    host = _read_host(labels, token_weight, counted, knobs, absent, divergence, vocabulary, ignore_index, total)
    spec = _row_spec(host, divergence)
    out = _Outputs(student, weight, bias, compute, need_student, need_weight, need_bias)
    n = host.tokens
    normalizer = host.weight_sum if host.knobs["normalizer"] is None else host.knobs["normalizer"]
    # fp16 gradients wait for the backward pass as a multiple: most of a softmax over a large vocabulary would be flushed to 0.
    boost = FP16_BOOST if student.dtype == torch.float16 else 1.0
    out.scale.fill_(host.weight_max / normalizer / boost if n else 0.0)
    out.tokens.fill_(n)
    for share, mean in ((spec.kd_share, out.kd_mean), (spec.ce_share, out.ce_mean)):
        mean.fill_(math.nan if share == 0 else 0.0)
    if not n:
        return out.clear().as_tuple()

    # The counted tokens first, in order: a stable sort of the mask puts them there without asking the device for their number again.
    rows = None if counted is None or n == total else torch.argsort(counted, descending=True, stable=True)[:n]
    if rows is not None:
        out.d_student.zero_()
    every = slice(0, n)
    row_weight = torch.ones(n, dtype=compute, device=student.device)
    if token_weight is not None:
        row_weight = _gather(token_weight, rows, every)
        row_weight = (row_weight.to(torch.promote_types(row_weight.dtype, compute)) / host.weight_max).to(compute)
    targets = None if labels is None or spec.ce_share == 0 else _gather(labels, rows, every)
    kd_values = torch.empty(n, dtype=compute, device=student.device) if spec.kd_share > 0 else None
    ce_values = torch.empty(n, dtype=compute, device=student.device) if targets is not None else None

    chunks = _Chunks(student, weight, teacher if kd_values is not None else None, teacher_weight, vocabulary, n, chunk_tokens, logits_dtype)
    row_losses = _row_function(impl)
    shared_bias = None if teacher_bias is None else teacher_bias[: chunks.shared]
    for start in range(0, n, chunks.size):
        part = slice(start, min(start + chunks.size, n))
        x = _gather(student, rows, part)
        zs, dz = chunks.student_buffers(x, out, rows is None, part)
        if weight is not None:
            gemm.logits(x, weight, zs)
        zt = None if kd_values is None else chunks.teacher_logits(_gather(teacher, rows, part), teacher_weight)
        row_losses(
            zs, zt, None if targets is None else targets[part], row_weight[part] * boost, spec,
            dz=dz,
            kd=None if kd_values is None else kd_values[part],
            ce=None if ce_values is None else ce_values[part],
            student_bias=bias, teacher_bias=shared_bias,
        )  # fmt: skip
        if dz is not None:
            out.accumulate(dz, x, weight, rows, part, first=start == 0)

    loss = torch.zeros((), dtype=torch.float64, device=student.device)
    for values, share, target, mean in (
        (kd_values, spec.kd_share, out.kd, out.kd_mean),
        (ce_values, spec.ce_share, out.ce, out.ce_mean),
    ):
        if values is not None:
            loss += share * (row_weight * values).sum(dtype=torch.float64)
            mean.copy_(values.sum(dtype=torch.float64) / n)
        else:
            values = torch.full((n,), math.nan, dtype=compute, device=student.device)
        target.copy_(values) if rows is None else target.index_copy_(0, rows, values)
    out.loss.copy_(loss * (host.weight_max / normalizer))
    return out.as_tuple()


def _counted(labels: Tensor | None, token_weight: Tensor | None, ignore_index: int) -> Tensor | None:
    if labels is None:
        return None if token_weight is None else token_weight > 0
    return labels != ignore_index if token_weight is None else (labels != ignore_index) & (token_weight > 0)


def _row_function(impl: str):
    if impl == "torch":
        return rows_torch.row_losses
    from fastkd_kernels import rows  # needs Triton

    return rows.row_losses


class _Outputs:
    """The operator's outputs. The large ones are not initialised: the first chunk overwrites them."""

    def __init__(self, student, weight, bias, compute, need_student, need_weight, need_bias):
        n = student.shape[:-1].numel()
        new = student.new_zeros
        self.loss, self.scale = new((), dtype=compute), new((), dtype=compute)
        self.tokens = new((), dtype=torch.int64)
        self.kd_mean, self.ce_mean = new((), dtype=compute), new((), dtype=compute)
        self.kd, self.ce = new(n, dtype=compute), new(n, dtype=compute)
        self.d_student = student.new_empty((n, student.shape[-1]) if need_student else 0)
        self.d_weight = student.new_empty(weight.shape if need_weight else 0, dtype=compute)
        self.d_bias = new(bias.shape if need_bias else 0, dtype=compute)
        self.need_student, self.need_weight, self.need_bias = need_student, need_weight, need_bias

    def clear(self):
        self.d_student.zero_()
        self.d_weight.zero_()
        return self

    @property
    def need_dz(self) -> bool:
        return self.need_student or self.need_weight or self.need_bias

    def accumulate(self, dz, x, weight, rows, part, first):
        if self.need_student:
            if weight is None:
                if rows is not None:
                    self.d_student.index_copy_(0, rows[part], dz.to(self.d_student.dtype))
            elif rows is None:
                gemm.grad_hidden(dz, weight, self.d_student[part])
            else:
                dx = torch.empty_like(x)
                gemm.grad_hidden(dz, weight, dx)
                self.d_student.index_copy_(0, rows[part], dx)
        if self.need_weight:
            gemm.grad_weight(dz, x, self.d_weight, first)
        if self.need_bias:
            self.d_bias += dz.sum(0, dtype=self.d_bias.dtype)

    def as_tuple(self):
        return self.loss, self.tokens, self.kd_mean, self.ce_mean, self.kd, self.ce, self.d_student, self.d_weight, self.d_bias, self.scale


class _Chunks:
    """Two buffers of logits, allocated once, and what is written into them."""

    def __init__(self, student, weight, teacher, teacher_weight, vocabulary, tokens, chunk_tokens, logits_dtype):
        teacher_width = 0
        if teacher is not None:
            teacher_width = teacher.shape[-1] if teacher_weight is None else teacher_weight.shape[0]
        self.shared = min(vocabulary, teacher_width)
        item = logits_dtype.itemsize
        width = (vocabulary if weight is not None else 0) + (self.shared if teacher_weight is not None else 0)
        self.size = _chunk_size(tokens, item * max(width, vocabulary), student.device, chunk_tokens)
        self.student = self.teacher = None
        if weight is not None:
            self.student = torch.empty(self.size, vocabulary, dtype=logits_dtype, device=student.device)
        if teacher is not None and teacher_weight is not None:
            self.teacher = torch.empty(self.size, self.shared, dtype=logits_dtype, device=student.device)

    def student_buffers(self, x: Tensor, out: _Outputs, whole: bool, part: slice) -> tuple[Tensor, Tensor | None]:
        """(logits, dz) of a chunk; dz overwrites the logits where they are ours."""
        if self.student is None:  # the caller's own logits: never overwritten, unless x is already a gathered copy
            return x, (None if not out.need_dz else out.d_student[part] if whole else x)
        zs = self.student[: x.shape[0]]
        if not out.need_dz:
            return zs, None
        if zs.dtype == x.dtype or x.device.type == "cpu" or not gemm.has_mixed_mm(x.device, x.dtype):
            return zs, zs
        # dz in the operands' dtype for the two GEMMs to come, in the first half of each row.
        return zs, zs.view(x.dtype)[:, : zs.shape[1]]

    def teacher_logits(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if self.teacher is None or weight is None:
            return x[:, : self.shared]
        zt = self.teacher[: x.shape[0]]
        gemm.logits(x, weight[: self.shared], zt)
        return zt


@kd.register_fake
def _(
    student, weight, bias, teacher, teacher_weight, teacher_bias, labels, token_weight, knobs, absent, divergence, impl,
    ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias,
):  # fmt: skip
    return _Outputs(
        student, weight, bias, torch.promote_types(student.dtype, torch.float32), need_student, need_weight, need_bias
    ).as_tuple()


@torch.library.custom_op("fastkd::scaled", mutates_args=())
def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * scale`` in ``dtype``, the product in the dtype of ``scale`` (fp32 or wider), block by block, out of place."""
    out = torch.empty_like(gradient, dtype=dtype)
    flat, flat_out = gradient.view(-1), out.view(-1)
    step = 1 << 24
    for start in range(0, flat.numel(), step):
        block = flat[start : start + step]
        torch.mul(block.to(scale.dtype), scale, out=flat_out[start : start + step])
    return out


@scaled.register_fake
def _(gradient, scale, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else the unused outputs' gradients come as zeros, as large as the outputs
    student, weight, bias = inputs[:3]
    *_, d_student, d_weight, d_bias, scale = output
    ctx.save_for_backward(d_student, d_weight, d_bias, scale)
    ctx.needed = inputs[-3:]
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (student, weight, bias))
    ctx.shapes = tuple(None if t is None else t.shape for t in (student, weight, bias))
    ctx.inputs = len(inputs)


def _backward(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * ctx.inputs
    *gradients, scale = ctx.saved_tensors
    scale = torch.where(scale == 0, 0.0, scale * d_loss)  # no counted token: 0, whatever comes from above
    found = [
        scaled(gradient, scale, dtype).view(shape) if needed else None
        for gradient, needed, dtype, shape in zip(gradients, ctx.needed, ctx.dtypes, ctx.shapes, strict=True)
    ]
    return (*found, *[None] * (ctx.inputs - 3))


kd.register_autograd(_backward, setup_context=_setup_context)
