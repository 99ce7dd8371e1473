"""`KDTrainer`: a transformers `Trainer` whose loss is `fused_linear_kd` against a teacher, and its `KDConfig`."""

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from . import checkpoints, chunking
from .adapters import adapter_facts, is_adapted, merged
from .arguments import KDConfig
from .data import IGNORE, KDCollator
from .evaluation import token_metrics
from .functional import LossParts, divergence, fused_linear_kd
from .hf import Head, head_of, is_partitioned, is_sharded, redirected, run_at_head
from .levers import Offloaded, apply_liger, staying
from .model_card import CardFacts, HubTrainer
from .models import load_tokenizer
from .pacing import DUMMY, StageCallback, filled_plan, learning_rate_factor, plan_loader, sample_table, schedule_for, teacher_of
from .packing import Layout, joined, keeps_documents_apart, suited_to
from .plan import Point, Samples, difference, knob_ends
from .preparation import (
    check_apart,
    check_best_metric,
    check_fits,
    check_head,
    check_loss_buffer,
    check_signal,
    load_student,
    logits_dtype,
    pad_id,
    place,
    tokenized,
)
from .report import MetricsFile
from .signals import Signal, TeacherHidden, TeacherTopK
from .store import StoreSpec
from .teachers import Teachers, TeacherSource, teacher_sources
from .window import Sums, Watch, not_timed, peak_gb

__all__ = ["KDConfig", "KDTrainer", "NonFiniteLossError"]

_STATE = "kd_state.json"
_INCOMPLETE = ".incomplete"
# Entries of a student's config that the weights do not depend on; some change when a model is used.
_FREE_CONFIG = ("transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id")
# Arguments on which the weights depend.
_OBJECTIVE = (
    "divergence", "temperature_squared", "logits_dtype", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "bf16", "fp16",
    "neftune_noise_alpha", "use_liger_kernel", "liger_kernel_config",
)  # fmt: skip

logger = logging.getLogger(__name__)

# Of several processes on the CPU the first has the device "cpu:0". Older transformers load a resumed optimizer to it, which torch cannot.
torch.serialization.register_package(99, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None)


class NonFiniteLossError(RuntimeError):
    """The loss of a batch was not finite; the message names the samples."""


