"""From files or data sets to token ids with labels, and from those to batches."""

import json
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["COLUMNS", "SHAPES", "DataError", "KDCollator", "counted_tokens", "load_rows", "tokenize"]

logger = logging.getLogger(__name__)

IGNORE = -100  # the label of a token that is not trained on, as in torch's cross_entropy

SHAPES: dict[str, tuple[str, ...]] = {
    "prompt + completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "input_ids": ("input_ids", "labels", "completion_mask", "attention_mask"),
}
"""The accepted shapes of a row and their columns; of those of `input_ids`, the first is required."""

COLUMNS: tuple[str, ...] = (*(column for columns in SHAPES.values() for column in columns), "id")
"""Every column that is read, the optional `id` included; the keys of a renaming."""

_DATA_SUFFIXES = {".json", ".jsonl", ".parquet"}
# Names that end so are files all the same, so that a mistyped one is reported as a missing file and not sought on the hub.
_FILE_SUFFIXES = _DATA_SUFFIXES | {".ndjson", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".yaml", ".yml"}


class DataError(ValueError):
    """A data set that cannot be used; the message names the data set, the row or line, and what was expected."""


def load_rows(
    source: "str | Path | Mapping[str, Any] | Dataset", *, columns: Mapping[str, str] | None = None, split: str | None = None
) -> "Dataset":
    """The rows of a file or data set, with renamed columns.

    Args:
        source: the path of a .json, .jsonl or .parquet file (JSON as a list of objects or as one object per line, whatever the suffix),
            relative to the current directory; a `datasets.Dataset`; a data set's name for `datasets.load_dataset`; or a mapping
            ``{path, name, split}`` whose ``name`` (configuration) and ``split`` go to `datasets.load_dataset`. A string that exists as a
            file, or looks like a path, is never sought on the hub. Files are read into memory.
        columns: ``{ours: theirs}``: ``{"prompt": "question"}`` makes their ``question`` our ``prompt``. Ours are `COLUMNS`. A column that
            already has our name gives way, and so do columns of other shapes: ``{"prompt": ..., "completion": ...}`` hides ``text``.
        split: the split of a data set by name whose ``source`` names none; needed where it has several.

    Raises:
        DataError: a missing or unreadable file, broken JSON (with file and line), an unknown column (with those that exist), no rows.
        TypeError: a source of another type.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(source, Mapping) and not isinstance(source, DatasetDict):
        unknown = set(source) - {"path", "name", "split"}
        if unknown or not isinstance(source.get("path"), (str, Path)):
            raise DataError(f"data set {dict(source)!r}: expected {{path, name, split}} with a path")
        path, name, split_given = source["path"], source.get("name"), source.get("split")
    else:
        path, name, split_given = source, None, None

    if isinstance(path, (Dataset, DatasetDict)):
        label, dataset = "data set", _one_split(path, "data set", split)
    elif isinstance(path, (str, Path)):
        label = str(path)
        if _looks_like_a_file(path):
            if name is not None or split_given is not None or split is not None:
                raise DataError(f"{label}: a file has neither name nor split; they are for data sets on the hub")
            dataset = _read_file(Path(path).expanduser(), list((columns or {}).values()) or COLUMNS)
        else:
            dataset = _load_by_name(label, name, split_given or split)
    else:
        raise TypeError(f"source: expected a path, a name, a mapping or a datasets.Dataset, got {type(source).__name__}")
    if len(dataset) == 0:
        raise DataError(f"{label}: the data set has no rows")
    return _rename(dataset, columns or {}, label)


def _looks_like_a_file(path: str | Path) -> bool:
    text = str(path)
    return (
        isinstance(path, Path)
        or Path(text).suffix.lower() in _FILE_SUFFIXES
        or text.startswith(("/", "./", "../", "~"))
        or Path(text).exists()
    )


def _read_file(path: Path, needed: Sequence[str]) -> "Dataset":
    from datasets import Dataset

    if not path.exists():
        raise DataError(f"{path}: no such file (current directory: {Path.cwd()})")
    if not path.is_file() or path.suffix.lower() not in _DATA_SUFFIXES:
        raise DataError(f"{path}: expected a .json, .jsonl or .parquet file")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        try:
            return Dataset(pyarrow.parquet.ParquetFile(path).read())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable Parquet file: {_one_line(error)}") from error
    rows = _read_json(path)
    values: dict[str, list] = {key: [] for row in rows for key in row}
    for row in rows:
        for key, column in values.items():
            column.append(row.get(key))
    return Dataset.from_dict({key: column for key, column in values.items() if _has_one_type(path, key, column, needed)})


def _has_one_type(path: Path, key: str, column: list, needed: Sequence[str]) -> bool:
    """Arrow needs one type per column. Files that mix types do so in columns that training does not read: those are left out."""
    import pyarrow

    if key == "id":
        column[:] = [None if value is None else str(value) for value in column]
    try:
        pyarrow.array(column)
    except pyarrow.ArrowException as error:
        if key in needed:
            raise DataError(f"{path}: column {key!r}: its values mix types: {_one_line(error)}") from None
        warnings.warn(f"{path}: column {key!r} is left out, its values mix types: {_one_line(error)}", stacklevel=4)
        return False
    return True


def _read_json(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable UTF-8 file: {_one_line(error)}") from error
    rows: list[Any] = []
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {error.lineno}: broken JSON: {error.msg}") from None
        places = [f"row {i}" for i in range(len(rows))]
    else:
        places = []
        # Not splitlines(): it also cuts at characters that JSON strings may hold.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if not rows and _is_one_object(text):
                    raise DataError(f"{path}: one JSON object; expected a list of objects, or one object per line") from None
                raise DataError(f"{path}: line {number}: broken JSON: {error.msg}") from None
            places.append(f"line {number}")
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise DataError(f"{path}: {place}: expected a JSON object, got {type(row).__name__}")
    return rows


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _load_by_name(path: str, name: str | None, split: str | None) -> "Dataset":
    import datasets

    label = path if name is None else f"{path} ({name})"
    try:
        loaded = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{label}: neither a file nor a data set that could be loaded: {_one_line(error)}") from error
    return _one_split(loaded, label, split)


def _one_split(loaded: Any, label: str, split: str | None) -> "Dataset":
    from datasets import Dataset, DatasetDict

    if isinstance(loaded, DatasetDict):
        if split is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if split not in loaded:
            wanted = "it has several splits" if split is None else f"no split {split!r}"
            raise DataError(f"{label}: {wanted}; name one of {', '.join(map(str, loaded))}, as in {{path: ..., split: ...}}")
        return loaded[split]
    if not isinstance(loaded, Dataset):
        raise TypeError(f"{label}: expected a datasets.Dataset, got {type(loaded).__name__}")
    return loaded


def _rename(dataset: "Dataset", columns: Mapping[str, str], label: str) -> "Dataset":
    found = dataset.column_names
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            near = get_close_matches(str(ours), COLUMNS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise DataError(f"{label}: columns: unknown column {ours!r} on the left; {hint}known are {', '.join(COLUMNS)}")
        if theirs not in found:
            raise DataError(f"{label}: columns: no column {theirs!r}; the data set has {', '.join(found)}")
    theirs_to_ours = {theirs: ours for ours, theirs in columns.items()}
    if len(theirs_to_ours) < len(columns):
        raise DataError(f"{label}: columns: two names for one column in {dict(columns)!r}")
    chosen = {column for shape in SHAPES.values() if set(shape) & set(columns) for column in shape}
    shapes = {column for shape in SHAPES.values() for column in shape}
    hidden = set(columns) | (shapes - chosen if chosen else set())
    dataset = dataset.remove_columns([c for c in found if c in hidden and c not in theirs_to_ours])
    return dataset.rename_columns({theirs: ours for theirs, ours in theirs_to_ours.items() if theirs != ours})


def tokenize(
    dataset: "Dataset",
    tokenizer: Any,
    *,
    max_length: int | None,
    completion_only_loss: bool | None = None,
    chat_template: bool | None = None,
    name: str = "train",
    num_proc: int | None = None,
) -> "Dataset":
    """Token ids and labels of every row that has something to learn from.

    The shape follows from the columns:
    - ``prompt`` + ``completion``, both strings or both lists of messages. Strings are concatenated and end with the end-of-sequence token.
    - ``messages``: a conversation, a list of ``{role, content}``.
    - ``text``: ends with the end-of-sequence token.
    - ``input_ids``, with optional ``labels`` (not shifted) or ``completion_mask``, and ``attention_mask`` (tokens with 0 are removed).

    The prompt's tokens are those that generation would start from; no special token comes in between, and the beginning-of-sequence token
    is there once if the tokenizer, or the chat template, adds it.

    Args:
        dataset: as `load_rows` returns it.
        tokenizer: a tokenizer of transformers; None will do for ``input_ids``, whose range is then not checked.
        max_length: longest row in tokens, >= 2; longer ones lose their end. None: no limit.
        completion_only_loss: count the completion's or the assistant's tokens alone, each with its end token. None: yes for
            ``prompt`` + ``completion`` and ``messages``, and as ``labels`` or ``completion_mask`` say for ``input_ids``. In
            ``messages`` the assistant's turns are those that the template marks with ``{% generation %}``; where it marks none, they are
            found by rendering prefixes.
        chat_template: render strings of ``prompt`` + ``completion`` as a user's and an assistant's turn. None: render message lists only.
        name: names the data set in messages.
        num_proc: processes, as in `datasets.Dataset.map`.

    Returns:
        Columns ``input_ids``, ``labels`` (lists of int; -100 where a token is not trained on, as the first never is; *not* shifted),
        ``sample_index`` (the row's number in ``dataset``) and ``sample_id`` (the row's ``id`` column, or "row N"). Rows without a
        counted token are left out with one warning.

    Raises:
        DataError: columns that make no shape or several, a row of another type, a chat template that does not suit, no row left.
    """
    from datasets import Dataset, Features, Sequence, Value

    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name}: expected a datasets.Dataset, got {type(dataset).__name__}")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2):
        raise ValueError(f"max_length: expected a whole number >= 2, got {max_length!r}")
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set has no rows")
    shape = _shape_of(dataset.column_names, name)
    if shape == "text" and completion_only_loss:
        raise DataError(f"{name}: completion_only_loss: rows of the shape 'text' have no completion")
    masks = {"labels", "completion_mask"} & set(dataset.column_names)
    if shape == "input_ids" and completion_only_loss and not masks:
        raise DataError(f"{name}: completion_only_loss: input_ids need a column 'labels' or 'completion_mask' to tell the completion")
    if shape == "input_ids" and len(masks) == 2:
        raise DataError(f"{name}: give 'labels' or 'completion_mask', not both")
    if shape in ("text", "input_ids") and chat_template:
        raise DataError(f"{name}: chat_template: rows of the shape {shape!r} are not rendered")
    only = shape != "text" if completion_only_loss is None else completion_only_loss
    wanted = [c for c in dataset.column_names if c in (*SHAPES[shape], "id")]
    tokenized = (
        dataset.with_format(None)
        .select_columns(wanted)
        .map(
            _Tokenizer(tokenizer, shape, max_length, only, chat_template, name, [] if shape == "input_ids" else _special_prefix(tokenizer)),
            with_indices=True,
            remove_columns=wanted,
            features=Features(
                input_ids=Sequence(Value("int32")),
                labels=Sequence(Value("int32")),
                sample_index=Value("int64"),
                sample_id=Value("string"),
                counted=Value("int64"),
                cut=Value("bool"),
            ),
            num_proc=num_proc,
            keep_in_memory=True,
            load_from_cache_file=False,
            desc=f"Tokenizing {name}",
        )
    )
    counted = tokenized["counted"][:]
    kept = [i for i, n in enumerate(counted) if n]
    if not kept:
        raise DataError(f"{name}: no row has a token to train on within max_length={max_length} ({len(counted)} rows)")
    if len(kept) < len(counted):
        ids = [tokenized[i]["sample_id"] for i, n in enumerate(counted) if not n][:5]
        dropped = len(counted) - len(kept)
        more = ", ..." if dropped > len(ids) else ""
        warnings.warn(
            f"{name}: {dropped} of {len(counted)} rows left out: no token to train on within max_length={max_length}"
            f" ({', '.join(ids)}{more})",
            stacklevel=2,
        )
    logger.info("%s: %d rows, %d tokens to train on", name, len(kept), sum(counted))
    if cut := sum(tokenized["cut"][:]):
        logger.warning("%s: %d of %d rows are longer than max_length=%d and lose their end", name, cut, len(counted), max_length)
    tokenized = tokenized.remove_columns(["counted", "cut"])
    return tokenized.select(kept) if len(kept) < len(counted) else tokenized


def counted_tokens(labels: Any) -> np.ndarray:
    """Tokens of each row that are trained on, ``[rows]`` int64, from its labels, a pyarrow array of lists of whole numbers.

    They are not shifted. The first label of a row does not count, whatever it is: nothing predicts it.
    """
    import pyarrow.compute as pc

    sizes = pc.list_value_length(labels).to_numpy(zero_copy_only=False).astype(np.int64)
    counts = pc.list_flatten(labels).to_numpy(zero_copy_only=False) != IGNORE
    ends = np.cumsum(sizes)
    counts[(ends - sizes)[sizes > 0]] = False
    total = np.concatenate([[0], np.cumsum(counts)])
    return total[ends] - total[ends - sizes]


def _shape_of(found: Sequence[str], name: str) -> str:
    fitting = [shape for shape, columns in SHAPES.items() if set(columns if shape != "input_ids" else columns[:1]) <= set(found)]
    if len(fitting) == 1:
        return fitting[0]
    accepted = ", ".join(repr(shape) for shape in SHAPES)
    problem = f"the columns fit several shapes ({', '.join(fitting)})" if fitting else "the columns make no known shape"
    raise DataError(
        f"{name}: {problem}; found {', '.join(found)}; expected one of {accepted}."
        " Rename them: `columns={'prompt': 'question', ...}` of load_rows, data.columns in a configuration, or dataset.rename_columns"
    )


def _special_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text, usually none or the beginning-of-sequence token."""
    plain, full = _encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass
