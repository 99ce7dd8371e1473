"""A run from its configuration: data, difficulty, models, training, evaluation before and after, and the folder that it leaves."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainerCallback

from . import checkpoints, difficulty
from .adapters import is_adapted, lora_config
from .begin import Run, begin, blamed, described, load_spec, same_model, teacher_sources
from .config import ConfigError, ModelSpec, RunConfig
from .files import flat, write_whole
from .fitting import describe
from .hf import is_sharded
from .model_card import CardFacts, public_name, versions
from .plan import Schedule, difference
from .preflight import check_before_loading
from .preview import preview
from .progress import watch
from .report import METRICS, PLAN, read_metrics, recorded_warnings, write_report
from .trainer import KDTrainer

__all__ = ["distill", "fill_stores", "score", "show_plan"]

logger = logging.getLogger(__name__)


def distill(config: RunConfig, *, resume: bool = False) -> Path:
    """Train ``config.student`` and save it, with its metrics and report, to ``config.output_dir``, which is returned.

    Where the plan asks which samples are easier, and no file says so yet, they are scored first.

    Raises:
        ConfigError: the folder already holds a run and ``resume`` is False; nothing in it is touched.
        ValueError, TypeError, OSError: from data and models, before training. NonFiniteLossError: in training.
    """
    with recorded_warnings() as warned:
        return _distill(config, resume, warned)


def _distill(config: RunConfig, resume: bool, warned: list[str]) -> Path:
    output = Path(config.output_dir)
    check_folder(output, config, resume)
    run = begin(config)
    for name, spec in config.teachers.items():
        if same_model(config.student, spec):
            logger.warning("student and teacher %s are the same model (%s): there is nothing to learn", name, spec.model)
    check_before_loading(run, scores=run.plan.needs_scores)
    with blamed(config, "student"):
        student = load_spec(config.student, "float32", run.args.device)
    if run.plan.needs_scores:
        with run.args.main_process_first(desc="scoring the samples"):
            run.train = difficulty.attach(run.train, _score(run, student))
    with _room(config), _watched(config, _trainer(run, student), warned) as trainer:
        start = checkpoints.newest_complete(output) if resume else None
        if resume and start is None:
            logger.warning("no complete checkpoint in %s: starting from the beginning", output)
        if start is None and run.held_out is not None:
            _say("before", trainer)
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        if run.held_out is not None:
            found = [_evaluation_at(output, trainer.state.global_step) if trainer.is_world_process_zero() else None]
            _say("after", trainer, broadcast_object_list(found)[0])  # all processes evaluate, or none
        _save(trainer)  # pushed below, with the report
        if trainer.is_world_process_zero():
            trainer.create_model_card()
    if run.args.push_to_hub and trainer.is_world_process_zero():
        with blamed(config, "training.push_to_hub"):
            trainer.push_folder("End of training")
    return output


@contextlib.contextmanager
def _watched(config: RunConfig, trainer: KDTrainer, warned: list[str]) -> Iterator[KDTrainer]:
    """Show the training as it goes, and leave a report however it ends."""
    progress, report = watch(trainer), _Report(config, trainer, warned)
    trainer.add_callback(report)
    try:
        yield trainer
    except BaseException as error:
        progress.close()
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        if isinstance(error, KeyboardInterrupt):
            reason = "interrupted"
        with contextlib.suppress(OSError):  # the error itself may be that nothing can be written
            report.write(f"Stopped after step {trainer.state.global_step:,} of {trainer.schedule.total_steps:,}: {reason[:500]}")
        raise
    report.write("Finished.")


def _save(trainer: KDTrainer) -> None:
    student = trainer.accelerator.unwrap_model(trainer.model)
    if is_adapted(student) and not is_sharded(student):
        trainer.save_merged(str(trainer.args.output_dir))
        return
    if is_adapted(student):
        logger.warning("the student is sharded: its adapter is saved as it is, not merged; peft's merge_and_unload does it")
    trainer.save_model(_internal_call=True)


def _evaluation_at(output: Path, step: int) -> dict[str, Any] | None:
    row = next((row for row in read_metrics(output) if row["step"] == step and "eval_ce" in row), None)
    return row and {name: math.nan if value is None else value for name, value in row.items()}


def show_plan(config: RunConfig, card_gb: float | None = None) -> str:
    """The stages as a table and a drawing, and the memory that they take. Reads the data and the tokenizer; loads no model.

    Args:
        card_gb: memory of the GPU to plan for, in units of 2 ** 30 bytes; None: that of the GPU at hand, if any.
    """
    run = begin(config, elsewhere=card_gb is not None and not torch.cuda.is_available())
    check_before_loading(run, scores=run.plan.needs_scores, here=False)
    samples, note = run.unscored, ""
    if run.plan.needs_scores:
        if run.scores_path.exists():
            with blamed(config, "difficulty.path"):
                scored = difficulty.attach(run.train, difficulty.read_scores(run.scores_path))
                samples = dataclasses.replace(samples, scores=scored["score"][:])
        else:
            note = f"The samples are not scored yet (`fastkd score {config.path}`): tokens are as if all were of one difficulty."
    with blamed(config, "plan"):
        schedule = run.schedule(samples)
    with blamed(config, "training"):
        shown = preview(schedule, run.args) + (f"\n{note}\n" if note else "")
    return f"{shown}\n{describe(run, card_gb, schedule=schedule)}"


def score(config: RunConfig) -> Path:
    """Score the samples' difficulty as ``config.difficulty`` says; returns the Parquet file's path."""
    run = begin(config)
    check_before_loading(run, scores=True, trains=False)
    with blamed(config, "student"):
        student = (
            None
            if config.difficulty.scorer is not None or config.difficulty.column
            else load_spec(config.student, "float32", run.args.device)
        )
    _score(run, student)
    return run.scores_path


def _score(run: Run, student: PreTrainedModel | None) -> Any:
    """Columns by sample id, in the file as well; what is there already is not computed again."""
    config, spec = run.config, run.config.difficulty
    signal = f"column:{spec.column}" if spec.column is not None else spec.signal
    scorer: Any = student
    if spec.scorer is not None:
        with blamed(config, "difficulty.scorer"):
            scorer = load_spec(spec.scorer, None, run.args.device)
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
    with blamed(config, "difficulty"):
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
            scorer=described(spec.scorer or config.student),
            stage_of=stage_of,
            progress=not run.args.disable_tqdm,
        )


def fill_stores(config: RunConfig) -> dict[str, int]:
    """Fill the teachers' stores for all rows; returns how many canonical batches each had missing. To be called again after a fault."""
    if config.store is None:
        raise ConfigError(f"{config.path}: store: missing; write store: {{kind: hidden, path: ...}}")
    run = begin(config)
    check_before_loading(run, scores=False)
    stages = tuple(dataclasses.replace(stage, buckets=None) for stage in run.plan.stages)
    run.plan = dataclasses.replace(run.plan, fractions=(1.0,), stages=stages, order="sequential")  # no samples are easier than others
    with blamed(config, "student"):
        student = load_spec(config.student, "float32", run.args.device)
    teachers = _trainer(run, student).teachers
    return {f"{name}, {split}": teachers.fill(name, split) for name, split in list(teachers.stores)}


