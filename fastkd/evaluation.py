"""How close a student is to its teacher, token by token, from hidden states and heads."""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import gemm
from .hf import Head
from .reference import divergence_per_token
from .signals import TeacherHidden

__all__ = ["token_metrics"]

CHUNK_BYTES = 256 << 20  # of fp32 logits of student and teacher together


@torch.no_grad()
def token_metrics(
    hidden: Tensor,
    head: Head,
    teacher: TeacherHidden,
    labels: Tensor,
    divergence: str = "forward_kl",
    parameters: Mapping[str, float] | None = None,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Metrics of the counted tokens (label not -100), from logits that are held for one chunk of tokens at a time.

    Args:
        hidden, head: the student's, ``[B, S, D_s]``.
        teacher: hidden states ``[B, S, D_t]`` and head.
        labels: ``[B, S]`` int64, aligned with the hidden states.
        divergence, parameters, temperature: of ``kd``; the others are at temperature 1.

    Returns:
        By name, each ``[B, S]``, fp32, 0 where a token does not count. ``kd``: the divergence, without the factor temperature ** 2, nats.
        ``kl``: forward KL to the teacher over the shared vocabulary, nats.
        ``ce``: cross-entropy of the label, nats. ``agree``: 1 where both models' most probable token is the same. And ``top1``, int64: the
        student's most probable token, -100 where none counts.
    """
    teacher_head = Head(teacher.weight, teacher.bias, teacher.softcap, teacher.scale)
    rows = (labels != -100).flatten().nonzero().squeeze(1)
    out = {name: torch.zeros(labels.numel(), device=labels.device) for name in ("kd", "kl", "ce", "agree")}
    top1 = torch.full((labels.numel(),), -100, device=labels.device)
    step = max(1, CHUNK_BYTES // (4 * (head.weight.shape[0] + teacher.weight.shape[0])))
    for part in rows.split(step):
        with torch.autocast(hidden.device.type, enabled=False):
            zs, zt = _logits(hidden, head, part), _logits(teacher.hidden, teacher_head, part)
        out["kl"][part] = divergence_per_token(zs, zt)
        same = divergence == "forward_kl" and temperature == 1.0
        out["kd"][part] = out["kl"][part] if same else divergence_per_token(zs, zt, divergence, parameters, temperature)
        out["ce"][part] = torch.nn.functional.cross_entropy(zs, labels.flatten()[part], reduction="none")
        top1[part] = zs.argmax(-1)
        out["agree"][part] = (top1[part] == zt.argmax(-1)).float()
    return {name: value.view_as(labels) for name, value in {**out, "top1": top1}.items()}


def _logits(hidden: Tensor, head: Head, rows: Tensor) -> Tensor:
    """Final logits in fp32 (float64 for a float64 head), never rounded to fewer bits: the losses do not round them either."""
    x = hidden.flatten(0, -2)[rows].to(head.weight.dtype)
    z = torch.empty(len(rows), head.weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    gemm.logits(x, head.weight, z)
    return head.finish(z if head.bias is None else z + head.bias)
