"""What all commands need of a configuration before any model is loaded: arguments, plan, tokenizer and rows."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import adapted, lora_config
from .arguments import KDConfig
from .config import ConfigError, DataSpec, LossSpec, ModelSpec, RunConfig, teacher_key
from .data import load_rows
from .models import load_model, load_tokenizer, outline, quantized_by
from .pacing import filled_plan, sample_table, schedule_for
from .plan import Plan, PlanError, Samples, Schedule
from .preparation import tokenized
from .presets import TRAINING
from .store import StoreError
from .teachers import TeacherSource

__all__ = ["Run", "begin", "blamed", "described", "load_spec", "options_of", "place_of", "same_model", "teacher_sources"]

# Where the configuration and the plan's preset are silent; TrainingArguments' own defaults elsewhere.
TRAINING_DEFAULTS = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2}
_OF_GPUS = ("fp16", "tf32", "use_liger_kernel")  # arguments that are refused where there is none; bf16 is not with use_cpu


@dataclass
class Run:
    """What all commands need of a configuration before any model is loaded."""

    config: RunConfig
    args: KDConfig
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset
    train: Dataset
    held_out: Dataset | None
    unscored: Samples

    def schedule(self, samples: Samples) -> Schedule:
        return schedule_for(self.plan, samples, self.args)

    @property
    def scores_path(self) -> Path:
        return Path(self.config.difficulty.path or Path(self.config.output_dir) / "difficulty.parquet")


def begin(config: RunConfig, *, elsewhere: bool = False) -> Run:
    """Read the data and the student's tokenizer, and refuse what does not fit together; no model is loaded and nothing is written.

    Args:
        elsewhere: the run will be on a machine with a GPU, which this one need not have.
    """
    if config.data.eval is None and config.training.get("eval_strategy", "no") != "no":
        raise ConfigError(f"{config.path}: training.eval_strategy: there are no rows to evaluate on; name data.eval, or leave it out")
    with blamed(config, "training"):
        args = _arguments(config, elsewhere)
    with blamed(config, "plan"):
        plan = filled_plan(config.plan, args, list(config.teachers))
    _check_models(config)
    with blamed(config, "data.train"):
        rows = load_rows(config.data.train, columns=config.data.columns)
    with blamed(config, "data.eval"):
        eval_rows = None if config.data.eval is None else load_rows(config.data.eval, columns=config.data.columns)
    with blamed(config, "student"):
        tokenizer = load_tokenizer(config.student.model, **place_of(config.student))
    with blamed(config, "data"):
        train = tokenized(rows, tokenizer, args, "train")
        held_out = None if eval_rows is None else tokenized(eval_rows, tokenizer, args, "eval")
    # As if all were of one difficulty: the stages are the same, but for the tokens in each.
    unscored = dataclasses.replace(sample_table(train), scores=[0.0] * len(train))
    run = Run(config, args, plan, tokenizer, rows, train, held_out, unscored)
    with blamed(config, "plan"):
        run.schedule(unscored)  # what does not fit is refused before anything is scored or loaded
    return run


def _check_models(config: RunConfig) -> None:
    """Refuse quantisations and an adapter that cannot be had."""
    named = {"student": config.student, "difficulty.scorer": config.difficulty.scorer}
    named |= {teacher_key(config.teachers, name): spec for name, spec in config.teachers.items()}
    for key, spec in named.items():
        if spec is not None and spec.quantization is not None:
            with blamed(config, f"{key}.quantization"):
                quantized_by(spec.quantization)
    if config.student.lora is not None:
        with blamed(config, "student"):
            drawn = outline(config.student.model, **options_of(config.student))
        with blamed(config, "student.lora"):
            adapted(drawn, lora_config({**config.student.lora, "init_lora_weights": True}))  # others begin by looking at weights


def _arguments(config: RunConfig, elsewhere: bool) -> KDConfig:
    loss, data, store = config.loss, config.data, config.store
    recipe = {} if config.plan is None else dict(TRAINING.get(config.plan.name, {}))
    if "lr_scheduler_type" in config.training:
        recipe.pop("lr_scheduler_kwargs", None)  # which are another scheduler's
    training, later = {**TRAINING_DEFAULTS, **recipe, **config.training}, {}
    if elsewhere:
        later = {name: training.pop(name) for name in _OF_GPUS if name in training}
        training["use_cpu"] = True
    args = KDConfig(
        output_dir=config.output_dir,
        seed=config.seed,
        divergence=loss.divergence,
        divergence_parameters=dict(loss.parameters),
        temperature=loss.temperature,
        temperature_squared=loss.temperature_squared,
        kd_ratio=loss.kd_ratio,
        chunk_tokens=loss.chunk_tokens,
        max_loss_buffer_mb=loss.max_loss_buffer_mb,
        logits_dtype=loss.logits_dtype,
        max_length=data.max_length,
        completion_only_loss=data.completion_only_loss,
        chat_template=data.chat_template,
        packing=data.packing,
        padding_free=data.padding_free,
        store=None if store is None else {**dataclasses.asdict(store), "path": store.path or str(Path(config.output_dir) / "store")},
        **training,
    )
    for name, value in later.items():
        setattr(args, name, value)
    return args


def load_spec(spec: ModelSpec, default_dtype: str | None, device: torch.device | None = None) -> PreTrainedModel:
    """The model on the CPU, but a quantised one on ``device``, and what of it is not quantised in the checkpoint's dtype by default."""
    options = options_of(spec)
    if spec.quantization is not None:
        default_dtype, options["device_map"] = None, None if device is None else {"": device}
    return load_model(spec.model, dtype=spec.dtype or default_dtype, layers=spec.layers, **options)


