"""Sparse teachers: listed tokens and a tail bucket, sampled counts; and no teacher at all."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastkd import (
    DIVERGENCES,
    FusedLinearKDLoss,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    divergence,
    fused_linear_kd,
    gemm,
    kd_loss,
    ops,
)
from fastkd.evaluation import token_metrics
from fastkd.hf import Head
from fastkd.reference import divergence_per_token
from fastkd_kernels import rows_torch

from .divergence_cases import ALL, DEFAULTS, TABLE
from .problems import Problem, assert_close, assert_within_rule, device_reads, fused, make, oracle, relative_error, teacher_logits
from .problems import sparse as _sparse
from .test_compile import STEPS, CompileCounterWithBackend
from .test_loss import _peak_bytes

F64 = torch.float64


def _takes_tail(name, parameters) -> bool:
    tail = DIVERGENCES[name].tail
    return tail is None or tail[1](*({p.name: p.default for p in DIVERGENCES[name].parameters} | parameters).values())


# `alpha_beta` takes a tail where alpha + beta = 1: its default, and one more.
CASES = [case for case in ALL if _takes_tail(*case.values)] + [pytest.param("alpha_beta", {"alpha": 0.2, "beta": 0.8}, id="alpha_beta-0.2")]


# Against the oracle.


@pytest.mark.parametrize(
    ("k", "padding", "tail"), [(1, 0, True), (5, 3, True), (5, 3, False), (36, 0, True), (37, 2, True), (37, 0, False)]
)
@pytest.mark.parametrize(("kd_ratio", "temperature"), [(1.0, 2.5), (0.4, 1.0), (0.4, 2.5), (0.0, 1.0)])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_every_divergence_number_of_tokens_and_mix(name, parameters, kd_ratio, temperature, k, padding, tail):
    problem = make(name, parameters, temperature=temperature, kd_ratio=kd_ratio, chunk_tokens=4)
    problem = _sparse(problem, k, padding=padding, tail=tail)
    assert_close(fused(problem, upstream=-1.7), oracle(problem, upstream=-1.7))


@pytest.mark.parametrize(
    "head",
    [{"bias": True}, {"student_scale": 0.3}, {"student_softcap": 4.0}, {"bias": True, "student_scale": 0.7, "student_softcap": 3.0}],
    ids=lambda head: "+".join(head),
)
@pytest.mark.parametrize("kd_ratio", [1.0, 0.4])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "adaptive_kl"])
def test_heads_and_weights(name, kd_ratio, head):
    weight = torch.rand(13, dtype=F64) * (torch.rand(13) < 0.7)
    problem = _sparse(make(name, kd_ratio=kd_ratio, temperature=1.4, chunk_tokens=5, token_weight=weight, **head), 6, padding=2)
    assert_close(fused(problem), oracle(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", [{"std": 3.0}, {"std": 30.0}, {"close": 0.02}], ids=str)
@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_error_rule(name, parameters, k, how, dtype):
    """At most twice plain torch's error in the same dtype, plus 1e-4, whatever the distance of teacher and student."""
    options = {"std": 8.0, **how}
    problem = make(name, parameters, leading=(48,), width=503, d_student=32, temperature=1.5, kd_ratio=0.9, chunk_tokens=20, **options)
    problem = _sparse(problem, k, padding=2).to(dtype)
    result = fused(problem)
    assert result.loss.dtype == torch.float32
    assert {g.dtype for g in result.gradients.values()} == {dtype}
    assert_within_rule(result, oracle(problem, dtype=None), oracle(problem))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_options(data):
    draw = data.draw
    name, parameters = draw(st.sampled_from([p.values for p in CASES]))
    leading = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    labels = draw(st.booleans())
    options = {
        "temperature": draw(st.floats(0.3, 6.0)),
        "temperature_squared": draw(st.booleans()),
        "kd_ratio": draw(st.floats(0.0, 1.0)) if labels else 1.0,
        "token_weight": draw(st.sampled_from([None, torch.rand(leading, dtype=F64), torch.randint(3, leading).double()])),
        "normalizer": draw(st.sampled_from([None, 17.0, torch.tensor(3.5)])),
        "student_softcap": draw(st.sampled_from([None, 2.0, 30.0])),
    }
    width = draw(st.integers(2, 40))
    problem = make(name, parameters, leading=leading, width=width, labels=labels, masked=draw(st.sampled_from([0.0, 0.4, 1.0])), **options)
    problem = _sparse(problem, draw(st.integers(1, width)), padding=draw(st.integers(0, 3)), tail=draw(st.booleans()))
    problem = problem.with_options(chunk_tokens=draw(st.sampled_from([None, *range(1, math.prod(leading) + 2)])))
    result, truth = fused(problem, upstream=0.7), oracle(problem, upstream=0.7)
    if truth.loss.isinf():  # a tail that rounds to 0
        assert result.loss == truth.loss
    else:
        assert_close(result, truth, 1e-8)


