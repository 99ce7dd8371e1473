"""How close a student is to its teacher, token by token, from hidden states and heads."""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import gemm
from .hf import Head
from .reference import divergence_per_token
from .signals import Signal, TeacherHidden, TeacherLogits, TeacherTopK

__all__ = ["token_metrics"]

CHUNK_BYTES = 256 << 20  # of fp32 logits of student and teacher together


@torch.no_grad()
def token_metrics(
    hidden: Tensor,
    head: Head,
    teacher: Signal | None,
    labels: Tensor,
    divergence: str = "forward_kl",
    parameters: Mapping[str, float] | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Metrics of the counted tokens (label not -100), from logits that are held for one chunk of tokens at a time.

    Args:
        hidden, head: the student's, ``[B, S, D_s]``.
        teacher: a signal for the same tokens, or None.
        labels: ``[B, S]`` int64, aligned with the hidden states.
        divergence, parameters, temperature: of ``kd``; the others are at temperature 1, but for ``kl`` to a TeacherTopK.

    Returns:
        By name, each ``[B, S]``, fp32, 0 where a token does not count. ``kd``: the divergence, without the factor temperature ** 2, nats.
        ``kl``: forward KL to the teacher over the shared vocabulary, nats; to a TeacherTopK that of its K + 1 buckets at its own
        temperature, a lower bound.
        ``ce``: cross-entropy of the label, nats. ``agree``: 1 where both models' most probable token is the same. Without a teacher
        ``kd``, ``kl`` and ``agree`` are nan. And ``top1``, int64: the student's most probable token, -100 where none counts.

    Raises:
        ValueError: ``temperature`` is not the TeacherTopK's.
    """
    rows = (labels != -100).flatten().nonzero().squeeze(1)
    out = {name: torch.zeros(labels.numel(), device=labels.device) for name in ("kd", "kl", "ce", "agree")}
    top1 = torch.full((labels.numel(),), -100, device=labels.device)
    width = head.weight.shape[0] + (teacher.weight.shape[0] if isinstance(teacher, TeacherHidden) else 0)
    for part in rows.split(max(1, CHUNK_BYTES // (4 * width))):
        with torch.autocast(hidden.device.type, enabled=False):
            zs = _logits(hidden, head, part)
            found = _teacher_rows(teacher, part)
        out["ce"][part] = torch.nn.functional.cross_entropy(zs, labels.flatten()[part], reduction="none")
        top1[part] = zs.argmax(-1)
        if found is None:
            for name in ("kd", "kl", "agree"):
                out[name][part] = torch.nan
            continue
        at, favourite = (
            (found.temperature, found.ids.gather(-1, found.log_probs.argmax(-1, keepdim=True)).squeeze(-1))
            if isinstance(found, TeacherTopK)
            else (1.0, found.argmax(-1))
        )
        out["kl"][part] = divergence_per_token(zs, found, temperature=at)
        same = divergence == "forward_kl" and temperature == at
        out["kd"][part] = out["kl"][part] if same else divergence_per_token(zs, found, divergence, parameters, temperature)
        out["agree"][part] = (top1[part] == favourite).float()
    return {name: value.view_as(labels) for name, value in {**out, "top1": top1}.items()}


def _teacher_rows(teacher: Signal | None, rows: Tensor) -> Tensor | TeacherTopK | None:
    """The teacher's final logits, or its lists, of some tokens."""
    match teacher:
        case TeacherHidden(hidden, weight, bias, softcap, scale):
            return _logits(hidden, Head(weight, bias, softcap, scale), rows)
        case TeacherLogits(logits):
            return logits.flatten(0, -2)[rows].to(torch.promote_types(logits.dtype, torch.float32))
        case TeacherTopK(ids, log_probs, temperature, log_tail):
            tail = None if log_tail is None else log_tail.flatten()[rows]
            return TeacherTopK(ids.flatten(0, -2)[rows].long(), log_probs.flatten(0, -2)[rows], temperature, tail)
        case None:
            return None
        case _:
            raise TypeError(f"teacher: expected TeacherHidden, TeacherLogits, TeacherTopK or None, got {type(teacher).__name__}")


def _logits(hidden: Tensor, head: Head, rows: Tensor) -> Tensor:
    """Final logits in fp32 (float64 for a float64 head), never rounded to fewer bits: the losses do not round them either."""
    x = hidden.flatten(0, -2)[rows].to(head.weight.dtype)
    z = torch.empty(len(rows), head.weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    gemm.logits(x, head.weight, z)
    return head.finish(z if head.bias is None else z + head.bias)
