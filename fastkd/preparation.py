"""What a trainer is given, brought into shape: student, teacher, tokenised rows, and checks that they fit together."""

import math
import os
from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .arguments import KDConfig
from .data import tokenize
from .hf import verify_head
from .models import load_model
from .packing import pack

__all__ = [
    "check_apart",
    "check_best_metric",
    "check_fits",
    "check_head",
    "load_student",
    "pad_id",
    "place",
    "tokenized",
]


def load_student(model: Any, args: KDConfig, peft_config: Any) -> nn.Module:
    if isinstance(model, str | os.PathLike):
        model = load_model(model, **{"dtype": "float32", **(args.model_init_kwargs or {})})
    elif not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a name, a path or a module, got {type(model).__name__}")
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs: the model is given as a module, which is loaded already")
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
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


def check_best_metric(args: KDConfig, eval_dataset: Any, compute_metrics: Any) -> None:
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if isinstance(eval_dataset, Mapping):
        name = next((name.removeprefix(f"{key}_") for key in eval_dataset if name.startswith(f"{key}_")), name)
    known = ("loss", "kl", "ce", "perplexity", "agreement")
    if name not in known and compute_metrics is None:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(known)}, got {args.metric_for_best_model!r}")


def check_fits(dataset: Dataset, who: str, model: Any) -> None:
    """Refuse token ids and lengths that a model's embeddings do not have: on a GPU they end in an assertion that names nothing."""
    columns = [batch["input_ids"] for batch in dataset.with_format("arrow").iter(10_000)]
    largest = max(pc.max(pc.list_flatten(c)).as_py() for c in columns)
    longest = max(pc.max(pc.list_value_length(c)).as_py() for c in columns)
    _check_embeddings(model, who, largest, longest)


def _check_embeddings(model: Any, who: str, largest: int, longest: int) -> None:
    embeddings = [(name, m.num_embeddings) for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    tokens = model.get_input_embeddings()
    if isinstance(tokens, nn.Embedding) and largest >= tokens.num_embeddings:
        raise ValueError(f"input_ids: {who} has {tokens.num_embeddings} token embeddings, the data has id {largest}: another tokenizer?")
    # Learned positions, not rotary ones.
    learned = [n for name, n in embeddings if "pos" in name.rpartition(".")[2] or name.endswith("wpe")]
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min([*learned, stated or math.inf]) if learned else math.inf
    if longest > limit:
        raise ValueError(f"max_length: {who} has {limit} positions, the data has a row of {longest} tokens")


def check_head(argument: str, model: Any) -> None:
    ids = torch.arange(3, 11, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    try:
        verify_head(model, ids)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error


def tokenized(dataset: Any, tokenizer: PreTrainedTokenizerBase | None, args: KDConfig, name: str) -> Dataset:
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
    if "score" not in dataset.column_names:
        return rows
    scores = dataset["score"]
    return rows.add_column("score", [float(scores[i]) for i in rows["sample_index"]])


def pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any id will do: padding is masked by position."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((i for i in ids if i is not None), 0)
