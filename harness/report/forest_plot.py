"""Intervals below one another: a forest plot, or a waterfall where bars lead from one row to the next."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.report.canvas import (
    BEHIND_WORDS,
    LETTER,
    LINE,
    Drawing,
    letters_in,
    limits,
    line_count,
    marker_look,
    set_x_ticks,
    shortened,
)
from harness.report.colours import INK, PALE, QUIET, RULE, Style
from harness.report.pictures import ForestPlot, ForestRow

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class _Layout:
    """Where the words of rows have room: beside the intervals, or above each."""

    beside: bool
    room: float  # for a name
    lines: int  # of the longest name above an interval
    pitch: float  # from one row to the next
    interval: float  # what is left to the intervals


def _layout(panel: ForestPlot, width: float) -> _Layout:
    label, words = (LETTER * max(map(len, texts)) for texts in zip(*((r.label, r.words) for r in panel.rows), strict=True))
    pitch = 30.0 if any(row.noise is not None for row in panel.rows) else 25.0
    interval = width - label - words - 28
    if interval > 0.4 * width:
        return _Layout(True, label, 0, pitch, interval)
    room = width - words - 20
    lines = max(line_count(_label(row, room)) for row in panel.rows)
    return _Layout(False, room, lines, pitch + 6 + LINE * lines, width - 12)


def _label(row: ForestRow, room: float) -> str:
    lines = textwrap.wrap(row.label, max(8, letters_in(room)), break_long_words=False)
    return "\n".join(shortened(line, room) for line in lines)


def forest_plot_height(panel: ForestPlot, width: float) -> float:
    return _layout(panel, width).pitch * len(panel.rows)


def draw_forest_plot(drawing: Drawing, axes: Axes, panel: ForestPlot, width: float) -> None:
    """The y axis is in points, from the top."""
    layout = _layout(panel, width)
    ends = [v for row in panel.rows for v in (row.value, row.low, row.high, row.begin, *(row.noise or ()))]
    axes.set_xlim(*limits([value for value in (*ends, panel.level) if value is not None], 0.05, log=False))
    axes.set_ylim(len(panel.rows) * layout.pitch, 0)
    axes.set_yticks([])
    set_x_ticks(axes, layout.interval)
    axes.grid(axis="x")
    if panel.level is not None:
        axes.axvline(panel.level, color=INK, linewidth=1.2, zorder=1.5)
    if panel.level is not None and panel.sides:
        axes.set_title(" ")  # room for the words on both sides
        at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "in_layout": False}
        for text, shift, side in zip(panel.sides, (-6, 6), ("right", "left"), strict=True):
            axes.annotate(text, (panel.level, 1), (shift, 5), ha=side, color=QUIET, fontsize=10, **at)
    last = 0.0  # where the bar of the row above ends
    for number, row in enumerate(panel.rows):
        top, words = number * layout.pitch, LINE * layout.lines
        y = top + words + (layout.pitch - words) / 2 - (4 if row.noise else 0)
        if number and row.begin is not None:
            before = panel.rows[number - 1].value
            axes.plot([before, before], [last, y + 7], color=RULE, linewidth=0.8, dashes=(2, 2), zorder=1.6)
        _draw_interval(drawing, axes, row, y)
        _draw_words(drawing, axes, row, layout, top + layout.pitch / 2 if layout.beside else top + 2)
        last = y - 7


def settle_rows(axes: Axes) -> None:
    """Words for the sides of a level go where there is no room beside it."""
    for text in axes.texts:
        extent = text.get_window_extent()
        if not text.get_in_layout() and not 0 <= extent.x0 <= extent.x1 <= axes.figure.bbox.x1:
            text.remove()


def _draw_words(drawing: Drawing, axes: Axes, row: ForestRow, layout: _Layout, y: float) -> None:
    """Name and figures."""
    common: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "color": INK, "zorder": 3, "bbox": BEHIND_WORDS}
    label = _label(row, layout.room)
    if layout.beside:
        left, right = (f"{label}   ", "right"), (f"   {row.words}", "left")
    else:
        left, right = (label, "left"), (row.words, "right")
    texts = [
        axes.text(x, y, text, ha=side, va="center" if layout.beside else "top", **common)
        for x, (text, side) in enumerate((left, right))
    ]
    drawing.part(texts, row.arms, [row.hover])


def _draw_interval(drawing: Drawing, axes: Axes, row: ForestRow, y: float) -> None:
    """What a row shows between its words."""
    from matplotlib.patches import Rectangle

    artists: list[Artist] = []
    if row.begin is not None:
        bar = Rectangle((row.begin, y - 7), row.value - row.begin, 14, facecolor=row.colour, alpha=0.75, zorder=2)
        artists.append(axes.add_patch(bar))
    if row.noise is not None:
        low, high = row.noise
        look: dict[str, Any] = {"facecolor": PALE, "edgecolor": RULE, "linewidth": 0.8}
        artists.append(axes.add_patch(Rectangle((low, y + 8), high - low, 4, zorder=2, **look)))
    if row.low is not None and row.high is not None:
        colour, thick = (row.colour, 2.2) if row.begin is None else (INK, 1.2)
        caps: dict[str, Any] = {"marker": "|", "markersize": 7, "markeredgewidth": 1.2}
        artists += axes.plot([row.low, row.high], [y, y], color=colour, linewidth=thick, zorder=2.2, **caps)
    if row.begin is None:
        look = marker_look(Style(row.colour, "s"), size=9, hollow=not row.filled)
        artists += axes.plot([row.value], [y], linestyle="none", zorder=2.5, **look)
    drawing.part(artists, row.arms, [row.hover])
