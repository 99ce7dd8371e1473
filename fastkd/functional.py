"""What users call: `fused_linear_kd`, `kd_loss` and the divergences' public names."""

import itertools
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastkd_kernels.divergences import DEFINITIONS, Definition
from fastkd_kernels.divergences import triton as _triton

from . import ops
from .signals import Signal, TeacherHidden, TeacherInterpolated, TeacherLogits, TeacherTopK

__all__ = ["DIVERGENCES", "Divergence", "LossParts", "divergence", "fused_linear_kd", "kd_loss"]

DIVERGENCES: Mapping[str, Definition] = MappingProxyType(DEFINITIONS)
"""The divergences by name; each names its parameters, their defaults and domains, and its source."""

Number = float | Tensor  # a number, or a 0-d tensor


@dataclass(frozen=True, eq=False)
class Divergence:
    """A divergence with values for its parameters; made by `divergence`."""

    name: str
    parameters: Mapping[str, Number] = field(default_factory=dict)


def divergence(name: str, **parameters: Number) -> Divergence:
    """A divergence and its parameters, for the ``divergence`` argument of the losses.

    Args:
        name: one of `DIVERGENCES`.
        parameters: numbers or 0-d tensors; those left out take their defaults.

    Raises:
        ValueError: unknown name or parameter, or a number outside its domain (a tensor's value is checked when the loss reads it).
        TypeError: a parameter that is neither a number nor a 0-d tensor.
    """
    if not isinstance(name, str):
        raise TypeError(f"divergence: expected a name or divergence(name, ...), got {type(name).__name__}")
    if name not in DIVERGENCES:
        raise ValueError(f"divergence: unknown name {name!r}; known are {', '.join(DIVERGENCES)}")
    known = {p.name: p for p in DIVERGENCES[name].parameters}
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"divergence {name!r}: unknown parameter {key!r}; it takes {', '.join(known) or 'none'}")
        _check_number(f"divergence {name!r}: {key}", value)
        # A comparison would make a traced float a constant of the graph; the loss checks all values once more when it reads them.
        if not isinstance(value, Tensor) and not torch.compiler.is_compiling() and not known[key].contains(value):
            raise ValueError(f"divergence {name!r}: expected {key} in {known[key].domain}, got {value:g}")
    return Divergence(name, dict(parameters))


@dataclass(frozen=True, eq=False)
class LossParts:
    """What a loss is made of, detached. Fields can also be read as items: ``parts["kd"]``.

    Attributes:
        kd: mean divergence over the counted tokens, nats per token, with the factor temperature ** 2 where it is on; 0-d.
        ce: mean cross-entropy over the counted tokens, nats per token; 0-d.
        tokens: number of counted tokens; 0-d int64.
        kd_per_token, ce_per_token: the terms per token in the leading dimensions, unweighted; 0 where a token does not count.
    A term whose share is 0 was not computed and is nan.
    """

    kd: Tensor
    ce: Tensor
    tokens: Tensor
    kd_per_token: Tensor
    ce_per_token: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)


