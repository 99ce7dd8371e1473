"""What a teacher hands over for the tokens of a batch."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Signal", "TeacherHidden", "TeacherLogits", "TeacherTopK"]


@dataclass(frozen=True, eq=False)
class TeacherHidden:
    """The teacher's last hidden states and its head; its logits are computed chunk by chunk and never held.

    The logits are ``softcap(scale * (hidden @ weight.T + bias))`` with ``softcap(x) = c * tanh(x / c)``.

    Args:
        hidden: ``[..., D_t]``, floating point, the student's leading dimensions.
        weight: ``[V_t, D_t]``, as `torch.nn.Linear` stores it, in the dtype of ``hidden``. V_t may differ from the student's V_s.
        bias: ``[V_t]`` or None.
        softcap: c > 0, or None.
        scale: multiplies the logits before the softcap.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """The teacher's final logits.

    Args:
        logits: ``[..., V_t]``, floating point, the student's leading dimensions, not divided by any temperature.
            -inf is probability 0.
    """

    logits: Tensor


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The teacher's K most probable tokens; the rest of the mass is one tail bucket.

    Args:
        ids: ``[..., K]`` int64, distinct in each row.
        log_probs: ``[..., K]`` in nats, over the teacher's whole vocabulary at ``temperature``.
        temperature: the temperature at which ``log_probs`` were taken.

    The losses do not take this signal yet and refuse it.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float = 1.0


Signal = TeacherHidden | TeacherLogits | TeacherTopK
