"""What a teacher hands over for the tokens of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Signal", "TeacherHidden", "TeacherInterpolated", "TeacherLogits", "TeacherTopK"]


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
    """Some of the teacher's tokens; the rest of its mass is one tail bucket.

    The divergence compares K + 1 buckets: each listed token, and the tail, which holds all other ids of the student's vocabulary. The
    teacher's vocabulary is not known here, so that KD is over the whole of the student's. For every divergence but adaptive_kl this is a
    lower bound of the divergence over all tokens, by the data processing inequality.

    Args:
        ids: ``[..., K]`` int64 or int32, in [0, V_s), distinct in each row.
        log_probs: ``[..., K]`` floating point, nats, over the teacher's whole vocabulary at ``temperature``. An entry of -inf is padding
            and no bucket: its id may be any in range, and the student's mass there belongs to the tail.
        temperature: the temperature at which ``log_probs`` were taken; the losses refuse to be called at another one.
        log_tail: ``[...]``, log of the rest's mass in nats. None: log of ``1 - sum(exp(log_probs))``, which rounding decides where the
            rest is below about 1e-7; where it comes out as 0, a divergence that weighs by the student (reverse KL) is infinite.
    Where all ids are listed there is no tail, and the listed masses are divided by their sum.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    log_tail: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, k: int, temperature: float = 1.0) -> "TeacherTopK":
        """The k most probable tokens, most probable first, and the rest's mass, from final logits ``[..., V]``; fp32 or wider.

        Raises:
            ValueError: k is not in [1, V].
        """
        if not 1 <= k <= logits.shape[-1]:
            raise ValueError(f"k: expected a number in [1, {logits.shape[-1]}], the vocabulary, got {k}")
        log_p = torch.log_softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
        log_probs, ids = log_p.topk(k, -1)
        return cls(ids, log_probs, temperature, log_p.scatter_(-1, ids, -torch.inf).logsumexp(-1))

    @classmethod
    def from_counts(cls, ids: Tensor, counts: Tensor, temperature: float = 1.0) -> "TeacherTopK":
        """How often each token came in independent draws from the teacher at ``temperature``: the frequencies, and no tail.

        The gradient of the forward KL to the frequencies is, on average over the draws, that of the forward KL to the teacher. (Of top-k
        alone it is not, nor for the other divergences.) Those that weigh by the student, such as the reverse KL, are infinite.

        Args:
            ids: ``[..., K]``, distinct in each row where the count is not 0.
            counts: ``[..., K]`` >= 0, of any real dtype; 0 is padding.

        Source: Sparse Logit Sampling, arXiv 2503.16870.
        """
        counts = counts.float()
        log_probs = counts.log() - counts.sum(-1, keepdim=True).clamp(min=1).log()
        return cls(ids, log_probs, temperature, torch.full_like(log_probs[..., 0], -torch.inf))


@dataclass(frozen=True, eq=False)
class TeacherInterpolated:
    """A target on the way from the student to a teacher: final logits ``(1 - share) * student.detach() + share * teacher``.

    The divergence compares the student with that distribution, at the loss's temperature; no gradient flows through the target. With
    ``share`` rising to 1 in training and the forward KL this is TAID, whose target moves with the student.

    Args:
        teacher: the teacher's `TeacherHidden` or `TeacherLogits`. Its logits are interpolated over the shared vocabulary.
        share: in [0, 1], TAID's t, a number or a 0-d tensor. 0 is the student itself (the divergence is 0), 1 the teacher.

    Source: TAID, arXiv 2501.16937, equation 3.
    """

    teacher: TeacherHidden | TeacherLogits
    share: float | Tensor


Signal = TeacherHidden | TeacherLogits | TeacherTopK | TeacherInterpolated
