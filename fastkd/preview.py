"""A plan on a terminal: its stages as a table, its knobs as a drawing."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from .pacing import learning_rate_factor
from .plan import Schedule

__all__ = ["preview"]

_WIDTH = 72
_LEVELS = "▁▂▃▄▅▆▇█"


def preview(schedule: Schedule, args: TrainingArguments) -> str:
    """The stages that the run comes to, as a table and a drawing.

    Samples, epochs, steps, counted tokens, the share of what a model computes that is padding, teacher, knobs, learning rate.
    """
    total = schedule.total_steps
    try:
        factor = learning_rate_factor(args, schedule)
    except ValueError:  # one that follows a metric
        rates = None
    else:
        rates = [args.learning_rate * factor(step) for step in range(total)]
    rows = []
    for row in schedule.table():
        first = row.pop("first_step")
        span = slice(first, first + row["steps"])
        notes = [note for key, note in (("restart_lr", "restart"), ("reset_optimizer", "reset")) if row.pop(key)]
        lr = "by a metric" if rates is None else f"{rates[span][0]:.2g} .. {max(rates[span]):.2g} .. {rates[span][-1]:.2g}"
        rows.append({**row, "learning rate": lr, "begins with": ", ".join(notes)})
        rows[-1] = _after(rows[-1], "tokens", "padding", f"{_padding(schedule, args, first, first + row['steps']):.0%}")
    columns = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    rows = [{key: row[key] for key in columns} for row in rows]
    if not any(row["begins with"] for row in rows):
        for row in rows:
            del row["begins with"]
    totals = {"name": "in all", "steps": total, "tokens": sum(row["tokens"] for row in rows)}
    cut = "" if total == schedule.planned_steps else f" (max_steps cuts {schedule.planned_steps} short)"
    heading = (
        f"plan {schedule.plan.name or 'of your own'}: {len(schedule.samples)} samples, batch {schedule.batch_size}, {total} steps{cut},"
        f" order {schedule.plan.order}, remainder {schedule.plan.remainder}"
    )
    return "\n".join([heading, "", *_table([*rows, totals]), "", *_drawing(schedule, rates)]) + "\n"


def _padding(schedule: Schedule, args: TrainingArguments, first: int, last: int) -> float:
    """The share of padding in the micro-batches of the steps from ``first`` to ``last``; of many steps, in some 500 spread over them."""
    lengths, size, processes = schedule.samples.lengths, args.per_device_train_batch_size, max(args.world_size, 1)
    useful = computed = 0
    for step in range(first, last, max(1, (last - first) // 500)):
        for micro in range(args.gradient_accumulation_steps):
            for process in range(processes):
                rows = [lengths[i] for i in schedule.micro_batch(step, micro, process=process, processes=processes, size=size)]
                useful += sum(rows)
                if not rows:  # the first row of the data fills the step up
                    computed += lengths[0]
                else:
                    computed += sum(rows) if getattr(args, "padding_free", False) else len(rows) * max(rows)
    return 1 - useful / computed


def _after(row: dict[str, Any], key: str, name: str, value: Any) -> dict[str, Any]:
    place = list(row).index(key) + 1
    return {**dict(list(row.items())[:place]), name: value, **dict(list(row.items())[place:])}


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " .. ".join(_cell(v) for v in value)
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _drawing(schedule: Schedule, rates: Sequence[float] | None) -> list[str]:
    total = schedule.total_steps
    width = min(_WIDTH, total)
    steps = [i * total // width for i in range(width)]
    points = [schedule.at(step) for step in steps]
    curves = {"temperature": [p.temperature for p in points], "kd_ratio": [p.kd_ratio for p in points]}
    names = dict.fromkeys(name for p in points for name in p.parameters)
    curves |= {name: [p.parameters.get(name, 0.0) for p in points] for name in names}
    if rates is not None:
        curves["learning rate"] = [rates[step] for step in steps]
    label = max(map(len, [*curves, "samples"]))
    curves = {"samples": [float(schedule.pools[p.stage]) for p in points], **curves}
    lines = [f"{name.rjust(label)}  {_bars(values)}  {_short(min(values))} to {_short(max(values))}" for name, values in curves.items()]
    stages = "".join(str(p.stage)[-1] for p in points)
    return [*lines, f"{'stage'.rjust(label)}  {stages}", *_teachers(label, schedule)]


def _teachers(label: int, schedule: Schedule) -> list[str]:
    starts = [start for start in schedule.starts if start < schedule.total_steps]
    names = [schedule.at(start).teacher or "none" for start in starts]
    if len(set(names)) < 2:
        return []
    terms = ", ".join(f"{name} from step {start}" for name, start in zip(names, starts, strict=True))
    return [f"{'teacher'.rjust(label)}  {terms}"]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _bars(values: Sequence[float]) -> str:
    low, high = min(0.0, *values), max(values)
    return "".join(_LEVELS[round((v - low) / (high - low) * (len(_LEVELS) - 1)) if high > low else 0] for v in values)
