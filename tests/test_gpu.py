"""The kernels on a GPU against the float64 oracle."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from fastkd import TeacherHidden, fused_linear_kd, gemm
from fastkd_kernels import rows_torch

from .divergence_cases import ALL, DEFAULTS
from .problems import assert_within_rule, fused, make, oracle, relative_error, sparse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# Odd widths, unequal vocabularies, masked tokens, two terms, and a gradient that overwrites its logits in a narrower dtype.
SANITIZED = """
import torch
from fastkd import TeacherHidden, fused_linear_kd
torch.manual_seed(0)
new = dict(device="cuda", dtype=torch.bfloat16)
hidden, weight = torch.randn(7, 16, **new, requires_grad=True), torch.randn(5003, 16, **new, requires_grad=True)
teacher = TeacherHidden(torch.randn(7, 24, **new), torch.randn(4999, 24, **new))
labels = torch.tensor([1, -100, 5002, 3, 0, -100, 4999], device="cuda")
for divergence in ("forward_kl", "jsd"):
    fused_linear_kd(hidden, weight, teacher, labels, divergence=divergence, kd_ratio=0.5, chunk_tokens=3, impl="triton").backward()
torch.cuda.synchronize()
assert weight.grad.isfinite().all()
"""


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@DTYPES
@pytest.mark.parametrize("how", [{"std": 3.0}, {"std": 30.0}, {"close": 0.02}], ids=str)
@pytest.mark.parametrize(("name", "parameters"), ALL)
def test_error_rule(name, parameters, how, dtype):
    options = {"std": 8.0, **how}
    problem = make(name, parameters, leading=(96,), width=9001, d_student=64, temperature=1.5, kd_ratio=0.8, chunk_tokens=40, **options)
    problem = problem.to(dtype).to_device("cuda")
    result = fused(problem, impl="triton", upstream=3.0)
    assert_within_rule(result, oracle(problem, upstream=3.0, dtype=None), oracle(problem, upstream=3.0))


@pytest.mark.parametrize("width", [50257, 128256, 151936])
@DTYPES
def test_real_vocabularies(dtype, width):
    problem = make(
        "jsd", leading=(70,), width=width, teacher_width=width + 128, d_student=128, std=8.0, kd_ratio=0.7, temperature=2.0, bias=True
    )
    problem = problem.to(dtype).to_device("cuda")
    assert_within_rule(fused(problem, impl="triton"), oracle(problem, dtype=None), oracle(problem))


@pytest.mark.parametrize(
    ("logits_dtype", "output_dtype"),
    [(torch.float32, torch.float32), *((logits, to) for to in (torch.bfloat16, torch.float16) for logits in (torch.float32, to))],
    ids=str,
)
@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_rows_with_poisoned_outputs_and_narrow_views(name, parameters, output_dtype, logits_dtype):
    from fastkd import DIVERGENCES
    from fastkd_kernels import rows
    from fastkd_kernels.spec import Head, RowSpec

    n, width, shared = 37, 50257, 50000
    values = tuple(parameters.values())
    a, b = (*values, 0.0, 0.0)[:2]
    spec = RowSpec(DIVERGENCES[name].at(values), a, b, 1.5, 2.25, 0.6, 0.4, Head(20.0, 0.9), Head(None, 1.1))
    student, teacher = (6 * torch.randn(n, w, device="cuda", dtype=torch.float32).to(logits_dtype) for w in (width, shared))
    labels, weight = torch.randint(width, (n,), device="cuda"), torch.rand(n, device="cuda")
    bias = torch.randn(width, device="cuda")

    def poisoned(dtype):
        return {
            "kd": torch.full((n,), torch.nan, device="cuda", dtype=dtype),
            "ce": torch.full((n,), torch.nan, device="cuda", dtype=dtype),
        }

    expected = {"dz": torch.full((n, width), torch.nan, device="cuda", dtype=torch.float64), **poisoned(torch.float64)}
    rows_torch.row_losses(student.double(), teacher.double(), labels, weight.double(), spec, **expected, student_bias=bias.double())
    separate = {"dz": torch.full((n, width), torch.nan, device="cuda", dtype=output_dtype), **poisoned(torch.float32)}
    rows.row_losses(student, teacher, labels, weight, spec, **separate, student_bias=bias)
    over = student.clone()
    narrow = over if output_dtype == logits_dtype else over.view(output_dtype)[:, :width]
    in_place = {"dz": narrow, **poisoned(torch.float32)}  # over the logits themselves
    rows.row_losses(over, teacher, labels, weight, spec, **in_place, student_bias=bias)
    for run in (separate, in_place):
        for key in ("dz", "kd", "ce"):
            assert not run[key].isnan().any()
        assert relative_error(run["dz"], expected["dz"]) < (1e-4 if output_dtype == torch.float32 else 5e-3)
        assert relative_error(run["kd"], expected["kd"]) < 1e-4
        assert relative_error(run["ce"], expected["ce"]) < 1e-4
    assert torch.equal(separate["dz"], in_place["dz"])  # reading what is being overwritten changes nothing


def test_triton_is_what_auto_chooses():
    problem = make(leading=(20,), width=300).to(torch.float32).to_device("cuda")
    automatic, chosen = fused(problem, impl="auto"), fused(problem, impl="triton")
    assert torch.equal(automatic.loss, chosen.loss)
    assert_within_rule(fused(problem, impl="torch"), oracle(problem, dtype=None), oracle(problem))


def test_float64_takes_the_torch_path():
    problem = make(leading=(20,), width=300).to_device("cuda")
    assert abs(float(fused(problem).loss - oracle(problem).loss)) < 1e-10
    mixed = make(leading=(20,), width=300).to_device("cuda")
    teacher = mixed.to(torch.float32).teacher
    loss = fused_linear_kd(mixed.hidden, mixed.weight, teacher, mixed.labels)
    assert loss.dtype == torch.float64


@DTYPES
def test_extra_memory_is_bounded_by_the_chunk(dtype):
    width, chunk, d = 32000, 256, 64
    extra = {}
    for tokens in (1024, 8192):
        hidden = torch.randn(tokens, d, device="cuda", dtype=dtype, requires_grad=True)
        weight = (torch.randn(width, d, device="cuda", dtype=dtype) / 8).requires_grad_()
        teacher = TeacherHidden(torch.randn(tokens, d, device="cuda", dtype=dtype), torch.randn(width, d, device="cuda", dtype=dtype) / 8)
        labels = torch.randint(width, (tokens,), device="cuda")
        labels[::4] = -100
        fused_linear_kd(hidden, weight, teacher, labels, kd_ratio=0.5, chunk_tokens=chunk)  # compile, and let cuBLAS take its workspace
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = fused_linear_kd(hidden, weight, teacher, labels, kd_ratio=0.5, chunk_tokens=chunk)
        extra[tokens] = torch.cuda.max_memory_allocated() - before - hidden.nbytes - 4 * weight.numel()
        del kept
    buffers = 2 * 4 * chunk * width
    assert extra[8192] < 1.1 * buffers + (16 << 20)
    assert (extra[8192] - extra[1024]) / (8192 - 1024) < 200, "per-token vectors alone may grow with N"


def test_one_synchronisation_per_call():
    problem = (
        make(leading=(400,), width=500, chunk_tokens=32, kd_ratio=0.5, token_weight=torch.rand(400)).to(torch.bfloat16).to_device("cuda")
    )
    fused(problem)  # compile
    temperature = torch.tensor(2.0, device="cuda")
    calls = []
    original = torch.Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: calls.append(self.device.type) or _allowed(original, self))
        torch.cuda.set_sync_debug_mode("error")
        try:
            problem.hidden.requires_grad_()
            fused_linear_kd(
                problem.hidden, problem.weight, problem.teacher, problem.labels, chunk_tokens=32, kd_ratio=0.5,
                token_weight=problem.options["token_weight"], temperature=temperature,
            ).backward()  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert calls.count("cuda") == 1


def _allowed(function, *arguments):
    torch.cuda.set_sync_debug_mode("default")
    try:
        return function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_products_are_used_where_the_device_has_them(dtype):
    """Without them every product of 16-bit operands is widened block by block: right, and several times slower."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("an older GPU")
    assert gemm.has_mixed_mm(torch.device("cuda", 0), dtype)


