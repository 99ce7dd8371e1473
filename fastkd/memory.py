"""The peak memory of a run, known before anything is loaded.

Weights, gradients, optimizer state, activations and the loss's buffers are counted (`fastkd.tracing`) for the largest micro-batch that the
plan has; estimates, near what an H100 showed (`benchmarks/results/memory-gpu.json`), are `CUDA_CONTEXT`, `CUDA_HOST` and `FRAGMENTATION`.
Not modelled: FSDP and DeepSpeed (each process is taken to hold the whole student), Liger's kernels, which keep less of the activations, and
on a CPU what malloc keeps of what tensors gave back (benchmarks/memory_plan.py measures it).
All sizes are bytes; a GB is 2 ** 30 of them, as on a card's label.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import ModelSpec
from .pacing import sample_table, teacher_of
from .plan import Schedule
from .store import folder_name
from .tracing import Options, Sizes, Traced, model_key, sizes, trace

if TYPE_CHECKING:
    from .begin import Run

__all__ = ["MemoryEstimate", "Phase", "Setting", "predict", "setting_of"]

GB = 1 << 30
# Estimates; an H100 took 770 MB (2 ** 20), and reserved 2 to 11 % more than tensors held.
CUDA_CONTEXT = 700 << 20  # context and kernels, workspaces of cuBLAS
CUDA_HOST = 2 << 30  # what CUDA's libraries take of the host's memory
FRAGMENTATION = 0.10  # of what comes and goes: activations, gradients, buffers
CPU_LIBRARIES = 40 << 20  # what the first steps bring in on a CPU that planning does not

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
    "adafactor": (0, 0, 2),  # rows and columns, counted apart
}


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
        notes: what of this run is not modelled.
    """

    device: str
    phases: tuple[Phase, ...]
    rows: int
    tokens: int
    rough: str | None = None
    notes: tuple[str, ...] = ()

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
        lines += [f"not modelled: {note}" for note in self.notes]
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
    shards: str | None = None
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
        shards="DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true" else None,
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
    return Prediction(setting).estimate()


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


class Prediction:
    """The phases of one setting."""

    def __init__(self, setting: Setting):
        self.setting, self.cuda = setting, setting.device == "cuda"
        self.rough: str | None = None
        self.rows, self.tokens, self.padded, self.counted = largest_micro_batch(setting.schedule, setting.micro_batch, setting.padding_free)
        self.packed = setting.padding_free or setting.packing

    # Models.

    @functools.cached_property
    def student(self) -> "Sizes":
        return sizes(model_key(self.setting.student, True), True)

    def teacher(self, name: str) -> "Sizes":
        return sizes(model_key(self.setting.teachers[name]), False)

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
        return MemoryEstimate(setting.device, tuple(phases), self.rows, self.tokens, self.rough, self._notes())

    def _notes(self) -> tuple[str, ...]:
        """What is not modelled of this setting."""
        notes = []
        if self.setting.shards is not None:
            notes.append(f"{self.setting.shards}: each process is taken to hold the whole student")
        if self.setting.optim not in _OPTIMIZERS:
            notes.append(f"training.optim {self.setting.optim}: counted as adamw_torch")
        if not self.cuda:
            notes.append("what malloc keeps of what tensors gave back; with MALLOC_MMAP_THRESHOLD_=65536 it keeps nothing")
        return tuple(notes)

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
        found = self._pass("forward", model_key(spec), None, rows, tokens, padded, packed)
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
        tensors = [math.prod(shape) * size for shape, size in self.student.trained]
        # On a GPU torch's own take all tensors at once, which costs one copy of them; on a CPU one after the other.
        largest = int(temporaries * max(tensors, default=0))
        once = sum(tensors) if self.cuda and temporaries and self.setting.optim != "adafactor" else largest
        return self._phase("optimizer step", {**here, "gradients": sum(tensors), "optimizer's temporaries": once}, there)

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

    def _student_pass(self, what: str, name: str | None, rows: int, tokens: int, padded: bool) -> "Traced":
        teacher = None if name is None else model_key(self.setting.teachers[name])
        return self._pass(what, model_key(self.setting.student, True), teacher, rows, tokens, padded, self.packed)

    def _saving(self, name: str | None) -> Phase:
        """Weights on a GPU come to the host to be written; an adapter is merged into a copy there."""
        here, there = self._held(name)
        merged = self.setting.student.lora is not None
        copies = {"weights to be written": self.student.dense_bytes if merged else self.student.bytes if self.cuda else 0}
        return self._phase("saving", here, {**there, **copies})

    def _dequantised(self, spec: ModelSpec, model: "Sizes") -> int:
        """A quantised matrix is widened for the product, one at a time."""
        return 0 if spec.quantization is None else model.largest_linear * 2

    # Tracing.

    def _pass(self, what: str, student: ModelSpec, teacher: ModelSpec | None, rows: int, tokens: int, padded: bool, packed: bool) -> Traced:
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
        options = Options(
            setting.checkpointing, kwargs, setting.autocast, setting.accumulation > 1, setting.offloading, stored, setting.top_k,
            setting.divergence, logits,
        )  # fmt: skip
        traced, error = trace(what, student, teacher, (rows, tokens, padded, packed), options if what != "forward" else None)
        if error:
            self.rough = error
        return traced


def _nonzero(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}


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
