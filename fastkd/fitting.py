"""What makes a run fit a card, by `fastkd.memory.predict` of the changed setting, cheapest in time first."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .config import teacher_key
from .memory import CUDA_HOST, GB, MemoryEstimate, Prediction, Setting, padding, predict, setting_of
from .plan import Schedule

if TYPE_CHECKING:
    from .begin import Run

__all__ = ["Proposal", "describe", "proposals"]

# Estimates.
GPU_FLOPS = 200e12  # a second, of 16-bit products, as reached in training
CPU_FLOPS = 0.5e12
BUS_BYTES = 20e9  # a second, between host and GPU


@dataclass(frozen=True)
class Proposal:
    """A change of the configuration, on top of those before it.

    Attributes:
        change: the lines of the configuration, as ``key=value`` words that the command line takes.
        time: what a step takes more (0.33: a third) or less (negative), an estimate; None: it depends on the data or the disk.
        note: what else it costs.
        estimate: with this change and those before it.
        fits: it is within the card.
    """

    change: str
    time: float | None
    note: str
    estimate: MemoryEstimate
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that JSON can hold."""
        return {**dataclasses.asdict(self), "estimate": self.estimate.to_dict()}


@dataclass(frozen=True)
class _Lever:
    change: Callable[[Setting], str]
    applies: Callable[[Setting], bool]
    apply: Callable[[Setting], Setting]
    time: Callable[[Setting, "_Work"], float | None]
    note: str = ""


@dataclass(frozen=True)
class _Work:
    """Multiplications and additions of a micro-batch: of the student's body and head forward, of the teacher's body and head."""

    student: float
    student_head: float
    teacher: float
    teacher_head: float
    backward: float

    @property
    def step(self) -> float:
        return self.student + self.backward + 3 * self.student_head + self.teacher + self.teacher_head


def _work(setting: Setting) -> _Work:
    found = Prediction(setting)
    tokens = found.rows * found.tokens
    student = found.student
    body = 2.0 * student.body_parameters * tokens
    teacher = max((found.teacher(name) for name in setting.teachers), key=lambda m: m.parameters, default=None)
    live = teacher is not None and not setting.store_full
    return _Work(
        body,
        2.0 * student.vocabulary * student.width * found.counted,
        2.0 * teacher.body_parameters * tokens if teacher is not None and live else 0.0,
        2.0 * teacher.vocabulary * teacher.width * found.counted if teacher is not None and setting.store in (None, "hidden") else 0.0,
        (1.0 if setting.student.lora is not None else 2.0) * body + (body if setting.checkpointing else 0.0),
    )


def _teachers_with(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, teachers={name: replace(spec, **changes) for name, spec in setting.teachers.items()})


def _teacher_keys(setting: Setting, key: str, value: str) -> str:
    return " ".join(f"{teacher_key(setting.teachers, name)}.{key}={value}" for name in setting.teachers)


def _halved(setting: Setting) -> Setting:
    size = setting.micro_batch // 2
    return replace(setting, micro_batch=size, accumulation=math.ceil(setting.micro_batch * setting.accumulation / size))


def _live(setting: Setting) -> bool:
    return bool(setting.teachers) and setting.store is None


def _bits(setting: Setting) -> set[str | None]:
    return {spec.quantization for spec in setting.teachers.values()}


