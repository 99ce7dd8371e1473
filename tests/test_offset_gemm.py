"""fp16 logits against their tile's maximum: the Triton kernels against their torch stand-in, and both against float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastkd import DIVERGENCES
from fastkd.reference import divergence_per_token, final_logits
from fastkd_kernels import offset_torch
from fastkd_kernels.offset_torch import OffsetLogits
from fastkd_kernels.spec import Head, RowSpec

from .divergence_cases import DEFAULTS
from .problems import relative_error

gemm = pytest.importorskip("fastkd_kernels.offset_gemm", reason="Triton is not installed")
rows = pytest.importorskip("fastkd_kernels.rows")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bf16 operands, not their values: there the product is seen with fp16 alone.
DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16]
SMALL = gemm.GemmConfig(32, 64, 32, warps=4, stages=2)
PLAIN_HEAD = Head()
SEPARABLE = [case for case in DEFAULTS if DIVERGENCES[case.values[0]].statistic is None]


@pytest.fixture(autouse=True)
def _runs_here():
    if DEVICE == "cpu" and not rows.interpreted():
        pytest.skip("no GPU, and Triton was imported before TRITON_INTERPRET=1 was set")


def _operands(n: int, width: int, d: int = 72, std: float = 3.0, dtype: torch.dtype = DTYPES[0]) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d).to(DEVICE, dtype), (torch.randn(width, d) * (std / d**0.5)).to(DEVICE, dtype)


def _empty(n: int, width: int, tile: int = 64, two_sums: bool = True) -> OffsetLogits:
    """Buffers whose every byte says NaN, padding included."""
    out = OffsetLogits.empty(n, width, tile, DEVICE, two_sums)
    for x in (out.padded, out.maxima, out.sums, out.sums_1):
        x.fill_(torch.nan)
    return out


def _by_torch(hidden: Tensor, weight: Tensor, head: Head = PLAIN_HEAD, *, tile=64, two_sums=True, **options) -> OffsetLogits:
    out = _empty(hidden.shape[0], weight.shape[0], tile, two_sums)
    offset_torch.offset_logits(hidden, weight, out, head, **{"temperature": 1.0, "shared": weight.shape[0], **options})
    return out


@pytest.mark.parametrize(
    ("n", "width", "d", "shared", "two_sums"), [(5, 130, 72, 100, True), (33, 64, 32, 64, False), (40, 200, 8, 90, False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", [{}, {"tma": True, "persistent": True}], ids=["pointers", "tma"])
def test_product(how, dtype, n, width, d, shared, two_sums):
    hidden, weight = _operands(n, width, d, dtype=dtype)
    options = {"temperature": 1.7, "shared": shared, "bias": torch.randn(width, device=DEVICE).to(dtype)}
    got, head = _empty(n, width, two_sums=two_sums), Head(6.0, 0.8)
    gemm.offset_logits(hidden, weight, got, head, config=replace(SMALL, **how), **options)
    want = _by_torch(hidden, weight, head, two_sums=two_sums, **options)
    torch.testing.assert_close(got.maxima, want.maxima, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.sums, want.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sums_1, want.sums_1, rtol=1e-5, atol=1e-6)
    # The products differ by their order of summation: a step of fp16 here and there.
    torch.testing.assert_close(got.residuals, want.residuals, rtol=2**-10, atol=1e-5)
    truth = final_logits(hidden.double(), weight.double(), options["bias"].double(), 6.0, 0.8)
    top = got.maxima.repeat_interleave(64, 1)[:, :width].double()
    assert ((got.residuals.double() + top - truth).abs() <= 2.0**-11 * (top - truth).abs() + 2e-5).all(), "the stated bound"


def test_chosen_configuration():
    config = gemm.device_config(torch.device(DEVICE))
    hidden, weight = _operands(3, 300)
    got = _empty(3, 300, config.block_n)
    gemm.offset_logits(hidden, weight, got, PLAIN_HEAD, temperature=1.0, shared=300)
    want = _by_torch(hidden, weight, tile=config.block_n)
    torch.testing.assert_close(got.maxima, want.maxima)
    torch.testing.assert_close(got.sums, want.sums)


def _spec(name: str, parameters: dict[str, float], temperature: float = 1.7, kd_ratio: float = 0.6, head: Head = PLAIN_HEAD) -> RowSpec:
    values = tuple(float(parameters.get(p.name, p.default)) for p in DIVERGENCES[name].parameters)
    a, b = (*values, 0.0, 0.0)[:2]
    return RowSpec(DIVERGENCES[name].at(values), a, b, temperature, temperature**2, kd_ratio, 1 - kd_ratio, head, Head())


def _run(implementation, student, teacher, labels, weight, spec, dz=torch.bfloat16) -> dict[str, Tensor | None]:
    student = replace(student, residuals=student.padded.clone()[:, : student.residuals.shape[1]])
    kd = torch.full((labels.shape[0],), torch.nan, device=DEVICE)
    ce = torch.full_like(kd, torch.nan) if spec.ce_share else None
    out = None if dz is None else student.residuals.view(dz)
    implementation.row_losses(student, teacher, labels, weight, spec, dz=out, kd=kd, ce=ce)
    return {"dz": out, "kd": kd, "ce": ce}


ROWS = [(case.values[0], case.values[1], 200, 150, True) for case in SEPARABLE]
ROWS += [(name, {}, 200, 150, False) for name in ("forward_kl", "jsd")]  # the value alone
ROWS += [(name, {}, 129, 64, True) for name in ("forward_kl", "tvd")]  # without a CE term
ROWS += [("forward_kl", {}, 200, 200, True)]


@pytest.mark.parametrize(("name", "parameters", "width", "shared", "need_dz"), ROWS)
def test_rows(name, parameters, width, shared, need_dz, monkeypatch):
    monkeypatch.setattr(gemm, "_ROW_BLOCK", 128)  # several steps a row
    n = 2
    head = Head(9.0, 0.7) if width == 200 else PLAIN_HEAD
    spec = _spec(name, parameters, kd_ratio=1.0 if width == 129 else 0.6, head=head)
    labels, weight = torch.randint(width, (n,), device=DEVICE), torch.rand(n, device=DEVICE)
    hidden, student_weight = _operands(n, width)
    student_weight[shared:] *= 3.0  # there, then, is the largest logit of most rows
    student = _by_torch(hidden, student_weight, head, temperature=1.7, shared=shared)
    teacher = _by_torch(*_operands(n, shared, 40), temperature=1.7, two_sums=False)
    dz = torch.bfloat16 if need_dz else None
    got, want = (_run(i, student, teacher, labels, weight, spec, dz) for i in (gemm, offset_torch))
    for key in ("kd", "ce"):
        assert (got[key] is None) == (want[key] is None)
        if got[key] is not None:
            torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
    if need_dz:
        torch.testing.assert_close(got["dz"].float(), want["dz"].float(), rtol=2**-7, atol=2e-6)
        assert float(got["dz"].float().abs().amax()) > 1e-3


def _gradient(
    implementation, hidden, weight, teacher_hidden, teacher_weight, labels, spec, tile=64, dz_dtype=torch.bfloat16, **config
) -> tuple[Tensor, Tensor]:
    """(dH, mean kd) as the loss computes them: dz in 16 bits, then in float64, so that what is stored counts and nothing else."""
    n, width, shared = hidden.shape[0], weight.shape[0], min(weight.shape[0], teacher_weight.shape[0])
    student, teacher = _empty(n + 3, width, tile).first(n), _empty(n, shared, tile, two_sums=False)  # a chunk that is not full
    at = {"temperature": spec.temperature, "shared": shared, **config}
    implementation.offset_logits(hidden, weight, student, spec.student, **at)
    implementation.offset_logits(teacher_hidden, teacher_weight[:shared], teacher, spec.teacher, **at)
    dz, kd = student.residuals.view(dz_dtype), torch.full((n,), torch.nan, device=DEVICE)
    ce = torch.full_like(kd, torch.nan) if spec.ce_share else None
    implementation.row_losses(student, teacher, labels, torch.ones(n, device=DEVICE), spec, dz=dz, kd=kd, ce=ce)
    return dz.double() @ weight.double(), kd.mean()


def _truth(hidden, weight, teacher_hidden, teacher_weight, labels, spec, name, parameters) -> tuple[Tensor, Tensor]:
    x = hidden.double().requires_grad_()
    student = final_logits(x, weight.double(), None, spec.student.softcap, spec.student.scale)
    teacher = final_logits(teacher_hidden.double(), teacher_weight.double(), None, spec.teacher.softcap, spec.teacher.scale)
    kd = spec.kd_factor * divergence_per_token(student, teacher, name, parameters, spec.temperature)
    loss = spec.kd_share * kd
    if spec.ce_share:
        loss = loss + spec.ce_share * torch.nn.functional.cross_entropy(student, labels, reduction="none")
    (d_hidden,) = torch.autograd.grad(loss.sum(), x)
    return d_hidden, kd.detach().mean()


@pytest.mark.parametrize(
    ("name", "parameters", "temperature", "kd_ratio"),
    [("forward_kl", {}, 1.0, 0.5), ("reverse_kl", {}, 2.0, 1.0), ("jsd", {"beta": 0.3}, 2.0, 0.5)],
)
def test_the_whole_pipeline_against_float64(name, parameters, temperature, kd_ratio):
    spec = replace(_spec(name, parameters, temperature, kd_ratio, Head(30.0, 0.9)), teacher=Head(25.0, 1.1))
    labels = torch.randint(333, (6,), device=DEVICE)
    case = (*_operands(6, 333), *_operands(6, 290, 40), labels, spec)
    got, truth = _gradient(gemm, *case, dz_dtype=torch.float16, config=SMALL), _truth(*case, name, parameters)
    assert relative_error(got[0], truth[0]) < 1e-3
    assert float(got[1]) == pytest.approx(float(truth[1]), rel=2e-4)


@pytest.mark.parametrize(("close", "std"), [(e, std) for std in (3.0, 8.0) for e in (0.01, 0.05, 0.3, 1.0)])
def test_gradients_are_as_exact_as_those_of_fp32_logits(close, std):
    """The table of the design: the same head, the teacher's hidden states the student's, moved a little."""
    hidden, weight = _operands(48, 8000, 128, std, torch.bfloat16)
    moved = (hidden.float() + close * torch.randn(hidden.shape, device=DEVICE)).bfloat16()
    spec = _spec("forward_kl", {}, 1.0, 1.0)
    case = (hidden, weight, moved, weight, None, spec)
    truth = _truth(*case, "forward_kl", {})[0]
    logits = [x.double() @ weight.double().t() for x in (hidden, moved)]
    assert relative_error(_gradient(offset_torch, *case, tile=256)[0], truth) <= 5e-3

    def error_of(dtype):
        q, p = (x.to(dtype).double().softmax(-1) for x in logits)
        return relative_error((q - p).bfloat16().double() @ weight.double(), truth)

    assert error_of(torch.float32) <= 3e-3
    if close <= 0.05:
        assert error_of(torch.float16) > 1e-2, "the problem is one that plain fp16 logits do not solve"


def test_kernels_keep_the_exactness_of_their_stand_in():
    hidden, weight = _operands(8, 1500, 64)
    moved = hidden + (0.01 * torch.randn(8, 64, device=DEVICE)).to(hidden.dtype)
    case = (hidden, weight, moved, weight, None, _spec("forward_kl", {}, 1.0, 1.0))
    assert relative_error(_gradient(gemm, *case, config=SMALL)[0], _truth(*case, "forward_kl", {})[0]) <= 5e-3


def test_ids_of_probability_zero(monkeypatch):
    """A bias of -inf, over a tile and a half: no NaN, and no gradient."""
    monkeypatch.setattr(gemm, "_ROW_BLOCK", 128)
    (hidden, weight), other = _operands(4, 300), _operands(4, 300)
    bias = torch.zeros(300, device=DEVICE)
    bias[64:150] = -torch.inf
    student, teacher = _empty(4, 300), _empty(4, 300, two_sums=False)
    for x, w, out in ((hidden, weight, student), (*other, teacher)):
        gemm.offset_logits(x, w, out, PLAIN_HEAD, temperature=1.0, shared=300, bias=bias, config=SMALL)
    labels = torch.tensor([0, 63, 150, 299], device=DEVICE)
    got = _run(gemm, student, teacher, labels, torch.ones(4, device=DEVICE), _spec("forward_kl", {}, 1.0))
    keep = bias == 0
    logits = [x.double() @ w.double().t() for x, w in ((hidden, weight), other)]
    kd = divergence_per_token(logits[0][:, keep], logits[1][:, keep])
    torch.testing.assert_close(got["kd"].double(), kd, rtol=1e-3, atol=1e-5)
    assert (got["dz"][:, ~keep] == 0).all()
    assert got["dz"].isfinite().all()


def test_large_logits_neither_overflow_nor_vanish():
    hidden, weight = _operands(4, 300, std=3000.0)
    case = (hidden, weight, *_operands(4, 300, std=3000.0), torch.tensor([0, 9, 99, 299], device=DEVICE), _spec("jsd", {}, 1.0))
    got, truth = _gradient(gemm, *case, config=SMALL), _truth(*case, "jsd", {})
    assert relative_error(got[0], truth[0]) < 1e-2
    assert float(got[1]) == pytest.approx(float(truth[1]), rel=1e-2)


def test_a_nan_makes_its_row_nan_and_no_other():
    hidden, weight = _operands(3, 130)
    hidden[1, 0] = torch.nan
    out = _empty(3, 130)
    gemm.offset_logits(hidden, weight, out, PLAIN_HEAD, temperature=1.0, shared=130, config=SMALL)
    teacher = _by_torch(*_operands(3, 130), two_sums=False)
    got = _run(gemm, out, teacher, torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(3, device=DEVICE), _spec("jsd", {}))
    for value in (got["kd"], got["ce"], got["dz"].float().sum(1)):
        assert value.isnan().tolist() == [False, True, False]


def test_what_is_supported():
    hidden, weight = _operands(4, 30)
    assert gemm.supported(hidden, weight)
    assert not gemm.supported(hidden.float(), weight.float())
    assert not gemm.supported(hidden, weight.float())
    assert not gemm.supported(hidden[:, :68].contiguous(), weight[:, :68].contiguous()), "68 elements are no multiple of 16 bytes"
    assert not gemm.supported(hidden[:, 1:], weight)


def test_dz_elsewhere_is_an_error():
    x = _by_torch(*_operands(2, 130))
    with pytest.raises(ValueError, match="dz: expected a 16-bit view of the student's residuals"):
        gemm.row_losses(x, x, None, torch.ones(2), _spec("forward_kl", {}), dz=torch.empty(2, 130), kd=torch.empty(2), ce=None)


@pytest.mark.slow
def test_compiles_for_every_target_without_spilling():
    from .aot import report_in_subprocess

    report = report_in_subprocess(module="tests.aot_offset")
    for row in report:
        assert row["registers"] > 16, "resources were not read"
        assert row["stack_bytes"] == row["spills"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"], row
    assert {r["target"] for r in report if r["kernel"] == "gemm"} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    (waits,) = (r["products_per_wait"] for r in report if "products_per_wait" in r)
    assert waits == 4, "all products of a block_k of 64, and then one wait"


def test_the_benchmark_runs_on_a_tiny_problem(monkeypatch):
    from benchmarks import cells, offset_gemm
    from benchmarks.providers import Problem

    monkeypatch.setitem(cells.SHAPES, "tiny", cells.Shape(8, 200, 32, 48, DTYPES[0]))
    problem = Problem(cells.Setting("tiny"), torch.device(DEVICE))
    chunks = {"fp32": 4, "16 bits": 8, "offset": 8}
    (student, teacher), config = offset_gemm.products(problem, {"small": SMALL}, chunk=8, rounds=1), vars(SMALL)
    assert [student["side"], teacher["side"]] == ["student", "teacher"]
    assert config.items() <= student.items()
    assert student["ratio"] == pytest.approx(student["ours_ms"] / student["mm_ms"])
    assert {r["logits"]: r["gb_per_s"] > 0 for r in offset_gemm.row_kernels(problem, chunks, rounds=1)}.keys() == chunks.keys()
    for row in offset_gemm.whole(problem, chunks, rounds=1):
        assert max(row["difference"].values()) < (0.02 if row["logits"] == "16 bits" else 2e-3), row


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu(tmp_path, capsys):
    from benchmarks import offset_gemm

    assert offset_gemm.main(["--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
