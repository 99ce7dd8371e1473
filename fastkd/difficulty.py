"""How difficult each sample is: signals, their fusion to one score, and how far the orders of different signals and scorers agree."""

import hashlib
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats
from torch import nn

from .data import counted_tokens
from .files import first_difference, write_whole
from .generation import generate
from .models import fingerprint
from .quality import completion_turns, prompt_ids, rouge_l, sample_losses

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SIGNALS", "ScoreError", "attach", "compare", "easy_to_hard", "facts", "format_comparison", "read_scores", "score"]

logger = logging.getLogger(__name__)

SIGNALS: Mapping[str, bool] = {"rouge_loss": True, "loss": False, "rouge": True, "length": False, "steps": False}
"""The signals by name, and whether a higher value means easier. Besides them: ``column:NAME``."""

RRF_K = 60  # POCL's; the customary constant of reciprocal rank fusion
_COLUMN = "column:"
_METADATA = b"fastkd.difficulty"
_CHECKSUM = b"fastkd.difficulty.sha256"
_FORMAT = 1


class ScoreError(ValueError):
    """Scores that cannot be made or used; the message names the file or signal, the samples, and what was expected."""


def score(
    rows: "Dataset",
    tokenized: "Dataset",
    *,
    signal: str = "rouge_loss",
    also: Sequence[str] = ("length", "steps"),
    model: nn.Module | None = None,
    tokenizer: Any = None,
    path: str | Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    higher_is_easier: bool = False,
    scorer: str | None = None,
    stage_of: Callable[[list[str]], Sequence[int]] | None = None,
    progress: bool = True,
) -> pa.Table:
    """Score every tokenised sample, keyed by its id.

    Signals:
    - ``loss``: the scorer's mean cross-entropy of the counted tokens, nats; lower is easier.
    - ``rouge``: ROUGE-L F, 0 to 1, of the scorer's generated answer against the reference (`fastkd.quality.rouge_l`); higher is easier.
    - ``rouge_loss``: 1 / (60 + rank of rouge) + 1 / (60 + rank of loss), the reciprocal rank fusion of POCL (arXiv 2506.05695).
    - ``length``: counted tokens of the completion; lower is easier.
    - ``steps``: lines of the completion with a letter or digit, before its first ``####``; lower is easier. One step per line is how GSM8K
      writes solutions. The answers of a conversation are added up, each to its own ``####``.
    - ``column:NAME``: a numeric column of the raw rows; lower is easier, unless ``higher_is_easier``.

    Ranks run from 1 for the easiest. Samples of one value share the mean of their ranks, so that no signal favours what stands first in the
    data. (The papers do not say; weak scorers have many ROUGE scores of 0.)

    Args:
        rows: as `fastkd.data.load_rows` returns them.
        tokenized: those rows by `fastkd.data.tokenize`; ids must not repeat.
        signal: what ``score`` is made from.
        also: further signals to record, for `compare`.
        model, tokenizer: the scorer and its tokenizer, for loss and rouge; a smaller proxy will do. The rows must be tokenised by it.
        path: a Parquet file. One made from the same data, scorer and options is returned as it is, with ``stage`` brought up to date. What
            an interrupted run had found, in a file beside it, is used, and the result is the same, byte for byte.
        batch_size, max_new_tokens, temperature, top_p, seed: see `fastkd.generation.generate`. (POCL samples at 0.01 to 0.1, at most 512
            tokens; 0 is greedy.) temperature is that of sampling, not of a loss.
        scorer: names the scorer in the file; by default the name or path in its config. Its weights are hashed in any case.
        stage_of: the stage of each id, given all ids from easy to hard.
        progress: show progress bars.

    Returns:
        In the order of the data: ``id``; each signal; ``rank_SIGNAL`` of each; ``score``, float64, higher being easier whatever the signal;
        ``stage``, int64, with ``stage_of``. `facts` reads what they were made from.

    Raises:
        ScoreError: an unknown signal, ids that repeat, rows that do not have what the signal needs, a value that is not finite, or a file
            at ``path`` that was made from something else.
    """
    names = _signals(signal, also)
    computed = [name for name in names if name in ("loss", "rouge")]
    if computed and (model is None or tokenizer is None):
        raise ScoreError(f"signal {computed[0]!r}: needs a scorer; expected model and tokenizer, got None")
    ids: list[str] = tokenized["sample_id"][:]
    _refuse_repeated(ids, "sample ids")
    turns = completion_turns(rows, tokenized, tokenizer) if {"rouge", "steps"} & set(names) else []
    values: dict[str, list] = {name: column_values(rows, tokenized, name) for name in names if name.startswith(_COLUMN)}
    options: dict[str, Any] = {"higher_is_easier": higher_is_easier} if values else {}
    passes: dict[str, Callable[[Collection[int]], Iterator[dict[int, float]]]] = {}
    if "loss" in names:
        passes["loss"] = _loss_pass(model, tokenizer, tokenized, batch_size, progress)
        options["batch_size"] = batch_size  # the last bits of a matrix product depend on its shape
    if "rouge" in names:
        generation = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "batch_size": batch_size}
        passes["rouge"] = _rouge_pass(model, tokenizer, tokenized, turns, generation, progress)
        # An option without effect does not make a file another one.
        options |= {k: v for k, v in generation.items() if temperature or k not in ("top_p", "seed")}
    made_from = {
        "format": _FORMAT,
        "signal": signal,
        "signals": names,
        "data": _data_hash(tokenized, turns, values),
        "options": options,
        "scorer": {"name": _scorer_name(model, scorer), **fingerprint(model)} if computed and model is not None else None,
    }

    path = None if path is None else Path(path)
    if path is not None and path.exists():
        table = read_scores(path)
        _check_same(path, facts(table), made_from)
    else:
        with _Partial(None if path is None else _beside(path), made_from) as partial:
            for name in computed:
                values[name] = _resumed(name, ids, passes[name], partial)
        if "rouge" in values and not any(values["rouge"]):
            logger.warning("signal 'rouge': every sample scored 0: a scorer that cannot answer, or a script other than Latin?")
        if "length" in names:
            values["length"] = [n for part in tokenized.with_format("arrow").iter(10_000) for n in counted_tokens(part["labels"]).tolist()]
        if "steps" in names:
            values["steps"] = [sum(_steps(text) for text in texts) for texts in turns]
        table = _table(ids, names, signal, values, higher_is_easier, made_from)
    if stage_of is not None:
        table = _with_stage(table, stage_of)
    if path is not None:
        if not path.exists() or not table.equals(read_scores(path)):
            _write(path, table)
        _beside(path).unlink(missing_ok=True)
    return table


