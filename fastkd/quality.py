"""How good a model's answers are: ROUGE-L, exact match of final answers, perplexity; and the standard suites through lm-eval."""

import functools
import json
import math
import platform
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from .data import IGNORE, KDCollator
from .functional import fused_linear_kd
from .generation import Answer, check_settings, generate
from .hf import _eval_mode, head_of, run_body
from .preparation import check_device, check_fits, pad_id

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "METRICS",
    "SampleLoss",
    "answers_match",
    "completion_turns",
    "evaluate",
    "extract_answer",
    "format_quality",
    "lm_eval_suite",
    "prompt_ids",
    "rouge_l",
    "sample_losses",
]

METRICS = ("rouge_l", "exact_match", "perplexity", "ce")
"""What `evaluate` measures; the first two need generated answers."""

_GENERATED = METRICS[:2]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: "Dataset",
    tokenized: "Dataset",
    *,
    seeds: Sequence[int] = (0,),
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    metrics: Sequence[str] = METRICS,
    answers_path: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """A model's quality on rows with references.

    Args:
        model: a causal LM of transformers, wrapped by PEFT or not, on its device.
        tokenizer: the model's tokenizer.
        rows: as `fastkd.data.load_rows` returns them.
        tokenized: the same rows by `fastkd.data.tokenize`. What comes before the first counted token is the prompt.
        seeds: one run of sampled generation each. Greedy generation runs once.
        temperature, top_p, max_new_tokens, batch_size: of `fastkd.generation.generate`; temperature 0 is greedy.
        metrics: of `METRICS`. ``rouge_l``: mean F of ROUGE-L against the reference, from 0 to 1 (package `rouge-score`, Porter stemmer).
            ``exact_match``: share of the rows whose final answer is the reference's (`answers_match`), among those whose reference has one.
            ``ce``: mean cross-entropy of the reference's counted tokens, nats per token; ``perplexity``: exp(ce). Truncated references
            count in full for the first two, up to the truncation for the last two.
        answers_path: a file for the answers, one JSON object per line: id, seed, answer, ended, rouge_l, match.
        progress: show progress bars.

    Returns:
        Ready for JSON. ``metrics``: by name ``{mean, std, per_seed}``, std being that of the sample (n - 1), None for a single run;
        ``counts``, ``settings``, ``versions``, ``model``, and ``notes``: what was left out and why.

    Raises:
        ValueError: an unknown metric, no seed, a setting outside its range, or a metric asked for by name that the rows do not allow.
    """
    _check_metrics(metrics)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected one or more different whole numbers, got {list(seeds)}")
    notes: list[str] = []
    found: dict[str, list[float]] = {}
    counts: dict[str, Any] = {"rows": len(tokenized)}

    if set(metrics) & set(_GENERATED):
        prompts = prompt_ids(tokenized)
        if prompts is None:
            if tuple(metrics) != METRICS:
                raise ValueError(f"metrics: {', '.join(m for m in metrics if m in _GENERATED)}: {_NO_PROMPT}")
            notes.append(f"no answers were generated: {_NO_PROMPT}")
        else:
            if temperature == 0:
                if len(seeds) > 1:
                    notes.append(f"greedy generation is the same for every seed: one run instead of {len(seeds)}")
                seeds = seeds[:1]
            references = [turns[0] for turns in completion_turns(rows, tokenized, tokenizer)]
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "batch_size": batch_size}
            runs = [_answers(model, tokenizer, tokenized, prompts, seed, options, progress) for seed in seeds]
            found, more = _judge(runs, seeds, references, tokenized["sample_id"][:], answers_path)
            counts |= more
            if not counts["references_with_answer"]:
                del found["exact_match"]
                reason = "no reference has a final answer (a number, yes or no, or what follows '####' or 'the answer is')"
                if "exact_match" in metrics and tuple(metrics) != METRICS:
                    raise ValueError(f"metrics: exact_match: {reason}")
                notes.append(f"no exact match: {reason}")
            elif loose := sum(_is_loose(text) for text in references):
                notes.append(f"exact match: {loose} references do not mark their answer; their first yes or no, or last number, was taken")

    if set(metrics) & {"perplexity", "ce"}:
        label = "Reading references" if progress else None
        losses = [loss for batch in sample_losses(model, tokenizer, tokenized, batch_size=batch_size, progress=label) for loss in batch]
        counts["tokens"] = sum(loss.tokens for loss in losses)
        ce = math.fsum(loss.mean * loss.tokens for loss in losses) / counts["tokens"]
        found |= {"ce": [ce], "perplexity": [math.exp(ce) if ce < 700 else math.inf]}

    generated = any(name in found for name in _GENERATED)
    settings: dict[str, Any] = {"batch_size": batch_size}
    if generated:
        settings |= {"temperature": temperature, "max_new_tokens": max_new_tokens, "rouge": "rougeL F, Porter stemmer"}
        settings |= {"top_p": top_p, "seeds": list(seeds)} if temperature else {}
    parameter = next(model.parameters())
    return {
        "model": {
            "name": str(getattr(model.config, "name_or_path", "")) or type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
        },
        "metrics": {name: _summary(found[name]) for name in METRICS if name in found and name in metrics},
        "counts": counts,
        "settings": settings,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}},
        "notes": notes,
    }


