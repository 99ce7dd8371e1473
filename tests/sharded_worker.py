"""One of two processes of tests/test_distributed.py: each has half of a batch, and the models are wrapped in several ways."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd import TeacherHidden, TeacherLogits, fused_linear_kd, kd_loss
from fastkd.data import tokenize
from fastkd.evaluation import token_metrics
from fastkd.hf import Head, head_of, hidden_states_and_head, redirected, run_at_head
from fastkd.packing import keeps_documents_apart, pack
from fastkd.signals import Signal
from fastkd.teachers import Teachers
from fastkd.trainer import KDTrainer

from .test_trainer import FirstGradients, trainer
from .tiny import VOCABULARY, rows, tiny_llama, tiny_tokenizer

STUDENT_WIDTH, TEACHER_WIDTH = 16, 24
OBJECTIVE: dict[str, Any] = {"divergence": "jsd", "kd_ratio": 0.7, "temperature": 2.0}
# As accelerate has it for bf16.
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
CHUNK = 3  # the 18 tokens of a process are several chunks


def models(tied: bool = False) -> tuple[nn.Module, nn.Module]:
    return tiny_llama(1, hidden=STUDENT_WIDTH, tied=tied), tiny_llama(2, hidden=TEACHER_WIDTH, layers=1).requires_grad_(False)


def batch() -> tuple[Tensor, Tensor, int]:
    """Ids and aligned labels ``[4, 9]``, and the number of counted tokens, of which the processes' halves have different shares."""
    ids = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(3))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, :5] = -100
    return ids, labels, int((labels != -100).sum())


