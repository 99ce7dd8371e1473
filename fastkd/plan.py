"""The training plan: a run as a table of stages, and everything at a step as a pure function of that table.

A `Plan` says which samples, which teacher and which knobs each stage has. With a table of samples, a batch size and a seed it becomes a
`Schedule`, which answers for any step: these samples, this teacher, these knobs. A resumed run therefore needs its step and nothing else,
two processes agree without talking, and a plan can be printed before a run and drawn after it. Standard library only.
"""

import bisect
import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

__all__ = ["ORDERS", "REMAINDERS", "Knob", "Plan", "PlanError", "Point", "Ramp", "Samples", "Schedule", "Stage", "difference", "knob_ends"]

ORDERS = ("shuffled", "sequential", "sorted", "by_length")
REMAINDERS = ("short", "drop")
_MEGABATCH = 50  # batches whose samples are sorted by length together


class PlanError(ValueError):
    """A plan that cannot be followed; the message begins with the key that is wrong."""


@dataclass(frozen=True)
class Ramp:
    """A knob that moves from ``start``, at the first step, to ``end``, at the last, of its stage or of the run.

    Args:
        shape: "linear", or "cosine": half a cosine, slow at both ends.
        over: "stage" or "run".
    """

    start: float
    end: float
    shape: str = "linear"
    over: str = "stage"

    def __post_init__(self):
        for name in ("start", "end"):
            if not is_number(getattr(self, name)):
                raise PlanError(f"{name}: expected a finite number, got {getattr(self, name)!r}")
        _one_of("shape", self.shape, ("linear", "cosine"))
        _one_of("over", self.over, ("stage", "run"))

    def at(self, x: float) -> float:
        """The value at ``x`` in [0, 1]."""
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.end if x >= 1 else self.start + (self.end - self.start) * x


Knob = float | Ramp