@pytest.mark.parametrize(
    ("k", "logits_dtype", "output_dtype"),  # not all combinations: each is a kernel to compile
    [(1500, torch.float32, torch.float32), (64, torch.float32, torch.bfloat16), (1, torch.float16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("name", ["forward_kl", "skew_reverse_kl", "adaptive_kl"])
def test_sparse_teachers_with_poisoned_outputs_and_narrow_views(name, k, output_dtype, logits_dtype):
    from fastkd import DIVERGENCES, TeacherTopK
    from fastkd_kernels import topk, topk_torch
    from fastkd_kernels.spec import Head, RowSpec

    n, width = 37, 50257
    values = tuple(p.default for p in DIVERGENCES[name].parameters)
    a, b = (*values, 0.0, 0.0)[:2]
    spec = RowSpec(DIVERGENCES[name].at(values), a, b, 1.5, 2.25, 0.6, 0.4, Head(20.0, 0.9))
    student = (6 * torch.randn(n, width, device="cuda")).to(logits_dtype)
    top = TeacherTopK.from_logits(6 * torch.randn(n, width, device="cuda"), k, 1.5)
    labels, weight = torch.randint(width, (n,), device="cuda"), torch.rand(n, device="cuda")
    bias = torch.randn(width, device="cuda")

    def outputs(dz):
        kd = torch.full((n,), torch.nan, device="cuda", dtype=torch.promote_types(dz.dtype, torch.float32))
        return {"dz": dz, "kd": kd, "ce": kd.clone()}

    expected = outputs(torch.full((n, width), torch.nan, device="cuda", dtype=torch.float64))
    topk_torch.row_losses(
        student.double(), top.ids, top.log_probs, top.log_tail, labels, weight.double(), spec, **expected, student_bias=bias.double()
    )  # fmt: skip
    over = student.clone()
    narrow = over if output_dtype == logits_dtype else over.view(output_dtype)[:, :width]
    runs = [(student, outputs(torch.full((n, width), torch.nan, device="cuda", dtype=output_dtype))), (over, outputs(narrow))]
    for logits, run in runs:
        topk.row_losses(logits, top.ids, top.log_probs, top.log_tail, labels, weight, spec, **run, student_bias=bias)
        for key in ("dz", "kd", "ce"):
            assert not run[key].isnan().any()
        assert relative_error(run["dz"], expected["dz"]) < (1e-4 if output_dtype == torch.float32 else 5e-3)
        assert relative_error(run["kd"], expected["kd"]) < 1e-4
        assert relative_error(run["ce"], expected["ce"]) < 1e-4
    assert torch.equal(runs[0][1]["dz"], runs[1][1]["dz"])  # reading what is being overwritten changes nothing


@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_sparse_teachers_keep_the_error_rule(name, parameters):
    problem = make(name, parameters, leading=(96,), width=9001, d_student=64, std=8.0, temperature=1.5, kd_ratio=0.8, chunk_tokens=40)
    problem = sparse(problem, 30, padding=2).to(torch.bfloat16).to_device("cuda")
    result = fused(problem, impl="triton")
    assert torch.equal(result.loss, fused(problem).loss)  # what auto chooses
    assert_within_rule(result, oracle(problem, dtype=None), oracle(problem))


def test_compute_sanitizer_finds_nothing():
    """The last one here, because under the tool everything is slow and compiles anew."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    # Each tensor an allocation of its own: a step beyond its end is then a step beyond what is allocated.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    # A group of its own: what the tool starts must end with it, or its output would be waited for.
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        text, _ = child.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        pytest.skip("compute-sanitizer found nothing in 60 seconds and was not done")
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device")
    assert child.returncode == 0, text[-4000:]
    assert "ERROR SUMMARY: 0 errors" in text
