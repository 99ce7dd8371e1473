"""A run from its configuration: data, models, training, evaluation before and after, and the folder that it leaves."""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from . import checkpoints
from .config import ConfigError, ModelSpec, RunConfig
from .data import load_rows, tokenize
from .models import check_tokenizers, load_model, load_tokenizer
from .report import METRICS, write_report
from .trainer import KDConfig, KDTrainer

__all__ = ["distill"]

# Where the configuration is silent; TrainingArguments' own defaults elsewhere.
TRAINING_DEFAULTS = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2}

logger = logging.getLogger(__name__)


def distill(config: RunConfig, *, resume: bool = False) -> Path:
    """Train ``config.student`` and save it, with its metrics and report, to ``config.output_dir``, which is returned.

    Raises:
        ConfigError: the folder already holds a run and ``resume`` is False; nothing in it is touched.
        ValueError, TypeError, OSError: from data and models, before training. NonFiniteLossError: in training.
    """
    output = Path(config.output_dir)
    if not resume and ((output / METRICS).exists() or any(output.glob("checkpoint-*"))):
        raise ConfigError(f"{config.path}: output_dir: {output} already holds a run: say --resume, or choose another folder")
    with _blamed(config, "training"):
        args = _arguments(config)
    teacher_name, teacher_spec = next(iter(config.teachers.items()))
    student_spec = config.student

    with _blamed(config, "data.train"):
        train_rows = load_rows(config.data.train, columns=config.data.columns)
    with _blamed(config, "data.eval"):
        eval_rows = None if config.data.eval is None else load_rows(config.data.eval, columns=config.data.columns)
    with _blamed(config, "student"):
        tokenizer = load_tokenizer(student_spec.model, **_place(student_spec))
    with _blamed(config, "teacher"):
        check_tokenizers(tokenizer, load_tokenizer(teacher_spec.model, **_place(teacher_spec)))
    tokenized = functools.partial(
        tokenize,
        tokenizer=tokenizer,
        max_length=config.data.max_length,
        completion_only_loss=config.data.completion_only_loss,
        chat_template=config.data.chat_template,
    )
    with _blamed(config, "data"):
        train_data = tokenized(train_rows, name="train")
        eval_data = None if eval_rows is None else tokenized(eval_rows, name="eval")
    with _blamed(config, "teacher"):
        teacher = _load(teacher_spec, None)
    with _blamed(config, "student"):
        student = _load(student_spec, "float32")
    trainer = KDTrainer(
        student,
        {teacher_name: teacher},
        args,
        train_data,
        eval_data,
        processing_class=tokenizer,
        callbacks=[_PlanFile(config, teacher_name)],
    )
    start = checkpoints.newest_complete(output) if resume else None
    if resume and start is None:
        logger.warning("no complete checkpoint in %s: starting from the beginning", output)
    if start is None and eval_rows is not None:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if eval_rows is not None:
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_report(output, output.name, _facts(config, teacher_name, trainer))
    return output


@contextlib.contextmanager
def _blamed(config: RunConfig, key: str) -> Iterator[None]:
    """An error inside is the fault of this key of the configuration."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"{config.path}: {key}: {error}") from error


def _arguments(config: RunConfig) -> KDConfig:
    loss, data = config.loss, config.data
    return KDConfig(
        output_dir=config.output_dir,
        seed=config.seed,
        divergence=loss.divergence,
        divergence_parameters=dict(loss.parameters),
        temperature=loss.temperature,
        temperature_squared=loss.temperature_squared,
        kd_ratio=loss.kd_ratio,
        chunk_tokens=loss.chunk_tokens,
        logits_dtype=loss.logits_dtype,
        max_length=data.max_length,
        completion_only_loss=data.completion_only_loss,
        chat_template=data.chat_template,
        **{**TRAINING_DEFAULTS, **config.training},
    )


def _load(spec: ModelSpec, default_dtype: str | None) -> PreTrainedModel:
    return load_model(spec.model, dtype=spec.dtype or default_dtype, layers=spec.layers, **_place(spec))


def _place(spec: ModelSpec) -> dict[str, Any]:
    return {name: value for name in ("gguf_file", "revision") if (value := getattr(spec, name)) is not None}


class _PlanFile(TrainerCallback):
    """Writes ``plan.json`` when the number of steps is known."""

    def __init__(self, config: RunConfig, teacher: str):
        self.config, self.teacher = config, teacher

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        loss = self.config.loss
        stage = {"stage": 0, "teacher": self.teacher, "steps": state.max_steps, "temperature": loss.temperature, "kd_ratio": loss.kd_ratio}
        plan = {"stages": [stage], "config": self.config.to_dict()}
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")


def _described(spec: ModelSpec) -> str:
    return Path(spec.model).name + ("" if spec.layers is None else f", {len(spec.layers)} of its layers")


def _facts(config: RunConfig, teacher: str, trainer: Any) -> dict[str, Any]:
    loss, student = config.loss, trainer.accelerator.unwrap_model(trainer.model)
    return {
        "student": f"{_described(config.student)} ({student.num_parameters():,} parameters)",
        "teacher": f"{_described(config.teachers[teacher])} ({trainer.teacher.num_parameters():,} parameters)",
        "divergence": " ".join([loss.divergence, *(f"{k}={v:g}" for k, v in loss.parameters.items())]),
        "temperature": loss.temperature,
        "kd_ratio": loss.kd_ratio,
        "training rows": len(trainer.train_dataset),
        "steps": trainer.state.max_steps,
    }