@pytest.mark.parametrize(("name", "parameters"), [case for case in DEFAULTS if case.id != "adaptive_kl"])  # its weights are detached
def test_gradcheck(name, parameters):
    problem = _sparse(make(name, parameters, leading=(4,), width=7, d_student=3, std=1.0, temperature=1.5), 3)

    def loss(hidden, weight):
        return fused_linear_kd(
            hidden, weight, problem.teacher, problem.labels, kd_ratio=0.6, temperature=1.5, chunk_tokens=2, student_softcap=4.0,
            divergence=divergence(name, **parameters),
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)])


# Against the papers' formulas and dense teachers.


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_value_is_the_papers_formula_on_the_buckets(name, parameters):
    if name == "adaptive_kl":
        pytest.skip("its formula makes no difference between a token and the tail; tested below")
    zs, zt = 3 * torch.randn(5, 11, dtype=F64), 3 * torch.randn(5, 11, dtype=F64)
    top = TeacherTopK.from_logits(zt, 4, 1.7)
    expected = []
    for q, p, ids in zip(torch.softmax(zs / 1.7, -1).numpy(), torch.softmax(zt / 1.7, -1).numpy(), top.ids.numpy(), strict=True):
        rest = np.setdiff1d(np.arange(11), ids)
        expected.append(TABLE[name].formula(np.append(p[ids], p[rest].sum()), np.append(q[ids], q[rest].sum()), **parameters))
    chosen = divergence(name, **parameters)
    _, parts = kd_loss(zs, top, divergence=chosen, temperature=1.7, temperature_squared=False, return_parts=True)
    np.testing.assert_allclose(parts.kd_per_token.numpy(), expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(divergence_per_token(zs, top, name, parameters, 1.7).numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("mu", "forward"), [(0.0, 0.1), (0.5, 0.1), (0.7, 0.2), (0.9, 0.2), (0.999, 0.2)])
def test_adaptive_kl_never_has_the_tail_in_its_head(mu, forward):
    p, q = torch.tensor([0.4, 0.3, 0.3], dtype=F64), torch.tensor([0.3, 0.2, 0.5], dtype=F64)  # gaps .1 .1 .2, the tail last
    zs = torch.tensor([[0.3, 0.2, 0.25, 0.25]], dtype=F64).log()
    teacher = TeacherTopK(torch.tensor([[0, 1]]), p[None, :2].log())
    share = forward / 0.4
    expected = share * (p * (p / q).log()).sum() + (1 - share) * (q * (q / p).log()).sum()
    for loss in (kd_loss(zs, teacher, divergence=divergence("adaptive_kl", mu=mu)),
                 divergence_per_token(zs, teacher, "adaptive_kl", {"mu": mu})[0]):  # fmt: skip
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("k", [36, 37])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_all_tokens_or_all_but_one_are_the_dense_teacher(name, parameters, dtype, tail, k):
    """A tail of one token is that token; without a tail, rounding must not make one."""
    if name == "adaptive_kl" and k == 36 and parameters["mu"] > 0.8:
        pytest.skip("the one token of the tail may be in the head of the dense teacher")
    problem = make(name, parameters, kind="logits", temperature=1.3, kd_ratio=0.7, std=1.0).to(dtype)
    sparse = _sparse(problem, k, tail=tail)
    assert_close(fused(sparse), fused(problem), 1e-9 if dtype == F64 else 2e-5)


def test_all_tokens_of_a_larger_teacher_are_renormalised():
    """The student's vocabulary is the shared one, as with dense teachers."""
    problem = make(teacher_width=51)
    log_p = torch.log_softmax(teacher_logits(problem), -1)[:, :37]
    sparse = Problem(problem.hidden, problem.weight, TeacherTopK(torch.arange(37).expand(13, -1), log_p), problem.labels)
    assert_close(fused(sparse), fused(problem))


@pytest.mark.parametrize(("name", "parameters"), [c for c in CASES if c.values[0] != "adaptive_kl"])
def test_lower_bound_that_grows_with_k(name, parameters):
    problem = make(name, parameters, kind="logits", leading=(30,))
    full = float(fused(problem).loss)
    values = [float(fused(_sparse(problem, k)).loss) for k in (1, 4, 12, 30)]
    assert 0 <= values[0] < values[1] < values[2] < values[3] < full + 1e-12


def test_students_whose_tail_is_nearly_nothing_or_all_keep_their_digits():
    """fp32: 1 - sum(q) would be 0, or good to two digits; the gradient in the tail too."""
    zs = torch.zeros(2, 500)
    zs[0, 7], zs[1, 7] = 25.0, -12.0
    teacher = TeacherTopK(torch.tensor([[7], [7]]), torch.tensor([0.9, 1e-5]).log()[:, None])
    for name in ("forward_kl", "reverse_kl", "jsd"):
        z = zs.clone().requires_grad_()
        loss = kd_loss(z, teacher, divergence=name)
        loss.backward()
        double = zs.double().requires_grad_()
        exact = TeacherTopK(teacher.ids, teacher.log_probs.double())
        truth = divergence_per_token(double, exact, name).mean()
        truth.backward()
        torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=1e-6, atol=0)
        tail = torch.arange(500) != 7
        torch.testing.assert_close(z.grad[:, tail].double(), double.grad[:, tail], rtol=2e-4, atol=0)
        torch.testing.assert_close(z.grad[:, 7].double(), double.grad[:, 7], rtol=2e-4, atol=1e-8)


