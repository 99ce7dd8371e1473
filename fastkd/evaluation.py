"""How close a student is to its teacher, token by token, from hidden states and heads."""

from typing import Protocol

import torch
from torch import Tensor

from .reference import divergence_per_token

__all__ = ["TokenMetrics", "token_metrics"]

CHUNK_BYTES = 256 << 20  # of fp32 logits of student and teacher together


class _Head(Protocol):
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


class TokenMetrics(dict[str, Tensor]):
    """``kl``, ``ce``, ``agree`` per token, fp32, in the labels' shape, 0 where a token does not count; ``top1``: the student's token ids."""


@torch.no_grad()
def token_metrics(hidden: Tensor, head: _Head, teacher_hidden: Tensor, teacher_head: _Head, labels: Tensor) -> TokenMetrics:
    """Metrics of the counted tokens (label not -100), at temperature 1.

    Args:
        hidden, teacher_hidden: ``[B, S, D_s]``, ``[B, S, D_t]``. head, teacher_head: weight ``[V, D]``, bias, softcap, scale.
        labels: ``[B, S]`` int64, aligned with the hidden states.

    Returns:
        ``kl``: forward KL to the teacher over the shared vocabulary, nats. ``ce``: cross-entropy of the label, nats. ``agree``: 1 where both
        models' most probable token is the same. ``top1``: ``[B, S]`` int64, the student's most probable token, -100 where none counts.
    """
    rows = (labels != -100).flatten().nonzero().squeeze(1)
    out = {name: torch.zeros(labels.numel(), device=labels.device) for name in ("kl", "ce", "agree")}
    top1 = torch.full((labels.numel(),), -100, device=labels.device)
    step = max(1, CHUNK_BYTES // (4 * (head.weight.shape[0] + teacher_head.weight.shape[0])))
    for part in rows.split(step):
        zs = _logits(hidden, head, part)
        zt = _logits(teacher_hidden, teacher_head, part)
        out["kl"][part] = divergence_per_token(zs, zt)
        out["ce"][part] = torch.nn.functional.cross_entropy(zs, labels.flatten()[part], reduction="none")
        top1[part] = zs.argmax(-1)
        out["agree"][part] = (top1[part] == zt.argmax(-1)).float()
    return TokenMetrics({name: value.view_as(labels) for name, value in {**out, "top1": top1}.items()})


def _logits(hidden: Tensor, head: _Head, rows: Tensor) -> Tensor:
    """Final logits in fp32, from a product in the head's own dtype."""
    x = hidden.flatten(0, -2)[rows].to(head.weight.dtype)
    z = head.scale * torch.nn.functional.linear(x, head.weight, head.bias).float()
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
