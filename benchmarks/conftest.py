"""Options of the benchmark cells; `run.py` sets them."""

from pathlib import Path

from benchmarks.cells import CELLS


def pytest_addoption(parser):
    group = parser.getgroup("fastkd")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--cells", default="cpu", help="a name in cells.CELLS")
    group.addoption("--indices", help="which of them, separated by commas; default: all")
    group.addoption("--seconds", type=float, default=1.0, help="of measuring, for each cell")
    group.addoption("--until", type=float, help="no cell is begun after this time, in seconds since the epoch")
    group.addoption("--journal", type=Path, help="a file that gets a line when a cell begins, and one when it is done")


def pytest_generate_tests(metafunc):
    if "index" in metafunc.fixturenames:
        name, chosen = metafunc.config.getoption("--cells"), metafunc.config.getoption("--indices")
        indices = range(len(CELLS[name])) if chosen is None else [int(i) for i in chosen.split(",")]
        metafunc.parametrize("index", indices, ids=[CELLS[name][i].name for i in indices])
