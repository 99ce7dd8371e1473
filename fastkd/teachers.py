"""The teachers of a run: in memory while a stage needs them, and asked for their signal of a batch.

A signal comes from the live model, or from a store (`fastkd.store`) that the live model fills. With a full store of hidden states only the
teacher's head is loaded, with one of probabilities nothing.
"""

import ctypes
import dataclasses
import functools
import gc
import hashlib
import json
import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.integrations import deepspeed

from .data import IGNORE, KDCollator
from .files import json_hash, write_whole
from .hf import Head, fsdp_units, head_of, is_partitioned, is_sharded, redirected, run_at_head, run_body
from .levers import apply_liger
from .models import check_tokenizers, config_hash, fingerprint, load_model, load_tokenizer, model_files, outline, quantized_by
from .packing import Layout
from .preparation import check_head, check_temperatures, pad_id, place
from .signals import Signal, TeacherHidden, TeacherTopK
from .store import Store, StoreError, StoreSpec, check_room, folder_name, read_head, write_head

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TeacherSource", "Teachers", "teacher_sources"]

logger = logging.getLogger(__name__)

# What a batch has for the loss and the trainer, not for a model.
_NOT_INPUTS = ("labels", "shift_labels", "sample_index")


@dataclass(frozen=True)
class TeacherSource:
    """What a teacher is made from.

    Args:
        model: a name, a path, or a module. A module is never freed, nor moved away from where it is used unless ``park`` says so. It may be
            sharded by `fully_shard`, or be the ``module`` of a DeepSpeed ZeRO-3 engine: its head is then gathered once per batch. A
            teacher given by name or path is whole on each process.
        dtype: as in `fastkd.models.load_model`; None: the checkpoint's own.
        device: None: the trainer's.
        park: on leaving a stage keep the model in CPU memory instead of freeing it.
        options: further keywords of `fastkd.models.load_model`.
    """

    model: str | os.PathLike[str] | nn.Module
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    park: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str | os.PathLike | nn.Module):
            raise TypeError(f"model: expected a name, a path or a module, got {type(self.model).__name__}")
        if isinstance(self.model, nn.Module) and (self.options or self.dtype is not None):
            raise ValueError("dtype, options: the model is given as a module, which is loaded already; expected neither")
        if "dtype" in self.options:
            if self.dtype is not None:
                raise ValueError("dtype: given twice, also in options; expected it once")
            object.__setattr__(self, "dtype", self.options["dtype"])
        object.__setattr__(self, "options", {k: v for k, v in self.options.items() if k != "dtype"})


def teacher_sources(teacher: Any, options: Mapping[str, Any] | None = None) -> dict[str, TeacherSource]:
    """What `KDTrainer` takes for teachers, by name, in order of capacity. ``options``: its ``teacher_model_init_kwargs``."""
    if isinstance(teacher, TeacherSource) or not isinstance(teacher, Mapping):
        given = {} if teacher is None else {_name_of(teacher): teacher}
    else:
        given = dict(teacher)
        if not given:
            raise ValueError("teacher_model: expected at least one teacher, got an empty mapping; None where the plan has none")
    options, sources = options or {}, {}
    for name, one in given.items():
        argument = "teacher_model" if len(given) == 1 else f"teacher_model[{name!r}]"
        if not isinstance(one, TeacherSource | str | os.PathLike | nn.Module):
            raise TypeError(f"{argument}: expected a name, a path or a module, got {type(one).__name__}")
        source = one if isinstance(one, TeacherSource) else TeacherSource(one)
        if options and isinstance(source.model, nn.Module):
            raise ValueError("teacher_model_init_kwargs: the teacher is given as a module, which is loaded already")
        rest = dict(options)
        common = rest.pop("dtype", None)
        dtype = source.dtype or common
        sources[str(name)] = dataclasses.replace(source, dtype=dtype, options={**rest, **source.options})
    return sources


