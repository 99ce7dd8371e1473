"""The study of exactness on a tiny problem: it tells exact from rounded logits, and its limit can fail."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZE = (8, 500, 16)


@pytest.fixture(scope="module")
def accuracy():
    sys.path.insert(0, str(ROOT))
    from benchmarks import accuracy

    yield accuracy
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def rows(accuracy):
    chosen = [accuracy.Setting("bf16", name, 1.0, 3.0, e) for name in ("forward_kl", "tvd") for e in accuracy.DISTANCES]
    return accuracy.study(SIZE, ["naive", *(name for name in accuracy.PROVIDERS if name.startswith("fastkd"))], chosen)


def test_fp32_logits_are_exact_at_every_distance_and_rounded_ones_are_not(accuracy, rows):
    assert accuracy.over_the_limit(rows) == []
    near = rows[0]
    assert near["distance"] == 0.01
    for name in ("naive", "fastkd, 16-bit logits"):
        assert min(near["errors"][name][1:]) > 5
    for row in rows:
        on_a_cpu, on_a_gpu = (row["errors"][name] for name in accuracy.PROMISED)
        assert on_a_cpu[0] == pytest.approx(on_a_gpu[0], abs=1e-2)
        assert max(on_a_cpu[1:]) <= 1.3 * max(on_a_gpu[1:])


def test_providers_that_do_not_compute_a_divergence_are_missing(accuracy):
    peers = [name for name in accuracy.PROVIDERS if name.startswith(("liger", "trl"))]
    (row,) = accuracy.study(SIZE, peers, [accuracy.Setting("bf16", "tvd", 1.0, 3.0, 1.0)])
    assert len(peers) == 3
    assert row["errors"] == {}


def test_a_provider_that_fails_says_why(accuracy, monkeypatch):
    def broken(problem):
        raise RuntimeError("no such device\nand more")

    monkeypatch.setitem(accuracy.PROVIDERS, "trl", broken)
    (row,) = accuracy.study(SIZE, ["trl"], [accuracy.Setting("bf16", "forward_kl", 1.0, 3.0, 1.0)])
    assert row["errors"] == {"trl": "RuntimeError: no such device"}
    assert "failed" in accuracy.summary([row], "d_hidden")


def test_the_limit_can_fail(accuracy, rows):
    row = {**rows[0], "errors": {"fastkd": [0.0, 0.4, 0.6]}}
    assert len(accuracy.over_the_limit([row])) == 1
    assert len(accuracy.over_the_limit([{**row, "errors": {"fastkd": [0.0, float("nan"), 0.1]}}])) == 1
    assert accuracy.over_the_limit([{**row, "errors": {"naive": [0.0, 90.0, 90.0]}}]) == []


def test_sums_in_16_bits_lose_digits_with_each_chunk(accuracy):
    rows = [row for row in accuracy.accumulation((64, 300, 16)) if row["dtype"] == "bf16"]
    for distance in {row["distance"] for row in rows}:
        one, four, sixteen = (row for row in rows if row["distance"] == distance)
        assert one["in fp32"] == pytest.approx(sixteen["in fp32"], rel=1e-2)
        assert one["in 16 bits"] < four["in 16 bits"] < sixteen["in 16 bits"]
        assert one["in fp32"] == pytest.approx(one["in 16 bits"], rel=0.1)


def test_the_file_is_json_with_a_line_for_each_row(accuracy, rows):
    text = accuracy._lines({"limit": 0.5, "rows": rows})
    assert json.loads(text) == {"limit": 0.5, "rows": rows}
    assert len(text.splitlines()) == len(rows) + 5
