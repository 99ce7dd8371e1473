"""Training plans by name, and plans from a configuration's plain values. Standard library only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any

from .plan import Knob, Plan, PlanError, Ramp, Stage, is_number, is_whole, near_hint

__all__ = ["PRESETS", "TRAINING", "clpd", "curriculum", "kd", "make_plan", "pocl", "pretrain", "progressive", "sft"]


def kd(
    *,
    epochs: float | None = None,
    steps: int | None = None,
    temperature: Knob | None = None,
    kd_ratio: Knob | None = None,
    teacher: str | int = -1,
    **options: Any,
) -> Plan:
    """Plain distillation: one stage, all samples."""
    stage = Stage("kd", None, epochs, steps, teacher, temperature, kd_ratio)
    return _plan("kd", [stage], **options)


def sft(*, epochs: float | None = None, steps: int | None = None, **options: Any) -> Plan:
    """Fine-tuning on the data alone: no teacher."""
    return _plan("sft", [Stage("sft", None, epochs, steps, None, None, 0.0)], **options)


def curriculum(
    *,
    buckets: int | None = None,
    fractions: Sequence[float] | None = None,
    cumulative: bool = True,
    epochs: float | Sequence[float] | None = None,
    temperature: Knob | Sequence[Knob] | None = None,
    kd_ratio: Knob | Sequence[Knob] | None = None,
    restart_lr: bool = False,
    reset_optimizer: bool = False,
    **options: Any,
) -> Plan:
    """The order of the data alone: easy samples first, one teacher. ``cumulative``: a stage keeps the samples of those before it."""
    shares = _fractions(buckets, fractions)
    stages = _bucket_stages("curriculum", shares, cumulative, epochs, temperature, kd_ratio, restart_lr, reset_optimizer)
    return _plan("curriculum", stages, fractions=shares, **options)


def progressive(
    *,
    teachers: int | Sequence[str] = 2,
    epochs: float | Sequence[float] | None = None,
    temperature: Knob | Sequence[Knob] | None = None,
    kd_ratio: Knob | Sequence[Knob] | None = None,
    restart_lr: bool = False,
    reset_optimizer: bool = False,
    **options: Any,
) -> Plan:
    """The order of the teachers alone: all samples in every stage, teachers from weak to strong ("PD" in CLPD's comparison)."""
    names = _teachers(teachers)
    stages = _bucket_stages("progressive", names, False, epochs, temperature, kd_ratio, restart_lr, reset_optimizer)
    stages = [replace(stage, buckets=None, teacher=name) for stage, name in zip(stages, names, strict=True)]
    return _plan("progressive", stages, **options)


def pocl(
    *,
    buckets: int | None = None,
    fractions: Sequence[float] | None = None,
    cumulative: bool = True,
    epochs: float | Sequence[float] = 8,
    temperature: Knob | Sequence[Knob] | None = None,
    kd_ratio: Knob | Sequence[Knob] | None = None,
    restart_lr: bool = True,
    reset_optimizer: bool = True,
    **options: Any,
) -> Plan:
    """POCL as its authors released it: the easiest quarter of the samples first, then the easiest half, and so on.

    4 cumulative quarters, 8 epochs each, temperature 1 / 1.33 / 1.67 / 2, kd_ratio 0.7 / 0.8 / 0.9 / 1, a fresh AdamW and a fresh cosine in
    every stage. With another number of buckets temperature and kd_ratio rise evenly between the same ends. `TRAINING` has the optimizer's
    numbers. The released code multiplies the divergence by T^2 for forward KL, JSD and skew reverse KL and not for reverse KL, TVD and skew
    forward KL; here one argument of the loss, temperature_squared, decides for every divergence.

    Source: "Being Strong Progressively!" (arXiv 2506.05695) and its released code.
    """
    shares = _fractions(buckets, fractions)
    k = len(shares)
    if temperature is None:
        temperature = (1.0, 1.33, 1.67, 2.0) if k == 4 else _spaced(1.0, 2.0, k)
    if kd_ratio is None:
        kd_ratio = (0.7, 0.8, 0.9, 1.0) if k == 4 else _spaced(0.7, 1.0, k)
    stages = _bucket_stages("pocl", shares, cumulative, epochs, temperature, kd_ratio, restart_lr, reset_optimizer)
    return _plan("pocl", stages, fractions=shares, **options)


def clpd(
    *,
    teachers: int | Sequence[str] = 2,
    fractions: Sequence[float] | None = None,
    cumulative: bool = False,
    epochs: float | Sequence[float] | None = None,
    temperature: Knob | Sequence[Knob] | None = None,
    kd_ratio: Knob | Sequence[Knob] | None = None,
    restart_lr: bool = False,
    reset_optimizer: bool = False,
    **options: Any,
) -> Plan:
    """CLPD-style: k teachers from weak to strong aligned with k buckets of samples from easy to hard.

    The paper's abstract establishes the alignment. How samples are scored, the buckets' shares, whether they accumulate, optimizer resets
    and the loss are not established: equal shares, no accumulation and no resets are this preset's choices, all open to the caller.

    Source: "Curriculum Learning-Guided Progressive Distillation" (arXiv 2605.11260), abstract.
    """
    names = _teachers(teachers)
    shares = _fractions(len(names) if fractions is None else None, fractions)
    if len(shares) != len(names):
        raise PlanError(f"fractions: expected one for each of {len(names)} teachers, got {len(shares)}")
    stages = _bucket_stages("clpd", shares, cumulative, epochs, temperature, kd_ratio, restart_lr, reset_optimizer)
    stages = [replace(stage, teacher=name) for stage, name in zip(stages, names, strict=True)]
    return _plan("clpd", stages, fractions=shares, **options)


def pretrain(
    *,
    epochs: float | None = None,
    steps: int | None = None,
    kd_ratio: Knob = 0.5,
    temperature: Knob | None = None,
    teacher: str | int = -1,
    **options: Any,
) -> Plan:
    """Pretraining with ``(1 - kd_ratio) * LM + kd_ratio * KD`` on packed text.

    No kd_ratio is best for every teacher: weak ones want a low one, and the paper sweeps 0.2 to 1. The default is the middle.

    Source: "Strong Teacher Not Needed? On Distillation in LLM Pretraining" (arXiv 2605.23857), abstract.
    """
    return _plan("pretrain", [Stage("pretrain", None, epochs, steps, teacher, temperature, kd_ratio)], **options)


PRESETS: Mapping[str, Callable[..., Plan]] = {f.__name__: f for f in (kd, sft, curriculum, progressive, pocl, clpd, pretrain)}
"""Plans by name; every number is a keyword. ``remainder`` and ``order`` (see `Plan`) are keywords of all."""

TRAINING: Mapping[str, Mapping[str, Any]] = {
    "pocl": {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-7},
        "warmup_steps": 0,
        "weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
    }
}
"""Training arguments that belong to a preset's recipe; they hold where the user says nothing. (POCL's global batch is 64.)"""


