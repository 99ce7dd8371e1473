"""Options of the benchmark cases; `run.py` sets them."""


def pytest_addoption(parser):
    group = parser.getgroup("fastkd")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--shapes", default="cpu", help="names in providers.SHAPES, separated by commas")
    group.addoption("--rounds", type=int, default=4, help="timed calls of fastkd; peers get half of them")


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", metafunc.config.getoption("--shapes").split(","), scope="module")
