"""The fused loss in torch against the float64 oracle, and the contract's promises."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from fastkd import DIVERGENCES, FusedLinearKDLoss, TeacherHidden, TeacherLogits, TeacherTopK, divergence, fused_linear_kd, gemm, kd_loss
from fastkd_kernels import rows_torch

from .divergence_cases import ALL, DEFAULTS
from .problems import Problem, assert_close, assert_within_rule, device_reads, fused, make, oracle, relative_error

F64 = torch.float64


# Against the oracle.


@pytest.mark.parametrize("kd_ratio", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_every_divergence_signal_and_mix(name, parameters, kind, temperature, kd_ratio):
    problem = make(name, parameters, kind=kind, temperature=temperature, kd_ratio=kd_ratio, chunk_tokens=4)
    assert_close(fused(problem, upstream=-1.7), oracle(problem, upstream=-1.7))


@pytest.mark.parametrize(("width", "teacher_width"), [(37, 37), (37, 51), (51, 37)])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.4])
@pytest.mark.parametrize(
    "head",
    [
        {},
        {"bias": True},
        {"student_scale": 0.3},
        {"student_softcap": 4.0},
        {"teacher_head": {"softcap": 5.0, "scale": 1.7}},
        {"bias": True, "student_scale": 0.7, "student_softcap": 3.0, "teacher_head": {"softcap": 2.0, "scale": 0.5}},
    ],
    ids=lambda head: "+".join(head) or "plain",
)
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "adaptive_kl"])
def test_heads_and_unequal_vocabularies(name, head, kd_ratio, width, teacher_width):
    problem = make(name, width=width, teacher_width=teacher_width, kd_ratio=kd_ratio, temperature=1.4, chunk_tokens=5, **head)
    assert_close(fused(problem), oracle(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", [{"std": 3.0}, {"std": 30.0}, {"close": 0.02}], ids=str)
@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_error_rule(name, parameters, how, dtype):
    """At most twice plain torch's error in the same dtype, plus 1e-4, whatever the distance of teacher and student."""
    options = {"std": 8.0, **how}
    problem = make(name, parameters, leading=(48,), width=503, d_student=32, temperature=1.5, kd_ratio=0.9, chunk_tokens=20, **options)
    problem = problem.to(dtype)
    result = fused(problem)
    assert result.loss.dtype == torch.float32
    assert {g.dtype for g in result.gradients.values()} == {dtype}
    assert_within_rule(result, oracle(problem, dtype=None), oracle(problem))


def test_error_rule_at_an_odd_vocabulary():
    problem = make(leading=(7,), width=50257, d_student=24, std=8.0, temperature=2.0, kd_ratio=0.5, chunk_tokens=3).to(torch.float32)
    assert_within_rule(fused(problem), oracle(problem, dtype=None), oracle(problem))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_options(data):
    draw = data.draw
    name, parameters = draw(st.sampled_from([p.values for p in ALL]))
    leading = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    tokens = max(1, torch.Size(leading).numel())
    torch.manual_seed(draw(st.integers(0, 1000)))
    labels = draw(st.booleans())
    options = {
        "temperature": draw(st.floats(0.3, 6.0)),
        "temperature_squared": draw(st.booleans()),
        "kd_ratio": draw(st.floats(0.0, 1.0)) if labels else 1.0,
        "token_weight": draw(st.sampled_from([None, torch.rand(leading, dtype=F64), torch.randint(3, leading).double()])),
        "normalizer": draw(st.sampled_from([None, 17.0, torch.tensor(3.5)])),
        "student_softcap": draw(st.sampled_from([None, 2.0, 30.0])),
        "student_scale": draw(st.sampled_from([1.0, 0.0625, 2.0])),
    }
    problem = make(
        name, parameters, leading=leading, width=draw(st.integers(2, 40)), teacher_width=draw(st.integers(2, 40)),
        d_student=draw(st.integers(1, 6)), d_teacher=draw(st.integers(1, 6)), kind=draw(st.sampled_from(["hidden", "logits"])),
        labels=labels, masked=draw(st.sampled_from([0.0, 0.4, 1.0])), bias=draw(st.booleans()), **options,
    )  # fmt: skip
    problem = problem.with_options(chunk_tokens=draw(st.sampled_from([None, *range(1, tokens + 2)])))
    assert_close(fused(problem, upstream=0.7), oracle(problem, upstream=0.7), 1e-8)