# What costs little and leaves the result as it is comes first; what changes it, or makes steps much slower, last.
_LEVERS = (
    _Lever(
        lambda s: "data.padding_free=true",
        lambda s: not s.padding_free and not s.packing and s.micro_batch > 1 and padding(s.schedule, s.micro_batch) > 0.02,
        lambda s: replace(s, padding_free=True),
        lambda s, work: -padding(s.schedule, s.micro_batch),
        "the padding is gone",
    ),
    _Lever(
        lambda s: f"training.per_device_train_batch_size={_halved(s).micro_batch} "
        f"training.gradient_accumulation_steps={_halved(s).accumulation}",
        lambda s: s.micro_batch > 1 and s.micro_batch % 2 == 0,
        _halved,
        lambda s, work: 0.0,
        "none to little, while a micro-batch has some thousand tokens",
    ),
    _Lever(
        lambda s: "training.per_device_eval_batch_size=1",
        lambda s: bool(s.eval_lengths) and s.eval_batch > 1,
        lambda s: replace(s, eval_batch=1),
        lambda s, work: 0.0,
        "evaluation alone is slower",
    ),
    _Lever(
        lambda s: "loss.max_loss_buffer_mb=128",
        lambda s: s.chunk_tokens is None and s.max_loss_buffer_mb is None,
        lambda s: replace(s, max_loss_buffer_mb=128.0),
        lambda s, work: 0.1 * 4 * work.student_head / work.step,
        "the head's products are smaller",
    ),
    _Lever(
        lambda s: "training.bf16=true",
        lambda s: s.device == "cuda" and s.autocast is None and s.student.dtype in (None, "float32"),
        lambda s: replace(s, autocast="bfloat16"),
        lambda s, work: -0.5,
        "results differ by rounding",
    ),
    _Lever(
        lambda s: "training.optim=adamw_8bit",
        lambda s: s.device == "cuda" and s.optim.startswith("adamw_torch"),
        lambda s: replace(s, optim="adamw_8bit"),
        lambda s, work: 0.0,
        "needs bitsandbytes; the optimizer's state is rounded to 8 bits",
    ),
    _Lever(
        lambda s: "store={kind: hidden}",
        _live,
        lambda s: replace(s, store="hidden", store_full=True),
        lambda s, work: -work.teacher / work.step,
        "fill it before, with `fastkd cache`, where there is room for the teacher; takes disk",
    ),
    _Lever(
        lambda s: "training.gradient_checkpointing=true",
        lambda s: not s.checkpointing,
        lambda s: replace(s, checkpointing=True),
        lambda s, work: work.student / work.step,
        "one more forward pass of the student's body",
    ),
    _Lever(
        lambda s: _teacher_keys(s, "quantization", "8bit"),
        lambda s: s.device == "cuda" and bool(s.teachers) and not s.store_full and _bits(s) == {None},
        lambda s: _teachers_with(s, quantization="8bit"),
        lambda s, work: 0.3 * work.teacher / work.step,
        "needs bitsandbytes or torchao; another teacher by rounding",
    ),
    _Lever(
        lambda s: "training.optim=paged_adamw_8bit",
        lambda s: s.device == "cuda" and s.optim in ("adamw_8bit", "adamw_bnb_8bit"),
        lambda s: replace(s, optim="paged_adamw_8bit"),
        lambda s, work: 2 * Prediction(s)._state / BUS_BYTES / (s.accumulation * work.step / GPU_FLOPS),
        "its state travels in each step",
    ),
    _Lever(
        lambda s: "training.activation_offloading=true",
        lambda s: s.device == "cuda" and not s.offloading,
        lambda s: replace(s, offloading=True),
        lambda s, work: 2 * _kept(s) / BUS_BYTES / (work.step / GPU_FLOPS),
        "what the forward keeps travels to the host and back",
    ),
    _Lever(
        lambda s: _teacher_keys(s, "quantization", "4bit"),
        lambda s: s.device == "cuda" and bool(s.teachers) and not s.store_full and _bits(s) == {"8bit"},
        lambda s: _teachers_with(s, quantization="4bit"),
        lambda s, work: 0.1 * work.teacher / work.step,
        "needs bitsandbytes; another teacher by rounding",
    ),
    _Lever(
        lambda s: "student.dtype=bfloat16",
        lambda s: s.student.dtype in (None, "float32"),
        lambda s: replace(s, student=replace(s.student, dtype="bfloat16"), autocast=None),
        lambda s, work: 0.0,
        "small updates of 16-bit weights are rounded away: the result changes",
    ),
    _Lever(
        lambda s: "student.lora=true",
        lambda s: s.student.lora is None and s.device == "cuda",
        lambda s: replace(s, student=replace(s.student, lora={})),
        lambda s, work: -(work.student + work.student_head) / work.step,
        "needs peft; trains an adapter, not the weights: the result changes",
    ),
    _Lever(
        lambda s: "student.quantization=4bit",
        lambda s: s.student.lora is not None and s.student.quantization is None and s.device == "cuda",
        lambda s: replace(s, student=replace(s.student, quantization="4bit")),
        lambda s, work: 0.2 * (work.student + work.backward) / work.step,
        "needs bitsandbytes; the frozen weights are rounded: the result changes",
    ),
    _Lever(
        lambda s: _teacher_keys(s, "device", "cpu"),
        lambda s: s.device == "cuda" and bool(s.teachers) and not s.store_full and any(t.device is None for t in s.teachers.values()),
        lambda s: _teachers_with(s, device="cpu", quantization=None),
        lambda s, work: work.teacher / CPU_FLOPS / (work.step / GPU_FLOPS),
        "its forward pass is on the CPU",
    ),
)  # fmt: skip