def fused_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Signal | None,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    temperature_squared: bool = True,
    kd_ratio: Number = 1.0,
    token_weight: Tensor | None = None,
    normalizer: Number | None = None,
    student_bias: Tensor | None = None,
    student_softcap: Number | None = None,
    student_scale: Number = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    return_parts: bool = False,
    impl: str = "auto",
    logits_dtype: torch.dtype | None = None,
) -> Any:
    """Distillation loss of a student's LM head against a teacher, without ever holding the logits of all tokens.

    ``loss = sum_counted w * ((1 - kd_ratio) * CE + kd_ratio * KD) / normalizer``. KD compares both distributions over the shared
    vocabulary, ids < min(V_s, V_t), each renormalised there; CE is over all of V_s at temperature 1. Final logits are
    ``softcap(scale * (hidden @ weight.T + bias))``. The gradients are computed in the forward pass, so that checkpointing around the loss
    gains no memory and runs every GEMM twice.

    Args:
        student_hidden: ``[..., D_s]``; leading dimensions flatten to N tokens. fp16, bf16, fp32 or float64.
        student_weight: ``[V_s, D_s]``, the LM head as `torch.nn.Linear` stores it, in the dtype of ``student_hidden``. Under autocast
            both are cast, as a linear layer would.
        teacher: `TeacherHidden`, `TeacherLogits`, `TeacherTopK` or `TeacherInterpolated` with the same leading dimensions. Never receives
            a gradient. None where ``kd_ratio`` is 0. With a TeacherTopK KD compares its K + 1 buckets, over all of V_s.
        labels: ``[...]`` int64, aligned with the hidden states: the caller shifts.
        divergence: a name in `DIVERGENCES`, or ``divergence("jsd", beta=0.1)``. alpha_beta takes a TeacherTopK where alpha + beta = 1.
        temperature: > 0, divides both models' final logits. A TeacherTopK holds for its own temperature alone.
        temperature_squared: multiply the KD term, value and gradient alike, by ``temperature ** 2``.
        kd_ratio: in [0, 1]; < 1 needs labels. A term whose share is 0 is not computed.
        token_weight: ``[...]`` floating point, >= 0. A token counts when its weight is > 0 and its label is not ``ignore_index``.
        normalizer: > 0; default: the sum of the counted tokens' weights.
        student_bias: ``[V_s]``. student_softcap, student_scale: see above.
            Head weights and biases may be DTensors, as FSDP2 makes them: each is gathered once per call, on all ranks of its mesh together.
            A gradient comes back as a DTensor of the parameter's placements, averaged over the mesh's ranks, as FSDP2 does with every
            other parameter. `fastkd.hf.run_at_head` avoids this gather: inside the model's own call FSDP2 makes it.
        chunk_tokens: most tokens whose logits, or their gradients, are held at a time; default: from a memory budget.
        return_parts: return ``(loss, LossParts)``.
        impl: "triton", "torch", or "auto": Triton for CUDA tensors where it is installed, torch elsewhere and for float64.
        logits_dtype: torch.float32 (default) or the hidden states' own 16-bit dtype: less memory, gradients several percent off
            when student and teacher are close.
        temperature, kd_ratio, normalizer, softcap, scale and the divergence's parameters are numbers or 0-d tensors and may change
        every step without recompiling anything.

    Returns:
        The loss in nats per token, 0-d, fp32 (float64 for float64 input); 0 when no token counts.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.

    Source: the divergences' own (`DIVERGENCES`); kd_ratio and temperature as in Hinton et al. 2015.
    """
    student_weight, student_bias = _whole(student_weight), _whole(student_bias)
    student_hidden, student_weight = _student_tensors(student_hidden, student_weight, student_bias)
    return _loss(
        student_hidden, student_weight, student_bias, teacher, labels,
        divergence=divergence, temperature=temperature, temperature_squared=temperature_squared, kd_ratio=kd_ratio,
        token_weight=token_weight, normalizer=normalizer, student_softcap=student_softcap, student_scale=student_scale,
        ignore_index=ignore_index, chunk_tokens=chunk_tokens, return_parts=return_parts, impl=impl, logits_dtype=logits_dtype,
    )  # fmt: skip


def kd_loss(
    student_logits: Tensor,
    teacher: Signal | None,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    temperature_squared: bool = True,
    kd_ratio: Number = 1.0,
    token_weight: Tensor | None = None,
    normalizer: Number | None = None,
    student_softcap: Number | None = None,
    student_scale: Number = 1.0,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    return_parts: bool = False,
    impl: str = "auto",
    logits_dtype: torch.dtype | None = None,
) -> Any:
    """`fused_linear_kd` from logits that already exist.

    Args:
        student_logits: ``[..., V_s]``; receives its gradient and is never overwritten. The gradient, as large as the logits, is held
            from the forward pass on, and scaled into a second tensor in the backward pass. With ``student_softcap`` or ``student_scale``
            the final logits are ``softcap(scale * student_logits)``.
        The others, the return value and the errors are those of `fused_linear_kd`.
    """
    _check_floating("student_logits", student_logits, at_least=1)
    return _loss(
        student_logits, None, None, teacher, labels,
        divergence=divergence, temperature=temperature, temperature_squared=temperature_squared, kd_ratio=kd_ratio,
        token_weight=token_weight, normalizer=normalizer, student_softcap=student_softcap, student_scale=student_scale,
        ignore_index=ignore_index, chunk_tokens=chunk_tokens, return_parts=return_parts, impl=impl, logits_dtype=logits_dtype,
    )  # fmt: skip