def test_a_tail_that_fp32_cannot_tell_from_zero():
    """A confident teacher: the stored log-probabilities sum to 1, and only `log_tail` knows the rest. The reverse KL needs it."""
    zt = torch.zeros(3, 1000, dtype=F64)
    zt[:, 0] = 40.0
    zs = torch.randn(3, 1000)
    zs[:, 0] = 15.0
    truth = divergence_per_token(zs.double(), TeacherTopK.from_logits(zt, 4), "reverse_kl").mean()
    stored = TeacherTopK.from_logits(zt.float(), 4)
    assert (stored.log_probs[:, 0] == 0).all()
    assert kd_loss(zs, TeacherTopK(stored.ids, stored.log_probs), divergence="reverse_kl").isinf()
    kept = kd_loss(zs, stored, divergence="reverse_kl")
    torch.testing.assert_close(kept.double(), truth, rtol=1e-4, atol=0)


def test_a_row_of_padding_alone_is_all_tail():
    zs = torch.randn(2, 9, requires_grad=True)
    teacher = TeacherTopK(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -math.inf))
    for name in DIVERGENCES:
        loss = kd_loss(zs, teacher, divergence=name)
        (gradient,) = torch.autograd.grad(loss, zs)
        assert float(loss.detach()) < 1e-6
        assert float(gradient.abs().max()) < 1e-6


