"""`vocab_parallel_linear_kd`: the loss of heads whose vocabulary is spread over the ranks of a process group.

The chunk loop is that of `ops`, in step on all ranks: each multiplies its slices of both heads and takes its part of the row arithmetic
(`fastkd_kernels.rows_parallel_torch`). Between ranks travel, in each chunk, a few numbers per token and the sum of their parts of dX.
"""

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd_kernels import rows_parallel_torch

from . import chunking, functional, gemm, ops
from .functional import Divergence, Number
from .signals import TeacherHidden, TeacherInterpolated

__all__ = ["vocab_parallel_linear_kd"]


def vocab_parallel_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TeacherHidden | TeacherInterpolated | None,
    labels: Tensor | None = None,
    *,
    group: "dist.ProcessGroup | None" = None,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    temperature_squared: bool = True,
    kd_ratio: Number = 1.0,
    token_weight: Tensor | None = None,
    normalizer: Number | None = None,
    student_bias: Tensor | None = None,
    student_softcap: Number | None = None,
    student_scale: Number = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    return_parts: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> Any:
    """`fused_linear_kd` where each rank of a group holds consecutive rows of both heads, in the order of ranks (tensor parallelism).

    All ranks call it together, with the same hidden states, labels, weights and settings, and all get the same loss. They first compare
    what must agree (three reads from the device per call). In each chunk of tokens they then exchange at most 8 numbers per token
    (adaptive_kl: 44, in 37 steps; twice as many in float64) and sum dX, ``[chunk, D_s]`` in fp32 or wider. Nothing that travels grows with
    the vocabulary. The row arithmetic is torch's on every device.

    The gradients are those of the one loss, complete on every rank: ``student_hidden``'s is already summed over the group, and must not be
    summed by what comes before the head once more (as Megatron's ``copy_to_tensor_model_parallel_region`` would), ``student_weight``'s is
    its slice's. Every rank must call backward with the same upstream gradient.

    Args:
        student_hidden: ``[..., D_s]``, the same on all ranks.
        student_weight: ``[V_local, D_s]``, this rank's rows of the head; of a DTensor with ``Shard(0)``, its ``to_local()``. Slices may
            differ in size, none may be empty. V_s is their sum.
        teacher: `TeacherHidden` with this rank's rows of the teacher's head as weight and bias, or a `TeacherInterpolated` of one. Each
            rank's slices of both heads must cover the same ids of the shared vocabulary, ids < min(V_s, V_t): cut the teacher's head where
            the student's is cut; what only one of them has follows on the last rank.
        labels: ids of the whole vocabulary, in [0, V_s).
        group: default: all processes.
        student_bias: ``[V_local]``.
        chunk_tokens: default: from the memory budget of the rank with the largest slices.
        The others and the return value are those of `fused_linear_kd`. Inside torch.compile wrap it in `torch.compiler.disable`.

    Raises:
        ValueError, TypeError: as `fused_linear_kd`, on every rank when on one, an exception of another kind as a ValueError that names it
            (but a ``student_hidden`` that is no tensor is refused where it is: nothing tells how to reach the others); or where ranks
            differ in shapes, dtypes, settings or what needs a gradient (the values of tensors are taken on trust), or their slices do
            not match.

    Source: Megatron-LM (arXiv 1909.08053), section 3, which spreads the cross-entropy of a head in this way.
    """
    ranks = _Ranks(group)
    if not isinstance(student_hidden, Tensor):
        raise TypeError(f"student_hidden: expected a tensor, got {type(student_hidden).__name__}")
    arguments: tuple = ()
    refused, facts, sizes = None, {}, (0, 0)
    try:
        inner = teacher.teacher if isinstance(teacher, TeacherInterpolated) else teacher
        if not isinstance(inner, TeacherHidden | None):
            raise TypeError(f"teacher: expected TeacherHidden, TeacherInterpolated of one, or None, got {type(inner).__name__}")
        given = {"student_weight": student_weight, "student_bias": student_bias}
        if inner is not None:
            given |= {"teacher.weight": inner.weight, "teacher.bias": inner.bias}
        for name, tensor in given.items():
            if hasattr(tensor, "to_local"):  # `_arguments` would gather a DTensor
                raise TypeError(f"{name}: expected this rank's slice as a plain tensor, got a {type(tensor).__name__}; pass its to_local()")
        hidden, weight = functional._student_tensors(student_hidden, student_weight, student_bias)
        arguments = functional._arguments(
            hidden, weight, student_bias, teacher, labels,
            divergence=divergence, temperature=temperature, temperature_squared=temperature_squared, kd_ratio=kd_ratio,
            token_weight=token_weight, normalizer=normalizer, student_softcap=student_softcap, student_scale=student_scale,
            ignore_index=ignore_index, chunk_tokens=chunk_tokens, impl="torch", logits_dtype=logits_dtype,
        )  # fmt: skip
        facts = _facts(*arguments)
        sizes = (weight.shape[0], 0 if inner is None else inner.weight.shape[0])
    except Exception as error:  # whatever it is, the others must not wait for this rank
        refused = error
    every = ranks.agree(student_hidden.device, refused, facts, sizes)
    slices = _Slices([s for s, _ in every], [t for _, t in every], ranks.rank)
    return functional._result(_ParallelKD.apply(ranks, slices, *arguments), student_hidden.shape[:-1], return_parts)


