"""What pictures show, as data: harness/report/plots.py draws every one of them, as SVG for the page and as PNG for files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.files.text import number
from harness.report.colours import INK, Style

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """One figure, with the ends of its error bar or band."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    hover: str = ""


@dataclass(frozen=True)
class Series:
    """What belongs to one arm."""

    arm: str
    style: Style
    marks: Sequence[Mark]
    joined: bool = False
    dotted: bool = True  # a marker at every mark
    hollow: bool = False
    banded: bool = True  # where joined: from low to high a band, else bars
    label: str | None = None  # None: the arm

    @property
    def name(self) -> str:
        return self.arm if self.label is None else self.label


@dataclass(frozen=True)
class Plot:
    """y against x. Points have their names beside them, lines at their ends; where that is too crowded, all have a legend."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    y_log: bool = False
    x_ticks: Sequence[float] | None = None  # None: round numbers
    front: Sequence[Point] = ()  # a staircase through these, smaller x first
    joins: Sequence[tuple[Point, Point, str]] = ()  # thin lines between points, in a colour
    rules: Sequence[tuple[float, str]] = ()  # vertical lines
    level: tuple[float, str] | None = None  # a horizontal one, and whose it is
    lines: bool = False
    above: float | None = None  # what lies above is cut off


@dataclass(frozen=True)
class ForestRow:
    """A line of a ForestPlot."""

    label: str
    arms: tuple[str, ...]
    hover: str
    words: str  # the figures, at the right
    value: float
    low: float | None = None
    high: float | None = None
    begin: float | None = None  # a bar leads from here to the value
    noise: tuple[float, float] | None = None  # a second, thinner interval
    filled: bool = True
    colour: str = INK


@dataclass(frozen=True)
class ForestPlot:
    """Intervals below one another: a forest plot, or a waterfall where bars lead from one row to the next."""

    x_label: str
    rows: Sequence[ForestRow]
    level: float | None = None  # a vertical line
    sides: tuple[str, str] | None = None  # words for the left and the right of it


@dataclass(frozen=True)
class Picture:
    """Panels that belong together, under one caption."""

    name: str  # of its file
    title: str
    caption: str
    panels: Sequence[tuple[str, Plot | ForestPlot]]  # heading and panel


def short(value: float) -> str:
    """A number on an axis."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    if abs(value) >= 10_000 and value % 1000 == 0:
        return f"{value / 1000:.0f}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else number(value, ".6g")