def _kept(setting: Setting) -> int:
    found = predict(replace(setting, offloading=True))
    return max(phase.host.get("offloaded activations", 0) for phase in found.phases)


def proposals(run: "Run | Setting", card: int, **options: Any) -> list[Proposal]:
    """Changes that make a run fit, cheapest first, each on top of those before it; empty where it fits as it is.

    Those that turn out not to be needed are left out again. Where all together do not fit, the last one's ``fits`` is False.

    Args:
        card: bytes of the GPU, or of the host for a run on the CPU. options: of `setting_of`.
    """
    setting = run if isinstance(run, Setting) else setting_of(run, **options)
    if _peak(predict(setting)) <= card:
        return []
    chosen: list[_Lever] = []
    now = setting
    for lever in _LEVERS:
        while lever.applies(now) and _peak(predict(now)) > card:
            changed = lever.apply(now)
            peak = _peak(predict(now))
            if peak - _peak(predict(changed)) < 0.01 * (peak - card):  # it would hardly help
                break
            now, chosen = changed, [*chosen, lever]
    if _peak(predict(now)) <= card:
        # The latest are the dearest: which of those before them are still needed?
        for i in reversed(range(len(chosen))):
            without = [*chosen[:i], *chosen[i + 1 :]]
            applied = _applied(setting, without)
            if applied is not None and _peak(predict(applied)) <= card:
                chosen = without
    found, now = [], setting
    for i, lever in enumerate(chosen):
        before, now = now, lever.apply(now)
        if i + 1 < len(chosen) and chosen[i + 1] is lever:  # micro-batches halved once more: one line for all of it
            continue
        estimate = predict(now)
        found.append(Proposal(lever.change(before), lever.time(before, _work(before)), lever.note, estimate, _peak(estimate) <= card))
    return found


def _applied(setting: Setting, levers: list[_Lever]) -> Setting | None:
    for lever in levers:
        if not lever.applies(setting):
            return None
        setting = lever.apply(setting)
    return setting


def _peak(estimate: MemoryEstimate) -> int:
    return estimate.gpu if estimate.device == "cuda" else estimate.host


def describe(run: "Run", card_gb: float | None = None, *, schedule: Schedule | None = None) -> str:
    """The estimate as text, with what makes it fit the card of ``card_gb`` (None: the GPU at hand, if any)."""
    try:
        setting = setting_of(run, schedule=schedule, device=None if card_gb is None else "cuda")
        estimate = predict(setting)
    except (OSError, ValueError) as error:  # a teacher that is not there yet: the plan can be shown all the same
        return f"memory: not known: {' '.join(str(error).split())}\n"
    if card_gb is None and setting.device == "cpu":
        return str(estimate)
    card = int(card_gb * GB) if card_gb is not None else torch.cuda.get_device_properties(0).total_memory
    over = _peak(estimate) - card
    if over <= 0:
        return f"{estimate}\nfits {card / GB:.3g} GB, with {-over / GB:.1f} GB to spare\n"
    lines = [f"{estimate}\ndoes not fit {card / GB:.3g} GB: {over / GB:.1f} GB are lacking; in this order (times are estimates):"]
    found = proposals(setting, card)
    for proposal in found:
        cost = "" if proposal.time is None else f"{proposal.time:+.0%} time a step; " if abs(proposal.time) >= 0.005 else "no time; "
        lines.append(f"  {proposal.change}\n      -> {_peak(proposal.estimate) / GB:.2f} GB; {cost}{proposal.note}")
    if not found or not found[-1].fits:
        lacking = (_peak(found[-1].estimate if found else estimate) - card) / GB
        lines.append(f"with all of it {lacking:.1f} GB are lacking: a smaller model, shorter rows (data.max_length) or a larger card")
    elif found[-1].estimate.host > setting.base + CUDA_HOST + GB:
        lines.append(f"the host then needs {found[-1].estimate.host / GB:.1f} GB")
    return "\n".join(lines) + "\n"
