"""The benchmarks: what is listed, that every provider computes the same, that nothing a peer does stops a run, and that limits can fail."""

import json
import os
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastkd import DIVERGENCES

from .aot import TARGETS as GPUS

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
pytest.importorskip("pytest_benchmark")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def tiny(monkeypatch):
    """Settings on a problem that Triton's interpreter computes at once."""
    from benchmarks.cells import SHAPES, Shape

    monkeypatch.setitem(SHAPES, "tiny", Shape(6, 130, 16, 24, torch.float32, 4))
    return lambda setting: replace(setting, shape="tiny", tokens=None, top_k=setting.top_k and 8)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    command = [
        sys.executable,
        "benchmarks/run.py",
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--only",
        "jsd fastkd",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "quick jsd, fastkd 16-bit logits" in done.stdout
    return json.loads((out / "quick-cpu.json").read_text())


def test_the_file_says_where_and_what_was_run(report):
    assert {"date", "command", "commit", "dirty", "hardware", "versions", "rows"} <= report.keys()
    assert report["hardware"]["cores"] >= 1
    assert report["versions"]["torch"]
    assert "--quick" in report["command"]
    assert report["complete"]


def test_rows_are_complete_and_agree(report):
    rows = {(r["divergence"], r["provider"]): r for r in report["rows"]}
    assert rows.keys() == {("jsd", "fastkd"), ("jsd", "fastkd 16-bit logits")}
    assert "16-bit inputs" in rows.pop(("jsd", "fastkd 16-bit logits"))["skipped"]
    for row in rows.values():
        assert row["ms"] == min(row["all_ms"]) > 0
        assert row["floor_ms"] == min(row["all_floor_ms"]) > 0
        assert row["ratio"] == pytest.approx(row["ms"] / row["floor_ms"])
        assert row["loss"] > 0
        assert row["agrees"] is True
        assert row["error"].keys() == {"loss", "d_hidden", "d_weight"}
        assert row["output_bytes"] == 4 * 32 * (64 + 1000)
        assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] > 0


def test_cells_are_few_and_what_targets_name_is_measured():
    from benchmarks.cells import CELLS, TARGETS
    from benchmarks.providers import PROVIDERS

    assert len(CELLS["gpu"]) <= 60
    for name, cells in CELLS.items():
        assert len({cell.name for cell in cells}) == len(cells), name
        assert {cell.provider for cell in cells} <= PROVIDERS.keys()
    measured = set(CELLS["gpu"])
    for target in TARGETS:
        assert {target.cell, target.over or target.cell} <= measured, target.text
        assert (target.at_most is None) != (target.at_least is None), target.text


def _cells_to_compute():
    sys.path.insert(0, str(ROOT))
    from benchmarks.cells import CELLS
    from benchmarks.providers import PROVIDERS

    sys.path.remove(str(ROOT))
    return [cell for cell in CELLS["quick"] if PROVIDERS[cell.provider].loss and not PROVIDERS[cell.provider].compiles]


@pytest.mark.parametrize("cell", _cells_to_compute(), ids=lambda cell: cell.name)
def test_every_provider_computes_the_same(cell, tiny):
    from benchmarks.providers import PROVIDERS, Problem, Unavailable, truth

    problem = Problem(tiny(cell.setting), CPU)
    try:
        step = PROVIDERS[cell.provider].build(problem)
    except Unavailable as error:
        pytest.skip(str(error))
    result = step()
    assert all(error < 1e-4 for error in truth(problem).errors(result).values())
    assert (result[2] is None) == cell.setting.frozen_head