class _Tokenizer:
    """One row to ids and labels; a class so that worker processes can receive it."""

    tokenizer: Any
    shape: str
    max_length: int | None
    only: bool
    chat_template: bool | None
    name: str
    prefix: list[int]
    place: str = ""  # the row at work, for messages

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        label = f"row {index}" if row.get("id") is None else str(row["id"])
        self.place = f"{self.name}: {label}"
        match self.shape:
            case "prompt + completion":
                ids, counts = self._prompt_completion(row["prompt"], row["completion"])
            case "messages":
                ids, counts = self._conversation(self._messages(row["messages"], "messages"), first=0)
            case "text":
                ids, counts = self._plain(["", self._text(row["text"], "text")])
            case _:
                ids, counts = self._tokenized(row)
        cut = self.max_length is not None and len(ids) > self.max_length
        ids, counts = ids[: self.max_length], counts[: self.max_length]
        # Nothing predicts the first token, so it never counts.
        labels = [token if count and i else IGNORE for i, (token, count) in enumerate(zip(ids, counts, strict=True))]
        counted = sum(label != IGNORE for label in labels)
        return {"input_ids": ids, "labels": labels, "sample_index": index, "sample_id": label, "counted": counted, "cut": cut}

    def _prompt_completion(self, prompt: Any, completion: Any) -> tuple[list[int], list[bool]]:
        if isinstance(prompt, list) and isinstance(completion, list):
            if self.chat_template is False:
                raise DataError(f"{self.place}: chat_template: lists of messages need it")
            prompt = self._messages(prompt, "prompt")
            return self._conversation(prompt + self._messages(completion, "completion"), first=len(prompt))
        if isinstance(prompt, list) or isinstance(completion, list):
            raise DataError(f"{self.place}: prompt and completion: expected two strings or two lists of messages, got one of each")
        prompt, completion = self._text(prompt, "prompt"), self._text(completion, "completion")
        if self.chat_template:
            return self._conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], first=1)
        return self._plain([prompt, completion])

    def _plain(self, segments: list[str]) -> tuple[list[int], list[bool]]:
        """A prompt, which may be empty, and the text to learn, without a chat template. An empty text teaches nothing, not even to end."""
        prompt, completion = self._segments(segments)
        end = self.tokenizer.eos_token_id
        if completion and end is not None and completion[-1] != end:
            completion.append(end)
        prefix = [] if (prompt + completion)[: len(self.prefix)] == self.prefix else self.prefix
        counts = [bool(completion) and not self.only] * len(prefix + prompt) + [True] * len(completion)
        return prefix + prompt + completion, counts

    def _conversation(self, messages: list[dict], first: int) -> tuple[list[int], list[bool]]:
        """A rendered conversation, of which the assistant's turns from message ``first`` on count."""
        whole = self._render(messages)
        if not self.only:
            ids = _encode(self.tokenizer, whole)
            return ids, [True] * len(ids)
        if first == 0 and re.search(r"\{%[-+]?\s*generation\b", self._template()):
            out = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return list(out["input_ids"]), [bool(count) for count in out["assistant_masks"]]
        segments, counted, done = [], [], 0
        for i, message in enumerate(messages):
            if i < first or message["role"] != "assistant" or not (message.get("content") or message.get("tool_calls")):
                continue
            start, end = self._render(messages[:i], add_generation_prompt=True), self._render(messages[: i + 1])
            if not (whole.startswith(end) and end.startswith(start) and len(start) >= done):
                raise DataError(
                    f"{self.place}: the chat template renders message {i} otherwise than it would be generated, so that its tokens cannot"
                    " be told from the prompt's; use a template with {% generation %}, or rows of prompt + completion with one answer"
                )
            segments += [whole[done : len(start)], whole[len(start) : len(end)]]
            counted += [False, True]
            done = len(end)
        pieces = self._segments([*segments, whole[done:]])
        ids, counts = [], []
        for piece, count in zip(pieces, [*counted, False], strict=True):
            ids += piece
            counts += [count] * (self._answer_length(piece) if count else len(piece))
            counts += [False] * (len(ids) - len(counts))
        return ids, counts

    def _answer_length(self, ids: list[int]) -> int:
        """Tokens of a rendered answer up to its end token: what templates put after it, a line break, is never generated."""
        end = self.tokenizer.eos_token_id
        if end in ids:
            last = len(ids) - ids[::-1].index(end)
            if not self.tokenizer.decode(ids[last:]).strip():
                return last
        return len(ids)

    def _segments(self, segments: Sequence[str]) -> list[list[int]]:
        """The ids of each segment of a text. Together they are the text's own ids wherever no token straddles a boundary."""
        text, ids, pieces = "", [], []  # type: str, list[int], list[list[int]]
        for segment in segments:
            text += segment
            joint = _encode(self.tokenizer, text) if segment else ids
            piece = joint[len(ids) :] if joint[: len(ids)] == ids else _encode(self.tokenizer, segment)
            pieces.append(piece)
            ids = ids + piece
        return pieces

    def _tokenized(self, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        ids = self._integers(row, "input_ids")
        size = math.inf if self.tokenizer is None else len(self.tokenizer)
        if any(not 0 <= token < size for token in ids):
            raise DataError(f"{self.place}: input_ids: expected ids in [0, {size}), the tokenizer's size, got {min(ids)} to {max(ids)}")
        counts = [True] * len(ids)
        if row.get("labels") is not None:
            labels = self._integers(row, "labels", len(ids))
            counts = [label != IGNORE for label in labels]
            if any(label not in (IGNORE, token) for label, token in zip(labels, ids, strict=True)):
                raise DataError(f"{self.place}: labels: expected -100 or the token of input_ids at the same place (labels are not shifted)")
        elif row.get("completion_mask") is not None and self.only:
            counts = [bool(mask) for mask in self._integers(row, "completion_mask", len(ids))]
        if row.get("attention_mask") is not None:
            # Padding is known by its place: its id may be that of the end token.
            mask = self._integers(row, "attention_mask", len(ids))
            ids = [token for token, keep in zip(ids, mask, strict=True) if keep]
            counts = [count for count, keep in zip(counts, mask, strict=True) if keep]
        return ids, counts

    def _integers(self, row: dict[str, Any], column: str, length: int | None = None) -> list[int]:
        values = row[column]
        if not isinstance(values, list) or any(not isinstance(value, int) for value in values):
            raise DataError(f"{self.place}: {column}: expected a list of whole numbers, got {_short(values)}")
        if length is not None and len(values) != length:
            raise DataError(f"{self.place}: {column}: expected {length} values, as many as input_ids, got {len(values)}")
        return values

    def _text(self, value: Any, column: str) -> str:
        if not isinstance(value, str):
            raise DataError(f"{self.place}: {column}: expected a string, got {_short(value)}")
        return value

    def _messages(self, value: Any, column: str) -> list[dict]:
        if not isinstance(value, list) or not value:
            raise DataError(f"{self.place}: {column}: expected a list of {{role, content}}, got {_short(value)}")
        messages = []
        for i, message in enumerate(value):
            # Arrow gives each message the keys of all, null where it had none; templates ask whether a key is there.
            clean = {key: v for key, v in message.items() if v is not None} if isinstance(message, dict) else {}
            if not isinstance(clean.get("role"), str) or not ("content" in clean or "tool_calls" in clean):
                raise DataError(f"{self.place}: {column}: message {i}: expected {{role, content}}, got {_short(message)}")
            messages.append(clean)
        return messages

    def _template(self) -> str:
        try:
            return self.tokenizer.get_chat_template()
        except ValueError:
            raise DataError(f"{self.name}: the tokenizer has no chat template to render messages with") from None

    def _render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        import jinja2

        self._template()
        if not messages and not add_generation_prompt:
            return ""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError, IndexError) as error:
            raise DataError(f"{self.place}: the chat template refuses the messages: {_one_line(error)}") from error