def _name_of(teacher: Any) -> str:
    teacher = teacher.model if isinstance(teacher, TeacherSource) else teacher
    name = teacher if isinstance(teacher, str | os.PathLike) else getattr(getattr(teacher, "config", None), "name_or_path", "")
    return Path(name).name or type(teacher).__name__


@dataclass
class _Teacher:
    """A teacher and what of it is in memory."""

    source: TeacherSource
    body: nn.Module | None = None
    sharded: bool = False  # the body, which is whole during its call alone
    units: list[Any] = field(default_factory=list)  # of FSDP2, in the body
    head: Head | None = None
    outline: nn.Module | None = None
    identity: dict[str, Any] | None = None
    parked: bool = False
    checked: bool = False  # its split into body and head
    head_kept: bool = False  # beside its stores

    @property
    def given(self) -> bool:
        return isinstance(self.source.model, nn.Module)

    @property
    def leaves(self) -> bool:
        """Whether it takes room that it gives back when it is left."""
        return self.body is not None and not self.parked and (self.source.park or not self.given)


class Teachers:
    """The teachers of a run, by name, in order of capacity.

    Args:
        sources: weak to strong; may be empty. A name, path or module stands for a `TeacherSource` of it.
        device: where signals are handed over, and where teachers run that name no device.
        tokenizer: the student's; the tokenizers of teachers given by name must agree with it. None: not checked.
        verify: compare each model's split into body and head with its own logits when it is first loaded.
        liger: put Liger's kernels into teachers given by name or path, as `fastkd.levers.liger_config` says; a module is its owner's.

    Attributes:
        memory: a record of each time a model was loaded, freed, parked or brought back: ``event``, ``teacher``, ``before`` and ``after`` in
            bytes (allocated on the teacher's GPU; on the CPU what the process has resident, which weights that are read from a file as
            they are become when they are first used).
        stores: by ``(name, split)``.

    Raises:
        TypeError, ValueError: a source of another type, a tokenizer that differs (naming the teacher and the first such token).
        FileNotFoundError: a path that does not exist.
    """

    def __init__(
        self,
        sources: Mapping[str, TeacherSource | str | os.PathLike[str] | nn.Module],
        *,
        device: torch.device | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verify: bool = True,
        liger: Mapping[str, bool] | None = None,
    ):
        self.device = torch.device(device)
        self._liger = liger
        self.memory: list[dict[str, Any]] = []
        self.stores: dict[tuple[str, str], Store] = {}
        self._tokenizer, self._verify = tokenizer, verify
        self._teachers: dict[str, _Teacher] = {}
        self._samples: dict[str, Collection[int]] = {}
        self._warming: tuple[str, threading.Event] | None = None  # the last teacher that was fetched ahead
        for name, source in sources.items():
            with _named(name):
                source = source if isinstance(source, TeacherSource) else TeacherSource(source)
                if tokenizer is not None and not isinstance(source.model, nn.Module):
                    check_tokenizers(tokenizer, load_tokenizer(source.model, **place(source.options)))
            self._teachers[name] = _Teacher(source)
            self._check_liger(name, source)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._teachers)

    @property
    def loaded(self) -> dict[str, str]:
        """What is in memory: "body" (the head is part of it), "parked" (the body, on the CPU, of another stage) or "head"."""
        found = {}
        for name, teacher in self._teachers.items():
            if teacher.body is not None or teacher.given:
                found[name] = "parked" if teacher.parked else "body"
            elif teacher.head is not None:
                found[name] = "head"
        return found

    def outline(self, name: str) -> nn.Module:
        """A module with the teacher's config, shapes and dtypes, on the meta device unless the teacher was given as a module."""
        teacher = self._get(name)
        if isinstance(teacher.source.model, nn.Module):
            return teacher.source.model
        if teacher.outline is None:
            with _named(name), _random_state_kept(), loaded_whole():
                teacher.outline = outline(teacher.source.model, dtype=teacher.source.dtype, **_without(teacher.source.options, "layers"))
        return teacher.outline

    def identity(self, name: str) -> dict[str, Any] | None:
        """What a teacher given by name or path is: hashes of its weights and config, its options, dtype and head. None for a module."""
        return None if self._get(name).given else self._identity(name)

    def _check_liger(self, name: str, source: TeacherSource) -> None:
        if self._liger is None:
            return
        if torch.device(source.device or self.device).type != self.device.type:
            if self._liger.get("rope", True):
                raise ValueError(
                    f"teacher {name!r}: use_liger_kernel: Liger's rotary kernel would be that of all models of a family, and this one is"
                    f" on the {source.device}, where it may not run; expected training.liger_kernel_config: {{rope: false}} beside it"
                )
            logger.warning("use_liger_kernel: the teacher %s is on the %s, and stays as it is", name, source.device)
        elif isinstance(source.model, nn.Module):
            logger.warning("use_liger_kernel: the teacher %s was given as a module, and stays as it is", name)

    # Stages.

    def stage(self, needed: Collection[str], ahead: str | None = None, samples: Mapping[str, Collection[int]] | None = None) -> None:
        """Hold nothing but these teachers. They are loaded when they are first asked for, if at all.

        Args:
            ahead: the teacher of the next stage: its files are fetched and read into the system's cache in the background.
            samples: by split, the ``sample_index`` of those that the stage visits; a body is let go once a store holds them. A
                split that is not named is visited in whole.
        """
        for name in {*needed, *([] if ahead is None else [ahead])}:
            self._get(name)
        self._samples = dict(samples or {})
        for name in self._teachers:
            if name not in needed:
                self._leave(name)
        if ahead is not None and ahead not in needed:
            self._warm(ahead)

    def model(self, name: str) -> nn.Module:
        """The live model in eval mode, loaded now if it is not there. Loading leaves the random state as it was.

        Raises:
            ValueError: when it cannot be split into a body and a linear head.
        """
        teacher = self._get(name)
        body = teacher.body
        if body is None or teacher.parked:
            device = torch.device(teacher.source.device or self.device)
            with _named(name), self._measured("unpark" if teacher.parked else "load", name, device), _random_state_kept():
                if isinstance(teacher.source.model, nn.Module):
                    body = teacher.source.model
                elif body is None:
                    with loaded_whole():
                        body = load_model(teacher.source.model, dtype=teacher.source.dtype, **_placed(teacher.source.options, device))
                    body.requires_grad_(False)
                if _device_of(body) != device and not _is_spread(body):
                    body.to(device)
                body.eval()
                if self._liger is not None and device.type == self.device.type and not teacher.given and not teacher.parked:
                    apply_liger(body, self._liger, f"the teacher {name!r}")
            teacher.body, teacher.head, teacher.parked, teacher.units = body, None, False, fsdp_units(body)
            teacher.sharded = bool(teacher.units) or is_partitioned(body)  # asked once: it looks at each module and parameter
        if self._verify and not teacher.checked:
            with _random_state_kept():
                check_head(f"teacher {name!r}", body)
            teacher.checked = True
        if not teacher.head_kept:
            self._keep_head(name, body)
            teacher.head_kept = True
        return body.eval() if body.training else body

    def head(self, name: str) -> Head:
        """The teacher's head on the signals' device: the live model's, or, without loading it, the one beside a store of hidden states."""
        teacher = self._get(name)
        if teacher.head is None:
            head = self._stored_head(name) if teacher.body is None or teacher.parked else None
            if head is None:
                head = head_of(self.model(name))
            teacher.head = _moved(head, self.device)
        return teacher.head

    # Signals.

    def signal(
        self,
        name: str,
        batch: Mapping[str, Tensor],
        labels: Tensor,
        index: Tensor | None = None,
        split: str = "train",
        kept: Tensor | None = None,
    ) -> Signal:
        """The teacher's signal for a batch: from the store of ``(name, split)`` where there is one, else from the live model.

        Args:
            batch: what the model's forward takes: ``input_ids``, ``attention_mask`` or ``position_ids``, ... ``[B, S]``.
            labels: ``[B, S]`` int64, aligned with the hidden states (already shifted); -100 where no token counts.
            index: ``[B]`` int64, the samples' ``sample_index``; needed with a store. Rows without a counted token may have any.
            kept: of a batch that `fastkd.packing.joined` has made one row ``[1, T]`` of, which is then the shape of the signal.

        Returns:
            `TeacherHidden`, or `TeacherTopK` of a store of probabilities. From a store, hidden states of what does not count are 0.

        Raises:
            ValueError: with a store, samples that it does not know, or labels that count other tokens than its data set does.
            StoreError: a store that cannot be written.
        """
        store = self.stores.get((name, split))
        if store is None:
            hidden, head = self._live(name, batch)
            return _hidden_signal(hidden.to(self.device), _moved(head, self.device) if self._get(name).sharded else self.head(name))
        rows = self._stored(name, store, labels, index)
        labels = Layout(labels.shape, kept).join(labels)
        counted = labels != IGNORE

        def spread(key: str, empty: float, dtype: torch.dtype, *width: int) -> Tensor:
            """``[B, S, *width]`` of the rows' values at the counted positions."""
            out = torch.full((*labels.shape, *width), empty, dtype=rows[0][key].dtype if rows else dtype, device=labels.device)
            if rows:
                pads = [width[0] - row[key].shape[1] if width else 0 for row in rows]
                parts = [
                    nn.functional.pad(row[key], (0, pad), value=empty) if pad else row[key] for row, pad in zip(rows, pads, strict=True)
                ]
                out[counted] = torch.cat(parts).to(labels.device)
            return out

        if store.spec.kind == "hidden":
            head = self.head(name)
            return _hidden_signal(spread("hidden", 0.0, head.weight.dtype, head.weight.shape[1]), head)
        width = max((row["ids"].shape[1] for row in rows), default=1)
        ids = spread("ids", 0, torch.int32, width)
        log_probs = spread("log_probs", -torch.inf, torch.float32, width)
        if store.spec.kind == "topk":
            return TeacherTopK(ids, log_probs, store.temperature, spread("log_tail", 0.0, torch.float32))
        # Of draws there is no rest.
        return TeacherTopK(ids, log_probs, store.temperature, torch.where(counted, -torch.inf, 0.0))

    def _live(self, name: str, batch: Mapping[str, Tensor]) -> tuple[Tensor, Head]:
        body, teacher = self.model(name), self._get(name)
        device = _device_of(body)
        inputs = {key: value.to(device) for key, value in batch.items() if key not in _NOT_INPUTS}
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # the teacher keeps its own dtype
            if teacher.sharded:
                found = _copied(body, inputs)
                for unit in teacher.units:  # FSDP2 leaves a root whole for a backward pass, which does not come
                    unit.reshard()
                return found
            hidden, _ = run_body(body, **inputs)
        return hidden, head_of(body)

    def _stored(self, name: str, store: Store, labels: Tensor, index: Tensor | None) -> list[dict[str, Tensor]]:
        """What the store holds of the batch's rows that have a counted token; what is missing is filled first."""
        if index is None:
            raise ValueError("data_collator: a store needs each batch's sample_index, as KDCollator gives it; the batch has none")
        table = torch.stack([index.to(labels.device), (labels != IGNORE).sum(1)]).tolist()
        samples, counts = [i for i, n in zip(*table, strict=True) if n], [n for n in table[1] if n]
        positions = store.positions(samples)
        for sample, n, held in zip(samples, counts, store.counted(positions), strict=True):
            if n != held:
                raise ValueError(f"labels: sample_index {sample} has {n} counted tokens in the batch and {held} in the store's data set")
        missing = store.missing(positions, verify=True)
        if missing:
            store.fill(missing, lambda batch: self._live(name, batch))
        if missing or self._get(name).leaves:  # it may have been loaded for something else
            self._let_go(name)
        return store.read(positions)

    # Stores.

    def use_store(
        self,
        spec: StoreSpec,
        split: str,
        dataset: "Dataset",
        *,
        facts: Mapping[str, Any],
        names: Collection[str] | None = None,
        temperatures: Collection[float] = (1.0,),
        vocabulary: int | None = None,
        collate: Callable[[list], dict[str, Tensor]] | None = None,
    ) -> None:
        """Take signals for ``split`` from stores, which are opened or begun now; no model is loaded.

        Args:
            dataset: the split's rows, as `fastkd.data.tokenize` or `fastkd.packing.pack` returns them.
            facts: how the rows came about (``max_length``, ``completion_only_loss``, ``chat_template``, ...): compared with the manifest.
                The tokenizer's hash and that of its template are added.
            names: the teachers; None: all.
            temperatures: those that the run asks for. ``topk`` and ``sampled`` hold for one.
            vocabulary: the student's V_s.
            collate: makes the canonical batches; default `fastkd.data.KDCollator`.

        Raises:
            StoreError: other settings than in the manifest (naming the field), no room, or probabilities at several temperatures.
        """
        temperatures = sorted(set(temperatures)) or [1.0]
        check_temperatures(spec.kind, temperatures)
        pad = pad_id(self._tokenizer)
        for name in self.names if names is None else names:
            if is_sharded(self.outline(name)):
                raise StoreError(
                    f"store: the teacher {name!r} is sharded; expected a name, a path, or a module that is whole on each process"
                )
            teacher, identity = self._get(name), self._identity(name)
            expected = {
                "teacher": identity,
                "tokenizer": _tokenizer_hash(self._tokenizer),
                "template": _template_hash(self._tokenizer),
                **facts,
            }
            source = teacher.source.model
            notes = {
                "teacher": f"a {type(source).__name__}" if isinstance(source, nn.Module) else os.fspath(source),
                "revision": teacher.source.options.get("revision"),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "liger": self._liger,  # the last bits differ, as on another device: not another teacher
            }
            self.stores[name, split] = Store.open(
                self._folder(spec, name) / folder_name(split),
                spec,
                expected,
                dataset,
                collate or KDCollator(pad),
                width=identity["head"][1],
                dtype=getattr(torch, identity["dtype"]),
                temperature=temperatures[0],
                vocabulary=vocabulary,
                notes=notes,
            )
            teacher.head_kept = False
        together = {key: store for key, store in self.stores.items() if Path(store.spec.path) == Path(spec.path)}
        heads = {name: self._identity(name) for (name, _), store in together.items() if store.spec.kind == "hidden"}
        head_bytes = sum(i["head"][0] * i["head"][1] * getattr(torch, i["dtype"]).itemsize for i in heads.values())
        if together:  # a run without a teacher has none
            check_room(list(together.values()), head_bytes, spec.max_gb)

    def fill(self, name: str, split: str = "train", progress: bool = True) -> int:
        """Verify a store and compute all that is missing. It can be interrupted at any time and called again.

        The model is let go when none of its stores needs it any more.

        Returns:
            The number of canonical batches that were computed.

        Raises:
            StoreError: there is no such store, or it cannot be written.
        """
        from tqdm.auto import tqdm

        store = self.stores.get((name, split))
        if store is None:
            raise StoreError(f"store: none is open for teacher {name!r} and split {split!r}; expected a call of use_store before")
        missing = store.missing(verify=True)
        rows = sum(len(store.batches[i]) for i in missing)
        with tqdm(total=rows, desc=f"{name}, {split}", unit="row", disable=not progress) as bar:
            for i in missing:
                store.fill([i], lambda batch: self._live(name, batch))
                bar.update(len(store.batches[i]))
        if store.spec.kind == "hidden" and self._stored_head(name) is None:
            self.model(name)  # writes it
        self._let_go(name)
        return len(missing)

    def _folder(self, spec: StoreSpec, name: str) -> Path:
        return Path(spec.path).expanduser() / folder_name(name)

    def _head_files(self, name: str) -> set[Path]:
        hidden = (store.spec for (n, _), store in self.stores.items() if n == name and store.spec.kind == "hidden")
        return {self._folder(spec, name) / "head.safetensors" for spec in hidden}

    def _stored_head(self, name: str) -> Head | None:
        heads = (read_head(file, self._identity(name)) for file in sorted(self._head_files(name)))
        return next((head for head in heads if head is not None), None)

    def _keep_head(self, name: str, body: nn.Module) -> None:
        for file in self._head_files(name):
            if read_head(file, self._identity(name)) is None:
                write_head(file, head_of(body), self._identity(name))

    def _identity(self, name: str) -> dict[str, Any]:
        """What a teacher's signals depend on; without loading it."""
        teacher = self._get(name)
        if teacher.identity is None:
            drawn: Any = self.outline(name)
            with _named(name):
                linear = drawn.get_output_embeddings()
                if linear is None:
                    raise ValueError(f"{type(drawn).__name__} has no LM head; expected a causal language model")
                source = teacher.source
                options: dict[str, Any] = {}
                if isinstance(source.model, nn.Module):
                    hashes = fingerprint(source.model)
                else:
                    hashes = _files_fingerprint(model_files(source.model, **_without(source.options, "layers")))
                    options = _without(source.options, *place(source.options), "device_map")
                    if bits := options.get("quantization"):
                        options["quantization"] = f"{bits}, {quantized_by(bits)}"
                teacher.identity = {
                    **hashes,
                    "options": json.loads(json.dumps(options, default=str)),
                    "dtype": str(linear.weight.dtype).removeprefix("torch."),
                    "head": list(linear.weight.shape),
                }
        return teacher.identity

    # Memory.

    def _get(self, name: str) -> _Teacher:
        if name not in self._teachers:
            raise ValueError(f"teacher: expected one of {', '.join(self._teachers)}, got {name!r}")
        return self._teachers[name]

    def _let_go(self, name: str) -> None:
        """Leave a body that was there to fill stores once they hold all that the stage visits."""
        for (owner, split), store in self.stores.items():
            if owner == name and not store.complete:
                samples = self._samples.get(split)
                if samples is None or store.missing(store.positions(samples)):
                    return
        self._leave(name)

    def _leave(self, name: str) -> None:
        teacher = self._get(name)
        teacher.head = None
        if teacher.body is None or not teacher.leaves:
            return
        device = _device_of(teacher.body)
        if teacher.source.park:
            with self._measured("park", name, device):
                if device.type != "cpu" and not _is_spread(teacher.body):
                    teacher.body.to("cpu")
                teacher.parked = True
        else:
            with self._measured("free", name, device):
                teacher.body = None

    @contextmanager
    def _measured(self, event: str, name: str, device: torch.device) -> Iterator[None]:
        _release_memory(device)
        before = _memory(device)
        yield
        _release_memory(device)
        after = _memory(device)
        self.memory.append({"event": event, "teacher": name, "before": before, "after": after, "device": str(device)})
        logger.info("teacher %s: %s, %.0f MB before, %.0f MB after on %s", name, event, before / 1e6, after / 1e6, device)

    # The next teacher's files.

    def _warm(self, name: str) -> None:
        teacher = self._get(name)
        stores = [store for (owner, _), store in self.stores.items() if owner == name]
        if teacher.given or teacher.body is not None or (stores and all(store.complete for store in stores)):
            return
        if self._warming is not None:
            if self._warming[0] == name:
                return
            self._warming[1].set()
        # A GGUF file is converted by loading a model, which changes torch's default dtype for a moment: not in a thread.
        source: Any = teacher.source.model
        options = _without(teacher.source.options, "layers")
        find = functools.partial(model_files, source, **options)
        if options.get("gguf_file") or str(source).endswith(".gguf"):
            with _random_state_kept():
                find = functools.partial(list, find())
        stop = threading.Event()
        self._warming = name, stop
        threading.Thread(target=_read_through, args=(name, find, stop), name=f"fastkd-ahead-{name}", daemon=True).start()


