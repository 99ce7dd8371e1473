"""One of two processes of ``test_two_processes_follow_the_plan_as_one``."""

import sys
from pathlib import Path

import torch

from .test_stages import two_teachers_run

run = two_teachers_run(
    Path(sys.argv[1]) / "two", per_device_train_batch_size=1, gradient_accumulation_steps=2, padding_free=True, ddp_backend="gloo"
)
run.train()
found = run.evaluate()
if run.is_world_process_zero():
    state = {
        "weights": run.accelerator.unwrap_model(run.model).state_dict(),
        "kl": found["eval_kl"],
        "wrapped": type(run.model_wrapped).__name__,
    }
    torch.save(state, Path(sys.argv[1]) / "two.pt")
torch.distributed.destroy_process_group()
