"""What the row functions are told besides tensors: plain numbers, read from the device once per call."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .divergences import Definition

__all__ = ["Head", "Ranks", "RowSpec"]


class Ranks(Protocol):
    """Processes that hold consecutive slices of a vocabulary, and what they can do together. All must call the same in the same order."""

    @property
    def rank(self) -> int: ...

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x``, ``[ranks, ...]``."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, in place."""
        ...


@dataclass(frozen=True)
class Head:
    """From the head's product to final logits: ``softcap(scale * (x + bias))``; the bias travels as a tensor."""

    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class RowSpec:
    """The loss of a row with weight w: ``w * (kd_share * kd + ce_share * ce)``, with ``kd = kd_factor * D``.

    A term whose share is 0 is not computed. The target of the divergence are the teacher's final logits times ``target_share`` plus the
    student's times the rest. ``definition`` is already resolved at its limits (`Definition.at`).
    """

    definition: Definition
    a: float = 0.0
    b: float = 0.0
    temperature: float = 1.0
    kd_factor: float = 1.0
    kd_share: float = 1.0
    ce_share: float = 0.0
    student: Head = Head()
    teacher: Head = Head()
    target_share: float = 1.0
