"""The peak memory of a run, known before anything is loaded, and what makes it fit a card.

The models are built on the meta device from their configs, and one training micro-batch, the largest that the plan has, runs through their
own code with tensors that have shapes and no contents (`FakeTensorMode`): what autograd keeps, what gradient checkpointing frees and what
autocast copies is counted, not assumed. Exact are weights, gradients, optimizer state, activations and the loss's buffers; estimates, as
no GPU was at hand to measure them, are `CUDA_CONTEXT`, `CUDA_HOST`, `FRAGMENTATION` and the costs in time.
All sizes are bytes; a GB is 2 ** 30 of them, as on a card's label.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from . import chunking, evaluation, gemm
from .adapters import adapted, lora_config
from .config import ModelSpec
from .functional import fused_linear_kd
from .hf import run_body
from .levers import LEAST_BYTES
from .models import keep_layers, outline
from .pacing import sample_table, teacher_of
from .plan import Schedule
from .reference import divergence_per_token
from .signals import TeacherHidden, TeacherTopK
from .store import folder_name

if TYPE_CHECKING:
    from .begin import Run

__all__ = ["MemoryEstimate", "Phase", "Proposal", "Setting", "predict", "proposals", "setting_of"]

GB = 1 << 30
# Estimates: no GPU was measured.
CUDA_CONTEXT = 700 << 20  # context and kernels, workspaces of cuBLAS
CUDA_HOST = 2 << 30  # what CUDA's libraries take of the host's memory
FRAGMENTATION = 0.05  # of what comes and goes: activations, gradients, buffers
GPU_FLOPS = 200e12  # a second, of 16-bit products, as reached in training
CPU_FLOPS = 0.5e12
BUS_BYTES = 20e9  # a second, between host and GPU
# On a CPU: what the first steps bring in that planning does not, and the row functions' blocks.
CPU_LIBRARIES = 40 << 20
ROW_BLOCKS = 32 << 20

# Bytes of state for a parameter of 4 bytes and one of 2, and temporaries of the step in parameters, of the largest tensor or of all of
# them ("foreach"). State of torch's own has its parameters' dtype; that of 8-bit ones has a scale for 256 elements.
_EIGHT = (2.04, 2.04, 0)
_OPTIMIZERS: dict[str, tuple[float, float, float]] = {
    "adamw_torch": (8, 4, 2),
    "adamw_torch_fused": (8, 4, 0),
    "adamw_torch_8bit": _EIGHT,
    "adamw_torch_4bit": (1.1, 1.1, 0),
    "adamw_8bit": _EIGHT,
    "adamw_bnb_8bit": _EIGHT,
    "paged_adamw_8bit": _EIGHT,
    "paged_adamw_32bit": (8, 8, 0),
    "lion_32bit": (4, 4, 0),
    "paged_lion_32bit": (4, 4, 0),
    "lion_8bit": (1.02, 1.02, 0),
    "paged_lion_8bit": (1.02, 1.02, 0),
    "sgd": (0, 0, 0),
    "adagrad": (4, 2, 2),
    "rmsprop": (4, 2, 2),
    "adafactor": (0, 0, 3),  # rows and columns, counted apart
}
_QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # bytes of a weight, with its share of a block's scale

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A time of the run: by part, bytes on the GPU and on the host; of a run on the CPU all are on the host."""

    name: str
    gpu: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run takes.

    Attributes:
        device: "cuda" or "cpu", where the student is.
        phases: in order of time; the peak is the largest of them, for GPU and host each.
        rows, tokens: of the largest micro-batch, ``[rows, tokens]`` with its padding.
        rough: why the activations are a closed formula's and not counted; None where they are counted.
    """

    device: str
    phases: tuple[Phase, ...]
    rows: int
    tokens: int
    rough: str | None = None

    @property
    def gpu(self) -> int:
        """Bytes at the GPU's peak."""
        return max(sum(phase.gpu.values()) for phase in self.phases)

    @property
    def host(self) -> int:
        """Bytes at the host's peak."""
        return max(sum(phase.host.values()) for phase in self.phases)

    def peak(self, device: str | None = None) -> Phase:
        """The phase with the peak of ``device``: "cuda" or "cpu"; None: where the student is."""
        on_gpu = (device or self.device) == "cuda"
        return max(self.phases, key=lambda phase: sum((phase.gpu if on_gpu else phase.host).values()))

    @property
    def dominant(self) -> str:
        """The largest part at the peak of the device where the student is."""
        parts = self.peak().gpu if self.device == "cuda" else self.peak().host
        return max(parts, key=lambda name: parts[name])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values that JSON can hold."""
        totals = {"gpu_bytes": self.gpu, "host_bytes": self.host, "peak": self.peak().name, "dominant": self.dominant}
        return {**totals, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """The parts at the peak, and what each phase comes to."""
        peak, on_gpu = self.peak(), self.device == "cuda"
        where = "GPU, by estimates for its constant parts" if on_gpu else "CPU"
        largest = f"largest micro-batch {self.rows} x {self.tokens} tokens"
        lines = [f"memory ({where}; {largest}), in GB at the peak, which is in the phase {peak.name!r}:", ""]
        names = list(dict.fromkeys([*peak.gpu, *peak.host]))
        rows = [(name, peak.gpu.get(name, 0), peak.host.get(name, 0)) for name in names]
        rows = [row for row in rows if max(row[1:]) >= GB / 200] + [("in all", sum(peak.gpu.values()), sum(peak.host.values()))]
        width = max(len(name) for name, *_ in rows)
        lines += [f"{'':{width}}  " + ("    GPU  " if on_gpu else "") + "   host"]
        for name, gpu, host in rows:
            mark = "  <- most" if name == self.dominant else ""
            lines.append(f"{name:{width}}  " + (f"{gpu / GB:7.2f}  " if on_gpu else "") + f"{host / GB:7.2f}{mark}")
        sizes = [
            f"{phase.name} {sum((phase.gpu if on_gpu else phase.host).values()) / GB:.2f}"
            + (f" (host {sum(phase.host.values()) / GB:.2f})" if on_gpu else "")
            for phase in self.phases
        ]
        lines += ["", "by phase: " + ", ".join(sizes)]
        if self.rough:
            lines.append(f"rough: activations by a formula, as the model could not be traced ({self.rough})")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Setting:
    """All of a run on which its memory depends. Made by `setting_of`; a lever is `dataclasses.replace` of it."""

    student: ModelSpec
    teachers: Mapping[str, ModelSpec]  # those that the plan asks
    schedule: Schedule
    device: str  # "cuda" or "cpu"
    micro_batch: int
    accumulation: int
    base: int  # bytes of the process without any model: interpreter, libraries, data
    eval_batch: int = 8
    eval_lengths: tuple[int, ...] = ()
    processes: int = 1
    checkpointing: bool = False
    checkpointing_kwargs: Mapping[str, Any] | None = None
    autocast: str | None = None
    optim: str = "adamw_torch_fused"
    offloading: bool = False
    padding_free: bool = False
    packing: bool = False
    chunk_tokens: int | None = None
    max_loss_buffer_mb: float | None = None
    logits_dtype: str | None = None
    divergence: str = "forward_kl"
    store: str | None = None
    store_full: bool = False
    store_batch: int = 16
    top_k: int = 64


def setting_of(run: "Run", *, device: str | None = None, schedule: Schedule | None = None, base: int | None = None) -> Setting:
    """What `predict` needs of a configuration whose data are read.

    Args:
        device: "cuda" or "cpu"; None: the GPU, if there is one and the configuration does not say ``use_cpu``.
        schedule: where samples are scored already; None: as if all were of one difficulty.
        base: bytes of a process without models; None: what this one has now, which has the libraries and the data of a run.
    """
    config, args = run.config, run.args
    schedule = schedule or run.schedule(run.unscored)
    used = dict.fromkeys(name for stage in schedule.plan.stages if (name := teacher_of(stage)) is not None)
    store = config.store
    held_out = () if run.held_out is None else tuple(sample_table(run.held_out).lengths)
    return Setting(
        student=config.student,
        teachers={name: config.teachers[name] for name in used},
        schedule=schedule,
        device=device or ("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu"),
        micro_batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        base=_resident() if base is None else base,
        eval_batch=args.per_device_eval_batch_size,
        eval_lengths=held_out,
        processes=max(args.world_size, 1),
        checkpointing=bool(args.gradient_checkpointing),
        checkpointing_kwargs=dict(args.gradient_checkpointing_kwargs or {}),  # type: ignore[arg-type]
        autocast="bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        optim=str(getattr(args.optim, "value", args.optim)),
        offloading=args.activation_offloading,
        padding_free=args.padding_free,
        packing=args.packing,
        chunk_tokens=args.chunk_tokens,
        max_loss_buffer_mb=args.max_loss_buffer_mb,
        logits_dtype=args.logits_dtype,
        divergence=args.divergence,
        store=None if store is None else store.kind,
        store_full=store is not None and all(_is_full(args.store or {}, name, len(schedule.samples)) for name in used),
        store_batch=16 if store is None else store.batch_size,
        top_k=64 if store is None else store.top_k if store.kind == "topk" else store.samples,
    )


def predict(run: "Run | Setting", **options: Any) -> MemoryEstimate:
    """The peak memory of a run; ``options`` are those of `setting_of`. No model is loaded.

    Raises:
        ValueError, OSError: a model whose config cannot be read.
    """
    setting = run if isinstance(run, Setting) else setting_of(run, **options)
    return _Prediction(setting).estimate()


# The largest batches.


def _shape(lengths: Sequence[int], joined: bool) -> tuple[int, int, bool]:
    """``(rows, tokens, padded)`` of rows of these lengths, as one row or padded."""
    return (1, sum(lengths), False) if joined else (len(lengths), max(lengths), max(lengths) > min(lengths))


@functools.lru_cache(maxsize=64)
def largest_micro_batch(schedule: Schedule, size: int, joined: bool = False) -> tuple[int, int, bool, int]:
    """``(rows, tokens, padded, counted)`` of the micro-batch of ``size`` samples with the most tokens, padding included, on any process.

    ``counted`` are the most that any micro-batch trains on, which bounds the loss's buffers. ``joined``: rows follow one another, unpadded.
    """
    lengths = schedule.samples.lengths
    counted = schedule.samples.counted or lengths
    best, most = (1, 1, False), 0
    for rows in _micro_batches(schedule, size):
        best = max(best, _shape([lengths[i] for i in rows], joined), key=lambda shape: (shape[0] * shape[1], shape[1:]))
        most = max(most, sum(counted[i] for i in rows))
    return *best, most


@functools.lru_cache(maxsize=64)
def padding(schedule: Schedule, size: int) -> float:
    """The share of the run's tokens that is padding, in micro-batches of ``size`` samples."""
    held = useful = 0
    for rows in _micro_batches(schedule, size):
        widths = [schedule.samples.lengths[i] for i in rows]
        held, useful = held + max(widths) * len(widths), useful + sum(widths)
    return 1 - useful / held