class KDTrainer(HubTrainer):
    """Distils teachers into a student, by a plan.

    Each model's body runs without its head; the heads meet in `fused_linear_kd`, inside the call of the student's head, so that DDP,
    FSDP2 and DeepSpeed see one forward, and those that shard gather its weight once in it. The loss is a mean over the counted tokens of
    the global batch, however it is split into devices and accumulation steps. A teacher runs in eval mode, without gradients, in its own
    dtype; only those that the plan's current stage needs are in memory. Which samples a step has, which teacher and which knobs, the plan
    alone says: the order of the samples does not depend on the number of processes, and a run that is resumed goes on as if it had not
    been interrupted.

    Args:
        model: the student: a name, a path, or a `PreTrainedModel`.
        teacher_model: the same, or an ordered mapping of names to these or to `fastkd.teachers.TeacherSource`, weak to strong; None where
            the plan has no teacher.
        args: a `KDConfig`.
        train_dataset, eval_dataset: rows as `fastkd.data.tokenize` takes them, tokenised or not. eval_dataset may be a mapping of several.
            A plan with buckets of difficulty needs a column ``score`` in train_dataset, higher is easier (`fastkd.difficulty`).
        processing_class: the student's tokenizer; default: that of ``model``, when given by name.
        data_collator: default `fastkd.data.KDCollator`. One that gives ``labels`` only (not shifted) will do.
        compute_metrics: receives the student's most probable tokens and the aligned labels, both ``[rows, length]``, -100 where no token
            counts: full logits are never held.
        peft_config: wraps the student with PEFT.
        plan: a `fastkd.plan.Plan`, a preset's name, or a mapping as `fastkd.presets.make_plan` takes it. What it leaves open, the arguments
            say; ``max_steps`` cuts it short. Default: one stage, ``num_train_epochs`` or ``max_steps`` long.

    Evaluation adds, per counted token at temperature 1: ``kl`` (forward KL to the teacher), ``ce``, ``perplexity``, ``agreement`` (share of
    tokens where both models' most probable token is the same); ``loss`` is the training objective, without a router's auxiliary
    loss. Teacher and objective are those with which the plan ends, whatever the stage, so that figures can be compared over the run.
    Every logging step and evaluation is also a row of ``output_dir/metrics.jsonl``; there ``tokens`` are those counted since the run began,
    and of what went through the student since the row before, on all processes: ``useful_tokens`` the share that is no padding (a row
    that only fills a step up is padding too), ``tokens_per_second`` such tokens per second, evaluating, saving and loading teachers not
    included.
    ``memory_gb`` is the peak since the row before of the accelerator's memory that torch had allocated, the most of any process; on the CPU
    the peak of what the process had resident so far (1 GB is 2 ** 30 bytes, as in `fastkd.memory`).

    With ``padding_free`` each micro-batch goes through the models as one row ``[1, T]`` that holds its rows one after the other, T from
    step to step another, and positions tell them apart: flash and flex attention compute no padding and no attention between rows,
    others mask it. Where a model ignores positions, as is found out before training, batches stay padded, with a warning. Data sets that
    were not given here are evaluated padded. A store is the same either way: its canonical batches are padded.

    Raises:
        NonFiniteLossError: in `train`, with the ids of the samples.
        ValueError, TypeError: for arguments that do not fit together, before any training. ValueError in `evaluate` and `predict` before
            `train` under FSDP and DeepSpeed ZeRO-3.
    """

    args: KDConfig
    loss_is_scaled_for_ga = True  # by the number of counted tokens in the global batch

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        teacher_model: str | os.PathLike | PreTrainedModel | TeacherSource | Mapping[str, Any] | None = None,
        args: KDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        optimizers: tuple = (None, None),
        callbacks: list | None = None,
        peft_config: Any = None,
        plan: Any = None,
    ):
        if args is None:
            args = KDConfig()
        if not isinstance(args, KDConfig):
            raise TypeError(f"args: expected a KDConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"torch.nn.DataParallel over {args.n_gpu} GPUs is not supported: start one process per GPU with `accelerate launch` or"
                " `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices: must be True: the loss is a mean over the tokens of all processes")
        if processing_class is None and isinstance(model, str | os.PathLike):
            processing_class = load_tokenizer(model, **place(args.model_init_kwargs))
        sources = teacher_sources(teacher_model, args.teacher_model_init_kwargs)
        student = load_student(model, args, peft_config)
        for source in sources.values():
            if isinstance(source.model, nn.Module):
                check_apart(student, source.model)
        self.plan = filled_plan(plan, args, list(sources))
        sharded = bool(args.deepspeed or args.fsdp) or any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")))
        liger = args.liger_kernel_config if args.use_liger_kernel else None
        self.teachers = Teachers(sources, device=args.device, tokenizer=processing_class, liger=liger)
        first = teacher_of(self.plan.stages[0])
        resumable = any(Path(str(args.output_dir)).glob("checkpoint-*"))  # in a later stage, perhaps
        if first is not None and args.store is None and not resumable:
            self.teachers.model(first)  # what does not load is refused now, not when training begins
        check_best_metric(args, eval_dataset, compute_metrics, teacher=bool(sources))
        if optimizers[1] is not None and any(stage.restart_lr for stage in self.plan.stages[1:]):
            raise ValueError(
                "optimizers: the plan restarts the learning rate, which a scheduler of your own does not follow; expected None"
            )
        if train_dataset is not None:
            train_dataset = tokenized(train_dataset, processing_class, args, "train", scored=self.plan.needs_scores)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: tokenized(d, processing_class, args, name) for name, d in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = tokenized(eval_dataset, processing_class, args, "eval")
        super().__init__(
            model=student,
            args=args,
            data_collator=functools.partial(_with_shift_labels, data_collator or KDCollator(pad_id(processing_class))),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.card_facts = CardFacts(
            student=os.fspath(model) if isinstance(model, str | os.PathLike) else None,
            teachers={name: os.fspath(s.model) for name, s in sources.items() if isinstance(s.model, str | os.PathLike)},
        )
        self.model_accepts_loss_kwargs = True  # so that the global number of counted tokens reaches compute_loss
        if self.is_deepspeed_enabled and any(stage.reset_optimizer for stage in self.plan.stages):
            raise ValueError("plan: reset_optimizer is not supported under DeepSpeed, which keeps the optimizer's state to itself")
        for data in self._datasets().values():
            check_fits(data, "the student", student)
        if liger is not None:  # not by the Trainer when training begins: unchecked, and too late for an evaluation before
            apply_liger(student, liger, "the student")
        if not sharded:
            check_head("model", student)
        if train_dataset is None:  # evaluation alone
            self.schedule = filled_plan(None, args, list(sources)[-1:]).schedule(Samples(["none"], [1]), batch_size=1, seed=0)
        else:
            self.schedule = schedule_for(self.plan, sample_table(train_dataset, scored=self.plan.needs_scores), args)
            if args.max_steps > 0 and args.max_steps != self.schedule.planned_steps:
                logger.warning(
                    "max_steps=%d, but the plan has %d steps: it ends at the lesser", args.max_steps, self.schedule.planned_steps
                )
            if len(self.schedule.segments) > 1:
                learning_rate_factor(args, self.schedule)  # refused now, if it cannot be restarted
        for name in sources:
            for data in self._datasets().values():
                check_fits(data, f"the teacher {name!r}", self.teachers.outline(name))
        check_loss_buffer(args, student, [self.teachers.outline(name) for name in sources])
        if args.activation_offloading and args.device.type == "cpu":
            logger.warning("activation_offloading: has no effect, the student's activations are in CPU memory already")
        used = [teacher for stage in self.plan.stages if (teacher := teacher_of(stage)) is not None]
        for name in sources:
            if name not in used:
                logger.warning("the plan does not use the teacher %r", name)
        self.eval_teacher = next(reversed(used or list(sources)), None)
        self._objective = self.schedule.ending
        self._suit_packed_rows()
        self._joins = args.padding_free and self._can_join()
        if args.store is not None:
            self._open_stores(StoreSpec(**args.store))
        self._metrics = MetricsFile(self._folder)
        self._sums, self._watch = Sums(), Watch()
        self.add_callback(StageCallback(self.schedule, self._enter))
        self._enter(0)

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None  # TrainingArguments fills it in
        return Path(self.args.output_dir)

    # The loss.

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The loss of one micro-batch, scaled so that sums over micro-batches and means over processes give the global mean."""
        batch = dict(inputs)
        labels, index = batch.pop("shift_labels"), batch.pop("sample_index", None)
        batch.pop("labels", None)
        layout = Layout(labels.shape, batch.pop("kept", None))
        computed = labels.numel() if layout.kept is None else layout.kept.numel()
        useful = batch.pop("useful", computed)  # a plain number: nothing is read from the device
        if model.training:
            self._watch.start()
            self._watch.tokens += useful
            self._sums.useful += useful
            self._sums.computed += computed
        point = self.schedule.at(self.state.global_step)
        signal = None
        if point.kd_ratio > 0:
            assert point.teacher is not None  # `Plan.filled` has seen to it
            if self.args.store is None:
                with self._watch.paused():  # loaded now, when a stage begins and after an evaluation
                    self.teachers.model(point.teacher)
            signal = self.teachers.signal(point.teacher, batch, labels, index, split="train", kept=layout.kept)
        labels = layout.join(labels)

        # Figures are kept beside what the student's call returns, which wrappers may round.
        kept: list[tuple[Tensor, LossParts]] = []
        extra: list[Tensor] = []

        def at_head(hidden, head):
            with staying() if self.args.activation_offloading else contextlib.nullcontext():
                loss, parts = self._fused(point, hidden, head, signal, labels, num_items_in_batch)
            kept.append((loss.detach(), parts))
            return loss

        def forward(student, batch):
            loss, aux_loss = run_at_head(student, at_head, **batch)
            if aux_loss is not None:
                # Weighted by the micro-batch's share of the tokens. How evenly a router balances depends on the micro-batch, so that
                # this term, unlike the loss itself, is not the same however a batch is split.
                exact, parts = kept[0]
                total = parts.tokens if num_items_in_batch is None else num_items_in_batch
                aux_loss = aux_loss.to(exact.dtype) * (parts.tokens / max(total, 1))
                extra.append(aux_loss.detach())
                loss = loss + aux_loss
            return loss

        loss = self._in_student(model, forward, batch)
        ((exact, parts),) = kept
        total = parts.tokens if num_items_in_batch is None else num_items_in_batch
        if model.training:
            self._account(sum(extra, exact) * total, parts, point, index, layout)
        if self.args.world_size > 1 and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes, the normaliser already counts them all
        return (loss, {"loss": loss}) if return_outputs else loss

    def _fused(
        self, point: Point, hidden: Tensor, head: Head, signal: Signal | None, labels: Tensor, normalizer
    ) -> tuple[Tensor, LossParts]:
        args, chunk_tokens = self.args, self.args.chunk_tokens
        if args.max_loss_buffer_mb is not None:
            shared = min(len(head.weight), len(signal.weight)) if isinstance(signal, TeacherHidden) else 0
            most = args.max_loss_buffer_mb * 2**20
            chunk_tokens = chunking.chunk_tokens_within(most, len(head.weight), shared, logits_dtype(args, hidden.dtype))
        return fused_linear_kd(
            hidden,
            head.weight,
            signal,
            labels,
            divergence=divergence(args.divergence, **point.parameters),
            temperature=point.temperature,
            temperature_squared=args.temperature_squared,
            kd_ratio=point.kd_ratio,
            normalizer=normalizer,
            student_bias=head.bias,
            student_softcap=head.softcap,
            student_scale=head.scale,
            chunk_tokens=chunk_tokens,
            logits_dtype=None if args.logits_dtype is None else getattr(torch, args.logits_dtype),
            return_parts=True,
        )

    def _in_student(self, model: nn.Module, forward: Callable, batch: Mapping[str, Tensor]) -> Any:
        """Call the wrapped student with ``forward(student, batch)`` in place of its own forward."""
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        offloaded = Offloaded(student) if self.args.activation_offloading and torch.is_grad_enabled() else contextlib.nullcontext()
        with redirected(student, lambda **inputs: forward(student, inputs)), self.accelerator.autocast(), offloaded:
            return model(**batch)

    def _account(self, loss_sum: Tensor, parts: LossParts, point: Point, index: Tensor | None, layout: Layout) -> None:
        kd, ce = parts.kd_per_token.double().sum(), parts.ce_per_token.double().sum()
        loss, kd, ce, tokens = torch.stack([loss_sum.double(), kd, ce, parts.tokens.double()]).tolist()
        if not math.isfinite(loss):
            self._stop(parts, point, index, layout)
        self._sums.loss += loss
        self._sums.kd += kd
        self._sums.ce += ce
        self._sums.tokens += int(tokens)

    def _stop(self, parts: LossParts, point: Point, index: Tensor | None, layout: Layout) -> None:
        shares = ((point.kd_ratio, parts.kd_per_token), (1 - point.kd_ratio, parts.ce_per_token))
        broken = layout.spread(torch.stack([~values.isfinite() for share, values in shares if share > 0]).any(0)).any(-1)
        if not broken.any():  # the auxiliary loss, or a sum that overflowed
            broken = torch.ones_like(broken)
        if index is None:
            names = [f"row {i} of the batch" for i in broken.nonzero().flatten().tolist()]
        else:
            names = self._sample_names(index[broken].tolist())
        raise NonFiniteLossError(f"the loss is not finite at step {self.state.global_step + 1}; samples: {', '.join(names)}")

    def _sample_names(self, wanted: list[int]) -> list[str]:
        data = self.train_dataset
        if not isinstance(data, Dataset) or not {"sample_index", "sample_id"} <= set(data.column_names):
            return [f"index {i}" for i in wanted]
        ids = dict(zip(data["sample_index"], data["sample_id"], strict=True))
        return [str(ids.get(i, f"index {i}")) for i in wanted]

    # Evaluation. The Trainer's own averages batch means; here sums over tokens are gathered row by row.

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`; takes rows that are not tokenised too, and never drops the last ones."""
        ours = True
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval")
            ours = self._is_ours(eval_dataset)
        collate = functools.partial(_laid_out, self.data_collator, self._joins and ours)
        with _replaced(self.args, dataloader_drop_last=False), _replaced(self, data_collator=collate):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`; takes rows that are not tokenised too, and never drops the last ones."""
        with _replaced(self.args, dataloader_drop_last=False):
            return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def _prepared(self, dataset: Any, name: str) -> Dataset:
        if self._is_ours(dataset):
            return dataset
        tokenizer: Any = self.processing_class
        dataset = tokenized(dataset, tokenizer, self.args, name)
        check_fits(dataset, "the student", self.model)
        return dataset

    def _is_ours(self, dataset: Any) -> bool:
        return any(dataset is own for own in self._datasets().values())

    @not_timed
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        student: Any = self.model
        if not self.accelerator._models and (self.is_fsdp_enabled or is_partitioned(student)):
            # Nor can it be prepared here: accelerate takes a model for FSDP2 together with its optimizer alone.
            raise ValueError("evaluate, predict: expected train before: under FSDP and DeepSpeed ZeRO-3 it prepares the student")
        self.teachers.stage([] if self.eval_teacher is None else [self.eval_teacher])
        split = next((name for name, data in self._datasets().items() if data is getattr(dataloader, "dataset", None)), "")
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed: training must not depend on when it is evaluated
            found = self._evaluation_loop(dataloader, split, metric_key_prefix)
        self._enter(self.schedule.at(self.state.global_step).stage)
        return found

    def _evaluation_loop(self, dataloader, split: str, metric_key_prefix: str) -> EvalLoopOutput:
        model: Any = self.model_wrapped if self.is_in_train else self.model
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        rows: list[Tensor] = []
        predictions: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in dataloader:
            sums, top1, labels = self._evaluate_batch(model, self._prepare_inputs(batch), split)
            rows.append(self.accelerator.gather_for_metrics(sums))
            if self.compute_metrics is not None:
                pair = self.accelerator.pad_across_processes((top1, labels), dim=1, pad_index=-100)
                top1, labels = self.accelerator.gather_for_metrics(pair)
                predictions.append((top1.cpu().numpy(), labels.cpu().numpy()))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        table = torch.cat(rows)
        loss, kl, ce, agree, tokens = table.sum(0).tolist()
        tokens = int(tokens)
        mean = {"loss": loss, "kl": kl, "ce": ce, "agreement": agree}
        if self.eval_teacher is None:
            mean = {"loss": loss, "ce": ce}
        metrics = {name: value / tokens if tokens else math.nan for name, value in mean.items()}
        metrics["perplexity"] = math.exp(min(metrics["ce"], 700.0)) if tokens else math.nan
        metrics["tokens"] = tokens
        ids: Any = None
        label_ids: Any = None
        if self.compute_metrics is not None:
            ids, label_ids = (_padded(arrays) for arrays in zip(*predictions, strict=True))
            metrics.update(self.compute_metrics(EvalPrediction(predictions=ids, label_ids=label_ids)))
        metrics = {f"{metric_key_prefix}_{name.removeprefix(f'{metric_key_prefix}_')}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=ids, label_ids=label_ids, metrics=metrics, num_samples=len(table))

    @torch.no_grad()
    def _evaluate_batch(self, model, inputs, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, 5]`` sums over each row's counted tokens (loss, kl, ce, agree, tokens), and ``[B, S]`` top-1 tokens and labels."""
        batch = dict(inputs)
        labels = batch.pop("shift_labels")
        batch.pop("labels", None)
        index, point = batch.pop("sample_index", None), self._objective
        layout = Layout(labels.shape, batch.pop("kept", None))
        signal = None
        if self.eval_teacher is not None:
            signal = self.teachers.signal(self.eval_teacher, batch, labels, index, split=split, kept=layout.kept)

        # A store of probabilities has one temperature, and no other stage distils at another.
        temperature = signal.temperature if isinstance(signal, TeacherTopK) else point.temperature

        found: dict[str, Tensor] = {}  # beside what the student's call returns, which wrappers may round

        def at_head(hidden, head):
            found.update(token_metrics(hidden, head, signal, layout.join(labels), self.args.divergence, point.parameters, temperature))
            return found["ce"]

        self._in_student(model, lambda student, batch: run_at_head(student, at_head, **batch)[0], batch)
        found = {name: layout.spread(values, IGNORE if name == "top1" else 0) for name, values in found.items()}
        factor = point.temperature**2 if self.args.temperature_squared else 1.0
        loss = torch.zeros_like(found["ce"])
        for share, term in ((point.kd_ratio * factor, found["kd"]), (1 - point.kd_ratio, found["ce"])):
            loss = loss + share * term if share > 0 else loss  # an infinite term with no share is not 0 * inf
        columns = [loss, found["kl"], found["ce"], found["agree"], labels != -100]
        return torch.stack([c.double().sum(1) for c in columns], 1), found["top1"], labels

    # Logging.

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the loss's terms to a training row, and writes the row to ``metrics.jsonl``."""
        row: dict[str, Any] = {"step": self.state.global_step}
        if "loss" in logs:
            point = self.schedule.at(self.state.global_step - 1)
            terms = {**self._close_window(), "temperature": point.temperature, "kd_ratio": point.kd_ratio, **point.parameters}
            # What `report_to` names takes numbers; the teacher's name follows from the stage.
            logs.update({name: value for name, value in {"stage": point.stage, **terms}.items() if not math.isnan(value)})
            row |= {"stage": point.stage, "teacher": point.teacher, **terms}
        super().log(logs, *args, **kwargs)
        if "train_runtime" in logs:
            # The Trainer's summary of this process's share of the run: of a resumed run, its mean loss is not the run's.
            if self.state.global_step == self._first_step:
                return
            logs = {name: value for name, value in logs.items() if name != "train_loss"}
        if self.is_world_process_zero():
            row |= {("lr" if name == "learning_rate" else name): value for name, value in logs.items()}
            self._metrics.append(row)

    def _close_window(self) -> dict[str, float]:
        """Means over the counted tokens since the last logging step, all processes together; starts a new window."""
        sums, watch = self._sums, self._watch
        window = [sums.loss, sums.kd, sums.ce, sums.tokens, sums.useful, sums.computed, watch.tokens]
        memory = peak_gb(self.args.device)
        if self.args.world_size > 1:
            window = self.accelerator.reduce(torch.tensor(window, dtype=torch.float64, device=self.args.device), "sum").tolist()
            memory = self.accelerator.gather(torch.tensor([memory], device=self.args.device)).max().item()
        loss, kd, ce, tokens, useful, computed, timed = window
        seconds = watch.seconds
        watch.reset(running=True)
        self._sums = Sums(tokens_before=sums.tokens_before + int(tokens))
        count = max(tokens, 1)
        return {
            "loss": loss / count,
            "kd": kd / count,
            "ce": ce / count,
            "tokens": self._sums.tokens_before,
            "useful_tokens": useful / computed if computed else math.nan,
            "tokens_per_second": timed / seconds if seconds else math.nan,
            "memory_gb": memory,
        }

    # What the plan says.

    def get_train_dataloader(self):
        """The micro-batches that the plan gives to this process."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: training needs rows, got None")
        collate = functools.partial(_counted, self.data_collator, self._joins)
        return plan_loader(self.schedule, self.train_dataset, collate, self.args)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """``lr_scheduler_type``, begun anew where the plan says so."""
        if len(self.schedule.segments) == 1 or self.lr_scheduler is not None:
            return super().create_scheduler(self.schedule.total_steps, *([] if optimizer is None else [optimizer]))
        factor = learning_rate_factor(self.args, self.schedule)
        chosen: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _enter(self, stage: int) -> None:
        """Hold the teacher of a stage; the next one may be fetched meanwhile."""
        here, *later = [teacher_of(s) for s in self.schedule.plan.stages[stage:]]
        following = (name for name in later if name not in (None, here))
        samples = None
        if self.train_dataset is not None and self.args.store is not None:
            index = self.train_dataset["sample_index"][:]
            samples = {"train": [index[position] for position in self.schedule.pool(stage)]}
        self.teachers.stage([] if here is None else [here], ahead=next(following, None), samples=samples)

    def _suit_packed_rows(self) -> None:
        """Packed rows as all models can read them; each model is asked once, which loads it."""
        packed = {split: data for split, data in self._datasets().items() if "position_ids" in data.column_names}
        if not packed:
            return
        student = self.accelerator.unwrap_model(self.model)
        if is_partitioned(student):
            raise ValueError(
                "packing: whether the student keeps the documents of a row apart cannot be found out under DeepSpeed ZeRO-3; expected"
                " packing=False, or packed rows without position_ids, whose tokens see the documents before theirs"
            )
        data = next(iter(packed.values()))
        if self._all([student, *self.teachers.names], lambda model: "position_ids" in suited_to(data, model).column_names):
            return
        packed = {split: data.remove_columns("position_ids") for split, data in packed.items()}
        self.train_dataset = packed.get("train", self.train_dataset)
        if isinstance(self.eval_dataset, Mapping):
            self.eval_dataset = {name: packed.get(f"eval-{name}", data) for name, data in self.eval_dataset.items()}
        else:
            self.eval_dataset = packed.get("eval", self.eval_dataset)

    def _can_join(self) -> bool:
        """Whether all models that are given joined rows keep them apart; each is asked once, which loads it."""
        if any("position_ids" in data.column_names for data in self._datasets().values()):
            raise ValueError("padding_free: the data has a column position_ids, its rows are packed already; expected padding_free=False")
        student = self.accelerator.unwrap_model(self.model)
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(self.accelerator.mixed_precision))

        def apart(model: nn.Module) -> bool:
            if is_partitioned(model):
                why = f"whether {type(model).__name__} keeps rows apart by their positions cannot be found out under DeepSpeed ZeRO-3"
            elif keeps_documents_apart(model, one_row=True, autocast=mixed if model is student else None):
                return True
            else:
                why = f"{type(model).__name__} cannot keep rows apart by their positions"
            warnings.warn(f"padding_free: {why}: batches stay padded", stacklevel=2)
            return False

        used = {*map(teacher_of, self.plan.stages), self.eval_teacher} - {None}
        # Those of a store run in its canonical batches.
        return self._all([student, *(name for name in self.teachers.names if name in used and self.args.store is None)], apart)

    def _all(self, models: list[nn.Module | str], holds: Callable[[nn.Module], bool]) -> bool:
        """Whether something holds for all of these models, by process 0's answers; teachers, given by name, are there one at a time."""
        for model in models:
            if isinstance(model, str):
                found, asks = self.teachers.model(model), True
            else:
                # For FSDP transformers may have loaded the student on process 0 alone.
                found, asks = model, self.accelerator.is_main_process or not self.is_fsdp_enabled or is_sharded(model)
            answer = broadcast_object_list([asks and holds(found)])[0]
            if isinstance(model, str) and len(self.teachers.names) > 1:
                del found
                self.teachers.stage([])
            if not answer:
                return False
        return True

    def _open_stores(self, spec: StoreSpec) -> None:
        args, student = self.args, self.accelerator.unwrap_model(self.model)
        stages = self.schedule.plan.stages
        for stage in stages:
            if teacher_of(stage) is not None:
                check_signal(spec.kind, args.divergence, {name: knob_ends(knob) for name, knob in stage.parameters.items()})
        temperatures = {value for stage in stages if teacher_of(stage) for value in knob_ends(stage.temperature)}
        for split, data in self._datasets().items():
            teachers = {teacher_of(stage) for stage in stages} if split == "train" else {self.eval_teacher}
            self.teachers.use_store(
                spec,
                split,
                data,
                facts={name: getattr(args, name) for name in ("max_length", "completion_only_loss", "chat_template")},
                names=[name for name in self.teachers.names if name in teachers],
                temperatures=temperatures,
                vocabulary=None if is_sharded(student) else len(head_of(student).weight),
                collate=self.data_collator,
            )

    def _datasets(self) -> dict[str, Dataset]:
        """The rows that the trainer was given, by the name of their split."""
        held_out = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        named = {"train": self.train_dataset, **{"-".join(filter(None, ("eval", name))): data for name, data in held_out.items()}}
        return {name: data for name, data in named.items() if data is not None}

    def save_merged(self, output_dir: str | os.PathLike) -> None:
        """Save the student with its adapter merged into its weights (`fastkd.adapters.merged`), and its tokenizer.

        `AutoModelForCausalLM.from_pretrained` loads it without PEFT. The adapter alone goes into the folder ``adapter`` in it;
        `save_model` saves nothing else. To be called on all processes.

        Raises:
            TypeError: the student has no adapter. ValueError: it is sharded, by FSDP or DeepSpeed ZeRO-3.
        """
        student: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save:
            whole, folder = merged(student), Path(output_dir)
            student.save_pretrained(folder / "adapter")
            whole.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    # Checkpoints: written under a temporary name, verified, then renamed.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """`Trainer.train`; ``resume_from_checkpoint=True`` takes the newest checkpoint that verifies, a path is verified first.

        Raises:
            ValueError: a checkpoint that is damaged, or of a run with another plan, seed, data, student's config or teachers, naming which.
            fastkd.checkpoints.CheckpointError: there is no room for one; those before it are as they were.
        """
        found: Path | None = None
        if resume_from_checkpoint is True:
            found = checkpoints.newest_complete(self._folder)
            if found is None:
                raise ValueError(f"resume_from_checkpoint: no complete checkpoint in {self.args.output_dir}")
        elif resume_from_checkpoint:
            found = Path(resume_from_checkpoint)
            problems = checkpoints.find_problems(found)
            if problems:
                raise ValueError(f"resume_from_checkpoint: {problems[0]}")
        else:
            other = checkpoints.newest_complete(self._folder)
            if other is not None:
                raise ValueError(f"output_dir: {other} is of an earlier run: resume from it, or choose another folder")
        self._sums, step = Sums(), 0
        self._facts = self._run_facts()
        if found is not None:
            states = sorted(found.glob(f"*-{_STATE}"), key=lambda path: int(path.name.split("-")[0]))
            kept = [json.loads(state.read_text()) for state in states]  # of each process that there was
            if not kept:
                raise ValueError(f"resume_from_checkpoint: {found} has no 0-{_STATE}: it was saved with save_only_model")
            before, now = dict(kept[0]["run"]), dict(self._facts)
            # Whether and on what a run is evaluated may change, but what has one name is to be one data set.
            both = before.get("eval", {}).keys() & now["eval"].keys()
            for facts in (before, now):
                facts["eval"] = {name: facts["eval"][name] for name in sorted(both)}
            # What an earlier version did not keep: options were off, the rest cannot be compared.
            before["training"] = {name: value for name, value in now["training"].items() if not value} | before["training"]
            if "attn_implementation" not in before["student"]:
                now = {name: facts for name, facts in now.items() if name != "adapter"}
                now["student"] = {name: value for name, value in now["student"].items() if name != "attn_implementation"}
            changed = difference(before, now)
            if changed:
                raise ValueError(f"resume_from_checkpoint: {found} is of another run: {changed}")
            # There may have been more processes than now, or fewer: each takes its share of their sums.
            mine = [each["sums"] for each in kept[self.args.process_index :: self.args.world_size]]
            shared = {name: value for name, value in kept[0]["sums"].items() if name.endswith("_before")}
            self._sums = Sums(**{name: sum(sums.get(name, 0) for sums in mine) for name in asdict(Sums())} | shared)
            step = json.loads((found / "trainer_state.json").read_text())["global_step"]
        self._watch.reset(running=False)
        self._first_step = step
        if self.args.should_save:
            shutil.rmtree(self._folder / _INCOMPLETE, ignore_errors=True)  # of a crash; a run resumed at its end saves no more
        if self.is_world_process_zero():
            self._metrics.start(step, resumed=found is not None)
        with _replaced(self.args, max_steps=self.schedule.total_steps, num_train_epochs=1, use_liger_kernel=False):
            return super().train(None if found is None else str(found), *args, **kwargs)

    def _run_facts(self) -> dict[str, Any]:
        """What a run must have in common with the one it resumes.

        The student's weights are the checkpoint's, but not its config: a rate of dropout, say. Teachers given as modules are not looked at.
        """
        student: Any = self.accelerator.unwrap_model(self.model)
        config = {name: value for name, value in student.config.to_dict().items() if name not in _FREE_CONFIG}
        teachers = [name for name in self.teachers.names if name in {teacher_of(stage) for stage in self.plan.stages}]
        identities = {name: found for name in teachers if (found := self.teachers.identity(name)) is not None}
        held_out = {name: sample_table(data).content for name, data in self._datasets().items() if name != "train"}
        options = {name: getattr(self.args, name) for name in _OBJECTIVE}
        store = None if self.args.store is None else asdict(replace(StoreSpec(**self.args.store), path="", max_gb=None))
        facts = {**self.schedule.facts(), "training": options, "store": store, "student": config, "teachers": identities, "eval": held_out}
        facts["student"]["attn_implementation"] = student.config.get_text_config()._attn_implementation
        if is_adapted(student):
            facts["adapter"] = adapter_facts(student)
        return json.loads(json.dumps(facts, default=str))

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: the Trainer's loop would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, self._staging) if self._staging else folder

    _staging = ""
    _first_step = 0

    @not_timed
    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self._get_output_dir(trial))
        name, keep = f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        push = self.args.push_to_hub
        staging, final = run / _INCOMPLETE / name, run / name
        if self.args.should_save:
            shutil.rmtree(staging.parent, ignore_errors=True)  # what a crash may have left
        self.accelerator.wait_for_everyone()
        try:
            # Nothing old goes, and nothing is pushed, before the new one stands.
            with (
                _replaced(self, _staging=staging.parent.name),
                _replaced(self.args, save_total_limit=None, push_to_hub=False, hub_token=None),  # no token in what is pickled
            ):
                super()._save_checkpoint(model, trial)
            if not self.args.save_only_model:
                state = {"sums": asdict(self._sums), "run": self._facts}
                (staging / f"{self.args.process_index}-{_STATE}").write_text(json.dumps(state))
            if self.state.best_model_checkpoint == str(staging):
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staging / "trainer_state.json"))
                checkpoints.commit(staging, final)
        except Exception as error:
            reason = checkpoints.what_is_full(error)
            if reason is None:
                raise
            shutil.rmtree(staging.parent, ignore_errors=True)  # it takes room
            raise checkpoints.CheckpointError(f"{final}: {reason}; make room and resume") from error
        if self.args.should_save:
            staging.parent.rmdir()
            checkpoints.rotate(final, keep, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(final))


def _with_shift_labels(collator: Callable, rows: list) -> dict[str, Tensor]:
    batch = dict(collator(rows))
    if "labels" not in batch:
        raise ValueError(f"data_collator: expected labels (not shifted) among what it returns, got {', '.join(batch)}")
    if "shift_labels" not in batch:
        batch["shift_labels"] = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    dummies = [i for i, row in enumerate(rows) if row.get("sample_index") == DUMMY]
    for name in ("labels", "shift_labels"):  # a collator may make labels of its own
        batch[name][dummies] = -100
    return batch


def _laid_out(collate: Callable, join: bool, rows: list) -> dict[str, Any]:
    batch = collate(rows)
    return joined(batch) if join else batch


def _counted(collate: Callable, join: bool, rows: list) -> dict[str, Any]:
    """A batch for training, with ``useful``: how many of its positions are no padding."""
    useful = sum(len(row["input_ids"]) for row in rows if row.get("sample_index") != DUMMY)
    return {**_laid_out(collate, join, rows), "useful": useful}


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes with other values for a while."""
    before = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(before)


def _padded(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    width = max(a.shape[1] for a in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=-100) for a in arrays])
