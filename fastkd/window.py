"""What is counted and timed between two logging steps of a training."""

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

__all__ = ["Sums", "Watch", "not_timed", "peak_gb"]


@dataclass
class Sums:
    """What has been trained since the last logging step, and the counted tokens of the whole run; saved with each checkpoint."""

    loss: float = 0.0
    kd: float = 0.0
    ce: float = 0.0
    tokens: int = 0
    useful: int = 0  # positions that went through the student and are no padding
    computed: int = 0  # all positions that did
    tokens_before: int = 0


class Watch:
    """Seconds since a moment, without those of what does not belong to the training."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._aside = 0.0
        self.tokens = 0  # useful ones, of this process; those before an interruption are not in the seconds either

    def reset(self, running: bool) -> None:
        self._begun, self._aside, self.tokens = time.perf_counter() if running else None, 0.0, 0

    def start(self) -> None:
        if self._begun is None:
            self.reset(running=True)

    @property
    def seconds(self) -> float:
        return 0.0 if self._begun is None else time.perf_counter() - self._begun - self._aside

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self._aside += time.perf_counter() - since


def not_timed(method: Callable) -> Callable:
    """A method of what has a `Watch` as ``_watch``, which is paused meanwhile."""

    @functools.wraps(method)
    def aside(self, *args, **kwargs):
        with self._watch.paused():
            return method(self, *args, **kwargs)

    return aside


def peak_gb(device: torch.device) -> float:
    """GB (2 ** 30 bytes): an accelerator's peak since the last call, on the CPU the process' resident peak; nan where none is told."""
    if device.type == "cpu":
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 2**30
    backend = torch.get_device_module(device)
    if not hasattr(backend, "reset_peak_memory_stats"):
        return math.nan
    peak = backend.max_memory_allocated(device)
    backend.reset_peak_memory_stats(device)
    return peak / 2**30