def _micro_batches(schedule: Schedule, size: int) -> Iterator[Sequence[int]]:
    for step in range(schedule.total_steps):
        batch = schedule.batch(step)
        yield from (batch[first : first + size] for first in range(0, len(batch), size))


# Counting.


class _Ledger(TorchDispatchMode):
    """Bytes of the storages that operations make, by kind, now and at the peak."""

    def __init__(self, model: nn.Module | None, loss_buffers: Callable[[tuple], int] = lambda arguments: 0):
        super().__init__()
        self.known: dict[int, tuple[str, int]] = {}
        self.now: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.loss_buffers = loss_buffers
        tensors = [] if model is None else [*model.parameters(), *model.buffers()]
        self.weights = {t.untyped_storage()._cdata for t in tensors}
        for parameter in tensors:
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                if parameter.grad is not None:
                    self.see(parameter.grad, "gradients")
                parameter.register_post_accumulate_grad_hook(self._became_gradient)

    @property
    def total(self) -> int:
        return sum(self.now.values())

    def see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.weights or key in self.known:
            return
        self.known[key] = kind, storage.nbytes()
        self.now[kind] = self.now.get(kind, 0) + storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        self.note()

    def note(self, extra: int = 0) -> None:
        if self.total + extra > sum(self.at_peak.values()):
            self.at_peak = {**self.now, "loss": self.now.get("loss", 0) + extra}

    def _gone(self, key: int) -> None:
        kind, size = self.known.pop(key)
        self.now[kind] -= size

    def _became_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if key in self.known:
            kind, size = self.known[key]
            self.now[kind] -= size
            self.now["gradients"] = self.now.get("gradients", 0) + size
            self.known[key] = "gradients", size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, kind = func.namespace, "activations"
        if namespace == "fastkd":
            kind = "loss"
        elif func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            kind = "autocast's copies"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, kind)
        if func is torch.ops.fastkd.kd.default:
            self.note(self.loss_buffers(args))
        return out