@dataclass(frozen=True)
class Stage:
    """A row of the plan. None stands for what the trainer's arguments say.

    Args:
        name: for people.
        buckets: numbers of the plan's difficulty buckets whose samples are trained on, 0 the easiest; None: all samples.
        epochs: passes over the stage's own samples; may be a fraction. steps: optimizer steps instead. Both None: the trainer's.
        teacher: a name, or a place in the order of capacity (0 the weakest, -1 the strongest); None: no teacher, which needs kd_ratio 0.
        temperature: > 0. kd_ratio: in [0, 1]. parameters: of the divergence. Each a number or a `Ramp`.
        restart_lr: the learning rate's schedule begins anew here, and ends at the next restart.
        reset_optimizer: the optimizer's state is forgotten when the stage begins.
    """

    name: str = ""
    buckets: tuple[int, ...] | None = None
    epochs: float | None = None
    steps: int | None = None
    teacher: str | int | None = -1
    temperature: Knob | None = None
    kd_ratio: Knob | None = None
    parameters: Mapping[str, Knob] = field(default_factory=dict)
    restart_lr: bool = False
    reset_optimizer: bool = False

    def __post_init__(self):
        if self.epochs is not None and self.steps is not None:
            raise PlanError("steps: given together with epochs; keep one of the two")
        if self.epochs is not None and not (is_number(self.epochs) and self.epochs > 0):
            raise PlanError(f"epochs: expected a number > 0, got {self.epochs!r}")
        if self.steps is not None and not (is_whole(self.steps) and self.steps > 0):
            raise PlanError(f"steps: expected a whole number > 0, got {self.steps!r}")
        if self.teacher is not None and not (isinstance(self.teacher, str) or is_whole(self.teacher)):
            raise PlanError(f"teacher: expected a name, a place in the order of teachers, or null for none, got {self.teacher!r}")
        _check_knob("temperature", self.temperature, lambda v: v > 0, "numbers > 0")
        _check_knob("kd_ratio", self.kd_ratio, lambda v: 0 <= v <= 1, "numbers in [0, 1]")
        for name, knob in self.parameters.items():
            _check_knob(f"parameters.{name}", knob, lambda v: True, "finite numbers")
        if self.teacher is None and self.kd_ratio not in (None, 0):
            raise PlanError(f"kd_ratio: a stage without a teacher needs 0, got {_knob_to_plain(self.kd_ratio)}")
        if self.buckets is not None:
            if not self.buckets or not all(is_whole(b) and b >= 0 for b in self.buckets):
                raise PlanError(f"buckets: expected a list of numbers >= 0, got {list(self.buckets)}")
            object.__setattr__(self, "buckets", tuple(sorted(set(self.buckets))))
        for name in ("restart_lr", "reset_optimizer"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name}: expected true or false, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Plan:
    """Stages, and how samples become batches.

    Args:
        stages: in order.
        fractions: shares of the samples in each difficulty bucket, easiest first; they sum to 1. A bucket has ``int(share * N)`` samples,
            the last one the rest.
        remainder: of the samples that do not fill a batch at the end of an epoch: "short", a smaller batch, or "drop"; None: the trainer's.
        order: within an epoch: "shuffled", "sequential" (as in the data), "sorted" (easy to hard) or "by_length" (shuffled, then batched
            with others of their length); None: the trainer's.
        name: of the preset, for people.
    """

    stages: tuple[Stage, ...]
    fractions: tuple[float, ...] = (1.0,)
    remainder: str | None = None
    order: str | None = None
    name: str = ""

    def __post_init__(self):
        if not self.stages:
            raise PlanError("stages: expected at least one")
        if not self.fractions or not all(is_number(f) and 0 < f <= 1 for f in self.fractions) or abs(sum(self.fractions) - 1) > 1e-6:
            raise PlanError(f"fractions: expected numbers in (0, 1] that sum to 1, got {list(self.fractions)}")
        if self.remainder is not None:
            _one_of("remainder", self.remainder, REMAINDERS)
        if self.order is not None:
            _one_of("order", self.order, ORDERS)
        for i, stage in enumerate(self.stages):
            if stage.buckets is not None and stage.buckets[-1] >= len(self.fractions):
                raise PlanError(f"stages[{i}].buckets: there are buckets 0 to {len(self.fractions) - 1}, got {stage.buckets[-1]}")

    @property
    def needs_scores(self) -> bool:
        """Whether the plan asks which samples are easier than others."""
        return len(self.fractions) > 1 or self.order == "sorted"

    def filled(
        self,
        *,
        teachers: Sequence[str] = (),
        epochs: float | None = None,
        steps: int | None = None,
        temperature: Knob = 1.0,
        kd_ratio: Knob = 1.0,
        parameters: Mapping[str, Knob] | None = None,
        order: str = "shuffled",
        remainder: str = "short",
    ) -> "Plan":
        """The plan with every None replaced, and every teacher by name.

        Raises:
            PlanError: a teacher that is not among ``teachers``, or a stage that would have no teacher and yet distil.
        """
        stages = []
        for i, stage in enumerate(self.stages):
            length: dict[str, Any] = {}
            if stage.epochs is None and stage.steps is None:
                length = {"epochs": epochs, "steps": None} if steps is None else {"epochs": None, "steps": steps}
            ratio = stage.kd_ratio if stage.kd_ratio is not None else 0.0 if stage.teacher is None else kd_ratio
            teacher = stage.teacher
            # Where nothing is distilled, no teacher need be there.
            idle = ratio == 0 and not isinstance(teacher, str)
            try:
                found = None if teacher is None or (idle and not teachers) else _teacher(teacher, teachers)
                stages.append(
                    replace(
                        stage,
                        **length,
                        name=stage.name or f"stage {i}",
                        teacher=found,
                        temperature=temperature if stage.temperature is None else stage.temperature,
                        kd_ratio=ratio,
                        parameters={**(parameters or {}), **stage.parameters},
                    )
                )
            except PlanError as error:
                raise PlanError(f"stages[{i}].{error}") from None
        return replace(self, stages=tuple(stages), order=self.order or order, remainder=self.remainder or remainder)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, and that `fastkd.presets.make_plan` takes."""
        stages = []
        for stage in self.stages:
            row = {f.name: getattr(stage, f.name) for f in fields(Stage)}
            row["buckets"] = None if stage.buckets is None else list(stage.buckets)
            row |= {name: _knob_to_plain(row[name]) for name in ("temperature", "kd_ratio")}
            row["parameters"] = {name: _knob_to_plain(knob) for name, knob in stage.parameters.items()}
            stages.append(row)
        own = {"fractions": list(self.fractions), "remainder": self.remainder, "order": self.order, "name": self.name}
        return {"stages": stages, **own}

    def schedule(self, samples: "Samples", *, batch_size: int, seed: int, max_steps: int | None = None) -> "Schedule":
        """The plan for these samples, which must be `filled`.

        Args:
            batch_size: the global one: of all processes and accumulation steps.
            max_steps: cuts the run short. Ramps and the learning rate's schedule stay those of the whole plan.
        """
        return Schedule(self, samples, batch_size, seed, max_steps)


@dataclass(frozen=True, eq=False)
class Samples:
    """The table of samples, in the order of the data.

    Args:
        ids: names.
        lengths: tokens of each row. counted: those of them that are trained on; None: as ``lengths``.
        scores: higher is easier; None where the plan does not ask.
        content: any text that stands for the rows' contents, such as a hash; a run refuses to resume when it changes.
    """

    ids: Sequence[str]
    lengths: Sequence[int]
    counted: Sequence[int] | None = None
    scores: Sequence[float] | None = None
    content: str = ""

    def __post_init__(self):
        for name in ("lengths", "counted", "scores"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.ids):
                raise PlanError(f"{name}: expected one value for each of {len(self.ids)} samples, got {len(column)}")
        if self.scores is not None:
            bad = [i for i, score in zip(self.ids, self.scores, strict=True) if not math.isfinite(score)]
            if bad:
                raise PlanError(f"scores: not finite for {len(bad)} samples: {', '.join(map(str, bad[:5]))}")

    def __len__(self) -> int:
        return len(self.ids)

    def ranked(self) -> list[int]:
        """Positions from easy to hard; equal scores in the order of the data."""
        scores = self.scores
        return list(range(len(self))) if scores is None else sorted(range(len(self)), key=lambda i: -scores[i])


@dataclass(frozen=True)
class Point:
    """What a step is.

    Attributes:
        step: from 0. stage: its number. name: its name. begins: the stage begins with this step. ends: it ends with it.
        epoch_ends: a pass over the stage's samples is complete after this step.
        teacher, temperature, kd_ratio, parameters, reset_optimizer: as in `Stage`.
    """

    step: int
    stage: int
    name: str
    begins: bool
    ends: bool
    epoch_ends: bool
    teacher: str | None
    temperature: float
    kd_ratio: float
    parameters: Mapping[str, float]
    reset_optimizer: bool


class Schedule:
    """A plan for given samples, batch size and seed: everything at a step, as pure functions of the step.

    Attributes:
        total_steps: optimizer steps of the run. planned_steps: those of the whole plan, where ``max_steps`` cuts it short.
        starts: the first step of each stage. pools: the number of samples of each stage.
        segments: ``(first step, steps)`` of each run of the learning rate's schedule.

    Raises:
        PlanError: a stage without samples or steps, or scores that are missing.
    """

    def __init__(self, plan: Plan, samples: Samples, batch_size: int, seed: int, max_steps: int | None = None):
        if len(samples) == 0:
            raise PlanError("samples: there are none")
        if plan.needs_scores and samples.scores is None:
            raise PlanError("samples: the plan asks which samples are easier, but they have no scores")
        self.plan, self.samples, self.batch_size, self.seed = plan, samples, batch_size, seed
        self._buckets = _cut(samples.ranked(), plan.fractions)
        self.pools = [sum(len(self._buckets[b]) for b in self._chosen(i)) for i in range(len(plan.stages))]
        self._per_epoch, self._steps = [], []
        for i, (stage, pool) in enumerate(zip(plan.stages, self.pools, strict=True)):
            per_epoch = pool // batch_size if plan.remainder == "drop" else math.ceil(pool / batch_size)
            if per_epoch == 0:
                why = "the bucket is empty; give more rows, or fewer buckets"
                if pool:
                    why = f"fewer than the batch of {batch_size}, and remainder is 'drop'; give more rows, or a smaller batch"
                raise PlanError(f"stages[{i}]: has {pool} samples: {why}")
            self._per_epoch.append(per_epoch)
            # A hair less, because 0.1 * 30 is a hair more than 3.
            self._steps.append(stage.steps or math.ceil((stage.epochs or 1) * per_epoch - 1e-9))
        self.starts = [sum(self._steps[:i]) for i in range(len(self._steps))]
        self.planned_steps = sum(self._steps)
        self.total_steps = self.planned_steps if max_steps is None else min(max_steps, self.planned_steps)
        restarts = sorted({0, *(start for start, stage in zip(self.starts, plan.stages, strict=True) if stage.restart_lr)})
        ends = [*restarts[1:], self.planned_steps]
        self.segments = [(start, end - start) for start, end in zip(restarts, ends, strict=True)]
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _chosen(self, stage: int) -> Iterable[int]:
        buckets = self.plan.stages[stage].buckets
        return range(len(self._buckets)) if buckets is None else buckets

    def at(self, step: int) -> Point:
        """What step ``step`` is; the last one's knobs hold beyond the end."""
        return self._point(min(max(step, 0), self.total_steps - 1))

    def _point(self, step: int) -> Point:
        i = bisect.bisect_right(self.starts, step) - 1
        stage, here, steps, per_epoch = self.plan.stages[i], step - self.starts[i], self._steps[i], self._per_epoch[i]

        def value(knob: Knob | None) -> float:
            if not isinstance(knob, Ramp):
                return float(knob or 0.0)
            place, last = (here, steps - 1) if knob.over == "stage" else (step, self.planned_steps - 1)
            return knob.at(place / last if last else 0.0)

        return Point(
            step=step,
            stage=i,
            name=stage.name,
            begins=here == 0,
            ends=here == steps - 1 or step == self.total_steps - 1,
            epoch_ends=(here + 1) % per_epoch == 0 or here == steps - 1,
            teacher=stage.teacher if isinstance(stage.teacher, str) else None,
            temperature=value(stage.temperature),
            kd_ratio=value(stage.kd_ratio),
            parameters={name: value(knob) for name, knob in stage.parameters.items()},
            reset_optimizer=stage.reset_optimizer and here == 0,
        )

    @property
    def ending(self) -> Point:
        """The last step of the whole plan, also where the run is cut short."""
        return self._point(self.planned_steps - 1)

    def epochs(self, step: int) -> float:
        """Passes over the stages' own samples before step ``step``, of all stages together."""
        rows = zip(self.starts, self._steps, self._per_epoch, strict=True)
        return sum(min(max(step - start, 0), steps) / per_epoch for start, steps, per_epoch in rows)

    def batch(self, step: int) -> list[int]:
        """Positions, in the data, of the samples of step ``step``: all processes and micro-batches together."""
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of {self.total_steps}")
        i = bisect.bisect_right(self.starts, step) - 1
        epoch, place = divmod(step - self.starts[i], self._per_epoch[i])
        return self._order(i, epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def micro_batch(self, step: int, micro: int, *, process: int, processes: int, size: int) -> list[int]:
        """The part of `batch` that one process takes in one accumulation step; empty where a short batch has no more samples.

        Dealt out from the longest to the shortest: the step has the same gradient, but less of it is padding, and what processes
        compute at a time is alike.
        """
        first, lengths = (micro * processes + process) * size, self.samples.lengths
        return sorted(self.batch(step), key=lambda position: -lengths[position])[first : first + size]

    def pool(self, stage: int) -> list[int]:
        """Positions of a stage's samples, easy to hard."""
        return [position for b in self._chosen(stage) for position in self._buckets[b]]

    def stage_of(self) -> list[int | None]:
        """For each sample the first stage that trains on it."""
        found: list[int | None] = [None] * len(self.samples)
        for i in reversed(range(len(self.plan.stages))):
            for position in self.pool(i):
                found[position] = i
        return found

    def _shuffled(self, stage: int, epoch: int) -> list[int]:
        order = self.pool(stage)
        if self.plan.order in ("sorted", "sequential"):
            return order if self.plan.order == "sorted" else sorted(order)
        generator = random.Random(f"{self.seed}/{stage}/{epoch}")
        generator.shuffle(order)
        if self.plan.order != "by_length":
            return order
        lengths, size = self.samples.lengths, self.batch_size
        block = size * max(1, min(_MEGABATCH, len(order) // (4 * size)))
        batches = []
        for start in range(0, len(order), block):
            near = sorted(order[start : start + block], key=lambda position: -lengths[position])
            batches += [near[i : i + size] for i in range(0, len(near), size)]
        short = [batches.pop()] if len(batches[-1]) < size else []
        generator.shuffle(batches)
        return [position for batch in (*batches, *short) for position in batch]

    def segment(self, step: int) -> tuple[int, int]:
        """``(first step, steps)`` of the learning rate's schedule that step ``step`` is in."""
        return self.segments[bisect.bisect_right([start for start, _ in self.segments], min(step, self.planned_steps - 1)) - 1]

    def tokens(self, stage: int) -> int:
        """Tokens that the stage trains on, repeated visits included."""
        counted = self.samples.counted if self.samples.counted is not None else self.samples.lengths
        steps = self._trained(stage)
        whole, rest = divmod(steps, self._per_epoch[stage])
        total, start = 0, self.starts[stage]
        if whole and self.plan.remainder == "short":
            total, start = whole * sum(counted[position] for position in self.pool(stage)), start + whole * self._per_epoch[stage]
            return total + sum(counted[p] for step in range(start, start + rest) for p in self.batch(step))
        return sum(counted[p] for step in range(start, start + steps) for p in self.batch(step))

    def _trained(self, stage: int) -> int:
        """The steps of a stage that the run comes to."""
        return max(0, min(self._steps[stage], self.total_steps - self.starts[stage]))

    def table(self) -> list[dict[str, Any]]:
        """A row for each stage that the run comes to, for people and for ``plan.json``."""
        rows = []
        names = list(dict.fromkeys(name for stage in self.plan.stages for name in stage.parameters))
        for i, stage in enumerate(self.plan.stages):
            steps = self._trained(i)
            if not steps:
                break
            first, last = self.at(self.starts[i]), self.at(self.starts[i] + steps - 1)
            knobs: dict[str, tuple[Any, Any]] = {
                "temperature": (first.temperature, last.temperature),
                "kd_ratio": (first.kd_ratio, last.kd_ratio),
                **{name: (first.parameters.get(name), last.parameters.get(name)) for name in names},
            }
            rows.append(
                {
                    "stage": i,
                    "name": stage.name,
                    "samples": self.pools[i],
                    "epochs": steps / self._per_epoch[i],
                    "first_step": self.starts[i],
                    "steps": steps,
                    "tokens": self.tokens(i),
                    "teacher": first.teacher,
                    **{name: list(ends) if ends[0] != ends[1] else ends[0] for name, ends in knobs.items()},
                    "restart_lr": stage.restart_lr,
                    "reset_optimizer": stage.reset_optimizer,
                }
            )
        return rows

    def facts(self) -> dict[str, Any]:
        """What a run must have in common with the one it resumes."""
        samples = self.samples
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "samples": len(samples),
            "data": _digest([samples.content, list(samples.ids), list(samples.lengths)]),
            "scores": None if samples.scores is None else _digest(list(samples.scores)),
            "plan": self.plan.to_dict(),
        }


def difference(before: Any, now: Any, key: str = "") -> str | None:
    """The first place in which two plain trees differ, in words; None when they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(f"{key}.{k}" if key else str(k), before.get(k), now.get(k)) for k in (*before, *(k for k in now if k not in before))]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(f"{key}[{i}]", b, n) for i, (b, n) in enumerate(zip(before, now, strict=True))]
    else:
        return None if before == now else f"{key} was {before!r}, now it is {now!r}"
    return next((found for k, b, n in pairs if (found := difference(b, n, k))), None)


def _cut(ranked: list[int], fractions: Sequence[float]) -> list[list[int]]:
    # Each boundary is a sum of whole numbers, as in the released POCL code; a hair more, because 0.29 * 100 is a hair less than 29.
    sizes = [int(share * len(ranked) + 1e-9) for share in fractions[:-1]]
    bounds = [0, *(sum(sizes[: i + 1]) for i in range(len(sizes))), len(ranked)]
    return [ranked[a:b] for a, b in itertools.pairwise(bounds)]


def _teacher(teacher: str | int, teachers: Sequence[str]) -> str:
    if isinstance(teacher, str):
        if teacher not in teachers:
            raise PlanError(
                f"teacher: unknown teacher {teacher!r}{near_hint(teacher, teachers)}; there are {', '.join(teachers) or 'none'}"
            )
        return teacher
    if not -len(teachers) <= teacher < len(teachers):
        raise PlanError(f"teacher: number {teacher} of {len(teachers)} teachers; give more teachers, or fewer stages")
    return teachers[teacher]


def _knob_to_plain(knob: Knob | None) -> Any:
    return {"from": knob.start, "to": knob.end, "shape": knob.shape, "over": knob.over} if isinstance(knob, Ramp) else knob


def knob_ends(knob: Knob | None) -> tuple[float, ...]:
    """The values between which a knob moves."""
    return (knob.start, knob.end) if isinstance(knob, Ramp) else () if knob is None else (knob,)


def _check_knob(name: str, knob: Any, contains: Callable[[float], bool], expected: str) -> None:
    if not all(is_number(v) and contains(v) for v in knob_ends(knob)):
        raise PlanError(f"{name}: expected {expected}, got {_knob_to_plain(knob)!r}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise PlanError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def near_hint(value: Any, known: Iterable[str]) -> str:
    near = get_close_matches(str(value), list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
