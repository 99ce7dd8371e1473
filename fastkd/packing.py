"""Rows with several documents, kept out of each other's attention: pretraining rows, and batches joined to one row without padding.

Where the documents of a row begin is told by `position_ids` that restart at 0. Given those and no attention mask, most models of
transformers attend within a document alone; some ignore them, and `keeps_documents_apart` finds out by running the model.
"""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn

from .data import IGNORE, DataError
from .hf import Head, _causal_lm, _eval_mode, redirected, run_at_head

__all__ = ["Layout", "joined", "keeps_documents_apart", "pack", "suited_to"]


def pack(tokenized: Dataset, max_length: int, *, name: str = "train") -> Dataset:
    """Rows of ``max_length`` tokens, cut from the stream of all documents; the last one may be shorter.

    Every token counts but the first of a document, or of the fragment with which a row begins: nothing in its attention predicts it. Where
    a model cannot keep documents apart (`suited_to`) the first token of a document does not count either, since the end of another
    says nothing about it: both ways train on the same tokens.

    Args:
        tokenized: a document a row, as `fastkd.data.tokenize` gives them with ``max_length=None``. Their order stays, labels of -100 too.
        max_length: tokens of a row, >= 2.
        name: names the data set in messages.

    Returns:
        Columns ``input_ids``, ``labels`` (-100 where a token does not count; *not* shifted), ``position_ids`` (0 where a document or row
        begins), lists of int32; ``sample_index``, the row's place in the stream, and ``sample_id``, as in "pack 3: row 7..row 9" with
        the ids of the first and the last document. Rows without a counted token are left out, as `tokenize` does. Held in memory.

    Raises:
        DataError: missing columns, rows that are packed already, labels of another length than their ids, no token that counts.
        TypeError, ValueError: an argument of another type or out of range.
    """
    if not isinstance(tokenized, Dataset):
        raise TypeError(f"{name}: expected a datasets.Dataset, got {type(tokenized).__name__}")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ValueError(f"max_length: expected a whole number >= 2, got {max_length!r}")
    found, needed = tokenized.column_names, ["input_ids", "labels", "sample_id"]
    if not set(needed) <= set(found) or "position_ids" in found:
        what = "the rows are packed already" if "position_ids" in found else f"expected the columns {', '.join(needed)}"
        raise DataError(f"{name}: {what}; found {', '.join(found)}; pack what fastkd.data.tokenize returns")
    if len(tokenized) == 0:
        raise DataError(f"{name}: the data set has no rows")

    table = tokenized.select_columns(needed).with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    differs = np.flatnonzero(pc.list_value_length(table["labels"]).to_numpy() != lengths)
    if len(differs):
        raise DataError(f"{name}: {table['sample_id'][int(differs[0])]}: labels: expected as many values as input_ids")
    ids = pc.list_flatten(table["input_ids"]).to_numpy().astype(np.int32)
    labels = pc.list_flatten(table["labels"]).to_numpy().astype(np.int32)

    place, ends = np.arange(len(ids)), np.cumsum(lengths)
    positions = (place - np.maximum(np.repeat(ends - lengths, lengths), place // max_length * max_length)).astype(np.int32)
    labels[positions == 0] = IGNORE
    starts = np.arange(0, len(ids), max_length)
    stops = np.minimum(starts + max_length, len(ids))
    kept = np.flatnonzero(np.add.reduceat(labels != IGNORE, starts)) if len(ids) else np.array([], np.int64)
    if not len(kept):
        raise DataError(f"{name}: no row has a token to train on within max_length={max_length} ({len(tokenized)} documents)")
    # The documents that hold a row's first and last token; empty ones hold none.
    first, last = (np.searchsorted(ends, edge, side="right").tolist() for edge in (starts, stops - 1))
    documents = table["sample_id"].to_pylist()
    names = [
        f"pack {i}: {documents[a]}" + (f"..{documents[b]}" if a != b else "") for i, (a, b) in enumerate(zip(first, last, strict=True))
    ]

    offsets = pa.array(np.append(starts, len(ids)), pa.int32())
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    rows: dict[str, Any] = {key: pa.ListArray.from_arrays(offsets, pa.array(values)) for key, values in columns.items()}
    packed = pa.table({**rows, "sample_index": pa.array(np.arange(len(starts))), "sample_id": pa.array(names, pa.string())})
    return Dataset(packed if len(kept) == len(starts) else packed.take(pa.array(kept)))


def suited_to(packed: Dataset, *models: nn.Module) -> Dataset:
    """Rows of `pack` that all the models (student and teachers) read alike.

    Where each of them keeps documents apart the rows stay as they are. Otherwise they come back without ``position_ids``, with a
    warning that names the models: positions then run through a row, and a token sees the documents before its own in that row.
    """
    if "position_ids" not in packed.column_names:
        return packed
    blind = sorted({type(model).__name__ for model in models if not keeps_documents_apart(model)})
    if not blind:
        return packed
    warnings.warn(
        f"packing: {', '.join(blind)} cannot keep the documents of a row apart: tokens see the documents before them in their row",
        stacklevel=2,
    )
    return packed.remove_columns("position_ids")


def joined(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of a padded batch as one row without padding, for models that keep them apart by their positions.

    Args:
        batch: ``input_ids``, ``attention_mask`` (0 where there is padding, left, right or in between), ``labels``, ``shift_labels``,
            ``[B, S]`` int64; more that a model takes for each position, ``[B, S, ...]``; ``sample_index`` ``[B]``. On the CPU: what
            is padding is read here, so that nothing has to be read from a device.

    Returns:
        ``labels``, ``shift_labels`` and ``sample_index`` as they are. What models take as ``[1, T, ...]``, T the tokens of all rows
        in their order, without the mask but with ``position_ids`` ``[1, T]`` that begin with 0 in each row. ``kept`` ``[T]`` int64: the
        tokens' places among the B * S, for `Layout`.

    Raises:
        ValueError: no mask, a batch that is packed already, inputs of other shapes, or a token that counts where the mask is 0.
    """
    if "position_ids" in batch:
        raise ValueError("padding_free: the batch has position_ids, its rows are packed already; expected attention_mask")
    mask, labels = batch.get("attention_mask"), batch["shift_labels"]
    if mask is None or mask.shape != labels.shape:
        got = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
        raise ValueError(f"padding_free: expected of data_collator an attention_mask {tuple(labels.shape)} that tells padding, got {got}")
    real = mask != 0
    hidden = ((labels != IGNORE) & ~real).nonzero()
    if len(hidden):
        row, place = hidden[0].tolist()
        raise ValueError(f"padding_free: row {row} of the batch: a token counts that would be predicted from padding, at position {place}")
    layout = Layout(labels.shape, real.flatten().nonzero().squeeze(1))
    out, positions = {}, real.cumsum(1) - 1
    for name, value in {**batch, "position_ids": positions}.items():
        if name in ("labels", "shift_labels", "sample_index"):
            out[name] = value
        elif name != "attention_mask":
            if value.shape[:2] != labels.shape:
                raise ValueError(
                    f"padding_free: data_collator: {name}: expected [B, S, ...] = {list(labels.shape)}, got {list(value.shape)}"
                )
            out[name] = layout.join(value)
    assert layout.kept is not None
    return {**out, "kept": layout.kept}


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the positions of a padded batch are in what the models are given.

    Args:
        shape: ``(B, S)`` of the batch.
        kept: ``[T]`` int64 as `joined` gives it; None: the models are given the batch as it is.
    """

    shape: tuple[int, ...]
    kept: Tensor | None = None

    def join(self, values: Tensor) -> Tensor:
        """Values of the batch, ``[B, S, ...]``, for what the models are given: ``[1, T, ...]``."""
        return values if self.kept is None else values.flatten(0, 1)[self.kept][None]

    def spread(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of what the models are given, ``[1, T]``, for the batch: ``[B, S]``, ``fill`` where there is padding."""
        if self.kept is None:
            return values
        out = values.new_full((self.shape[0] * self.shape[1],), fill)
        return out.index_copy(0, self.kept, values[0]).view(self.shape)


@torch.no_grad()
def keeps_documents_apart(model: nn.Module, *, one_row: bool = False, autocast: torch.dtype | None = None) -> bool:
    """Whether a causal LM treats each document of a packed row as if it were alone, given ``position_ids`` and no attention mask.

    It runs the model twice on two rows of 21 tokens, in eval mode and without touching a random state. In one row a document comes second:
    exchanging the first one must not change it. In the other it comes first: its hidden states must be the same there. Models with
    recurrent or convolutional layers fail this, those with positions of their own making (OPT), and flash attention in batches of several
    rows, as it is told of documents in batches of one row alone. A model that is sharded is called on all processes together.

    Args:
        one_row: ask about batches of one row, as `joined` makes them: they may be longer than any row by itself, where chunked attention
            (``attention_chunk_size``) does not begin anew with each document.
        autocast: the dtype of the mixed precision in which the model is to run, if any.

    Raises:
        ValueError: when the model is not a causal LM with one linear head (`fastkd.hf.run_at_head`).
    """
    model = getattr(model, "_orig_mod", model)
    lm = _causal_lm(model)
    accepted = inspect.signature(type(lm).forward).parameters.values()
    if not any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in accepted):
        return False
    config = lm.config.get_text_config()
    if one_row and getattr(config, "attention_chunk_size", None) is not None:
        return False
    special = [v for key, v in vars(config).items() if key in ("pad_token_id", "bos_token_id", "eos_token_id") and isinstance(v, int)]
    usable = torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i not in special])
    generator = torch.Generator().manual_seed(0)
    here, other, third = (usable[torch.randint(len(usable), (n,), generator=generator)] for n in (9, 12, 12))
    device = lm.get_input_embeddings().weight.device
    position_ids = torch.stack([_positions(12, 9), _positions(9, 12)]).to(device)
    size = 1 if one_row else 2

    dtypes = [next(p.dtype for p in lm.parameters() if p.is_floating_point()), *([] if autocast is None else [autocast])]
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    seen: list[Tensor] = []

    def keep(hidden: Tensor, _: Head) -> Tensor:
        seen.append(hidden)
        return hidden

    def hidden(before: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal eps
        rows = torch.stack([torch.cat([before, here]), torch.cat([here, before])]).to(device)
        with redirected(model, lambda **inputs: run_at_head(model, keep, **inputs)[0]):
            for ids, places in zip(rows.split(size), position_ids.split(size), strict=True):
                model(input_ids=ids, position_ids=places)
        out = torch.cat(seen)
        seen.clear()
        eps = max(eps, torch.finfo(out.dtype).eps)  # a wrapper may compute in another dtype
        return out[0, 12:].double(), out[1, :9].double()

    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None), _eval_mode(model):
        second, first = hidden(other)
        exchanged, _ = hidden(third)
    largest = float(first.abs().max())
    # What masking hides is multiplied by an exact 0; only kernels that group the tokens of a batch (experts) may then round otherwise.
    unseen = float((second - exchanged).abs().max()) <= max(eps, 1e-5) * largest
    # Here the sums run over other places of the row, which rounds otherwise in every layer.
    alike = float((second - first).abs().max()) <= max(16 * eps, 1e-4) * largest
    return unseen and alike


def _positions(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])