def test_sixteen_bit_logits_are_worse_and_a_wrong_gradient_shows(tiny, monkeypatch):
    from benchmarks.cells import SHAPES, Setting
    from benchmarks.providers import PROVIDERS, Problem, truth

    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], dtype=torch.bfloat16))
    problem = Problem(Setting("tiny"), CPU)
    expected = truth(problem)
    exact, rounded = (expected.errors(PROVIDERS[name].build(problem)()) for name in ("fastkd", "fastkd 16-bit logits"))
    assert exact["d_hidden"] < 0.006 < rounded["d_hidden"] < 0.1
    loss, d_hidden, d_weight = PROVIDERS["fastkd"].build(problem)()
    assert expected.errors((loss, d_hidden, 1.1 * d_weight))["d_weight"] == pytest.approx(0.1, rel=0.05)


def test_the_floor_leaves_out_what_the_setting_leaves_out(tiny):
    from benchmarks.cells import Setting
    from benchmarks.providers import FLOORS, Problem

    def shapes(**changes):
        return [None if x is None else tuple(x.shape) for x in FLOORS["gemms"](Problem(tiny(Setting("tiny", **changes)), CPU))()]

    assert shapes() == [(6, 130), (6, 16), (130, 16)]
    assert shapes(counted=0.5) == [(3, 130), (3, 16), (130, 16)]
    assert shapes(frozen_head=True) == [(6, 130), (6, 16), None]
    assert shapes(top_k=8) == [None, (6, 16), (130, 16)]


def test_the_row_kernel_and_its_copy_move_the_same_bytes(tiny):
    from benchmarks.cells import Setting
    from benchmarks.providers import FLOORS, PROVIDERS, Problem

    problem = Problem(tiny(Setting("tiny", "jsd")), CPU)
    PROVIDERS["row kernel"].build(problem)()
    copied = FLOORS["copy"](problem)()
    assert 2 * copied.nbytes == 6 * 130 * (3 * 2 * 4 + 2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), RuntimeError("an illegal memory access")])
def test_a_failing_peer_is_a_row_and_keeps_no_memory(tiny, monkeypatch, error):
    from benchmarks import bench_loss
    from benchmarks.cells import Cell, Setting
    from benchmarks.providers import PROVIDERS, Provider

    held = []

    def build(problem):
        def step():
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise error

        return step

    monkeypatch.setitem(PROVIDERS, "trl", Provider(build))
    row = bench_loss.attempt(Cell(Setting("tiny"), "trl"), CPU, 0.01, None)
    assert "in step" in row.pop("traceback")
    assert row == {"skipped": f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"}
    error.__traceback__ = None  # this test holds the exception; a peer's own is gone
    assert held[0]() is None


CHILD = """
import json, sys
options = dict(x[2:].split("=", 1) for x in sys.argv if x.startswith("--") and "=" in x)
def note(**line):
    print(json.dumps(line), file=open(options["journal"], "a"))
for i in map(int, options["indices"].split(",")):
    note(began=i)
    if i == 1:
        sys.exit(5)
    if i == 2:
        import time; time.sleep(60)
    note(done=i, row={"ms": float(i)})
"""


def test_a_process_that_dies_or_hangs_costs_its_row(monkeypatch):
    from benchmarks import run

    start = subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, **more: start([command[0], "-c", CHILD, *command[1:]], **more))
    monkeypatch.setitem(run.CELL_SECONDS, "cpu", 0.5)
    written: list[int] = []
    rows = run.run_cells("quick", [0, 1, 2, 3], "cpu", 0.01, None, lambda rows: written.append(len(rows)))
    assert [row.get("ms") for row in rows] == [0.0, None, None, 3.0]
    assert rows[1]["skipped"] == "failed: the process ended with status 5"
    assert rows[2]["skipped"].startswith("failed: the process ended with status -")
    assert written == [1, 2, 3, 4], "the file is written after each cell"


GRANDCHILD = """
import os, subprocess, sys, time
options = dict(x[2:].split("=", 1) for x in sys.argv if x.startswith("--") and "=" in x)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('{"began": 0}', file=open(options["journal"], "a"), flush=True)
open(os.environ["PID_FILE"], "w").write(str(child.pid))
time.sleep(60)
"""


