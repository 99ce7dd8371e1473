"""A run from its configuration: data, models, training, evaluation before and after, and the folder that it leaves."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from . import checkpoints
from .config import ConfigError, ModelSpec, RunConfig
from .data import load_rows
from .models import check_tokenizers, load_model, load_tokenizer
from .preparation import tokenized
from .report import METRICS, read_metrics, write_report
from .trainer import KDConfig, KDTrainer

__all__ = ["distill"]

# Where the configuration is silent; TrainingArguments' own defaults elsewhere.
TRAINING_DEFAULTS = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2}

PLAN = "plan.json"

logger = logging.getLogger(__name__)


def distill(config: RunConfig, *, resume: bool = False) -> Path:
    """Train ``config.student`` and save it, with its metrics and report, to ``config.output_dir``, which is returned.

    Raises:
        ConfigError: the folder already holds a run and ``resume`` is False; nothing in it is touched.
        ValueError, TypeError, OSError: from data and models, before training. NonFiniteLossError: in training.
    """
    output = Path(config.output_dir)
    _check_folder(output, config, resume)
    if config.data.eval is None and config.training.get("eval_strategy", "no") != "no":
        raise ConfigError(f"{config.path}: training.eval_strategy: there are no rows to evaluate on; name data.eval, or leave it out")
    with _blamed(config, "training"):
        args = _arguments(config)
    teacher_name, teacher_spec = next(iter(config.teachers.items()))
    student_spec = config.student
    if student_spec.model == teacher_spec.model and student_spec.layers == teacher_spec.layers:
        logger.warning("student and teacher are the same model (%s): there is nothing to learn", student_spec.model)

    with _blamed(config, "data.train"):
        train_rows = load_rows(config.data.train, columns=config.data.columns)
    with _blamed(config, "data.eval"):
        eval_rows = None if config.data.eval is None else load_rows(config.data.eval, columns=config.data.columns)
    with _blamed(config, "student"):
        tokenizer = load_tokenizer(student_spec.model, **_place(student_spec))
    with _blamed(config, "teacher"):
        check_tokenizers(tokenizer, load_tokenizer(teacher_spec.model, **_place(teacher_spec)))
    with _blamed(config, "data"):
        train_data = tokenized(train_rows, tokenizer, args, "train")
        eval_data = None if eval_rows is None else tokenized(eval_rows, tokenizer, args, "eval")
    with _blamed(config, "teacher"):
        teacher = _load(teacher_spec, None)
    with _blamed(config, "student"):
        student = _load(student_spec, "float32")
    with _blamed(config, "training"):
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
        _say("before", trainer.evaluate())
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    evaluated = any(row["step"] == trainer.state.global_step and "eval_kl" in row for row in read_metrics(output))
    if eval_rows is not None and not evaluated:
        _say("after", trainer.evaluate())
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_report(output, output.name, _facts(config, teacher_name, trainer))
    return output


def _say(when: str, found: dict[str, float]) -> None:
    print(
        f"{when}, on {found['eval_tokens']} held-out tokens: KL to the teacher {found['eval_kl']:.3f} nats, cross-entropy"
        f" {found['eval_ce']:.3f} nats, same first choice {found['eval_agreement']:.1%}",
        flush=True,
    )


@contextlib.contextmanager
def _blamed(config: RunConfig, key: str) -> Iterator[None]:
    """An error inside is the fault of this key of the configuration."""
    try:
        yield
    except Exception as error:  # libraries raise all kinds for files and options that do not suit
        name = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ConfigError(f"{config.path}: {key}: {name}{error}") from error


def _check_folder(output: Path, config: RunConfig, resume: bool) -> None:
    """Nothing that is not this run's is overwritten."""

    def refuse(why: str):
        raise ConfigError(f"{config.path}: output_dir: {output} {why}")

    for name, spec in (("student", config.student), *config.teachers.items()):
        if Path(spec.model).resolve() == output.resolve():
            refuse(f"is where {name!r} is read from; choose another folder")
    finished, plan = output / "config.json", output / PLAN
    if not resume:
        if finished.exists() or (output / METRICS).exists() or any(output.glob("checkpoint-*")):
            refuse("already holds a run or a model: say --resume, or choose another folder")
        return
    if not any(output.glob("checkpoint-*")) and finished.exists():
        refuse("holds a student, but no checkpoint to resume from; choose another folder")
    if plan.exists():
        before, now = _flat(json.loads(plan.read_text())["config"]), _flat(config.to_dict())
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not key.startswith(_FREE):
                refuse(
                    f"was begun with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; to resume, use the same (to train on, begin"
                    f" another run with student: {output})"
                )


# What may change on resuming: it has no effect on the weights.
_FREE = ("path", "output_dir", "training.logging_", "training.save_", "training.eval_", "training.disable_tqdm", "training.report_to")


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {key: tree}
    return {name: value for k, v in tree.items() for name, value in _flat(v, f"{key}.{k}" if key else k).items()}


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
        (Path(args.output_dir) / PLAN).write_text(json.dumps(plan, indent=1) + "\n")


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
