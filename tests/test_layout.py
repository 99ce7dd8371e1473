"""The repository's shape: which module may import which, and a folder named `kernels` that must never become a package."""

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {p.stem for p in (ROOT / "fastkd").glob("*.py")}
TORCH_ONLY = {"torch", "triton", *sys.stdlib_module_names}

# What each module of the loss may import of fastkd: signals, reference -> ops -> functional -> losses.
LOSS = {
    "_version": set(),
    "signals": set(),
    "reference": {"signals"},
    "gemm": set(),
    "chunking": set(),
    "ops": {"signals", "reference", "gemm", "chunking"},
    "functional": {"signals", "reference", "gemm", "ops"},
    "losses": {"signals", "reference", "gemm", "ops", "functional"},
    "parallel": {"signals", "reference", "gemm", "chunking", "ops", "functional"},
    "__init__": {"_version", "signals", "functional", "losses"},
}


def _imports(path: Path, package: str) -> set[str]:
    """Dotted names of the modules a file imports, wherever in it; relative ones resolved in ``package``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else None, node.module]))
            if node.level > 1:
                raise AssertionError(f"{path}: an import from above the package")
            found |= {f"{base}.{alias.name}" if base in ("fastkd", "fastkd_kernels") else base for alias in node.names}
    return found


def _tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _library_imports(module: str) -> set[str]:
    names = {n.split(".")[1] for n in _imports(ROOT / "fastkd" / f"{module}.py", "fastkd") if n.startswith("fastkd.")}
    return {n if n in LIBRARY else "__init__" for n in names}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels" / "fastkd_kernels").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_nothing_of_the_library(path):
    tops = _tops(_imports(path, "fastkd_kernels"))
    assert tops <= TORCH_ONLY | {"fastkd_kernels"}, tops
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastkd"):
            raise AssertionError(f"{path.name}: relative imports only, so that the folder can be published by itself")


@pytest.mark.parametrize("module", sorted(LOSS))
def test_the_loss_imports_in_one_direction(module):
    assert _library_imports(module) <= LOSS[module]
    assert _tops(_imports(ROOT / "fastkd" / f"{module}.py", "fastkd")) <= TORCH_ONLY | {"fastkd", "fastkd_kernels"}


def test_other_modules_use_the_losses_public_names():
    """What is above the loss reaches it through what users import, and nothing below imports the trainer or the command line."""
    for module in sorted(LIBRARY - set(LOSS)):
        imported = _library_imports(module)
        assert "ops" not in imported, f"{module} imports ops"
        if module not in ("trainer", "cli", "__main__"):
            assert "cli" not in imported, f"{module} imports the command line"


def test_the_library_has_no_import_cycle():
    graph = {module: _library_imports(module) - {"__init__"} for module in LIBRARY - {"__init__"}}

    def visit(module: str, path: tuple[str, ...]):
        assert module not in path, " -> ".join((*path, module))
        for other in graph[module]:
            visit(other, (*path, module))

    for module in graph:
        visit(module, ())


@pytest.mark.skipif("plan" not in LIBRARY, reason="there is no plan.py yet")
def test_the_plan_needs_the_standard_library_alone():
    assert _tops(_imports(ROOT / "fastkd" / "plan.py", "fastkd")) <= set(sys.stdlib_module_names)


def test_importing_fastkd_is_light():
    code = "import sys, fastkd; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert {"torch", "fastkd", "fastkd_kernels"} <= loaded
    assert not loaded & {"transformers", "datasets", "accelerate", "peft", "matplotlib", "yaml", "pandas"}


def test_public_names():
    import fastkd

    contract = {
        "fused_linear_kd",
        "kd_loss",
        "FusedLinearKDLoss",
        "divergence",
        "DIVERGENCES",
        "TeacherHidden",
        "TeacherLogits",
        "TeacherTopK",
    }
    assert contract <= set(fastkd.__all__)
    assert all(hasattr(fastkd, name) for name in fastkd.__all__)


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_benchmarks_and_examples_use_public_names(folder):
    """From the loss's modules they take what `fastkd` exports; `fastkd.reference` is the oracle to compare with."""
    for path in (ROOT / folder).rglob("*.py"):
        private = {n for n in _imports(path, folder) if n.startswith(("fastkd.ops", "fastkd.gemm", "fastkd.functional"))}
        assert not private, f"{path.relative_to(ROOT)} imports {private}"


def test_the_kernels_folder_is_a_source_root_and_no_package():
    """Hugging Face's package `kernels` must stay importable with this repository's root on the path."""
    assert not list((ROOT / "kernels").glob("*.py"))
    assert sorted(p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__") == ["fastkd_kernels"]
    code = "import sys, importlib.util; sys.path.insert(0, sys.argv[1]); s = importlib.util.find_spec('kernels'); print(s and s.origin)"
    origin = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True).stdout.strip()
    assert origin == "None" or "site-packages" in origin


def test_packaging_maps_the_kernels():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    assert settings["package-dir"]["fastkd_kernels"] == "kernels/fastkd_kernels"
    assert set(settings["packages"]) == {"fastkd", "fastkd_kernels"}, "a package missing here is missing from the wheel"
    packages = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("fastkd/**/__init__.py")}
    packages |= {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("kernels/**/__init__.py")}
    assert packages == {settings["package-dir"][name] for name in settings["packages"]}
    spec = importlib.util.find_spec("fastkd_kernels")
    assert spec is not None
    assert spec.origin is not None
