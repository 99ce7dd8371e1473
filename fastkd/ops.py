"""The operator `fastkd::kd`: the chunk loop, its host checks, and its gradient.

Loss and gradients are computed together in the forward pass: for each chunk of counted tokens two GEMMs write student and teacher logits
into two buffers, the row function turns the student's into dz, two more GEMMs take dz to dX and dW (on a GPU, that of several chunks, see
`_Chunks`). The backward pass only multiplies by
the upstream gradient and 1 / normalizer, in fp32: folded into dz earlier they would underflow in fp16.

It is a `torch.library.custom_op` so that `torch.compile(fullgraph=True)` sees one node, though counting tokens needs the host. The knobs
come in as one small tensor, so that none of them is a guard.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd_kernels import rows_torch, topk_torch
from fastkd_kernels.divergences import DEFINITIONS
from fastkd_kernels.spec import Head, RowSpec

from . import chunking, gemm

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
    "teacher_temperature",
    "teacher_share",
    "normalizer",
)

FP16_BOOST = 64.0  # a gradient of a logit, and its products with the head, stay below 65504 / 64
CHECK_ELEMENTS = 1 << 17  # of [N, K] lists that are checked at a time


class _TopK(NamedTuple):
    """A sparse teacher: ids and log-probabilities, ``[N, K]`` or with their leading dimensions, and the log of the rest, ``[N]``."""

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None

    @property
    def tolerance(self) -> float:
        """How far a sum of probabilities may be from 1: a softmax in fp32 with large logits, or rounding to 16 bits."""
        return max(1e-3, 8 * torch.finfo(self.log_probs.dtype).eps)


class _Host(NamedTuple):
    """What is known on the host after one read from the device."""

    knobs: dict[str, Any]  # float, or None where absent
    parameters: tuple[float, ...]
    tokens: int
    weight_sum: float
    weight_max: float


def _read_host(labels, token_weight, counted, top, has_teacher, knobs, absent, divergence, vocabulary, ignore_index, tokens) -> _Host:
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
    if top is not None and tokens:
        facts += _top_facts(top, counted, tokens)
    values = [f.to(torch.float64).reshape(1) for f in facts]
    if knobs.device == (values[0].device if values else knobs.device):
        read = torch.cat([*values, knobs]).tolist()
    else:
        read = torch.cat(values).tolist() + knobs.tolist()
    numbers = iter(read)
    total = tokens

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
    if top is not None and total:
        _check_top(top, [next(numbers) for _ in TOP_FACTS], vocabulary)
    named: dict[str, Any] = {name: next(numbers) for name in KNOBS}
    named.update(dict.fromkeys(absent.split()))
    host = _Host(named, tuple(numbers), tokens, weight_sum, weight_max)
    _check_knobs(host, divergence, labels is not None, has_teacher, top is not None)
    return host


TOP_FACTS = ("least id", "largest id", "an id that came twice, or -1", "largest log-probability", "least sum", "largest sum")


def _top_facts(top: _TopK, counted: Tensor | None, tokens: int) -> list[Tensor]:
    """`TOP_FACTS` over the counted rows; of blocks of rows, since N x K elements may be many."""
    width = top.ids.shape[-1]
    step = max(1, CHECK_ELEMENTS // width)
    blocks = []
    # Each padding entry is a negative id of its own: none is a duplicate.
    own = -1 - torch.arange(width, device=top.ids.device)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        ids, log_probs = _gather(top.ids, None, part), _gather(top.log_probs, None, part)
        if counted is not None:
            ids = ids.masked_fill(~counted[part, None], 0)
            log_probs = log_probs.masked_fill(~counted[part, None], -math.inf)
        mass = log_probs.double().exp().sum(-1)
        if top.log_tail is not None:
            mass += top.log_tail[part].double().exp()
            mass = mass if counted is None else mass.masked_fill(~counted[part], 1.0)
        listed = torch.where(log_probs == -math.inf, own, ids).sort(-1).values
        twice = torch.where(listed[:, 1:] == listed[:, :-1], listed[:, 1:], -1)
        found = [ids.amin(), ids.amax(), twice.amax() if width > 1 else own[0], log_probs.amax(), mass.amin(), mass.amax()]
        blocks.append(torch.stack([f.to(torch.float64) for f in found]))
    least, most = torch.stack(blocks).amin(0), torch.stack(blocks).amax(0)
    return [least[0], most[1], most[2], most[3], least[4], most[5]]


def _check_top(top: _TopK, facts: list[float], vocabulary: int) -> None:
    low, high, twice, log_prob, least, most = facts
    tolerance = top.tolerance
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(f"teacher.ids: expected ids in [0, {vocabulary}), the student's vocabulary, got {bad:.0f}")
    if twice >= 0:
        raise ValueError(f"teacher.ids: expected distinct ids in each row (but for entries of log-probability -inf), got {twice:.0f} twice")
    if not log_prob <= tolerance:
        raise ValueError(f"teacher.log_probs: expected log-probabilities <= 0, got {log_prob:g}")
    if top.log_tail is None:
        if not most <= 1 + tolerance:
            raise ValueError(f"teacher.log_probs: expected probabilities whose sum is at most 1 in each row, got a sum of {most:g}")
    elif not (least >= 1 - tolerance and most <= 1 + tolerance):
        bad = least if not least >= 1 - tolerance else most
        raise ValueError(f"teacher.log_tail: expected the rest's mass, which makes the sum of each row 1, got a sum of {bad:g}")


def _check_knobs(host: _Host, divergence: str, has_labels: bool, has_teacher: bool, sparse: bool) -> None:
    knobs = host.knobs
    if not (knobs["temperature"] > 0 and math.isfinite(knobs["temperature"])):
        raise ValueError(f"temperature: expected a finite number > 0, got {knobs['temperature']:g}")
    if not 0 <= knobs["kd_ratio"] <= 1:
        raise ValueError(f"kd_ratio: expected a number in [0, 1], got {knobs['kd_ratio']:g}")
    if knobs["kd_ratio"] < 1 and not has_labels:
        raise ValueError(f"labels: kd_ratio = {knobs['kd_ratio']:g} < 1 adds a cross-entropy term, which needs labels, got None")
    if knobs["kd_ratio"] > 0 and not has_teacher:
        raise ValueError(f"teacher: kd_ratio = {knobs['kd_ratio']:g} > 0 adds a divergence term, which needs a teacher, got None")
    if sparse and not math.isclose(knobs["temperature"], knobs["teacher_temperature"], rel_tol=1e-6):  # an fp32 tensor is as close
        raise ValueError(
            f"temperature: expected {knobs['teacher_temperature']:g}, the teacher.temperature at which TeacherTopK's log_probs were taken,"
            f" got {knobs['temperature']:g}"
        )
    for side, argument in (("student", "student_"), ("teacher", "teacher.")):
        scale, cap = knobs[f"{side}_scale"], knobs[f"{side}_softcap"]
        if not math.isfinite(scale):
            raise ValueError(f"{argument}scale: expected a finite number, got {scale:g}")
        if cap is not None and not (cap > 0 and math.isfinite(cap)):
            raise ValueError(f"{argument}softcap: expected a finite number > 0 or None, got {cap:g}")
    share = knobs["teacher_share"]
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"teacher.share: expected a number in [0, 1], got {share:g}")
    for parameter, value in zip(DEFINITIONS[divergence].parameters, host.parameters, strict=True):
        if not parameter.contains(value):
            raise ValueError(f"divergence {divergence!r}: expected {parameter.name} in {parameter.domain}, got {value:g}")
    if sparse and (tail := DEFINITIONS[divergence].tail) is not None and not tail[1](*host.parameters):
        came = ", ".join(f"{p.name} = {v:g}" for p, v in zip(DEFINITIONS[divergence].parameters, host.parameters, strict=True))
        raise ValueError(
            f"divergence {divergence!r}: with TeacherTopK expected {tail[0]}, got {came}: otherwise a tail bucket does not stand for the"
            " tokens in it"
        )
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
        target_share=1.0 if knobs["teacher_share"] is None else knobs["teacher_share"],
    )


def _writes_narrow(student: Tensor, logits_dtype: torch.dtype) -> bool:
    """Whether dz is written in the operands' 16 bits, narrower than the logits."""
    return logits_dtype != student.dtype and student.device.type != "cpu" and gemm.has_mixed_mm(student.device, student.dtype)