def test_lists_rounded_to_16_bits():
    """Their sums are off by more than fp32's; they are divided out."""
    problem = _sparse(make(leading=(40,)), 30, tail=False)
    teacher = TeacherTopK(problem.teacher.ids, problem.teacher.log_probs.bfloat16())
    rounded = Problem(problem.hidden, problem.weight, teacher, problem.labels)
    assert float(teacher.log_probs.double().exp().sum(-1).max()) > 1
    assert_close(fused(rounded), oracle(rounded))
    _, parts = fused_linear_kd(problem.hidden, problem.weight, teacher, return_parts=True)
    assert (parts.kd_per_token >= 0).all()


# Sampled counts.


def _draws(zt: torch.Tensor, n: int) -> TeacherTopK:
    """n draws from each row, as counts of the ids that came."""
    drawn = torch.multinomial(torch.softmax(zt, -1), n, replacement=True)
    counts = torch.zeros_like(zt, dtype=torch.int64).scatter_add_(-1, drawn, torch.ones_like(drawn))
    values, ids = counts.sort(-1, descending=True)
    used = int((values > 0).sum(-1).max())
    return TeacherTopK.from_counts(ids[:, :used], values[:, :used])


def test_sampled_gradients_are_unbiased_and_top_k_gradients_are_not():
    width, rows, repeats, n = 12, 3, 4000, 5
    zs, zt = torch.randn(rows, width, dtype=F64), 1.5 * torch.randn(rows, width, dtype=F64)

    def gradient(teacher, times=1):
        z = zs.repeat(times, 1).requires_grad_()
        kd_loss(z, teacher, normalizer=1.0).backward()
        return z.grad.view(times, rows, width)

    truth = gradient(TeacherLogits(zt))[0]
    sampled = gradient(_draws(zt.repeat(repeats, 1), n), repeats)
    error = sampled.mean(0) - truth
    # The draws' own spread says how far the mean may be; fp32 counts add 1e-7.
    allowed = 5 * sampled.std(0) / repeats**0.5 + 1e-6
    assert (error.abs() < allowed).all()
    assert relative_error(sampled.mean(0), truth) < 0.05
    # Top-k alone, normalised to 1 as if there were no tail, as many tokens as came on average.
    top = TeacherTopK.from_logits(zt, 4)
    alone = TeacherTopK(top.ids, top.log_probs - top.log_probs.logsumexp(-1, keepdim=True))
    bias = (gradient(alone)[0] - truth).abs()
    assert float(bias.max()) > 5 * float(allowed.max())
    assert relative_error(gradient(alone)[0], truth) > 0.15


def test_counts_are_frequencies():
    teacher = TeacherTopK.from_counts(torch.tensor([[4, 2, 0]]), torch.tensor([[3, 1, 0]]), 2.0)
    assert teacher.temperature == 2.0
    torch.testing.assert_close(teacher.log_probs.exp(), torch.tensor([[0.75, 0.25, 0.0]]))
    assert (teacher.log_tail == -math.inf).all()
    zs = torch.randn(1, 6)
    expected = 0.75 * math.log(0.75) + 0.25 * math.log(0.25) - (torch.log_softmax(zs / 2, -1)[0, [4, 2]] * torch.tensor([0.75, 0.25])).sum()
    torch.testing.assert_close(kd_loss(zs, teacher, temperature=2.0, temperature_squared=False), expected)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_without_a_tail_a_divergence_is_finite_or_infinite_never_nan(name, parameters):
    infinite = {"reverse_kl": True, "symmetric_kl": parameters.get("ratio") != 1.0, "adaptive_kl": parameters.get("mu") != 1.0}
    at_limit = (name, parameters) in (("jsd", {"beta": 1.0}), ("skew_reverse_kl", {"alpha": 0.0}))
    teacher = _draws(torch.randn(5, 40), 10)
    for dtype in (torch.float32, F64):
        zs = (3 * torch.randn(5, 40, dtype=dtype)).requires_grad_()
        loss = kd_loss(zs, teacher, divergence=divergence(name, **parameters))
        assert not loss.isnan()
        assert bool(loss.isinf()) == (infinite.get(name, False) or at_limit)
        if loss.isfinite():
            loss.backward()
            assert zs.grad.isfinite().all()


