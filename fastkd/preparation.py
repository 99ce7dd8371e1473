"""What a trainer is given, brought into shape: student, teacher, tokenised rows, and checks that they fit together."""

import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from . import chunking
from .adapters import adapted, is_adapted
from .arguments import KDConfig
from .data import tokenize
from .functional import divergence as make_divergence
from .functional import fused_linear_kd
from .hf import verify_head
from .models import load_model
from .packing import pack
from .signals import TeacherTopK
from .store import StoreError

__all__ = [
    "check_apart",
    "check_best_metric",
    "check_device",
    "check_fits",
    "check_head",
    "check_loss_buffer",
    "check_signal",
    "check_temperatures",
    "load_student",
    "logits_dtype",
    "pad_id",
    "place",
    "position_limit",
    "tokenized",
]

logger = logging.getLogger(__name__)


def load_student(model: Any, args: KDConfig, peft_config: Any) -> nn.Module:
    if isinstance(model, str | os.PathLike):
        options = dict(args.model_init_kwargs or {})
        quantised = options.get("quantization") or options.get("quantization_config")
        model = load_model(model, **{**({"device_map": {"": args.device}} if quantised else {"dtype": "float32"}), **options})
    elif not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a name, a path or a module, got {type(model).__name__}")
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs: the model is given as a module, which is loaded already")
    if peft_config is not None:
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)  # adapters begin at random
            model = adapted(model, peft_config)
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if is_adapted(model) and args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        model.enable_input_require_grads()  # a reentrant checkpoint has gradients where its input has
    return model


def place(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keywords that say where a model is: its tokenizer is there too."""
    names = ("gguf_file", "revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code")
    return {name: value for name, value in (options or {}).items() if name in names}


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    theirs = {id(p) for p in teacher.parameters()}
    for name, parameter in student.named_parameters():
        if id(parameter) in theirs:
            raise ValueError(
                f"teacher_model: shares parameters with the student ({name}); expected a model of its own (copy.deepcopy before any PEFT"
                " wrapping makes one)"
            )


def check_best_metric(args: KDConfig, eval_dataset: Any, compute_metrics: Any, teacher: bool) -> None:
    if not (args.metric_for_best_model or args.load_best_model_at_end or args.save_strategy == "best"):
        return
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", "ce", "perplexity", *(["kl", "agreement"] if teacher else [])]
    if isinstance(eval_dataset, Mapping):
        known = [f"{key}_{metric}" for key in eval_dataset for metric in known]
    if name not in known and compute_metrics is None:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(known)}, got {args.metric_for_best_model!r}")


def check_fits(dataset: Dataset, who: str, model: Any) -> None:
    """Refuse token ids and lengths that a model's embeddings do not have: on a GPU they end in an assertion that names nothing."""
    if len(dataset) == 0:
        raise ValueError("dataset: has no rows")
    columns = [batch["input_ids"] for batch in dataset.with_format("arrow").iter(10_000)]
    largest = max(pc.max(pc.list_flatten(c)).as_py() for c in columns)
    longest = max(pc.max(pc.list_value_length(c)).as_py() for c in columns)
    _check_embeddings(model, who, largest, longest)


def _check_embeddings(model: Any, who: str, largest: int, longest: int) -> None:
    tokens = model.get_input_embeddings()
    if isinstance(tokens, nn.Embedding) and largest >= tokens.num_embeddings:
        raise ValueError(f"input_ids: {who} has {tokens.num_embeddings} token embeddings, the data has id {largest}: another tokenizer?")
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise ValueError(f"max_length: {who} has {limit} positions, the data has a row of {longest} tokens")


def position_limit(model: Any) -> int | None:
    """The most tokens that a model takes: as many as it has learned positions; None where they are rotary or computed otherwise."""
    embeddings = [(name.rpartition(".")[2], m.num_embeddings) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    learned = [n for name, n in embeddings if "pos" in name or name.endswith("wpe")]
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min([*learned, *([stated] if stated else [])]) if learned else None


def check_signal(kind: str, divergence: str, parameters: Mapping[str, Sequence[float]]) -> None:
    """Refuse a divergence that what a store keeps cannot serve: computed once, on two buckets and a tail."""
    tail = -torch.inf if kind == "sampled" else math.log(0.1)
    signal = TeacherTopK(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3 if kind == "topk" else 0.4]]).log(), 1.0, torch.tensor([tail]))
    for i in range(2 if kind != "hidden" else 0):  # both ends of a ramp
        values = {name: ends[-i] for name, ends in parameters.items()}
        try:
            found = fused_linear_kd(torch.eye(2)[:1], torch.eye(4)[:, :2], signal, divergence=make_divergence(divergence, **values))
        except ValueError as error:
            raise StoreError(f"store.kind: {kind}: {error}; expected another divergence, or kind hidden") from None
        if not found.isfinite():
            raise StoreError(
                f"store.kind: {kind} gives tokens that were not kept no probability, where the divergence {divergence} is infinite;"
                " expected forward_kl, another finite one, or kind hidden"
            )


