"""A plan's schedule in the terms of torch and transformers: its batches, its learning rate, its stage changes."""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainingArguments, get_scheduler

from .arguments import KDConfig
from .data import IGNORE, counted_tokens
from .functional import divergence
from .levers import check_reset
from .plan import Plan, PlanError, Samples, Schedule, Stage, knob_ends
from .presets import kd, make_plan

__all__ = [
    "DUMMY",
    "StageCallback",
    "filled_plan",
    "learning_rate_factor",
    "plan_loader",
    "sample_table",
    "schedule_for",
    "teacher_of",
]

DUMMY = -1  # in place of a row's position, and its sample_index


_ORDERS = {"random": "shuffled", "sequential": "sequential", "group_by_length": "by_length"}


def filled_plan(plan: Any, args: KDConfig, teachers: list[str]) -> Plan:
    """The plan, with what it leaves open taken from the arguments."""
    if plan is None and len(teachers) > 1:
        raise ValueError(
            f"teacher_model: {len(teachers)} teachers need a plan that says when each of them teaches, such as 'progressive'; expected one"
        )
    made = make_plan(kd() if plan is None else plan, teachers=len(teachers))
    only = len(made.stages) == 1
    filled = made.filled(
        teachers=teachers,
        epochs=args.num_train_epochs,
        steps=args.max_steps if only and args.max_steps > 0 else None,
        temperature=args.temperature,
        kd_ratio=args.kd_ratio,
        parameters=args.divergence_parameters,
        order=_ORDERS[str(getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy))],
        remainder="drop" if args.dataloader_drop_last else "short",
    )
    if any(stage.reset_optimizer for stage in filled.stages):
        check_reset(str(getattr(args.optim, "value", args.optim)))
    for i, stage in enumerate(filled.stages):
        for name, knob in stage.parameters.items():
            for value in knob_ends(knob):  # a domain is an interval, and a ramp stays between its ends
                try:
                    divergence(args.divergence, **{name: value})
                except ValueError as error:
                    raise PlanError(f"stages[{i}].parameters.{name}: {error}") from None
    return filled


def schedule_for(plan: Plan, samples: Samples, args: KDConfig) -> Schedule:
    """The filled plan for these samples, with the batch, seed and ``max_steps`` of the arguments."""
    return plan.schedule(
        samples,
        batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1),
        seed=args.seed if args.data_seed is None else args.data_seed,
        max_steps=args.max_steps if args.max_steps > 0 else None,
    )


def teacher_of(stage: Stage) -> str | None:
    """The teacher that a stage asks."""
    return stage.teacher if isinstance(stage.teacher, str) and stage.kd_ratio != 0 else None


def sample_table(dataset: Dataset, scored: bool = False) -> Samples:
    """The table of the samples of a tokenised data set; with ``scored``, scores from its column ``score``, where it has one."""
    digest, lengths, counted = hashlib.sha256(), [], []
    for batch in dataset.select_columns(["input_ids", "labels"]).with_format("arrow").iter(10_000):
        columns = [batch[name].combine_chunks() for name in ("input_ids", "labels")]
        sizes = columns[0].value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        ids, labels = (column.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for column in columns)
        for values in (sizes, ids, labels):
            digest.update(values.tobytes())
        lengths += sizes.tolist()
        counted += counted_tokens(columns[1]).tolist()
    ids = dataset["sample_id"] if "sample_id" in dataset.column_names else [f"row {i}" for i in dataset["sample_index"]]
    scores = [float(score) for score in dataset["score"]] if scored and "score" in dataset.column_names else None
    return Samples([str(i) for i in ids], lengths, counted, scores, digest.hexdigest())


def plan_loader(schedule: Schedule, dataset: Dataset, collator: Callable, args: TrainingArguments) -> DataLoader:
    """This process's micro-batches of the whole run, ``args.gradient_accumulation_steps`` for each step.

    Not to go through `Accelerator.prepare`, which would share the batches out a second time.
    """
    workers = args.dataloader_num_workers
    batches = _Batches(
        schedule, args.per_device_train_batch_size, args.gradient_accumulation_steps, args.process_index, max(args.world_size, 1)
    )
    return DataLoader(
        _WithDummy(dataset),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers if workers else False,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        generator=torch.Generator(),  # else each pass draws a number from the random state of the training
    )


class _Batches(Sampler[list[int]]):
    def __init__(self, schedule: Schedule, size: int, accumulation: int, process: int, processes: int):
        self.schedule, self.size, self.accumulation, self.process, self.processes = schedule, size, accumulation, process, processes

    def __len__(self) -> int:
        return self.schedule.total_steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.schedule.total_steps):
            for micro in range(self.accumulation):
                found = self.schedule.micro_batch(step, micro, process=self.process, processes=self.processes, size=self.size)
                # The Trainer draws all micro-batches of a step, and DDP waits for all processes.
                yield found or [DUMMY]


class _WithDummy:
    """The rows, and at position -1 one in which no token counts."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position != DUMMY:
            return self.dataset[position]
        row = dict(self.dataset[0])
        return {**row, "labels": [IGNORE] * len(row["labels"]), "sample_index": DUMMY}


def learning_rate_factor(args: TrainingArguments, schedule: Schedule) -> Callable[[int], float]:
    """What the learning rate is multiplied by at a step: ``args.lr_scheduler_type``, begun anew in each segment of the schedule.

    Raises:
        ValueError: for a scheduler that follows a metric instead of the step, or keywords that it does not have.
    """
    shapes = {}
    for start, steps in schedule.segments:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
        try:
            scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer=optimizer,
                num_warmup_steps=args.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},  # type: ignore[arg-type]
            )
        except TypeError as error:
            raise ValueError(f"lr_scheduler_kwargs: {error}") from error
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise ValueError(f"lr_scheduler_type: {args.lr_scheduler_type!s} does not follow from the step, so that no plan can restart it")
        shapes[start] = scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        start, _ = schedule.segment(step)
        return shapes[start](step - start)

    return factor


class StageCallback(TrainerCallback):
    """Tells the trainer where stages and epochs begin and end.

    Args:
        schedule: of the run.
        enter: called with a stage's number before its first step in this process.
    """

    def __init__(self, schedule: Schedule, enter: Callable[[int], None]):
        self.schedule, self.enter = schedule, enter
        self.stage: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stage = None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        point = self.schedule.at(state.global_step)
        if point.reset_optimizer:
            optimizer.state.clear()
        if point.stage != self.stage:
            self.stage = point.stage
            self.enter(point.stage)

    def on_step_end(self, args, state, control, **kwargs):
        done = self.schedule.at(state.global_step - 1)
        state.epoch = self.schedule.epochs(state.global_step)
        # A row of metrics never speaks of two stages.
        if done.ends and args.logging_strategy != "no":
            control.should_log = True
        # The whole run is one epoch to the Trainer, which at its end does all this itself.
        if done.epoch_ends and state.global_step < self.schedule.total_steps:
            control.should_log |= args.logging_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch"
            control.should_save |= args.save_strategy == "epoch"
        return control
