"""Random calls of the losses against the oracle in float64: ``python -m tests.random_cases --cases 10000 [--seed S] [--index I]``.

A case is drawn from (seed, index) alone: everything the losses take, extremes included. The rule is that of `tests.problems`: the error may
be at most twice that of plain torch in the same dtype, plus 1e-4. Cases are small, so that plain torch is often right by luck; what no
implementation can avoid counts in its place where it is larger: the loss computed exactly from logits that are stored in the dtype
asked for, and a gradient's roundings to its own dtype. In float64 the bound is 1e-9.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():  # before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastkd import (
    DIVERGENCES,
    TeacherHidden,
    TeacherInterpolated,
    TeacherLogits,
    TeacherTopK,
    divergence,
    fused_linear_kd,
    kd_loss,
)
from fastkd.reference import final_logits

from .problems import Problem, Result, oracle

F64 = torch.float64
TIGHT = 1e-9  # of float64
BLOCK = 250  # cases that a process checks at a time
TRITON_SHARE = 0.02  # interpreted, each takes as long as many others


@dataclass(frozen=True)
class Case:
    """A call. ``problem`` has its final dtypes; for `kd_loss` its hidden states are the logits, and its weight the identity."""

    problem: Problem
    from_logits: bool
    frozen: frozenset[str]  # of hidden, weight, bias: what requires no gradient
    upstream: float
    as_tensors: frozenset[str]  # knobs that come as 0-d tensors
    text: str

    @property
    def counted(self) -> Tensor:
        weight = self.problem.options.get("token_weight")
        counted = torch.ones(self.problem.hidden.shape[:-1], dtype=torch.bool) if weight is None else weight > 0
        if self.problem.labels is not None:
            counted = counted & (self.problem.labels != self.problem.options["ignore_index"])
        return counted


def draw(seed: int, index: int) -> Case:
    """The case of that seed and index, whatever was drawn before."""
    attempt = 0
    while True:
        rng = random.Random(f"{seed} {index} {attempt}")
        torch.manual_seed(rng.getrandbits(62))
        case = _draw(rng)
        if not _rounding_decides(case):
            return case
        attempt += 1


def _draw(rng: random.Random) -> Case:
    def some(p: float) -> bool:
        return rng.random() < p

    def between(low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high)))

    triton = some(TRITON_SHARE)
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16] if triton else [F64, torch.float32, torch.bfloat16, torch.float16])
    kind = rng.choice(["hidden", "hidden", "logits", "logits", "topk", "topk", "counts"])
    definition = rng.choice(list(DIVERGENCES.values()))
    parameters = _parameters(rng, definition, tail=kind in ("topk", "counts"))
    from_logits = some(0.3)
    leading = tuple(rng.randint(1, 6) for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])))
    if some(0.1) and not triton:
        leading = (rng.randint(40, 150),)
    elif some(0.01):
        leading = (0, *leading)
    tokens = math.prod(leading)
    width = rng.choice([rng.randint(1, 12), rng.randint(2, 70), rng.randint(2, 70), rng.randint(200, 700)])
    if some(0.03) and not triton:
        width = rng.randint(1000, 5000)
    teacher_width = width if some(0.6) or kind in ("topk", "counts") else rng.randint(1, 2 * width)
    d_student, d_teacher = rng.randint(1, 24), rng.randint(1, 24)
    std, teacher_std = between(0.01, 30.0), between(0.01, 30.0)
    close = between(1e-4, 0.3) if some(0.35) and kind != "counts" else None
    other = rng.choice([torch.float32, torch.bfloat16, dtype]) if some(0.15) and dtype != F64 else dtype  # the teacher's dtype

    hidden = torch.randn(*leading, d_student, dtype=F64)
    weight = torch.randn(width, d_student, dtype=F64) * (std / d_student**0.5)
    bias = torch.randn(width, dtype=F64) if some(0.3) else None
    cap = rng.choice([None, None, None, 2.0, 30.0])
    scale = rng.choice([1.0, 1.0, 1.0, 0.3, -0.7, 1.9])
    if close is not None:
        t_hidden, t_weight, t_bias, t_cap, t_scale = hidden + close * torch.randn_like(hidden), weight.clone(), bias, cap, scale
        teacher_width = width
    else:
        t_hidden = torch.randn(*leading, d_teacher, dtype=F64)
        t_weight = torch.randn(teacher_width, d_teacher, dtype=F64) * (teacher_std / d_teacher**0.5)
        t_bias = torch.randn(teacher_width, dtype=F64) if some(0.3) else None
        t_cap, t_scale = rng.choice([None, None, 2.0, 30.0]), rng.choice([1.0, 1.0, 0.3, -0.7, 1.9])
    if from_logits:  # the student's scale and softcap are still the loss's to apply
        hidden, weight, bias = hidden @ weight.T + (0 if bias is None else bias), torch.eye(width, dtype=F64), None
    hidden, weight, bias = (None if x is None else x.to(dtype) for x in (hidden, weight, bias))

    temperature = 1.0 if some(0.3) else between(0.2, 8.0)
    teacher, teacher_text = _teacher(rng, kind, TeacherHidden(t_hidden, t_weight, t_bias, t_cap, t_scale), temperature, other)
    if kind in ("hidden", "logits") and some(0.2):
        share = rng.choice([0.0, 1.0, 1e-3, 0.999, rng.random(), rng.random(), rng.random()])
        teacher = TeacherInterpolated(teacher, torch.tensor(share, dtype=F64) if some(0.3) else share)
        teacher_text = f"{share} of {teacher_text}"

    labels = None
    kd_ratio, ignore = 1.0, rng.choice([-100, -100, -1, 0])
    if some(0.75):
        labels = torch.randint(width, leading)
        labels[torch.rand(leading) < (1.0 if some(0.03) else rng.choice([0.0, 0.2, 0.5]))] = ignore
        kd_ratio = 0.0 if some(0.1) else rng.choice([1.0, rng.random(), rng.random()])
        if kd_ratio == 0.0 and some(0.3):
            teacher, teacher_text = None, "no teacher"
    token_weight = None
    if some(0.4):
        token_weight = torch.rand(leading, dtype=F64) * rng.choice([1.0, 1e-3, 50.0])
        token_weight = (token_weight * (torch.rand(leading) < (0.0 if some(0.03) else rng.choice([1.0, 0.7])))).to(dtype)
    options: dict[str, Any] = {
        "temperature": temperature,
        "temperature_squared": some(0.7),
        "kd_ratio": kd_ratio,
        "token_weight": token_weight,
        "normalizer": rng.choice([None, None, 17.0, between(0.3, 1e4)]),
        "student_softcap": cap,
        "student_scale": scale,
        "ignore_index": ignore,
        "chunk_tokens": None if some(0.3) else rng.randint(1, tokens + 2),
        "impl": "triton" if triton else rng.choice(["auto", "torch"]),
        "logits_dtype": dtype if some(0.15) and definition.statistic is None else None,
    }
    names = ["hidden"] if from_logits else ["hidden", "weight"] + ["bias"] * (bias is not None)
    frozen = frozenset(rng.sample(names, rng.randint(0, len(names) - 1))) if some(0.25) else frozenset()
    as_tensors = frozenset(k for k in ("temperature", "kd_ratio", "normalizer", *parameters) if some(0.2))
    upstream = rng.choice([1.0, 1.0, -1.7, 0.01, 30.0])
    problem = Problem(hidden, weight, teacher, labels, bias, definition.name, parameters, options)
    shown = {k: f"of shape {list(v.shape)}" if isinstance(v, Tensor) else v for k, v in options.items()}
    text = ", ".join(
        (
            f"{'kd_loss' if from_logits else 'fused_linear_kd'} {definition.name} {parameters}",
            f"{dtype} leading {list(leading)} V {width} D {d_student} std {std:.3g} close {close}",
            f"bias {bias is not None} labels {labels is not None}",
            f"teacher ({teacher_text}, V {teacher_width} std {teacher_std:.3g})",
            f"{shown}, frozen {sorted(frozen)}, 0-d tensors {sorted(as_tensors)}, upstream {upstream}",
        )
    )
    return Case(problem, from_logits, frozen, upstream, as_tensors, text)


def _parameters(rng: random.Random, definition, tail: bool) -> dict[str, float]:
    """Values inside the domains, at their closed ends and just inside; with a tail such that the divergence takes one."""

    def one(p) -> float:
        low, high = max(p.low, 0.05 if p.low_open else 0.0), min(p.high, 2.5)
        ends = [p.low] * (not p.low_open) + [p.high] * (not p.high_open and math.isfinite(p.high))
        inside = [low + 1e-3 * (high - low), high - 1e-3 * (high - low)]
        return rng.choice([p.default, rng.uniform(*inside), rng.uniform(*inside), rng.choice(ends or inside), rng.choice(inside)])

    values = [one(p) for p in definition.parameters]
    if tail and definition.tail is not None and not definition.tail[1](*values):
        values = [p.default for p in definition.parameters]
        if len(values) == 2 and definition.tail[1](0.25, 0.75) and rng.random() < 0.5:
            values = [0.25, 0.75]
    return {p.name: v for p, v in zip(definition.parameters, values, strict=True)}


def _teacher(rng: random.Random, kind: str, full: TeacherHidden, temperature: float, dtype: torch.dtype) -> tuple[Any, str]:
    """A signal of that kind and the words for it. Lists of tokens may come in fp32 beside 16-bit students."""
    text = f"{kind} {dtype}"
    if kind == "hidden":
        bias = None if full.bias is None else full.bias.to(dtype)
        text += f" bias {bias is not None} softcap {full.softcap} scale {full.scale}"
        return TeacherHidden(full.hidden.to(dtype), full.weight.to(dtype), bias, full.softcap, full.scale), text
    logits = full.scale * (full.hidden @ full.weight.T + (0 if full.bias is None else full.bias))
    logits = logits if full.softcap is None else full.softcap * torch.tanh(logits / full.softcap)
    width = logits.shape[-1]
    if kind == "logits":
        if width > 1 and rng.random() < 0.15:
            out = torch.rand_like(logits) < 0.2
            out[..., 0] = False
            return TeacherLogits(logits.masked_fill(out, -math.inf).to(dtype)), text + " with -inf"
        return TeacherLogits(logits.to(dtype)), text
    if kind == "counts":
        probabilities = torch.softmax(logits / temperature, -1)
        drawn = torch.multinomial(probabilities.reshape(-1, width), rng.randint(1, 40), replacement=True)
        counts = torch.zeros(drawn.shape[0], width, dtype=torch.int64).scatter_add_(-1, drawn, torch.ones_like(drawn))
        counts, ids = counts.view(logits.shape).sort(-1, descending=True)
        keep = max(1, int((counts > 0).sum(-1).max())) if counts.numel() else 1
        return TeacherTopK.from_counts(ids[..., :keep], counts[..., :keep], temperature), text
    k, padding, tail = rng.randint(1, width), rng.choice([0, 0, 3]), rng.random() < 0.7
    top = TeacherTopK.from_logits(logits, k, temperature)
    ids, log_probs = top.ids, top.log_probs
    if padding:
        ids = torch.cat([ids, torch.randint(width, (*ids.shape[:-1], padding))], -1)
        log_probs = torch.cat([log_probs, log_probs.new_full((*log_probs.shape[:-1], padding), -math.inf)], -1)
        order = torch.randperm(k + padding)
        ids, log_probs = ids[..., order], log_probs[..., order]
    store = torch.promote_types(dtype, torch.float32) if rng.random() < 0.5 else dtype
    log_tail = top.log_tail.to(store) if tail and top.log_tail is not None else None
    ids = ids.int() if rng.random() < 0.3 else ids
    return TeacherTopK(ids, log_probs.to(store), temperature, log_tail), f"{text} {store} K {k} padding {padding} log_tail {tail}"


def _rounding_decides(case: Case) -> bool:
    """Whether adaptive_kl's head depends on the last digits of a probability: no error bound holds then, for anyone."""
    problem = case.problem
    if DIVERGENCES[problem.name].statistic is None or problem.teacher is None:
        return False
    temperature, mu = problem.options["temperature"], problem.parameters["mu"]
    teacher = problem.to(F64).teacher
    if isinstance(teacher, TeacherTopK):
        log_p = teacher.log_probs
    else:
        given, share = (teacher.teacher, float(teacher.share)) if isinstance(teacher, TeacherInterpolated) else (teacher, 1.0)
        logits = given.logits if isinstance(given, TeacherLogits) else final_logits(**vars(given))
        width = min(logits.shape[-1], problem.weight.shape[0])
        logits = logits[..., :width]
        if share < 1:
            exact, options = problem.to(F64), problem.options
            own = final_logits(exact.hidden, exact.weight, exact.bias, options["student_softcap"], options["student_scale"])
            logits = own[..., :width] + (share * (logits - own[..., :width]) if share else 0)
        log_p = torch.log_softmax(logits / temperature, -1)
    log_p = log_p.sort(-1, descending=True).values
    mass = log_p.exp().cumsum(-1)
    margin = 3e-6 if problem.hidden.dtype != F64 else 1e-12
    first = torch.arange(mass.shape[-1] - 1) == 0  # always in the head
    edge = ((mass[..., :-1] <= mu) | first) & (mass[..., 1:] > mu)  # the last token in the head, and the next one out
    tied = ((log_p[..., :-1] - log_p[..., 1:]) < 1e-4) & edge
    return bool(((mass - mu).abs() < margin).any() or tied.any())


