"""One of two processes of ``test_two_processes_have_the_gradients_of_one``."""

import json
import os
import sys
from pathlib import Path

import torch

from .test_trainer import FirstGradients, trainer
from .tiny import rows

folder, rank = Path(sys.argv[1]), os.environ["RANK"]


keep = FirstGradients()
run = trainer(
    folder / "two",
    callbacks=[keep],
    eval_data=rows(7, seed=5),
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=2,
    max_grad_norm=0.0,
    train_sampling_strategy="sequential",
    ddp_backend="gloo",
)
run.train()
torch.save({**keep.found, "wrapped": type(run.model_wrapped).__name__}, folder / f"gradients-{rank}.pt")
metrics = trainer(folder / "evaluation", eval_data=rows(7, seed=5), per_device_eval_batch_size=2, ddp_backend="gloo").evaluate()
names = ("eval_loss", "eval_kl", "eval_ce", "eval_agreement", "eval_tokens")
(folder / f"evaluation-{rank}.json").write_text(json.dumps({name: metrics[name] for name in names}))
torch.distributed.destroy_process_group()
