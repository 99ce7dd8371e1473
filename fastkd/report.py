"""What a run leaves behind to look at: `metrics.jsonl`, a row per logging step, and `report.html`, which opens offline."""

import html
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["METRICS", "PLAN", "MetricsFile", "read_metrics", "write_report"]

METRICS = "metrics.jsonl"
PLAN = "plan.json"

# (title, training column, evaluation column)
_CURVES = (
    ("loss", "loss", "eval_loss"),
    ("KD term, nats per token", "kd", None),
    ("KL to the teacher, nats per token", None, "eval_kl"),
    ("cross-entropy, nats per token", "ce", "eval_ce"),
    ("top-1 agreement with the teacher", None, "eval_agreement"),
    ("learning rate", "lr", None),
    ("temperature", "temperature", None),
    ("kd_ratio", "kd_ratio", None),
)


class MetricsFile:
    """Appends rows to ``folder/metrics.jsonl``."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / METRICS
        self._mine: list[dict[str, Any]] = []

    def start(self, step: int, resumed: bool) -> None:
        """Begin a training run at ``step``: a resumed one drops the rows after its checkpoint, a new one those of any earlier run."""
        if not self.path.exists():
            return
        rows = [row for row in read_metrics(self.path) if row["step"] <= step] if resumed else self._mine
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; values that JSON has no number for (nan, inf) become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._mine.append(clean)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(json.dumps(clean) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, or of the one in a run's folder; a last row that a crash cut short is left out."""
    path = Path(path)
    if path.is_dir():
        path = path / METRICS
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_report(folder: str | Path, title: str, facts: Mapping[str, Any]) -> Path:
    """Write ``folder/report.html``: the facts, the stages, the evaluations, and curves over the steps with the stages shaded.

    The stages are those of ``folder/plan.json``, where there is one. Returns the report's path.
    """
    folder = Path(folder)
    rows = read_metrics(folder)
    plan = folder / PLAN
    stages = json.loads(plan.read_text())["stages"] if plan.exists() else []
    train = [r for r in rows if "loss" in r]
    evals = [r for r in rows if "eval_ce" in r]
    columns = ["step", *[k for k in ("eval_kl", "eval_ce", "eval_perplexity", "eval_agreement", "eval_loss") if any(k in r for r in evals)]]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;margin:1rem 0}}td,th{{border-bottom:1px solid #ddd;padding:.25rem .8rem;text-align:right}}
td:first-child,th:first-child{{text-align:left}}svg{{max-width:100%;height:auto}}</style>
<h1>{html.escape(title)}</h1>
{_table(("", ""), facts.items(), header=False)}
{_stages(stages)}
<h2>On held-out rows</h2>
{_table(columns, ([r.get(c) for c in columns] for r in evals)) if evals else "<p>No evaluation rows were given.</p>"}
<h2>Curves</h2>
{_curves(train, evals, stages) if train or evals else "<p>No step was logged.</p>"}
</html>
"""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _table(columns, rows, header: bool = True) -> str:
    def cells(values, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(_text(v))}</{tag}>" for v in values) + "</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f"<table>{cells(columns, 'th') if header else ''}{body}</table>"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _stages(stages: list[dict]) -> str:
    if not stages:
        return ""
    hidden = ("name", "first_step", "restart_lr", "reset_optimizer")
    names = list(dict.fromkeys(key for row in stages for key in row))
    columns = [key for key in names if key not in hidden and any(row.get(key) is not None for row in stages)]
    rows = ([_ends(row.get(key)) for key in columns] for row in stages)
    return f"<h2>Stages</h2>\n{_table(columns, rows)}"


def _ends(value: Any) -> Any:
    return " to ".join(_text(v) for v in value) if isinstance(value, list) else value


def _curves(train: list[dict], evals: list[dict], stages: list[dict]) -> str:
    from matplotlib.figure import Figure  # no pyplot: no backend, no global state

    shown = [c for c in _CURVES if _points(train, c[1]) or _points(evals, c[2])]
    # A knob that does not move is in the table of the stages.
    shown = [c for c in shown if len({y for _, y in _points(train, c[1])}) != 1 or c[1] not in ("temperature", "kd_ratio")]
    figure = Figure(figsize=(10, 3 * math.ceil(len(shown) / 2)), layout="constrained")
    axes = figure.subplots(math.ceil(len(shown) / 2), 2, squeeze=False).flatten()
    for axis, (title, train_column, eval_column) in zip(axes, shown, strict=False):
        for points, style, label in ((_points(train, train_column), "-", "training"), (_points(evals, eval_column), "o-", "held out")):
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
        _shade(axis, stages)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return stream.getvalue().split("?>", 1)[-1]  # without the XML declaration, which HTML does not know


def _shade(axis, stages: list[dict]) -> None:
    """Every other stage in grey, each with its teacher's name."""
    if len(stages) < 2:
        return
    for stage in stages:
        start, end = stage["first_step"], stage["first_step"] + stage["steps"]
        if stage["stage"] % 2:
            axis.axvspan(start, end, color="0.92", zorder=0)
        label = stage["teacher"] or "no teacher"
        axis.text(start, 1, f" {label}", transform=axis.get_xaxis_transform(), fontsize=7, va="top", clip_on=True)


def _points(rows: list[dict], column: str | None) -> list[tuple[int, float]]:
    return [(r["step"], r[column]) for r in rows if column is not None and r.get(column) is not None]