# The call, and what it may be wrong by.


def call(case: Case) -> tuple[Result, Any]:
    problem = case.problem
    leaves = {"hidden": problem.hidden, "weight": None if case.from_logits else problem.weight, "bias": problem.bias}
    x = {k: v.detach().clone().requires_grad_(k not in case.frozen) for k, v in leaves.items() if v is not None}
    options, parameters = (
        {k: torch.tensor(v, dtype=F64) if k in case.as_tensors and v is not None else v for k, v in given.items()}
        for given in (problem.options, problem.parameters)
    )
    options |= {"divergence": divergence(problem.name, **parameters), "return_parts": True}
    if case.from_logits:
        loss, parts = kd_loss(x["hidden"], problem.teacher, problem.labels, **options)
    else:
        loss, parts = fused_linear_kd(x["hidden"], x["weight"], problem.teacher, problem.labels, student_bias=x.get("bias"), **options)
    loss.backward(torch.tensor(case.upstream, dtype=loss.dtype))
    return Result(loss.detach(), {k: v.grad for k, v in x.items() if v.grad is not None}), parts


def _from_stored_logits(case: Case) -> Result:
    """Exact arithmetic, but for logits that are right to two units in fp32's last place and then stored, as dz, in the dtype asked for."""
    problem = case.problem
    stored = problem.options["logits_dtype"] or torch.promote_types(problem.hidden.dtype, torch.float32)
    exact = problem.to(F64)
    hidden, weight = exact.hidden, exact.weight

    def product(hidden, weight):
        x = hidden @ weight.T
        return (x * (1 + 2 * torch.finfo(torch.float32).eps * torch.randn_like(x))).to(stored).double()

    def store(teacher):
        if isinstance(teacher, TeacherInterpolated):
            return TeacherInterpolated(store(teacher.teacher), teacher.share)
        if not isinstance(teacher, TeacherHidden):
            return teacher
        x = product(teacher.hidden, teacher.weight)
        return TeacherLogits(final_logits(x, torch.eye(x.shape[-1], dtype=F64), teacher.bias, teacher.softcap, teacher.scale))

    logits = replace(exact, hidden=product(hidden, weight), weight=torch.eye(weight.shape[0], dtype=F64), teacher=store(exact.teacher))
    result = oracle(logits, case.upstream)
    dz = result.gradients["hidden"]
    if stored.itemsize == 2 and dz.numel():
        largest = dz.abs().max().clamp(min=1e-300)
        dz = (dz / largest).to(stored).double() * largest
    flat = dz.reshape(-1, dz.shape[-1])
    gradients = {"hidden": dz @ weight, "weight": flat.T @ hidden.reshape(-1, hidden.shape[-1]), "bias": flat.sum(0)}
    return Result(result.loss, gradients)


