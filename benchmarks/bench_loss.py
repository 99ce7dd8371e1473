"""A case of pytest-benchmark for each cell: a forward and backward pass of the loss by one provider, beside the bare GEMMs.

Each timed call is preceded by the GEMMs in the same process, so that what slows the machine slows both.
"""

import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cells import CELLS, Cell, Setting
from benchmarks.memory import chunk_bound, outputs, peak_extra
from benchmarks.providers import FLOORS, PROVIDERS, Problem, Provider, Truth, Unavailable, truth

# Largest relative errors (of norms, against float64) of the loss and of a gradient at which a provider computes the same thing. A peer that
# rounds logits or probabilities to 16 bits has gradients that are off by 20 % and more, and a loss that is right to 0.5 %.
AGREEMENT = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.05, 0.5)}
OUR_GRADIENT = 0.1  # of fastkd, 16-bit logits too
ROUNDS = 2, 30  # at least and at most
BROKEN = 3  # exit status of a process whose GPU no longer answers


def agrees(provider: str, dtype: torch.dtype, errors: dict[str, float]) -> bool:
    """Whether a provider computes the same thing. A NaN is no agreement."""
    loss, gradient = AGREEMENT[dtype]
    if provider.startswith("fastkd"):
        gradient = min(gradient, OUR_GRADIENT)
    return all(error <= (loss if key == "loss" else gradient) for key, error in errors.items())


def milliseconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of one call. On a GPU the mean of ``calls`` between two events: one alone, if short, takes as long as its launch."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    start_s = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start_s)


def timed(
    benchmark, step: Callable[[], object], floor: Callable[[], object], device: torch.device, seconds: float, calls: int = 1
) -> dict[str, Any]:
    """Times of the step and, before each, of the floor, for about ``seconds``.

    ``ms`` is the median on a GPU. On a CPU, which other programs share, it is the least.
    """
    floor()
    both = calls * (milliseconds(floor, device, calls) + milliseconds(step, device, calls))
    rounds = min(max(round(1e3 * seconds / both), ROUNDS[0]), ROUNDS[1])
    ours: list[float] = []
    bare: list[float] = []
    benchmark.pedantic(
        lambda: ours.append(milliseconds(step, device, calls)),
        setup=lambda: bare.append(milliseconds(floor, device, calls)),
        rounds=rounds,
    )
    typical = min if device.type == "cpu" else statistics.median
    return {
        "ms": typical(ours),
        "floor_ms": typical(bare),
        "ratio": typical(ours) / typical(bare),
        **{"ms_min": min(ours), "ms_median": statistics.median(ours), "all_ms": ours, "all_floor_ms": bare},
    }


class Problems:
    """The problem of the last setting, since two may not fit; and the truth of every setting so far, which is small."""

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.truths: dict[Setting, Truth] = {}

    def of(self, setting: Setting, device: torch.device) -> Problem:
        if self.problem is None or self.problem.setting != setting:
            self.problem = None
            gc.collect()
            self.problem = Problem(setting, device)
        return self.problem

    def truth_of(self, problem: Problem) -> Truth:
        if problem.setting not in self.truths:
            self.truths[problem.setting] = truth(problem)
        return self.truths[problem.setting]


PROBLEMS = Problems()


def measure(cell: Cell, device: torch.device, seconds: float, benchmark, row: dict[str, Any]) -> None:
    """Fill the row; what was measured before something fails stays in it."""
    provider = PROVIDERS[cell.provider]
    problem = PROBLEMS.of(cell.setting, device)
    step = provider.build(problem)
    if provider.loss:
        expected = PROBLEMS.truth_of(problem)
        first = step()  # the warm-up, too
        row["loss"] = first[0].item()
        row["error"] = expected.errors(first)
        row["agrees"] = agrees(cell.provider, cell.setting.size.dtype, row["error"])
        del first
    else:
        step()
    seconds *= 2 if cell.provider == "fastkd" else 1  # what all others are compared with
    row |= timed(benchmark, step, FLOORS[provider.floor](problem), device, seconds, provider.calls)
    problem.forget()
    if not provider.loss:
        return
    row["output_bytes"] = outputs(cell.setting)
    if cell.provider == "fastkd":
        row["bound_bytes"] = chunk_bound(cell.setting)
    peak = peak_extra(cell, device, step)
    problem.forget()
    row["peak_extra_bytes"] = peak
    if peak is not None and not cell.setting.frozen_head:
        row["working_bytes"] = peak - 4 * problem.weight.numel()


def attempt(cell: Cell, device: torch.device, seconds: float, benchmark) -> dict[str, Any]:
    """The cell's row. What fails is a row that says so, and lets go of its memory."""
    row: dict[str, Any] = {}
    try:
        measure(cell, device, seconds, benchmark, row)
    except Unavailable as error:
        row["skipped"] = str(error)
    except Exception as error:
        row["skipped"] = f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        row["traceback"] = traceback.format_exc()[-3000:]
    # The exception, whose frames held the tensors of a failed step, is gone by now.
    return row


def clean(provider: Provider, device: torch.device) -> None:
    if provider.compiles:
        torch._dynamo.reset()
    if PROBLEMS.problem is not None:
        PROBLEMS.problem.forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def usable(device: torch.device) -> bool:
    try:
        return torch.ones((), device=device).item() == 1
    except RuntimeError:
        return False


@pytest.fixture
def journal(request) -> Callable[[dict[str, Any]], None]:
    """Appends a line to the file that `run.py` reads while this runs."""
    path = request.config.getoption("--journal")

    def write(line: dict[str, Any]) -> None:
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    return write


def test_cell(index, request, benchmark, journal):
    options = request.config.getoption
    until, device = options("--until"), torch.device(options("--device"))
    if until is not None and time.time() > until:
        pytest.skip("no time left")
    cell = CELLS[options("--cells")][index]
    journal({"began": index})
    row = attempt(cell, device, options("--seconds"), benchmark)
    journal({"done": index, "row": row})
    # After the row: what hangs here costs no result.
    if not usable(device):
        os._exit(BROKEN)
    clean(PROVIDERS[cell.provider], device)
    if "skipped" in row:
        pytest.skip(row["skipped"])
    benchmark.extra_info.update(row)
