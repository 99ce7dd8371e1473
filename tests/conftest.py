"""Fixtures for all tests, and the environment they run in."""

import gc
import os

# Tests use local files alone.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Triton decides at import whether kernels are interpreted. Without a GPU they run under its interpreter; compiling ahead of time
# then needs a process of its own (tests/aot.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """``shared_data("gsm8k")``: the path of public data beside the repository; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"no data {name!r}: {path} does not exist")
        return path

    return find


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> Iterator[None]:
    """A run collects garbage several times; going through all that was imported would take most of a short one's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    return 0
