"""The Triton row kernel, run by Triton's interpreter where there is no GPU (and on one where there is)."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastkd import DIVERGENCES
from fastkd_kernels import rows_torch
from fastkd_kernels.spec import Head, RowSpec

from .divergence_cases import ALL, DEFAULTS
from .problems import assert_same_rows, assert_within_rule, fused, make, oracle

rows = pytest.importorskip("fastkd_kernels.rows", reason="Triton is not installed")
# The interpreter computes in numpy, which warns of infinities that the kernel then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _runs_here():
    if DEVICE == "cpu" and not rows.interpreted():
        pytest.skip("no GPU, and Triton was imported before TRITON_INTERPRET=1 was set")


@dataclass
class Rows:
    """A call of `row_losses` in float64, and its answer from the torch implementation."""

    student: Tensor
    teacher: Tensor | None
    labels: Tensor | None
    weight: Tensor
    spec: RowSpec
    student_bias: Tensor | None
    teacher_bias: Tensor | None

    def expected(self, need_dz: bool = True) -> dict[str, Tensor | None]:
        out = self._outputs(torch.float64, "cpu", need_dz)
        rows_torch.row_losses(
            self.student, self.teacher, self.labels, self.weight, self.spec, **out,
            student_bias=self.student_bias, teacher_bias=self.teacher_bias,
        )  # fmt: skip
        return out

    def got(self, dtype: torch.dtype = torch.float32, need_dz: bool = True, in_place: bool = False) -> dict[str, Tensor | None]:
        """Run the kernel. Outputs start as NaN, so that an element which is not written shows."""

        def cast(x):
            return x if x is None else x.to(DEVICE, x.dtype if x.dtype == torch.int64 else dtype)

        student = cast(self.student)
        out = self._outputs(torch.float32, DEVICE, need_dz)
        if need_dz and in_place:
            out["dz"] = student
        rows.row_losses(
            student, cast(self.teacher), cast(self.labels), self.weight.to(DEVICE, torch.float32), self.spec, **out,
            student_bias=cast(self.student_bias), teacher_bias=cast(self.teacher_bias),
        )  # fmt: skip
        return {k: None if v is None else v.cpu().double() for k, v in out.items()}

    def _outputs(self, dtype: torch.dtype, device: str, need_dz: bool) -> dict[str, Tensor | None]:
        n, width = self.student.shape
        poison = {"dtype": dtype, "device": device}
        return {
            "dz": torch.full((n, width), torch.nan, **poison) if need_dz else None,
            "kd": torch.full((n,), torch.nan, **poison) if self.spec.kd_share else None,
            "ce": torch.full((n,), torch.nan, **poison) if self.spec.ce_share else None,
        }


def _rows(name, parameters, *, width=520, teacher_width=None, kd_ratio=0.6, temperature=1.7, caps=False, bias=False, std=4.0) -> Rows:
    n, teacher_width = 2, teacher_width or width
    values = tuple(float(parameters.get(p.name, p.default)) for p in DIVERGENCES[name].parameters)
    a, b = (*values, 0.0, 0.0)[:2]
    # Values that fp32 holds: the kernel then differs by its arithmetic alone.
    student, teacher = (std * torch.randn(n, width)).double(), (std * torch.randn(n, teacher_width)).double()
    spec = RowSpec(
        DIVERGENCES[name].at(values), a, b, temperature=temperature, kd_factor=temperature**2, kd_share=kd_ratio, ce_share=1 - kd_ratio,
        student=Head(6.0, 0.8) if caps else Head(), teacher=Head(9.0, 1.3) if caps else Head(),
    )  # fmt: skip
    labels = torch.randint(width, (n,)) if kd_ratio < 1 else None
    return Rows(
        student, teacher if kd_ratio > 0 else None, labels, torch.tensor([3.0, 0.25]).double(), spec,
        torch.randn(width).double() if bias else None, torch.randn(teacher_width).double() if bias else None,
    )  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a row, the last one not full."""
    monkeypatch.setattr(rows, "row_config", lambda width: (256, 4))


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_every_divergence_with_cross_entropy(name, parameters, small_blocks):
    case = _rows(name, parameters)
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_every_divergence_alone_with_bias_scale_and_softcap(name, parameters, small_blocks):
    case = _rows(name, parameters, kd_ratio=1.0, caps=True, bias=True)
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_every_divergence_without_a_gradient(name, parameters, small_blocks):
    case = _rows(name, parameters)
    assert_same_rows(case.got(need_dz=False), case.expected(need_dz=False))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kd_ratio", [1.0, 0.5, 0.0])