# Not adaptive_kl: its weights are detached, and finite differences see them move. The reference is checked with frozen ones.
@pytest.mark.parametrize(("name", "parameters"), [case for case in DEFAULTS if case.id != "adaptive_kl"])
def test_gradcheck_of_the_loss(name, parameters):
    problem = make(name, parameters, leading=(4,), width=7, d_student=3, std=1.0, bias=True)

    def loss(hidden, weight, bias):
        return fused_linear_kd(
            hidden, weight, problem.teacher, problem.labels, student_bias=bias, kd_ratio=0.6, temperature=1.5, chunk_tokens=2,
            divergence=divergence(name, **parameters), student_softcap=4.0, student_scale=1.2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)])


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_teacher_logits_of_minus_infinity(name, parameters):
    """Probability 0: an infinite divergence where the student has mass there, a finite one and finite gradients elsewhere."""
    problem = make(name, parameters, kind="logits", labels=False)
    problem.teacher.logits[:, 5:9] = -torch.inf
    for dtype in (F64, torch.float32):
        result, truth = fused(problem.to(dtype)), oracle(problem.to(dtype))
        assert not result.loss.isnan()
        assert result.loss.isinf() == truth.loss.isinf()
        if truth.loss.isfinite():
            assert_close(result, truth, 1e-9 if dtype == F64 else 1e-4)
    infinite = {"reverse_kl": True, "symmetric_kl": parameters.get("ratio") != 1.0, "adaptive_kl": parameters.get("mu") != 1.0}
    at_limit = (name, parameters) in (("jsd", {"beta": 1.0}), ("skew_reverse_kl", {"alpha": 0.0}))
    assert bool(result.loss.isinf()) == (infinite.get(name, False) or at_limit)


@pytest.mark.parametrize("kd_ratio", [1.0, 0.4])
def test_infinite_divergence_of_a_masked_token_does_not_count(kd_ratio):
    problem = make("reverse_kl", kind="logits", kd_ratio=kd_ratio)
    problem.labels[:3] = -100
    problem.labels[3:] = 1
    problem.teacher.logits[:3, 0] = -torch.inf
    problem.hidden[:3] = torch.nan
    result = fused(problem)
    assert result.loss.isfinite()
    assert all(g.isfinite().all() for g in result.gradients.values())
    assert (result.gradients["hidden"][:3] == 0).all()
    assert_close(result, oracle(problem))


def test_the_oracle_leaves_out_what_is_masked_from_topk():
    problem = make("reverse_kl", kind="logits")
    topk = TeacherTopK.from_logits(problem.teacher.logits, 5)
    problem = replace(problem, teacher=topk)
    problem.labels[:3], problem.labels[3:] = -100, 1
    truth = oracle(problem)
    topk.log_probs[:3, 0], topk.log_tail[:3] = 0.0, -torch.inf  # no probability for the rest, where the student has some
    for result in (fused(problem), oracle(problem)):
        assert_close(result, truth)


# What counts.


@pytest.mark.parametrize("normalizer", [None, 0.0, 5.0, torch.tensor(0.0), torch.tensor(torch.nan)], ids=str)
@pytest.mark.parametrize("how", ["labels", "weights", "no tokens"])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.5, 0.0])
def test_no_counted_token_gives_zero(kd_ratio, how, normalizer):
    problem = make(leading=(0,) if how == "no tokens" else (6,), bias=True, kd_ratio=kd_ratio, normalizer=normalizer)
    if how == "labels":
        problem.labels.fill_(-100)
    elif how == "weights":
        problem = problem.with_options(token_weight=torch.zeros(6))
    result = fused(problem)
    assert float(result.loss) == 0
    assert result.gradients.keys() == {"hidden", "weight", "bias"}
    assert all((g == 0).all() for g in result.gradients.values())


def test_kd_loss_without_counted_token_gives_zero():
    logits = torch.randn(4, 9, requires_grad=True)
    kd_loss(logits, TeacherLogits(torch.randn(4, 9)), torch.full((4,), -100)).backward()
    assert (logits.grad == 0).all()


def test_ignore_index_can_be_any_number():
    problem = make(masked=0.0, kd_ratio=0.5)
    problem.labels[:4] = 7
    as_default = problem.labels.masked_fill(problem.labels == 7, -100)
    moved = Problem(problem.hidden, problem.weight, problem.teacher, as_default, options={"kd_ratio": 0.5})
    assert_close(fused(problem, ignore_index=7), fused(moved), 1e-15)


def test_normaliser_counts_what_counts_and_not_all_tokens():
    problem = make(leading=(4, 5), masked=0.5, kd_ratio=0.4)
    counted = int((problem.labels != -100).sum())
    assert 0 < counted < 20
    mean, total = fused(problem), fused(problem, normalizer=1.0)
    torch.testing.assert_close(mean.loss * counted, total.loss)
    for name in mean.gradients:
        torch.testing.assert_close(mean.gradients[name] * counted, total.gradients[name])
    as_tensor = fused(problem, normalizer=torch.tensor(float(counted), dtype=F64))
    assert_close(as_tensor, mean, 1e-14)
    integer = fused(problem, normalizer=torch.tensor(counted))
    assert_close(integer, mean, 1e-14)


