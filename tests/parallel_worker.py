"""One of two processes of ``test_parallel.py``: every case in turn, each rank with its slices; what comes out goes to a file."""

import contextlib
import sys
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastkd import TeacherInterpolated, TeacherLogits, chunking, divergence
from fastkd.parallel import vocab_parallel_linear_kd

from .divergence_cases import ALL, DEFAULTS
from .problems import Problem, Result, _run, make

F64 = torch.float64
N = 13


@dataclass(frozen=True)
class Case:
    """A problem for `make`, and where both heads are cut in two."""

    name: str = "forward_kl"
    parameters: dict[str, float] = field(default_factory=dict)
    cut: int = 15
    dtype: torch.dtype = F64
    make: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    change: str = ""

    def problem(self, key: str) -> Problem:
        torch.manual_seed(zlib.crc32(key.encode()))
        problem = make(self.name, self.parameters, **{"leading": (N,), "chunk_tokens": 5, **self.make})
        if self.change == "no teacher":
            problem = replace(problem, teacher=None)
        elif self.change == "ties":  # a uniform teacher: the head of the mass is cut in the middle of equal tokens
            problem.teacher.hidden.zero_()
        elif self.change == "no mass on one rank":
            problem.teacher.bias[self.cut :] = -torch.inf
        elif self.change == "strided":
            wide = torch.randn(3, 6, problem.hidden.shape[-1], dtype=F64)
            wide[:, :-1] = problem.hidden
            problem = replace(problem, hidden=wide[:, :-1])
        problem = problem.to(self.dtype)
        return problem if self.share is None else replace(problem, teacher=TeacherInterpolated(problem.teacher, self.share))


def _large(**options):
    return {"leading": (48,), "width": 503, "d_student": 32, "std": 8.0, "temperature": 1.5, "kd_ratio": 0.9, "chunk_tokens": 20, **options}


HEADS = {"bias": True, "student_scale": 0.7, "student_softcap": 3.0, "teacher_head": {"softcap": 2.0, "scale": 0.5}}
WEIGHTS = {"token_weight": torch.arange(N).double() % 4, "normalizer": torch.tensor(3.5)}
MIX = {"temperature": 1.7, "kd_ratio": 0.4}
CASES: dict[str, Case] = {
    **{p.id: Case(*p.values, make=MIX) for p in ALL},
    **{f"{p.id} alone": Case(*p.values, make={"labels": False}) for p in DEFAULTS},
    **{f"{p.id} with weights and heads": Case(*p.values, make={**MIX, **WEIGHTS, **HEADS, "teacher_width": 51}) for p in DEFAULTS},
    "T = 1 and CE": Case(make={"kd_ratio": 0.4}),
    "T = 1 and CE, fewer teacher ids": Case("jsd", make={"kd_ratio": 0.4, "width": 51, "teacher_width": 37, **HEADS}),
    "T = 1 and CE, more teacher ids": Case("reverse_kl", make={"kd_ratio": 0.4, "teacher_width": 51}),
    "fewer teacher ids, T": Case("adaptive_kl", make={**MIX, "width": 51, "teacher_width": 37}, cut=36),
    "CE alone": Case(make={"kd_ratio": 0.0}),
    "no teacher": Case(make={"kd_ratio": 0.0}, change="no teacher"),
    "slices of 1 and 36": Case("jsd", make=MIX, cut=1),
    "slices of 36 and 1": Case("reverse_kl", make=MIX, cut=36),
    "without T squared": Case(make={**MIX, "temperature_squared": False}),
    "every token masked": Case(make={**MIX, "masked": 1.0}),
    "ties across ranks": Case("adaptive_kl", make={"labels": False}, cut=5, change="ties"),
    "ties across ranks in fp32": Case("adaptive_kl", make={"labels": False}, cut=5, change="ties", dtype=torch.float32),
    "no mass on one rank": Case("skew_reverse_kl", make={**MIX, "bias": True}, change="no mass on one rank"),
    "strided hidden states": Case(make={**MIX, "leading": (3, 5)}, change="strided"),
    "interpolated": Case("reverse_kl", make=MIX, share=0.3),
    "interpolated, fewer teacher ids": Case("forward_kl", make={**MIX, "width": 51, "teacher_width": 37}, share=0.6),
    "interpolated, share 0": Case("jsd", make=MIX, share=0.0),
    **{
        f"{name} in {str(dtype)[6:]}, {' '.join(how)}": Case(name, make=_large(**how), dtype=dtype, cut=200)
        for name in ("forward_kl", "jsd", "adaptive_kl")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for how in ({"std": 30.0}, {"close": 0.02})
    },
    "bf16 logits": Case("reverse_kl", make=_large(std=3.0, logits_dtype=torch.bfloat16), dtype=torch.bfloat16, cut=200),
}


