"""Loss and gradient of rows of logits of which each rank holds a slice of the vocabulary, in plain torch.

A divergence is a sum over the vocabulary of what its tile function makes of log p and log q, so that ranks need three things of each other:
every slice's largest logit and sum of exponentials, from which come the normalisers; ``sum h``, where it is not 0; and the divergence
itself, which nothing here waits for. That is a few numbers per row, whatever the vocabulary.
"""

import torch
from torch import Tensor

from .rows_torch import _final_logits, _forward_share, _row_blocks, _target_logits, _write_gradient
from .spec import Ranks, RowSpec

__all__ = ["row_losses"]


def row_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    weight: Tensor,
    spec: RowSpec,
    ranks: Ranks,
    *,
    all_shared: bool,
    dz: Tensor | None,
    kd: Tensor | None,
    ce: Tensor | None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
) -> None:
    """`rows_torch.row_losses` of a slice of the vocabulary. All ranks call it together, with the same rows and ``spec``.

    One gather of at most 7 numbers per row; with ``dz``, unless the divergence is centered, one sum of 1 number per row. A row statistic
    (adaptive_kl) takes about 35 exchanges (twice as many in float64) of 1 or 2 numbers per row.

    Args:
        student: ``[C, V_local]``, as there.
        teacher: ``[C, S_local]``, the teacher's products at this rank's part of the shared vocabulary; overwritten.
        labels: ``[C]`` int64, counted from the first id of this rank's slice: in [0, V_local) on one rank, outside on the others.
        all_shared: the shared vocabulary is the student's, on every rank.
        dz: ``[C, V_local]``, as there.
        kd: ``[C]``, receives this rank's part of the divergence, in nats, without `RowSpec.kd_factor`: the sum over ranks is the whole.
        ce: ``[C]``, receives the cross-entropy, the same on all ranks.
        The others are those of `rows_torch.row_losses`.
    """
    compute = torch.promote_types(student.dtype, torch.float32)
    own_softmax = ce is not None and not (kd is not None and all_shared and spec.temperature == 1.0)

    def final(part: slice) -> Tensor:
        return _final_logits(student[part], student_bias, spec.student, compute)

    def tempered(part: slice, zs: Tensor) -> tuple[Tensor, Tensor]:
        """The target's and the student's logits over the shared vocabulary, divided by the temperature."""
        assert teacher is not None
        zs = zs[:, : teacher.shape[1]]
        zt = _target_logits(_final_logits(teacher[part], teacher_bias, spec.teacher, compute), zs, spec.target_share)
        return (zt, zs) if spec.temperature == 1.0 else (zt / spec.temperature, zs / spec.temperature)

    found = []
    for part in _row_blocks(student):
        zs = final(part)
        numbers = [] if kd is None else [_mass(z) for z in tempered(part, zs)]
        if own_softmax:
            numbers.append(_mass(zs))
        if ce is not None:
            assert labels is not None
            numbers.append(_at_label(zs, labels[part]))
        found.append(torch.cat(numbers, 1))
    every = ranks.gather(torch.cat(found))
    norms = [_Normaliser(every[:, :, i : i + 2]) for i in range(0, every.shape[2] - 1, 2)]
    if ce is not None:
        # On one rank the label's logit, on the others -inf.
        torch.neg(norms[-1].log_prob(every[:, :, -1:].amax(0)).squeeze(1), out=ce)

    def log_probs(part: slice, zs: Tensor) -> tuple[Tensor, Tensor]:
        zt, zq = tempered(part, zs)
        return norms[0].log_prob(zt, part), norms[1].log_prob(zq, part)

    sum_h = weight.new_empty(weight.shape[0], 1)
    if kd is not None:
        assert teacher is not None
        statistic = None
        if spec.definition.statistic is not None:
            every_row = slice(0, weight.shape[0])
            statistic = _forward_share(*log_probs(every_row, final(every_row)), spec.a, ranks=ranks)
        for part in _row_blocks(student):
            log_p, log_q = log_probs(part, final(part))
            g, h = spec.definition.torch_tile(log_p, log_q, spec.a, spec.b, None if statistic is None else statistic[part])
            torch.sum(g, -1, out=kd[part])
            if dz is not None:
                h *= weight[part, None] * (spec.kd_share * spec.kd_factor / spec.temperature)
                torch.sum(h, -1, keepdim=True, out=sum_h[part])
                teacher[part] = h  # the teacher's logits have served
        if dz is not None and not spec.definition.centered:
            ranks.sum(sum_h)
    if dz is None:
        return
    for part in _row_blocks(student):
        zs = final(part)
        gradient = None
        if kd is not None:
            assert teacher is not None
            gradient = teacher[part].to(compute)
            if not spec.definition.centered:
                zq = zs[:, : gradient.shape[1]]
                log_q = norms[1].log_prob(zq if spec.temperature == 1.0 else zq / spec.temperature, part)
                gradient.addcmul_(log_q.exp_(), sum_h[part], value=-1)
        if ce is not None:
            assert labels is not None
            w = weight[part, None] * spec.ce_share
            softmax = norms[-1].log_prob(zs, part).exp_().mul_(w)
            index, mine = _label_index(labels[part], zs.shape[1])
            softmax.scatter_add_(1, index, -w * mine)
            if gradient is not None:
                softmax[:, : gradient.shape[1]] += gradient
            gradient = softmax
        assert gradient is not None
        _write_gradient(gradient, zs, spec.student, dz[part])


class _Normaliser:
    """The largest logit of the rows and the log of the sum of exponentials over it, ``[C, 1]`` each, from the ranks' `_mass`."""

    def __init__(self, masses: Tensor):
        top, total = masses.unbind(-1)
        self.top = top.amax(0)
        self.log_total = (total * (top - self.top).exp()).sum(0).log_().unsqueeze(1)
        self.top = self.top.unsqueeze(1)

    def log_prob(self, z: Tensor, part: slice = slice(None)) -> Tensor:
        # In this order: both differences are exact where it matters, near the largest logit.
        return (z - self.top[part]).sub_(self.log_total[part])


def _mass(z: Tensor) -> Tensor:
    """Each row's largest logit and its sum of exponentials over that, ``[R, 2]``."""
    # Finite, so that a slice of -inf alone has mass 0.
    top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
    return torch.cat([top, (z - top).exp_().sum(-1, keepdim=True)], 1)


def _label_index(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Where in the slice the labels are, and whether they are there, ``[R, 1]`` each."""
    index = labels[:, None]
    return index.clamp(0, width - 1), (index >= 0) & (index < width)


def _at_label(z: Tensor, labels: Tensor) -> Tensor:
    index, mine = _label_index(labels, z.shape[1])
    return torch.where(mine, z.gather(1, index), -torch.inf)