@pytest.mark.parametrize(("width", "teacher_width"), [(520, 411), (411, 520), (513, 512), (256, 256), (5, 3)])
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_unequal_vocabularies(name, width, teacher_width, kd_ratio, in_place, small_blocks):
    case = _rows(name, {}, width=width, teacher_width=teacher_width, kd_ratio=kd_ratio, caps=True, bias=True)
    assert_same_rows(case.got(in_place=in_place), case.expected())


@pytest.mark.parametrize("name", ["forward_kl", "skew_forward_kl", "adaptive_kl"])
def test_chosen_blocks(name):
    case = _rows(name, {}, width=5000, teacher_width=4500)
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize("name", ["reverse_kl", "tvd"])
def test_a_narrow_gradient_may_overwrite_the_logits(name, small_blocks):
    """On a GPU dz in bf16 lands in the first half of each row of fp32 logits, which are still being read."""
    case = _rows(name, {}, caps=True, bias=True)
    expected = case.expected()
    student = case.student.float().to(DEVICE)
    dz = student.view(torch.bfloat16)[:, : student.shape[1]]
    kd, ce = (torch.full((2,), torch.nan, device=DEVICE) for _ in range(2))
    rows.row_losses(
        student, case.teacher.float().to(DEVICE), case.labels.to(DEVICE), case.weight.to(DEVICE), case.spec, dz=dz, kd=kd, ce=ce,
        student_bias=case.student_bias.float().to(DEVICE), teacher_bias=case.teacher_bias.float().to(DEVICE),
    )  # fmt: skip
    assert_same_rows({"dz": dz.cpu().double(), "kd": kd.cpu().double(), "ce": ce.cpu().double()}, expected, 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits(dtype, small_blocks):
    case = _rows("skew_reverse_kl", {}, bias=True)
    rounded = Rows(*(x.to(dtype).double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in vars(case).values()))
    rounded.weight = case.weight
    assert_same_rows(rounded.got(dtype), rounded.expected())


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_probabilities_of_zero(name, parameters, small_blocks):
    """Teacher logits of -inf: the value is infinite exactly where the torch implementation says so, and never NaN."""
    case = _rows(name, parameters, kd_ratio=1.0)
    case.teacher[:, 250:260] = -torch.inf
    got, expected = case.got(), case.expected()
    assert not got["kd"].isnan().any()
    assert torch.equal(got["kd"].isinf(), expected["kd"].isinf())
    if expected["kd"].isfinite().all():
        assert_same_rows(got, expected)


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.8, 1.0])
def test_adaptive_kl_with_ties(mu, small_blocks):
    case = _rows("adaptive_kl", {"mu": mu}, kd_ratio=1.0, temperature=1.0)
    case.teacher = torch.randint(4, case.teacher.shape).double()
    assert_same_rows(case.got(), case.expected())


def test_large_logits_neither_overflow_nor_vanish(small_blocks):
    case = _rows("symmetric_kl", {}, std=3000.0, temperature=1.0)
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_loss(name, parameters, dtype):
    problem = make(
        name, parameters, leading=(9,), width=300, teacher_width=280, temperature=2.0, kd_ratio=0.5, bias=True, chunk_tokens=4,
        token_weight=torch.rand(9, dtype=torch.float64), student_softcap=8.0, student_scale=0.9, teacher_head={"softcap": 9.0},
    ).to(dtype)  # fmt: skip
    if DEVICE == "cuda":
        problem = problem.to_device(DEVICE)
    assert_within_rule(fused(problem, impl="triton"), oracle(problem, dtype=None), oracle(problem))


@pytest.mark.parametrize("kind", ["hidden", "logits"])
def test_the_whole_loss_in_any_memory_layout(kind):
    problem = make("jsd", leading=(6,), width=300, kind=kind, masked=0.0, kd_ratio=0.5, bias=True, token_weight=torch.rand(6)).to(
        torch.float32
    )
    if DEVICE == "cuda":
        problem = problem.to_device(DEVICE)
    expected = oracle(problem)

    def strided(x):
        return x if x is None else torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    teacher = type(problem.teacher)(**{k: strided(v) if isinstance(v, Tensor) else v for k, v in vars(problem.teacher).items()})
    apart = type(problem)(
        strided(problem.hidden), strided(problem.weight), teacher, strided(problem.labels), strided(problem.bias), "jsd",
        options={**problem.options, "token_weight": strided(problem.options["token_weight"])},
    )  # fmt: skip
    assert apart.labels.stride() == (2,)
    assert_within_rule(fused(apart, impl="triton"), oracle(problem, dtype=None), expected)