BY_BUDGET = Case(make={"leading": (200,), "chunk_tokens": None, "labels": False})


def sliced(problem: Problem, cut: int, rank: int) -> Problem:
    part = slice(0, cut) if rank == 0 else slice(cut, None)
    teacher, share = problem.teacher, None
    if isinstance(teacher, TeacherInterpolated):
        teacher, share = teacher.teacher, teacher.share
    if teacher is not None:
        teacher = replace(teacher, weight=teacher.weight[part], bias=None if teacher.bias is None else teacher.bias[part])
    if share is not None:
        teacher = TeacherInterpolated(teacher, share)
    return replace(problem, teacher=teacher, weight=problem.weight[part], bias=None if problem.bias is None else problem.bias[part])


def loss_of(problem: Problem, x: dict[str, torch.Tensor], **more: Any):
    return vocab_parallel_linear_kd(
        x["hidden"], x["weight"], problem.teacher, problem.labels, student_bias=x.get("bias"),
        divergence=divergence(problem.name, **problem.parameters), **{**problem.options, **more},
    )  # fmt: skip


def parallel(problem: Problem, upstream: float = 1.0, **more: Any) -> Result:
    return _run(problem, lambda x: loss_of(problem, x, **more), upstream)


@contextlib.contextmanager
def traffic():
    """Collects ``(collective, bytes that this rank sends)``."""
    sent: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(every, x, **options):
        sent.append(("gather", x.nbytes))
        return gather(every, x, **options)

    def all_reduce(x, **options):
        sent.append(("sum", x.nbytes))
        return reduce(x, **options)

    with mock.patch.object(dist, "all_gather", all_gather), mock.patch.object(dist, "all_reduce", all_reduce):
        yield sent


def leaves(problem: Problem, *needed: str) -> dict[str, torch.Tensor]:
    tensors = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    return {k: v.detach().clone().requires_grad_(k in needed) for k, v in tensors.items() if v is not None}