# The contract.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_kd_loss_never_overwrites_the_logits(name, parameters, temperature, masked, dtype):
    problem = make(name, parameters, leading=(3, 4), masked=masked, kd_ratio=0.3, temperature=temperature, labels=True)
    problem = _sparse(problem, 9, padding=1)
    logits = (problem.hidden @ problem.weight.T).to(dtype)
    before = logits.clone()
    kept = [t.clone() for t in (problem.teacher.ids, problem.teacher.log_probs, problem.teacher.log_tail)]
    logits.requires_grad_()
    chosen = divergence(name, **parameters)
    loss = kd_loss(logits, problem.teacher, problem.labels, divergence=chosen, chunk_tokens=5, kd_ratio=0.3, temperature=temperature)
    loss.backward()
    assert torch.equal(logits.detach(), before)
    assert all(torch.equal(a, b) for a, b in zip(kept, _lists(problem.teacher), strict=True))
    truth = oracle(
        Problem(before.double(), torch.eye(37, dtype=F64), problem.teacher, problem.labels, None, name, parameters, problem.options)
    )
    tolerance = {F64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert abs(float(loss.detach()) - float(truth.loss)) < tolerance * max(1.0, float(truth.loss))
    assert relative_error(logits.grad, truth.gradients["hidden"]) < tolerance


def _lists(teacher: TeacherTopK):
    return teacher.ids, teacher.log_probs, teacher.log_tail


def test_lists_of_any_layout_and_integer_dtype():
    problem = _sparse(make(leading=(4, 6), kd_ratio=0.5, temperature=2.0), 5)
    ids, log_probs, log_tail = _lists(problem.teacher)
    wide = [torch.cat([t, t[:, :1]], 1) for t in (ids.int(), log_probs, log_tail)]
    shifted = TeacherTopK(*(t[:, :-1] for t in wide[:2]), 2.0, wide[2][:, :-1])
    assert not shifted.ids.is_contiguous()
    again = Problem(problem.hidden, problem.weight, shifted, problem.labels, options=problem.options)
    assert_close(fused(again), fused(problem), 1e-14)
    assert_close(fused(again.with_options(chunk_tokens=3)), fused(problem), 1e-12)


def test_what_is_at_tokens_that_do_not_count_does_not_matter():
    problem = _sparse(make(masked=0.0), 4)
    problem.labels[2:5] = -100
    expected = fused(problem)
    ids, log_probs, log_tail = _lists(problem.teacher)
    ids[2:5], log_probs[2:4], log_probs[4], log_tail[2:5] = 99, math.nan, 3.0, math.nan
    assert_close(fused(problem), expected, 1e-14)
    problem.labels[0], problem.labels[3] = -100, 1
    with pytest.raises(ValueError, match=r"teacher\.ids: .* got 99"):
        fused(problem)


def test_errors_are_found_in_any_block_of_rows(monkeypatch):
    monkeypatch.setattr(ops, "CHECK_ELEMENTS", 12)
    for row in (0, 5, 12):
        problem = _sparse(make(labels=False), 4)
        assert fused(problem).loss.isfinite()
        problem.teacher.ids[row, 1] = problem.teacher.ids[row, 3]
        with pytest.raises(ValueError, match=rf"teacher\.ids: expected distinct .* got {int(problem.teacher.ids[row, 3])} twice"):
            fused(problem)


def test_the_stores_temperature_may_be_the_nearest_fp32_number():
    problem = _sparse(make(temperature=1.1), 4)
    torch.testing.assert_close(fused(problem, temperature=torch.tensor(1.1)).loss, fused(problem).loss)
    with pytest.raises(ValueError, match=r"temperature: expected 1.1, the teacher.temperature .* got 1.3"):
        fused(problem, temperature=torch.tensor(1.3))


def test_the_teacher_receives_no_gradient_and_costs_no_product(monkeypatch):
    problem = _sparse(make(), 4)
    calls = []
    original = gemm.logits
    monkeypatch.setattr(gemm, "logits", lambda *a: calls.append(1) or original(*a))
    problem.teacher.log_probs.requires_grad_()
    fused(problem)
    assert problem.teacher.log_probs.grad is None
    assert len(calls) == 1


@pytest.mark.parametrize("kd_ratio", [1.0, 0.5])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl"])
def test_extra_memory_is_bounded_by_the_chunk(name, gathered, kd_ratio, monkeypatch):
    """The student's chunk buffer alone, the row function's blocks, and checks of blocks of rows."""
    monkeypatch.setattr(rows_torch, "RETAINED_BYTES", 0)
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 1 << 17)
    monkeypatch.setattr(ops, "CHECK_ELEMENTS", 1 << 10)
    width, chunk, d, k = 4000, 256, 16, 8
    extra = {}
    for tokens in (512, 1024):
        problem = make(name, leading=(tokens,), width=width, d_student=d, masked=0.0, kd_ratio=kd_ratio, dtype=torch.float32)
        problem = _sparse(problem, k)
        problem.labels[::2] = -100 if gathered else 0
        hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
        peak = _peak_bytes(
            lambda h=hidden, w=weight, p=problem: fused_linear_kd(
                h, w, p.teacher, p.labels, kd_ratio=kd_ratio, divergence=name, chunk_tokens=chunk
            )
        )
        extra[tokens] = peak - hidden.nbytes - weight.nbytes
    assert (extra[1024] - extra[512]) / 512 < 100, "per-token vectors alone may grow with N"
    # One chunk buffer and not two.
    assert extra[1024] < 1.7 * 4 * chunk * width