def test_micro_batches_with_the_global_normaliser_are_the_batch():
    """Gradient accumulation over unequal micro-batches, one of them without a counted token."""
    problem = make(leading=(12,), kd_ratio=0.5, masked=0.3)
    problem.labels[8:] = -100
    whole = fused(problem)
    counted = float((problem.labels != -100).sum())
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
        teacher = TeacherHidden(problem.teacher.hidden[part], problem.teacher.weight)
        loss = fused_linear_kd(hidden[part], weight, teacher, problem.labels[part], kd_ratio=0.5, normalizer=counted)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(whole.loss), rel=1e-12)
    torch.testing.assert_close(hidden.grad, whole.gradients["hidden"])
    torch.testing.assert_close(weight.grad, whole.gradients["weight"])


def test_token_weights_are_weights():
    weight = torch.tensor([0.0, 2.0, 1.0, 0.0, 0.5])
    problem = make(leading=(5,), masked=0.0, kd_ratio=0.3, token_weight=weight)
    assert_close(fused(problem), oracle(problem))
    scaled = fused(problem.with_options(token_weight=1e4 * weight))
    assert_close(scaled, fused(problem), 1e-12)
    _, parts = _with_parts(problem)
    assert int(parts.tokens) == 3
    assert (parts.kd_per_token[weight == 0] == 0).all()
    # The means in parts are over counted tokens, unweighted.
    torch.testing.assert_close(parts.kd, parts.kd_per_token.sum() / 3)


# Gradients.


def test_retain_graph_gives_the_same_gradient_twice():
    problem = make(kd_ratio=0.5)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    loss = fused_linear_kd(hidden, weight, problem.teacher, problem.labels, kd_ratio=0.5)
    first = torch.autograd.grad(loss, [hidden, weight], torch.tensor(-2.5, dtype=F64), retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, weight], torch.tensor(-2.5, dtype=F64), retain_graph=True)
    unit = torch.autograd.grad(loss, [hidden, weight])
    for a, b, c in zip(first, again, unit, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, -2.5 * c)


@pytest.mark.parametrize("upstream", [1.0, 0.0], ids=["upstream", "upstream of 0"])
def test_differentiating_twice_is_refused(upstream):
    """Not a zero, which would be wrong without a sign of it: a gradient penalty would do nothing."""
    problem = make()
    hidden = problem.hidden.clone().requires_grad_()
    loss = fused_linear_kd(hidden, problem.weight, problem.teacher, problem.labels)
    (gradient,) = torch.autograd.grad(loss, hidden, torch.tensor(upstream, dtype=F64), create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), hidden)


def test_differentiating_the_gradient_by_the_upstream_gradient_is_refused():
    problem = make()
    hidden, factor = problem.hidden.clone().requires_grad_(), torch.tensor(2.0, dtype=F64, requires_grad=True)
    loss = factor * fused_linear_kd(hidden, problem.weight, problem.teacher, problem.labels)
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), factor)


@pytest.mark.parametrize(
    "needed", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight", "bias"), ()], ids="-".join
)
def test_gradients_only_for_what_needs_one(needed):
    """A frozen head costs no weight gradient, frozen hidden states none of theirs."""
    problem = make(bias=True, kd_ratio=0.5, chunk_tokens=4)
    truth = oracle(problem)
    x = {"hidden": problem.hidden.clone(), "weight": problem.weight.clone(), "bias": problem.bias.clone()}
    for name in needed:
        x[name].requires_grad_()
    with (
        mock.patch.object(gemm, "grad_hidden", wraps=gemm.grad_hidden) as grad_hidden,
        mock.patch.object(gemm, "grad_weight", wraps=gemm.grad_weight) as grad_weight,
    ):
        loss = fused_linear_kd(
            x["hidden"], x["weight"], problem.teacher, problem.labels, student_bias=x["bias"], kd_ratio=0.5, chunk_tokens=4
        )
    assert (grad_hidden.call_count > 0) == ("hidden" in needed)
    assert (grad_weight.call_count > 0) == ("weight" in needed)
    assert loss.requires_grad == bool(needed)
    if needed:
        loss.backward()
    for name, tensor in x.items():
        assert (tensor.grad is not None) == (name in needed)
        if name in needed:
            torch.testing.assert_close(tensor.grad, truth.gradients[name])