def _rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """The largest norm of what two roundings to ``dtype`` may change, the first at any scale."""
    size = truth.abs().max()
    if not size > 0:
        return 0.0
    scales = (2 ** torch.linspace(0, 0.97, 16, dtype=F64)) / size
    return max(float((((truth * s).to(dtype).double() / s).to(dtype).double() - truth).norm()) for s in scales)


def _scales(case: Case) -> tuple[float, dict[str, float]]:
    """What multiplies one nat per token in the loss, and the norm that each gradient has where student and teacher differ a lot.

    A gradient that is nearly 0 beside that norm is a difference of rounded numbers; only its absolute size can be asked for.
    """
    options, problem = case.problem.options, case.problem
    weight = options["token_weight"]
    w = torch.ones(problem.hidden.shape[:-1], dtype=F64) if weight is None else weight.double()
    w = w * case.counted
    total = float(w.sum()) if options["normalizer"] is None else options["normalizer"]
    if not total:
        return 1.0, dict.fromkeys(("hidden", "weight", "bias"), 1.0)
    t, r = options["temperature"], options["kd_ratio"]
    factor = t**2 if options["temperature_squared"] else 1.0
    nat = float(w.sum()) / total * (r * factor + 1 - r)
    dz = abs(case.upstream) / total * (r * factor / t + 1 - r) * abs(options["student_scale"])
    hidden = problem.hidden.double()
    row = 1.0 if case.from_logits else float(problem.weight.double().square().sum(-1).mean().sqrt())
    return nat, {
        "hidden": dz * row * float(w.square().sum().sqrt()),
        "weight": dz * float((w.square() * hidden.square().sum(-1)).sum().sqrt()),
        "bias": dz * float(w.square().sum().sqrt()),
    }


