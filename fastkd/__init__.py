"""fastkd: fused losses and training for the knowledge distillation of causal language models."""

from ._version import __version__
from .functional import DIVERGENCES, LossParts, divergence, fused_linear_kd, kd_loss
from .losses import FusedLinearKDLoss
from .signals import TeacherHidden, TeacherInterpolated, TeacherLogits, TeacherTopK

__all__ = [
    "DIVERGENCES",
    "FusedLinearKDLoss",
    "LossParts",
    "TeacherHidden",
    "TeacherInterpolated",
    "TeacherLogits",
    "TeacherTopK",
    "__version__",
    "divergence",
    "fused_linear_kd",
    "kd_loss",
]
