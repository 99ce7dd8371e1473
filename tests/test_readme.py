"""What the README says must be so."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 1
    names: dict = {}
    exec(blocks[0], names)
    assert names["hidden"].grad.abs().max() > 0
    assert names["head"].weight.grad.abs().max() > 0


def test_the_file_tree_is_the_librarys():
    tree = TEXT.split("## Files")[1].split("```")[1]
    named = set(re.findall(r"^fastkd/(\w+\.py)", tree, re.M))
    there = {path.name for path in (ROOT / "fastkd").glob("*.py")} - {"__init__.py", "_version.py"}
    assert named == there
    kernels = {path.name for path in (ROOT / "kernels" / "fastkd_kernels").glob("*.py")} - {"__init__.py"}
    assert all(name in tree for name in kernels)


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_make_target_and_command_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w[\w-]*)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.M), target
    from fastkd.cli import main

    for command in set(re.findall(r"^fastkd (\w+)", TEXT, re.M)):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0, command


def test_figures_come_from_result_files():
    """Each number of the measured table is in the file that the README names beside it."""
    import json

    section = TEXT.split("## Measured")[1].split("**Exactness**")[0]
    rows = json.loads((ROOT / "benchmarks" / "results" / "loss-cpu.json").read_text())["rows"]
    known = {(r["provider"], r["divergence"]): r for r in rows if "ratio" in r and not r.get("setting")}
    found = re.findall(r"^\| ([\w ().-]+?) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", section, re.M)
    table = [cells for cells in found if any((cells[0], d) in known for d in ("forward_kl", "jsd", "adaptive_kl"))]
    assert len(table) >= 3
    for provider, *cells, memory in table:
        for divergence, cell in zip(("forward_kl", "jsd", "adaptive_kl"), cells, strict=True):
            if cell.strip() != "-":
                assert cell.strip() == f"{known[provider, divergence]['ratio']:.2f}", (provider, divergence)
        largest = max(r["peak_extra_bytes"] for (p, _), r in known.items() if p == provider)
        assert memory.strip() == f"{largest / 1e6:.0f}", provider


def test_figures_of_the_store_come_from_its_file():
    import json

    rows = json.loads((ROOT / "benchmarks" / "results" / "store-cpu.json").read_text())["rows"]
    for row in rows:
        assert row["same_weights"]
        name = row["student"].replace("of 30", "of its 30")
        seconds = " | ".join(f"{row[f'seconds_{mode}']:.0f} s" for mode in ("live", "filling", "stored"))
        peaks = f"{row['peak_mb_live']:.0f}, {row['peak_mb_stored']:.0f}"
        assert f"| {name} | {seconds} | {row['speedup']:.2f} | {row['ceiling']:.2f} | {peaks} |" in TEXT


def test_figures_of_the_exactness_come_from_their_file():
    import json
    from statistics import median

    rows = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())["rows"]
    table = TEXT.split("| | distance 0.01 |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 6
    for line in table:
        provider, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for distance, cell in zip((0.01, 0.05, 0.3, 1.0), cells, strict=True):
            errors = [r["errors"].get(provider) for r in rows if r["dtype"] == "bf16" and r["distance"] == distance]
            found = [e[2] for e in errors if isinstance(e, list)]
            assert [float(x) for x in cell.split("/")] == [float(f"{x:.2g}") for x in (median(found), max(found))], (provider, distance)


def test_the_random_cases_that_were_run_had_no_failure():
    import json

    report = json.loads((ROOT / "benchmarks" / "results" / "random-cases.json").read_text())
    assert report["cases"] == 10_000
    assert not report["failures"]


def test_figures_of_the_gpu_come_from_its_file():
    import json

    section = TEXT.split("## Measured")[1].split("**Exactness**")[0]
    rows = json.loads((ROOT / "benchmarks" / "results" / "loss-nvidia-h100-80gb-hbm3.json").read_text())["rows"]
    known = {(r["provider"], r["shape"], r["divergence"]): r for r in rows if "ratio" in r and not r.get("setting")}
    table = re.findall(r"^\| ([\w .-]+?) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", section, re.M)
    table = [cells for cells in table if (cells[0], "B", "forward_kl") in known]
    assert len(table) >= 7
    for provider, *cells in table:
        for (shape, divergence), cell in zip(
            (("A", "forward_kl"), ("B", "forward_kl"), ("C", "forward_kl"), ("B", "jsd")), cells, strict=False
        ):
            row = known.get((provider, shape, divergence))
            assert cell == ("-" if row is None else f"{row['ratio']:.2f}"), (provider, shape, divergence)
        row = known[provider, "B", "forward_kl"]
        assert cells[4] == f"{row['peak_extra_bytes'] / 1e6:.0f}"
        assert float(cells[5]) == float(f"{100 * row['error']['d_weight']:.2g}")


def test_figures_of_memory_come_from_their_files():
    import json

    def rows(name: str) -> list[dict]:
        return json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]

    cpu = rows("memory-cpu.json")
    assert len(cpu) == 11
    assert max(abs(row["error"]) for row in cpu) < 0.02
    assert f"{max(row['default_malloc'] / row['measured'] - 1 for row in cpu):.0%}" == "20%"
    assert "within 2 % of the peak resident memory of 11 runs" in TEXT
    assert "keeps up to 20 % more" in TEXT
    gpu = rows("memory-gpu.json")
    near = [row for row in gpu if abs(row["error"]) < 0.09]
    assert (len(gpu), len(near)) == (12, 11)
    assert "12 settings" in TEXT
    assert "11 were within 9 %" in TEXT
    (example,) = rows("memory-gpu-headline.json")
    assert f"{example['predicted'] / 1e9:.1f} GB (10^9 bytes) predicted, {example['measured'] / 1e9:.1f} measured" in TEXT