def check_temperatures(kind: str, temperatures: Collection[float]) -> None:
    """Refuse to keep probabilities, which are of one temperature, for several."""
    if kind != "hidden" and len(temperatures) > 1:
        shown = ", ".join(f"{t:g}" for t in sorted(temperatures))
        raise StoreError(f"store.kind: {kind} holds probabilities at one temperature, the plan has {shown}; expected kind hidden")


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have."""
    if device is None:
        return
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([here.type] if here else [])]
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in known or (found.index or 0) >= max(1, torch.accelerator.device_count()):
        raise ValueError(f"device: expected a device that is here, {' or '.join(known)}, got {device!r}")


def check_head(argument: str, model: Any) -> None:
    ids = torch.arange(3, 11, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    try:
        verify_head(model, ids)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def logits_dtype(args: KDConfig, dtype: torch.dtype) -> torch.dtype:
    """Of the loss, for hidden states of ``dtype``."""
    return torch.promote_types(dtype, torch.float32) if args.logits_dtype is None else getattr(torch, args.logits_dtype)


def check_loss_buffer(args: KDConfig, student: Any, teachers: Sequence[Any]) -> None:
    """Refuse a max_loss_buffer_mb that holds not one token's logits, warn of one that holds few."""
    if args.max_loss_buffer_mb is None:
        return
    vocabulary, *others = (model.config.get_text_config().vocab_size for model in (student, *teachers))
    shared = min(vocabulary, max(others, default=0))
    dtype = logits_dtype(args, next(student.parameters()).dtype)
    tokens = chunking.chunk_tokens_within(args.max_loss_buffer_mb * 2**20, vocabulary, shared, dtype)
    if tokens < chunking.LEAST_TOKENS:
        enough = args.max_loss_buffer_mb * chunking.LEAST_TOKENS / tokens
        logger.warning(
            "max_loss_buffer_mb: holds %d tokens at a time, which is slow; %.0f would hold %d", tokens, enough, chunking.LEAST_TOKENS
        )


def tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: KDConfig, name: str, scored: bool = False) -> Dataset:
    """Rows of `fastkd.data.tokenize` or `fastkd.packing.pack`; with ``scored``, their column ``score`` too, where they have one."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name}_dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
    if {"input_ids", "labels", "sample_index"} <= set(dataset.column_names):
        return pack(dataset, args.max_length, name=name) if args.packing and "position_ids" not in dataset.column_names else dataset
    if tokenizer is None and "input_ids" not in dataset.column_names:
        raise ValueError(f"processing_class: {name}_dataset is not tokenised, which needs the student's tokenizer, got None")
    rows = tokenize(
        dataset,
        tokenizer,
        max_length=None if args.packing else args.max_length,
        completion_only_loss=args.completion_only_loss,
        chat_template=args.chat_template,
        name=name,
    )
    if args.packing:
        return pack(rows, args.max_length, name=name)
    if not scored or "score" not in dataset.column_names:
        return rows
    scores = dataset["score"]
    try:
        return rows.add_column("score", [float(scores[i]) for i in rows["sample_index"]])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}_dataset: column 'score': expected numbers, higher is easier: {error}") from None


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any id will do: padding is masked by position."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((i for i in ids if i is not None), 0)
