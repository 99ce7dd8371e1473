"""The loss as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from .functional import Divergence, Number, fused_linear_kd
from .signals import Signal

__all__ = ["FusedLinearKDLoss"]


class FusedLinearKDLoss(nn.Module):
    """`fused_linear_kd` with its keyword arguments kept; they are attributes and may be changed between calls.

    Args: those of `fused_linear_kd`. They are checked when the loss is called; errors are those of `fused_linear_kd`.
    """

    def __init__(
        self,
        *,
        divergence: str | Divergence = "forward_kl",
        temperature: Number = 1.0,
        temperature_squared: bool = True,
        kd_ratio: Number = 1.0,
        student_softcap: Number | None = None,
        student_scale: Number = 1.0,
        ignore_index: int = -100,
        chunk_tokens: int | None = None,
        return_parts: bool = False,
        impl: str = "auto",
        logits_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.divergence = divergence
        self.temperature = temperature
        self.temperature_squared = temperature_squared
        self.kd_ratio = kd_ratio
        self.student_softcap = student_softcap
        self.student_scale = student_scale
        self.ignore_index = ignore_index
        self.chunk_tokens = chunk_tokens
        self.return_parts = return_parts
        self.impl = impl
        self.logits_dtype = logits_dtype

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Signal | None,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: Number | None = None,
        student_bias: Tensor | None = None,
    ) -> Any:
        """The loss, or ``(loss, LossParts)`` with ``return_parts``; shapes as in `fused_linear_kd`."""
        return fused_linear_kd(
            student_hidden,
            student_weight,
            teacher,
            labels,
            divergence=self.divergence,
            temperature=self.temperature,
            temperature_squared=self.temperature_squared,
            kd_ratio=self.kd_ratio,
            token_weight=token_weight,
            normalizer=normalizer,
            student_bias=student_bias,
            student_softcap=self.student_softcap,
            student_scale=self.student_scale,
            ignore_index=self.ignore_index,
            chunk_tokens=self.chunk_tokens,
            return_parts=self.return_parts,
            impl=self.impl,
            logits_dtype=self.logits_dtype,
        )