def _trainer(run: Run, student: PreTrainedModel) -> KDTrainer:
    config = run.config
    sources = teacher_sources(config)
    lora = None if config.student.lora is None else lora_config(config.student.lora)
    with blamed(config, "training"):
        trainer = KDTrainer(
            student, sources or None, run.args, run.train, run.held_out, processing_class=run.tokenizer, plan=run.plan, peft_config=lora
        )
    trainer.card_facts = _card_facts(config)
    trainer.add_callback(_PlanFile(config, trainer.schedule))
    return trainer


def _say(when: str, trainer: KDTrainer, found: dict[str, Any] | None = None) -> None:
    """Print an evaluation, which is made now if it is not given."""
    found, teacher = found or trainer.evaluate(), ""
    if not trainer.is_world_process_zero():
        return
    if "eval_kl" in found:
        teacher = f"KL to the teacher {found['eval_kl']:.3f} nats, same first choice {found['eval_agreement']:.1%}, "
    print(f"{when}, on {found['eval_tokens']} held-out tokens: {teacher}cross-entropy {found['eval_ce']:.3f} nats", flush=True)


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


def check_folder(output: Path, config: RunConfig, resume: bool) -> None:
    """Nothing that is not this run's is overwritten."""

    def refuse(why: str) -> NoReturn:
        raise ConfigError(f"{config.path}: output_dir: {output} {why}")

    for name, spec in (("student", config.student), *config.teachers.items()):
        if Path(spec.model).resolve() == output.resolve():
            refuse(f"is where {name!r} is read from; choose another folder")
    if output.exists() and not output.is_dir():
        refuse("is a file; choose another name")
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
        before, now = (_bound(flat(settings, lists=True)) for settings in (begun, config.to_dict()))
        off = {key: False for key, value in now.items() if value is False}  # as what an earlier version did not know was
        changed = difference(off | before, now)
        if changed:
            refuse(f"holds another run: {changed}; to resume, use the same (to train on, begin another run with student: {output})")


# What may change on resuming: it has no effect on the weights. How a batch is split may, as the trainer looks at the whole.
_FREE = (
    "path", "output_dir", "store.path", "store.max_gb", "difficulty.path", "training.logging_", "training.save_", "training.eval_",
    "training.disable_tqdm", "training.report_to", "training.per_device_", "training.gradient_accumulation_steps",
    "training.gradient_checkpointing", "training.activation_offloading", "training.hub_", "training.push_to_hub",
)  # fmt: skip


