"""A run from its configuration: data, difficulty, models, training, evaluation before and after, and the folder that it leaves."""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from . import checkpoints, difficulty
from .config import ConfigError, ModelSpec, RunConfig
from .data import load_rows
from .files import flat, write_whole
from .models import check_tokenizers, load_model, load_tokenizer
from .pacing import filled_plan, sample_table, schedule_for
from .plan import Plan, PlanError, Samples, Schedule, difference
from .preparation import tokenized
from .presets import TRAINING
from .preview import preview
from .report import METRICS, PLAN, read_metrics, write_report
from .store import StoreError
from .teachers import TeacherSource
from .trainer import KDConfig, KDTrainer

__all__ = ["distill", "fill_stores", "score", "show_plan"]

# Where the configuration and the plan's preset are silent; TrainingArguments' own defaults elsewhere.
TRAINING_DEFAULTS = {"report_to": "none", "logging_steps": 10, "save_total_limit": 2}

logger = logging.getLogger(__name__)


@dataclass
class _Run:
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


def _begin(config: RunConfig) -> _Run:
    with _blamed(config, "training"):
        args = _arguments(config)
    with _blamed(config, "plan"):
        plan = filled_plan(config.plan, args, list(config.teachers))
    with _blamed(config, "data.train"):
        rows = load_rows(config.data.train, columns=config.data.columns)
    with _blamed(config, "data.eval"):
        eval_rows = None if config.data.eval is None else load_rows(config.data.eval, columns=config.data.columns)
    with _blamed(config, "student"):
        tokenizer = load_tokenizer(config.student.model, **_place(config.student))
    with _blamed(config, "data"):
        train = tokenized(rows, tokenizer, args, "train")
        held_out = None if eval_rows is None else tokenized(eval_rows, tokenizer, args, "eval")
    # As if all were of one difficulty: the stages are the same, but for the tokens in each.
    unscored = dataclasses.replace(sample_table(train), scores=[0.0] * len(train))
    run = _Run(config, args, plan, tokenizer, rows, train, held_out, unscored)
    with _blamed(config, "plan"):
        run.schedule(unscored)  # what does not fit is refused before anything is scored or loaded
    return run


def distill(config: RunConfig, *, resume: bool = False) -> Path:
    """Train ``config.student`` and save it, with its metrics and report, to ``config.output_dir``, which is returned.

    Where the plan asks which samples are easier, and no file says so yet, they are scored first.

    Raises:
        ConfigError: the folder already holds a run and ``resume`` is False; nothing in it is touched.
        ValueError, TypeError, OSError: from data and models, before training. NonFiniteLossError: in training.
    """
    output = Path(config.output_dir)
    _check_folder(output, config, resume)
    if config.data.eval is None and config.training.get("eval_strategy", "no") != "no":
        raise ConfigError(f"{config.path}: training.eval_strategy: there are no rows to evaluate on; name data.eval, or leave it out")
    run = _begin(config)
    for name, spec in config.teachers.items():
        if config.student.model == spec.model and config.student.layers == spec.layers:
            logger.warning("student and teacher %s are the same model (%s): there is nothing to learn", name, spec.model)
    with _blamed(config, "student"):
        student = _load(config.student, "float32")
    if run.plan.needs_scores:
        with run.args.main_process_first(desc="scoring the samples"):
            run.train = difficulty.attach(run.train, _score(run, student))
    with _room(config):
        trainer = _trainer(run, student)
        start = checkpoints.newest_complete(output) if resume else None
        if resume and start is None:
            logger.warning("no complete checkpoint in %s: starting from the beginning", output)
        if start is None and run.held_out is not None:
            _say("before", trainer)
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        evaluated = [trainer.is_world_process_zero() and _is_evaluated(output, trainer.state.global_step)]
        if run.held_out is not None and not broadcast_object_list(evaluated)[0]:  # all processes, or none
            _say("after", trainer)
        trainer.save_model()
        if trainer.is_world_process_zero():
            write_report(output, output.name, _facts(config, trainer))
    return output


def _is_evaluated(output: Path, step: int) -> bool:
    return any(row["step"] == step and "eval_ce" in row for row in read_metrics(output))


def show_plan(config: RunConfig) -> str:
    """The stages as a table and a drawing. Reads the data and the tokenizer; loads no model."""
    run = _begin(config)
    samples, note = run.unscored, ""
    if run.plan.needs_scores:
        if run.scores_path.exists():
            with _blamed(config, "difficulty"):
                scored = difficulty.attach(run.train, difficulty.read_scores(run.scores_path))
                samples = dataclasses.replace(samples, scores=scored["score"][:])
        else:
            note = f"The samples are not scored yet (`fastkd score {config.path}`): tokens are as if all were of one difficulty."
    with _blamed(config, "plan"):
        schedule = run.schedule(samples)
    with _blamed(config, "training"):
        return preview(schedule, run.args) + (f"\n{note}\n" if note else "")