def test_no_gradient_is_computed_under_no_grad():
    problem = make()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with (
            context(),
            mock.patch.object(gemm, "grad_hidden", wraps=gemm.grad_hidden) as grad_hidden,
            mock.patch.object(gemm, "grad_weight", wraps=gemm.grad_weight) as grad_weight,
        ):
            loss = fused_linear_kd(hidden, weight, problem.teacher, problem.labels)
        assert not grad_hidden.called
        assert not grad_weight.called
        assert not loss.requires_grad
        torch.testing.assert_close(loss, fused(problem).loss)


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_teacher_never_receives_a_gradient(kind):
    problem = make(kind=kind, bias=True)
    tensors = [v.requires_grad_() for v in vars(problem.teacher).values() if isinstance(v, torch.Tensor)]
    assert tensors
    fused(problem)
    assert all(t.grad is None for t in tensors)
    assert not fused_linear_kd(problem.hidden, problem.weight, problem.teacher).requires_grad


def test_a_knob_never_receives_a_gradient():
    problem = make()
    temperature = torch.tensor(2.0, requires_grad=True)
    fused(problem, temperature=temperature)
    assert temperature.grad is None


def test_one_head_for_teacher_and_student():
    """Self-distillation: the same weight on both sides gets the student's gradient alone."""
    problem = make(close=0.1)
    shared = problem.weight.clone().requires_grad_()
    fused_linear_kd(problem.hidden, shared, TeacherHidden(problem.teacher.hidden, shared), problem.labels).backward()
    torch.testing.assert_close(shared.grad, fused(problem).gradients["weight"])


def test_checkpointing_gives_the_same_gradients():
    problem = make(kd_ratio=0.5)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(
        lambda h, w: fused_linear_kd(h, w, problem.teacher, problem.labels, kd_ratio=0.5), hidden, weight, use_reentrant=False
    ).backward()
    expected = fused(problem)
    torch.testing.assert_close(hidden.grad, expected.gradients["hidden"], rtol=0, atol=0)
    torch.testing.assert_close(weight.grad, expected.gradients["weight"], rtol=0, atol=0)


def test_autocast_computes_as_16_bit_weights_would():
    problem = make(leading=(24,), width=211, d_student=16, kd_ratio=0.5).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused(problem)
    assert result.loss.dtype == torch.float32
    assert {g.dtype for g in result.gradients.values()} == {torch.float32}
    assert_within_rule(result, oracle(problem.to(torch.bfloat16), dtype=None), oracle(problem.to(torch.bfloat16)))


def test_fp16_gradients_survive_a_large_normaliser():
    """1 / normaliser must not be folded into fp16 quantities before the products. A loss scale brings the result back into range."""
    problem = make(leading=(16,), width=3000, d_student=16, std=2.0, kd_ratio=0.5).to(torch.float16)
    plain, large = fused(problem, normalizer=1.0), fused(problem, upstream=8192.0, normalizer=8192.0)
    for name, gradient in plain.gradients.items():
        torch.testing.assert_close(large.gradients[name], gradient, rtol=2e-3, atol=1e-7)
        assert int((large.gradients[name] != 0).sum()) >= 0.99 * int((gradient != 0).sum())


# Parts and types.


def _with_parts(problem: Problem, **more):
    return fused_linear_kd(
        problem.hidden, problem.weight, problem.teacher, problem.labels, return_parts=True,
        divergence=divergence(problem.name, **problem.parameters), **{**problem.options, **more},
    )  # fmt: skip


def test_parts():
    problem = make(leading=(3, 5), kd_ratio=0.4, temperature=2.0)
    loss, parts = _with_parts(problem)
    counted = problem.labels != -100
    assert parts.tokens.dtype == torch.int64
    assert int(parts.tokens) == int(counted.sum())
    assert parts["kd"] is parts.kd
    torch.testing.assert_close(loss, 0.4 * parts.kd + 0.6 * parts.ce)
    only_kd = oracle(problem.with_options(kd_ratio=1.0)).loss
    only_ce = oracle(problem.with_options(kd_ratio=0.0)).loss
    torch.testing.assert_close(parts.kd, only_kd)  # the factor T^2 included
    torch.testing.assert_close(parts.ce, only_ce)
    for values, mean in ((parts.kd_per_token, parts.kd), (parts.ce_per_token, parts.ce)):
        assert values.shape == (3, 5)
        assert (values[~counted] == 0).all()
        assert (values[counted] > 0).all()
        torch.testing.assert_close(values.sum() / counted.sum(), mean)


