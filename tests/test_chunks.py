"""How tokens are cut into chunks, and groups of chunks whose gradient of the logits is written apart, as on a GPU."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from fastkd import TeacherInterpolated, TeacherLogits, chunking, fused_linear_kd, kd_loss, ops
from fastkd.reference import reference_linear_kd

from .divergence_cases import DEFAULTS
from .problems import assert_within_rule, fused, make, oracle, relative_error, sparse


@pytest.fixture
def apart(monkeypatch):
    """The buffers of a GPU that multiplies 16-bit operands into fp32: 300 tokens are groups of 120, chunks of 24."""
    monkeypatch.setattr(ops, "_writes_narrow", lambda student, logits_dtype: logits_dtype != student.dtype)
    monkeypatch.setattr(chunking, "TILE_TOKENS", 8)
    monkeypatch.setattr(chunking, "LEAST_CHUNK", 16)
    monkeypatch.setattr(chunking, "MOST_CHUNK", 40)


def problem(*arguments, **options):
    return make(*arguments, leading=(300,), width=150, d_student=16, kd_ratio=0.7, chunk_tokens=120, **options)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("name", "parameters"), DEFAULTS)
def test_gradients_of_a_group_are_those_of_its_chunks(apart, name, parameters, impl):
    if impl == "triton" and name not in ("forward_kl", "jsd"):
        pytest.skip("the kernels' own tests cover the others")
    if impl == "triton":
        pytest.importorskip("triton")
    case = problem(name, parameters, bias=True, masked=0.2, token_weight=torch.rand(300)).to(torch.bfloat16)
    with mock.patch.object(ops.gemm, "grad_weight", wraps=ops.gemm.grad_weight) as grad_weight:
        result = fused(case, impl=impl)
    counted = int((case.labels != -100).sum())
    assert grad_weight.call_count == -(-counted // 120), "dW once a group"
    assert_within_rule(result, oracle(case, dtype=None), oracle(case))


@pytest.mark.parametrize("kind", ["top-k", "logits", "interpolated"])
def test_any_teacher(apart, kind):
    case = problem(kind="hidden" if kind == "interpolated" else "logits").to(torch.bfloat16)
    if kind == "top-k":
        case = sparse(case, 5)
    if kind == "interpolated":
        case = replace(case, teacher=TeacherInterpolated(case.teacher, 0.5))
    assert_within_rule(fused(case), oracle(case, dtype=None), oracle(case))


def test_a_frozen_head_and_no_gradient_at_all(apart):
    case = problem().to(torch.bfloat16)
    hidden = case.hidden.clone().requires_grad_()
    arguments = (case.weight, case.teacher, case.labels)
    loss = loss_of(hidden, *arguments)
    loss.backward()
    truth = case.hidden.double().requires_grad_()
    weight, teacher = case.weight.double(), case.to(torch.float64).teacher
    expected = reference_linear_kd(truth, weight, teacher, case.labels, kd_ratio=0.7)
    expected.backward()
    assert relative_error(hidden.grad, truth.grad) < 5e-3
    with torch.no_grad():
        assert loss_of(hidden, *arguments).item() == pytest.approx(expected.item(), rel=1e-3)


def loss_of(hidden, weight, teacher, labels):
    return fused_linear_kd(hidden, weight, teacher, labels, kd_ratio=0.7, chunk_tokens=120)


# What the buffers of a call take on a GPU.


class _Shaped:
    """As much of a CUDA tensor as the sizes need."""

    device = torch.device("cuda")

    def __init__(self, *shape: int):
        self.shape, self.dtype = shape, torch.bfloat16

    def element_size(self) -> int:
        return 2


def buffers(tokens, vocabulary, monkeypatch, chunk_tokens=0, logits_dtype=torch.float32):
    """(group, chunk, bytes) of tokens of two heads on a GPU."""
    sizes, empty = [], torch.empty
    monkeypatch.setattr(ops, "_writes_narrow", lambda student, logits_dtype: logits_dtype != student.dtype)
    with mock.patch.object(torch, "empty", lambda *s, dtype, device: sizes.append(s[0] * s[1] * dtype.itemsize) or empty(0)):
        head = _Shaped(vocabulary, 64)
        chunks = ops._Chunks(
            _Shaped(tokens, 64), head, _Shaped(tokens, 64), head, vocabulary, tokens, chunk_tokens, logits_dtype, apart=True
        )
    return chunks.group, chunks.size, sum(sizes)


@pytest.mark.parametrize("vocabulary", [32000, 128256, 151936, 262144])
@pytest.mark.parametrize("tokens", [1, 100, 600, 1000, 4096, 8192, 32768])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_the_default_keeps_its_budget(tokens, vocabulary, logits_dtype, monkeypatch):
    group, size, used = buffers(tokens, vocabulary, monkeypatch, logits_dtype=logits_dtype)
    assert used <= chunking.CHUNK_BYTES_GPU
    assert size <= group <= min(tokens, chunking.CHUNK_TOKENS)
    assert size % chunking.TILE_TOKENS == 0 or size == tokens


def test_a_group_is_larger_than_a_chunk_of_as_many_bytes(monkeypatch):
    assert buffers(8192, 151936, monkeypatch)[:2] == (1920, 384)
    assert buffers(8192, 151936, monkeypatch, 1024)[:2] == (1024, 256)
    assert buffers(8192, 32000, monkeypatch)[:2] == (2048, 2048), "nothing to gain"


@pytest.mark.parametrize("chunk_tokens", [1, 100, 512, 1024, 2048, 5000])
def test_a_number_of_tokens_that_was_asked_for_is_kept(chunk_tokens, monkeypatch):
    group, size, used = buffers(8192, 151936, monkeypatch, chunk_tokens)
    assert size <= group <= chunk_tokens
    assert used <= 2 * 4 * 151936 * chunk_tokens


def test_fp16_gradients_are_not_flushed_where_their_factors_are_small(apart):
    """At temperature 4 without its square, one of 32,000 logits has a gradient of about 1e-6, and fp16 ends at 6e-8."""
    case = make("jsd", leading=(64,), width=32000, d_student=32, close=0.01, labels=False, temperature=4.0, temperature_squared=False)
    case = case.to(torch.float16).with_options(chunk_tokens=64)
    result, truth = fused(case, upstream=16384.0), oracle(case, upstream=16384.0)
    assert relative_error(result.gradients["weight"], truth.gradients["weight"]) < 5e-3


def test_a_logits_loss_has_no_group():
    student = torch.randn(300, 20, dtype=torch.bfloat16, requires_grad=True)
    kd_loss(student, TeacherLogits(torch.randn(300, 20)), chunk_tokens=64).backward()
    assert student.grad is not None