class Outcome(NamedTuple):
    """share: the largest error as a share of its bound. lucky: whether twice plain torch's own error plus 1e-4 was less than the error."""

    share: float
    text: str
    lucky: bool = False


def check(case: Case) -> Outcome:
    """The error of a case.

    Raises:
        AssertionError: an error over its bound, a NaN, a gradient that is missing or in the wrong dtype, parts that do not add up.
    """
    problem = case.problem
    truth = oracle(problem, case.upstream)
    result, parts = call(case)
    expected = {k for k in truth.gradients if k not in case.frozen and not (case.from_logits and k == "weight")}
    assert result.gradients.keys() == expected, f"gradients of {sorted(result.gradients)}, expected {sorted(expected)}"
    dtype = problem.hidden.dtype
    assert result.loss.dtype == torch.promote_types(dtype, torch.float32), f"loss in {result.loss.dtype}"
    assert all(g.dtype == dtype for g in result.gradients.values()), f"gradients in {[g.dtype for g in result.gradients.values()]}"
    counted = case.counted
    assert int(parts.tokens) == int(counted.sum()), f"{int(parts.tokens)} tokens, expected {int(counted.sum())}"
    if not counted.any():
        assert float(result.loss) == 0, f"loss {float(result.loss)} of no token"
        assert not any(g.any() for g in result.gradients.values()), "gradients of no token"
        return Outcome(0.0, "no token")
    if not math.isfinite(float(truth.loss)):
        assert float(result.loss) == float(truth.loss), f"loss {float(result.loss)}, expected {float(truth.loss)}"
        return Outcome(0.0, "infinite")
    _check_parts(case, result, parts)

    errors = _errors(case, result, truth)
    worst = max(errors, key=lambda k: errors[k].off / errors[k].allowed if math.isfinite(errors[k].off) else math.inf)
    text = f"{worst}: off by {errors[worst].off:.3g}, allowed {errors[worst].allowed:.3g}"
    assert errors[worst].off <= errors[worst].allowed, text
    return Outcome(errors[worst].off / errors[worst].allowed, text, any(e.off > e.by_plain for e in errors.values()))