class _Options(NamedTuple):
    """What a pass of the student depends on beside its model and batch."""

    checkpointing: bool
    checkpointing_kwargs: tuple
    autocast: str | None
    accumulates: bool
    offloading: bool
    stored: str | None
    top_k: int
    divergence: str
    logits: tuple  # of `_loss_buffers`


@dataclass(frozen=True)
class _Traced:
    """Bytes at the peak of a pass by kind, those on the host through offloading, and the width of the hidden states."""

    parts: dict[str, int]
    offloaded: int = 0


def _materialised(model: nn.Module) -> nn.Module:
    """The model with tensors of the current `FakeTensorMode` in place of those on the meta device; what is tied stays so."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in found:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    found[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                table[name] = found[id(tensor)]  # type: ignore[assignment]
    return model


@contextlib.contextmanager
def _known_rows(packed: bool) -> Iterator[None]:
    """Tensors without contents cannot be asked whether their positions begin anew within a row; transformers then takes it that they do."""
    name = "find_packed_sequence_indices"
    own = getattr(masking_utils, name, None)
    if packed or own is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, own)


def _inputs(rows: int, tokens: int, padded: bool, packed: bool) -> dict[str, Tensor]:
    shape = (rows, tokens)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64)}
    if packed:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.int64)
    elif padded:
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    return inputs


class _Offload:
    """As `fastkd.levers.Offloaded`, whose hooks look at devices: what is saved waits elsewhere, small tensors and weights do not."""

    def __init__(self, ledger: _Ledger):
        self.ledger, self.bytes = ledger, 0
        self.moved: set[int] = set()

    def pack(self, tensor: Tensor) -> Any:
        key = tensor.untyped_storage()._cdata
        if tensor.nbytes < LEAST_BYTES or key in self.ledger.weights or self.ledger.known.get(key, ("",))[0] == "autocast's copies":
            return tensor.detach()
        if key not in self.moved:  # once, though several operations save it; another storage may come to have its place
            self.moved.add(key)
            weakref.finalize(tensor.untyped_storage(), self.moved.discard, key)
            self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype

    def unpack(self, kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])


class _Prediction:
    """The phases of one setting."""

    def __init__(self, setting: Setting):
        self.setting, self.cuda = setting, setting.device == "cuda"
        self.rough: str | None = None
        self.rows, self.tokens, self.padded, self.counted = largest_micro_batch(setting.schedule, setting.micro_batch, setting.padding_free)
        self.packed = setting.padding_free or setting.packing

    # Models.

    @functools.cached_property
    def student(self) -> "_Model":
        return _model(_key(self.setting.student, True), True)

    def teacher(self, name: str) -> "_Model":
        return _model(_key(self.setting.teachers[name]), False)

    # Phases.

    def estimate(self) -> MemoryEstimate:
        setting = self.setting
        stages: list[str | None] = [*setting.teachers] or [None]
        phases = [self._loading()]
        if setting.store is not None and not setting.store_full and setting.teachers:
            phases.append(max((self._filling(name) for name in setting.teachers), key=self._size))
        phases.append(max((self._step(name) for name in stages), key=self._size))
        phases.append(max((self._update(name) for name in stages), key=self._size))
        if setting.eval_lengths:
            phases.append(self._evaluation(stages[-1]))
        phases.append(self._saving(stages[-1]))
        return MemoryEstimate(setting.device, tuple(phases), self.rows, self.tokens, self.rough)

    def _size(self, phase: Phase) -> int:
        return sum((phase.gpu if self.cuda else phase.host).values())

    def _phase(self, name: str, gpu: Mapping[str, int], host: Mapping[str, int] | None = None) -> Phase:
        """``gpu``: what is where the student is; ``host``: what is on the host in any case."""
        fixed = {"process": self.setting.base + (CUDA_HOST if self.cuda else CPU_LIBRARIES)}
        held = dict(host or {})
        if not self.cuda:
            for part, size in gpu.items():
                held[part] = held.get(part, 0) + size
            return Phase(name, {}, {**_nonzero(held), **fixed})
        passing = sum(size for part, size in gpu.items() if not part.endswith("weights") and part != "optimizer state")
        margin = {"fragmentation (est)": int(FRAGMENTATION * passing), "CUDA context (est)": CUDA_CONTEXT}
        return Phase(name, {**_nonzero(gpu), **margin}, {**_nonzero(held), **fixed})

    def _held(self, name: str | None, *, state: bool = True, body: bool = False) -> tuple[dict[str, int], dict[str, int]]:
        """Weights and state while ``name`` teaches; ``body``: it is needed in whole whatever the store has."""
        here = {"student weights": self.student.bytes}
        there: dict[str, int] = {}
        if state:
            paged = self.cuda and self.setting.optim.startswith("paged_")
            (there if paged else here)["optimizer state"] = self._state
        if name is not None:
            spec, model = self.setting.teachers[name], self.teacher(name)
            stored = self.setting.store if self.setting.store_full and not body else None
            if stored in (None, "hidden"):
                size = model.bytes if stored is None else model.head_bytes
                away = self.cuda and stored is None and spec.device == "cpu"
                (there if away else here)["teacher weights" if stored is None else "teacher head's weights"] = size
                if away:  # its head is handed over
                    here["teacher head's weights"] = model.head_bytes
        if self.setting.store is None:
            parked = [other for other, spec in self.setting.teachers.items() if spec.park and other != name]
            if parked:
                there["parked teachers' weights"] = sum(self.teacher(other).bytes for other in parked)
        return here, there

    @property
    def _state(self) -> int:
        wide, narrow, _ = _OPTIMIZERS.get(self.setting.optim, (8, 4, 2))
        if self.setting.optim == "adafactor":
            return sum(4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1] if len(shape) > 1 else shape[0])
                       for shape, _ in self.student.trained)  # fmt: skip
        return int(sum(math.prod(shape) * (wide if size >= 4 else narrow) for shape, size in self.student.trained))

    def _loading(self) -> Phase:
        """A model is read into the host's memory; on a CPU it is a file's pages until it is first used."""
        first = next(iter(self.setting.teachers), None)
        teachers = [0 if first is None or self.setting.store_full else self.teacher(first).read_bytes]
        if self.cuda:
            return self._phase(
                "loading", {"student weights": self.student.bytes}, {"weights read": max(self.student.read_bytes, *teachers)}
            )
        return self._phase("loading", {"student weights": self.student.bytes}, {"weights read": max(self.student.converted, *teachers)})

    def _signal(self, name: str, rows: int, tokens: int) -> dict[str, int]:
        """What of the teacher stays while the student learns: hidden states, or lists of probabilities."""
        if self.setting.store in ("topk", "sampled"):
            return {"teacher signal": rows * tokens * (8 * self.setting.top_k + 4)}
        model = self.teacher(name)
        return {"teacher signal": rows * tokens * model.width * model.itemsize}

    def _body(self, name: str, rows: int, tokens: int, padded: bool, packed: bool) -> tuple[dict[str, int], dict[str, int]]:
        """The peak of a teacher's forward pass, where it runs."""
        spec = self.setting.teachers[name]
        found = self._trace("forward", _key(spec), None, rows, tokens, padded, packed)
        parts = {"teacher activations": sum(found.parts.values()) + self._dequantised(spec, self.teacher(name))}
        return ({}, parts) if self.cuda and spec.device == "cpu" else (parts, {})

    def _filling(self, name: str) -> Phase:
        lengths = self.setting.schedule.samples.lengths
        here, there = self._held(name, body=True)
        on, off = self._body(name, min(self.setting.store_batch, len(lengths)), max(lengths), True, self.setting.packing)
        return self._phase("filling the store", {**here, **on}, {**there, **off})

    def _step(self, name: str | None) -> Phase:
        """The teacher's forward pass, or the student's forward and backward, whichever is more."""
        setting = self.setting
        here, there = self._held(name)
        signal = {} if name is None else self._signal(name, self.rows, self.tokens)
        accumulated = {"gradients": self.student.gradient_bytes} if setting.accumulation > 1 else {}
        traced = self._student_pass("train", name, self.rows, self.tokens, self.padded)
        parts = dict(traced.parts)
        parts["activations"] = parts.get("activations", 0) + self._dequantised(setting.student, self.student)
        if "loss" in parts:
            parts["loss buffers"] = parts.pop("loss")
        if setting.processes > 1:
            parts["DDP's buckets"] = self.student.gradient_bytes
        host = {**there, **({"offloaded activations": traced.offloaded} if setting.offloading else {})}
        step = self._phase("training step", {**here, **parts}, host)
        if name is None or (setting.store_full and setting.store is not None):
            return step
        on, off = self._body(name, self.rows, self.tokens, self.padded, self.packed)
        asked = self._phase("training step", {**here, **accumulated, **signal, **on}, {**there, **off})
        both = max(step, asked, key=self._size)
        if self.cuda:  # the host's peak may be in the other
            return replace(both, host=max(step.host, asked.host, key=lambda parts: sum(parts.values())))
        return both

    def _update(self, name: str | None) -> Phase:
        here, there = self._held(name)
        temporaries = _OPTIMIZERS.get(self.setting.optim, (8, 4, 2))[2]
        sizes = [math.prod(shape) * size for shape, size in self.student.trained]
        # On a GPU torch's own take all tensors at once, which costs one copy of them; on a CPU one after the other.
        once = sum(sizes) if self.cuda and temporaries and self.setting.optim != "adafactor" else int(temporaries * max(sizes, default=0))
        return self._phase("optimizer step", {**here, "gradients": self.student.gradient_bytes, "optimizer's temporaries": once}, there)

    def _evaluation(self, name: str | None) -> Phase:
        lengths, size = self.setting.eval_lengths, self.setting.eval_batch
        batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        shapes = [_shape(batch, self.setting.padding_free) for batch in batches]
        rows, tokens, padded = max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1:]))
        here, there = self._held(name)
        traced = self._student_pass("evaluate", name, rows, tokens, padded)
        parts = {"activations": sum(traced.parts.values()) + self._dequantised(self.setting.student, self.student)}
        if name is None or (self.setting.store is not None and self.setting.store_full):
            return self._phase("evaluation", {**here, **parts}, there)
        on, off = self._body(name, rows, tokens, padded, self.packed)
        on = max(on, parts, key=lambda parts: sum(parts.values()))
        return self._phase("evaluation", {**here, **on, **self._signal(name, rows, tokens)}, {**there, **off})

    def _student_pass(self, what: str, name: str | None, rows: int, tokens: int, padded: bool) -> "_Traced":
        teacher = None if name is None else _key(self.setting.teachers[name])
        return self._trace(what, _key(self.setting.student, True), teacher, rows, tokens, padded, self.packed)

    def _saving(self, name: str | None) -> Phase:
        """Weights on a GPU come to the host to be written; an adapter is merged into a copy there."""
        here, there = self._held(name)
        merged = self.setting.student.lora is not None
        copies = {"weights to be written": self.student.dense_bytes if merged else self.student.bytes if self.cuda else 0}
        return self._phase("saving", here, {**there, **copies})

    def _dequantised(self, spec: ModelSpec, model: "_Model") -> int:
        """A quantised matrix is widened for the product, one at a time."""
        return 0 if spec.quantization is None else model.largest_linear * 2

    # Tracing.

    def _trace(
        self, what: str, student: ModelSpec, teacher: ModelSpec | None, rows: int, tokens: int, padded: bool, packed: bool
    ) -> _Traced:
        setting = self.setting
        if "flash" in (student.attn_implementation or ""):  # it takes no mask
            padded = packed = False
        logits = (
            setting.device,
            min(self.counted, rows * tokens),
            setting.chunk_tokens or 0,
            setting.max_loss_buffer_mb,
            setting.logits_dtype,
        )
        stored = setting.store if setting.store_full or setting.store in ("topk", "sampled") else None
        kwargs = tuple(sorted((setting.checkpointing_kwargs or {}).items()))
        options = _Options(
            setting.checkpointing, kwargs, setting.autocast, setting.accumulation > 1, setting.offloading, stored, setting.top_k,
            setting.divergence, logits,
        )  # fmt: skip
        traced, error = _traced(what, student, teacher, (rows, tokens, padded, packed), options if what != "forward" else None)
        if error:
            self.rough = error
        return traced


