"""Random losses to compute, and the same loss by the oracle."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import TeacherHidden, TeacherInterpolated, TeacherLogits, TeacherTopK, divergence, fused_linear_kd
from fastkd.reference import reference_linear_kd


@dataclass(frozen=True)
class Problem:
    """Arguments of `fused_linear_kd`. ``options`` are its keyword arguments, the divergence's apart."""

    hidden: Tensor
    weight: Tensor
    teacher: TeacherHidden | TeacherLogits | TeacherTopK | TeacherInterpolated | None
    labels: Tensor | None = None
    bias: Tensor | None = None
    name: str = "forward_kl"
    parameters: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> "Problem":
        """With all floating point tensors in another dtype."""
        return self._map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def to_device(self, device: str) -> "Problem":
        return self._map(lambda x: x.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        def cast(x):
            if is_dataclass(x):  # a teacher, which may hold another one
                return type(x)(**{k: cast(v) for k, v in vars(x).items()})
            return function(x) if isinstance(x, Tensor) else x

        options = {k: cast(v) for k, v in self.options.items()}
        tensors = {k: cast(getattr(self, k)) for k in ("hidden", "weight", "teacher", "labels", "bias")}
        return replace(self, options=options, **tensors)

    def with_options(self, **options) -> "Problem":
        return replace(self, options={**self.options, **options})


def make(
    name: str = "forward_kl",
    parameters: dict[str, float] | None = None,
    *,
    leading: tuple[int, ...] = (13,),
    width: int = 37,
    teacher_width: int | None = None,
    d_student: int = 8,
    d_teacher: int = 6,
    std: float = 3.0,
    close: float | None = None,
    kind: str = "hidden",
    labels: bool = True,
    masked: float = 0.25,
    bias: bool = False,
    teacher_head: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Problem:
    """A random problem whose logits have standard deviation ``std``.

    close: the teacher is the student, its hidden states moved by this much (equal vocabularies and widths then).
    kind: "hidden" or "logits", the teacher's signal. teacher_head: its softcap and scale. masked: share of ignored labels.
    """
    teacher_width = teacher_width or width
    if close is not None:
        teacher_width, d_teacher = width, d_student
    hidden = torch.randn(*leading, d_student, dtype=dtype)
    weight = torch.randn(width, d_student, dtype=dtype) * (std / d_student**0.5)
    b = torch.randn(width, dtype=dtype) if bias else None
    if close is None:
        t_hidden = torch.randn(*leading, d_teacher, dtype=dtype)
        t_weight, t_bias = torch.randn(teacher_width, d_teacher, dtype=dtype) * (std / d_teacher**0.5), None
        if bias:
            t_bias = torch.randn(teacher_width, dtype=dtype)
    else:
        t_hidden, t_weight, t_bias = hidden + close * torch.randn_like(hidden), weight.clone(), b
    teacher: TeacherHidden | TeacherLogits = TeacherHidden(t_hidden, t_weight, t_bias, **(teacher_head or {}))
    if kind == "logits":
        teacher = TeacherLogits(t_hidden @ t_weight.T + (0 if t_bias is None else t_bias))
    y = None
    if labels:
        y = torch.randint(width, leading)
        y[torch.rand(leading) < masked] = -100
    return Problem(hidden, weight, teacher, y, b, name, dict(parameters or {}), options)


def teacher_logits(problem: Problem) -> Tensor:
    teacher = problem.teacher
    assert isinstance(teacher, TeacherLogits | TeacherHidden)
    return teacher.logits if isinstance(teacher, TeacherLogits) else teacher.hidden @ teacher.weight.T


def sparse(problem: Problem, k: int, *, padding: int = 0, tail: bool = True, **changes: Any) -> Problem:
    """The problem with its teacher's k most probable tokens, and ``padding`` entries whose ids repeat listed ones and unlisted ones."""
    temperature = problem.options.get("temperature", 1.0)
    top = TeacherTopK.from_logits(teacher_logits(problem), k, temperature)
    ids, log_probs = top.ids, top.log_probs
    if padding:
        more = torch.randint(problem.weight.shape[0], (*ids.shape[:-1], padding))
        more[..., 0] = ids[..., 0]
        order = torch.randperm(k + padding)
        ids = torch.cat([ids, more], -1)[..., order]
        log_probs = torch.cat([log_probs, torch.full(more.shape, -torch.inf, dtype=log_probs.dtype)], -1)[..., order]
    listed = TeacherTopK(ids, log_probs, temperature, top.log_tail if tail else None)
    return replace(problem, teacher=listed, options={**problem.options, **changes})


@dataclass(frozen=True)
class Result:
    loss: Tensor
    gradients: dict[str, Tensor]


def _run(problem: Problem, loss_of, upstream: float) -> Result:
    leaves = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items() if v is not None}
    loss = loss_of(leaves)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype, device=loss.device))
    return Result(loss.detach(), {k: v.grad for k, v in leaves.items() if v.grad is not None})