def _alive(pid: int) -> bool:
    """A zombie, which nobody has waited for yet, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("how", ["given up", "interrupted"])
def test_what_a_cell_started_ends_with_it(monkeypatch, tmp_path, how):
    from benchmarks import run

    start, pid_file = subprocess.Popen, tmp_path / "pid"
    monkeypatch.setenv("PID_FILE", str(pid_file))
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, **more: start([command[0], "-c", GRANDCHILD, *command[1:]], **more))
    monkeypatch.setitem(run.CELL_SECONDS, "cpu", 1.0 if how == "given up" else 60)
    sleep = time.sleep

    def interrupted(seconds):
        if pid_file.exists() and pid_file.read_text():
            raise KeyboardInterrupt
        sleep(seconds)

    if how == "given up":
        (row,) = run.run_cells("quick", [0], "cpu", 0.01, None, lambda rows: None)
        assert row["skipped"].startswith("failed: the process ended with status -")
    else:
        monkeypatch.setattr(run.time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run_cells("quick", [0], "cpu", 0.01, None, lambda rows: None)
    pid = int(pid_file.read_text())
    for _ in range(50):
        if not _alive(pid):
            break
        sleep(0.1)
    assert not _alive(pid)


def test_a_compiling_provider_gets_half_as_long_again(monkeypatch):
    from benchmarks import run

    found = {}

    def watch(child, journal, limit, done):
        found.update({cell.provider: limit(i) for i, cell in enumerate(run.CELLS["gpu"])} | {None: limit(None)})
        return None

    monkeypatch.setattr(run, "_watch", watch)
    start = subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", lambda command, **more: start([command[0], "-c", ""], **more))
    run.run_cells("gpu", [0], "cuda", 0.01, None, lambda rows: None)
    assert (found["fastkd"], found["liger compiled"], found[None]) == (60, 90, run.START_SECONDS)


def test_when_no_cell_can_be_begun_the_table_says_so(monkeypatch, tmp_path, capsys):
    from benchmarks import run

    start, broken = subprocess.Popen, "raise OSError('libcuda is missing')"
    monkeypatch.setattr(
        run.subprocess,
        "Popen",
        lambda command, **more: start(command if "pytest" not in command else [command[0], "-c", broken], **more),
    )
    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--only", "jsd fastkd"]) == 1
    out, error = capsys.readouterr()
    assert [line for line in error.splitlines() if "begun" in line] == ["no cell was begun: status 1: OSError: libcuda is missing"]
    assert out.count(run.UNBEGUN) == 2
    assert not json.loads((tmp_path / "quick-cpu.json").read_text())["complete"]


def test_what_nvidia_smi_says_is_of_the_gpu_in_use_or_nothing(monkeypatch):
    from benchmarks import run

    facts = [str(i) for i in range(len(run.GPU_FACTS))]
    first, second = (", ".join([f"GPU-{uuid}", *facts]) for uuid in ("aa", "bb"))
    said = {
        f"{first}\n{second.replace('0', 'driver')}\n": {**dict(zip(run.GPU_FACTS, facts, strict=True)), "driver_version": "driver"},
        f"{first}\n": {},
        "GPU-bb, 1\n": {},
        "No devices were found": {},
        "": {},
    }
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="bb"))
    for text, expected in said.items():
        monkeypatch.setattr(run.subprocess, "run", lambda *a, said=text, **k: SimpleNamespace(stdout=said))
        assert run._gpu() == expected, text


def test_after_the_deadline_no_cell_is_begun(tmp_path, capsys):
    from benchmarks import run

    assert run.main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--only", "jsd fastkd", "--deadline", "-1"]) == 0
    written = json.loads((tmp_path / "quick-cpu.json").read_text())
    assert not written["complete"]
    assert {row["skipped"] for row in written["rows"]} == {run.LATE}
    assert run.LATE in capsys.readouterr().out


def test_limits_can_fail():
    from benchmarks.run import failures

    good = {"shape": "cpu", "divergence": "jsd", "setting": "", "provider": "fastkd", "ratio": 1.2}
    good |= {"peak_extra_bytes": 9, "bound_bytes": 5, "output_bytes": 4}
    peer = {"shape": "cpu", "divergence": "jsd", "setting": "", "provider": "trl"}
    assert failures([good, good | {"setting": "ce", "ratio": 1.3}, peer | {"skipped": "failed: of memory"}]) == []
    assert len(failures([good | {"ratio": 1.3}])) == 1
    assert len(failures([good | {"peak_extra_bytes": 10}])) == 1
    assert len(failures([good | {"setting": "ce", "peak_extra_bytes": 10}])) == 1
    assert len(failures([good | {"agrees": False, "error": {"loss": 0.1}}])) == 1
    assert failures([peer | {"agrees": False, "error": {"loss": 0.1}}]) == [], "a peer breaks no promise of fastkd"
    assert len(failures([{**peer, "provider": "fastkd", "skipped": "failed: of memory"}])) == 1


def test_a_peer_that_rounds_computes_the_same_and_its_row_says_how_far_off_it_is():
    from benchmarks.bench_loss import agrees
    from benchmarks.cells import Cell, Setting
    from benchmarks.run import describe, table

    rounded = {"loss": 0.005, "d_hidden": 0.2, "d_weight": 0.12}
    assert agrees("liger compiled", torch.bfloat16, rounded)
    assert not agrees("fastkd 16-bit logits", torch.bfloat16, rounded), "what is ours is held to more"
    assert not agrees("liger compiled", torch.bfloat16, rounded | {"loss": 0.06})
    assert not agrees("liger compiled", torch.bfloat16, rounded | {"d_hidden": 0.51})
    assert not agrees("liger compiled", torch.bfloat16, rounded | {"d_hidden": float("nan")})
    assert not agrees("trl", torch.float32, {"loss": 0.0, "d_hidden": 0.002})
    row = describe(Cell(Setting("B"), "trl")) | {"ms": 60.0, "ratio": 1.5, "error": rounded, "agrees": True}
    fine = row | {"error": {"loss": 0.001, "d_hidden": 0.04, "d_weight": 0.03}}
    lines = table([row, fine, row | {"agrees": False}]).splitlines()[1:]
    assert lines[0].endswith("gradients off by 20 %")
    assert "off by" not in lines[1]
    assert lines[2].endswith("computes something else, loss off by 0.5 %")


def test_targets_are_met_missed_or_not_measured():
    from benchmarks.cells import Cell, Setting, Target
    from benchmarks.run import describe, judge

    fast, slow = Cell(Setting("B"), "fastkd"), Cell(Setting("B"), "trl")
    rows = [describe(fast) | {"ms": 40.0, "ratio": 1.2}, describe(slow) | {"ms": 60.0, "agrees": True}]
    assert judge(Target("a", "ratio", fast, at_most=1.2), rows) == ("target a: at most 1.20: 1.20, met", True)
    assert judge(Target("a", "ratio", fast, at_most=1.1), rows) == ("target a: at most 1.10: 1.20, missed", False)
    assert judge(Target("a", "ms", slow, fast, at_least=1.5), rows)[1] is True
    assert judge(Target("a", "ms", slow, fast, at_least=1.6), rows)[1] is False
    assert judge(Target("a", "ratio", slow, at_most=1.1), rows) == ("target a: at most 1.10: not measured", None)
    rows[1]["agrees"] = False
    text = "target a: at least 1.50: not measured: trl computes something else"
    assert judge(Target("a", "ms", slow, fast, at_least=1.5), rows) == (text, None)


def test_times_of_one_setting_are_compared_over_the_floor_beside_each():
    from benchmarks.cells import TARGETS
    from benchmarks.run import judge_all

    for target in TARGETS:
        same = target.over is not None and target.over.setting == target.cell.setting
        assert not (same and target.field == "ms"), target.text
    faster = {target.text for target in TARGETS if "times faster" in target.text}
    assert len(faster) == 9
    # Measured while the clock was slower by a third: the ratio knows.
    (target,) = [t for t in TARGETS if t.text == "B: times faster than TRL"]
    rows = _rows({target.cell: (60.0, 1.9), target.over: (60.0, 1.35)})
    lines, _ = judge_all(set(target.cells), rows, meant=True)
    assert [line for line in lines if "TRL" in line and "memory" not in line] == [f"target {target.text}: at least 1.40: 1.41, met"]


def _rows(times):
    from benchmarks.run import describe

    return [describe(cell) | {"ms": ms, "ratio": ratio, "agrees": True} for cell, (ms, ratio) in times.items()]


def test_a_check_on_a_gpu_fails_where_nothing_was_measured():
    from benchmarks.cells import CELLS, TARGETS
    from benchmarks.run import judge_all

    ours = [target for target in TARGETS if target.ours]
    assert 0 < len(ours) < len(TARGETS)
    for meant in (True, False):
        lines, broken = judge_all(set(CELLS["gpu"]), [], meant=meant)
        assert len(lines) == len(TARGETS)
        assert broken == [line for line in lines if any(f"target {t.text}:" in line for t in ours)]
        assert all("not measured" in line for line in broken)
    assert judge_all(set(CELLS["quick"]), [], meant=True) == ([], []), "what was not asked for is not missing"
    slow = _rows({cell: (99.0, 9.9) for target in ours for cell in target.cells})
    assert "missed" in " ".join(judge_all(set(CELLS["gpu"]), slow, meant=True)[1])
    # Small chunks' memory is not in these rows; a target for an H100 that another GPU misses is no failure.
    assert not judge_all(set(CELLS["gpu"]), slow, meant=False)[1]


def test_a_failure_of_matplotlib_is_one_line(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks import plots, run

    def broken(rows, path):
        raise RuntimeError("no font\nmore")

    monkeypatch.setattr(plots, "draw", broken)
    assert run._plots(tmp_path / "a.json", []) == []
    assert capsys.readouterr().err == "no plots: RuntimeError: no font\n"


def test_plots_of_what_was_swept(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.cells import CELLS
    from benchmarks.plots import draw
    from benchmarks.run import describe

    rows = [describe(cell) | {"ratio": 1.5, "loss": 1.0, "peak_extra_bytes": 10**8} for cell in CELLS["sweep"] if cell.provider == "trl"]
    assert draw(rows[:2], tmp_path / "a.json") == []
    drawn = draw(rows, tmp_path / "sweep-cpu.json")
    assert [path.name for path in drawn] == ["sweep-cpu-tokens.svg", "sweep-cpu-vocabulary.svg"]
    assert all("<svg" in path.read_text() for path in drawn)


def test_the_report_of_registers_covers_every_kernel_divergence_and_gpu():
    rows = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())["rows"]
    expected = {(kernel, name, gpu) for kernel in ("rows", "topk") for name in DIVERGENCES for gpu in GPUS}
    assert {(row["kernel"], row["divergence"], row["target"]) for row in rows} == expected
    assert all(row["registers"] > 16 for row in rows)


def test_make_gpu_leaves_the_benchmark_what_the_tests_leave(tmp_path):
    """The tests' failure stops nothing, and is the exit status; the deadline is what remains."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *pytest*) sleep 1; exit 1;; *xdist*) exit 1;; esac\n')
    fake.chmod(0o755)
    command = ["make", "gpu", f"GPU_PY={fake}", f"OUT={tmp_path / 'out'}", "GPU_SECONDS=100"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "/elsewhere"})
    assert done.returncode != 0
    *_, tests, bench = (tmp_path / "calls").read_text().splitlines()
    assert tests.endswith(" tests/test_gpu.py"), "alone, without pytest-xdist"
    assert "pytest-xdist is not installed" in done.stdout
    assert bench.startswith(f"benchmarks/run.py --out {tmp_path / 'out'} --check --deadline ")
    assert 90 <= int(bench.split()[-1]) < 100
