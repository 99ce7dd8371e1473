"""`KDTrainer`: a transformers `Trainer` whose loss is `fused_linear_kd` against a teacher, and its `KDConfig`."""

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from . import checkpoints
from .arguments import KDConfig
from .data import KDCollator
from .evaluation import token_metrics
from .functional import LossParts, divergence, fused_linear_kd
from .hf import Head, head_of, run_body
from .models import load_tokenizer
from .preparation import (
    check_apart,
    check_best_metric,
    check_fits,
    check_head,
    load_student,
    load_teacher,
    one_teacher,
    pad_id,
    place,
    tokenized,
)
from .report import MetricsFile
from .signals import TeacherHidden

__all__ = ["KDConfig", "KDTrainer", "NonFiniteLossError"]

_STATE = "kd_state.json"


class NonFiniteLossError(RuntimeError):
    """The loss of a batch was not finite; the message names the samples."""


@dataclass
class _Sums:
    """What has been trained since the last logging step, and the counted tokens of the whole run; saved with each checkpoint."""

    loss: float = 0.0
    kd: float = 0.0
    ce: float = 0.0
    tokens: int = 0
    tokens_before: int = 0


class KDTrainer(Trainer):
    """Distils a teacher into a student.

    Each model's body runs without its head; the heads meet in `fused_linear_kd`, inside the wrapped student's forward, so that DDP
    synchronises. The loss is a mean over the counted tokens of the global batch, however it is split into devices and accumulation
    steps. The teacher runs in eval mode, without gradients, in its own dtype.

    Args:
        model: the student: a name, a path, or a `PreTrainedModel`.
        teacher_model: the same, or a mapping of one name to one of these.
        args: a `KDConfig`.
        train_dataset, eval_dataset: rows as `fastkd.data.tokenize` takes them, tokenised or not. eval_dataset may be a mapping of several.
        processing_class: the student's tokenizer; default: that of ``model``, when given by name.
        data_collator: default `fastkd.data.KDCollator`. One that gives ``labels`` only (not shifted) will do.
        compute_metrics: receives the student's most probable tokens and the aligned labels, both ``[rows, length]``, -100 where no token
            counts: full logits are never held.
        peft_config: wraps the student with PEFT.
        plan: not available in this version.

    Evaluation adds, per counted token at temperature 1: ``kl`` (forward KL to the teacher), ``ce``, ``perplexity``, ``agreement`` (share of
    tokens where both models' most probable token is the same); ``loss`` is the training objective, without a router's auxiliary loss.
    Every logging step and evaluation is also a row of ``output_dir/metrics.jsonl``; there ``tokens`` are those counted since the run began.

    Raises:
        NonFiniteLossError: in `train`, with the ids of the samples.
        ValueError, TypeError: for arguments that do not fit together, before any training.
    """

    args: KDConfig
    loss_is_scaled_for_ga = True  # by the number of counted tokens in the global batch

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        teacher_model: str | os.PathLike | PreTrainedModel | Mapping[str, Any],
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
        if plan is not None:
            raise ValueError("plan: training plans are not available in this version; expected None")
        if args.n_gpu > 1:
            raise ValueError(
                f"torch.nn.DataParallel over {args.n_gpu} GPUs is not supported: start one process per GPU with `accelerate launch` or"
                " `torchrun`, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices: must be True: the loss is a mean over the tokens of all processes")
        if processing_class is None and isinstance(model, str | os.PathLike):
            processing_class = load_tokenizer(model, **place(args.model_init_kwargs))
        self.teacher_name, teacher_model = one_teacher(teacher_model)
        student = load_student(model, args, peft_config)
        self.teacher = load_teacher(teacher_model, args, processing_class)
        check_apart(student, self.teacher)
        check_best_metric(args, eval_dataset, compute_metrics)
        if train_dataset is not None:
            train_dataset = tokenized(train_dataset, processing_class, args, "train")
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
        self.model_accepts_loss_kwargs = True  # so that the global number of counted tokens reaches compute_loss
        self.teacher.to(args.device)
        for data in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset])):
            if data is not None:
                check_fits(data, student=student, teacher=self.teacher)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_head("model", student)
            check_head("teacher_model", self.teacher)
        self._metrics = MetricsFile(self._folder)
        self._sums = _Sums()

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
        signal = self._teacher_signal(batch)

        def forward(student, batch):
            hidden, aux_loss = run_body(student, **batch)
            loss, parts = self._fused(hidden, head_of(student), signal, labels, num_items_in_batch)
            if aux_loss is not None:
                # Weighted by the micro-batch's share of the tokens. How evenly a router balances depends on the micro-batch, so that
                # this term, unlike the loss itself, is not the same however a batch is split.
                total = parts.tokens if num_items_in_batch is None else num_items_in_batch
                loss = loss + aux_loss.to(loss.dtype) * (parts.tokens / max(total, 1))
            return loss, parts

        loss, parts = self._in_student(model, forward, batch)
        total = parts.tokens if num_items_in_batch is None else num_items_in_batch
        if model.training:
            self._account(loss.detach() * total, parts, labels, index)
        if self.args.world_size > 1 and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes, the normaliser already counts them all
        return (loss, {"loss": loss}) if return_outputs else loss

    def _fused(self, hidden: Tensor, head: Head, signal: TeacherHidden, labels: Tensor, normalizer) -> tuple[Tensor, LossParts]:
        args = self.args
        return fused_linear_kd(
            hidden,
            head.weight,
            signal,
            labels,
            divergence=divergence(args.divergence, **(args.divergence_parameters or {})),
            temperature=args.temperature,
            temperature_squared=args.temperature_squared,
            kd_ratio=args.kd_ratio,
            normalizer=normalizer,
            student_bias=head.bias,
            student_softcap=head.softcap,
            student_scale=head.scale,
            chunk_tokens=args.chunk_tokens,
            logits_dtype=None if args.logits_dtype is None else getattr(torch, args.logits_dtype),
            return_parts=True,
        )

    @torch.no_grad()
    def _teacher_signal(self, batch: Mapping[str, Tensor]) -> TeacherHidden:
        with torch.autocast(self.args.device.type, enabled=False):  # the teacher keeps its own dtype
            hidden, _ = run_body(self.teacher, **batch)
        head = head_of(self.teacher)
        return TeacherHidden(hidden, head.weight, head.bias, head.softcap, head.scale)

    def _in_student(self, model: nn.Module, forward: Callable, batch: Mapping[str, Tensor]) -> Any:
        """Call the wrapped student with ``forward(student, batch)`` in place of its own forward."""
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with _redirected(student, lambda **inputs: forward(student, inputs)), self.accelerator.autocast():
            return model(**batch)

    def _account(self, loss_sum: Tensor, parts: LossParts, labels: Tensor, index: Tensor | None) -> None:
        kd, ce = parts.kd_per_token.double().sum(), parts.ce_per_token.double().sum()
        loss, kd, ce, tokens = torch.stack([loss_sum.double(), kd, ce, parts.tokens.double()]).tolist()
        if not math.isfinite(loss):
            self._stop(parts, labels, index)
        self._sums.loss += loss
        self._sums.kd += kd
        self._sums.ce += ce
        self._sums.tokens += int(tokens)

    def _stop(self, parts: LossParts, labels: Tensor, index: Tensor | None) -> None:
        shares = ((self.args.kd_ratio, parts.kd_per_token), (1 - self.args.kd_ratio, parts.ce_per_token))
        broken = torch.stack([~values.isfinite() for share, values in shares if share > 0]).any(0).any(-1)
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
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval")
        with _replaced(self.args, dataloader_drop_last=False):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`; takes rows that are not tokenised too, and never drops the last ones."""
        with _replaced(self.args, dataloader_drop_last=False):
            return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def _prepared(self, dataset: Any, name: str) -> Dataset:
        tokenizer: Any = self.processing_class
        dataset = tokenized(dataset, tokenizer, self.args, name)
        check_fits(dataset, student=self.model, teacher=self.teacher)
        return dataset

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed: training must not depend on when it is evaluated
            return self._evaluation_loop(dataloader, metric_key_prefix)

    def _evaluation_loop(self, dataloader, metric_key_prefix: str) -> EvalLoopOutput:
        model: Any = self.model_wrapped if self.is_in_train else self.model
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        rows: list[Tensor] = []
        predictions: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in dataloader:
            sums, top1, labels = self._evaluate_batch(model, self._prepare_inputs(batch))
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
    def _evaluate_batch(self, model, inputs) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, 5]`` sums over each row's counted tokens (loss, kl, ce, agree, tokens), and ``[B, S]`` top-1 tokens and labels."""
        batch = dict(inputs)
        labels = batch.pop("shift_labels")
        batch.pop("labels", None)
        batch.pop("sample_index", None)
        signal, args = self._teacher_signal(batch), self.args

        def forward(student, batch):
            hidden, _ = run_body(student, **batch)
            return token_metrics(
                hidden, head_of(student), signal, labels, args.divergence, args.divergence_parameters, float(args.temperature)
            )

        found = self._in_student(model, forward, batch)
        factor = args.temperature**2 if args.temperature_squared else 1.0
        loss = torch.zeros_like(found["kd"])
        for share, term in ((args.kd_ratio * factor, found["kd"]), (1 - args.kd_ratio, found["ce"])):
            loss = loss + share * term if share > 0 else loss  # an infinite term with no share is not 0 * inf
        columns = [loss, found["kl"], found["ce"], found["agree"], labels != -100]
        return torch.stack([c.double().sum(1) for c in columns], 1), found["top1"], labels

    # Logging.

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the loss's terms to a training row, and writes the row to ``metrics.jsonl``."""
        row: dict[str, Any] = {"step": self.state.global_step}
        if "loss" in logs:
            terms = self._close_window()
            logs.update({name: value for name, value in terms.items() if not math.isnan(value)})
            row |= {"stage": 0, "teacher": self.teacher_name, **terms}
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            row |= {("lr" if name == "learning_rate" else name): value for name, value in logs.items()}
            self._metrics.append(row)

    def _close_window(self) -> dict[str, float]:
        """Means over the counted tokens since the last logging step, all processes together; starts a new window."""
        sums = self._sums
        loss, kd, ce, tokens = sums.loss, sums.kd, sums.ce, sums.tokens
        if self.args.world_size > 1:
            mine = torch.tensor([loss, kd, ce, tokens], dtype=torch.float64, device=self.args.device)
            loss, kd, ce, tokens = self.accelerator.reduce(mine, "sum").tolist()
        self._sums = _Sums(tokens_before=sums.tokens_before + int(tokens))
        count = max(tokens, 1)
        return {
            "loss": loss / count,
            "kd": kd / count,
            "ce": ce / count,
            "tokens": self._sums.tokens_before,
            "temperature": float(self.args.temperature),
            "kd_ratio": float(self.args.kd_ratio),
        }

    # The order of the samples.

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return _ByEpoch(sampler, lambda: seed + int(self.state.epoch or 0))
        return sampler

    # Checkpoints: written under a temporary name, verified, then renamed.

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """`Trainer.train`; ``resume_from_checkpoint=True`` takes the newest checkpoint that verifies, a path is verified first."""
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
        self._sums, step = _Sums(), 0
        if found is not None:
            state = found / f"{self.args.process_index}-{_STATE}"
            if not state.exists():
                raise ValueError(
                    f"resume_from_checkpoint: {found} has no {state.name}: it was saved with save_only_model, or by fewer processes"
                )
            self._sums = _Sums(**json.loads(state.read_text()))
            step = json.loads((found / "trainer_state.json").read_text())["global_step"]
        if self.is_world_process_zero():
            self._metrics.start(step, resumed=found is not None)
        return super().train(None if found is None else str(found), *args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: the Trainer's loop would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, self._staging) if self._staging else folder

    _staging = ""

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self._get_output_dir(trial))
        name, keep = f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        push = self.args.push_to_hub
        staging, final = run / ".incomplete" / name, run / name
        if self.args.should_save:
            shutil.rmtree(staging.parent, ignore_errors=True)  # what a crash may have left
        self.accelerator.wait_for_everyone()
        # Nothing old goes, and nothing is pushed, before the new one stands.
        with _replaced(self, _staging=staging.parent.name), _replaced(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            (staging / f"{self.args.process_index}-{_STATE}").write_text(json.dumps(asdict(self._sums)))
        if self.state.best_model_checkpoint == str(staging):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staging / "trainer_state.json"))
            checkpoints.commit(staging, final)
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
    return batch


class _ByEpoch(Sampler):
    """A sampler whose order depends on the epoch's seed alone, so that a resumed run goes on in the same order."""

    def __init__(self, sampler: LengthGroupedSampler, seed: Callable[[], int]):
        self.sampler, self.seed = sampler, seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        self.sampler.generator = torch.Generator().manual_seed(self.seed())
        return iter(self.sampler)


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes with other values for a while."""
    before = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(before)


@contextlib.contextmanager
def _redirected(module: nn.Module, forward: Callable) -> Iterator[None]:
    """``module(...)``, hooks and wrappers included, runs ``forward`` meanwhile."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _padded(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    width = max(a.shape[1] for a in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=-100) for a in arrays])
