"""One of two processes of tests/test_distributed.py under DeepSpeed ZeRO-3: each has half of a batch."""

import copy
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor

from fastkd import fused_linear_kd
from fastkd.hf import Head
from fastkd.teachers import Teachers

from .sharded_worker import CHUNK, OBJECTIVE, Collectives, batch, inside_the_head, models, one_sgd_step

ZERO_3 = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    },
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,  # its default is 1
}


def step(student: Any, teacher: Any) -> dict[str, Any]:
    ids, labels, total = batch()
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    teachers = Teachers({"teacher": teacher}, device="cpu")

    def loss(hidden: Tensor, head: Head) -> Tensor:
        value = fused_linear_kd(hidden, head.weight, signal, labels[half], normalizer=total, chunk_tokens=CHUNK, **OBJECTIVE)
        return value * dist.get_world_size()

    teachers.signal("teacher", {"input_ids": ids[half]}, labels[half])  # the first call looks at what the model does to its logits
    with torch.no_grad():
        inside_the_head(student, ids[half], lambda hidden, head: hidden)
    with Collectives() as forward:
        signal = teachers.signal("teacher", {"input_ids": ids[half]}, labels[half])
    with Collectives() as own:
        value = inside_the_head(student, ids[half], loss)
    with Collectives() as backward:
        student.backward(value)
    mean = value.detach().clone()
    dist.all_reduce(mean)
    grads = {n: safe_get_full_grad(p).clone() for n, p in student.module.named_parameters()}
    student.step()
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in student.module.named_parameters()}
    return {
        "loss": mean / dist.get_world_size(),
        "grads": grads,
        "weights": weights,
        "teacher": forward.seen,
        "forward": own.seen,
        "backward": backward.seen,
    }


def trained(folder: Path) -> dict[str, Any]:
    """The trainer, whose student transformers loads in shards; the teacher comes from a folder too and is whole on each process."""
    # Without a GPU accelerate takes DeepSpeed's processes for one.
    PartialState(cpu=True, backend="gloo").distributed_type = DistributedType.DEEPSPEED
    settings = {**ZERO_3, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    run = one_sgd_step(
        folder / "two", str(folder / "student"), str(folder / "teacher"), per_device_train_batch_size=2, deepspeed=copy.deepcopy(settings),
        use_cpu=False, accelerator_config={"use_configured_state": True},
    )  # fmt: skip
    assert all(p.numel() == 0 for p in run.model.parameters())
    run.train()
    weights = {n: safe_get_full_fp32_param(p).clone() for n, p in run.model.named_parameters()}
    return {"weights": weights, "wrapped": type(run.model_wrapped).__name__, "evaluation": run.evaluate()}


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    out = {}
    for tied in (False, True):
        student, teacher = models(tied)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        student, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=copy.deepcopy(ZERO_3))
        teacher, *_ = deepspeed.initialize(model=teacher, config=copy.deepcopy(ZERO_3))
        assert all(p.numel() == 0 for model in (student, teacher) for p in model.parameters())
        out["tied" if tied else "untied"] = step(student, teacher.module)
    out["trainer"] = trained(folder)
    torch.save(out, folder / f"zero-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
