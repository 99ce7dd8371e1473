"""The row kernels compile for every target, at their chosen blocks, without touching the stack."""

import pytest

from fastkd import DIVERGENCES

from .aot import FEW, TARGETS, report_in_subprocess

triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.slow
def test_no_spills_on_any_target():
    rows = report_in_subprocess()
    expected = {(k, d, t) for k, names in (("rows", DIVERGENCES), ("topk", FEW)) for d in names for t in TARGETS}
    assert {(r["kernel"], r["divergence"], r["target"]) for r in rows} == expected
    assert all(r["registers"] > 16 for r in rows), "resources were not read"
    spilled = [r for r in rows if r["stack_bytes"] or r["spills"]]
    assert not spilled, "\n".join(map(str, spilled))