def score(config: RunConfig) -> Path:
    """Score the samples' difficulty as ``config.difficulty`` says; returns the Parquet file's path."""
    run = _begin(config)
    with _blamed(config, "student"):
        student = None if config.difficulty.scorer is not None or config.difficulty.column else _load(config.student, "float32")
    _score(run, student)
    return run.scores_path


def _score(run: _Run, student: PreTrainedModel | None) -> Any:
    """Columns by sample id, in the file as well; what is there already is not computed again."""
    config, spec = run.config, run.config.difficulty
    signal = f"column:{spec.column}" if spec.column is not None else spec.signal
    if config.data.packing and signal not in ("loss", "length"):
        raise ConfigError(f"{config.path}: difficulty.signal: {signal} is a property of rows, and data.packing joins them; use loss")
    scorer: Any = student
    if spec.scorer is not None:
        with _blamed(config, "difficulty.scorer"):
            check_tokenizers(run.tokenizer, load_tokenizer(spec.scorer.model, **_place(spec.scorer)), "scorer")
            scorer = _load(spec.scorer, None)
    if scorer is not None:
        scorer.to(run.args.device)

    def stage_of(ids: list[str]) -> list[int]:
        # The schedule of these samples with these scores; a plan without buckets has every sample in its first stage.
        position = {sample: i for i, sample in enumerate(run.train["sample_id"])}
        rank = {sample: float(-i) for i, sample in enumerate(ids)}
        samples = dataclasses.replace(run.unscored, scores=[rank[sample] for sample in position])
        stages = run.schedule(samples).stage_of()
        return [-1 if (stage := stages[position[sample]]) is None else stage for sample in ids]

    run.scores_path.parent.mkdir(parents=True, exist_ok=True)
    with _blamed(config, "difficulty"):
        return difficulty.score(
            run.rows,
            run.train,
            signal=signal,
            also=() if config.data.packing else ("length", "steps"),
            model=scorer,
            tokenizer=run.tokenizer,
            path=run.scores_path,
            batch_size=spec.batch_size,
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            seed=config.seed,
            higher_is_easier=spec.higher_is_easier,
            scorer=_described(spec.scorer or config.student),
            stage_of=stage_of,
            progress=not run.args.disable_tqdm,
        )


def fill_stores(config: RunConfig) -> dict[str, int]:
    """Fill the teachers' stores for all rows; returns how many canonical batches each had missing. To be called again after a fault."""
    if config.store is None:
        raise ConfigError(f"{config.path}: store: missing; write store: {{kind: hidden, path: ...}}")
    run = _begin(config)
    stages = tuple(dataclasses.replace(stage, buckets=None) for stage in run.plan.stages)
    run.plan = dataclasses.replace(run.plan, fractions=(1.0,), stages=stages, order="sequential")  # no samples are easier than others
    with _blamed(config, "student"):
        student = _load(config.student, "float32")
    teachers = _trainer(run, student).teachers
    return {f"{name}, {split}": teachers.fill(name, split) for name, split in list(teachers.stores)}


def _trainer(run: _Run, student: PreTrainedModel) -> KDTrainer:
    config = run.config
    sources = {
        name: TeacherSource(
            spec.model, spec.dtype, spec.device, spec.park, {**_place(spec), **({} if spec.layers is None else {"layers": spec.layers})}
        )
        for name, spec in config.teachers.items()
    }
    with _blamed(config, "training"):
        trainer = KDTrainer(student, sources or None, run.args, run.train, run.held_out, processing_class=run.tokenizer, plan=run.plan)
    trainer.add_callback(_PlanFile(config, trainer.schedule))
    return trainer


def _say(when: str, trainer: KDTrainer) -> None:
    found, teacher = trainer.evaluate(), ""
    if not trainer.is_world_process_zero():
        return
    if "eval_kl" in found:
        teacher = f"KL to the teacher {found['eval_kl']:.3f} nats, same first choice {found['eval_agreement']:.1%}, "
    print(f"{when}, on {found['eval_tokens']} held-out tokens: {teacher}cross-entropy {found['eval_ce']:.3f} nats", flush=True)


