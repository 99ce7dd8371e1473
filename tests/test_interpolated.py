"""A target between the student and the teacher (TAID): value, gradient, both implementations, the ends of the way, errors."""

import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from fastkd import TeacherHidden, TeacherInterpolated, TeacherLogits, TeacherTopK, divergence, fused_linear_kd, kd_loss

from .divergence_cases import ALL, DEFAULTS
from .problems import Problem, assert_close, assert_within_rule, device_reads, fused, make, oracle, relative_error

F64 = torch.float64


def moving(share, *arguments, **options) -> Problem:
    problem = make(*arguments, **options)
    return replace(problem, teacher=TeacherInterpolated(problem.teacher, share))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_taid_by_its_formula(temperature):
    """Forward KL to softmax(((1 - t) z_student + t z_teacher) / T), the student in it detached."""
    student, teacher = torch.randn(5, 11, dtype=F64).requires_grad_(), torch.randn(5, 11, dtype=F64)
    loss = kd_loss(student, TeacherInterpolated(TeacherLogits(teacher), 0.3), temperature=temperature)
    p = torch.softmax((0.7 * student.detach() + 0.3 * teacher) / temperature, -1)
    q = torch.log_softmax(student / temperature, -1)
    expected = temperature**2 * (p * (p.log() - q)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_oracle(name, parameters, kind):
    problem = moving(
        0.4, name, parameters, kind=kind, teacher_width=31, bias=True, teacher_head={"softcap": 9.0, "scale": 0.8}, temperature=1.7,
        kd_ratio=0.6, chunk_tokens=5, student_softcap=7.0, student_scale=1.2,
    )  # fmt: skip
    assert_close(fused(problem, 2.0), oracle(problem, 2.0))


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_triton(name, parameters, monkeypatch):
    triton = pytest.importorskip("triton")
    from fastkd_kernels import rows

    if not rows.interpreted() and not torch.cuda.is_available():
        pytest.skip(f"Triton {triton.__version__} neither interprets nor has a GPU")
    monkeypatch.setattr(rows, "row_config", lambda width: (16, 1))  # several blocks a row
    device = "cpu" if rows.interpreted() else "cuda"
    problem = moving(0.4, name, parameters, leading=(6,), teacher_width=41, temperature=1.3, kd_ratio=0.7, bias=True)
    problem = problem.to(torch.float32).to_device(device)
    assert_within_rule(fused(problem, impl="triton"), oracle(problem, dtype=None), oracle(problem))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ends_of_the_way_and_probabilities_of_zero(impl, share):
    """At 0 the target is the student, at 1 the teacher; -inf in the teacher's logits is no mass unless the teacher has no share."""
    if impl == "triton":
        pytest.importorskip("triton")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    student, teacher = torch.randn(4, 9, device=device, requires_grad=True), torch.randn(4, 9, device=device)
    teacher[:, 3] = -math.inf
    loss = kd_loss(student, TeacherInterpolated(TeacherLogits(teacher), share), impl=impl)
    loss.backward()
    if share == 0.0:
        assert loss == 0
        assert (student.grad == 0).all()
        return
    leaf = student.detach().clone().requires_grad_()
    target = teacher if share == 1.0 else (1 - share) * leaf.detach() + share * teacher
    expected = kd_loss(leaf, TeacherLogits(target), impl=impl)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, leaf.grad)


def test_no_gradient_flows_through_the_target():
    problem = make()
    hidden = problem.teacher.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    teacher = TeacherInterpolated(TeacherHidden(hidden, problem.teacher.weight), 0.5)
    fused_linear_kd(problem.hidden, weight, teacher, problem.labels).backward()
    assert hidden.grad is None
    assert weight.grad is not None


def test_a_ramp_of_shares_reads_the_device_once_a_step_and_compiles_once():
    problem = make(dtype=torch.float32, leading=(8,))

    def loss(hidden, share):
        return fused_linear_kd(hidden, problem.weight, TeacherInterpolated(problem.teacher, share), problem.labels)

    hidden = problem.hidden.requires_grad_()
    values = [loss(hidden, torch.tensor(t)).item() for t in (0.1, 0.5, 0.9)]
    assert values == sorted(values)
    assert values == pytest.approx([loss(hidden, t).item() for t in (0.1, 0.5, 0.9)])
    with device_reads() as reads:
        loss(hidden, torch.tensor(0.5))
    assert len(reads) == 1
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    assert [compiled(hidden, torch.tensor(t)).item() for t in (0.1, 0.5, 0.9)] == pytest.approx(values)
    assert counter.frame_count == 1


def test_half_precision():
    problem = moving(0.4, close=0.05, leading=(40,), width=300, d_student=32, std=8.0, temperature=2.0).to(torch.bfloat16)
    truth = oracle(problem)
    found = fused(problem)
    assert relative_error(found.gradients["weight"], truth.gradients["weight"]) < 5e-3
    assert_within_rule(found, oracle(problem, dtype=None), truth)


@pytest.mark.parametrize(
    ("teacher", "error", "words"),
    [
        (lambda x: TeacherInterpolated(TeacherTopK(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1)), 0.5), TypeError,
         ["teacher.teacher", "TeacherHidden or TeacherLogits", "TeacherTopK"]),
        (lambda x: TeacherInterpolated(TeacherInterpolated(TeacherLogits(x), 0.5), 0.5), TypeError, ["teacher.teacher"]),
        (lambda x: TeacherInterpolated(TeacherLogits(x), None), TypeError, ["teacher.share", "NoneType"]),
        (lambda x: TeacherInterpolated(TeacherLogits(x), 1.2), ValueError, ["teacher.share", "[0, 1]", "1.2"]),
        (lambda x: TeacherInterpolated(TeacherLogits(x), torch.tensor(-0.5)), ValueError, ["teacher.share", "[0, 1]", "-0.5"]),
        (lambda x: TeacherInterpolated(TeacherLogits(x), math.nan), ValueError, ["teacher.share", "nan"]),
        (lambda x: TeacherInterpolated(TeacherLogits(x), torch.ones(2)), ValueError, ["teacher.share", "0-d"]),
        (lambda x: TeacherInterpolated(TeacherLogits(x[:2]), 0.5), ValueError, ["teacher.logits", "leading dimensions"]),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(teacher, error, words):
    x = torch.randn(3, 7)
    with pytest.raises(error) as caught:
        kd_loss(x, teacher(x), divergence=divergence("jsd"))
    for word in words:
        assert word in str(caught.value)