def one_process(tied: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the whole batch and its gradients, from the logits of the models' own forward."""
    student, teacher = models(tied)
    ids, labels, total = batch()
    logits = TeacherLogits(teacher(input_ids=ids).logits)
    loss = kd_loss(student(input_ids=ids).logits, logits, labels, normalizer=total, **OBJECTIVE)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


class Collectives(TorchDispatchMode):
    """Records ``(kind, number of elements of the whole)`` of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:  # its own collectives are plain operators again
            return NotImplemented
        library, name = func._schema.name.split("::")
        kind = next((kind for kind in ("gather", "scatter", "reduce") if kind in name), None)  # "reduce_scatter" is one of the second
        if library in ("c10d", "_c10d_functional") and kind is not None:
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            ranks = dist.get_world_size() if name == "all_gather_into_tensor" else 1  # which is given a process's share alone
            self.seen.append((kind, ranks * max(x.numel() for x in tensors)))
        return func(*args, **(kwargs or {}))


def shard(model: nn.Module, *, head: bool = False, policy: MixedPrecisionPolicy | None = None, **head_options: Any) -> nn.Module:
    """FSDP2: each layer, with ``head`` the LM head too, and the rest are units."""
    options = {} if policy is None else {"mp_policy": policy}
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head:
        fully_shard(model.lm_head, **options, **head_options)
    fully_shard(model, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def inside_the_head(model: nn.Module, ids: Tensor, loss: Callable[[Tensor, Head], Tensor]) -> Tensor:
    inner = getattr(model, "module", model)
    with redirected(inner, lambda **inputs: run_at_head(inner, loss, **inputs)[0]):
        return model(input_ids=ids)


def after_the_body(model: nn.Module, ids: Tensor, loss: Callable[[Tensor, Head], Tensor]) -> Tensor:
    """What a caller of the public functions does: the head's weight is a DTensor where it is used."""

    def forward(**inputs):
        hidden, head = hidden_states_and_head(model, **inputs)
        assert isinstance(head.weight, DTensor)
        return loss(hidden, head)

    with redirected(model, forward):
        return model(input_ids=ids)


def step(student: nn.Module, teacher: nn.Module, run: Callable = inside_the_head) -> dict[str, Any]:
    """A forward and a backward pass of this process's half."""
    ids, labels, total = batch()
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    teachers = Teachers({"teacher": teacher}, device="cpu", verify=False)
    teachers.signal("teacher", {"input_ids": ids[half]}, labels[half])  # the first call looks at what the model does to its logits
    found: dict[str, Any] = {}

    def loss(hidden: Tensor, head: Head) -> Tensor:
        value = fused_linear_kd(hidden, head.weight, signal, labels[half], normalizer=total, chunk_tokens=CHUNK, **OBJECTIVE)
        return value * dist.get_world_size()  # all three wrappers average over the processes

    for name in ("first", "second"):  # the first one looks at the student too
        for p in student.parameters():
            p.grad = None
        with Collectives() as forward:
            signal: Signal = teachers.signal("teacher", {"input_ids": ids[half]}, labels[half])
            value = run(student, ids[half], loss)
        with Collectives() as backward:
            value.backward()
        dtype, kept = value.dtype, [n for n, p in teacher.named_parameters() if not isinstance(p, DTensor)]
        mean = value.detach().float()
        dist.all_reduce(mean)
        grads = {n.removeprefix("module."): p.grad for n, p in student.named_parameters() if p.grad is not None}
        grads = {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in grads.items()}
        found[name] = {
            "loss": mean / dist.get_world_size(),
            "dtype": dtype,
            "grads": grads,
            "forward": forward.seen,
            "backward": backward.seen,
            "whole in the teacher": kept,
        }
    return found


def biased() -> dict[str, Any]:
    """DTensors in all four arguments that may be DTensors."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(5)
    whole = [torch.randn(VOCABULARY, STUDENT_WIDTH), torch.randn(VOCABULARY), torch.randn(VOCABULARY, 5), torch.randn(VOCABULARY)]
    hidden, values = torch.randn(6, STUDENT_WIDTH), torch.randn(6, 5)
    weight, bias, *fixed = (nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in whole)
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    loss = fused_linear_kd(hidden[mine], weight, TeacherHidden(values[mine], *fixed), student_bias=bias, chunk_tokens=1)
    loss.backward()
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.placements == weight.placements
    found = {"weight": weight.grad.full_tensor(), "bias": bias.grad.full_tensor()}
    again = [x.clone().requires_grad_() for x in whole[:2]]
    fused_linear_kd(hidden, again[0], TeacherHidden(values, *whole[2:]), student_bias=again[1]).backward()
    return {"found": found, "expected": {"weight": again[0].grad, "bias": again[1].grad}}


def one_sgd_step(folder: Path, student: Any, teacher: Any, **options: Any) -> KDTrainer:
    """A trainer for one step, after which the weights show the gradients."""
    return trainer(
        folder, student, teacher, eval_data=rows(7, seed=5), max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0.0, gradient_accumulation_steps=2, train_sampling_strategy="sequential", per_device_eval_batch_size=2, **options,
    )  # fmt: skip


class WholeGradients(FirstGradients):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert all(isinstance(p, DTensor) for p in model.parameters())
        super().on_pre_optimizer_step(args, state, control, model, **kwargs)
        self.found = {name: grad.full_tensor() for name, grad in self.found.items()}


def under_fsdp2(folder: Path, policy: MixedPrecisionPolicy | None = None, **options: Any) -> KDTrainer:
    """The trainer with what accelerate sets up for FSDP2 on GPUs; on a CPU its launcher would set up DDP."""
    run = trainer(
        folder, per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0,
        train_sampling_strategy="sequential", learning_rate=0.0, ddp_backend="gloo", **options,
    )  # fmt: skip
    state = run.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        mixed_precision_policy=policy,
    )  # fmt: skip
    run.is_fsdp_enabled = True
    return run


def trained(folder: Path) -> dict[str, Any]:
    keep = WholeGradients()
    run = under_fsdp2(folder / "two", eval_data=rows(7, seed=5), callbacks=[keep])
    early, asked = raised(run.evaluate), packed_rows(run)
    run.train()
    wrapped = type(run.model_wrapped).__name__
    return {"early": early, "asked": asked, "grads": keep.found, "wrapped": wrapped, "evaluation": run.evaluate()}


def packed_rows(run: KDTrainer) -> dict[str, Any]:
    """Which models each process asks whether they keep documents apart, and what comes of it where processes disagree."""
    before, asked = run.train_dataset, []
    texts = Dataset.from_dict({"text": ["a few words", "and some others"]})
    packed = pack(tokenize(texts, tiny_tokenizer(), max_length=None), 16)

    def keeps(model: nn.Module) -> bool:
        asked.append(model is run.model)
        return dist.get_rank() == no

    found = {}
    with mock.patch("fastkd.packing.keeps_documents_apart", keeps):
        for no in (0, 1):
            run.train_dataset = packed
            run._suit_packed_rows()
            found[f"process {no} says yes"] = (asked.copy(), "position_ids" in run.train_dataset.column_names)
            asked.clear()
    run.train_dataset = before
    return found


def logged(folder: Path) -> dict[str, Any]:
    """What a trainer logs whose wrapper rounds all that modules return, and this process's sums of what it was made from."""
    losses, metrics = [], []

    def loss(*args: Any, **options: Any) -> Any:
        value, parts = fused_linear_kd(*args, **options)
        losses.append(torch.stack([value.detach().double(), parts.kd_per_token.double().sum(), parts.ce_per_token.double().sum()]))
        return value, parts

    def measured(*args: Any) -> dict[str, Tensor]:
        found = token_metrics(*args)
        metrics.append(torch.stack([found[name].double().sum() for name in ("kl", "ce", "agree")]))
        return found

    run = under_fsdp2(folder / "rounded", BF16, eval_data=rows(8, seed=5), max_steps=1, logging_steps=1)
    with mock.patch("fastkd.trainer.fused_linear_kd", loss), mock.patch("fastkd.trainer.token_metrics", measured):
        run.train()
        return {"train": run.state.log_history[0], "losses": sum(losses), "evaluation": run.evaluate(), "metrics": sum(metrics)}


def outside() -> dict[str, str]:
    """What is said where the parts of a sharded model are used without its being called."""

    def use(model: nn.Module) -> None:
        run_at_head(model, lambda hidden, head: head.weight, input_ids=batch()[0])

    root, rest = shard(models()[0]), models()[0]
    head_of(rest)
    for part in (rest.model.embed_tokens, *rest.model.layers, rest.model.norm):
        fully_shard(part)
    fully_shard(rest)
    return {"head_of": raised(lambda: head_of(root)), "at the body": raised(lambda: use(root)), "at the head": raised(lambda: use(rest))}


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    out = {}
    student, teacher = models()
    out["ddp"] = step(DistributedDataParallel(student), teacher)
    student, teacher = models()
    out["own unit"] = step(shard(student, head=True), shard(teacher, head=True))
    student, teacher = models()
    out["own unit, kept"] = step(shard(student, head=True, reshard_after_forward=False), shard(teacher))
    student, teacher = models()
    shard(student, head=True).lm_head.set_unshard_in_backward(False)
    out["own unit, spared"] = step(student, teacher)
    student, teacher = models()
    out["root"] = step(shard(student), teacher)
    student, teacher = models(tied=True)
    out["tied"] = step(shard(student), shard(teacher, head=True))
    student, teacher = models()
    head_of(student)  # before it is sharded
    out["after the body"] = step(shard(student, head=True), teacher, after_the_body)
    student, teacher = models()
    out["bf16"] = step(shard(student, head=True, policy=BF16), teacher.bfloat16())
    out["apart"] = keeps_documents_apart(shard(tiny_llama(1), head=True)), keeps_documents_apart(student)
    out["outside"] = outside()
    out["biased"] = biased()
    out["trainer"] = trained(folder)
    out["logged"] = logged(folder)
    torch.save(out, folder / f"sharded-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