def _nonzero(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


# Models without weights.


def _key(spec: ModelSpec, trains: bool = False) -> ModelSpec:
    """What of a model its memory depends on, hashable, to remember what is found: ``lora`` is JSON. A student is in fp32 by default."""
    lora: Any = None if spec.lora is None else json.dumps(spec.lora, sort_keys=True, default=str)
    dtype = spec.dtype or ("float32" if trains and spec.quantization is None else None)
    return replace(spec, dtype=dtype, lora=lora, device=None, park=False, from_teacher=None)


def _outline(spec: ModelSpec, dtype: str | None) -> Any:
    return outline(
        spec.model, dtype=dtype, **{name: value for name in ("gguf_file", "revision") if (value := getattr(spec, name)) is not None}
    )


def _built(spec: ModelSpec, trains: bool) -> nn.Module:
    """The model on the meta device, cut and adapted as the configuration says."""
    model = _outline(spec, spec.dtype)
    if spec.layers is not None:
        model = keep_layers(model, spec.layers)
    if spec.attn_implementation in ("eager", "sdpa"):
        model.set_attn_implementation(spec.attn_implementation)
    if spec.lora is not None:
        # Ways to begin that look at the weights make adapters of the same size.
        model = adapted(model, lora_config({**json.loads(str(spec.lora)), "init_lora_weights": True}))
    elif not trains:
        model.requires_grad_(False)
    return model


@dataclass(frozen=True)
class _Model:
    """Sizes of a model.

    Attributes:
        bytes: of its weights and buffers as they are held; dense_bytes: if none were quantised. head_bytes: of its head.
        trained: shape and bytes of an element of each trained parameter.
        read_bytes: on the host while it is read. converted: of those, a file's pages beside the weights that were made from them.
        parameters, body_parameters, largest_linear: elements.
    """

    bytes: int
    dense_bytes: int
    head_bytes: int
    width: int
    vocabulary: int
    itemsize: int
    trained: tuple[tuple[tuple[int, ...], int], ...]
    read_bytes: int
    converted: int
    parameters: int
    body_parameters: int
    largest_linear: int

    @property
    def gradient_bytes(self) -> int:
        return sum(math.prod(shape) * size for shape, size in self.trained)


@functools.lru_cache(maxsize=32)
def _model(spec: ModelSpec, trains: bool) -> _Model:
    model: Any = _built(spec, trains)
    whole = _outline(spec, spec.dtype)
    stored = next(_outline(spec, None).parameters()).element_size()
    head = model.get_output_embeddings()
    kinds = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    total = dense = sum(t.nbytes for t in kinds.values())
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad]
    largest = max((m.weight.numel() for m in linears), default=0)
    if spec.quantization is not None:
        total += sum(int(m.weight.numel() * _QUANTISED[spec.quantization]) - m.weight.nbytes for m in linears)
    # Weights in the file's dtype stay its pages; others are made from them one file at a time.
    count = sum(p.numel() for p in whole.parameters())
    own = head.weight.element_size()
    converts = stored != own or spec.layers is not None
    return _Model(
        bytes=total,
        dense_bytes=dense,
        head_bytes=head.weight.nbytes,
        width=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
        itemsize=own,
        trained=tuple((tuple(p.shape), p.element_size()) for p in model.parameters() if p.requires_grad),
        read_bytes=count * max(stored, own),
        converted=count * stored if converts else 0,
        parameters=sum(p.numel() for p in model.parameters()),
        body_parameters=sum(p.numel() for p in model.parameters() if p is not head.weight),
        largest_linear=largest,
    )