def _facts(
    student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_ids, teacher_tail, labels, token_weight, knobs,
    absent, divergence, impl, ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias,
) -> dict[str, Any]:  # fmt: skip
    """What must be the same on all ranks, by the name that an error gives it."""
    return {
        "student_hidden": (list(student.shape), str(student.dtype)),
        "student_bias": "absent" if bias is None else "given",
        "teacher": "absent" if teacher is None else (list(teacher.shape), str(teacher.dtype)),
        "teacher.bias": "absent" if teacher_bias is None else "given",
        "labels": "absent" if labels is None else "given",
        "token_weight": "absent" if token_weight is None else "given",
        "divergence": divergence,
        "ignore_index": ignore_index,
        "chunk_tokens": chunk_tokens,
        "logits_dtype": str(logits_dtype),
        "student_hidden.requires_grad": need_student,
        "student_weight.requires_grad": need_weight,
        "student_bias.requires_grad": need_bias,
    }


class _Slices:
    """Which ids each rank holds of both heads."""

    def __init__(self, student: list[int], teacher: list[int], rank: int):
        self.vocabulary, shared = sum(student), min(sum(student), sum(teacher))
        self.first = sum(student[:rank])
        self.all_shared = shared == self.vocabulary
        self.widest = max(s + min(s, t) for s, t in zip(student, teacher, strict=True))
        first = [0, 0]
        for r, sizes in enumerate(zip(student, teacher, strict=True)):
            ids = [(min(a, shared), min(a + n, shared)) for a, n in zip(first, sizes, strict=True)]
            if ids[0] != ids[1] and shared:
                raise ValueError(
                    f"teacher.weight: expected rank {r}'s slice to cover the ids of its student_weight, [{ids[0][0]}, {ids[0][1]}) of the"
                    f" {shared} shared ones, got [{ids[1][0]}, {ids[1][1]})"
                )
            first = [a + n for a, n in zip(first, sizes, strict=True)]


class _Ranks:
    """The processes of a group (`fastkd_kernels.spec.Ranks`)."""

    def __init__(self, group):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError("group: expected torch.distributed to be initialised (init_process_group), it is not")
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: expected a group that this process is in, it is not")

    def gather(self, x: Tensor) -> Tensor:
        every = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(every), x.contiguous(), group=self.group)
        return every

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def agree(
        self, device: torch.device, refused: Exception | None, facts: dict[str, Any], numbers: tuple[int, ...] = ()
    ) -> list[list[int]]:
        """Every rank's ``numbers``.

        Raises:
            ValueError, TypeError: the same on all ranks, where one has ``refused`` or they differ in ``facts``.
        """
        mine = [int(refused is not None), zlib.crc32(repr(facts).encode()), *numbers]
        every = self.gather(torch.tensor(mine, dtype=torch.int64, device=device)).tolist()
        if any(row[0] for row in every) or len({row[1] for row in every}) > 1:
            self._refuse(refused, facts)
        return [row[2:] for row in every]

    def _refuse(self, refused: Exception | None, facts: dict[str, Any]) -> None:
        said = None
        if refused is not None:
            text = str(refused) if isinstance(refused, TypeError | ValueError) else f"{type(refused).__name__}: {refused}"
            said = isinstance(refused, TypeError), text
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, (said, facts), group=self.group)
        errors = [(r, *said) for r, (said, _) in enumerate(every) if said]
        if errors:
            rank, is_type, text = errors[0]
            where = "" if len(errors) == self.size else f" (on rank {rank})"
            raise (TypeError if is_type else ValueError)(text + where) from refused
        for rank, (_, other) in enumerate(every):
            for name, value in every[0][1].items():
                if repr(other[name]) != repr(value):
                    raise ValueError(f"{name}: expected the same on all ranks, got {value} on rank 0 and {other[name]} on rank {rank}")