def _parts(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


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
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_ids: Tensor | None,
    teacher_tail: Tensor | None,
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
        teacher_ids: ``[N, K]``; ``teacher`` is then their log-probabilities, ``[N, K]``, and teacher_tail the log of the rest, ``[N]``.
            teacher is None where there is none: kd_ratio must be 0.
        knobs: float64, `KNOBS` and then the divergence's parameters, on the host or on the device. absent: those that are None.
        need_*: which gradients to compute.

    Returns:
        loss [], tokens [] int64, mean kd [], mean ce [], kd [N], ce [N], d_student, d_weight (fp32), d_bias (fp32), scale []: the gradients
        are ``scale`` times these; one that is not needed is empty.
    """
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        return _kd(student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_ids, teacher_tail, labels, token_weight, knobs,
                   absent, divergence, impl, ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias)  # fmt: skip


def _kd(
    student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_ids, teacher_tail, labels, token_weight, knobs,
    absent, divergence, impl, ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias,
):  # fmt: skip
    total = student.shape[:-1].numel()
    vocabulary = student.shape[-1] if weight is None else weight.shape[0]
    compute = torch.promote_types(student.dtype, torch.float32)
    counted = _counted(labels, token_weight, ignore_index)
    top = None if teacher is None or teacher_ids is None else _TopK(teacher_ids, teacher, teacher_tail)
    host = _read_host(
        labels, token_weight, counted, top, teacher is not None, knobs, absent, divergence, vocabulary, ignore_index, total
    )  # fmt: skip
    out = _Outputs(student, weight, bias, compute, need_student, need_weight, need_bias)
    call = _prepare(host, _row_spec(host, divergence), out, student, labels, token_weight, counted)
    if not host.tokens:
        return out.clear().as_tuple()
    n, spec, rows, targets, kd_values, ce_values = host.tokens, call.spec, call.rows, call.targets, call.kd, call.ce

    dense = teacher if kd_values is not None and top is None else None
    chunks = _Chunks(student, weight, dense, teacher_weight, vocabulary, n, chunk_tokens, logits_dtype, apart=out.need_dz)
    shared_bias = None if teacher_bias is None else teacher_bias[: chunks.shared]
    for group in _parts(0, n, chunks.group):
        group_x, group_dz = _gather(student, rows, group), None
        for part in _parts(group.start, group.stop, chunks.size):
            x = group_x[part.start - group.start : part.stop - group.start]
            zs, dz = chunks.student_buffers(x, out, rows is None, part, part.start - group.start)
            if weight is not None:
                gemm.logits(x, weight, zs)
            w = call.row_weight[part]
            y, kd_out, ce_out = (None if t is None else t[part] for t in (targets, kd_values, ce_values))
            if top is not None and kd_values is not None:
                ids, log_probs = _gather(top.ids, rows, part), _gather(top.log_probs, rows, part)
                log_tail = None if top.log_tail is None else _gather(top.log_tail, rows, part)
                _topk_function(impl)(zs, ids, log_probs, log_tail, y, w, spec, dz=dz, kd=kd_out, ce=ce_out, student_bias=bias)
            else:
                zt = None if dense is None else chunks.teacher_logits(_gather(dense, rows, part), teacher_weight)
                _row_function(impl)(zs, zt, y, w, spec, dz=dz, kd=kd_out, ce=ce_out, student_bias=bias, teacher_bias=shared_bias)
            group_dz = dz if chunks.gradients is None else chunks.gradients[: group.stop - group.start]
        if group_dz is not None:
            out.accumulate(group_dz, group_x, weight, rows, group, first=group.start == 0)

    return _finish(host, call, out)


class _Call(NamedTuple):
    """The counted tokens of a call, n of them."""

    spec: RowSpec
    rows: Tensor | None  # [n] their indices, in order; None where all count
    row_weight: Tensor  # [n], what weighs a row's gradient: at most `boost`
    boost: float
    targets: Tensor | None  # [n]
    kd: Tensor | None  # [n] each, nats, to be written; None where not asked for
    ce: Tensor | None


def _normalizer(host: _Host) -> float:
    return host.weight_sum if host.knobs["normalizer"] is None else host.knobs["normalizer"]


def _prepare(host: _Host, spec: RowSpec, out: "_Outputs", student, labels, token_weight, counted) -> _Call:
    """Write the outputs that the chunks do not, and gather what is small of the counted tokens."""
    n, compute = host.tokens, out.loss.dtype
    # fp16 gradients wait for the backward pass as a multiple: most of a softmax over a large vocabulary would be flushed to 0.
    boost = _fp16_boost(spec) if student.dtype == torch.float16 else 1.0
    out.scale.fill_(host.weight_max / _normalizer(host) / boost if n else 0.0)
    out.tokens.fill_(n)
    for share, mean in ((spec.kd_share, out.kd_mean), (spec.ce_share, out.ce_mean)):
        mean.fill_(math.nan if share == 0 else 0.0)
    # The counted tokens first, in order: a stable sort of the mask puts them there without asking the device for their number again.
    rows = None if counted is None or n == counted.numel() else torch.argsort(counted, descending=True, stable=True)[:n]
    if rows is not None:
        out.d_student.zero_()
    every = slice(0, n)
    row_weight = torch.full((n,), boost, dtype=compute, device=student.device)
    if token_weight is not None:
        w = _gather(token_weight, rows, every)
        row_weight *= (w.to(torch.promote_types(w.dtype, compute)) / host.weight_max).to(compute)
    targets = None if labels is None or spec.ce_share == 0 else _gather(labels, rows, every)
    kd = torch.empty(n, dtype=compute, device=student.device) if spec.kd_share > 0 else None
    ce = torch.empty(n, dtype=compute, device=student.device) if targets is not None else None
    return _Call(spec, rows, row_weight, boost, targets, kd, ce)


def _fp16_boost(spec: RowSpec) -> float:
    """`FP16_BOOST`, and what makes up for factors that are small, such as 1 / temperature without its square."""
    factor = (spec.kd_share * spec.kd_factor / spec.temperature + spec.ce_share) * abs(spec.student.scale)
    return FP16_BOOST * 2.0 ** math.floor(-math.log2(min(factor, 1.0) or 1.0))


def _finish(host: _Host, call: _Call, out: "_Outputs"):
    """From the terms of each token to the loss and its parts."""
    loss = torch.zeros((), dtype=torch.float64, device=call.row_weight.device)
    for values, share, target, mean in (
        (call.kd, call.spec.kd_share, out.kd, out.kd_mean),
        (call.ce, call.spec.ce_share, out.ce, out.ce_mean),
    ):
        if values is not None:
            loss += share * (call.row_weight * values).sum(dtype=torch.float64)
            mean.copy_(values.sum(dtype=torch.float64) / host.tokens)
        else:
            values = torch.full_like(call.row_weight, math.nan)
        target.copy_(values) if call.rows is None else target.index_copy_(0, call.rows, values)
    out.loss.copy_(loss * (host.weight_max / _normalizer(host) / call.boost))
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


def _topk_function(impl: str):
    if impl == "torch":
        return topk_torch.row_losses
    from fastkd_kernels import topk  # needs Triton

    return topk.row_losses


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
        self.accumulate_head(dz, x, first)

    def accumulate_head(self, dz, x, first):
        if self.need_weight:
            gemm.grad_weight(dz, x, self.d_weight, first)
        if self.need_bias:
            self.d_bias += dz.sum(0, dtype=self.d_bias.dtype)

    def as_tuple(self):
        return self.loss, self.tokens, self.kd_mean, self.ce_mean, self.kd, self.ce, self.d_student, self.d_weight, self.d_bias, self.scale


class _Chunks:
    """Buffers of logits, allocated once, and what is written into them.

    Where the products take 16-bit operands and logits are fp32, dz is written apart, for a group of several chunks: dX and dW are then
    one product a group. dW in fp32 is read and written less often, and the buffers together are half of those of a chunk as large.
    Elsewhere dz overwrites the logits, and a group is a chunk.
    """

    def __init__(self, student, weight, teacher, teacher_weight, vocabulary, tokens, chunk_tokens, logits_dtype, apart=False):
        teacher_width = 0
        if teacher is not None:
            teacher_width = teacher.shape[-1] if teacher_weight is None else teacher_weight.shape[0]
        self.shared = min(vocabulary, teacher_width)
        device = student.device
        width = (vocabulary if weight is not None else 0) + (self.shared if teacher_weight is not None else 0)
        per_token = logits_dtype.itemsize * max(width, vocabulary)
        narrow = apart and weight is not None and _writes_narrow(student, logits_dtype)
        dz_bytes = student.element_size() * vocabulary if narrow else 0
        self.size, self.group = chunking.chunk_and_group(tokens, per_token, dz_bytes, device, chunk_tokens)
        self.student = self.teacher = self.gradients = None
        if self.size < self.group:
            self.gradients = torch.empty(self.group, vocabulary, dtype=student.dtype, device=device)
        if weight is not None:
            self.student = torch.empty(self.size, vocabulary, dtype=logits_dtype, device=device)
        if teacher is not None and teacher_weight is not None:
            self.teacher = torch.empty(self.size, self.shared, dtype=logits_dtype, device=device)

    def student_buffers(self, x: Tensor, out: _Outputs, whole: bool, part: slice, offset: int = 0) -> tuple[Tensor, Tensor | None]:
        """(logits, dz) of a chunk, ``offset`` tokens into its group."""
        if self.student is None:  # the caller's own logits: never overwritten, unless x is already a gathered copy
            return x, (None if not out.need_dz else out.d_student[part] if whole else x)
        zs = self.student[: x.shape[0]]
        if not out.need_dz:
            return zs, None
        if self.gradients is not None:
            return zs, self.gradients[offset : offset + x.shape[0]]
        # dz in the operands' dtype for the two GEMMs to come, in the first half of each row.
        return zs, zs.view(x.dtype)[:, : zs.shape[1]] if _writes_narrow(x, zs.dtype) else zs

    def teacher_logits(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if self.teacher is None or weight is None:
            return x[:, : self.shared]
        zt = self.teacher[: x.shape[0]]
        gemm.logits(x, weight[: self.shared], zt)
        return zt


@kd.register_fake
def _(
    student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_ids, teacher_tail, labels, token_weight, knobs,
    absent, divergence, impl, ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias,
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


def _refuse_double_backward(ctx, gradient):
    raise RuntimeError(
        "double backward through fastkd's losses is not supported: they compute their gradients in the forward pass, without a graph of"
        " their own; for second derivatives of a small problem differentiate fastkd.reference.reference_linear_kd"
    )


scaled.register_autograd(_refuse_double_backward)


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