def _loss_buffers(device: str, counted: int, chunk: int, most: float | None, logits: str | None) -> Callable[[tuple], int]:
    """Of the operator's arguments, what it holds beside its outputs."""

    def found(arguments: tuple) -> int:
        student, weight, _, teacher, teacher_weight, _, ids, *_ = arguments
        vocabulary = weight.shape[0]
        shared = 0 if teacher is None or ids is not None else min(vocabulary, teacher_weight.shape[0])
        logits_dtype = torch.promote_types(student.dtype, torch.float32) if logits is None else getattr(torch, logits)
        tokens = chunk if most is None else chunking.chunk_tokens_within(most * 2**20, vocabulary, shared, logits_dtype)
        size = chunking.buffer_bytes(counted, vocabulary, shared, student.dtype, logits_dtype, torch.device(device), tokens)
        if device == "cpu":
            narrow = min(t.dtype.itemsize for t in (student, teacher_weight) if t is not None) < logits_dtype.itemsize
            size += ROW_BLOCKS + (2 * gemm.WIDENED_BYTES if narrow else 0)  # a block of a head in fp32, and its product
        return size

    return found


@functools.lru_cache(maxsize=256)
def _traced(what: str, student: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: _Options | None) -> tuple[_Traced, str | None]:
    """What a pass takes beyond weights and state, and why it is rough, if it is."""
    try:
        with _quiet():
            passes: dict[str, Callable[..., _Traced]] = {"forward": _forward, "train": _train, "evaluate": _evaluate}
            return passes[what](student, teacher, shape, options), None
    except Exception as error:  # a model's own code may do what tensors without contents cannot
        logger.debug("%s could not be traced", student.model, exc_info=True)
        rough = _formula(what, student, teacher, shape, options)
        return rough, f"{Path(student.model).name}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:80]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Models warn of what concerns training, not counting."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _forward(spec: ModelSpec, _: ModelSpec | None, shape: tuple, options: _Options | None) -> _Traced:
    drawn = _built(spec, False)
    with FakeTensorMode(), _known_rows(shape[3]), torch.no_grad():
        model = _materialised(drawn).eval()
        inputs = _inputs(*shape)
        with _Ledger(model) as ledger:
            run_body(model, **inputs)
    return _Traced(ledger.at_peak)