class _ParallelKD(torch.autograd.Function):
    """`ops.kd` with the same arguments, outputs and gradients."""

    @staticmethod
    def forward(ranks, slices, *arguments):
        with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
            return _kd(ranks, slices, *arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ops._setup_context(ctx, inputs[2:], output)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *ops._backward(ctx, *gradients)


def _kd(
    ranks: _Ranks, slices: _Slices, student, weight, bias, teacher, teacher_weight, teacher_bias, teacher_ids, teacher_tail, labels,
    token_weight, knobs, absent, divergence, impl, ignore_index, chunk_tokens, logits_dtype, need_student, need_weight, need_bias,
):  # fmt: skip
    total = student.shape[:-1].numel()
    compute = torch.promote_types(student.dtype, torch.float32)
    counted = ops._counted(labels, token_weight, ignore_index)
    host, refused = None, None
    try:
        host = ops._read_host(
            labels, token_weight, counted, None, teacher is not None, knobs, absent, divergence, slices.vocabulary, ignore_index, total
        )
    except Exception as error:
        refused = error
    ranks.agree(student.device, refused, _host_facts(host, divergence))
    assert host is not None
    out = ops._Outputs(student, weight, bias, compute, need_student, need_weight, need_bias)
    call = ops._prepare(host, ops._row_spec(host, divergence), out, student, labels, token_weight, counted)
    n = host.tokens
    if not n:
        return out.clear().as_tuple()

    rows, targets = call.rows, None if call.targets is None else call.targets - slices.first
    dense = None if call.kd is None else teacher
    size = chunking.chunk_size(n, logits_dtype.itemsize * slices.widest, student.device, chunk_tokens)
    chunks = ops._Chunks(student, weight, dense, teacher_weight, weight.shape[0], n, size, logits_dtype)
    shared_bias = None if teacher_bias is None else teacher_bias[: chunks.shared]
    for start in range(0, n, chunks.size):
        part = slice(start, min(start + chunks.size, n))
        x = ops._gather(student, rows, part)
        zs, dz = chunks.student_buffers(x, out, rows is None, part)
        gemm.logits(x, weight, zs)
        zt = None if dense is None else chunks.teacher_logits(ops._gather(dense, rows, part), teacher_weight)
        y, kd, ce = (None if t is None else t[part] for t in (targets, call.kd, call.ce))
        rows_parallel_torch.row_losses(
            zs, zt, y, call.row_weight[part], call.spec, ranks, all_shared=slices.all_shared, dz=dz, kd=kd, ce=ce,
            student_bias=bias, teacher_bias=shared_bias,
        )  # fmt: skip
        if dz is None:
            continue
        if need_student:
            # The parts may cancel, so that they are summed before they are rounded.
            dx = torch.empty(x.shape, dtype=compute, device=x.device)
            gemm.grad_hidden(dz, weight, dx)
            ranks.sum(dx)
            if rows is None:
                out.d_student[part] = dx
            else:
                out.d_student.index_copy_(0, rows[part], dx.to(out.d_student.dtype))
        out.accumulate_head(dz, x, first=start == 0)
    if call.kd is not None:
        # No divergence is negative; where it is nearly 0, rounding may say so.
        ranks.sum(call.kd).clamp_(min=0.0).mul_(call.spec.kd_factor)
    return ops._finish(host, call, out)


def _host_facts(host: ops._Host | None, divergence: str) -> dict[str, Any]:
    if host is None:
        return {}
    counts = {"labels and token_weight": f"{host.tokens} counted tokens of weight {host.weight_sum:g}, the largest {host.weight_max:g}"}
    return {**host.knobs, f"the parameters of {divergence}": host.parameters, **counts}
