"""What is measured, as data: shapes, settings, the cells in order of importance, and the targets.

A cell is a provider in a setting. When time runs out, the end of the list is what is missing.
"""

from dataclasses import dataclass, replace

import torch

__all__ = ["CELLS", "LIMITS", "SHAPES", "TARGETS", "Cell", "Setting", "Shape", "Target"]


@dataclass(frozen=True)
class Shape:
    """N tokens, V, D_s, D_t, and the dtype of hidden states and heads."""

    tokens: int
    vocabulary: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype = torch.bfloat16
    chunk_tokens: int | None = None  # of ours; None: its default


SHAPES = {
    "A": Shape(8192, 151936, 896, 3584),  # Qwen2.5 0.5B from 7B
    "B": Shape(8192, 151936, 2048, 3584),  # Qwen2.5 3B from 7B
    "C": Shape(8192, 128256, 2048, 4096),  # Llama 3.2 1B from 8B
    "32k": Shape(8192, 32000, 2048, 4096),  # TinyLlama 1.1B from Llama 2 7B; the widths of C
    "262k": Shape(8192, 262144, 2048, 4096),  # Gemma's vocabulary at the widths of C
    "cpu": Shape(1024, 49152, 576, 960, torch.float32, 512),  # SmolLM2 135M from 360M; 512 is the default chunk there
    "quick": Shape(64, 1000, 32, 48, torch.float32, 32),
    **{f"V {v}": Shape(1024, v, 192, 320, torch.float32) for v in (8192, 16384, 32768, 65536)},
}


@dataclass(frozen=True)
class Setting:
    """A shape and what is computed of it. The defaults: forward KL, every token counts, the head is trained, the teacher is dense."""

    shape: str
    divergence: str = "forward_kl"
    tokens: int | None = None  # instead of the shape's
    ce: bool = False  # the mean of divergence and cross-entropy on labels
    counted: float = 1.0  # share of the tokens
    frozen_head: bool = False
    top_k: int | None = None  # the teacher's signal is a list of so many tokens and the rest's mass

    @property
    def size(self) -> Shape:
        shape = SHAPES[self.shape]
        return shape if self.tokens is None else replace(shape, tokens=self.tokens)

    @property
    def counted_tokens(self) -> int:
        return round(self.size.tokens * self.counted)

    @property
    def variant(self) -> str:
        """What differs from the defaults, the divergence apart; empty where nothing does."""
        parts = [f"N {self.tokens}" if self.tokens else "", "ce" if self.ce else "", "frozen head" if self.frozen_head else ""]
        parts += [f"{self.counted:.0%} counted" if self.counted < 1 else "", f"top {self.top_k}" if self.top_k else ""]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Cell:
    setting: Setting
    provider: str

    @property
    def name(self) -> str:
        setting = self.setting
        return ", ".join(filter(None, (f"{setting.shape} {setting.divergence}", setting.variant, self.provider)))


def _cells(*table: tuple[Setting, tuple[str, ...]]) -> tuple[Cell, ...]:
    return tuple(Cell(setting, provider) for setting, providers in table for provider in providers)


MAIN = ("fastkd", "fastkd 16-bit logits", "trl", "liger compiled", "liger FusedLinearJSD")
# Of a step, rather than a step: the row kernel alone beside a copy, and the floor with memory for its results at hand.
PARTS = ("row kernel", "row kernel 16-bit logits")
OURS = ("fastkd", "row kernel")  # what the names of our own providers begin with