def options_of(spec: ModelSpec) -> dict[str, Any]:
    """Keywords of `load_model` besides the dtype and the layers."""
    how = {name: value for name in ("attn_implementation", "quantization") if (value := getattr(spec, name)) is not None}
    return {**place_of(spec), **how}


def place_of(spec: ModelSpec) -> dict[str, Any]:
    return {name: value for name in ("gguf_file", "revision") if (value := getattr(spec, name)) is not None}


def teacher_sources(config: RunConfig) -> dict[str, TeacherSource]:
    """What the trainer's teachers are made from, by key."""
    return {
        name: TeacherSource(
            spec.model, spec.dtype, spec.device, spec.park, {**options_of(spec), **({} if spec.layers is None else {"layers": spec.layers})}
        )
        for name, spec in config.teachers.items()
    }


def same_model(a: ModelSpec, b: ModelSpec) -> bool:
    """Whether both are the same weights."""
    return a.model == b.model and place_of(a) == place_of(b) and a.layers == b.layers and a.quantization == b.quantization


def described(spec: ModelSpec) -> str:
    return Path(spec.model).name + ("" if spec.layers is None else f", {len(spec.layers)} of its layers")


@contextlib.contextmanager
def blamed(config: RunConfig, key: str) -> Iterator[None]:
    """An error inside is the fault of this key of the configuration."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # libraries raise all kinds for files and options that do not suit
        text = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        teacher = re.match(r"teacher '([^']+)': ", text)
        named = re.match(r"([\w.\[\]]+): ", text)
        if isinstance(error, PlanError):
            key = f"plan.{named[1]}" if named else "plan"
        elif isinstance(error, StoreError):
            key = named[1] if named and named[1].startswith("store.") else "store"
        elif named and (own := _key_of(named[1])) and key in ("training", own.partition(".")[0]):
            key = own
        elif text.startswith("max_length: "):
            key = "data.max_length"
        elif text.startswith("input_ids"):
            key = "data"
        elif key.startswith("data.") and re.match(r"\S+: columns: ", text):
            key = "data.columns"
        elif text.startswith("Specified `attn_implementation="):  # of transformers
            key = f"{key}.attn_implementation"
        elif text.startswith("Your setup doesn't support bf16"):
            key, text = "training.bf16", "no GPU here computes in bfloat16; expected false, or use_cpu: true (`plan --card` needs neither)"
        if named and key.endswith(named[1]):
            text = text[named.end() :]
        if teacher:
            key, text = teacher_key(config.teachers, teacher[1]), text[teacher.end() :]
        raise ConfigError(f"{config.path}: {key}: {text}") from error


def _key_of(argument: str) -> str | None:
    """Where the configuration has an argument of `KDConfig`."""
    for section, spec in (("loss", LossSpec), ("data", DataSpec)):
        if argument in (f.name for f in dataclasses.fields(spec)):
            return f"{section}.{argument}"
    return f"training.{argument}" if argument.partition(".")[0] in (f.name for f in dataclasses.fields(KDConfig)) else None