def make_plan(value: "str | Mapping[str, Any] | Plan", *, teachers: int = 1) -> Plan:
    """A plan from a preset's name, from ``{preset: NAME, option: value, ...}``, or from ``{stages: [...], fractions: [...], ...}``.

    Args:
        teachers: how many there are, for `progressive` and `clpd`.

    Raises:
        PlanError: an unknown preset, option or key (with the nearest known one), or a value outside its domain.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, Mapping):
        raise PlanError(f"expected a preset's name, or a mapping with the key preset or stages, got {value!r}")
    if value.get("stages") is not None:
        if "preset" in value:
            raise PlanError("stages: given together with preset; keep one of the two")
        return _own_plan(value)
    if value.get("preset") is None:
        raise PlanError(f"preset: missing; give one of {', '.join(PRESETS)}, or list stages")
    # Null is absent, except that no teacher is a choice.
    options = {key: option for key, option in value.items() if option is not None or key == "teacher"}
    name = options.pop("preset")
    if not isinstance(name, str) or name not in PRESETS:
        raise PlanError(f"unknown preset {name!r}{near_hint(name, PRESETS)}; known are {', '.join(PRESETS)}")
    known = [k for k, p in signature(PRESETS[name]).parameters.items() if p.kind is p.KEYWORD_ONLY] + ["remainder", "order"]
    for key in options:
        if key not in known:
            raise PlanError(f"{key}: unknown option of {name}{near_hint(key, known)}; known are {', '.join(known)}")
    if "teachers" in known:
        options.setdefault("teachers", teachers)
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "buckets": ("a whole number > 0", lambda v: is_whole(v) and v > 0),
        "cumulative": ("true or false", lambda v: isinstance(v, bool)),
        "fractions": ("a list of numbers", lambda v: isinstance(v, Sequence) and not isinstance(v, str) and all(map(is_number, v))),
        "teachers": ("a list of names", lambda v: is_whole(v) or (isinstance(v, Sequence) and not isinstance(v, str))),
    }
    for key, (expected, accepts) in checks.items():
        if options.get(key) is not None and not accepts(options[key]):
            raise PlanError(f"{key}: expected {expected}, got {options[key]!r}")
    for key in ("temperature", "kd_ratio"):
        if key in options:
            given = options[key]
            options[key] = [_knob(key, v) for v in given] if isinstance(given, list | tuple) else _knob(key, given)
    return PRESETS[name](**options)


def _own_plan(value: Mapping[str, Any]) -> Plan:
    known = [f.name for f in fields(Plan)]
    for key in value:
        if key not in known:
            raise PlanError(f"{key}: unknown key{near_hint(key, known)}; known are {', '.join(known)}")
    if not isinstance(value["stages"], list | tuple):
        raise PlanError(f"stages: expected a list, got {value['stages']!r}")
    known, stages = [f.name for f in fields(Stage)], []
    for i, row in enumerate(value["stages"]):
        try:
            if not isinstance(row, Mapping):
                raise PlanError(f" expected a mapping, got {row!r}")
            for key in row:
                if key not in known:
                    raise PlanError(f"{key}: unknown key{near_hint(key, known)}; known are {', '.join(known)}")
            given = {key: option for key, option in row.items() if option is not None or key == "teacher"}
            for key in ("temperature", "kd_ratio"):
                if key in given:
                    given[key] = _knob(key, given[key])
            parameters = given.get("parameters") or {}
            if not isinstance(parameters, Mapping):
                raise PlanError(f"parameters: expected a mapping, got {parameters!r}")
            if not all(isinstance(name, str) for name in parameters):
                raise PlanError(f"parameters: expected names and numbers, got {dict(parameters)!r}")
            given["parameters"] = {name: _knob(f"parameters.{name}", knob) for name, knob in parameters.items()}
            if given.get("buckets") is not None:
                buckets = given["buckets"]
                given["buckets"] = tuple(buckets) if isinstance(buckets, list | tuple) else (buckets,)
            stages.append(Stage(**given))
        except PlanError as error:
            raise PlanError(f"stages[{i}].{error}") from None
    fractions = value.get("fractions") or (1.0,)
    if not isinstance(fractions, list | tuple):
        raise PlanError(f"fractions: expected a list of numbers, got {fractions!r}")
    rest = {k: v for k, v in value.items() if k in ("remainder", "order", "name") and v is not None}
    return Plan(tuple(stages), tuple(fractions), **rest)


def _plan(name: str, stages: Sequence[Stage], *, fractions=(1.0,), remainder: str | None = None, order: str | None = None) -> Plan:
    return Plan(tuple(stages), tuple(fractions), remainder, order, name)


def _bucket_stages(name, shares, cumulative, epochs, temperature, kd_ratio, restart_lr, reset_optimizer) -> list[Stage]:
    k = len(shares)
    rows = zip(_each("epochs", epochs, k), _each("temperature", temperature, k), _each("kd_ratio", kd_ratio, k), strict=True)
    return [
        Stage(f"{name} {i + 1}/{k}", tuple(range(i + 1)) if cumulative else (i,), e, None, -1, t, r, {}, restart_lr, reset_optimizer)
        for i, (e, t, r) in enumerate(rows)
    ]


def _fractions(buckets: int | None, fractions: Sequence[float] | None) -> tuple[float, ...]:
    if buckets is not None and fractions is not None:
        raise PlanError("fractions: given together with buckets; keep one of the two")
    n = buckets or 4
    return (1 / n,) * n if fractions is None else tuple(fractions)


def _teachers(teachers: int | Sequence[str]) -> Sequence[str | int]:
    names = range(teachers) if isinstance(teachers, int) else teachers
    if not names:
        raise PlanError("teachers: expected at least one")
    return names


def _each(name: str, value: Any, k: int) -> Sequence[Any]:
    """One value for each of k stages."""
    if not isinstance(value, list | tuple):
        return [value] * k
    if len(value) != k:
        raise PlanError(f"{name}: expected one value, or one for each of {k} stages, got {len(value)}")
    return value


def _spaced(first: float, last: float, k: int) -> list[float]:
    return [round(first + (last - first) * i / (k - 1), 4) for i in range(k)] if k > 1 else [last]


def _knob(key: str, value: Any) -> Knob | None:
    if value is None or isinstance(value, Ramp) or is_number(value):
        return value
    if isinstance(value, Mapping):
        known = ("from", "to", "shape", "over")
        for name in value:
            if name not in known:
                raise PlanError(f"{key}.{name}: unknown key{near_hint(name, known)}; known are {', '.join(known)}")
        if "from" in value and "to" in value:
            try:
                return Ramp(value["from"], value["to"], value.get("shape", "linear"), value.get("over", "stage"))
            except PlanError as error:
                raise PlanError(f"{key}.{error}") from None
    raise PlanError(f"{key}: expected a number, or a ramp such as {{from: 1.0, to: 2.0, shape: linear, over: stage}}, got {value!r}")
