"""What the report is made of, the same for the page and for Markdown: sections of words, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.evaluation.metric import Metric
from harness.files.text import at_tokens
from harness.report.pictures import Picture
from harness.study.statistics import Contrast, Mean, decimals_for, with_error

ABSENT = "–"


@dataclass(frozen=True)
class TableLine:
    """A row of a table; what belongs to an arm lights up with it."""

    cells: list[str]
    arm: str | None = None
    marked: bool = False  # to be seen at once: not equal, not within tolerance


@dataclass(frozen=True)
class TextTable:
    """Text cells; the first column names the row."""

    title: str
    columns: list[str]
    lines: list[TableLine]
    note: str = ""
    words: frozenset[int] = frozenset({0})  # columns of words rather than numbers


@dataclass(frozen=True)
class Section:
    """One heading of the report and what stands below it."""

    key: str
    title: str
    words: Sequence[str] = ()
    points: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[TextTable] = ()
    code: str = ""
    after: Sequence[str] = ()
    more: Sequence[str] = ()


def at_contexts(name: str, cells: Sequence[str], contexts: Sequence[int | None]) -> tuple[str, list[str]]:
    """A column of a cache's bytes, or a line of them, which says for how many tokens they are.

    In its name where all cells that hold something are of one context, else in each cell of which it is known.
    """
    held = [cell not in ("", ABSENT) for cell in cells]
    if len(at := {context for context, holds in zip(contexts, held, strict=True) if holds}) < 2:
        return f"{name}{at_tokens(at)}", [*cells]
    own = zip(cells, contexts, held, strict=True)
    return name, [f"{cell} at {context:,}" if holds and context is not None else cell for cell, context, holds in own]


def change(contrast: Contrast, metric: Metric) -> str:
    """A difference with its sign."""
    return with_error(contrast.difference, contrast.low, contrast.high, metric.digits, sign="+")


def mean_text(mean: Mean | None, metric: Metric) -> str:
    return ABSENT if mean is None else with_error(mean.mean, mean.low, mean.high, metric.digits)


def in_ms(milliseconds: float) -> str:
    """Three significant digits."""
    decimals = 4 if milliseconds < 0.01 else decimals_for(milliseconds, 3)
    return f"{milliseconds:,.{decimals}f}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