_PACKAGES = ("fastkd", "torch", "transformers", "datasets", "rouge-score")
_NO_PROMPT = "the rows have no prompt to answer: every token of them counts (plain text, or completion_only_loss: false)"


def _answers(
    model: nn.Module, tokenizer: Any, tokenized: "Dataset", prompts: list[list[int]], seed: int, options: dict, progress: bool
) -> list[Answer]:
    """One run: an answer per row, in the rows' order."""
    label = ("Answering" if not options["temperature"] else f"Answering, seed {seed}") if progress else None
    names = tokenized["sample_id"][:]
    batches = generate(model, tokenizer, prompts, seed=seed, names=names, progress=label, **options)
    return sorted(answer for batch in batches for answer in batch)


def _judge(
    runs: list[list[Answer]], seeds: Sequence[int], references: list[str], ids: list[str], answers_path: str | Path | None
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    has_answer = [extract_answer(text) is not None for text in references]
    found: dict[str, list[float]] = {"rouge_l": [], "exact_match": []}
    counts: dict[str, Any] = {"references_with_answer": sum(has_answer), "ended": [], "mean_new_tokens": []}
    lines = []
    for seed, answers in zip(seeds, runs, strict=True):
        rouge = [rouge_l(answer.text, reference) for answer, reference in zip(answers, references, strict=True)]
        match = [answers_match(a.text, r) if has else None for a, r, has in zip(answers, references, has_answer, strict=True)]
        found["rouge_l"].append(statistics.fmean(rouge))
        found["exact_match"].append(sum(map(bool, match)) / max(1, sum(has_answer)))
        counts["ended"].append(sum(answer.ended for answer in answers))
        counts["mean_new_tokens"].append(statistics.fmean(answer.tokens for answer in answers))
        for i, answer in enumerate(answers):
            row = {"id": ids[i], "seed": seed, "answer": answer.text, "ended": answer.ended, "rouge_l": rouge[i], "match": match[i]}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if answers_path is not None:
        Path(answers_path).write_text("".join(lines), encoding="utf-8")
    return found, counts


def _summary(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None, "per_seed": values}


def format_quality(result: Mapping[str, Any]) -> str:
    """`evaluate`'s result as a table for a terminal."""
    settings, counts, found = result["settings"], result["counts"], result["metrics"]
    heading = f"{result['model']['name']}: {counts['rows']} rows"
    if "temperature" in settings:
        how = f"{len(settings['seeds'])} seeds at temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
        heading += f", {how}, at most {settings['max_new_tokens']} new tokens"
    lines = [heading, f"{'':34}{'mean':>10}{'std':>10}"]
    shown = (
        ("rouge_l", "ROUGE-L, x 100", 100, 2),
        ("exact_match", f"exact match, % of {counts.get('references_with_answer')}", 100, 2),
        ("perplexity", "perplexity of the references", 1, 3),
        ("ce", "cross-entropy, nats per token", 1, 4),
    )
    for name, label, factor, digits in shown:
        if name in found:
            spread = "" if found[name]["std"] is None else f"{factor * found[name]['std']:.{digits}f}"
            lines.append(f"{label:34}{factor * found[name]['mean']:>10.{digits}f}{spread:>10}")
    if "ended" in counts:
        share = statistics.fmean(counts["ended"]) / counts["rows"]
        lines.append(f"{'answers that came to an end, %':34}{100 * share:>10.1f}")
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def prompt_ids(tokenized: "Dataset") -> list[list[int]] | None:
    """The prompt of every tokenised row: the ids before its first counted token. None where no row has one, as in plain text.

    The first token of a row never counts, so a single token before the first counted one is a prompt only if other rows have longer ones.
    """
    prompts = []
    for row in tokenized:
        first = next((i for i, label in enumerate(row["labels"]) if i and label != IGNORE), len(row["labels"]))
        prompts.append(row["input_ids"][:first])
    return prompts if any(len(prompt) > 1 for prompt in prompts) else None


def completion_turns(rows: "Dataset", tokenized: "Dataset", tokenizer: Any) -> list[list[str]]:
    """What each tokenised row teaches, as text: one string, or one per answer of the assistant in a conversation; at least one.

    Strings and messages are taken from the raw rows, whole even where ``max_length`` cut the tokens; rows of ``input_ids``, and messages
    without text, are decoded from each row's counted tokens.
    """
    columns = rows.column_names
    column = next((c for c in ("completion", "messages", "text") if c in columns), None)
    found = []
    for row in tokenized:
        value = None if column is None else rows[row["sample_index"]][column]
        if isinstance(value, list):
            turns = [m["content"] for m in value if m.get("role") == "assistant" and isinstance(m.get("content"), str) and m["content"]]
        else:
            turns = [] if value is None else [value]
        counted = [label for label in row["labels"] if label != IGNORE]
        found.append(turns or [tokenizer.decode(counted, skip_special_tokens=True)])
    return found


class SampleLoss(NamedTuple):
    """Cross-entropy of a row's counted tokens: the row's place in the data set, mean in nats per token, number of tokens."""

    position: int
    mean: float
    tokens: int


def sample_losses(
    model: nn.Module,
    tokenizer: Any,
    tokenized: "Dataset",
    *,
    batch_size: int = 8,
    done: Collection[int] = frozenset(),
    progress: str | None = None,
) -> Iterator[list[SampleLoss]]:
    """The cross-entropy of every tokenised row, batch by batch, the longest rows first. Logits are held for one chunk of tokens at a time.

    Batches depend on the rows and ``batch_size`` alone; those whose rows are all in ``done`` are skipped. The model runs in its own dtype
    and in eval mode; its mode is restored.

    Raises:
        ValueError: the rows have an id or a length that the model has no embedding for; a batch size that is no whole number >= 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number >= 1, got {batch_size!r}")
    check_fits(tokenized, "the model", model)
    lengths = [len(ids) for ids in tokenized["input_ids"][:]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    collate = KDCollator(pad_id(tokenizer))
    device = next(model.parameters()).device

    def run() -> Iterator[list[SampleLoss]]:
        with tqdm(total=len(order), desc=progress, unit="rows", disable=progress is None) as bar:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                if not all(i in done for i in batch):
                    yield _losses(model, batch, {k: v.to(device) for k, v in collate([tokenized[i] for i in batch]).items()})
                bar.update(len(batch))

    return run()


@torch.no_grad()
def _losses(model: nn.Module, positions: list[int], batch: dict[str, torch.Tensor]) -> list[SampleLoss]:
    labels = batch["shift_labels"]
    with _eval_mode(model), torch.autocast(labels.device.type, enabled=False):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        hidden, _ = run_body(model, **inputs)
        head = head_of(model)
        _, parts = fused_linear_kd(
            hidden,
            head.weight,
            None,
            labels,
            kd_ratio=0.0,
            student_bias=head.bias,
            student_softcap=head.softcap,
            student_scale=head.scale,
            return_parts=True,
        )
    tokens = (labels != IGNORE).sum(1)
    sums = parts.ce_per_token.double().sum(1)
    return [SampleLoss(i, s / n if n else math.nan, n) for i, s, n in zip(positions, sums.tolist(), tokens.tolist(), strict=True)]


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which training does not need

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, reference: str) -> float:
    """F of ROUGE-L from 0 to 1, by package `rouge-score`: lower case, stemmed by Porter's algorithm, as is usual for instruction tuning.

    The package knows the letters a-z and digits alone: a text in another script has no words for it and scores 0.
    """
    return float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure)


_NUMBER = re.compile(
    r"(?<![\w.])"  # not inside a word, nor a version such as 1.2.3
    r"(?P<sign>[-\u2212])?\$?(?P<minus>[-\u2212])?"
    r"(?P<value>(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:/(?P<below>\d+(?:\.\d+)?))?(?!\.\d)"
)
_ANSWER_IS = re.compile(r"\banswer\b[\s*_]*(?:is\b|:|=)[\s*_:]*", re.IGNORECASE)
_WORD = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)


def extract_answer(text: str, kind: str | None = None) -> Fraction | str | None:
    """The final answer in a text: a number as an exact fraction, a word in lower case, or None.

    What follows the first ``####`` (GSM8K) decides, else the last ``\\boxed{}``, else the last "the answer is" or "answer:"; where there is
    none of them, a yes, no, true or false that the text begins with or consists of, else the last number. Dollar and percent signs,
    thousands commas and closing punctuation are dropped (50% is 50); 42.0 is 42, and 1/2 is 0.5.

    Args:
        kind: ``"number"`` passes over words, ``"word"`` over numbers; None takes what comes first.
    """
    if kind not in (None, "number", "word"):
        raise ValueError(f"kind: expected 'number', 'word' or None, got {kind!r}")
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text).replace("\\$", "$").replace("\\%", "%")
    marked = _marked(text)
    if marked is not None:
        # "5 + 3 = 8" answers 8.
        number = _first_number(marked.rpartition("=")[2])
        if number is not None and kind != "word":
            return number
        if number is None and kind != "number":
            return _only_word(marked)
    bare = text.strip()
    if kind != "number" and (match := _WORD.match(bare.lstrip("*_\"'( "))):
        return match[1].lower()
    if kind == "word":
        words = _WORD.findall(bare)
        return words[-1].lower() if words else _only_word(bare)
    numbers = [n for n in (_value(match) for match in _NUMBER.finditer(text)) if n is not None]
    return numbers[-1] if numbers else None


def answers_match(answer: str, reference: str) -> bool:
    """Whether two texts have the same final answer, of the kind (number or word) that the reference has. No answer matches nothing."""
    expected = extract_answer(reference)
    return expected is not None and extract_answer(answer, "word" if isinstance(expected, str) else "number") == expected


def _marked(text: str) -> str | None:
    """What follows the sign of a final answer, on its line or the next."""
    if "####" in text:
        return text.partition("####")[2].lstrip("# \t\r\n").partition("\n")[0]
    if "\\boxed{" in text:
        return text.rpartition("\\boxed{")[2].partition("}")[0]
    places = list(_ANSWER_IS.finditer(text))
    # Up to the end of the line or sentence; a dot before a digit is a decimal point.
    return re.split(r"\n|[.!?](?:\s|$)", text[places[-1].end() :], maxsplit=1)[0] if places else None


def _first_number(text: str) -> Fraction | None:
    return next((n for n in (_value(match) for match in _NUMBER.finditer(text)) if n is not None), None)


def _value(match: re.Match) -> Fraction | None:
    try:
        value = Fraction(match["value"].replace(",", "")) / Fraction(match["below"] or 1)
    except (ValueError, ZeroDivisionError):  # Python refuses to read numbers of thousands of digits
        return None
    return -value if match["sign"] or match["minus"] else value


def _is_loose(text: str) -> bool:
    """Whether a text's answer is a guess: not marked, and not all that the text says."""
    return _marked(text) is None and len(text.split()) > 3 and extract_answer(text) is not None


def _only_word(text: str) -> str | None:
    word = " ".join(re.sub(r"[^\w\s]", " ", text).lower().split())
    return word or None


def lm_eval_suite(model_path: str | Path, tasks: Sequence[str], *, model_args: Mapping[str, Any] | None = None, **options: Any) -> dict:
    """Standard benchmarks by lm-eval (`lm_eval.simple_evaluate` with its ``hf`` model).

    Args:
        model_path: a saved model's folder or name.
        tasks: lm-eval's names of tasks.
        model_args: further arguments of its model, such as ``{"dtype": "bfloat16"}``.
        options: further arguments of `simple_evaluate`: ``num_fewshot``, ``batch_size``, ``device``, ``limit``, ...

    Returns:
        Ready for JSON: ``results`` (task to metrics), ``versions`` and ``n-samples``, as far as lm-eval states them.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
        ValueError: no task.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ModuleNotFoundError("lm-eval is not installed, which the standard suites need: pip install 'fastkd[eval]'") from None
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks: expected a list of lm-eval's task names, got {tasks!r}")
    arguments = {"pretrained": str(model_path), **(model_args or {})}
    out = lm_eval.simple_evaluate(model="hf", model_args=arguments, tasks=list(tasks), **options)
    return {name: out[name] for name in ("results", "versions", "n-samples") if name in out}


def _check_metrics(metrics: Sequence[str]) -> None:
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {', '.join(map(str, unknown)) or 'none'}")


def evaluate_file(
    model: str,
    data: str | None,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    rows: int | None = None,
    max_length: int = 1024,
    chat_template: bool = False,
    seeds: int = 1,
    dtype: str | None = None,
    device: str | None = None,
    metrics: Sequence[str] | None = None,
    answers: str | None = None,
    tasks: Sequence[str] = (),
    out: str | None = None,
    **generation: Any,
) -> str:
    """`evaluate` and `lm_eval_suite` for a model and data by name: the engine of ``fastkd eval``. Returns a table.

    Args:
        model: a name, a folder or a GGUF file. data: as `fastkd.data.load_rows` takes it; None with ``tasks`` alone.
        columns, split: of `load_rows`. rows: the first so many. max_length, chat_template: of `fastkd.data.tokenize`.
        seeds: runs of sampled generation, with the seeds 0, 1, ...
        dtype, device: of the model; None: the checkpoint's, and the GPU if there is one.
        metrics, generation: as `evaluate` has them. answers: its ``answers_path``. tasks: of lm-eval.
        out: a JSON file for the result. It is written anew.

    Raises:
        ValueError: neither data nor tasks, a number out of range; and those of `evaluate`, `load_rows`, `tokenize`.
    """
    if data is None and not tasks:
        raise ValueError("DATA: missing; give a file or a data set's name, or tasks of lm-eval")
    for name, value in (("rows", rows), ("seeds", seeds), ("max_length", max_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    check_settings(generation)
    if metrics is not None:
        _check_metrics(metrics)
    result: dict[str, Any] = {}
    text = ""
    if data is not None:
        from .data import load_rows, tokenize
        from .models import _dtype, load_model, load_tokenizer

        found = load_rows(data, columns=columns, split=split)
        found = found if rows is None else found.select(range(min(rows, len(found))))
        tokenizer = load_tokenizer(model)
        tokenized = tokenize(found, tokenizer, max_length=max_length, chat_template=chat_template or None, name=str(data))
        check_device(device)
        wanted = _dtype(dtype)
        place = device or (str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu")
        loaded: Any = load_model(model, dtype=wanted)
        loaded.to(place)
        generation |= {} if metrics is None else {"metrics": tuple(metrics)}
        result = evaluate(loaded, tokenizer, found, tokenized, seeds=range(seeds), answers_path=answers, **generation)
        result["data"] = {"source": data, "rows": len(tokenized)}
        text = format_quality(result)
    if tasks:
        result["lm_eval"] = lm_eval_suite(model, tasks, model_args={} if dtype is None else {"dtype": dtype}, device=device)
        text += json.dumps(result["lm_eval"]["results"], indent=1) + "\n"
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=1, default=str) + "\n")
    return text if text.endswith("\n") else text + "\n"
