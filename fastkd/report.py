"""What a run leaves behind to look at: `metrics.jsonl`, a row per logging step, and `report.html`, which opens offline."""

import contextlib
import html
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_whole

__all__ = [
    "EVALUATION",
    "METRICS",
    "PLAN",
    "REPORT",
    "VOLATILE",
    "MetricsFile",
    "duration",
    "format_metric",
    "read_metrics",
    "recorded_warnings",
    "stage_table",
    "stage_title",
    "write_report",
]

METRICS = "metrics.jsonl"
PLAN = "plan.json"
VOLATILE = ("runtime", "per_second", "memory_gb")
"""Parts of the names of columns that a clock or the machine gives: they differ where the rest of two runs is equal, bit for bit."""
REPORT = "report.html"

EVALUATION = {
    "eval_kl": "KL to the teacher, nats per token",
    "eval_agreement": "same first choice as the teacher",
    "eval_ce": "cross-entropy, nats per token",
    "eval_perplexity": "perplexity",
    "eval_loss": "training objective",
}
"""The columns of an evaluation, for people."""

# (title, training column, evaluation column)
_CURVES = (
    ("loss (training objective)", "loss", "eval_loss"),
    ("KD term, nats per token", "kd", None),
    ("KL to the teacher, nats per token", None, "eval_kl"),
    ("cross-entropy, nats per token", "ce", "eval_ce"),
    ("same first choice as the teacher", None, "eval_agreement"),
    ("learning rate", "lr", None),
    ("temperature", "temperature", None),
    ("kd_ratio", "kd_ratio", None),
    ("tokens per second", "tokens_per_second", None),
    ("useful tokens (not padding)", "useful_tokens", None),
)
_SHARES = ("eval_agreement", "useful_tokens")


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


@contextlib.contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """The warnings that this library, transformers and Python give meanwhile, each once, as they come; they are shown as ever."""
    found: list[str] = []

    def note(text: str) -> None:
        line = " ".join(text.split())
        if line not in found and len(found) < 50:
            found.append(line)

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    def shown(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
            note(str(message))
        show(message, category, *where, **options)

    recorder, show = Recorder(logging.WARNING), warnings.showwarning
    loggers = [logging.getLogger(name) for name in ("fastkd", "transformers")]
    for logger in loggers:
        logger.addHandler(recorder)
    warnings.showwarning = shown  # type: ignore[assignment]
    try:
        yield found
    finally:
        for logger in loggers:
            logger.removeHandler(recorder)
        if warnings.showwarning is shown:
            warnings.showwarning = show


_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881}
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
h1,li,.facts td{overflow-wrap:anywhere}h2{margin-top:2.5rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;margin:.5rem 0;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid var(--line);padding:.3rem .8rem .3rem 0;text-align:right;vertical-align:top}
th{font-weight:600}thead th{white-space:nowrap}
td:first-child,th:first-child,.facts td,.facts th{text-align:left}.stages td:first-child{white-space:nowrap}
.facts th{font-weight:400;opacity:.7;white-space:nowrap}
tr:nth-child(odd) td{background:linear-gradient(var(--soft),var(--soft))}.facts td{background:none!important}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(28rem,100%),1fr));gap:1rem 1.5rem}
figure{margin:0}figcaption{font-weight:600;font-size:.9rem}
svg{width:100%;height:auto;display:block}
.key{font-size:.85rem;font-weight:400}.key i{display:inline-block;width:1.2em;height:.2em;margin:0 .4em .25em .8em}
.note{opacity:.75;font-size:.9rem}
"""
_TRAINING, _HELD_OUT = "#2b7bba", "#e07a1f"  # legible on white and on black
_INK = "#010203"  # stands for the page's own colour, which depends on the reader's settings


def write_report(folder: str | Path, title: str, facts: Mapping[str, Any], *, status: str = "", warned: Sequence[str] = ()) -> Path:
    """Write ``folder/report.html``: facts, warnings, stages, evaluations, and curves over the steps with the stages shaded.

    The stages are those of ``folder/plan.json`` and the figures those of ``folder/metrics.jsonl``, as far as these are there. The page
    needs nothing else: no script, no font, no picture from elsewhere. Returns the report's path.

    Args:
        status: in words, whether the run is finished.
        warned: the run's warnings, one line each.
    """
    folder = Path(folder)
    rows = read_metrics(folder) if (folder / METRICS).exists() else []
    plan = folder / PLAN
    stages = json.loads(plan.read_text())["stages"] if plan.exists() else []
    train = [r for r in rows if "loss" in r]
    evals = [r for r in rows if "eval_ce" in r]
    shown = {**{name: value for name, value in facts.items() if value not in (None, "")}, **_measured(rows, train)}
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{f"<p>{html.escape(status)}</p>" if status else ""}
{_facts(shown)}
{_warnings(warned)}
{f'<h2>Stages</h2>{chr(10)}<div class="stages">{_table(*stage_table(stages))}</div>' if stages else ""}
<h2>On held-out rows</h2>
{_held_out(evals)}
<h2>Curves</h2>
{_curves(train, evals, stages) if train or evals else "<p>No step was logged.</p>"}
</body></html>
"""
    path = folder / REPORT
    write_whole(path, page)
    return path