def _teacher_signal(spec: ModelSpec | None, shape: tuple, stored: str | None, top_k: int) -> Any:
    if spec is None:
        return None
    leading = shape[:2]
    if stored in ("topk", "sampled"):
        ids = torch.zeros(*leading, top_k, dtype=torch.int32)
        return TeacherTopK(ids, torch.zeros(*leading, top_k), 1.0, torch.zeros(leading))
    model = _model(spec, False)
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[model.itemsize]
    head = nn.Parameter(torch.empty(model.vocabulary, model.width, dtype=dtype), requires_grad=False)
    return TeacherHidden(torch.empty(*leading, model.width, dtype=dtype), head)


def _train(spec: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: _Options) -> _Traced:
    logits = options.logits[-1]
    drawn = _built(spec, True)
    with FakeTensorMode(), _known_rows(shape[3]):
        model: Any = _materialised(drawn).train()
        if options.checkpointing:
            _checkpoint(model, dict(options.checkpointing_kwargs))
        if options.accumulates:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        inputs = _inputs(*shape)
        ledger = _Ledger(model, _loss_buffers(*options.logits))
        offload = _Offload(ledger)
        hooks: Any = (
            torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack) if options.offloading else contextlib.nullcontext()
        )
        with ledger:
            signal = _teacher_signal(teacher, shape, options.stored, options.top_k)
            if isinstance(signal, TeacherHidden):
                ledger.weights.add(signal.weight.untyped_storage()._cdata)
                _recount(ledger, signal.weight)
            mixed = _autocast(options.autocast)
            with mixed:
                with hooks:
                    hidden, _ = run_body(model, **inputs)
                head = model.get_output_embeddings()
                ids = inputs["input_ids"]
                if not hidden.requires_grad and not head.weight.requires_grad:
                    raise ValueError("nothing is trained")
                loss = fused_linear_kd(hidden, head.weight, signal, ids, kd_ratio=0.0 if signal is None else 0.5, student_bias=head.bias,
                                       logits_dtype=None if logits is None else getattr(torch, logits))  # fmt: skip
            del hidden, signal
            loss.backward()
    return _Traced(ledger.at_peak, offload.bytes)