@contextlib.contextmanager
def _blamed(config: RunConfig, key: str) -> Iterator[None]:
    """An error inside is the fault of this key of the configuration."""
    try:
        yield
    except Exception as error:  # libraries raise all kinds for files and options that do not suit
        text = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        teacher = re.match(r"teacher '([^']+)': ", text)
        if isinstance(error, PlanError):
            key = "plan"
        elif isinstance(error, StoreError):
            place = re.match(r"(store\.\w+): ", text)
            key, text = (place[1], text[place.end() :]) if place else ("store", text)
        elif text.startswith(("max_length", "input_ids")):
            key = "data"
        if teacher:
            key, text = "teacher" if list(config.teachers) == ["teacher"] else f"teachers.{teacher[1]}", text[teacher.end() :]
        raise ConfigError(f"{config.path}: {key}: {text}") from error


@contextlib.contextmanager
def _room(config: RunConfig) -> Iterator[None]:
    """A full disk is one line, whichever library met it."""
    try:
        yield
    except Exception as error:
        reason = checkpoints.what_is_full(error)
        if reason is None:  # or known already, as of a checkpoint
            raise
        rest = "complete checkpoints and stored signals stay usable: make room and say --resume"
        raise ConfigError(f"{config.path}: output_dir: {config.output_dir}: {reason}; {rest}") from error


def _check_folder(output: Path, config: RunConfig, resume: bool) -> None:
    """Nothing that is not this run's is overwritten."""

    def refuse(why: str) -> NoReturn:
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
    if not plan.exists() and any(output.glob("checkpoint-*")):
        refuse(f"holds checkpoints, but no {PLAN} that says with which settings they were made; restore it, or choose another folder")
    if plan.exists():
        try:
            begun = json.loads(plan.read_text())["config"]
        except (ValueError, KeyError, TypeError) as error:
            refuse(f"holds a {PLAN} that is damaged ({error}): the settings cannot be compared; restore it, or choose another folder")
        changed = difference(_bound(flat(begun, lists=True)), _bound(flat(config.to_dict(), lists=True)))
        if changed:
            refuse(f"holds another run: {changed}; to resume, use the same (to train on, begin another run with student: {output})")


# What may change on resuming: it has no effect on the weights.
_FREE = (
    "path", "output_dir", "store.path", "store.max_gb", "difficulty.path", "training.logging_", "training.save_", "training.eval_",
    "training.disable_tqdm", "training.report_to",
)  # fmt: skip


def _bound(flat: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sorted(flat.items()) if not key.startswith(_FREE)}


def _arguments(config: RunConfig) -> KDConfig:
    loss, data, store = config.loss, config.data, config.store
    recipe = {} if config.plan is None else dict(TRAINING.get(config.plan.name, {}))
    if "lr_scheduler_type" in config.training:
        recipe.pop("lr_scheduler_kwargs", None)  # which are another scheduler's
    return KDConfig(
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
        **{**TRAINING_DEFAULTS, **recipe, **config.training},
    )


def _load(spec: ModelSpec, default_dtype: str | None) -> PreTrainedModel:
    return load_model(spec.model, dtype=spec.dtype or default_dtype, layers=spec.layers, **_place(spec))


def _place(spec: ModelSpec) -> dict[str, Any]:
    return {name: value for name in ("gguf_file", "revision") if (value := getattr(spec, name)) is not None}


class _PlanFile(TrainerCallback):
    """Writes ``plan.json`` when training begins."""

    def __init__(self, config: RunConfig, schedule: Schedule):
        self.config, self.schedule = config, schedule

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        plan = {"stages": self.schedule.table(), "plan": self.schedule.plan.to_dict(), "config": self.config.to_dict()}
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_whole(Path(args.output_dir) / PLAN, json.dumps(plan, indent=1) + "\n")


def _described(spec: ModelSpec) -> str:
    return Path(spec.model).name + ("" if spec.layers is None else f", {len(spec.layers)} of its layers")


def _facts(config: RunConfig, trainer: KDTrainer) -> dict[str, Any]:
    loss, student = config.loss, trainer.accelerator.unwrap_model(trainer.model)
    facts = {"student": f"{_described(config.student)} ({student.num_parameters():,} parameters)"}
    for name, spec in config.teachers.items():
        size = sum(p.numel() for p in trainer.teachers.outline(name).parameters())
        facts[name if len(config.teachers) == 1 else f"teacher {name}"] = f"{_described(spec)} ({size:,} parameters)"
    return {
        **facts,
        "divergence": " ".join([loss.divergence, *(f"{k}={v:g}" for k, v in loss.parameters.items())]),
        "training rows": len(trainer.schedule.samples),
        "steps": trainer.schedule.total_steps,
    }