def fused(problem: Problem, upstream: float = 1.0, **more: Any) -> Result:
    """Loss and gradients by `fused_linear_kd`."""
    return _run(
        problem,
        lambda x: fused_linear_kd(
            x["hidden"], x["weight"], problem.teacher, problem.labels, student_bias=x.get("bias"),
            divergence=divergence(problem.name, **problem.parameters), **{**problem.options, **more},
        ),
        upstream,
    )  # fmt: skip


def oracle(problem: Problem, upstream: float = 1.0, dtype: torch.dtype | None = torch.float64) -> Result:
    """The same by plain torch, in ``dtype`` (None: the problem's own)."""
    if dtype is not None:
        problem = problem.to(dtype)
    ours_alone = {"chunk_tokens", "impl", "logits_dtype"}
    options = {k: v for k, v in problem.options.items() if k not in ours_alone}
    return _run(
        problem,
        lambda x: reference_linear_kd(
            x["hidden"], x["weight"], problem.teacher, problem.labels, student_bias=x.get("bias"),
            divergence=problem.name, parameters=problem.parameters, **options,
        ),
        upstream,
    )  # fmt: skip


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Norm of the error over the norm of the truth."""
    truth = truth.double()
    return float((x.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def assert_close(result: Result, truth: Result, tolerance: float = 1e-9) -> None:
    """Loss and every gradient agree to ``tolerance``, relative to the largest element."""
    assert result.gradients.keys() == truth.gradients.keys()
    for what, x, y in [("loss", result.loss, truth.loss), *((k, result.gradients[k], truth.gradients[k]) for k in truth.gradients)]:
        assert x.shape == y.shape
        error = float((x.double() - y.double()).abs().max())
        bound = tolerance * max(1e-3, float(y.abs().max()))
        assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


def assert_within_rule(result: Result, plain: Result, truth: Result) -> None:
    """The error rule: at most twice the error of plain torch in the same dtype, plus 1e-4 (nats; gradients relative to their norm)."""
    error, reference = abs(float(result.loss) - float(truth.loss)), abs(float(plain.loss) - float(truth.loss))
    assert error <= 2 * reference + 1e-4, f"loss: off by {error:.3g}, plain torch by {reference:.3g}"
    for name, gradient in truth.gradients.items():
        error, reference = relative_error(result.gradients[name], gradient), relative_error(plain.gradients[name], gradient)
        assert error <= 2 * reference + 1e-4, f"gradient of {name}: off by {error:.3g} of its norm, plain torch by {reference:.3g}"


def assert_same_rows(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], rtol: float = 2e-5) -> None:
    """All of what a row function writes was written, is no NaN, and is what is expected, relative to the largest element."""
    for name, truth in expected.items():
        value = got[name]
        assert (value is None) == (truth is None)
        if value is None or truth is None:
            continue
        assert not value.isnan().any(), f"{name}: {int(value.isnan().sum())} elements were not written or are NaN"
        error, scale = float((value - truth).abs().max()), float(truth.abs().max())
        assert error <= rtol * max(scale, 1e-2), f"{name}: off by {error:.3g} where the largest is {scale:.3g}"


@contextlib.contextmanager
def device_reads(device: str | None = None):
    """Collects the reads of tensors (of this type of device alone) by the host within, as ``(method, shape)``."""
    reads: list = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy", "__contains__"):
            original = getattr(torch.Tensor, name)

            def counting(self, *args, _name=name, _original=original, **kwargs):
                if device in (None, self.device.type):
                    reads.append((_name, tuple(self.shape)))
                return _original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counting)
        yield reads