def _read_through(name: str, find: Callable[[], Iterable[Path]], stop: threading.Event) -> None:
    """Bring files here and into the system's cache. Nothing of torch: its settings belong to the training going on meanwhile."""
    try:
        for path in find():
            with path.open("rb") as file:
                while not stop.is_set() and file.read(1 << 24):
                    pass
    except Exception as error:  # it only saves time: the stage itself will say what is wrong
        logger.warning("teacher %s: could not be fetched ahead: %s", name, error)


def _hidden_signal(hidden: Tensor, head: Head) -> TeacherHidden:
    return TeacherHidden(hidden, head.weight, head.bias, head.softcap, head.scale)


def _copied(body: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Head]:
    """The hidden states of a sharded teacher and a copy of its head, which is whole inside the head's call alone."""
    kept: list[tuple[Tensor, Head]] = []

    def keep(hidden: Tensor, head: Head) -> Tensor:
        bias = None if head.bias is None else head.bias.clone()
        kept.append((hidden, dataclasses.replace(head, weight=head.weight.clone(), bias=bias)))
        return hidden

    with redirected(body, lambda **inputs: run_at_head(body, keep, **inputs)[0]):
        body(**inputs)
    return kept[0]


def _moved(head: Head, device: torch.device) -> Head:
    bias = None if head.bias is None else head.bias.detach().to(device)
    return dataclasses.replace(head, weight=head.weight.detach().to(device), bias=bias)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _is_spread(model: nn.Module) -> bool:
    """Whether a ``device_map`` has put parts of the model on several devices, where they stay."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def _placed(options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """``options`` with which a quantised model is loaded where it is used: weights are quantised where they are loaded to."""
    quantised = options.get("quantization") or options.get("quantization_config")
    return {**options, "device_map": {"": device}} if quantised and "device_map" not in options else dict(options)


def _without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}


@contextmanager
def _named(name: str) -> Iterator[None]:
    """An error inside says which teacher it is about."""
    try:
        yield
    except Exception as error:  # libraries raise all kinds for files that do not suit, and kinds that take more than a text
        kind = next((kind for kind in (TypeError, ValueError, FileNotFoundError) if isinstance(error, kind)), None)
        raise (kind or ValueError)(f"teacher {name!r}: {error if kind else f'{type(error).__name__}: {error}'}") from error


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Models are loaded whole on each process meanwhile.

    Under DeepSpeed ZeRO-3 transformers loads any model in shards, under FSDP it leaves those of all processes but one empty: for the
    student's wrapper to come, which a teacher does not get.
    """
    config = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    frugal = os.environ.pop(variable, None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None and (kept := config()) is not None:
            deepspeed.set_hf_deepspeed_config(kept)
        if frugal is not None:
            os.environ[variable] = frugal


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Whatever draws random numbers inside, training goes on with those it would have drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _memory(device: torch.device) -> int:
    """Bytes allocated on a GPU; of the CPU, those that the process has resident (-1 where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return -1


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # glibc keeps freed memory for itself unless asked
            ctypes.CDLL("libc.so.6").malloc_trim(0)


# Who a teacher is.


def _files_fingerprint(files: Iterable[Path]) -> dict[str, str]:
    """As `fastkd.models.fingerprint`, of a model's files."""
    configs = {"config.json": "config", "adapter_config.json": "adapter"}
    weights, found = [], {}
    for file in files:
        if file.name in configs:
            found[configs[file.name]] = config_hash(json.loads(file.read_text()))
        else:
            weights.append((file.name, _file_hash(file)))
    return {"weights": json_hash(weights), **found}


def _file_hash(file: Path) -> str:
    """The sha256 of a file. The hub's cache names large files by it; that of others is remembered while size and times stay."""
    real = file.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    stat = real.stat()
    key = json_hash([str(real), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastkd" / "sha256" / key
    try:
        known = cache.read_text()
        if len(known) == 64:
            return known
    except OSError:
        pass
    with real.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_whole(cache, digest)
    except OSError as error:
        logger.info("%s: the checksum of %s is not remembered: %s", cache.parent, file.name, error)
    return digest


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return None
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return json_hash([sorted(tokenizer.get_vocab().items()), special])


def _template_hash(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else json_hash(template)
