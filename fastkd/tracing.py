"""What a model holds and what a pass over it takes, counted on tensors that have shapes and no contents.

Models are built on the meta device from their configs, and run through their own code in a `FakeTensorMode`: what autograd keeps, what
gradient checkpointing frees and what autocast copies is counted, not assumed. All sizes are bytes.
"""

import contextlib
import functools
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from .reference import divergence_per_token
from .signals import TeacherHidden, TeacherTopK

__all__ = ["Ledger", "Options", "Sizes", "Traced", "model_key", "sizes", "trace"]

ROW_BLOCKS = 32 << 20  # of the row functions on a CPU
_QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}  # bytes of a weight, with its share of a block's scale

logger = logging.getLogger(__name__)


class Ledger(TorchDispatchMode):
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
        size = storage.nbytes()
        self.known[key] = kind, size
        self.now[kind] = self.now.get(kind, 0) + size
        weakref.finalize(storage, self._gone, key)
        self.note()

    def note(self, extra: int = 0) -> None:
        """Is this the peak, with ``extra`` of the loss on top?"""
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


class Options(NamedTuple):
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
class Traced:
    """Bytes at the peak of a pass by kind, and those on the host through offloading."""

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

    def __init__(self, ledger: Ledger):
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


# Models without weights.


def model_key(spec: ModelSpec, trains: bool = False) -> ModelSpec:
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
class Sizes:
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
def sizes(spec: ModelSpec, trains: bool) -> Sizes:
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
    return Sizes(
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
def trace(what: str, student: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: Options | None) -> tuple[Traced, str | None]:
    """What a pass takes beyond weights and state, and why it is rough, if it is."""
    try:
        with _quiet():
            passes: dict[str, Callable[..., Traced]] = {"forward": _forward, "train": _train, "evaluate": _evaluate}
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


def _forward(spec: ModelSpec, _: ModelSpec | None, shape: tuple, options: Options | None) -> Traced:
    drawn = _built(spec, False)
    with FakeTensorMode(), _known_rows(shape[3]), torch.no_grad():
        model = _materialised(drawn).eval()
        inputs = _inputs(*shape)
        with Ledger(model) as ledger:
            run_body(model, **inputs)
    return Traced(ledger.at_peak)


def _teacher_signal(spec: ModelSpec | None, shape: tuple, stored: str | None, top_k: int) -> Any:
    if spec is None:
        return None
    leading = shape[:2]
    if stored in ("topk", "sampled"):
        ids = torch.zeros(*leading, top_k, dtype=torch.int32)
        return TeacherTopK(ids, torch.zeros(*leading, top_k), 1.0, torch.zeros(leading))
    model = sizes(spec, False)
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[model.itemsize]
    head = nn.Parameter(torch.empty(model.vocabulary, model.width, dtype=dtype), requires_grad=False)
    return TeacherHidden(torch.empty(*leading, model.width, dtype=dtype), head)


def _train(spec: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: Options) -> Traced:
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
        ledger = Ledger(model, _loss_buffers(*options.logits))
        offload = _Offload(ledger)
        hooks: Any = (
            torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack) if options.offloading else contextlib.nullcontext()
        )
        signal = _teacher_signal(teacher, shape, options.stored, options.top_k)
        if isinstance(signal, TeacherHidden):  # a teacher's head is counted elsewhere
            ledger.weights.add(signal.weight.untyped_storage()._cdata)
        for tensor in () if signal is None else vars(signal).values():
            if isinstance(tensor, Tensor):
                ledger.see(tensor, "teacher signal")
        tensor = None
        with ledger:
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
    return Traced(ledger.at_peak, offload.bytes)


def _autocast(dtype: str | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=getattr(torch, dtype))


def _checkpoint(model: Any, kwargs: dict[str, Any]) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **kwargs})
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def _evaluate(spec: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: Options) -> Traced:
    mixed = _autocast(options.autocast)
    drawn = _built(spec, True)
    with FakeTensorMode(), _known_rows(shape[3]), torch.no_grad():
        model: Any = _materialised(drawn).eval()
        head, inputs = model.get_output_embeddings(), _inputs(*shape)
        with Ledger(model) as ledger:
            with mixed:
                hidden, _ = run_body(model, **inputs)
            kept = hidden.clone()
            del hidden
            vocabulary = head.weight.shape[0]
            theirs = None if teacher is None or options.stored in ("topk", "sampled") else sizes(teacher, False).vocabulary
            rows = min(shape[0] * shape[1], max(1, evaluation.CHUNK_BYTES // (4 * (vocabulary + (theirs or 0)))))
            z = torch.empty(rows, vocabulary)
            nn.functional.cross_entropy(z, torch.zeros(rows, dtype=torch.int64), reduction="none")
            if theirs is not None:
                divergence_per_token(z, torch.empty(rows, theirs), options.divergence)
            elif teacher is not None:
                torch.log_softmax(z, -1).add(z)
            del z, kept
    return Traced(ledger.at_peak)


def _formula(what: str, spec: ModelSpec, teacher: ModelSpec | None, shape: tuple, options: Options | None) -> Traced:
    """Where a model cannot be traced: 34 bytes a token, layer and channel of 16-bit activations, and scores of no attention kept
    (Korthikanti et al. 2022, arXiv 2205.05198, section 4.1, without its attention term); with checkpointing 2, and one layer."""
    model: Any = _built(spec, what != "forward")
    config, found = model.config.get_text_config(), sizes(spec, what != "forward")
    item = 2 if options is not None and options.autocast is not None else found.itemsize
    layer = 17 * item * shape[0] * shape[1] * config.hidden_size
    if what == "forward":
        return Traced({"activations": layer})
    if what == "evaluate":
        return Traced({"activations": layer + 3 * evaluation.CHUNK_BYTES})
    assert options is not None
    layers = config.num_hidden_layers
    kept = layers * layer if not options.checkpointing else layer + layers * item * shape[0] * shape[1] * config.hidden_size
    head = torch.empty(found.vocabulary, found.width, device="meta")
    theirs = None if teacher is None else torch.empty(sizes(teacher, False).vocabulary, 1, device="meta")
    buffers = _loss_buffers(*options.logits)((head[:1], head, None, theirs, theirs, None, None))
    return Traced(
        {"activations": kept, "loss": buffers + 4 * head.numel(), "gradients": found.gradient_bytes if options.accumulates else 0}
    )