def _student_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Hidden states and head, checked; cast under autocast."""
    _check_floating("student_hidden", hidden, at_least=1)
    _check_floating("student_weight", weight, ndim=2)
    hidden, weight = _autocast(hidden, weight)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"student_weight: expected shape [V_s, {hidden.shape[-1]}] for student_hidden of shape {_shape(hidden)}, got {_shape(weight)}"
        )
    _check_same_dtype("student_weight", weight, "student_hidden", hidden)
    if bias is not None:
        _check_floating("student_bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"student_bias: expected shape [{weight.shape[0]}], got {_shape(bias)}")
    return [hidden, weight]


def _loss(student, weight, bias, teacher, labels, *, return_parts, **options):
    outputs = ops.kd(*_arguments(student, weight, bias, teacher, labels, **options))
    return _result(outputs, student.shape[:-1], return_parts)


def _result(outputs: tuple[Tensor, ...], leading: torch.Size, return_parts: bool) -> Any:
    loss, tokens, kd_mean, ce_mean, kd, ce, *_ = outputs
    if not return_parts:
        return loss
    return loss, LossParts(kd_mean.detach(), ce_mean.detach(), tokens, kd.detach().view(leading), ce.detach().view(leading))


def _arguments(
    student, weight, bias, teacher, labels, *, divergence, temperature, temperature_squared, kd_ratio, token_weight, normalizer,
    student_softcap, student_scale, ignore_index, chunk_tokens, impl, logits_dtype,
) -> tuple:  # fmt: skip
    """The arguments of `ops.kd`, checked as far as the host can."""
    name = "student_logits" if weight is None else "student_hidden"
    leading, device = student.shape[:-1], student.device
    chosen = divergence if isinstance(divergence, Divergence) else _divergence(divergence)
    signal = _teacher_tensors(teacher, name, student)
    _check_per_token(name, leading, "labels", labels)
    _check_per_token(name, leading, "token_weight", token_weight)
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    if token_weight is not None and not token_weight.is_floating_point():
        raise TypeError(f"token_weight: expected a floating point dtype, got {token_weight.dtype}")
    if chunk_tokens is not None and (isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens: expected a whole number >= 1 or None, got {chunk_tokens!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected a whole number, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int64, got {ignore_index}")
    if not isinstance(temperature_squared, bool):
        raise TypeError(f"temperature_squared: expected True or False, got {temperature_squared!r}")
    _check_logits_dtype(logits_dtype, student)
    for argument, tensor in (("student_weight", weight), ("student_bias", bias), ("labels", labels), ("token_weight", token_weight)):
        _check_device(argument, tensor, name, device)

    knobs = {
        "temperature": temperature,
        "kd_ratio": kd_ratio,
        "kd_factor": float(temperature_squared),
        "student_scale": student_scale,
        "student_softcap": student_softcap,
        "teacher_scale": signal.scale,
        "teacher_softcap": signal.softcap,
        "teacher_temperature": signal.temperature,
        "teacher_share": signal.share,
        "normalizer": normalizer,
    }
    assert tuple(knobs) == ops.KNOBS
    parameters = {p.name: chosen.parameters.get(p.name, p.default) for p in DIVERGENCES[chosen.name].parameters}
    grad = torch.is_grad_enabled()
    return (
        _flat(student),
        weight,
        bias,
        signal.values,
        signal.weight,
        signal.bias,
        signal.ids,
        signal.tail,
        None if labels is None else labels.reshape(-1),
        None if token_weight is None else token_weight.detach().reshape(-1),
        _knob_tensor({**knobs, **parameters}, device),
        " ".join(key for key, value in knobs.items() if value is None),
        chosen.name,
        _implementation(impl, student),
        ignore_index,
        chunk_tokens or 0,
        logits_dtype or torch.promote_types(student.dtype, torch.float32),
        grad and student.requires_grad,
        grad and weight is not None and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )


def _flat(x: Tensor) -> Tensor:
    """``[N, ...]`` without copying; a tensor that cannot be seen so stays as it is."""
    # By its strides: torch.compile cannot carry on after a view that fails.
    outer = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    if x.numel() and any(stride != size * inner for (_, stride), (size, inner) in itertools.pairwise(outer)):
        return x
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _whole(tensor: Any) -> Any:
    """A DTensor gathered, once for all chunks; its gradient is averaged over the mesh, as FSDP2 averages every other parameter's."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    distributed = sys.modules.get("torch.distributed.tensor")  # imported by whoever made a DTensor, and not everywhere there
    if distributed is None or not isinstance(tensor, distributed.DTensor):
        return tensor
    ranks = tensor.device_mesh.size()
    whole = tensor.full_tensor(grad_placements=[distributed.Partial()] * tensor.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / ranks)
    return whole


