"""The oracle: any divergence and any teacher signal in plain torch, with full logits and autograd.

Slow and large on purpose. In float64 it is what every other path is judged against; it shares with them the parameters' names and
defaults, and no formula.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastkd_kernels.divergences import DEFINITIONS

from .signals import Signal, TeacherHidden, TeacherInterpolated, TeacherLogits, TeacherTopK

__all__ = ["divergence_per_token", "final_logits", "reference_linear_kd"]


def final_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, scale=1.0) -> Tensor:
    """``softcap(scale * (hidden @ weight.T + bias))``, shape ``[..., V]``, in the dtype of ``hidden``."""
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def divergence_per_token(
    student_logits: Tensor,
    teacher: Tensor | TeacherTopK,
    divergence: str = "forward_kl",
    parameters: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    statistic: Tensor | None = None,
) -> Tensor:
    """The divergence of each token in nats, from final logits ``[..., V_s]`` and ``[..., V_t]``, over the shared vocabulary.

    With a `TeacherTopK` it is that of the K + 1 buckets, and ``temperature`` must be the teacher's.
    ``statistic`` freezes the row statistic of adaptive_kl (``[..., 1]``), which is otherwise computed here and detached.

    Raises:
        ValueError: ``temperature`` is not the TeacherTopK's.
    """
    definition = DEFINITIONS[divergence]
    given = dict(parameters or {})
    values = tuple(float(given.get(p.name, p.default)) for p in definition.parameters)
    definition = definition.at(values)
    a, b = ((*values, 0.0, 0.0))[:2]
    sparse = isinstance(teacher, TeacherTopK)
    if isinstance(teacher, TeacherTopK):
        if not math.isclose(temperature, teacher.temperature, rel_tol=1e-6):
            raise ValueError(f"temperature: expected {teacher.temperature:g}, that of the TeacherTopK, got {temperature:g}")
        lp, lq = _buckets(student_logits, teacher)
    else:
        shared = min(student_logits.shape[-1], teacher.shape[-1])
        lq = torch.log_softmax(student_logits[..., :shared] / temperature, -1)
        lp = torch.log_softmax(teacher[..., :shared].detach() / temperature, -1)
    if definition.statistic is not None and statistic is None:
        statistic = definition.statistic(lp, lq, a, sparse)
    return definition.reference(lp, lq, a, b, statistic).sum(-1)


def _buckets(student_logits: Tensor, teacher: TeacherTopK) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student in the buckets, ``[..., K + 1]``, the tail last; -inf in those that do not exist."""
    ids, log_p = teacher.ids.long(), teacher.log_probs.detach().to(student_logits.dtype)
    entry = log_p > -math.inf
    log_q = torch.log_softmax(student_logits / teacher.temperature, -1)
    in_tail = torch.zeros_like(log_q, dtype=torch.int8).scatter_add(-1, ids, entry.to(torch.int8)) == 0
    has_tail = in_tail.any(-1, keepdim=True)
    rest = log_q.masked_fill(~in_tail & has_tail, -math.inf).logsumexp(-1, keepdim=True)
    exists = torch.cat([entry, has_tail], -1)
    log_q = torch.cat([log_q.gather(-1, ids), rest], -1).masked_fill(~exists, -math.inf)
    if teacher.log_tail is None:
        log_tail = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0.0).log()
    else:
        log_tail = teacher.log_tail.detach().to(log_p.dtype).unsqueeze(-1)
    log_p = torch.cat([log_p, log_tail.masked_fill(~has_tail, -math.inf)], -1)
    return torch.log_softmax(log_p, -1), log_q  # the sum is 1 but for rounding


def reference_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Signal | None,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    parameters: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    kd_ratio: float = 1.0,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_scale: float = 1.0,
    ignore_index: int = -100,
    statistic: Tensor | None = None,
) -> Tensor:
    """`fastkd.fused_linear_kd` written out. Same arguments, ``parameters`` apart; returns the loss, a 0-d tensor."""
    weight = student_hidden.new_ones(student_hidden.shape[:-1]) if token_weight is None else token_weight.to(student_hidden.dtype)
    if labels is not None:
        weight = weight.masked_fill(labels == ignore_index, 0.0)
    counted = weight > 0
    # What does not count is left out before anything is computed of it: 0 times an infinite gradient is not 0.
    student = final_logits(student_hidden[counted], student_weight, student_bias, student_softcap, student_scale)
    if not counted.any():
        return student.sum() * 0.0
    per_token = student.new_zeros(())
    if kd_ratio > 0:
        share, signal = 1.0, teacher
        if isinstance(teacher, TeacherInterpolated):
            share, signal = float(teacher.share), teacher.teacher
        match signal:
            case TeacherHidden(hidden, w, bias, softcap, scale):
                given: Tensor | TeacherTopK = final_logits(hidden[counted], w, bias, softcap, scale)
            case TeacherLogits(logits):
                given = logits[counted]
            case TeacherTopK(ids, log_probs, at, tail):
                given = TeacherTopK(ids[counted], log_probs[counted], at, None if tail is None else tail[counted])
            case None:
                raise ValueError(f"teacher: kd_ratio = {kd_ratio:g} > 0 adds a divergence term, which needs a teacher, got None")
            case _:
                raise TypeError(f"teacher: expected a Signal or None, got {type(signal).__name__}")
        if share != 1.0:
            assert isinstance(given, Tensor)
            shared = min(student.shape[-1], given.shape[-1])
            own, given = student[..., :shared].detach(), given[..., :shared]
            given = own if share == 0.0 else (1 - share) * own + share * given
        frozen = None if statistic is None else statistic[counted]
        kd = divergence_per_token(student, given, divergence, parameters, temperature, frozen)
        per_token = per_token + kd_ratio * (temperature**2 if temperature_squared else 1.0) * kd
    if kd_ratio < 1:
        assert labels is not None
        ce = -torch.log_softmax(student, -1).gather(-1, labels[counted].unsqueeze(-1)).squeeze(-1)
        per_token = per_token + (1 - kd_ratio) * ce
    total = (weight[counted] * per_token).sum()
    return total / (weight.sum() if normalizer is None else normalizer)
