"""Cases of pytest-benchmark: a forward and backward pass of the loss, by every provider, beside the four bare GEMMs.

Each timed call is preceded by one of the GEMMs in the same process, so that what slows the machine slows both. Times are minima.
"""

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.memory import chunk_bound, outputs, peak_extra
from benchmarks.providers import FLOOR, PROVIDERS, SHAPES, Problem, Unavailable

DIVERGENCES = ("forward_kl", "jsd", "adaptive_kl")
# Largest relative difference (of norms) to our loss and gradients at which a peer computes the same thing.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@pytest.fixture(scope="module")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="module")
def problem(shape, device) -> Problem:
    return Problem(SHAPES[shape], device)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    start_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start_s)


def timed(benchmark, step: Callable[[], object], floor: Callable[[], object], device: torch.device, rounds: int) -> dict[str, object]:
    """Times of the step and, before each, of the floor."""
    ours: list[float] = []
    bare: list[float] = []
    benchmark.pedantic(
        lambda: ours.append(milliseconds(step, device)), setup=lambda: bare.append(milliseconds(floor, device)), rounds=rounds
    )
    return {"ms": min(ours), "gemms_ms": min(bare), "ratio": min(ours) / min(bare), "all_ms": ours, "all_gemms_ms": bare}


def differences(result: tuple[torch.Tensor, ...], ours: tuple[torch.Tensor, ...]) -> dict[str, float]:
    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a.float() - b.float()).norm() / b.float().norm()).item()

    return dict(zip(("loss", "d_hidden", "d_weight"), map(relative, result, ours), strict=True))


@pytest.fixture(scope="module")
def ours() -> dict[tuple[str, str], tuple[torch.Tensor, ...]]:
    """Our loss and gradients for the shape and divergence at hand."""
    return {}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss(shape, divergence, provider, problem, device, ours, request, benchmark, record_property):
    row = {"shape": shape, "divergence": divergence, "provider": provider}
    record_property("row", row)  # filled below; a row that is skipped says why
    try:
        step = PROVIDERS[provider].build(problem, divergence)
    except Unavailable as error:
        row["skipped"] = str(error)
        pytest.skip(str(error))
    floor = FLOOR["gemms"](problem)
    try:
        first = tuple(x.clone() for x in step())  # the warm-up, too
    except Exception as error:  # a peer that fails on this machine is a row that says so
        if provider == "fastkd":
            raise
        row["skipped"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        pytest.skip(row["skipped"])
    row["loss"] = first[0].item()
    if (shape, divergence) not in ours:
        ours.clear()
        ours[shape, divergence] = tuple(x.clone() for x in PROVIDERS["fastkd"].build(problem, divergence)())
    if provider != "fastkd":
        row["difference"] = differences(first, ours[shape, divergence])
        row["agrees"] = max(row["difference"].values()) <= AGREEMENT[SHAPES[shape].dtype]

    del first
    rounds = request.config.getoption("--rounds")
    row |= timed(benchmark, step, floor, device, rounds if provider == "fastkd" else max(1, rounds // 2))
    problem.hidden.grad = problem.weight.grad = None

    try:
        row["peak_extra_bytes"] = peak_extra(shape, divergence, provider, device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        if provider == "fastkd":
            raise
        row["peak_extra_bytes"], row["memory_note"] = None, f"not measured: {type(error).__name__}"
    row["output_bytes"] = outputs(SHAPES[shape])
    if provider == "fastkd":
        row["bound_bytes"] = chunk_bound(SHAPES[shape])
    benchmark.extra_info.update(row)


def test_floor_without_allocation(shape, problem, device, request, benchmark, record_property):
    """What the floor would be if its results had memory already: the strictest one."""
    row = {"shape": shape, "divergence": "", "provider": "gemms preallocated"}
    record_property("row", row)
    step, floor = FLOOR["gemms preallocated"](problem), FLOOR["gemms"](problem)
    step()
    row |= timed(benchmark, step, floor, device, request.config.getoption("--rounds"))