CELLS: dict[str, tuple[Cell, ...]] = {
    "gpu": _cells(
        (Setting("B"), (*MAIN, "fastkd small chunks")),
        (Setting("C"), MAIN),
        (Setting("A"), MAIN),
        (Setting("B", "jsd"), MAIN),
        (Setting("B", counted=0.5), ("fastkd", "liger FusedLinearJSD", "trl")),
        (Setting("B"), (*PARTS, "gemms preallocated", "fla", "fla 16-bit dW", "liger FusedLinearKLDiv", "liger", "naive torch")),
        (Setting("B", "jsd"), (PARTS[0], "naive torch")),
        (Setting("B", ce=True), ("fastkd", "liger compiled", "naive torch")),
        (Setting("B", top_k=64), ("fastkd", "naive torch")),
        (Setting("B", frozen_head=True), ("fastkd", "trl", "liger FusedLinearJSD")),
        (Setting("B", "skew_forward_kl"), ("fastkd", "naive torch")),
        (Setting("32k"), ("fastkd", "trl", "naive torch")),
        (Setting("262k"), ("fastkd", "trl")),
        (Setting("B", tokens=1024), ("fastkd", "trl", "naive torch")),
        (Setting("B", tokens=32768), ("fastkd", "trl")),
        (Setting("B", tokens=2048), ("fastkd", "trl", "naive torch")),
        (Setting("B", tokens=16384), ("fastkd", "trl")),
        (Setting("B"), ("naive compiled",)),
    ),
    "cpu": _cells(
        (Setting("cpu"), ("fastkd", "naive torch", "liger", "liger compiled", "trl", "gemms preallocated")),
        (Setting("cpu", "jsd"), ("fastkd", "naive torch", "liger", "liger compiled", "trl")),
        (Setting("cpu", "adaptive_kl"), ("fastkd", "naive torch", "liger compiled", "trl")),
        (Setting("cpu", counted=0.5), ("fastkd", "liger compiled", "trl")),
        (Setting("cpu", ce=True), ("fastkd", "liger compiled", "trl")),
        (Setting("cpu", frozen_head=True), ("fastkd", "naive torch")),
        (Setting("cpu", top_k=64), ("fastkd", "naive torch")),
        (Setting("cpu", "skew_forward_kl"), ("fastkd", "naive torch")),
        (Setting("cpu"), ("naive compiled", "liger FusedLinearJSD", "liger FusedLinearKLDiv", "fla")),
    ),
    "sweep": _cells(
        *((Setting(f"V {v}"), ("fastkd", "naive torch", "trl")) for v in (8192, 16384, 32768, 65536)),
        *((Setting("V 32768", tokens=n), ("fastkd", "naive torch", "trl")) for n in (256, 512, 2048)),
    ),
}
# The same settings on a tiny problem: shows that everything runs, measures nothing.
CELLS["quick"] = tuple(
    Cell(replace(cell.setting, shape="quick", tokens=None, top_k=cell.setting.top_k and 8), cell.provider)
    for cell in CELLS["gpu"] + CELLS["cpu"]
    if cell.setting.shape in ("B", "cpu") and cell.setting.tokens is None
)
CELLS["quick"] = tuple(dict.fromkeys(CELLS["quick"]))

# What fastkd promises on a CPU: time divided by that of the four bare GEMMs.
LIMITS = {"forward_kl": 1.25, "jsd": 1.25, "adaptive_kl": 2.5}


@dataclass(frozen=True)
class Target:
    """On an H100 or H200: a row's field, divided by another row's where there is one, is at most or at least a number.

    Rows are measured minutes apart: times of one setting are compared by their ratios to the floor beside each.
    """

    text: str
    field: str  # of a row
    cell: Cell
    over: Cell | None = None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.cell,) if self.over is None else (self.cell, self.over)

    @property
    def ours(self) -> bool:
        """Whether no peer has a part in it."""
        return all(cell.provider.startswith(OURS) for cell in self.cells)


def _targets() -> tuple[Target, ...]:
    def fastkd(setting: Setting, kind: str = "") -> Cell:
        return Cell(setting, f"fastkd {kind}".strip())

    found = []
    for shape, exact, rounded in (("A", 1.45, 1.35), ("B", 1.35, 1.25), ("C", 1.35, 1.25)):
        at = Setting(shape)
        found += [
            Target(f"{shape}: forward KL over the four GEMMs", "ratio", fastkd(at), at_most=exact),
            Target(f"{shape}: the same with 16-bit logits", "ratio", fastkd(at, "16-bit logits"), at_most=rounded),
            Target(f"{shape}: times faster than Liger compiled", "ratio", Cell(at, "liger compiled"), fastkd(at), at_least=1.5),
            Target(f"{shape}: times faster than FusedLinearJSD", "ratio", Cell(at, "liger FusedLinearJSD"), fastkd(at), at_least=3.0),
            Target(f"{shape}: times faster than TRL", "ratio", Cell(at, "trl"), fastkd(at), at_least=1.4),
            Target(f"{shape}: memory over TRL's", "peak_extra_bytes", fastkd(at), Cell(at, "trl"), at_most=1.0),
        ]
    b = Setting("B")
    small = fastkd(b, "small chunks")
    found += [
        Target("B: memory of small chunks over TRL's, less the head's fp32 gradient", "working_bytes", small, Cell(b, "trl"), at_most=0.5),
        Target("B: time with small chunks", "ratio", small, fastkd(b), at_most=1.15),
        Target("B: time with half of the tokens counted", "ms", fastkd(Setting("B", counted=0.5)), fastkd(b), at_most=0.55),
        Target("B: row kernel's time over that of a copy of as many bytes", "ratio", Cell(b, PARTS[0]), at_most=1 / 0.8),
        Target("B: the same for JSD", "ratio", Cell(Setting("B", "jsd"), PARTS[0]), at_most=1 / 0.8),
    ]
    return tuple(found)


TARGETS = _targets()
