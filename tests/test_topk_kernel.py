"""The Triton kernel for sparse teachers, run by Triton's interpreter where there is no GPU (and on one where there is)."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fastkd import DIVERGENCES, TeacherTopK, fused_linear_kd
from fastkd.reference import divergence_per_token
from fastkd_kernels import topk_torch
from fastkd_kernels.spec import Head, RowSpec

from .divergence_cases import ALL, DEFAULTS
from .problems import assert_same_rows, assert_within_rule, device_reads, fused, make, oracle, sparse

topk = pytest.importorskip("fastkd_kernels.topk", reason="Triton is not installed")
# The interpreter computes in numpy, which warns of infinities that the kernel then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _runs_here():
    if DEVICE == "cpu" and not topk.rows.interpreted():
        pytest.skip("no GPU, and Triton was imported before TRITON_INTERPRET=1 was set")


@pytest.fixture(autouse=True)
def _small_blocks(request, monkeypatch):
    """Several blocks a row, the last one not full, of logits and of listed tokens."""
    if "chosen_blocks" not in request.node.name:
        monkeypatch.setattr(topk, "row_config", lambda width: (128, 4))
        monkeypatch.setattr(topk, "BLOCK_K", 32)


@dataclass
class Rows:
    """A call of `row_losses` in float64, and its answer from the torch implementation."""

    student: Tensor
    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None
    labels: Tensor | None
    weight: Tensor
    spec: RowSpec
    student_bias: Tensor | None = None

    def expected(self, need_dz: bool = True) -> dict[str, Tensor | None]:
        out = self._outputs(torch.float64, "cpu", need_dz)
        topk_torch.row_losses(
            self.student, self.ids, self.log_probs, self.log_tail, self.labels, self.weight, self.spec, **out,
            student_bias=self.student_bias,
        )  # fmt: skip
        return out

    def got(self, dtype: torch.dtype = torch.float32, dz: torch.dtype | None = torch.float32, in_place: bool = False):
        """Run the kernel. Outputs start as NaN, so that an element which is not written shows; ``dz`` in place starts as the logits."""

        def cast(x, to=torch.float32):
            return x if x is None else x.to(DEVICE, to if x.is_floating_point() else x.dtype)

        student = cast(self.student, dtype)
        before = student.clone()
        out = self._outputs(torch.float32, DEVICE, False)
        if in_place:
            out["dz"] = student if dz == dtype else student.view(dz)[:, : student.shape[1]]
        elif dz is not None:
            out["dz"] = torch.full(student.shape, torch.nan, device=DEVICE, dtype=dz)
        topk.row_losses(
            student, self.ids.to(DEVICE), cast(self.log_probs), cast(self.log_tail), cast(self.labels), cast(self.weight), self.spec, **out,
            student_bias=cast(self.student_bias, dtype),
        )  # fmt: skip
        assert in_place or torch.equal(student.nan_to_num(7.0), before.nan_to_num(7.0)), "the logits were overwritten"
        return {k: None if v is None else v.cpu().double() for k, v in out.items()}

    def _outputs(self, dtype: torch.dtype, device: str, need_dz: bool) -> dict[str, Tensor | None]:
        n, width = self.student.shape
        poison = {"dtype": dtype, "device": device}
        return {
            "dz": torch.full((n, width), torch.nan, **poison) if need_dz else None,
            "kd": torch.full((n,), torch.nan, **poison),
            "ce": torch.full((n,), torch.nan, **poison) if self.spec.ce_share else None,
        }


def _rows(name, parameters=None, *, width=201, k=12, padding=2, tail=True, kd_ratio=0.6, temperature=1.7, head=None, std=4.0) -> Rows:
    """Three rows; ``padding`` entries among the k, one of which has a listed token's id and one the label's. One label is listed."""
    n, real = 3, k - padding
    values = tuple(float((parameters or {}).get(p.name, p.default)) for p in DIVERGENCES[name].parameters)
    a, b = (*values, 0.0, 0.0)[:2]
    spec = RowSpec(
        DIVERGENCES[name].at(values), a, b, temperature=temperature, kd_factor=temperature**2, kd_share=kd_ratio, ce_share=1 - kd_ratio,
        student=head or Head(),
    )  # fmt: skip
    # Values that fp32 holds: the kernel then differs by its arithmetic alone.
    student = (std * torch.randn(n, width)).double()
    top = TeacherTopK.from_logits(std * torch.randn(n, width), real, temperature)
    labels = torch.randint(width, (n,))
    labels[0] = top.ids[0, -1]
    ids, log_probs = top.ids, top.log_probs
    if padding:
        more = torch.randint(width, (n, padding))
        more[:, 0], more[:, -1] = ids[:, 0], labels
        order = torch.randperm(k)
        ids = torch.cat([ids, more], 1)[:, order]
        log_probs = torch.cat([log_probs, torch.full(more.shape, -torch.inf)], 1)[:, order]
    return Rows(
        student, ids, log_probs.double(), top.log_tail.double() if tail else None, labels if kd_ratio < 1 else None,
        torch.tensor([3.0, 0.25, 1.0]).double(), spec, torch.randn(width).double() if head else None,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_every_divergence_with_cross_entropy(name, parameters):
    case = _rows(name, parameters)
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_every_divergence_alone_with_bias_scale_and_softcap(name, parameters):
    case = _rows(name, parameters, kd_ratio=1.0, head=Head(6.0, 0.8), padding=0)
    assert_same_rows(case.got(in_place=True), case.expected())
    assert_same_rows(case.got(dz=None), case.expected(need_dz=False))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("name", "k"), [("forward_kl", k) for k in (1, 32, 33, 128, 129)] + [("adaptive_kl", 65)])
def test_any_number_of_listed_tokens(name, k, tail):
    """From one to all 129, in one to five blocks; the rest's mass given, or what they leave."""
    case = _rows(name, {"mu": 0.9} if name == "adaptive_kl" else {}, width=129, k=k, padding=0, tail=tail, head=Head(None, -0.6))
    assert_same_rows(case.got(in_place=True), case.expected())


