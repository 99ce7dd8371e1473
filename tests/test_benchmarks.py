"""The benchmark runner on a tiny problem: it runs, its file is complete, and its limits can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "benchmarks/run.py", "--quick", "--device", "cpu", "--out", str(out), "--only", "(fastkd or naive) and jsd"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "naive torch" in done.stdout
    return json.loads((out / "loss-cpu-quick.json").read_text())


def test_the_file_says_where_and_what_was_run(report):
    assert {"date", "command", "commit", "dirty", "hardware", "versions", "rows"} <= report.keys()
    assert report["hardware"]["cores"] >= 1
    assert report["versions"]["torch"]
    assert "--quick" in report["command"]


def test_rows_are_complete_and_agree(report):
    rows = {(r["divergence"], r["provider"]): r for r in report["rows"]}
    assert {("jsd", "fastkd"), ("jsd", "naive torch")} == rows.keys()
    for row in rows.values():
        assert row["ms"] > 0
        assert row["gemms_ms"] > 0
        assert row["ratio"] == pytest.approx(row["ms"] / row["gemms_ms"])
        assert row["loss"] > 0
    peer = rows["jsd", "naive torch"]
    assert peer["agrees"] is True
    assert peer["loss"] == pytest.approx(rows["jsd", "fastkd"]["loss"], rel=1e-4)


def test_limits_can_fail(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.run import failures

    good = {"shape": "cpu", "divergence": "jsd", "provider": "fastkd", "ratio": 1.2}
    good |= {"peak_extra_bytes": 9, "bound_bytes": 5, "output_bytes": 4}
    peer = {"shape": "cpu", "divergence": "jsd", "provider": "trl", "agrees": False, "difference": {"loss": 0.1}}
    assert failures([good]) == []
    assert len(failures([good | {"ratio": 1.3}])) == 1
    assert len(failures([good | {"peak_extra_bytes": 10}])) == 1
    assert len(failures([peer])) == 1