@pytest.mark.parametrize("knobs", ["numbers", "tensors"])
def test_one_read_from_the_device_per_call(knobs):
    problem = _sparse(make(leading=(40,), chunk_tokens=3, token_weight=torch.rand(40), temperature=2.0), 6)
    values = {"temperature": 2.0, "kd_ratio": 0.5, "normalizer": 9.0}
    if knobs == "tensors":
        values = {k: torch.tensor(v) for k, v in values.items()}
    with device_reads() as reads:
        result = fused(problem, **values)
    assert result.loss.isfinite()
    assert len(reads) == 1, reads


def test_no_tokens_and_no_counted_token_give_zero():
    for problem in (make(leading=(0,)), make(masked=1.0)):
        result = fused(_sparse(problem, 3))
        assert float(result.loss) == 0
        assert all((g == 0).all() for g in result.gradients.values())


def test_autocast_checkpointing_and_the_module():
    problem = _sparse(make(leading=(24,), width=211, d_student=16, kd_ratio=0.5), 12).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused(problem)
    assert {g.dtype for g in result.gradients.values()} == {torch.float32}
    low = Problem(problem.hidden.bfloat16(), problem.weight.bfloat16(), problem.teacher, problem.labels, options=problem.options)
    assert_within_rule(result, oracle(low, dtype=None), oracle(low))
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    module = FusedLinearKDLoss(kd_ratio=0.5)
    torch.utils.checkpoint.checkpoint(lambda h: module(h, weight, problem.teacher, problem.labels), hidden, use_reentrant=False).backward()
    expected = fused(problem)
    assert torch.equal(hidden.grad, expected.gradients["hidden"])
    assert torch.equal(weight.grad, expected.gradients["weight"])


def test_auto_is_torch_on_the_cpu():
    problem = _sparse(make(), 4).to(torch.float32)
    assert torch.equal(fused(problem, impl="auto").loss, fused(problem, impl="torch").loss)


