"""`fastkd doctor`: what would stop a run, or make it worse than it need be, found before any training.

Each check is a function from what is known of the run to findings. They go from cheap to dear, and one that fails does not keep the next
from being made. Nothing is written, neither to the run's folder nor to a store.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_torch_bf16_gpu_available

from .begin import Run, begin, described, load_spec, options_of, place_of, same_model, teacher_sources
from .config import ConfigError, ModelSpec, RunConfig, teacher_key
from .data import IGNORE, KDCollator, load_rows, tokenize
from .evaluation import token_metrics
from .findings import Finding, count, error, listed, ok, refusal, size, text_of, warning
from .fitting import proposals
from .hf import Head, head_of, run_body
from .levers import check_liger, check_optimizer
from .memory import GB, MemoryEstimate, Setting, predict, setting_of
from .models import check_tokenizers, load_tokenizer, outline, quantized_by
from .pacing import schedule_for, teacher_of
from .parity import loss_parity
from .plan import Schedule, knob_ends
from .preflight import check_before_loading
from .preparation import check_fits, check_head, check_signal, check_temperatures, pad_id, position_limit
from .run import check_folder
from .store import Store, StoreSpec, folder_name
from .teachers import Teachers

__all__ = ["examine"]

MOST_ROWS = 10_000  # looked at for lengths and duplicates; beyond, every so many-th
ASKED_ROWS = 10  # on which the models are asked
PARITY_TOKENS = 32
CUT, DROPPED, WASTE = 0.05, 0.01, 0.20  # shares of rows, rows and positions above which there is a warning
BETTER = 0.9  # of the logarithm of the vocabulary: a teacher above this knows next to nothing of the rows
MARGIN = 0.05  # nats, by which ten rows and another dtype may differ
_STOPS = "`fastkd distill` stops here"


def examine(config: RunConfig, *, card_gb: float | None = None, models: bool = True, debug: bool = False) -> Iterator[Finding]:
    """Findings, as the checks are made.

    Args:
        card_gb: memory of the GPU to plan for, in GB of 2 ** 30 bytes; None: that of the GPU at hand, if any.
        models: also load the models, one at a time, and ask them.
        debug: let a check's exceptions through.
    """
    case = _Case(config, card_gb)
    with _quiet():
        for name, (check, dear) in _CHECKS.items():
            if dear and not models:
                yield Finding("skipped", name, "no models are loaded (--no-models)")
                continue
            try:
                found = check(case)
            except _Missing as problem:
                found = [Finding("skipped", "", str(problem))]
            except Exception as problem:  # of whatever library
                if debug:
                    raise
                found = [error(text_of(problem), "the check could not be made, and the run would likely stop for the same reason")]
            case.failed |= any(finding.level == "error" for finding in found)
            yield from (dataclasses.replace(finding, check=name) for finding in found)


class _Missing(Exception):
    """A check needs what another one already found wanting."""


@dataclass
class _Asked:
    """What a model said: nats per counted token of the asked rows, and hidden states ``[N, D]`` of some of their tokens, with its head."""

    ce: float
    hidden: Tensor
    head: Head


class _Case:
    """What is known of the run; each part is found out when a check first asks for it."""

    def __init__(self, config: RunConfig, card_gb: float | None):
        self.config, self.card_gb = config, card_gb
        self.elsewhere = card_gb is not None and not torch.cuda.is_available()  # the run is planned for a machine that is not this one
        self.begun: Run | None = None
        self.failed = False  # whether an error was found already
        self.blamed: list[str] = []  # keys of the configuration of which an error is told
        self.asked: dict[str, _Asked] = {}

    @property
    def run(self) -> Run:
        if self.begun is None:
            raise _Missing("need settings that hold together")
        return self.begun

    @functools.cached_property
    def schedule(self) -> Schedule:
        return self.run.schedule(self.run.unscored)

    @functools.cached_property
    def used(self) -> list[str]:
        """The teachers that the plan asks, in the order in which it does."""
        return list(dict.fromkeys(name for stage in self.run.plan.stages if (name := teacher_of(stage)) is not None))

    def key(self, teacher: str) -> str:
        """The teacher's key in the file."""
        return teacher_key(self.config.teachers, teacher)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.begun.tokenizer if self.begun else load_tokenizer(self.config.student.model, **place_of(self.config.student))

    @functools.cached_property
    def teacher_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        return {
            name: self.tokenizer if _same_place(spec, self.config.student) else load_tokenizer(spec.model, **place_of(spec))
            for name, spec in self.config.teachers.items()
        }

    @functools.cached_property
    def teachers(self) -> Teachers:
        sources = teacher_sources(self.config)
        if self.elsewhere:
            sources = {name: dataclasses.replace(source, device=None) for name, source in sources.items()}
        return Teachers(sources, device=self.run.args.device)

    @functools.cached_property
    def student(self) -> Any:
        """All its layers, on the meta device."""
        spec = self.config.student
        return outline(spec.model, dtype=spec.dtype, **options_of(spec))

    @functools.cached_property
    def estimate(self) -> MemoryEstimate:
        return predict(self.memory_setting)

    @functools.cached_property
    def memory_setting(self) -> Setting:
        return setting_of(self.run, device=None if self.card_gb is None else "cuda")

    # Rows.

    @functools.cached_property
    def looked_at(self) -> tuple[int, Dataset]:
        """How many rows were looked at, and those of them that have something to learn, whole."""
        rows = self.run.rows
        some = rows.select(range(0, len(rows), -(-len(rows) // MOST_ROWS)))
        return len(some), self.whole(some, "train")

    def whole(self, rows: Dataset, name: str) -> Dataset:
        args = self.run.args
        options = {key: getattr(args, key) for key in ("completion_only_loss", "chat_template")}
        return tokenize(rows, self.tokenizer, max_length=None, name=name, **options)

    @functools.cached_property
    def asked_rows(self) -> list[dict[str, Any]]:
        train = self.run.train
        return [train[i] for i in range(0, len(train), -(-len(train) // ASKED_ROWS))]

    @functools.cached_property
    def asked_labels(self) -> Tensor:
        """``[N]``, of the tokens whose hidden states are kept."""
        return torch.tensor([label for row in self.asked_rows for label in _counted(row)[: self._kept]])

    @property
    def _kept(self) -> int:
        return -(-PARITY_TOKENS // len(self.asked_rows))

    def ask(self, model: Any) -> _Asked:
        """One row at a time, so that a batch of long rows never decides whether a check can be made."""
        device, collate = next(model.parameters()).device, KDCollator(pad_id(self.tokenizer))
        total, tokens, kept = 0.0, 0, []
        for row in self.asked_rows:
            batch = {key: value.to(device) for key, value in collate([row]).items()}
            labels = batch["shift_labels"]
            with torch.no_grad():
                hidden, _ = run_body(model, **{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch})
                head = head_of(model)
                total += float(token_metrics(hidden, head, None, labels)["ce"].double().sum())
            counted = labels != IGNORE
            tokens += int(counted.sum())
            kept.append(hidden[counted][: self._kept].cpu())
        # A copy: what is left of a model must not keep it in memory.
        weight, bias = (None if t is None else t.detach().clone().cpu() for t in (head.weight, head.bias))
        assert weight is not None
        return _Asked(total / tokens, torch.cat(kept), dataclasses.replace(head, weight=weight, bias=bias))


# Cheap: the configuration and this machine.


def _environment(case: _Case) -> list[Finding]:
    training = case.config.training
    packages = ", ".join(f"{package} {version_of(package)}" for package in ("fastkd", "torch", "transformers", "accelerate", "datasets"))
    cpu, device = bool(training.get("use_cpu")), f"no GPU: the run is on the CPU, {count(torch.get_num_threads(), 'thread')}"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        device = f"{card.name}, {card.total_memory / GB:.0f} GB" + (", not used (training.use_cpu: true)" if cpu else "")
    if case.elsewhere and not cpu:
        device = f"no GPU: looked at for one of {case.card_gb:g} GB (--card)"
    gpu = (torch.accelerator.is_available() or case.elsewhere) and not cpu
    found = [ok(f"{packages}, Python {platform.python_version()}; {device}")]
    if torch.version.cuda is None and not gpu and not cpu and shutil.which("nvidia-smi"):
        what = f"torch {torch.__version__} is built without CUDA, on a machine that has nvidia-smi"
        change = "install torch for CUDA (pytorch.org says how), or set training.use_cpu: true if that is meant"
        found.append(warning(what, "the run would be on the CPU, many times slower", change))

    def refused(key: str, value: Any, why: str, change: str) -> None:
        case.blamed.append(key.rpartition(".")[2])
        why = why.removeprefix(f"{case.blamed[-1]}: ").partition(": pip install")[0]  # the remedy is told below
        found.append(error(f"{key}: {str(value).lower() if isinstance(value, bool) else value}", why, change))

    if training.get("bf16") and not (cpu or case.elsewhere or is_torch_bf16_gpu_available()):
        change = "training.bf16: false; or training.use_cpu: true to compute in bfloat16 on the CPU, which is for trying out"
        refused("training.bf16", True, "no GPU here computes in bfloat16, and transformers stops the run", change)
    elif training.get("bf16") and gpu and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        why = "the GPU has no bfloat16 of its own: it is emulated, and slow"
        found.append(warning("training.bf16: true", why, "training.fp16: true in its place"))
    if training.get("fp16") and not gpu:
        refused("training.fp16", True, "half precision needs a GPU, and the run is on the CPU", "training.fp16: false")
    optim = training.get("optim")
    if optim is not None and (problem := refusal(check_optimizer, str(optim))):
        refused("training.optim", optim, problem, f"{_install(problem)}training.optim: adamw_torch")
    if training.get("use_liger_kernel") and (problem := refusal(check_liger, torch.device("cuda" if gpu else "cpu"))):
        refused("training.use_liger_kernel", True, problem, f"{_install(problem)}leave it out")
    for key, spec in {"student": case.config.student, **{case.key(name): spec for name, spec in case.config.teachers.items()}}.items():
        if (bits := spec.quantization) is not None and (problem := refusal(quantized_by, bits)):
            refused(f"{key}.quantization", bits, problem, f"{_install(problem)}leave it out")
        if (attention := spec.attn_implementation or "").startswith("flash_attention"):
            place = f"{key}.attn_implementation"
            package = {"flash_attention_3": "flash_attn_interface"}.get(attention, "flash_attn")
            if not gpu:
                refused(place, attention, "its kernels are for GPUs, and the run is on the CPU", f"{place}: sdpa")
            # transformers fetches it by the package kernels
            elif not case.elsewhere and not any(map(importlib.util.find_spec, (package, "kernels"))):
                refused(
                    place, attention, f"it needs the package {package}, which is not installed", f"pip install flash-attn, or {place}: sdpa"
                )
    report = training.get("report_to") or []
    for target in [report] if isinstance(report, str) else report:
        if target in INTEGRATION_TO_CALLBACK and target not in get_available_reporting_integrations():
            change = f"pip install {target.replace('_', '-')}, or training.report_to: none"
            refused("training.report_to", target, "its package is not installed, and transformers stops the run", change)
    return found


def _settings(case: _Case) -> list[Finding]:
    """What every command does first; it has its own words for what is wrong."""
    try:
        case.begun = begin(case.config, elsewhere=case.elsewhere)
    except ConfigError as problem:
        what = str(problem).removeprefix(f"{case.config.path}: ")
        if any(re.search(rf"\b{re.escape(key)}\b", what) for key in case.blamed):
            return [Finding("skipped", "", "rows and plan are read once the error above is mended")]
        return [error(what, f"{_STOPS}; so do the checks that need the rows")]
    args = case.begun.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)
    teachers = listed(map(described, case.config.teachers.values())) if case.config.teachers else "the rows alone"
    return [ok(f"{described(case.config.student)}, learns from {teachers}, {count(batch, 'row')} a step")]


def _folder(case: _Case) -> list[Finding]:
    folder = Path(case.config.output_dir)
    try:
        check_folder(folder, case.config, resume=False)
    except ConfigError as problem:
        what = str(problem).removeprefix(f"{case.config.path}: ")
        if refusal(check_folder, folder, case.config, True):
            return [error(what, "`fastkd distill` overwrites nothing", "output_dir: another folder")]
        why = "`fastkd distill` overwrites nothing, and goes on with that run only where it is told to"
        return [warning(f"output_dir: {folder} holds this run already", why, "say --resume to go on with it, or name another output_dir")]
    return [ok(f"output_dir: {folder} is free")]


# Tokenizers, vocabularies, templates.


def _tokenizers(case: _Case) -> list[Finding]:
    student, found = case.tokenizer, []
    if student.eos_token_id is None:
        why = "rows end without one, so that the student never learns to stop"
        found.append(
            warning("the student's tokenizer has no end-of-sequence token", why, "student: a model whose tokenizer has an eos_token")
        )
    for teacher, tokenizer in case.teacher_tokenizers.items():
        key = case.key(teacher)
        if problem := refusal(check_tokenizers, student, tokenizer):
            why = "the loss compares probabilities id by id, so that an id must mean the same to both"
            found.append(error(f"{key}: {problem}", why, f"{key}: a model of the student's family, or another student"))
        elif tokenizer.eos_token_id != student.eos_token_id:
            what = f"{key}: its texts end with {tokenizer.eos_token!r}, the student's with {student.eos_token!r}"
            why = "the rows end with the student's token, where this teacher may not expect an end"
            found.append(warning(what, why, f"student and {key} of one kind, base or instruct; or rows that carry the teacher's end token"))
    if found:
        return found
    ids = f"{len(student):,} ids, end token {student.eos_token!r}"
    if not case.teacher_tokenizers:
        return [ok(f"{ids}; there is no teacher to agree with")]
    return [ok(f"student and {listed(map(case.key, case.teacher_tokenizers))} agree on every id that they share: {ids}")]


def _vocabularies(case: _Case) -> list[Finding]:
    tokenizer, found, heads = case.tokenizer, [], {}
    last = max(tokenizer.get_vocab().values())
    needed = max(i for i in (pad_id(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None)
    for key, model in {"student": case.student, **{case.key(name): case.teachers.outline(name) for name in case.config.teachers}}.items():
        if (linear := model.get_output_embeddings()) is None:  # type: ignore[operator]
            raise ValueError(f"{key}: {type(model).__name__} has no LM head; expected a causal language model")
        heads[key] = rows = linear.weight.shape[0]
        for data in filter(None, (case.run.train, case.run.held_out)):
            if problem := refusal(check_fits, data, key, model):
                change = "data.max_length: less" if problem.startswith("max_length") else f"{key}: a model that belongs to the tokenizer"
                found.append(error(problem, f"{_STOPS}: on a GPU such a row would end in an assertion that names nothing", change))
                break
        if last >= rows:
            what = f"{key}: its head has {rows:,} rows, and the tokenizer has ids up to {last:,}"
            change = f"{key}: resize the model's token embeddings, or take the tokenizer that came with it"
            if needed >= rows:
                found.append(error(what, f"id {needed:,} is the padding, end or beginning token, which the model cannot read", change))
            else:
                found.append(warning(what, "it can neither read nor write the tokens beyond; no row has one", change))
    limit, longest = getattr(case.student.config.get_text_config(), "max_position_embeddings", None), max(case.run.unscored.lengths)
    if limit and longest > limit and position_limit(case.student) is None:
        what = f"rows have up to {longest:,} tokens, and the student was made for {limit:,} positions"
        found.append(warning(what, "it has never seen positions beyond", f"data.max_length: {limit}"))
    if found:
        return found
    small, large = min(heads.values()), max(heads.values())
    what = f"heads of {small:,} rows" if small == large else f"heads of {listed(f'{rows:,} ({key})' for key, rows in heads.items())} rows"
    if large > last + 1:
        what += f" for the tokenizer's {last + 1:,} ids; the rest is padding, which is fine"
    if small < large:
        what += f": the divergence is over the {small:,} ids that all have, renormalised there, cross-entropy over the student's own"
    return [ok(what)]


def _template(case: _Case) -> list[Finding]:
    rows, own, asked = case.run.rows, case.tokenizer.chat_template, case.config.data.chat_template
    columns = rows.column_names
    if "prompt" not in columns and "messages" not in columns:
        return [ok(f"not needed: the rows are {'tokenised already' if 'input_ids' in columns else 'plain text'}")]
    if not (asked or "messages" in columns or isinstance(rows[0]["prompt"], list)):
        if own is None or asked is False:
            return [ok("none is applied: prompts and completions are joined as they are")]
        what = "prompts and completions are plain strings; the tokenizer has a chat template, which is not applied"
        why = "an instruct model that is not asked in its own format answers worse, and so teaches worse"
        return [
            warning(what, why, "data.chat_template: true; or false, which says that this is meant: for base models, or texts in the format")
        ]
    found = []
    for teacher, tokenizer in case.teacher_tokenizers.items():
        if tokenizer.chat_template != own:
            has = "has none" if tokenizer.chat_template is None else "has another"
            what = f"rows are rendered with the student's chat template; {case.key(teacher)} {has}"
            change = f"student and {case.key(teacher)} with one template; or prompts and completions as strings in the teacher's format"
            found.append(warning(what, "this teacher reads a format that it was not trained on, and teaches worse", change))
    if found:
        return found
    how = "answers are found by rendering what comes before them"
    if case.run.args.completion_only_loss is False:
        how = "all tokens count (data.completion_only_loss: false)"
    elif "messages" in columns and re.search(r"\{%[-+]?\s*generation\b", case.tokenizer.get_chat_template()):
        how = "answers are what it marks with {% generation %}"
    return [ok(f"one chat template renders the rows; {how}")]


# Rows.


def _rows(case: _Case) -> list[Finding]:
    args, samples, found = case.run.args, case.run.unscored, []
    seen, whole = case.looked_at
    lengths, most, empty = np.array([len(ids) for ids in whole["input_ids"]]), args.max_length, seen - len(whole)
    of = f"{seen:,} rows" + (" looked at" if seen < len(case.run.rows) else "")
    cut = 0 if args.packing else int((lengths > most).sum())
    lost = sum(all(label == IGNORE for label in labels[1:most]) for labels in whole["labels"]) if cut else 0
    if empty + lost > DROPPED * seen:
        parts = [(empty, "have nothing to answer", "give them an answer, or take them out")]
        parts += [(lost, f"have a prompt that fills max_length={most}", "data.max_length: more")]
        what = listed(f"{n:,} {text}" for n, text, _ in parts if n)
        change = "; ".join(text for n, _, text in parts if n)
        found.append(warning(f"of {of} {what}", "they have no token to learn from and are left out", change))
    if cut > CUT * seen:
        what = f"{cut:,} of {of} ({cut / seen:.0%}) are longer than max_length={most} and lose their end"
        keep = [int(np.quantile(lengths, q, method="higher")) for q in (0.95, 0.99)]
        change = f"data.max_length: {keep[0]} keeps 95 % of the rows whole, {keep[1]} keeps 99 %; memory and time grow with it"
        found.append(warning(what, "the student does not see how these answers end, nor their end token", change))
    assert samples.counted is not None
    what = f"{of}, {int(np.median(lengths)):,} tokens in the median, {lengths.max():,} at most"
    if 0 < cut <= CUT * seen:
        what += f" ({cut:,} cut at {most})"
    if 0 < empty + lost <= DROPPED * seen:
        what += f" ({empty + lost:,} left out)"
    return [ok(f"{what}; {sum(samples.counted) / sum(samples.lengths):.0%} of all tokens are learned from"), *found]


def _held_out(case: _Case) -> list[Finding]:
    run = case.run
    if run.held_out is None:
        return [ok("no rows to evaluate on (data.eval)")]
    train, held_out, seen = run.train, run.held_out, len(run.rows)
    if run.args.packing:
        (seen, train), columns = case.looked_at, case.config.data.columns
        held_out = case.whole(load_rows(case.config.data.eval or "", columns=columns), "eval")
    (rows, prompts), (same, asked) = _hashes(train), _hashes(held_out)
    twice, again = sum(map(set(rows).__contains__, same)), sum(map((set(prompts) - {None}).__contains__, asked))
    what = f"of {count(len(same), 'row')} of data.eval {max(twice, again):,} "
    what += "are rows of data.train too" if twice else "have the prompt of a row of data.train"
    if seen < len(run.rows):
        what += f", of which {seen:,} rows were looked at"
    if max(twice, again) <= DROPPED * len(same):
        return [ok(what)]
    why = "figures on what was trained on say nothing of anything else"
    return [warning(what, why, "take them out of data.train or data.eval")]


def _padding(case: _Case) -> list[Finding]:
    args, schedule = case.run.args, case.schedule
    if args.packing or args.padding_free:
        return [ok(f"none: data.{'packing' if args.packing else 'padding_free'} joins the rows")]
    share = _waste(schedule, args.per_device_train_batch_size)
    what = f"{share:.0%} of a batch's positions are padding"
    if share <= WASTE:
        return [ok(what)]
    remedies = ["data.padding_free: true (none)"]
    if schedule.plan.order in ("shuffled", "sequential"):
        ordered = dataclasses.replace(schedule.plan, order="by_length")
        less = _waste(schedule_for(ordered, case.run.unscored, args), args.per_device_train_batch_size)
        remedies.append(f"training.train_sampling_strategy: group_by_length ({less:.0%})")
    return [warning(what, "the models compute them and the loss leaves them out: time for nothing", " or ".join(remedies))]


def _waste(schedule: Schedule, size: int, most: int = 1000) -> float:
    """The share of padding in the micro-batches of the first steps."""
    lengths, real, padded = schedule.samples.lengths, 0, 0
    for step in range(min(schedule.total_steps, most)):
        batch = schedule.batch(step)
        for start in range(0, len(batch), size):
            sizes = [lengths[i] for i in batch[start : start + size]]
            real, padded = real + sum(sizes), padded + len(sizes) * max(sizes)
    return 1 - real / max(padded, 1)


# The plan, and the room that it takes.


def _plan(case: _Case) -> list[Finding]:
    run, schedule, found = case.run, case.schedule, []
    for teacher, spec in case.config.teachers.items():
        key = case.key(teacher)
        if teacher not in case.used:
            found.append(warning(f"no stage asks {key}", "it teaches nothing", "take it out, or name it in a stage of plan.stages"))
        elif same_model(spec, case.config.student):
            what, why = f"student and {key} are the same model", "it teaches nothing that the student does not know"
            found.append(warning(what, why, f"student: a smaller model, or {{from: {teacher}, layers: [...]}}"))
    for i, (stage, pool) in enumerate(zip(run.plan.stages, schedule.pools, strict=True)):
        if pool < schedule.batch_size:
            what = f"stage {i} ({stage.name}) has {count(pool, 'sample')}, less than one batch of {schedule.batch_size}"
            change = "more rows, fewer parts in plan.fractions, or a smaller training.per_device_train_batch_size"
            found.append(warning(what, "its steps are smaller than the others', at the same learning rate", change))
    for start, steps in schedule.segments:
        if (warmup := run.args.get_warmup_steps(steps)) >= steps > 1:
            what = f"the learning rate rises for {warmup} steps, of the {steps} that begin at step {start}"
            found.append(warning(what, "it does not come down again before the end", "training.warmup_steps: less"))
    tokens = sum(row["tokens"] for row in schedule.table())
    what = f"{count(len(schedule.plan.stages), 'stage')}, {count(schedule.total_steps, 'step')}, {tokens:,} tokens to learn from"
    if schedule.total_steps < schedule.planned_steps:
        what += f"; training.max_steps cuts {schedule.planned_steps:,} steps short"
    if run.plan.needs_scores and not run.scores_path.exists():
        what += "; the samples are still to be scored, which comes first"
    return [ok(what), *found]


def _stores(case: _Case) -> tuple[StoreSpec, list[Store], int]:
    """The stores that the run would open, without touching their folders, and the bytes of the heads beside them."""
    assert case.run.args.store is not None
    spec, found, heads = StoreSpec(**case.run.args.store), [], 0
    for teacher in case.used:
        weight = _head_weight(case.teachers.outline(teacher))
        heads += weight.nbytes if spec.kind == "hidden" else 0
        for split, rows in (("train", case.run.train), ("eval", case.run.held_out)):
            if rows is not None and (split == "train" or teacher == case.used[-1]):
                folder = Path(spec.path).expanduser() / folder_name(teacher) / folder_name(split)
                collate, student = KDCollator(pad_id(case.tokenizer)), len(_head_weight(case.student))
                width, dtype = weight.shape[1], weight.dtype
                found.append(Store(folder, spec, rows, collate, width=width, dtype=dtype, temperature=1.0, vocabulary=student))
    return spec, found, heads


def _store(case: _Case) -> list[Finding]:
    if case.config.store is None:
        return [ok("none: the teachers are asked in every step")]
    run, stages = case.run, [stage for stage in case.run.plan.stages if teacher_of(stage) is not None]
    spec, stores, heads = _stores(case)
    temperatures = {value for stage in stages for value in knob_ends(stage.temperature)}
    if problem := refusal(check_temperatures, spec.kind, temperatures):
        return [error(problem, _STOPS, "store.kind: hidden, or one temperature")]
    for stage in stages:
        ends = {name: knob_ends(knob) for name, knob in stage.parameters.items()}
        if problem := refusal(check_signal, spec.kind, run.args.divergence, ends):
            return [error(problem, _STOPS, "store.kind: hidden, or another loss.divergence")]
    need = sum(store.predicted_bytes() for store in stores) + heads
    if spec.max_gb is not None and need > spec.max_gb * 1e9:
        what = f"store.max_gb: the signals take {size(need)}, allowed are {size(spec.max_gb * 1e9)}"
        return [error(what, _STOPS, "store.max_gb: more, or store.kind: topk with a smaller store.top_k")]
    missing, batches = sum(len(store.missing()) for store in stores), sum(len(store.batches) for store in stores)
    filled = "is empty" if missing == batches else f"has {batches - missing:,} of {batches:,} batches" if missing else "is full"
    return [ok(f"{spec.path} {filled}; it takes {size(need)} of {spec.kind} signals in all")]


def _memory(case: _Case) -> list[Finding]:
    estimate, found = case.estimate, []
    here = torch.cuda.is_available()
    if estimate.device == "cuda":
        card = int(case.card_gb * GB) if case.card_gb is not None else torch.cuda.get_device_properties(0).total_memory
        found.append(_fits(case, "the GPU", estimate.gpu, card, "--card" if case.card_gb is not None else "this GPU"))
    if estimate.device == "cpu" or here:
        free = psutil.virtual_memory().available + psutil.Process().memory_info().rss  # what this process has, the run will have
        found.append(_fits(case, "host memory", estimate.host, free, "what is free here"))
    return found


def _fits(case: _Case, where: str, need: int, room: int, of: str) -> Finding:
    estimate = case.estimate
    part = estimate.peak("cuda" if where == "the GPU" else "cpu")
    parts = part.gpu if where == "the GPU" else part.host
    largest = max(parts, key=lambda name: parts[name])
    what = f"{need / GB:.1f} GB of {where} at the peak, of {room / GB:.1f} GB ({of}); "
    what += f"the largest part in its {part.name} is {largest}, {parts[largest] / GB:.1f} GB"
    if estimate.rough:
        what += "; a rough estimate, the model could not be traced"
    if need <= room:
        return ok(what)
    why = "the run would end for want of memory"
    if where != "the GPU" and estimate.device == "cuda":
        return error(what, why, "teacher: {..., park: false}, fewer training.dataloader_num_workers, or a machine with more memory")
    changes = proposals(case.memory_setting, room)
    told = [f"{p.change} ({_peak(p.estimate) / GB:.1f} GB{_cost(p.time)})" for p in changes]
    if not changes or not changes[-1].fits:
        told.append("no further setting makes it fit: a smaller model, or data.max_length: less")
    return error(what, why, "; ".join(told))


def _peak(estimate: MemoryEstimate) -> int:
    return estimate.gpu if estimate.device == "cuda" else estimate.host


def _cost(time: float | None) -> str:
    return "" if time is None or abs(time) < 0.005 else f", {abs(time):.0%} {'slower' if time > 0 else 'faster'}"


def _disk(case: _Case) -> list[Finding]:
    """Free disk for checkpoints and stores, those on one disk together."""
    args, schedule, found = case.run.args, case.schedule, []
    output, phases = Path(case.config.output_dir), [part for phase in case.estimate.phases for part in (phase.gpu, phase.host)]
    weights, trained, state = (max(part.get(key, 0) for part in phases) for key in ("student weights", "gradients", "optimizer state"))
    whole = weights
    if (spec := case.config.student).quantization is not None:  # it is saved merged, in what it is computed in
        whole = sum(p.nbytes for p in outline(spec.model, dtype=spec.dtype, **place_of(spec)).parameters())
    needs = {output: [("the student", whole)]}
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy != "no":
        every = int(args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * schedule.total_steps)))
        epochs = math.ceil(schedule.epochs(schedule.total_steps))
        saved = max(1, {"epoch": epochs, "steps": schedule.total_steps // every}.get(strategy, schedule.total_steps))
        copies = min(saved, args.save_total_limit + 1) if args.save_total_limit else saved  # the next is whole before the oldest goes
        kept = trained if case.config.student.lora is not None else weights
        needs[output].append((count(copies, "checkpoint"), copies * (kept + (0 if args.save_only_model else state))))
    if case.config.store is not None:
        place, stores, heads = _stores(case)
        still = sum(store.predicted_bytes(store.missing()) for store in stores)
        needs.setdefault(Path(place.path).expanduser(), []).append(("the store", still + (heads if still else 0)))
    disks: dict[int, tuple[Path, list[tuple[str, int]]]] = {}
    for folder, parts in needs.items():
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not os.access(there, os.W_OK):
            found.append(error(f"{folder}: {there} is not writable", _STOPS, "output_dir or store.path: another folder"))
        disks.setdefault(there.stat().st_dev, (there, []))[1].extend(parts)
    for there, parts in disks.values():
        need, free = sum(size for _, size in parts), shutil.disk_usage(there).free
        what = f"{', '.join(f'{name} {size(need)}' for name, need in parts)}; {size(free)} are free at {there}"
        change = "make room; or training.save_total_limit: 1, store.kind: topk, another disk for output_dir or store.path"
        if need > free:
            found.append(error(what, f"{size(need - free)} are lacking, and a full disk stops the run", change))
        elif need > 0.9 * free:
            found.append(warning(what, "that is nearly all, and a full disk stops the run", change))
        else:
            found.append(ok(what))
    return found


def _start(case: _Case) -> list[Finding]:
    """What `fastkd distill` itself looks at before it loads a model, in case it sees what nothing above did."""
    problem = refusal(check_before_loading, case.run, scores=case.run.plan.needs_scores, here=not case.elsewhere)
    if not problem:
        return [ok("`fastkd distill` would go on to load the models")]
    if case.failed:
        raise _Missing("needs the errors above mended")
    return [error(problem.removeprefix(f"{case.config.path}: "), _STOPS, "what it names")]


# Dear: the models themselves, one at a time.


def _heads(case: _Case) -> list[Finding]:
    """Each model's split into body and head against its own logits; asks each of them, for the checks that follow."""
    run, found, fine = case.run, [], []
    spec = case.config.student
    for who in ("student", *case.used):
        key = "student" if who == "student" else case.key(who)
        try:
            if who == "student":
                model: Any = load_spec(spec, "float32", run.args.device)
                if spec.quantization is None:
                    model.to(run.args.device)
                check_head("student", model)
            else:
                model = case.teachers.model(who)
            case.asked[who] = case.ask(model)
            fine.append(key)
        except Exception as problem:  # of whatever library reads it
            why = "it cannot be loaded or run, or its logits are not those of one linear head, whose place the fused loss takes"
            found.append(error(f"{key}: {text_of(problem)}", why, f"{key}: another model, dtype, device or revision"))
        finally:
            model = None
            case.teachers.stage(())
    return [*([ok(f"{listed(fine)}: hidden states and head give the model's own logits")] if fine else []), *found]


def _teachers(case: _Case) -> list[Finding]:
    """Whether each teacher knows something of the rows."""
    if not case.used:
        return [ok("the plan asks none")]
    if not any(teacher in case.asked for teacher in case.used):
        raise _Missing("needs a teacher that can be loaded")
    unigram, own, found = _unigram(case), case.asked.get("student"), []
    for teacher in filter(case.asked.__contains__, case.used):
        asked, key = case.asked[teacher], case.key(teacher)
        chance = math.log(len(asked.head.weight))
        what = f"{key} is at {asked.ce:.2f} nats per token on {count(len(case.asked_rows), 'row')}; chance is {chance:.2f}, guessing by"
        what += f" frequency {unigram:.2f}" + (f", the student before training {own.ce:.2f}" if own else "")
        change = f"look at {key} (its revision, its gguf_file), at data.chat_template, and at data.columns"
        if not asked.ce < BETTER * chance:
            why = "it knows no more of the answers than chance: broken weights, or another tokenizer, template or revision than its own"
            found.append(error(what, why, change))
        elif asked.ce > unigram:
            why = "how often each token comes says more of the answers than it does: another template or revision than its own?"
            found.append(warning(what, why, change))
        elif own is not None and asked.ce > own.ce + MARGIN:
            why = "it knows less of the answers than the student, which would learn to be worse"
            found.append(warning(what, why, f"{change}; or loss.kd_ratio: less"))
        else:
            found.append(ok(what))
    return found


def _parity(case: _Case) -> list[Finding]:
    """The fused loss against the naive one, on hidden states of the models themselves."""
    args, store = case.run.args, case.config.store
    student = case.asked.get("student")
    if student is None or not all(teacher in case.asked for teacher in case.used):
        raise _Missing("needs models that can be loaded")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else student.hidden.dtype
    device, labels = args.device, case.asked_labels.to(args.device)
    hidden, head = student.hidden.to(device, dtype), _moved(student.head, device, dtype)
    found, worst, seen = [], [0.0, 0.0], set()
    for start in case.schedule.starts:
        point = case.schedule.at(start)
        teacher = case.asked[point.teacher] if point.kd_ratio > 0 and point.teacher else None
        knobs = (point.teacher if teacher else None, point.temperature, point.kd_ratio, *point.parameters.items())
        if knobs in seen:
            continue
        seen.add(knobs)
        parity = loss_parity(
            hidden,
            head,
            None if teacher is None else (teacher.hidden.to(device), _moved(teacher.head, device)),
            labels,
            divergence=args.divergence,
            parameters=point.parameters,
            temperature=point.temperature,
            temperature_squared=args.temperature_squared,
            kd_ratio=point.kd_ratio,
            chunk_tokens=args.chunk_tokens,
            logits_dtype=None if args.logits_dtype is None else getattr(torch, args.logits_dtype),
            top_k=None if store is None or store.kind == "hidden" else store.top_k if store.kind == "topk" else store.samples,
        )
        gradient = max(parity.hidden, parity.weight)
        worst = [max(worst[0], parity.loss), max(worst[1], gradient)]
        if not parity.holds:
            what = (
                f"{point.name}: the fused loss is off by {parity.loss:.1e}, its gradients by {gradient:.1e} (relative, {args.divergence})"
            )
            why = f"rounding in {_dtype(dtype)} explains {parity.bounds[0]:.0e} and {parity.bounds[1]:.0e}: it trains on something else"
            found.append(error(what, why, "report it with this configuration; another loss.divergence may do until then"))
    tokens = f"{count(len(labels), 'token')} in {_dtype(dtype)}"
    name = args.divergence if case.used else "cross-entropy"
    what = f"the fused {name} is off the naive one by {worst[0]:.0e}, its gradients by {worst[1]:.0e} (relative, on {tokens})"
    return found or [ok(what)]


def _unigram(case: _Case) -> float:
    """Nats per counted token of the asked rows, guessed by how often each token counts in all rows of the run."""
    counts = np.ones(len(case.tokenizer))
    for batch in case.run.train.select_columns(["labels"]).with_format("arrow").iter(10_000):
        labels = batch["labels"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        counts += np.bincount(labels[labels >= 0], minlength=len(counts))[: len(counts)]
    asked = [label for row in case.asked_rows for label in _counted(row)]
    return float(-np.log(counts[asked] / counts.sum()).mean())


# By name, in this order: the check, and whether it loads models.
_CHECKS: dict[str, tuple[Callable[[_Case], list[Finding]], bool]] = {
    "environment": (_environment, False),
    "settings": (_settings, False),
    "output_dir": (_folder, False),
    "tokenizers": (_tokenizers, False),
    "vocabularies": (_vocabularies, False),
    "template": (_template, False),
    "rows": (_rows, False),
    "held-out": (_held_out, False),
    "padding": (_padding, False),
    "plan": (_plan, False),
    "store": (_store, False),
    "memory": (_memory, False),
    "disk": (_disk, False),
    "start": (_start, False),
    "heads": (_heads, True),
    "teachers": (_teachers, True),
    "parity": (_parity, True),
}


# Small things.


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the checks find is said once: without the progress bars, warnings and logs of what they call."""
    loggers = [logging.getLogger(name) for name in ("fastkd", "transformers", "datasets", "accelerate")]
    levels = [logger.level for logger in loggers]
    ours, theirs = not datasets.are_progress_bars_disabled(), transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if ours:
            datasets.enable_progress_bars()
        if theirs:
            transformers.utils.logging.enable_progress_bar()


def _install(problem: str) -> str:
    """The remedy that a refusal names."""
    found = re.search(r"pip install [\w.-]+", problem)
    return f"{found[0]}, or " if found else ""


def _same_place(a: ModelSpec, b: ModelSpec) -> bool:
    return a.model == b.model and place_of(a) == place_of(b)


def _head_weight(model: Any) -> Tensor:
    return model.get_output_embeddings().weight


def _counted(row: Mapping[str, Any]) -> list[int]:
    """The tokens of a row that are learned from."""
    return [label for label in row["labels"][1:] if label != IGNORE]


def _hashes(rows: Dataset) -> tuple[list[int], list[int | None]]:
    """Of each row's tokens, and of those before the first that counts, where there is more than a beginning."""
    whole: list[int] = []
    prompts: list[int | None] = []
    for row in rows.select_columns(["input_ids", "labels"]):
        first = next((i for i, label in enumerate(row["labels"]) if label != IGNORE), 0)
        whole.append(hash(tuple(row["input_ids"])))
        prompts.append(hash(tuple(row["input_ids"][:first])) if first > 1 else None)
    return whole, prompts


def _moved(head: Head, device: torch.device, dtype: torch.dtype | None = None) -> Head:
    bias = None if head.bias is None else head.bias.to(device, dtype)
    return dataclasses.replace(head, weight=head.weight.to(device, dtype), bias=bias)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