def _loss_pass(
    model: Any, tokenizer: Any, tokenized: "Dataset", batch_size: int, progress: bool
) -> Callable[[Collection[int]], Iterator[dict[int, float]]]:
    label = "Scoring: loss" if progress else None

    def run(done: Collection[int]) -> Iterator[dict[int, float]]:
        for batch in sample_losses(model, tokenizer, tokenized, batch_size=batch_size, done=done, progress=label):
            yield {loss.position: loss.mean for loss in batch}

    return run


def _rouge_pass(
    model: Any, tokenizer: Any, tokenized: "Dataset", turns: list[list[str]], generation: dict[str, Any], progress: bool
) -> Callable[[Collection[int]], Iterator[dict[int, float]]]:
    prompts = prompt_ids(tokenized)
    if prompts is None:
        raise ScoreError(
            "signal 'rouge': the rows have no prompt to answer: every token of them counts (plain text, or completion_only_loss: false);"
            " use the signal 'loss'"
        )
    names = tokenized["sample_id"][:]
    label = "Scoring: rouge" if progress else None

    def run(done: Collection[int]) -> Iterator[dict[int, float]]:
        for batch in generate(model, tokenizer, prompts, done=done, names=names, progress=label, **generation):
            yield {answer.position: rouge_l(answer.text, turns[answer.position][0]) for answer in batch}

    return run


def _resumed(name: str, ids: list[str], run: Callable[[Collection[int]], Iterator[dict[int, float]]], partial: "_Partial") -> list[float]:
    """The values of a pass in the order of the data, those that an interrupted run found included."""
    places = {sample: i for i, sample in enumerate(ids)}
    found = {places[sample]: value for sample, value in partial.values[name].items()}
    for batch in run(frozenset(found)):
        by_id = {ids[i]: value for i, value in batch.items()}
        _check_finite(name, by_id)
        partial.add(name, by_id)
        found |= batch
    return [found[i] for i in range(len(ids))]


def _signals(signal: str, also: Sequence[str]) -> list[str]:
    """All signals to record, those that a fusion needs before it."""
    names: list[str] = []
    for name in (signal, *also):
        if not (name in SIGNALS or (isinstance(name, str) and name.startswith(_COLUMN) and name != _COLUMN)):
            raise ScoreError(f"signal: expected one of {', '.join(SIGNALS)}, column:NAME, got {name!r}")
        names += ["rouge", "loss", name] if name == "rouge_loss" else [name]
    return list(dict.fromkeys(names))