def _autocast(dtype: str | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=getattr(torch, dtype))


def _recount(ledger: _Ledger, weight: Tensor) -> None:
    """A teacher's head is a weight, counted elsewhere."""
    key = weight.untyped_storage()._cdata
    if key in ledger.known:
        kind, size = ledger.known[key]
        ledger.now[kind] -= size
        ledger.known[key] = kind, 0
        ledger.at_peak = dict(ledger.now)


def _checkpoint(model: Any, kwargs: dict[str, Any]) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **kwargs})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def _evaluate(spec: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: _Options) -> _Traced:
    mixed = _autocast(options.autocast)
    drawn = _built(spec, True)
    with FakeTensorMode(), _known_rows(shape[3]), torch.no_grad():
        model: Any = _materialised(drawn).eval()
        head, inputs = model.get_output_embeddings(), _inputs(*shape)
        with _Ledger(model) as ledger:
            with mixed:
                hidden, _ = run_body(model, **inputs)
            kept = hidden.clone()
            del hidden
            vocabulary = head.weight.shape[0]
            theirs = None if teacher is None or options.stored in ("topk", "sampled") else _model(teacher, False).vocabulary
            rows = min(shape[0] * shape[1], max(1, evaluation.CHUNK_BYTES // (4 * (vocabulary + (theirs or 0)))))
            z = torch.empty(rows, vocabulary)
            nn.functional.cross_entropy(z, torch.zeros(rows, dtype=torch.int64), reduction="none")
            if theirs is not None:
                divergence_per_token(z, torch.empty(rows, theirs), options.divergence)
            elif teacher is not None:
                torch.log_softmax(z, -1).add(z)
            del z, kept
    return _Traced(ledger.at_peak)


def _formula(what: str, spec: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: _Options | None) -> _Traced:
    """Where a model cannot be traced: 34 bytes a token, layer and channel of 16-bit activations, and scores of no attention kept
    (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, without its attention term); with checkpointing 2, and one layer."""
    model: Any = _built(spec, what != "forward")
    config, sizes = model.config.get_text_config(), _model(spec, what != "forward")
    item = 2 if options is not None and options.autocast is not None else sizes.itemsize
    layer = 17 * item * shape[0] * shape[1] * config.hidden_size
    if what == "forward":
        return _Traced({"activations": layer})
    if what == "evaluate":
        return _Traced({"activations": layer + 3 * evaluation.CHUNK_BYTES})
    assert options is not None
    layers = config.num_hidden_layers
    kept = layers * layer if not options.checkpointing else layer + layers * item * shape[0] * shape[1] * config.hidden_size
    head = torch.empty(sizes.vocabulary, sizes.width, device="meta")
    theirs = None if teacher is None else torch.empty(_model(teacher, False).vocabulary, 1, device="meta")
    buffers = _loss_buffers(*options.logits)((head[:1], head, None, theirs, theirs, None, None))
    return _Traced(
        {"activations": kept, "loss": buffers + 4 * head.numel(), "gradients": sizes.gradient_bytes if options.accumulates else 0}
    )


# Making it fit.


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
    found = _Prediction(setting)
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
    place = "teacher" if list(setting.teachers) == ["teacher"] else None
    return " ".join(f"{place or f'teachers.{name}'}.{key}={value}" for name in setting.teachers)


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
        lambda s, work: 2 * _Prediction(s)._state / BUS_BYTES / (s.accumulation * work.step / GPU_FLOPS),
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
        "needs bitsandbytes or torchao; another teacher by rounding",
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
        "needs bitsandbytes or torchao; the frozen weights are rounded: the result changes",
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


# This process.


def _resident() -> int:
    """Bytes that this process has resident; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _is_full(store: Mapping[str, Any], name: str, rows: int) -> bool:
    """As many batches as the training rows need are there; whether they are whole is found when they are read."""
    folder = Path(store["path"]).expanduser() / folder_name(name) / folder_name("train")
    return len(list(folder.glob("batch-*.safetensors"))) >= math.ceil(rows / store["batch_size"])
