"""What `fastkd doctor` finds, and how it is told."""

import dataclasses
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "LEVELS", "Finding", "as_json", "count", "error", "format_finding", "format_summary", "listed", "ok", "refusal", "size", "status",
    "text_of", "warning",
]  # fmt: skip

LEVELS = ("ok", "warning", "error", "skipped")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Args:
        level: "ok", "warning" (trains, but should be looked at), "error" (would not train, or not to any use), "skipped" (not looked at).
        check: which check.
        what: what is the case. why: why it matters. change: what to do, with the key of the configuration.
    """

    level: str
    check: str
    what: str
    why: str = ""
    change: str = ""


def ok(what: str) -> Finding:
    return Finding("ok", "", what)


def warning(what: str, why: str, change: str) -> Finding:
    return Finding("warning", "", what, why, change)


def error(what: str, why: str, change: str = "") -> Finding:
    return Finding("error", "", what, why, change)


def status(findings: Iterable[Finding]) -> int:
    """The exit status: 0, 1 where there are warnings, 2 where there are errors."""
    levels = {finding.level for finding in findings}
    return 2 if "error" in levels else 1 if "warning" in levels else 0


def format_finding(finding: Finding, width: int = 100) -> str:
    """A finding for a terminal: one line where all is well, else with why and what to change below."""
    first = f"{finding.level:<8} {finding.check:<12} "
    lines = _wrapped(first, finding.what, width)
    for label, text in (("why", finding.why), ("change", finding.change)):
        if text:
            lines += _wrapped(" " * 22 + f"{label:<7} ", text, width)
    return "\n".join(lines)


def format_summary(findings: Sequence[Finding], width: int = 100) -> str:
    """Which checks were skipped, and how many findings there are of each level."""
    skipped: dict[str, list[str]] = {}
    for finding in findings:
        if finding.level == "skipped":
            skipped.setdefault(finding.what, []).append(finding.check)
    lines = [line for what, checks in skipped.items() for line in _wrapped(f"{'skipped':<8} ", f"{', '.join(checks)}: {what}", width)]
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    words = [f"{counts['ok']} ok", count(counts["warning"], "warning"), count(counts["error"], "error")]
    return "\n".join([*lines, "", ", ".join(words + [f"{counts['skipped']} skipped"] * bool(counts["skipped"]))])


def as_json(config: str, findings: Sequence[Finding]) -> str:
    """The findings as JSON, with the exit status and the configuration's path."""
    content = {"config": config, "status": status(findings), "findings": [dataclasses.asdict(f) for f in findings]}
    return json.dumps(content, indent=1) + "\n"


def _wrapped(first: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, max(width, 60), initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False, break_on_hyphens=False
    ) or [first.rstrip()]


# Words.


def refusal(check: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """In which words a check refuses these arguments; empty where it does not."""
    try:
        check(*arguments, **options)
    except (ValueError, OSError) as problem:
        return text_of(problem)
    return ""


def text_of(problem: Exception) -> str:
    """In one line; with its kind, unless that kind is for what users do."""
    text = str(problem) if isinstance(problem, ValueError | OSError) else f"{type(problem).__name__}: {problem}"
    return " ".join(text.split())[:500]


def size(n: float) -> str:
    """Bytes, in words."""
    return next(
        (f"{n / size:.3g} {unit}" for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if n >= size), f"{n} bytes"
    )


def count(n: int, what: str) -> str:
    """``n`` of what is named by a word."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def listed(words: Iterable[str]) -> str:
    """Words, the last one after "and"."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