def _steps(text: str) -> int:
    return sum(re.search(r"\w", line) is not None for line in text.partition("####")[0].splitlines())


def column_values(rows: "Dataset", tokenized: "Dataset", signal: str) -> list[float]:
    name = signal.removeprefix(_COLUMN)
    if name not in rows.column_names:
        raise ScoreError(f"signal {signal!r}: no such column; the rows have {', '.join(rows.column_names)}")
    column = rows[name][:]
    values = [column[i] for i in tokenized["sample_index"][:]]
    ids = tokenized["sample_id"][:]
    for sample, value in zip(ids, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ScoreError(f"signal {signal!r}: expected a number in every row, got {type(value).__name__} {value!r} in {sample}")
    _check_finite(signal, dict(zip(ids, values, strict=True)))
    return [float(value) for value in values]


def _check_finite(signal: str, values: Mapping[str, float]) -> None:
    if bad := [sample for sample, value in values.items() if not math.isfinite(value)]:
        raise ScoreError(f"signal {signal!r}: not a finite number in {_some(bad)}: {values[bad[0]]}")


def _data_hash(tokenized: "Dataset", turns: list[list[str]], columns: Mapping[str, list]) -> str:
    digest = hashlib.sha256()
    for row in tokenized.select_columns(["sample_id", "input_ids", "labels"]):
        digest.update(json.dumps([row["sample_id"], row["input_ids"], row["labels"]]).encode())
    digest.update(json.dumps([turns, columns]).encode())
    return digest.hexdigest()


def _scorer_name(model: nn.Module | None, scorer: str | None) -> str:
    return scorer or str(getattr(getattr(model, "config", None), "name_or_path", "")) or type(model).__name__


def _table(
    ids: list[str], names: list[str], signal: str, values: dict[str, list], higher_is_easier: bool, made_from: Mapping[str, Any]
) -> pa.Table:
    ranks: dict[str, np.ndarray] = {}
    easiness: dict[str, np.ndarray] = {}
    for name in names:
        if name == "rouge_loss":
            values[name] = list(1 / (RRF_K + ranks["rouge"]) + 1 / (RRF_K + ranks["loss"]))
        higher = higher_is_easier if name.startswith(_COLUMN) else SIGNALS[name]
        easiness[name] = np.asarray(values[name], dtype=np.float64) * (1 if higher else -1)
        ranks[name] = stats.rankdata(-easiness[name], method="average")
    whole = {"length": pa.int64(), "steps": pa.int64()}
    columns = {"id": pa.array(ids, pa.string())}
    columns |= {name: pa.array(values[name], whole.get(name, pa.float64())) for name in names}
    columns |= {f"rank_{name}": pa.array(ranks[name], pa.float64()) for name in names}
    columns["score"] = pa.array(easiness[signal] + 0.0, pa.float64())  # + 0.0: no negative zero
    table = pa.table(columns)
    return table.replace_schema_metadata({_METADATA: json.dumps(made_from, sort_keys=True).encode(), _CHECKSUM: _checksum(table)})


def _checksum(table: pa.Table) -> bytes:
    """Of ids and scores: a page that went bad on the disk would otherwise be another order of the samples."""
    values = [table["id"].to_pylist(), [float(score).hex() for score in table["score"].to_pylist()]]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest().encode()


def easy_to_hard(table: pa.Table) -> list[str]:
    """All ids from easy to hard: by score, descending; among equal scores in the order of the table."""
    scores = np.asarray(table["score"])
    ids = table["id"].to_pylist()
    return [ids[i] for i in np.argsort(-scores, kind="stable")]


def _with_stage(table: pa.Table, stage_of: Callable[[list[str]], Sequence[int]]) -> pa.Table:
    ids = easy_to_hard(table)
    stages = [int(stage) for stage in stage_of(ids)]
    if len(stages) != len(ids):
        raise ScoreError(f"stage_of: expected {len(ids)} stages, one per id, got {len(stages)}")
    stage = dict(zip(ids, stages, strict=True))
    if "stage" in table.column_names:
        table = table.drop_columns("stage")
    return table.append_column("stage", pa.array([stage[i] for i in table["id"].to_pylist()], pa.int64()))


class _Partial:
    """What an interrupted run has found: a line of facts, then a line per batch. From a line that was cut short on, it is dropped."""

    def __init__(self, path: Path | None, made_from: Mapping[str, Any]):
        self.values: dict[str, dict[str, float]] = {"loss": {}, "rouge": {}}
        self._stream = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        good = 0
        if path.exists():
            for number, line in enumerate(_whole_lines(path)):
                if number == 0:
                    _check_same(path, line[1], made_from)
                else:
                    self.values[line[1]["signal"]] |= line[1]["values"]
                good += line[0]
        self._stream = path.open("ab")
        self._stream.truncate(good)
        if good == 0:
            self._write(made_from)
        elif any(self.values.values()):
            logger.info("%s: going on after %s", path, ", ".join(f"{len(v)} samples' {s}" for s, v in self.values.items() if v))

    def add(self, signal: str, values: Mapping[str, float]) -> None:
        self._write({"signal": signal, "values": values})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            self._stream.flush()

    def __enter__(self) -> "_Partial":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()


def _whole_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Length in bytes and content of each line, up to the first that is not whole."""
    with path.open("rb") as stream:
        for line in stream:
            try:
                content = json.loads(line)
            except ValueError:
                content = None
            if not line.endswith(b"\n") or not isinstance(content, dict):
                logger.warning("%s: what follows byte %d is not whole and is computed again", path, stream.tell() - len(line))
                return
            yield len(line), content


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial.jsonl")


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse scores of another origin. The scorer's name is not compared: its weights are."""
    if different := first_difference(found, wanted, ignored=("scorer.name",)):
        raise ScoreError(f"{path}: made with other settings: {different}; choose another path, or delete the file")


def _write(path: Path, table: pa.Table) -> None:
    content = io.BytesIO()
    pq.write_table(table, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def facts(table: pa.Table) -> dict[str, Any]:
    """What the scores were made from: signal, scorer, data, options. Empty for a table that `score` did not make."""
    return json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))