def test_from_logits():
    logits = 5 * torch.randn(2, 3, 40)
    teacher = TeacherTopK.from_logits(logits, 4, 2.0)
    assert teacher.ids.shape == teacher.log_probs.shape == (2, 3, 4)
    p = torch.softmax(logits.double() / 2, -1)
    torch.testing.assert_close(teacher.log_probs.double().exp(), p.sort(-1, descending=True).values[..., :4], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(teacher.log_tail.double().exp(), p.sort(-1).values[..., :36].sum(-1), rtol=1e-5, atol=0)
    assert TeacherTopK.from_logits(logits.bfloat16(), 4).log_probs.dtype == torch.float32
    for k in (0, 41):
        with pytest.raises(ValueError, match=rf"k: expected a number in \[1, 40\], the vocabulary, got {k}"):
            TeacherTopK.from_logits(logits, k)


# Compiled.


def _compiled_loss(hidden, weight, ids, log_probs, labels, kd_ratio, beta):
    return fused_linear_kd(
        hidden,
        weight,
        TeacherTopK(ids, log_probs, 2.0),
        labels,
        temperature=2.0,
        kd_ratio=kd_ratio,
        divergence=divergence("jsd", beta=beta),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_ramp_of_knobs_is_one_graph(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(_compiled_loss, fullgraph=True, backend=counter)
    problem = _sparse(make(leading=(10,), width=30, temperature=2.0), 5).to(torch.float32)
    tensors = problem.teacher.ids, problem.teacher.log_probs, problem.labels
    graphs = []
    for step in range(STEPS):
        knobs = [torch.tensor(x) for x in (0.1 + 0.04 * step, 0.05 * step)]
        results = []
        for function in (compiled, _compiled_loss):
            leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
            loss = function(*leaves, *tensors, *knobs)
            loss.backward()
            results.append([loss.detach(), *(x.grad for x in leaves)])
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "compiled again after the first step"


def test_counts_and_no_teacher_compile_too():
    def function(hidden, weight, ids, counts, labels):
        sampled = fused_linear_kd(hidden, weight, TeacherTopK.from_counts(ids, counts), labels, kd_ratio=0.5)
        return sampled, fused_linear_kd(hidden, weight, None, labels, kd_ratio=0.0)

    torch._dynamo.reset()
    problem = make(leading=(10,), dtype=torch.float32)
    ids, counts = torch.arange(4).expand(10, -1), torch.randint(0, 5, (10, 4)) + torch.tensor([1, 0, 0, 0])
    arguments = problem.hidden, problem.weight, ids, counts, problem.labels
    got = torch.compile(function, fullgraph=True, backend="eager")(*arguments)
    for x, y in zip(got, function(*arguments), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kind", ["sparse", "none"])
def test_opcheck(kind):
    problem = _sparse(make(leading=(5,), width=11, dtype=torch.float32, temperature=1.5), 3)
    teacher, kd_ratio = problem.teacher, 0.5
    lists = (teacher.log_probs, None, None, teacher.ids, teacher.log_tail)
    absent = "student_softcap teacher_softcap teacher_share normalizer"
    if kind == "none":
        lists, kd_ratio, absent = (None,) * 5, 0.0, f"{absent} teacher_temperature"
    knobs = torch.tensor([1.5, kd_ratio, 1.0, 1.0, 0.0, 1.0, 0.0, 1.5, 0.0, 0.0], dtype=F64)
    arguments = (
        problem.hidden.requires_grad_(), problem.weight.requires_grad_(), None, *lists, problem.labels, None, knobs, absent, "forward_kl",
        "torch", -100, 2, torch.float32, True, True, False,
    )  # fmt: skip
    torch.library.opcheck(ops.kd, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


# No teacher.


@pytest.mark.parametrize("kd_ratio", [0, 0.0, torch.tensor(0.0)], ids=str)
def test_without_a_teacher_the_loss_is_the_cross_entropy(kd_ratio):
    problem = make(leading=(3, 5), bias=True, kd_ratio=0.0, chunk_tokens=4)
    alone = Problem(problem.hidden, problem.weight, None, problem.labels, problem.bias, options=problem.options)
    assert_close(fused(alone, kd_ratio=kd_ratio), fused(problem), 1e-14)
    assert_close(fused(alone), oracle(alone))
    logits = problem.hidden @ problem.weight.T + problem.bias
    loss, parts = kd_loss(logits.requires_grad_(), None, problem.labels, kd_ratio=kd_ratio, return_parts=True)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(logits.detach().flatten(0, 1), problem.labels.flatten())
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(parts.ce, expected)
    assert parts.kd.isnan()
    module = FusedLinearKDLoss(kd_ratio=kd_ratio)(problem.hidden, problem.weight, None, problem.labels, student_bias=problem.bias)
    torch.testing.assert_close(module, expected)


def test_without_a_teacher_there_is_no_divergence():
    problem = make()
    for kd_ratio in (1.0, 0.3, torch.tensor(0.3)):
        with pytest.raises(ValueError, match=r"teacher: kd_ratio = .* needs a teacher, got None"):
            fused_linear_kd(problem.hidden, problem.weight, None, problem.labels, kd_ratio=kd_ratio)
        with pytest.raises(ValueError, match=r"teacher: kd_ratio = .* needs a teacher, got None"):
            kd_loss(torch.randn(13, 37), None, problem.labels, kd_ratio=kd_ratio)
    with pytest.raises(ValueError, match=r"teacher: kd_ratio = .* needs a teacher, got None"):
        oracle(Problem(problem.hidden, problem.weight, None, problem.labels, options={"kd_ratio": 0.3}))


# Evaluation.


def test_token_metrics_of_every_signal(monkeypatch):
    problem = make(leading=(2, 5), std=2.0, dtype=torch.float32)
    head, labels = Head(problem.weight), problem.labels
    counted = labels != -100
    zs, zt = problem.hidden @ problem.weight.T, teacher_logits(problem)
    top = TeacherTopK.from_logits(zt, 4, 2.0)
    arguments = labels, "jsd", {"beta": 0.3}, 2.0
    dense = token_metrics(problem.hidden, head, problem.teacher, *arguments)
    from_logits = token_metrics(problem.hidden, head, TeacherLogits(zt), *arguments)
    monkeypatch.setattr("fastkd.evaluation.CHUNK_BYTES", 4 * 37 * 3)  # three tokens at a time
    sparse = token_metrics(problem.hidden, head, top, *arguments)
    none = token_metrics(problem.hidden, head, None, *arguments)
    for name in dense:
        torch.testing.assert_close(from_logits[name], dense[name])
        assert sparse[name].shape == none[name].shape == labels.shape
    for name in ("ce", "top1"):
        torch.testing.assert_close(sparse[name], dense[name])
        torch.testing.assert_close(none[name], dense[name])
    assert torch.equal(sparse["agree"], dense["agree"])
    torch.testing.assert_close(sparse["kl"][counted], divergence_per_token(zs, top, temperature=2.0)[counted])
    torch.testing.assert_close(sparse["kd"][counted], divergence_per_token(zs, top, "jsd", {"beta": 0.3}, 2.0)[counted])
    assert (sparse["kl"][counted] <= divergence_per_token(zs, zt, temperature=2.0)[counted]).all()
    for name in ("kd", "kl", "agree"):
        assert none[name][counted].isnan().all()
        assert (none[name][~counted] == 0).all()
        assert (sparse[name][~counted] == 0).all()
    with pytest.raises(ValueError, match=r"temperature: expected 2, .*TopK.* got 1"):
        token_metrics(problem.hidden, head, top, labels)
    with pytest.raises(TypeError, match="teacher: expected TeacherHidden"):
        token_metrics(problem.hidden, head, zt, labels)


def test_token_metrics_of_a_hidden_signal_are_as_before():
    problem = make(leading=(2, 5), dtype=torch.float32)
    found = token_metrics(
        problem.hidden, Head(problem.weight), TeacherHidden(problem.teacher.hidden, problem.teacher.weight), problem.labels
    )
    counted = problem.labels != -100
    expected = divergence_per_token(problem.hidden @ problem.weight.T, teacher_logits(problem))
    torch.testing.assert_close(found["kl"][counted], expected[counted])
    assert torch.equal(found["kd"], found["kl"])