class _Error(NamedTuple):
    """by_plain: what plain torch alone would allow."""

    off: float
    allowed: float
    by_plain: float


def _errors(case: Case, result: Result, truth: Result) -> dict[str, _Error]:
    """Of the loss in nats, and of the gradients that came relative to their size."""
    dtype, value = case.problem.hidden.dtype, float(truth.loss)
    nat, norms = _scales(case)
    exact = dtype == F64
    # Triton's interpreter narrows to bf16 by cutting digits off, up to a unit in the last place; a GPU rounds.
    interpreted = case.problem.options["impl"] == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    cut = torch.finfo(dtype).eps / 2 if interpreted else 0.0
    # Plain torch first, then what nobody can do better.
    others = [] if exact else [oracle(case.problem, case.upstream, dtype=None), _from_stored_logits(case), _from_stored_logits(case)]

    def error(off: list[float], rounding: float, unit: float) -> _Error:
        if exact:
            return _Error(off[0], TIGHT * unit, math.inf)
        known = [x for x in (*off[1:], rounding) if math.isfinite(x)]
        return _Error(off[0], 2 * max(known) + 1e-4 * unit, 2 * off[1] + 1e-4 * unit)

    rounding = abs(value) * torch.finfo(torch.float32).eps
    found = {"loss": error([abs(float(x.loss) - value) for x in (result, *others)], rounding, max(nat, abs(value)) if exact else nat)}
    for name, gradient in truth.gradients.items():
        if name not in result.gradients or not gradient.to(dtype).isfinite().all():  # too large for the dtype
            continue
        size = max(float(gradient.norm()), 1e-3 * norms[name])  # see _scales
        off = [float((x.gradients[name].double() - gradient).norm()) / size for x in (result, *others)]
        found[f"gradient of {name}"] = error(off, (_rounding(gradient, dtype) + cut * float(gradient.norm())) / size, 1.0)
    return found