_divergence = divergence  # the losses' argument of that name hides it


@dataclass(frozen=True, eq=False)
class _TeacherTensors:
    values: Tensor | None = None  # [N, D_t]; without a weight [N, V_t]; with ids [N, K]
    weight: Tensor | None = None
    bias: Tensor | None = None
    softcap: Number | None = None
    scale: Number = 1.0
    ids: Tensor | None = None
    tail: Tensor | None = None
    temperature: Number | None = None
    share: Number | None = None


def _teacher_tensors(teacher: Any, name: str, student: Tensor) -> _TeacherTensors:
    if teacher is None:
        return _TeacherTensors()
    if isinstance(teacher, TeacherInterpolated):
        if not isinstance(teacher.teacher, TeacherHidden | TeacherLogits):
            got = type(teacher.teacher).__name__
            raise TypeError(f"teacher.teacher: expected TeacherHidden or TeacherLogits to interpolate with, got {got}")
        _check_number("teacher.share", teacher.share)
        return replace(_teacher_tensors(teacher.teacher, name, student), share=teacher.share)
    if isinstance(teacher, TeacherTopK):
        return _top_tensors(teacher, name, student)
    if isinstance(teacher, TeacherLogits):
        _check_floating("teacher.logits", teacher.logits, at_least=1)
        values, weight, bias, softcap, scale = teacher.logits, None, None, None, 1.0
        label = "teacher.logits"
    elif isinstance(teacher, TeacherHidden):
        _check_floating("teacher.hidden", teacher.hidden, at_least=1)
        _check_floating("teacher.weight", teacher.weight, ndim=2)
        values, weight = _autocast(teacher.hidden, _whole(teacher.weight))
        bias, softcap, scale = _whole(teacher.bias), teacher.softcap, teacher.scale
        label = "teacher.hidden"
        if weight.shape[1] != values.shape[-1]:
            raise ValueError(
                f"teacher.weight: expected shape [V_t, {values.shape[-1]}] for teacher.hidden of shape"
                f" {_shape(values)}, got {_shape(weight)}"
            )
        _check_same_dtype("teacher.weight", weight, "teacher.hidden", values)
        if bias is not None:
            _check_floating("teacher.bias", bias)
            if bias.shape != weight.shape[:1]:
                raise ValueError(f"teacher.bias: expected shape [{weight.shape[0]}], got {_shape(bias)}")
        for argument, tensor in (("teacher.weight", weight), ("teacher.bias", bias)):
            _check_device(argument, tensor, name, student.device)
    else:
        known = "TeacherHidden, TeacherLogits, TeacherTopK, TeacherInterpolated or None"
        raise TypeError(f"teacher: expected {known}, got {type(teacher).__name__}")
    if values.shape[:-1] != student.shape[:-1]:
        raise ValueError(f"{label}: expected the leading dimensions of {name}, {_shape(student)[:-1]}, got {_shape(values)[:-1]}")
    _check_device(label, values, name, student.device)
    return _TeacherTensors(
        _flat(values.detach()),
        None if weight is None else weight.detach(),
        None if bias is None else bias.detach(),
        softcap,
        scale,
    )


