"""Peak memory of one forward and backward pass, beyond what was there before it.

On a GPU: the allocator's peak. On a CPU: the peak of the resident set, in a process of its own (`python -m benchmarks.memory PROVIDER
SETTING` prints one JSON object), because memory that another step has touched and freed would hide what this one needs.
The kernel keeps the peak itself (VmHWM); it is reset between the warm-up and the measured call by writing 5 to /proc/self/clear_refs.
The warm-up loads libraries and starts threads, on a small problem; at full size for providers that compile.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.cells import Cell, Setting
from benchmarks.providers import PROVIDERS, Problem

__all__ = ["chunk_bound", "outputs", "peak_extra"]

ROOT = Path(__file__).resolve().parent.parent
ROW_TEMPORARIES = 32 << 20  # about ten blocks of 2 MB, and what the allocator keeps beside them


def outputs(setting: Setting) -> int:
    """Bytes of the gradients that are handed to the caller."""
    shape = setting.size
    return (shape.tokens + (0 if setting.frozen_head else shape.vocabulary)) * shape.student_width * shape.dtype.itemsize


def chunk_bound(setting: Setting) -> int | None:
    """Bytes of the fp32 chunk buffers, two with a dense teacher, and the fp32 dW; None where the chunk is the library's choice.

    The row function's temporaries fit in what the head's gradient, which is handed out later, leaves free; without one they come on top.
    """
    shape = setting.size
    if shape.chunk_tokens is None:
        return None
    buffers = (1 if setting.top_k else 2) * min(shape.chunk_tokens, setting.counted_tokens)
    return 4 * shape.vocabulary * buffers + (ROW_TEMPORARIES if setting.frozen_head else 4 * shape.vocabulary * shape.student_width)


def peak_extra(cell: Cell, device: torch.device, step: Callable[[], object]) -> int | None:
    """Bytes at the peak of one step, its gradients included, minus the bytes before it; None where the system does not tell.

    Args:
        step: the cell's, warm; on a CPU it is built anew elsewhere.
    """
    if device.type != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", cell.provider, json.dumps(asdict(cell.setting))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks.memory: {done.stderr[-2000:].splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_extra"]


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _measure(cell: Cell) -> int:
    provider, device = PROVIDERS[cell.provider], torch.device("cpu")
    problem = Problem(cell.setting, device)
    step = provider.build(problem)
    if provider.compiles:
        step()
        problem.forget()
    else:
        small = replace(cell.setting, shape="quick", tokens=None, top_k=cell.setting.top_k and 8)
        provider.build(Problem(small, device))()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps({"peak_extra": _measure(Cell(Setting(**json.loads(sys.argv[2])), sys.argv[1]))}))