@pytest.mark.parametrize(("width", "k", "padding"), [(1, 1, 0), (2, 2, 1), (3, 3, 3), (31, 40, 9), (32, 32, 0), (33, 8, 2), (128, 5, 5)])
def test_narrow_rows_and_rows_of_padding(width, k, padding):
    case = _rows("jsd", width=width, k=k, padding=padding) if padding < k else _rows("jsd", width=width, k=1, padding=0)
    if padding >= k:
        case = replace(case, log_probs=torch.full_like(case.log_probs, -torch.inf), log_tail=torch.zeros(3).double())
    assert_same_rows(case.got(in_place=True), case.expected())


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "adaptive_kl"])
def test_chosen_blocks(name):
    case = _rows(name, {}, width=5000, k=70)
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["reverse_kl", "tvd"])
def test_a_narrow_gradient_may_overwrite_the_logits(name, narrow):
    """On a GPU dz in 16 bits lands in the first half of each row of fp32 logits, which are still being read."""
    case = _rows(name, {}, head=Head(6.0, 0.8), k=40)
    over, apart = case.got(dz=narrow, in_place=True), case.got(dz=narrow)
    assert_same_rows(over, case.expected(), 5e-3)
    assert torch.equal(over["dz"], apart["dz"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits(dtype):
    case = _rows("skew_reverse_kl", head=Head())
    case = replace(case, student=case.student.to(dtype).double(), student_bias=case.student_bias.to(dtype).double())
    assert_same_rows(case.got(dtype), case.expected())
    assert_same_rows(case.got(dtype, dz=dtype, in_place=True), case.expected(), 1e-2)  # the interpreter truncates to bf16


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_sampled_counts(name, parameters):
    """No tail in the teacher: the value is infinite exactly where the torch implementation says so, and never NaN."""
    case = _rows(name, parameters, kd_ratio=1.0)
    counts = torch.randint(0, 4, case.ids.shape) * (case.log_probs > -torch.inf)
    counts[:, -1] = (case.log_probs[:, -1] > -torch.inf).long()
    sampled = TeacherTopK.from_counts(case.ids, counts)
    case = replace(case, log_probs=sampled.log_probs.double(), log_tail=sampled.log_tail.double())
    got, expected = case.got(), case.expected()
    assert not got["kd"].isnan().any()
    assert torch.equal(got["kd"].isinf(), expected["kd"].isinf())
    if expected["kd"].isfinite().all():
        assert_same_rows(got, expected)


def test_ids_that_only_the_teacher_has_are_divided_out():
    """All of the student's ids are listed, with 70 % of the mass."""
    case = _rows("symmetric_kl", width=40, k=40, padding=0)
    case = replace(case, log_probs=case.log_probs + torch.tensor(0.7).double().log(), log_tail=torch.full((3,), 0.3).double().log())
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize("mu", [0.0, 0.4])
def test_adaptive_kl_with_ties(mu):
    case = _rows("adaptive_kl", {"mu": mu}, kd_ratio=1.0, temperature=1.0, k=50, padding=0)
    shares = torch.randint(1, 4, case.ids.shape).double()
    case = replace(case, log_probs=(0.9 * shares / shares.sum(1, keepdim=True)).float().double().log(), log_tail=None)
    assert_same_rows(case.got(), case.expected())


def test_logits_of_nothing():
    """-inf: in the tail no share of its gradient; in all of the tail, as good as no tail."""
    case = _rows("forward_kl", temperature=1.0, padding=0)
    case.student[0, 150:] = -torch.inf
    case.student[0, case.ids[0]] = 1.0
    case.student[1] = -torch.inf
    case.student[1, case.ids[1]] = torch.linspace(-2, 2, 12).double()
    case.labels[1] = case.ids[1, 0]
    case.labels[0] = case.ids[0, 0]
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_nan_in_the_logits_comes_through(name, parameters):
    """Of a listed token, and of one in the tail, where nothing is listed."""
    case = _rows(name, parameters)
    case.log_probs[1], case.log_tail[1] = -torch.inf, 0.0
    case.student[0, case.ids[0][case.log_probs[0] > -torch.inf][3]] = torch.nan
    case.student[1, 150] = torch.nan
    got = case.got()
    assert got["kd"].isnan().tolist() == got["ce"].isnan().tolist() == [True, True, False]
    assert got["dz"][:2].isnan().all()
    assert not got["dz"][2].isnan().any()


def test_large_logits_neither_overflow_nor_vanish():
    case = _rows("symmetric_kl", {}, std=3000.0, temperature=1.0, padding=0)
    ordinary = _rows("symmetric_kl", padding=0)
    case = replace(case, log_probs=ordinary.log_probs, log_tail=ordinary.log_tail)
    assert_same_rows(case.got(), case.expected())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_tail_that_is_nearly_nothing_or_all_keeps_its_digits(name):
    """1 - sum(q) would be 0, or good to two digits, in the tail's gradient too."""
    zs = torch.zeros(2, 500)
    zs[0, 7], zs[1, 7] = 25.0, -12.0
    log_p = torch.tensor([0.9, 1e-5]).log()[:, None]
    case = Rows(
        zs.double(), torch.tensor([[7], [7]]), log_p.double(), None, None, torch.ones(2).double(),
        RowSpec(DIVERGENCES[name], *((0.5, 0.0) if name == "jsd" else (0.0, 0.0))),
    )  # fmt: skip
    got = case.got()
    double = zs.double().requires_grad_()
    truth = divergence_per_token(double, TeacherTopK(case.ids, case.log_probs), name)
    truth.sum().backward()
    torch.testing.assert_close(got["kd"], truth.detach(), rtol=1e-6, atol=1.2e-7)  # an ulp of fp32 probabilities near 1
    tail = torch.arange(500) != 7
    torch.testing.assert_close(got["dz"][:, tail], double.grad[:, tail], rtol=2e-4, atol=0)
    torch.testing.assert_close(got["dz"][:, 7], double.grad[:, 7], rtol=2e-4, atol=1e-8)


def test_cross_entropy_alone():
    case = _rows("forward_kl", kd_ratio=0.0)
    out, expected = case._outputs(torch.float32, DEVICE, True), case._outputs(torch.float64, "cpu", True)
    out["kd"] = expected["kd"] = None
    arguments = case.student, case.ids, case.log_probs, case.log_tail, case.labels, case.weight
    topk_torch.row_losses(*arguments, case.spec, **expected)
    topk.row_losses(*(x.to(DEVICE, torch.float32 if x.is_floating_point() else x.dtype) for x in arguments), case.spec, **out)
    assert_same_rows({k: None if v is None else v.cpu().double() for k, v in out.items()}, expected)


# The whole loss.


def _problem(name="forward_kl", parameters=None, dtype=torch.float32, **more):
    options = {
        "leading": (6,), "width": 150, "temperature": 2.0, "kd_ratio": 0.5, "bias": True, "chunk_tokens": 3,
        "token_weight": torch.rand(6, dtype=torch.float64), "student_softcap": 8.0, "student_scale": 0.9, **more,
    }  # fmt: skip
    problem = sparse(make(name, parameters, **options), 7, padding=2).to(dtype)
    return problem.to_device(DEVICE) if DEVICE == "cuda" else problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_the_whole_loss(name, dtype):
    problem = _problem(name, {}, dtype)
    assert_within_rule(fused(problem, impl="triton"), oracle(problem, dtype=None), oracle(problem))


def test_the_whole_loss_without_cross_entropy_and_without_divergence():
    for kd_ratio in (1.0, 0.0):
        problem = _problem(kd_ratio=kd_ratio, student_softcap=None)
        assert_within_rule(fused(problem, impl="triton"), oracle(problem, dtype=None), oracle(problem))


@pytest.mark.parametrize("columns", [False, True])
def test_the_whole_loss_in_any_memory_layout(columns):
    """Every other element of something, or columns that lie side by side."""
    problem = _problem("jsd", masked=0.0, chunk_tokens=6)

    def strided(x):
        if columns and x.ndim == 2:
            return x.t().contiguous().t()
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    teacher = TeacherTopK(*(strided(x) if isinstance(x, Tensor) else x for x in vars(problem.teacher).values()))
    assert teacher.ids.stride() == ((1, 6) if columns else (18, 2))
    apart = replace(
        problem, hidden=strided(problem.hidden), weight=strided(problem.weight), teacher=teacher, labels=strided(problem.labels),
        bias=strided(problem.bias), options={**problem.options, "token_weight": strided(problem.options["token_weight"])},
    )  # fmt: skip
    assert_within_rule(fused(apart, impl="triton"), oracle(problem, dtype=None), oracle(problem))


def test_kd_loss_leaves_the_logits_and_one_read_from_the_device():
    from fastkd import kd_loss

    problem = _problem(temperature=1.3, bias=False, student_softcap=None, student_scale=1.0, token_weight=None, width=37, d_student=37)
    logits = (3 * problem.hidden).requires_grad_()
    before = logits.detach().clone()
    one = replace(problem, hidden=before, weight=torch.eye(37, device=DEVICE))
    loss = kd_loss(logits, problem.teacher, problem.labels, temperature=1.3, kd_ratio=0.5, impl="triton", chunk_tokens=4)
    loss.backward()
    truth = oracle(one)
    assert torch.equal(logits.detach(), before)
    torch.testing.assert_close(loss.detach().double(), truth.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), truth.gradients["hidden"], rtol=1e-4, atol=1e-7)
    if DEVICE == "cpu":
        return  # the interpreter reads tensors as it runs
    with device_reads(DEVICE) as reads:
        fused_linear_kd(problem.hidden, problem.weight, problem.teacher, problem.labels, temperature=1.3, kd_ratio=0.5, impl="triton")
    assert len(reads) == 1, reads