def _check_parts(case: Case, result: Result, parts) -> None:
    """The terms per token, weighted and added up, are the loss; a term whose share is 0 is nan."""
    options = case.problem.options
    weight = options["token_weight"]
    w = case.counted.double() if weight is None else weight.double() * case.counted
    total = 0.0
    for share, mean, per_token in (
        (options["kd_ratio"], parts.kd, parts.kd_per_token),
        (1 - options["kd_ratio"], parts.ce, parts.ce_per_token),
    ):
        assert per_token.shape == w.shape, f"a term per token of shape {list(per_token.shape)}"
        if share == 0:
            assert mean.isnan(), "a term whose share is 0 has a mean"
            continue
        assert not per_token[~case.counted].any(), "a token that does not count has a term"
        average = float(per_token.double().sum() / case.counted.sum())
        assert math.isclose(float(mean), average, rel_tol=1e-5, abs_tol=1e-30), f"mean {float(mean):.9g}, the terms' {average:.9g}"
        total += share * float((w * per_token.double()).sum())
    total /= float(w.sum()) if options["normalizer"] is None else options["normalizer"]
    loss = float(result.loss)
    assert math.isclose(loss, total, rel_tol=1e-5, abs_tol=1e-30), f"parts add up to {total:.9g}, loss {loss:.9g}"


def run(cases: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Check ``cases`` cases from index ``first`` on; the worst ten and all failures."""
    worst: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    for index in range(first, first + cases):
        case = draw(seed, index)
        for kind in (case.problem.name, str(case.problem.hidden.dtype), case.problem.options["impl"], type(case.problem.teacher).__name__):
            kinds[kind] += 1
        try:
            outcome = check(case)
        except Exception as error:  # any other error is as much of a failure
            failures.append({"index": index, "error": f"{type(error).__name__}: {error}", "case": case.text})
            print(f"seed {seed} index {index}: {type(error).__name__}: {error}\n  {case.text}", file=sys.stderr, flush=True)
            continue
        kinds[outcome.text if outcome.text in ("no token", "infinite") else "compared"] += 1
        kinds["over twice plain torch's own error plus 1e-4"] += outcome.lucky
        row = {"share_of_bound": outcome.share, "index": index, "error": outcome.text, "case": case.text}
        worst = sorted([*worst, row], key=lambda r: -r["share_of_bound"])[:10]
    return {"cases": cases, "failures": failures, "kinds": kinds, "worst": worst}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_cases", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--index", type=int, help="check this one case alone")
    parser.add_argument("--out", type=Path, help="folder of random-cases.json; without it nothing is written")
    options = parser.parse_args(argv)
    if options.index is not None:
        case = draw(options.seed, options.index)
        print(case.text)
        print(check(case).text)
        return 0
    from benchmarks.run import stamp

    torch.set_num_threads(1)
    report = stamp(argv, "cpu", "tests/random_cases.py")
    began, parts = time.perf_counter(), []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        blocks = [(min(BLOCK, options.cases - first), options.seed, first) for first in range(0, options.cases, BLOCK)]
        for part in pool.map(run, *zip(*blocks, strict=True)):
            parts.append(part)
            done, failed = sum(p["cases"] for p in parts), sum(len(p["failures"]) for p in parts)
            print(f"{done} cases, {time.perf_counter() - began:.0f} s, {failed} failures", file=sys.stderr, flush=True)
    worst = sorted((row for part in parts for row in part["worst"]), key=lambda row: -row["share_of_bound"])
    kinds = sum((Counter(part["kinds"]) for part in parts), Counter())
    report |= {"cases": done, "seed": options.seed, "seconds": time.perf_counter() - began, "kinds": dict(sorted(kinds.items()))}
    report |= {"failures": [f for part in parts for f in part["failures"]], "worst": worst[:10]}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "random-cases.json").write_text(json.dumps(report, indent=1) + "\n")
    top = report["worst"][0]
    print(f"{options.cases} cases, {report['seconds']:.0f} s, {len(report['failures'])} failures")
    print(f"worst: index {top['index']}, {top['error']}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
