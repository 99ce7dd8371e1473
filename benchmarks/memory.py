"""Peak memory of one forward and backward pass, beyond what was there before it.

On a GPU: the allocator's peak. On a CPU: the peak of the resident set, in a process of its own (`python -m benchmarks.memory SHAPE
DIVERGENCE PROVIDER` prints one JSON object), because memory that another step has touched and freed would hide what this one needs.
The kernel keeps the peak itself (VmHWM); it is reset between the warm-up and the measured call by writing 5 to /proc/self/clear_refs.
The warm-up loads libraries and starts threads, on a small problem; at full size for providers that compile.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.providers import PROVIDERS, SHAPES, Problem, Shape

__all__ = ["chunk_bound", "outputs", "peak_extra"]

ROOT = Path(__file__).resolve().parent.parent


def outputs(shape: Shape) -> int:
    """Bytes of the gradients that are handed to the caller."""
    return (shape.tokens + shape.vocabulary) * shape.student_width * shape.dtype.itemsize


def chunk_bound(shape: Shape) -> int | None:
    """Bytes of the two fp32 chunk buffers and the fp32 dW; None where the chunk is the library's choice."""
    if shape.chunk_tokens is None:
        return None
    return 4 * shape.vocabulary * (2 * min(shape.chunk_tokens, shape.tokens) + shape.student_width)


def peak_extra(shape: str, divergence: str, provider: str, device: torch.device) -> int | None:
    """Bytes at the peak of one step, its gradients included, minus the bytes before it; None where the system does not tell."""
    if device.type != "cpu":
        problem = Problem(SHAPES[shape], device)
        step = PROVIDERS[provider].build(problem, divergence)
        step()
        problem.hidden.grad = problem.weight.grad = None  # the warm-up's would hide as much of the peak
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", shape, divergence, provider]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_extra"]


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _measure(shape: str, divergence: str, provider: str) -> int:
    device = torch.device("cpu")
    problem = Problem(SHAPES[shape], device)
    step = PROVIDERS[provider].build(problem, divergence)
    if PROVIDERS[provider].compiles:
        step()
        problem.hidden.grad = problem.weight.grad = None
    else:
        PROVIDERS[provider].build(Problem(SHAPES["quick"], device), divergence)()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps({"peak_extra": _measure(*sys.argv[1:])}))
