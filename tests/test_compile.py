"""One graph for a whole ramp of knobs under `torch.compile(fullgraph=True)`."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastkd import DIVERGENCES, TeacherHidden, divergence, fused_linear_kd

from .problems import make

STEPS = 20


def _loss(hidden, weight, teacher_hidden, teacher_weight, labels, temperature, kd_ratio, beta, normalizer):
    return fused_linear_kd(
        hidden, weight, TeacherHidden(teacher_hidden, teacher_weight), labels, temperature=temperature, kd_ratio=kd_ratio,
        divergence=divergence("jsd", beta=beta), normalizer=normalizer,
    )  # fmt: skip


def _ramp(step: int) -> list[float]:
    return [1.0 + 0.1 * step, 0.1 + 0.04 * step, 0.05 * step, 5.0 + step]  # temperature, kd_ratio, beta (0, a limit, first), normalizer


def _run_ramp(backend: str, knobs) -> list[int]:
    """Run the ramp compiled and eagerly, compare, and return the number of graphs compiled up to each step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(_loss, fullgraph=True, backend=counter)
    problem = make(leading=(10,), width=30, dtype=torch.float32)
    tensors = problem.teacher.hidden, problem.teacher.weight, problem.labels
    losses, graphs = [], []
    for step in range(STEPS):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        again = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        loss, expected = compiled(*leaves, *tensors, *knobs(step)), _loss(*again, *tensors, *_ramp(step))
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        for x, y in zip(leaves, again, strict=True):
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-8)
        losses.append(float(expected.detach()))
        graphs.append(counter.frame_count)
    assert len(set(losses)) == STEPS, "the knobs must matter"
    return graphs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ramp_of_tensor_knobs_is_one_graph(backend):
    def knobs(step: int) -> list[Tensor]:
        return [torch.tensor(x, dtype=torch.float64) for x in _ramp(step)]

    graphs = _run_ramp(backend, knobs)
    assert graphs[0] == graphs[-1], "compiled again after the first step"
    assert graphs[0] == 1 or backend == "aot_eager"  # which may restart its first compilation


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_ramp_of_python_floats_does_not_recompile_every_step(backend):
    """Dynamo takes a float for a constant once, sees it change, and compiles one more graph for any value."""
    graphs = _run_ramp(backend, _ramp)
    assert graphs[1] == graphs[-1], "compiled again after the second step"


def test_labels_and_parts_do_not_break_the_graph():
    def function(hidden, weight, teacher_hidden, teacher_weight, labels, token_weight):
        loss, parts = fused_linear_kd(
            hidden,
            weight,
            TeacherHidden(teacher_hidden, teacher_weight),
            labels,
            token_weight=token_weight,
            kd_ratio=0.5,
            return_parts=True,
        )
        return loss, parts.kd, parts.tokens, parts.kd_per_token

    torch._dynamo.reset()
    problem = make(leading=(3, 4), dtype=torch.float32)
    arguments = problem.hidden, problem.weight, problem.teacher.hidden, problem.teacher.weight, problem.labels, torch.rand(3, 4)
    got = torch.compile(function, fullgraph=True, backend="eager")(*arguments)
    for x, y in zip(got, function(*arguments), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_opcheck(name):
    """The operator's schema, fake implementation and autograd registration agree with what it does."""
    from fastkd import ops

    problem = make(name, leading=(5,), width=11, dtype=torch.float32)
    parameters = [p.default for p in DIVERGENCES[name].parameters]
    knobs = torch.tensor([1.5, 0.5, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, *parameters], dtype=torch.float64)
    arguments = (
        problem.hidden.requires_grad_(), problem.weight.requires_grad_(), None,
        problem.teacher.hidden, problem.teacher.weight, None, None, None,
        problem.labels, None, knobs, "student_softcap teacher_softcap teacher_temperature teacher_share normalizer", name, "torch", -100, 2,
        torch.float32, True, True, False,
    )  # fmt: skip
    torch.library.opcheck(ops.kd, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


class _Student(torch.nn.Module):
    """A model that ends in the loss, as a training step compiles it."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Embedding(30, 8), torch.nn.Linear(8, 8), torch.nn.GELU())
        self.head = torch.nn.Linear(8, 30)

    def forward(self, ids, teacher_hidden, teacher_weight, temperature):
        teacher = TeacherHidden(teacher_hidden, teacher_weight)
        hidden = self.body(ids)[:, :-1]
        return fused_linear_kd(
            hidden,
            self.head.weight,
            teacher,
            ids[:, 1:],
            student_bias=self.head.bias,
            kd_ratio=0.5,
            temperature=temperature,
            chunk_tokens=5,
        )


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_model_that_uses_the_loss_is_one_graph(autocast):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    student, ids = _Student(), torch.randint(30, (3, 6))
    compiled = torch.compile(student, fullgraph=True, backend=counter)
    teacher = torch.randn(3, 5, 6), torch.randn(30, 6)
    for temperature in (1.0, 1.5, 2.0):
        gradients = []
        for model in (compiled, student):
            student.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(ids, *teacher, torch.tensor(temperature))
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in student.parameters())])
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-7)
    assert counter.frame_count == 1