def counted_traffic(rank: int) -> dict[str, list]:
    """What is sent for 3 chunks of 5 tokens (of width 8, in fp32), by setting and width of the vocabulary."""
    found = {}
    for name in ("forward_kl", "jsd", "adaptive_kl"):
        for kind, needed, options in (("training", ("hidden", "weight"), MIX), ("frozen", (), MIX), ("KD at T = 1", ("hidden",), {})):
            for width in (37, 3701):
                problem = make(name, leading=(15,), width=width, masked=0.0, dtype=torch.float32, chunk_tokens=5, **options)
                problem = sliced(problem, width // 2, rank)
                with traffic() as sent:
                    loss_of(problem, leaves(problem, *needed))
                found[f"{name}, {kind}, {width}"] = sent
    return found


def which_gradients(rank: int) -> dict[str, Any]:
    problem = sliced(make(bias=True, **MIX), 15, rank)
    found: dict[str, Any] = {}
    for needed in (("hidden",), ("weight",), ("bias",), ("hidden", "bias")):
        x = leaves(problem, *needed)
        loss_of(problem, x).backward()
        found[" ".join(needed)] = sorted(k for k, v in x.items() if v.grad is not None)
    with torch.no_grad():
        found["no_grad"] = loss_of(problem, leaves(problem, "hidden")).requires_grad
    x = leaves(problem, "hidden", "weight")
    loss, parts = loss_of(problem, x, return_parts=True)
    found["parts"] = vars(parts)
    found["parts need no gradient"] = not any(v.requires_grad for v in vars(parts).values())
    upstream = torch.tensor(-2.5, dtype=F64)
    once, again = (torch.autograd.grad(loss, x["hidden"], upstream, retain_graph=True)[0] for _ in range(2))
    found["retain_graph"] = bool((once == again).all())
    gradient = torch.autograd.grad(loss, x["hidden"], create_graph=True)[0]
    found["double backward"] = raised(lambda: torch.autograd.grad(gradient.sum(), x["hidden"]))
    close = sliced(make("alpha_beta", close=1e-6, leading=(50,), width=64).to(torch.float32), 15, rank)
    found["least divergence"] = float(loss_of(close, leaves(close), return_parts=True)[1].kd_per_token.min())
    half = sliced(make(**MIX).to(torch.float32), 15, rank)
    x = leaves(half, "hidden", "weight")
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_of(half, x)
    cast.backward()
    by_hand = parallel(half.to(torch.bfloat16))
    found["autocast"] = str(cast.dtype), str(x["weight"].grad.dtype), bool(cast.detach() == by_hand.loss)
    return found


def raised(call) -> str:
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def errors(rank: int) -> dict[str, str]:
    """What is raised where the ranks' arguments are wrong or do not agree; each is followed by a loss that works."""
    whole = make(teacher_width=51, bias=True, **MIX)
    good = sliced(whole, 15, rank)
    x = leaves(good, "hidden")

    def teacher(**changes):
        return replace(good, teacher=replace(good.teacher, **changes))

    def options(**changes):
        return good.with_options(**changes)

    one = rank == 1
    bad = torch.full((N,), 37 if one else 1)
    cases: dict[str, tuple[Problem, dict[str, torch.Tensor]]] = {
        "teacher cut elsewhere": (replace(good, teacher=sliced(whole, 16, rank).teacher), x),
        "teacher cut the other way": (replace(good, teacher=sliced(whole, 15, 1 - rank).teacher), x),
        "no rows": (teacher(weight=good.teacher.weight[:0]) if one else good, x),
        "shape on one rank": (teacher(weight=good.teacher.weight[:, :5]) if one else good, x),
        "shape on both": (teacher(weight=good.teacher.weight[:, :5]), x),
        "type on one rank": (replace(good, labels=good.labels.int()) if one else good, x),
        "another teacher": (replace(good, teacher=TeacherLogits(torch.randn(N, 15, dtype=F64))), x),
        "label on one rank": (replace(good, labels=bad), x),
        "negative weight": (options(token_weight=torch.full((N,), -1.0)), x),
        "temperature": (options(temperature=0.0), x),
        "temperatures differ": (options(temperature=1.0 + rank), x),
        "parameters differ": (replace(good, name="jsd", parameters={"beta": 0.5 if one else 0.25}), x),
        "divergences differ": (replace(good, name="jsd" if one else "tvd"), x),
        "labels absent on one rank": (replace(good, labels=None).with_options(kd_ratio=1.0) if one else good, x),
        "masks differ": (replace(good, labels=torch.where(torch.arange(N) < 3 + rank, -100, 1)), x),
        "gradients differ": (good, leaves(good, "hidden", "weight") if one else x),
        "tokens differ": (replace(good, hidden=good.hidden[:7], labels=good.labels[:7],
                                  teacher=replace(good.teacher, hidden=good.teacher.hidden[:7])) if one else good,
                          {**x, "hidden": x["hidden"][:7]} if one else x),
        "teacher of another type": (replace(good, teacher=7), x),
        "another exception on one rank": (options(temperature=torch.tensor(2.0, device="meta") if one else 2.0), x),
    }  # fmt: skip
    found = {}
    for key, (problem, tensors) in cases.items():
        found[key] = raised(partial(loss_of, problem, tensors))
        assert loss_of(good, x).isfinite(), key
    return found


def sharded(rank: int) -> dict[str, Any]:
    """A head that is a DTensor: refused as it is, its slice taken."""
    mesh = init_device_mesh("cpu", (2,))
    whole = make(width=38, **MIX)
    problem = sliced(whole, 19, rank)
    head = distribute_tensor(whole.weight, mesh, [Shard(0)]).requires_grad_()
    teacher = replace(problem.teacher, weight=distribute_tensor(whole.teacher.weight, mesh, [Shard(0)]))
    hidden = problem.hidden
    refused = raised(lambda: loss_of(problem, {"hidden": hidden, "weight": head}))
    refused_teacher = raised(lambda: loss_of(replace(problem, teacher=teacher), {"hidden": hidden, "weight": problem.weight}))
    loss_of(problem, {"hidden": hidden, "weight": head.to_local()}).backward()
    same = head.grad.to_local().equal(parallel(problem).gradients["weight"]) and head.grad.placements == (Shard(0),)
    return {"refused": refused, "refused teacher": refused_teacher, "same gradient": same}


def by_budget(rank: int) -> tuple[Result, list]:
    """200 tokens, slices of 36 and 1 ids, and a budget for 64 tokens of the larger one."""
    with mock.patch.dict(chunking.CHUNK_BYTES, {"cpu": 64 * 8 * 2 * 36}), traffic() as sent:
        return parallel(sliced(BY_BUDGET.problem("by budget"), 36, rank)), sent


def groups(rank: int) -> dict[str, Any]:
    """A group of this rank alone holds the whole vocabulary; the other's is refused."""
    each = [dist.new_group([r]) for r in range(2)]
    problem = CASES["jsd-beta=0.1"].problem("jsd-beta=0.1")
    x = leaves(problem)
    refused = raised(lambda: loss_of(problem, x, group=each[1 - rank]))
    return {"alone": parallel(problem, group=each[rank]), "foreign group": refused}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for key, case in CASES.items():
        found[key] = parallel(sliced(case.problem(key), case.cut, rank), upstream=-1.7)
    torch.manual_seed(0)
    found |= {
        "gradients": which_gradients(rank),
        "errors": errors(rank),
        "traffic": counted_traffic(rank),
        "groups": groups(rank),
        "by budget": by_budget(rank),
        "sharded": sharded(rank),
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
