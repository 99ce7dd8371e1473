"""Teacher signals on disk, so that no teacher reads a sample twice.

A store belongs to one teacher and one data set. It holds, for the counted positions of every sample, the teacher's last hidden states
(`hidden`: exact, any temperature, any divergence), its K most probable tokens (`topk`) or draws from it (`sampled`).

The last bits of a hidden state depend on the batch in which it was computed. A store is therefore filled from canonical batches, which
follow from the rows of the data set alone: who asked first, and in which order, leaves no trace. One canonical batch is one file; it is
written under a temporary name, flushed and renamed, so that it is there whole or not at all, and its checksum is verified when a process
first reads it.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import gemm
from .checkpoints import what_is_full
from .data import IGNORE, counted_tokens
from .files import first_difference, json_hash, remove_stale, write_whole
from .hf import Head
from .signals import TeacherTopK

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["KINDS", "Store", "StoreError", "StoreSpec", "check_room", "folder_name", "read_head", "write_head"]

logger = logging.getLogger(__name__)

KINDS = ("hidden", "topk", "sampled")
FORMAT = 1
GB = 1e9
_MANIFEST = "manifest.json"
_BLOCK = 16  # canonical batches are sorted by length within this many batches
_OPEN_FILES = 128
_LOGITS_BYTES = 64 << 20  # of the fp32 logits held at a time while filling


class StoreError(ValueError):
    """A store that cannot be used as it is: other settings, no room, not writable. The message names the folder and a remedy."""


@dataclass(frozen=True)
class StoreSpec:
    """What to keep of a teacher, and where.

    Args:
        path: the folder of all stores; each teacher and split has a folder of its own in it.
        kind: "hidden", "topk" or "sampled".
        max_gb: the most that this run's stores may take together, in 10^9 bytes, whatever else is under ``path``; None: what the disk has.
        batch_size: rows of a canonical batch. Another one gives other last bits, so that a filled store does not take it.
        top_k: tokens kept per position (``topk``).
        samples: draws per position (``sampled``).
        seed: of the draws.
    """

    path: str | os.PathLike[str]
    kind: str = "hidden"
    max_gb: float | None = None
    batch_size: int = 16
    top_k: int = 64
    samples: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise StoreError(f"store.kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.max_gb is not None and not (_is_number(self.max_gb) and self.max_gb > 0):
            raise StoreError(f"store.max_gb: expected a number > 0, got {self.max_gb!r}")
        for name in ("batch_size", "top_k", "samples"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise StoreError(f"store.{name}: expected a whole number >= 1, got {value!r}")


class Store:
    """The signals of one teacher for one data set; made by `Store.open`.

    Attributes:
        folder: where it is.
        batches: positions in the data set of each canonical batch's rows.
        rows, tokens: rows, and counted tokens, of the data set.
        temperature: of the stored probabilities; 1 for hidden states, which have none.
    """

    def __init__(
        self,
        folder: Path,
        spec: StoreSpec,
        dataset: "Dataset",
        collate: Callable[[list], dict[str, Tensor]],
        *,
        width: int,
        dtype: torch.dtype,
        temperature: float,
        vocabulary: int | None,
    ):
        self.folder, self.spec = folder, spec
        self._dataset, self._collate = dataset.with_format(None), collate
        self.temperature, self._vocabulary = temperature, vocabulary
        self._token_bytes = {"hidden": width * dtype.itemsize, "topk": 8 * spec.top_k + 4, "sampled": 8 * spec.samples}
        self._table = _table(dataset)
        self.rows, self.tokens = len(dataset), int(self._table.counted.sum())
        self.batches = _canonical(self._table.lengths, spec.batch_size)
        # Where each row's tokens are: its batch, and from which token on in the batch's file.
        self._batch_of = np.empty(self.rows, np.int64)
        self._offset_of = np.empty(self.rows, np.int64)
        for i, rows in enumerate(self.batches):
            self._batch_of[rows] = i
            self._offset_of[rows] = np.cumsum(self._table.counted[rows]) - self._table.counted[rows]
        by_index = np.argsort(self._table.index, kind="stable")
        self._indices, self._by_index = self._table.index[by_index], by_index
        if np.any(self._indices[1:] == self._indices[:-1]):
            raise ValueError("sample_index: two rows of the data set have the same; expected one of its own for each row")
        self._signature = ""
        self._there = np.zeros(len(self.batches), bool)
        self._verified = np.zeros(len(self.batches), bool)
        self._handles: OrderedDict[int, Any] = OrderedDict()

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        spec: StoreSpec,
        expected: Mapping[str, Any],
        dataset: "Dataset",
        collate: Callable[[list], dict[str, Tensor]],
        *,
        width: int,
        dtype: torch.dtype,
        temperature: float = 1.0,
        vocabulary: int | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> "Store":
        """Open the store in ``folder``, or begin one.

        Args:
            spec: its ``path`` is not used here.
            expected: what the signals depend on, as values that JSON can hold, nested or not: the teacher, the tokenizer, the
                template, ... Kind, canonical batches, data and what the collator makes of them are added here.
            dataset: rows of `fastkd.data.tokenize`. Columns that hold lists are the model's inputs and part of the manifest.
            collate: makes a batch of rows, as `fastkd.data.KDCollator` does.
            width, dtype: D and the dtype of the teacher's hidden states.
            temperature: that of ``topk`` and ``sampled``.
            vocabulary: the student's V_s; ``topk`` and ``sampled`` are over the ids that both models have. None: the teacher's.
            notes: goes into the manifest and is never compared.

        Raises:
            StoreError: what is there was stored with other settings (the message names the first that differs), or cannot be read. Where
                nothing is stored yet, the settings are those of this call.
        """
        folder = Path(folder)
        if spec.kind == "hidden":
            temperature, vocabulary = 1.0, None  # which hidden states do not depend on
        store = cls(folder, spec, dataset, collate, width=width, dtype=dtype, temperature=temperature, vocabulary=vocabulary)
        fields = {"format": FORMAT, "kind": spec.kind, **expected, "batch_size": spec.batch_size}
        if spec.kind != "hidden":
            fields |= {"temperature": temperature, "student_vocabulary": vocabulary}
            fields |= {"top_k": spec.top_k} if spec.kind == "topk" else {"samples": spec.samples, "seed": spec.seed}
        fields["data"] = {"rows": store.rows, "tokens": store.tokens, "sha256": store._table.digest}
        fields["collator"] = _batch_digest(store.batch(0))
        fields = json.loads(json.dumps(fields))
        store._signature = json_hash(fields)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: the store's folder cannot be made: {error}") from error
        remove_stale(folder)
        numbers = [n for entry in os.scandir(folder) if (n := _batch_number(entry.name)) is not None]
        found = _read_manifest(folder / _MANIFEST)
        different = None if found is None else first_difference(found, fields)
        if different is not None and numbers:
            raise StoreError(
                f"{folder}: this store was filled with other settings: {different}; give another store.path, or delete this folder"
            )
        if found is None or different is not None:
            _write(folder / _MANIFEST, _manifest(fields, notes or {}))
        store._there[[n for n in numbers if n < len(store.batches)]] = True
        return store

    # What is there, and what is not.

    @property
    def complete(self) -> bool:
        """Whether every canonical batch is known to have its file. Those that nothing has read yet are not verified by this."""
        return bool(self._there.all())

    def positions(self, sample_index: Iterable[int]) -> np.ndarray:
        """The places in the data set of samples, by their ``sample_index``.

        Raises:
            ValueError: a sample that the data set does not have.
        """
        wanted = np.asarray(list(sample_index), np.int64)
        place = np.minimum(np.searchsorted(self._indices, wanted), self.rows - 1)
        unknown = wanted[self._indices[place] != wanted]
        if len(unknown):
            raise ValueError(f"{self.folder}: sample_index {unknown[0]} is not in the store's data set of {self.rows} rows")
        return self._by_index[place]

    def counted(self, positions: Iterable[int]) -> list[int]:
        """Counted tokens of each row."""
        return self._table.counted[np.asarray(list(positions), np.int64)].tolist()

    def missing(self, positions: Iterable[int] | None = None, *, verify: bool = False) -> list[int]:
        """The canonical batches that have to be computed before ``positions`` (None: all rows) can be read.

        Args:
            verify: also read those that this process has not read yet; a damaged file is logged, removed, and counts as missing.
        """
        if positions is None:
            batches = np.arange(len(self.batches))
        else:
            batches = np.unique(self._batch_of[np.asarray(list(positions), np.int64)])
        for i in batches[~self._there[batches]]:  # another process may have filled it
            self._there[i] = self._file(int(i)).exists()
        if verify:
            for i in batches[self._there[batches]]:
                self._handle(int(i))
        return batches[~self._there[batches]].tolist()

    def predicted_bytes(self, batches: Collection[int] | None = None) -> int:
        """What the signals of these canonical batches (None: all) take on disk, at most; a teacher's head comes on top."""
        if batches is None:
            tokens, files = self.tokens, len(self.batches)
        else:
            tokens, files = sum(int(self._table.counted[self.batches[i]].sum()) for i in batches), len(batches)
        return tokens * self._token_bytes[self.spec.kind] + 1024 * files

    # Writing.

    def batch(self, i: int) -> dict[str, Tensor]:
        """Canonical batch ``i``, on the CPU, as the collator makes it."""
        return self._collate([self._dataset[int(row)] for row in self.batches[i]])

    def fill(self, batches: Iterable[int], compute: Callable[[dict[str, Tensor]], tuple[Tensor, Head]]) -> None:
        """Compute and write canonical batches.

        Args:
            compute: from a batch to the teacher's ``(hidden [B, S, D], head)``.

        Raises:
            StoreError: the disk is full, or does not take the file. What was there stays usable.
        """
        for i in batches:
            batch = self.batch(i)
            hidden, head = compute(batch)
            counted = batch["shift_labels"] != IGNORE
            if counted.sum(1).tolist() != self.counted(self.batches[i]):
                raise ValueError(f"{self.folder}: the collator drops tokens of batch {i} that count in the data set; expected all of them")
            tensors = self._signals(i, hidden[counted.to(hidden.device)], head)
            _write(self._file(i), _pack({name: t.cpu().contiguous() for name, t in tensors.items()}, self._facts(i)))
            self._there[i], self._verified[i] = True, True
            self._handles.pop(i, None)

    @torch.no_grad()
    def _signals(self, i: int, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        """What is kept of the hidden states ``[n, D]`` of batch ``i``'s counted positions."""
        if self.spec.kind == "hidden":
            return {"hidden": hidden}
        rows, vocabulary = head.weight.shape[0], min(self._vocabulary or head.weight.shape[0], head.weight.shape[0])
        step = max(1, _LOGITS_BYTES // (4 * rows))
        parts: list[dict[str, Tensor]] = []
        if self.spec.kind == "topk":
            for chunk in hidden.split(step):
                found = TeacherTopK.from_logits(_logits(chunk, head)[:, :vocabulary], min(self.spec.top_k, vocabulary), self.temperature)
                assert found.log_tail is not None
                parts.append({"ids": found.ids, "log_probs": found.log_probs, "log_tail": found.log_tail})
        else:
            # The numbers are drawn on the CPU for the whole batch: neither the device nor the chunks matter.
            seed = int.from_bytes(hashlib.sha256(f"{self.spec.seed} {i}".encode()).digest()[:7], "big")
            generator = torch.Generator().manual_seed(seed)
            uniform = torch.rand(len(hidden), self.spec.samples, dtype=torch.float64, generator=generator).to(hidden.device)
            for chunk, numbers in zip(hidden.split(step), uniform.split(step), strict=True):
                log_p = torch.log_softmax(_logits(chunk, head)[:, :vocabulary] / self.temperature, -1)
                ids, log_probs = _sample(log_p, numbers)
                parts.append({"ids": ids, "log_probs": log_probs})
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        together["ids"] = together["ids"].to(torch.int32)
        if self.spec.kind == "sampled" and len(hidden):  # the draws of a position seldom all differ
            width = int((together["log_probs"] > -math.inf).sum(1).max())
            together = {name: value[:, :width] for name, value in together.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in together.items()}

    # Reading.

    def read(self, positions: Iterable[int]) -> list[dict[str, Tensor]]:
        """The signals of rows for which `missing` (with ``verify``) finds nothing missing.

        Returns:
            For each row with n counted positions ``hidden``, ``[n, D]`` in the teacher's dtype, or ``ids``, ``[n, K]`` int32,
            ``log_probs``, ``[n, K]`` fp32 in nats (-inf marks an entry that is not used), and of ``topk`` ``log_tail``, ``[n]``. K may
            differ from row to row.

        Raises:
            StoreError: a row that is not there, or damaged.
        """
        found = []
        for row in positions:
            i = int(self._batch_of[row])
            handle = self._handle(i)
            if handle is None:
                raise StoreError(f"{self._file(i)}: missing, or damaged and removed; expected a filled store")
            start = int(self._offset_of[row])
            stop = start + int(self._table.counted[row])
            found.append({name: handle.get_slice(name)[start:stop] for name in handle.keys()})  # noqa: SIM118
        return found

    def _handle(self, i: int) -> Any:
        """An open file of batch ``i``, verified once in the life of this object; None where there is none that is sound."""
        if i in self._handles:
            self._handles.move_to_end(i)
            return self._handles[i]
        path = self._file(i)
        try:
            handle = _unpack(path, self._facts(i), check=not self._verified[i])
        except FileNotFoundError:
            self._there[i] = False
            return None
        except _DamagedError as error:
            logger.warning("%s: %s; it will be computed again", path, error)
            path.unlink(missing_ok=True)
            self._there[i] = self._verified[i] = False
            return None
        self._there[i] = self._verified[i] = True
        self._handles[i] = handle
        if len(self._handles) > _OPEN_FILES:
            self._handles.popitem(last=False)
        return handle

    def _file(self, i: int) -> Path:
        return self.folder / f"batch-{i:07d}.safetensors"

    def _facts(self, i: int) -> dict[str, Any]:
        return {"store": self._signature, "batch": i, "tokens": int(self._table.counted[self.batches[i]].sum())}


def check_room(stores: Collection[Store], head_bytes: int, max_gb: float | None) -> None:
    """Refuse stores that will not fit, before anything is computed.

    Args:
        stores: all those under one path.
        head_bytes: what the teachers' heads take beside them.

    Raises:
        StoreError: with what is needed, what there is, and what would fit.
    """
    need = sum(store.predicted_bytes() for store in stores) + head_bytes
    first = next(iter(stores))
    where = Path(first.spec.path)
    if max_gb is not None and need > max_gb * GB:
        raise StoreError(
            f"store.max_gb: {where} needs {_gb(need)}, allowed are {_gb(max_gb * GB)}; {_fitting(stores, head_bytes, max_gb * GB)}"
        )
    missing = sum(store.predicted_bytes(store.missing()) for store in stores)
    free = shutil.disk_usage(first.folder).free
    if missing > free:
        raise StoreError(f"{where}: {_gb(missing)} are still to be stored, the disk has {_gb(free)} free; {_fitting(stores, 0, free)}")


def _fitting(stores: Collection[Store], head_bytes: int, room: float) -> str:
    """What would fit where the stores do not."""
    spec, tokens = next(iter(stores)).spec, sum(store.tokens for store in stores)
    per_token = sum(store.predicted_bytes() for store in stores) / max(tokens, 1)
    fits = f"about {max(0, int((room - head_bytes) / max(per_token, 1)))} of {tokens} tokens would fit"
    files = 1024 * sum(len(store.batches) for store in stores)
    entries = int(((room - files) / max(tokens, 1) - 4) / 8)
    if entries < 1:
        return fits
    option = {"hidden": "kind topk with top_k", "topk": "top_k", "sampled": "samples"}[spec.kind]
    return f"{fits}, or {option} up to {entries}"


# A teacher's head, so that a full store of hidden states needs nothing of its body.


def write_head(path: Path, head: Head, teacher: Mapping[str, Any]) -> None:
    """Write a head's weight and bias beside the stores of ``teacher``, the manifest's description of it."""
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    facts = {"teacher": json_hash(teacher), "softcap": head.softcap, "scale": head.scale}
    _write(path, _pack({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, facts))


def read_head(path: Path, teacher: Mapping[str, Any]) -> Head | None:
    """The head that `write_head` wrote for this very teacher, on the CPU; None where there is none that is sound."""
    try:
        handle = _unpack(path, {"teacher": json_hash(teacher)}, check=True)
    except FileNotFoundError:
        return None
    except _DamagedError as error:
        logger.warning("%s: %s; the head will be taken from the teacher", path, error)
        path.unlink(missing_ok=True)
        return None
    facts = json.loads(handle.metadata()["fastkd"])
    # Copies: the tensors of a safetensors file are views of it, and a run would hang on that file staying as it is.
    bias = handle.get_tensor("bias").clone() if "bias" in handle.keys() else None  # noqa: SIM118
    return Head(handle.get_tensor("weight").clone(), bias, facts["softcap"], facts["scale"])


def folder_name(name: str) -> str:
    """A teacher's or split's name as that of one folder."""
    return quote(name, safe=" +,=@[]()") if name.strip(".") else name.replace(".", "%2E") or "%"


# What is kept of the logits.


def _logits(hidden: Tensor, head: Head) -> Tensor:
    """Final logits ``[n, V]`` in fp32 (float64 from float64), as the loss computes them."""
    out = hidden.new_empty(len(hidden), head.weight.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    gemm.logits(hidden, head.weight, out)
    return head.finish(out if head.bias is None else out.add_(head.bias))


def _sample(log_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws by the inverse of the distribution function, as distinct ids and the log of their share, -inf where an entry is not used.

    Args:
        log_p: ``[n, V]``.
        uniform: ``[n, N]`` in [0, 1), float64.

    Returns:
        ids, log_probs: ``[n, N]``; of every N entries the used ones come first, by ascending id.
    """
    cdf = log_p.double().exp().cumsum(-1)
    # Searching on the right never lands on an entry of probability 0, unless at the far end, where rounding could.
    drawn = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
    last = (cdf < cdf[:, -1:]).sum(-1, keepdim=True)
    drawn = torch.minimum(drawn, last).sort(-1).values
    new = torch.ones_like(drawn)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    group = new.cumsum(-1) - 1
    counts = torch.zeros_like(uniform).scatter_add_(1, group, torch.ones_like(uniform))
    ids = torch.zeros_like(drawn).scatter_(1, group, drawn)
    return ids, (counts / uniform.shape[1]).log()


# The data set.


@dataclass(frozen=True)
class _Table:
    lengths: np.ndarray
    counted: np.ndarray
    index: np.ndarray
    digest: str


def _table(dataset: "Dataset") -> _Table:
    """Each row's tokens and counted tokens, its index, and one hash of everything that a model is given of it."""
    import pyarrow.compute as pc

    for column in ("input_ids", "labels", "sample_index"):
        if column not in dataset.column_names:
            raise ValueError(f"data set: expected the columns input_ids, labels and sample_index, got {', '.join(dataset.column_names)}")
    kinds = {column: str(getattr(getattr(f, "feature", None), "dtype", "")) for column, f in dataset.features.items()}
    lists = sorted(column for column, kind in kinds.items() if kind.startswith(("int", "uint", "bool")))
    name = "sample_id" if "sample_id" in dataset.column_names else "sample_index"
    hashes = {column: hashlib.sha256() for column in (name, *lists)}
    lengths, counted, index = [], [], []
    for part in dataset.select_columns(sorted({name, "sample_index", *lists})).with_format("arrow").iter(10_000):
        for column in lists:
            sizes = pc.list_value_length(part[column]).to_numpy().astype(np.int64)
            flat = pc.list_flatten(part[column]).to_numpy().astype(np.int64)
            hashes[column].update(sizes.tobytes())
            hashes[column].update(flat.tobytes())
            if column == "input_ids":
                lengths.append(sizes)
        counted.append(counted_tokens(part["labels"]))
        for value in part[name].to_pylist():
            hashes[name].update(f"{value}\n".encode())
        index.append(part["sample_index"].to_numpy().astype(np.int64))
    digest = json_hash({column: h.hexdigest() for column, h in hashes.items()})
    return _Table(np.concatenate(lengths), np.concatenate(counted), np.concatenate(index), digest)


def _batch_digest(batch: Mapping[str, Tensor]) -> str:
    """A hash of what a model is given of a batch, and of which positions count.

    Padding is part of it: a model with experts rounds by which tokens meet in one.
    """
    return _checksum({name: t.contiguous() for name, t in batch.items() if name not in ("labels", "sample_index")}, {})


def _canonical(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Rows in blocks in the data set's order, sorted by length within a block so that little is padding, cut into batches."""
    batches = []
    for start in range(0, len(lengths), _BLOCK * batch_size):
        order = start + np.argsort(lengths[start : start + _BLOCK * batch_size], kind="stable")
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


# The manifest.


def _manifest(fields: Mapping[str, Any], notes: Mapping[str, Any]) -> bytes:
    return (json.dumps({"fields": fields, "notes": dict(notes), "sha256": json_hash(fields)}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest's fields; None where there is none. A damaged one counts as none: each file says what it was written for."""
    try:
        content = json.loads(path.read_text())
        if content["sha256"] == json_hash(content["fields"]):
            return content["fields"]
        reason = "its checksum differs"
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError):
        reason = "it is not readable"
    logger.warning("%s: damaged (%s); it is written again, and files that do not fit it are computed again", path, reason)
    return None


# Files.


class _DamagedError(Exception):
    """A file that is not what was written; the message says how that shows."""


def _pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """A safetensors file whose one metadata entry holds the facts and a checksum of them and of the tensors."""
    # One entry, since the order of several is not fixed and the same content is to give the same file.
    return save(dict(tensors), metadata={"fastkd": json.dumps({**facts, "sha256": _checksum(tensors, facts)}, sort_keys=True)})


def _unpack(path: Path, facts: Mapping[str, Any], check: bool) -> Any:
    """An open safetensors file that says it was written for these facts (and more, perhaps)."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        handle: Any = safe_open(path, framework="pt")
        stated = json.loads((handle.metadata() or {})["fastkd"])
        checksum = stated.pop("sha256")
    except FileNotFoundError:  # another process found it damaged first
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _DamagedError(f"damaged (not readable: {' '.join(str(error).split())[:100]})") from error
    other = [key for key, value in facts.items() if stated.get(key) != value]
    if check:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if _checksum(tensors, stated) != checksum:
            raise _DamagedError("damaged (its checksum differs)")
    if other:
        raise _DamagedError(f"written for another {other[0]}")
    return handle


def _checksum(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content, tidy=False)
    except OSError as error:
        reason = what_is_full(error)
        if reason is None:
            raise StoreError(f"{path}: cannot be written: {error}") from error
        size = _gb(len(content))
        raise StoreError(f"{path}: {reason}, at a file of {size}; what is stored stays usable: make room and start again") from error


def _batch_number(name: str) -> int | None:
    digits = name.removeprefix("batch-").removesuffix(".safetensors")
    return int(digits) if name == f"batch-{digits}.safetensors" and digits.isdigit() else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _gb(n_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{int(n_bytes)} bytes"