@pytest.mark.parametrize(("kd_ratio", "absent", "present"), [(0.0, "kd", "ce"), (1.0, "ce", "kd")])
def test_parts_of_a_term_without_a_share_are_nan(kd_ratio, absent, present):
    problem = make(kd_ratio=kd_ratio)
    loss, parts = _with_parts(problem)
    counted = problem.labels != -100
    assert parts[absent].isnan()
    assert parts[f"{absent}_per_token"][counted].isnan().all()
    assert (parts[f"{absent}_per_token"][~counted] == 0).all()
    torch.testing.assert_close(parts[present], loss)


def test_a_term_without_a_share_costs_nothing():
    problem = make()
    with mock.patch.object(gemm, "logits", wraps=gemm.logits) as products:
        fused(problem, kd_ratio=0.0)
    assert products.call_count == 1  # the student's; at kd_ratio 1 the teacher's too
    with mock.patch.object(gemm, "logits", wraps=gemm.logits) as products:
        fused(problem, kd_ratio=1.0)
    assert products.call_count == 2


def test_parts_are_detached():
    problem = make(kd_ratio=0.5)
    problem.hidden.requires_grad_()
    loss, parts = _with_parts(problem)
    assert loss.requires_grad
    assert not any(parts[name].requires_grad for name in ("kd", "ce", "tokens", "kd_per_token", "ce_per_token"))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)],
    ids=str,
)
def test_loss_and_parts_are_fp32_or_wider(dtype, expected):
    loss, parts = _with_parts(make(kd_ratio=0.5).to(dtype))
    assert {loss.dtype, parts.kd.dtype, parts.ce.dtype, parts.kd_per_token.dtype, parts.ce_per_token.dtype} == {expected}