def _bound(flat: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sorted(flat.items()) if not key.startswith(_FREE)}


class _PlanFile(TrainerCallback):
    """Writes ``plan.json`` when training begins."""

    def __init__(self, config: RunConfig, schedule: Schedule):
        self.config, self.schedule = config, schedule

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        config = self.config.to_dict()
        config["training"] = {name: value for name, value in config["training"].items() if name != "hub_token"}
        plan = {"stages": self.schedule.table(), "plan": self.schedule.plan.to_dict(), "config": config}
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_whole(Path(args.output_dir) / PLAN, json.dumps(plan, indent=1) + "\n")


class _Report(TrainerCallback):
    """Writes ``report.html`` when a checkpoint is saved, if the last time is a minute ago, and when it is told to."""

    def __init__(self, config: RunConfig, trainer: KDTrainer, warned: list[str]):
        self.config, self.trainer, self.warned = config, trainer, warned
        self._next = time.monotonic() + 60

    def on_save(self, args, state, control, **kwargs):
        if time.monotonic() >= self._next:
            self.write(f"Under way: step {state.global_step:,} of {self.trainer.schedule.total_steps:,}.")

    def write(self, status: str) -> None:
        folder = Path(self.config.output_dir)
        if self.trainer.is_world_process_zero() and (folder / METRICS).exists():
            write_report(folder, folder.absolute().name, _facts(self.config, self.trainer), status=status, warned=self.warned)
        self._next = time.monotonic() + 60


def _facts(config: RunConfig, trainer: KDTrainer) -> dict[str, Any]:
    """What the report says of a run. Paths are shortened to names: the page may be passed on."""
    loss, args, schedule = config.loss, trainer.args, trainer.schedule
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    trained = student.num_parameters(only_trainable=True)
    part = "" if trained == student.num_parameters() else f", {trained:,} of them trained"
    facts = {"student": f"{_titled(config.student)} ({student.num_parameters():,} parameters{part})"}
    for name, spec in config.teachers.items():
        size = sum(p.numel() for p in trainer.teachers.outline(name).parameters())
        facts["teacher" if len(config.teachers) == 1 else f"teacher {name}"] = f"{_titled(spec)} ({size:,} parameters)"
    parameters = "".join(f" {name}={value:g}" for name, value in loss.parameters.items())
    held_out = "" if config.data.eval is None else f"; held out: {public_name(_data_path(config.data.eval))}"
    batch = f"{schedule.batch_size} rows"
    if args.world_size > 1 or args.gradient_accumulation_steps > 1:
        parts = [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size]
        batch += f" ({parts[0]} a device, {parts[1]} micro-batches, {parts[2]} process{'es' * (parts[2] > 1)})"
    optimizer, scheduler = (getattr(value, "value", value) for value in (args.optim, args.lr_scheduler_type))
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else str(next(student.parameters()).dtype).removeprefix("torch.")
    return {
        **facts,
        "data": f"{public_name(_data_path(config.data.train))}, {len(schedule.samples):,} rows{held_out}",
        "plan": trainer.plan.name or "own stages",
        "divergence": f"{loss.divergence}{parameters}",
        "steps": schedule.total_steps,
        "batch": batch,
        "optimizer": f"{optimizer}, learning rate {args.learning_rate:g}, {scheduler}; {precision}; seed {schedule.seed}",
        "hardware": _hardware(args.world_size),
        "versions": ", ".join(f"{name} {version}" for name, version in versions(config.student.lora is not None).items()),
        "command": " ".join([Path(sys.argv[0]).name, *map(_shortened, sys.argv[1:])]),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def _card_facts(config: RunConfig) -> CardFacts:
    return CardFacts(
        student=config.student.model,
        student_note="" if config.student.layers is None else f"{len(config.student.layers)} of its layers",
        teachers={name: spec.model for name, spec in config.teachers.items()},
        train=_data_path(config.data.train),
        eval=None if config.data.eval is None else _data_path(config.data.eval),
    )


def _titled(spec: ModelSpec) -> str:
    return public_name(spec.model) + ("" if spec.layers is None else f", {len(spec.layers)} of its layers")


def _data_path(data: str | dict[str, str]) -> str:
    return data if isinstance(data, str) else data["path"]


def _shortened(word: str) -> str:
    """A word of the command line without a token, of absolute paths in it the last part."""
    word = re.sub(r"(hub_token\s*[=:]\s*)[^\s,}]+", r"\1...", word)
    return re.sub(r"(?<![\w.~/])[~/][^\s,:=}\]]*/(?=[^/\s,:=}\]])", "", word)


def _hardware(processes: int) -> str:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return name if processes == 1 else f"{processes} x {name}"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