def _measured(rows: list[dict], train: list[dict]) -> dict[str, str]:
    """What the metrics say of the run as a whole."""
    found = {}
    seconds = [r["train_runtime"] for r in rows if "train_runtime" in r]
    if seconds:
        found["time in training"] = duration(seconds[-1]) + (" (the last part of a resumed run)" if len(seconds) > 1 else "")
    if train:
        found["tokens trained on"] = f"{train[-1]['tokens']:,} (those that count in the loss)" if train[-1].get("tokens") else ""
    speeds = [r["tokens_per_second"] for r in train if r.get("tokens_per_second")]
    if speeds:
        found["speed"] = f"{sorted(speeds)[len(speeds) // 2]:,.0f} tokens/s (median)"
    useful = [r["useful_tokens"] for r in train if r.get("useful_tokens") is not None]
    if useful:
        found["useful tokens"] = f"{sum(useful) / len(useful):.0%} (the rest is padding)"
    memory = [r["memory_gb"] for r in train if r.get("memory_gb")]
    if memory:
        found["peak memory"] = f"{max(memory):.2f} GB"
    return {name: text for name, text in found.items() if text}


def duration(seconds: float) -> str:
    """``0:00:07``, ``3:25:00``, ``2 d 03:25``: hours, minutes and seconds; days, hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    return f"{days} d {hours_left:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{rest:02}"


def _facts(facts: Mapping[str, Any]) -> str:
    body = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(_text(value))}</td></tr>" for name, value in facts.items())
    return f'<div class="wide"><table class="facts">{body}</table></div>'


def _warnings(warned: Sequence[str]) -> str:
    if not warned:
        return ""
    lines = "".join(f"<li>{html.escape(text)}</li>" for text in warned)
    return f"<h2>Warnings</h2>\n<ul>{lines}</ul>"


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_text(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_metric(column: str, value: float | None) -> str:
    """A figure of an evaluation, for people: a share in percent."""
    if value is None:
        return _text(None)
    return f"{value:.1%}" if column in _SHARES else f"{value:,.3f}" if 0.01 <= abs(value) < 1e5 else f"{value:.3g}"


_STAGE_COLUMNS = {"first_step": "from step", "tokens": "counted tokens"}
_ANEW = {"restart_lr": "learning rate", "reset_optimizer": "optimizer"}


def stage_title(row: Mapping[str, Any]) -> str:
    """The number, from 1, and the name of a stage in a plan's table; a name that only numbers it, from 0, would mislead."""
    number, name = row["stage"], row.get("name") or ""
    return str(number + 1) if name == f"stage {number}" else f"{number + 1} {name}".strip()