def read_scores(path: str | Path) -> pa.Table:
    """A file of `score`, or any Parquet file with the columns ``id`` (string) and ``score`` (number; higher is easier).

    Raises:
        ScoreError: not a readable Parquet file, a missing column, ids that repeat, a score that is not finite, or scores that are not those
            that were written.
    """
    path = Path(path)
    try:
        table = pq.read_table(path, partitioning=None)
    except FileNotFoundError:
        raise ScoreError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ScoreError(f"{path}: not a readable Parquet file: {reason}; give another path, or delete the file") from error
    missing = [name for name in ("id", "score") if name not in table.column_names]
    if missing:
        raise ScoreError(f"{path}: no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    _check_table(table, str(path))
    written = (table.schema.metadata or {}).get(_CHECKSUM)
    if written is not None and written != _checksum(table):
        raise ScoreError(f"{path}: its scores are not those that were written: damaged, or edited; delete it to have them computed again")
    return table


def _check_table(table: pa.Table, name: str) -> None:
    ids = table["id"].to_pylist()
    _refuse_repeated(ids, f"{name}: ids")
    for sample, value in zip(ids, table["score"].to_pylist(), strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ScoreError(f"{name}: score: expected a finite number, got {value!r} for {sample}")


def attach(tokenized: "Dataset", table: pa.Table) -> "Dataset":
    """The tokenised rows with a column ``score``, float64, found by ``sample_id``. Samples that the data does not have are passed over.

    Raises:
        ScoreError: ids that repeat, in the data or the table, or a sample without a score.
    """
    _check_table(table, "scores")
    ids = tokenized["sample_id"][:]
    _refuse_repeated(ids, "sample ids")
    scores = dict(zip(table["id"].to_pylist(), table["score"].to_pylist(), strict=True))
    if missing := [i for i in ids if i not in scores]:
        raise ScoreError(f"scores: {len(missing)} of {len(ids)} samples have none: {_some(missing)}; were they made from other data?")
    if "score" in tokenized.column_names:
        tokenized = tokenized.remove_columns("score")
    return tokenized.add_column("score", [float(scores[i]) for i in ids])


def compare(tables: Mapping[str, pa.Table] | Sequence[str | Path]) -> list[dict[str, Any]]:
    """How far orders of difficulty agree: between the signals of one table, or between several tables' scores and signals of one name.

    Args:
        tables: paths, or tables by name. Several are compared on the ids that they share.

    Returns:
        One dictionary per pair, ready for JSON: ``a``, ``b``; ``samples``; ``spearman`` and ``kendall`` (tau-b) between their easiness;
        ``hardest_quarter``: the share of a's hardest quarter that is in b's, 0.25 by chance (of equal values those that come first in the
        first table are taken). All three are None where a or b is the same for all samples.

    Raises:
        ScoreError: no table, a table with one signal alone, or tables that share fewer than two ids.
    """
    if not isinstance(tables, Mapping):
        paths = [Path(p) for p in tables]
        names = [p.stem for p in paths]
        if len(set(names)) < len(names):
            names = [str(p) for p in paths]
        if len(set(names)) < len(names):
            raise ScoreError(f"compare: expected different files, got {', '.join(names)}")
        tables = {name: read_scores(path) for name, path in zip(names, paths, strict=True)}
    if not tables:
        raise ScoreError("compare: expected one or more score files, got none")
    if len(tables) == 1:
        name, table = next(iter(tables.items()))
        _check_table(table, name)
        orders = {s: -np.asarray(table[f"rank_{s}"]) for s in _recorded(table)}
        if len(orders) < 2:
            raise ScoreError(f"{name}: one file is compared between its signals, and it has {len(orders)}; give a second file")
        return [_agreement(a, b, orders[a], orders[b]) for a, b in combinations(orders, 2)]
    result = []
    for (name_a, a), (name_b, b) in combinations(tables.items(), 2):
        _check_table(a, name_a)
        _check_table(b, name_b)
        in_b = {sample: i for i, sample in enumerate(b["id"].to_pylist())}
        shared = [(i, in_b[sample]) for i, sample in enumerate(a["id"].to_pylist()) if sample in in_b]
        if len(shared) < 2:
            raise ScoreError(f"compare: {name_a} and {name_b} share {len(shared)} sample ids; expected two or more")
        left, right = map(list, zip(*shared, strict=True))
        # Length and steps do not depend on a scorer.
        both = facts(a).get("signal") if facts(a).get("signal") == facts(b).get("signal") else None  # the scores' own, then
        signals = [s for s in ("loss", "rouge", "rouge_loss") if s in _recorded(a) and s in _recorded(b) and s != both]
        for label, column, sign in [("score", "score", 1), *((s, f"rank_{s}", -1) for s in signals)]:
            x, y = sign * np.asarray(a[column], float)[left], sign * np.asarray(b[column], float)[right]
            result.append(_agreement(f"{name_a}: {label}", f"{name_b}: {label}", x, y))
    return result


def _recorded(table: pa.Table) -> list[str]:
    return [name.removeprefix("rank_") for name in table.column_names if name.startswith("rank_")]


def _agreement(name_a: str, name_b: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    constant = len(set(a.tolist())) < 2 or len(set(b.tolist())) < 2
    quarter = max(1, len(a) // 4)
    hardest = [set(np.argsort(x, kind="stable")[:quarter].tolist()) for x in (a, b)]
    return {
        "a": name_a,
        "b": name_b,
        "samples": len(a),
        "spearman": None if constant else float(stats.spearmanr(a, b).statistic),
        "kendall": None if constant else float(stats.kendalltau(a, b, variant="b").statistic),
        "hardest_quarter": None if constant else len(hardest[0] & hardest[1]) / quarter,
    }


def format_comparison(pairs: Sequence[Mapping[str, Any]]) -> str:
    """`compare`'s result as a table for a terminal."""
    width = max((len(f"{pair['a']} / {pair['b']}") for pair in pairs), default=20) + 2
    lines = [f"{'easy to hard by':{width}}{'samples':>8}{'Spearman':>10}{'Kendall':>9}{'hardest quarter shared':>24}"]
    for pair in pairs:
        if pair["spearman"] is None:
            numbers = ["n/a"] * 3
        else:
            numbers = [f"{pair['spearman']:.2f}", f"{pair['kendall']:.2f}", f"{pair['hardest_quarter']:.0%}"]
        label = f"{pair['a']} / {pair['b']}"
        lines.append(f"{label:{width}}{pair['samples']:>8}{numbers[0]:>10}{numbers[1]:>9}{numbers[2]:>24}")
    return "\n".join([*lines, "1.00 is the same order, 0.00 none in common; two unrelated orders share 25% of their hardest quarter"])


def _refuse_repeated(ids: Sequence[str], what: str) -> None:
    if repeated := [sample for sample, count in Counter(ids).items() if count > 1]:
        raise ScoreError(f"{what} must not repeat, got more than one {_some(repeated)}")


def _some(ids: Sequence[str]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