class KDCollator:
    """Rows of `tokenize` to a batch, padded on the right to the longest row.

    Args:
        pad_token_id: fills ``input_ids``. It may be the end token's: padding is told by position alone.
        pad_to_multiple_of: the padded length S is rounded up to a multiple of this.

    Returns (from a call with a list of B rows):
        ``input_ids``, ``attention_mask``, ``labels`` and ``shift_labels``, ``[B, S]`` int64, and ``sample_index``, ``[B]`` int64.
        ``labels`` are not shifted. ``shift_labels[:, t]`` is ``labels[:, t + 1]``, what position t predicts; its last column is -100.

        Rows with a column ``position_ids`` (`fastkd.packing.pack`) give ``position_ids``, ``[B, S]`` int64, in place of
        ``attention_mask``, without which models take a restart at 0 for the start of a document; the padding is a document of its own.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or pad_token_id < 0:
            raise ValueError(
                f"pad_token_id: expected a token id, got {pad_token_id!r}; where a tokenizer has no pad token, its eos_token_id will do"
            )
        if pad_to_multiple_of is not None and (not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1):
            raise ValueError(f"pad_to_multiple_of: expected a whole number >= 1 or None, got {pad_to_multiple_of!r}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows: expected at least one row, got none")
        for column in ("input_ids", "labels", "sample_index"):
            if any(column not in row for row in rows):
                raise ValueError(f"rows: expected the columns input_ids, labels and sample_index, got {', '.join(rows[0])}")
        packed = ["position_ids" in row for row in rows]
        if any(packed) and not all(packed):
            raise ValueError("rows: position_ids: expected in all rows of a batch or in none, got some of each")
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
        batch = {
            "input_ids": torch.full((len(rows), length), self.pad_token_id),
            "position_ids" if all(packed) else "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
            "labels": torch.full((len(rows), length), IGNORE),
            "shift_labels": torch.full((len(rows), length), IGNORE),
            "sample_index": torch.tensor([int(row["sample_index"]) for row in rows]),
        }
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            batch["input_ids"][i, :n] = torch.as_tensor(row["input_ids"])
            if all(packed):
                batch["position_ids"][i, :n] = torch.as_tensor(row["position_ids"])
                batch["position_ids"][i, n:] = torch.arange(length - n)
            else:
                batch["attention_mask"][i, :n] = 1
            batch["labels"][i, :n] = torch.as_tensor(row["labels"])
        batch["shift_labels"][:, :-1] = batch["labels"][:, 1:]
        return batch


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
