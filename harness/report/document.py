"""What the report is made of, the same for the page and for Markdown: sections of words, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.evaluation.metric import Metric
from harness.report.pictures import Picture
from harness.study.statistics import Contrast, Mean, decimals_for

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


def with_error(mean: float, low: float | None, high: float | None, *, digits: int = 4) -> str:
    """mean ± half of the interval, with two significant digits of the error; `digits` decimals without one."""
    if low is None or high is None:
        return f"{mean:.{digits}f}"
    half = (high - low) / 2
    decimals = decimals_for(half, 2) if half > 0 else digits
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def change(contrast: Contrast, metric: Metric) -> str:
    """A difference with its sign."""
    return signed(contrast.difference, contrast.low, contrast.high, metric)


def signed(figure: float, low: float | None, high: float | None, metric: Metric) -> str:
    """A difference, or what becomes of one, with its sign and half of its interval."""
    text = with_error(figure, low, high, digits=metric.digits)
    return f"+{text}" if figure > 0 else text.replace("-", "−", 1)


def mean_text(mean: Mean | None, metric: Metric) -> str:
    return ABSENT if mean is None else with_error(mean.mean, mean.low, mean.high, digits=metric.digits)


def in_ms(milliseconds: float) -> str:
    """Three significant digits."""
    decimals = 4 if milliseconds < 0.01 else decimals_for(milliseconds, 3)
    return f"{milliseconds:,.{decimals}f}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