@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("student_dtype", [torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_teacher_and_student_may_differ_in_dtype(kind, student_dtype, teacher_dtype):
    problem = make(kind=kind)
    student, teacher = problem.to(student_dtype), problem.to(teacher_dtype).teacher
    mixed = Problem(student.hidden, student.weight, teacher, problem.labels)
    tolerance = 1e-9 if student_dtype == F64 and (teacher_dtype == F64 or kind == "logits") else 2e-2
    assert_close(fused(mixed), oracle(mixed), tolerance)


# kd_loss and the module.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_kd_loss_is_the_loss_from_logits_and_never_overwrites_them(name, parameters, masked, dtype):
    problem = make(name, parameters, leading=(3, 4), teacher_width=31, masked=masked, student_softcap=6.0, student_scale=1.5)
    logits = (problem.hidden @ problem.weight.T).to(dtype)
    before = logits.clone()
    logits.requires_grad_()
    options = {"kd_ratio": 0.3, "temperature": 1.3, "student_softcap": 6.0, "student_scale": 1.5}
    loss = kd_loss(logits, problem.teacher, problem.labels, divergence=divergence(name, **parameters), chunk_tokens=5, **options)
    loss.backward()
    assert torch.equal(logits.detach(), before)
    assert logits.grad.dtype == dtype
    eye = torch.eye(37, dtype=F64)
    truth = oracle(Problem(before.double(), eye, problem.teacher, problem.labels, None, name, parameters, options))
    tolerance = {F64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert abs(float(loss.detach()) - float(truth.loss)) < tolerance * max(1.0, float(truth.loss))
    assert relative_error(logits.grad, truth.gradients["hidden"]) < tolerance


def test_module_is_the_function():
    problem = make("jsd", {"beta": 0.3}, bias=True)
    options = {"temperature": 1.6, "temperature_squared": False, "kd_ratio": 0.7, "student_softcap": 9.0, "student_scale": 0.9,
               "ignore_index": -100, "chunk_tokens": 6}  # fmt: skip
    chosen = divergence("jsd", beta=0.3)
    module = FusedLinearKDLoss(divergence=chosen, return_parts=True, **options)
    weight = torch.rand(13)
    arguments = problem.hidden, problem.weight, problem.teacher, problem.labels
    got, parts = module(*arguments, token_weight=weight, normalizer=7.0, student_bias=problem.bias)
    expected, expected_parts = fused_linear_kd(
        *arguments, divergence=chosen, token_weight=weight, normalizer=7.0, student_bias=problem.bias, return_parts=True, **options
    )
    assert torch.equal(got, expected)
    assert torch.equal(parts.kd_per_token, expected_parts.kd_per_token)
    module.temperature = 3.0
    assert not torch.equal(module(*arguments)[0], expected)


@pytest.mark.parametrize("layout", ["strided labels", "transposed hidden", "strided weight", "transposed logits"])
def test_any_memory_layout(layout):
    kind = "logits" if "logits" in layout else "hidden"
    problem = make(leading=(12,), masked=0.0, kd_ratio=0.5, kind=kind, token_weight=torch.rand(12, dtype=F64))
    truth = oracle(problem)
    if layout == "strided labels":
        labels = torch.stack([problem.labels, torch.zeros_like(problem.labels)], -1)[:, 0]
        token_weight = torch.stack([problem.options["token_weight"]] * 2, -1)[:, 0]
        strided = Problem(
            problem.hidden, problem.weight, problem.teacher, labels, options={**problem.options, "token_weight": token_weight}
        )
    elif layout == "transposed hidden":
        strided = Problem(problem.hidden.T.contiguous().T, problem.weight, problem.teacher, problem.labels, options=problem.options)
    elif layout == "strided weight":
        wide = torch.randn(37, 16, dtype=F64)
        wide[:, ::2] = problem.weight
        strided = Problem(problem.hidden, wide[:, ::2], problem.teacher, problem.labels, options=problem.options)
    else:
        teacher = TeacherLogits(problem.teacher.logits.T.contiguous().T)
        strided = Problem(problem.hidden, problem.weight, teacher, problem.labels, options=problem.options)
    assert_close(fused(strided), truth)


# Cost.


def _peak_bytes(function) -> int:
    """Most bytes allocated at a time while the function runs, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        kept = function()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    assert most > 0
    return most


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
@pytest.mark.parametrize("gathered", [False, True])
def test_extra_memory_is_bounded_by_the_chunk(gathered, name, parameters, monkeypatch):
    """Nothing of size N x V: the extra memory is the two chunk buffers and the row function's blocks, at any number of tokens."""
    # A block that is freed untouched, for the C library's sake: the profiler counts it, memory does not.
    monkeypatch.setattr(rows_torch, "RETAINED_BYTES", 0, raising=False)
    width, chunk, d = 1000, 32, 16
    extra = {}
    for tokens in (128, 512):
        problem = make(name, parameters, leading=(tokens,), width=width, d_student=d, masked=0.0, kd_ratio=0.5, dtype=torch.float32)
        problem.labels[::4] = -100 if gathered else 0
        hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
        peak = _peak_bytes(
            lambda h=hidden, w=weight, p=problem: fused_linear_kd(
                h, w, p.teacher, p.labels, kd_ratio=0.5, divergence=divergence(name, **parameters), chunk_tokens=chunk
            )
        )
        outputs = hidden.nbytes + weight.nbytes
        extra[tokens] = peak - outputs
    per_token = (extra[512] - extra[128]) / (512 - 128)
    assert per_token < 100, "per-token vectors alone may grow with N"
    assert extra[512] < 2 * 4 * chunk * width + (2 << 20)


@pytest.mark.parametrize("knobs", ["numbers", "tensors"])
def test_one_read_from_the_device_per_call(knobs):
    """Count, label range, signs of the weights and knobs come in one read, whatever the number of chunks."""
    problem = make(leading=(40,), chunk_tokens=3, token_weight=torch.rand(40))
    values = {"temperature": 2.0, "kd_ratio": 0.5, "normalizer": 9.0}
    if knobs == "tensors":
        values = {k: torch.tensor(v) for k, v in values.items()}
    with device_reads() as reads:
        result = fused(problem, **values)
    assert result.loss.isfinite()
    # Numbers travel as a tensor on the host, whose reading is no wait for a device.
    assert len(reads) == 1, reads


# Where public implementations went wrong, one test each.


def test_mistake_jsd_mixes_probabilities_and_beta_weighs_the_teacher():
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=F64)
    q = torch.tensor([[0.1, 0.3, 0.6]], dtype=F64)
    beta = 0.2
    m = beta * p + (1 - beta) * q
    expected = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    got = kd_loss(q.log(), TeacherLogits(p.log()), divergence=divergence("jsd", beta=beta))
    torch.testing.assert_close(got, expected)
    swapped = kd_loss(q.log(), TeacherLogits(p.log()), divergence=divergence("jsd", beta=1 - beta))
    assert abs(float(swapped - expected)) > 0.005


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_mistake_temperature_squared_scales_value_and_gradient_alike(name, parameters):
    problem = make(name, parameters, temperature=3.0)
    on, off = fused(problem, temperature_squared=True), fused(problem, temperature_squared=False)
    torch.testing.assert_close(on.loss, 9 * off.loss)
    for key in on.gradients:
        torch.testing.assert_close(on.gradients[key], 9 * off.gradients[key])


def test_mistake_normaliser_and_empty_batches():
    """Mean over valid tokens of the whole batch; a batch without one is 0, not 0 / 0."""
    problem = make(leading=(8,), masked=0.0)
    half = problem.labels.clone()
    half[4:] = -100
    first = Problem(problem.hidden[:4], problem.weight, TeacherHidden(problem.teacher.hidden[:4], problem.teacher.weight), half[:4])
    masked = fused(Problem(problem.hidden, problem.weight, problem.teacher, half))
    torch.testing.assert_close(masked.loss, fused(first).loss)
    empty = fused(Problem(problem.hidden, problem.weight, problem.teacher, torch.full_like(half, -100)))
    assert float(empty.loss) == 0


def test_mistake_a_shorter_vocabulary_is_left_out_not_padded_with_zero_logits():
    problem = make(width=37, teacher_width=30)
    cut = Problem(problem.hidden, problem.weight[:30], problem.teacher, options={})
    whole = Problem(problem.hidden, problem.weight, problem.teacher, options={})
    got, expected = fused(whole), fused(cut)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.gradients["weight"][:30], expected.gradients["weight"])
    assert (got.gradients["weight"][30:] == 0).all()
    padded = TeacherHidden(problem.teacher.hidden, torch.cat([problem.teacher.weight, torch.zeros(7, 6, dtype=F64)]))
    wrong = fused(Problem(problem.hidden, problem.weight, padded, options={}))
    assert abs(float(wrong.loss - got.loss)) > 1e-3
    # A longer teacher likewise: its extra tokens take no probability.
    longer = make(width=30, teacher_width=37)
    shorter = Problem(longer.hidden, longer.weight, TeacherHidden(longer.teacher.hidden, longer.teacher.weight[:30]), longer.labels)
    torch.testing.assert_close(fused(longer).loss, fused(shorter).loss)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("what", ["softcap", "scale", "bias"])
def test_mistake_softcap_scale_and_bias_are_not_lost(what, side):
    problem = make(masked=0.0)
    softcap, scale, bias = (3.0 if what == "softcap" else None), (0.25 if what == "scale" else 1.0), None
    if what == "bias":
        bias = torch.randn(37, dtype=F64)
    hidden, weight = (problem.hidden, problem.weight) if side == "student" else (problem.teacher.hidden, problem.teacher.weight)
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if side == "student":
        got = fused_linear_kd(
            hidden, weight, problem.teacher, student_bias=bias, student_softcap=softcap, student_scale=scale, temperature=1.5
        )
        expected = kd_loss(logits, problem.teacher, temperature=1.5)
    else:
        teacher = TeacherHidden(hidden, weight, bias, softcap, scale)
        got = fused_linear_kd(problem.hidden, problem.weight, teacher, temperature=1.5)
        expected = fused_linear_kd(problem.hidden, problem.weight, TeacherLogits(logits), temperature=1.5)
    torch.testing.assert_close(got, expected)
    assert abs(float(got - fused(problem, temperature=1.5).loss)) > 1e-3


def test_mistake_16_bit_logits_rounded_before_the_softmax():
    """bf16 weights and hidden states, student and teacher close: fp32 logits keep the gradient, rounded ones ruin it."""
    problem = make("jsd", leading=(64,), width=2000, d_student=64, std=8.0, close=0.05, labels=False).to(torch.bfloat16)
    truth = oracle(problem).gradients["hidden"]
    kept = relative_error(fused(problem).gradients["hidden"], truth)
    rounded = relative_error(fused(problem, logits_dtype=torch.bfloat16).gradients["hidden"], truth)
    assert kept < 0.01
    assert rounded > 0.05


def test_mistake_a_frozen_head_costs_no_weight_gradient():
    problem = make(leading=(64,), width=4000, d_student=256, dtype=torch.float32)
    hidden = problem.hidden.requires_grad_()
    frozen = _peak_bytes(lambda: fused_linear_kd(hidden, problem.weight, problem.teacher, problem.labels))
    trained = problem.weight.clone().requires_grad_()
    whole = _peak_bytes(lambda: fused_linear_kd(hidden, trained, problem.teacher, problem.labels))
    assert whole - frozen >= 0.99 * problem.weight.nbytes


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_divergence_is_negative_where_student_and_teacher_are_close(name):
    """Rounding may not push the value of a token below 0, and equal distributions are at 0."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(64, 3000, generator=generator)
    for distance in (0.0, 1e-6, 1e-5, 1e-4):
        student = teacher + distance * torch.randn(teacher.shape, generator=generator)
        _, parts = kd_loss(student, TeacherLogits(teacher), divergence=name, return_parts=True)
        assert (parts.kd_per_token >= 0).all()
        assert distance > 0 or parts.kd < 1e-6


def test_the_backward_pass_holds_nothing_but_the_gradients():
    """No zeros are made up for outputs that nobody uses."""
    logits = torch.randn(300, 4000, requires_grad=True)
    teacher = torch.randn(300, 4000)
    loss = kd_loss(logits, TeacherLogits(teacher), chunk_tokens=32)
    peak = _peak_bytes(lambda: torch.autograd.grad(loss, logits))
    assert peak < 1.1 * logits.nbytes + (1 << 20)


def test_shifted_logits_are_not_copied(monkeypatch):
    """`logits[:, :-1]` does not flatten; its rows are gathered chunk by chunk, with the same result."""
    monkeypatch.setattr(rows_torch, "RETAINED_BYTES", 0)
    whole, teacher = torch.randn(4, 101, 3000), torch.randn(4, 101, 3000)
    labels = torch.randint(0, 3000, (4, 100))
    labels[:, ::3] = -100
    results = []
    for make_contiguous in (False, True):
        for masked in (None, labels):
            student, signal = whole[:, :-1].detach(), TeacherLogits(teacher[:, :-1])
            if make_contiguous:
                student, signal = student.contiguous(), TeacherLogits(signal.logits.contiguous())
            student.requires_grad_()
            ratio = 1.0 if masked is None else 0.5
            kept = []
            peak = _peak_bytes(
                lambda s=student, t=signal, y=masked, r=ratio, k=kept: k.append(kd_loss(s, t, y, kd_ratio=r, chunk_tokens=16))
            )
            assert peak < 1.3 * student.nelement() * 4 + (1 << 20)
            kept[0].backward()
            results.append((kept[0].detach(), student.grad))
    for (loss, gradient), (expected, expected_gradient) in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)


def test_small_fp16_gradients_are_not_flushed():
    """Most of a softmax over a large vocabulary is below what fp16 can hold."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 100_000, generator=generator).half().requires_grad_()
    teacher = (student.detach().float() + 0.05 * torch.randn(student.shape, generator=generator)).half()
    kd_loss(student, TeacherLogits(teacher), normalizer=1e-3).backward()
    double = student.detach().double().requires_grad_()
    kd_loss(double, TeacherLogits(teacher.double()), normalizer=1e-3).backward()
    assert relative_error(student.grad, double.grad) < 2e-3


def test_without_a_counted_token_nothing_from_above_matters():
    student = torch.randn(3, 7, requires_grad=True)
    labels = torch.full((3,), -100)
    loss, parts = kd_loss(student, TeacherLogits(torch.randn(3, 7)), labels, return_parts=True)
    loss.backward(torch.tensor(float("inf")))
    assert (student.grad == 0).all()
    assert parts.kd == 0
    assert parts.ce.isnan()  # not asked for, hence not computed


def test_the_smallest_weights_count_as_they_are():
    student = torch.randn(3, 7)
    weight = torch.tensor([1e-50, 3e-50, 0.0], dtype=torch.float64)
    found = kd_loss(student, TeacherLogits(torch.zeros(3, 7)), token_weight=weight)
    torch.testing.assert_close(found, kd_loss(student, TeacherLogits(torch.zeros(3, 7)), token_weight=weight * 1e50))


def test_adaptive_kl_with_a_head_of_all_but_rounding_has_finite_gradients():
    student, teacher = torch.randn(2, 9, requires_grad=True), torch.randn(2, 9)
    teacher[:, 4] = -torch.inf
    loss = kd_loss(student, TeacherLogits(teacher), divergence=divergence("adaptive_kl", mu=0.9999995))
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    student, teacher = torch.randn(3, 7), TeacherLogits(torch.randn(3, 7))
    expected = kd_loss(student, teacher, temperature=2.0)
    assert kd_loss(student, teacher, temperature=np.float32(2.0)) == expected
    assert kd_loss(student, teacher, temperature=np.int64(2)) == expected


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": None}, "temperature"),
        ({"kd_ratio": None}, "kd_ratio"),
        ({"student_scale": None}, "student_scale"),
        ({"temperature_squared": None}, "temperature_squared"),
        ({"temperature_squared": "no"}, "temperature_squared"),
        ({"ignore_index": 2**70}, "ignore_index"),
    ],
)
def test_what_may_not_be_none_or_huge_is_named(options, name):
    with pytest.raises((TypeError, ValueError), match=name):
        kd_loss(torch.randn(3, 7), TeacherLogits(torch.randn(3, 7)), **options)


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="student_weight"):
        fused_linear_kd(torch.randn(3, 4), torch.randn(0, 4), TeacherLogits(torch.randn(3, 7)))
    with pytest.raises(ValueError, match=r"teacher\.logits"):
        kd_loss(torch.randn(3, 7), TeacherLogits(torch.randn(3, 0)))
