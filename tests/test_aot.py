"""The row kernel compiles for every target, at its chosen block, without touching the stack."""

import pytest

from fastkd import DIVERGENCES

from .aot import TARGETS, report_in_subprocess

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.slow
def test_no_spills_on_any_target():
    rows = report_in_subprocess()
    assert {(r["divergence"], r["target"]) for r in rows} == {(d, t) for d in DIVERGENCES for t in TARGETS}
    assert all(r["registers"] > 16 for r in rows), "resources were not read"
    spilled = [r for r in rows if r["stack_bytes"] or r["spills"]]
    assert not spilled, "\n".join(map(str, spilled))
