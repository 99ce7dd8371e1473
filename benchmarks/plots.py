"""Time over the bare GEMMs and peak memory, over N and over V: drawn from the rows of a result file."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["draw"]

LABELS = {"tokens": "tokens", "vocabulary": "vocabulary"}
FEWEST = 3  # points that make a curve


def draw(rows: list[dict[str, Any]], path: Path) -> list[Path]:
    """An SVG beside ``path`` for each of N and V over which at least three settings were measured, everything else the same."""
    drawn = []
    for axis in LABELS:
        series = _series(rows, axis)
        if series:
            drawn.append(_figure(series, axis, path.with_name(f"{path.stem}-{axis}.svg")))
    return drawn


def _series(rows: list[dict[str, Any]], axis: str) -> dict[str, list[dict[str, Any]]]:
    """By provider, the rows that differ in ``axis`` alone; of several such groups the one with most values."""
    groups: dict[tuple, dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        plain = row["setting"] in ("", f"N {row['tokens']}")  # no other variant
        if "ratio" in row and plain and "loss" in row:
            fixed = [row[key] for key in ("divergence", "student_width", "teacher_width", "dtype")]
            fixed += [row[key] for key in LABELS if key != axis]
            groups[tuple(fixed)][row["provider"]][row[axis]] = row
    best: dict[str, list[dict[str, Any]]] = {}
    for providers in groups.values():
        found = {name: [points[x] for x in sorted(points)] for name, points in providers.items() if len(points) >= FEWEST}
        if sum(map(len, found.values())) > sum(map(len, best.values())):
            best = found
    return best


def _figure(series: dict[str, list[dict[str, Any]]], axis: str, path: Path) -> Path:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    time, memory = figure.subplots(1, 2)
    for name, rows in series.items():
        x = [row[axis] for row in rows]
        time.plot(x, [row["ratio"] for row in rows], marker="o", label=name)
        memory.plot(x, [(row.get("peak_extra_bytes") or float("nan")) / 1e6 for row in rows], marker="o", label=name)
    time.axhline(1.0, color="gray", linestyle="--", linewidth=1, label="the bare GEMMs")
    time.set(ylabel="time / bare GEMMs", ylim=(0, None))
    memory.set(ylabel="MB at the peak, gradients included", yscale="log")
    for panel in (time, memory):
        panel.set(xlabel=LABELS[axis], xscale="log")
        values = sorted({row[axis] for rows in series.values() for row in rows})
        panel.set_xticks(values, [f"{v:,}" for v in values])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    time.legend()
    some = next(iter(series.values()))[0]
    fixed = ", ".join(f"{some[key]:,} {key}" for key in LABELS if key != axis)
    widths = f"widths {some['student_width']} and {some['teacher_width']}"
    figure.suptitle(f"{some['divergence']}, {fixed}, {widths}, {some['dtype']}", fontsize=10)
    figure.savefig(path, metadata={"Date": None})
    return path