def _top_tensors(teacher: TeacherTopK, name: str, student: Tensor) -> _TeacherTensors:
    ids, log_probs, tail = teacher.ids, teacher.log_probs, teacher.log_tail
    _check_floating("teacher.log_probs", log_probs, at_least=1)
    if not isinstance(ids, Tensor):
        raise TypeError(f"teacher.ids: expected a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher.ids: expected dtype torch.int64 or torch.int32, got {ids.dtype}")
    leading = student.shape[:-1]
    if log_probs.shape[:-1] != leading:
        raise ValueError(f"teacher.log_probs: expected the leading dimensions of {name}, {list(leading)}, got {_shape(log_probs)[:-1]}")
    if ids.shape != log_probs.shape:
        raise ValueError(f"teacher.ids: expected the shape of teacher.log_probs, {_shape(log_probs)}, got {_shape(ids)}")
    _check_per_token(name, leading, "teacher.log_tail", tail)
    if tail is not None and not tail.is_floating_point():
        raise TypeError(f"teacher.log_tail: expected a floating point dtype, got {tail.dtype}")
    for argument, tensor in (("teacher.ids", ids), ("teacher.log_probs", log_probs), ("teacher.log_tail", tail)):
        _check_device(argument, tensor, name, student.device)
    return _TeacherTensors(
        _flat(log_probs.detach()), ids=_flat(ids), tail=None if tail is None else tail.detach().reshape(-1), temperature=teacher.temperature
    )


def _knob_tensor(knobs: Mapping[str, Any], device: torch.device) -> Tensor:
    """One float64 vector: on the host while all knobs are numbers or host tensors, else on the device, to be read there with the rest."""
    absent = ("student_softcap", "teacher_softcap", "teacher_temperature", "teacher_share", "normalizer")
    for name, value in knobs.items():
        if value is not None or name not in absent:
            _check_number(name.replace("teacher_", "teacher."), value)
    values = [0.0 if v is None else v for v in knobs.values()]
    if not any(isinstance(v, Tensor) for v in values) and not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64)
    if all(v.device.type == "cpu" for v in values if isinstance(v, Tensor)):
        device = torch.device("cpu")
    # A product with a tensor, because that is what torch.compile can carry a changing float through; torch.tensor would recompile.
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([v.detach().to(device, torch.float64) if isinstance(v, Tensor) else one * v for v in values])


def _implementation(impl: str, student: Tensor) -> str:
    if impl == "auto":
        return "triton" if student.is_cuda and _triton is not None and student.dtype != torch.float64 else "torch"
    if impl == "torch":
        return impl
    if impl != "triton":
        raise ValueError(f"impl: expected 'auto', 'triton' or 'torch', got {impl!r}")
    if _triton is None:
        raise ValueError("impl: 'triton' needs the package triton, which is not installed")
    if student.dtype == torch.float64:
        raise ValueError("impl: 'triton' computes in fp32, got float64 tensors; use impl='torch'")
    if not student.is_cuda:
        from fastkd_kernels.rows import interpreted

        if not interpreted():
            raise ValueError(f"impl: 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got tensors on {student.device}")
    return impl


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Cast as autocast casts a linear layer's operands; autograd casts the gradients back."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or any(t.dtype == torch.float64 for t in tensors):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(kind)) for t in tensors]


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got a tensor of shape {_shape(value)}")
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected a number or a 0-d tensor of a real dtype, got {value.dtype}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}")


def _check_floating(name: str, value: Any, *, ndim: int | None = None, at_least: int = 0) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating point dtype, got {value.dtype}")
    if (value.ndim and value.shape[-1] == 0) or (ndim == 2 and value.shape[:1] == (0,)):
        raise ValueError(f"{name}: expected a width and a vocabulary of at least 1, got shape {_shape(value)}")
    if value.ndim < at_least or (ndim is not None and value.ndim != ndim):
        raise ValueError(f"{name}: expected {ndim or f'at least {at_least}'} dimensions, got shape {_shape(value)}")


def _check_same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype} (autocast is off)")


def _check_per_token(name: str, leading: torch.Size, argument: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a tensor or None, got {type(value).__name__}")
    if value.shape != leading:
        raise ValueError(f"{argument}: expected the leading dimensions of {name}, {list(leading)}, got shape {_shape(value)}")


def _check_device(name: str, value: Tensor | None, other_name: str, device: torch.device) -> None:
    if value is not None and value.device != device:
        raise ValueError(f"{name}: expected the device of {other_name}, {device}, got {value.device}")


def _check_logits_dtype(dtype: Any, student: Tensor) -> None:
    allowed = {student.dtype, torch.promote_types(student.dtype, torch.float32)}
    if dtype is not None and dtype not in allowed:
        names = " or ".join(sorted(str(d) for d in allowed))
        raise ValueError(f"logits_dtype: expected {names} for student tensors of {student.dtype}, got {dtype}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
