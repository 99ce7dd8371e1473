"""`KDConfig`: the training arguments of a distillation."""

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .functional import Divergence, divergence
from .levers import check_liger, check_optimizer, liger_config

__all__ = ["KDConfig"]

# Options of TrainingArguments that would have no effect, or a wrong one.
_REFUSED = {
    "remove_unused_columns": "the batches carry columns that no model's forward names",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "label_smoothing_factor": "the loss is fastkd's own, which has none",
    "batch_eval_metrics": "compute_metrics is called once, with all tokens",
    "include_for_metrics": "compute_metrics receives tokens and labels",
    "prediction_loss_only": "evaluation always gives its metrics",
    "bf16_full_eval": "models are evaluated in the dtype they are trained in",
    "fp16_full_eval": "models are evaluated in the dtype they are trained in",
    "eval_accumulation_steps": "evaluation keeps sums, not logits",
    "auto_find_batch_size": "the plan fixes the batches",
    "ignore_data_skip": "a resumed run goes on with the samples that follow",
    "torch_compile": "the student's head is taken out of its forward; compile its layers instead (`layer.compile()` for each)",
}


@dataclass
class KDConfig(TrainingArguments):
    """`transformers.TrainingArguments` and the arguments of distillation.

    Args:
        divergence, divergence_parameters: a name in `fastkd.DIVERGENCES` and its parameters; or ``divergence("jsd", beta=0.1)`` alone.
        temperature: > 0, divides both models' logits. Not the sampling temperature.
        temperature_squared: multiply the KD term by ``temperature ** 2``.
        kd_ratio: in [0, 1], ``loss = (1 - kd_ratio) * CE + kd_ratio * KD``.
        max_length: tokens of a row; longer ones are cut on the right.
        completion_only_loss: count only completions and assistants' turns; None: yes where the rows have them.
        padding_free: join the rows of a batch to one, with `position_ids` that tell them apart, instead of padding them.
        packing: join the rows to a stream, cut into rows of max_length: pretraining (`fastkd.packing.pack`).
        chat_template: apply the tokenizer's chat template to plain ``prompt`` and ``completion`` strings too.
        chunk_tokens, logits_dtype ("float32" or the hidden states' dtype): as in `fused_linear_kd`.
        max_loss_buffer_mb: in place of chunk_tokens, MiB that the logits of a chunk and their gradients may take. On a CPU up to 32 MiB of
            temporaries, of few rows at a time, come on top.
        activation_offloading: what the student's forward keeps for its backward waits in CPU memory (`fastkd.levers.Offloaded`); best with
            gradient_checkpointing, which leaves little to travel.
        use_liger_kernel, liger_kernel_config: as in TrainingArguments, for the student and for teachers given by name or path; Liger's
            losses stay off (`fastkd.levers.apply_liger`).
        store: keep the teacher's signals on disk: ``{"path": ...}`` and further fields of `fastkd.store.StoreSpec`.
        model_init_kwargs, teacher_model_init_kwargs: keywords of `fastkd.models.load_model` for models given by name. A student is loaded
            in float32 unless its ``dtype`` is given or its weights are quantised, these and a teacher in the checkpoint's dtype.
    """

    divergence: str = "forward_kl"
    divergence_parameters: dict[str, float] | None = None
    temperature: float = 1.0
    temperature_squared: bool = True
    kd_ratio: float = 1.0
    max_length: int = 512
    completion_only_loss: bool | None = None
    chat_template: bool | None = None
    packing: bool = False
    padding_free: bool = False
    chunk_tokens: int | None = None
    max_loss_buffer_mb: float | None = None
    logits_dtype: str | None = None
    activation_offloading: bool = False
    store: dict[str, Any] | None = None
    model_init_kwargs: dict[str, Any] | None = None
    teacher_model_init_kwargs: dict[str, Any] | None = None
    # The batches carry columns that no model's forward names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False."})
    # A filter would hide the infinities that are to stop the run.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay False."})

    def __post_init__(self):
        if isinstance(self.divergence, Divergence):
            if self.divergence_parameters:
                raise ValueError("divergence_parameters: given within divergence already; expected None")
            parameters = {name: float(value) for name, value in self.divergence.parameters.items()}
            self.divergence, self.divergence_parameters = self.divergence.name, parameters
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(("kl", "ce", "perplexity")):
            self.greater_is_better = False
        super().__post_init__()
        started = int(os.environ.get("WORLD_SIZE") or 1)
        if started > 1 and self.world_size == 1:  # each would train alone, into the same folder
            raise ValueError(f"use_cpu: {started} processes were started, and there is no GPU for them; expected true, or one process")
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        divergence(self.divergence, **(self.divergence_parameters or {}))
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature: expected a finite number > 0, got {self.temperature}")
        if not 0 <= self.kd_ratio <= 1:
            raise ValueError(f"kd_ratio: expected a number in [0, 1], got {self.kd_ratio}")
        if self.max_length < 2:
            raise ValueError(f"max_length: expected at least 2 tokens, got {self.max_length}")
        if self.logits_dtype not in (None, "float64", "float32", "bfloat16", "float16"):
            raise ValueError(f"logits_dtype: expected None, 'float64', 'float32', 'bfloat16' or 'float16', got {self.logits_dtype!r}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens: expected a number >= 1 or None, got {self.chunk_tokens}")
        if self.max_loss_buffer_mb is not None:
            if self.chunk_tokens is not None:
                raise ValueError("max_loss_buffer_mb: given together with chunk_tokens; expected one of the two")
            if not self.max_loss_buffer_mb > 0:
                raise ValueError(f"max_loss_buffer_mb: expected a number > 0 or None, got {self.max_loss_buffer_mb}")
        if self.padding_free and self.packing:
            raise ValueError("padding_free: given together with packing, whose rows are full as they are; expected one of the two")
        if self.padding_free and self.neftune_noise_alpha:
            raise ValueError("padding_free: neftune_noise_alpha scales its noise by the length of a row, which is then that of a batch")
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        for name, strategy in (("logging_steps", "logging"), ("eval_steps", "eval"), ("save_steps", "save")):
            value, chosen = getattr(self, name), getattr(self, f"{strategy}_strategy")
            if str(getattr(chosen, "value", chosen)) == "steps" and value is not None and not value > 0:
                raise ValueError(f"{name}: expected a number > 0, or {strategy}_strategy: no, got {value}")
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16: needs a GPU; expected bf16, or neither")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: expected a number > 0, got {self.num_train_epochs}")
        for name in ("split_batches", "dispatch_batches"):
            if getattr(self.accelerator_config, name, None):
                raise ValueError(f"accelerator_config.{name}: must be left off: the plan says which process has which samples")
        for name, why in _REFUSED.items():
            if getattr(self, name, False):
                raise ValueError(f"{name}: must be left off: {why}")
        check_optimizer(str(getattr(self.optim, "value", self.optim)))
        if self.use_liger_kernel:
            check_liger(self.device)
            self.liger_kernel_config: dict[str, bool] | None = liger_config(self.liger_kernel_config)