def stage_table(stages: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a plan's table, for people; a column in which no stage has anything is left out."""
    hidden = ("stage", "name", *_ANEW, *(["first_step"] if len(stages) == 1 else []))
    names = [key for key in dict.fromkeys(key for row in stages for key in row) if key not in hidden]
    columns = [key for key in names if any(row.get(key) not in (None, False) for row in stages)]
    titles = ["stage", *(_STAGE_COLUMNS.get(key, key) for key in columns)]
    rows = [[stage_title(row), *(_text(_ends(row.get(key))) for key in columns)] for row in stages]
    if any(row.get(key) for row in stages for key in _ANEW):
        titles.append("begins anew")
        for cells, row in zip(rows, stages, strict=True):
            cells.append(", ".join(word for key, word in _ANEW.items() if row.get(key)))
    return titles, rows


def _ends(value: Any) -> Any:
    return " to ".join(_text(v) for v in value) if isinstance(value, list) else value


def _held_out(evals: list[dict]) -> str:
    """First against last, and every evaluation below where there are more."""
    if not evals:
        return "<p>No evaluation rows were given.</p>"
    columns = [c for c in EVALUATION if any(r.get(c) is not None for r in evals)]
    if len({r["step"] for r in evals}) == 1:
        row = evals[-1]
        return _table(("", f"step {row['step']:,}"), ([EVALUATION[c], format_metric(c, row.get(c))] for c in columns))
    first, last = evals[0], evals[-1]
    heads = ("", f"step {first['step']:,}", f"step {last['step']:,}", "change")
    both = ([*(format_metric(c, row.get(c)) for row in (first, last)), _change(c, first, last)] for c in columns)
    shown = _table(heads, ([EVALUATION[c], *values] for c, values in zip(columns, both, strict=True)))
    if len(evals) < 3:
        return shown
    rows = ([r["step"], *(format_metric(c, r.get(c)) for c in columns)] for r in evals)
    every = _table(["step", *(EVALUATION[c] for c in columns)], rows)
    return f"{shown}\n<details><summary>All {len(evals)} evaluations</summary>{every}</details>"


def _change(column: str, first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    before, after = first.get(column), last.get(column)
    if before is None or after is None:
        return _text(None)
    if column in _SHARES:
        return f"{100 * (after - before):+.1f} points"
    return f"{after / before - 1:+.1%}" if before > 0 else f"{after - before:+.4g}"


def _curves(train: list[dict], evals: list[dict], stages: list[dict]) -> str:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no backend, no global state

    figures = []
    for title, train_column, eval_column in _CURVES:
        drawn = [
            (_points(train, train_column), _TRAINING, "training"),
            (_points(evals, eval_column), _HELD_OUT, "held out"),
        ]
        drawn = [curve for curve in drawn if curve[0]]
        # A knob that does not move is in the table of the stages.
        if not drawn or (train_column in ("temperature", "kd_ratio") and len({y for _, y in drawn[0][0]}) == 1):
            continue
        with matplotlib.rc_context({"svg.hashsalt": title, "font.size": 8}):
            figure = Figure(figsize=(5, 2.4), layout="constrained")
            axis = figure.subplots()
            for points, color, _ in drawn:
                # So few that a line between them would not be seen, or would hide how few they are.
                axis.plot(*zip(*points, strict=True), "-", color=color, marker="o" if len(points) < 40 else "", markersize=3, linewidth=1.4)
            _dress(axis, stages, share=(train_column or eval_column) in _SHARES)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        key = "".join(f'<i style="background:{color}"></i>{label}' for _, color, label in drawn)
        caption = f'<figcaption>{html.escape(title)}<span class="key">{key}</span></figcaption>'
        figures.append(f"<figure>{caption}{_inline(stream, title)}</figure>")
    several = '<p class="note">Bands are the stages of the table above, numbered.</p>' if len(stages) > 1 else ""
    return f'{several}<div class="curves">{"".join(figures)}</div>'


def _dress(axis: Any, stages: list[dict], share: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    low, high = axis.get_ylim()
    if share:
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high - low > 0.04 else 1))
    else:
        axis.yaxis.set_major_formatter(FuncFormatter(_ticks(max(abs(low), abs(high)))))
    axis.grid(alpha=0.25, color="#888888")
    axis.tick_params(colors=_INK)
    axis.xaxis.label.set_color(_INK)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#888888")
    # All drawings show the same steps, those to come too.
    last = max([axis.dataLim.x1, *(stage["first_step"] + stage["steps"] for stage in stages)])
    axis.set_xlim(-0.02 * last, 1.02 * last if last else 1)
    if len(stages) > 1:
        for stage in stages:
            start, end = stage["first_step"], stage["first_step"] + stage["steps"]
            if stage["stage"] % 2:
                axis.axvspan(start, end, color="#888888", alpha=0.15, zorder=0, linewidth=0)
            if end - start > 0.03 * last:  # a number fits
                place, number = {"ha": "center", "va": "bottom", "transform": axis.get_xaxis_transform()}, str(stage["stage"] + 1)
                axis.text((start + end) / 2, 1.01, number, color=_INK, fontsize=7, **place)


def _ticks(most: float) -> Callable[[float, Any], str]:
    """One notation for all ticks of an axis that reaches to ``most``."""
    if most == 0 or 5e-3 <= most < 1e7:
        return lambda value, _: f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return lambda value, _: "0" if value == 0 else re.sub(r"e([+-])0*", lambda sign: f"e{sign[1].strip('+')}", f"{value:.1e}")


def _inline(stream: io.StringIO, title: str) -> str:
    """The drawing as a part of a page: no XML declaration, which HTML does not know, names for who cannot see it, the page's own colour."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)} over the steps"', 1)


def _points(rows: list[dict], column: str | None) -> list[tuple[int, float]]:
    return [(r["step"], r[column]) for r in rows if column is not None and r.get(column) is not None]
