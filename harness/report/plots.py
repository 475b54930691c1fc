"""Every picture of the project, drawn by matplotlib from harness/report/pictures.py: PNG for files, SVG for the page.

A picture is laid out anew for every width, so that letters stay as large on a phone as on a desk. Lengths are in points,
which are CSS pixels on the page. Words are measured in DejaVu Sans, which comes with matplotlib and is the widest of the
fonts that a reader may have, so that what fits here fits everywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.report.canvas import (
    BEHIND_WORDS,
    LETTERS,
    LINE,
    Drawing,
    conventions,
    folded,
    limits,
    line_count,
    line_style,
    marker_look,
    round_ticks,
    set_x_ticks,
    tick_texts,
)
from harness.report.colours import INK, PALE, QUIET, RULE
from harness.report.forest_plot import draw_forest_plot, forest_plot_height, settle_rows
from harness.report.pictures import ForestPlot, Mark, Picture, Plot, Series
from harness.report.plot_labels import Names, legend_height, names_of, place_of_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOLD = 0.8  # as many letters as of others fit where letters are bold
PNG_WIDTH, PNG_COLUMN, DOTS_PER_INCH = 620.0, 440.0, 200  # points: of one column, and of each of several


def save_png(picture: Picture, path: Path, *, columns: int = 1) -> None:
    """Write the PNG with the picture's title; folders above it are made."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(picture, max(PNG_WIDTH, PNG_COLUMN * columns), columns=columns, titled=True).figure
    figure.set_dpi(DOTS_PER_INCH)
    with conventions():
        FigureCanvasAgg(figure).print_png(path)


def draw(picture: Picture, width: float, *, columns: int = 1, titled: bool = False, crowded: bool = False) -> Drawing:
    """Lay a picture out. crowded: no plot has room for names beside its points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with conventions():
        columns = min(columns, len(picture.panels))
        wide = width / columns - 12
        places = [place_of_names(panel, wide, crowded) if isinstance(panel, Plot) else "" for _, panel in picture.panels]
        heights = [_height(*panel, place, wide) for panel, place in zip(picture.panels, places, strict=True)]
        tall = [max(heights[first : first + columns]) for first in range(0, len(heights), columns)]
        title = folded(picture.title, BOLD * (width - 10)) if titled else ""
        height = sum(tall) + (LINE * line_count(title) + 10 if title else 0)
        layout = ConstrainedLayoutEngine(h_pad=5 / 72)
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout=layout)
        FigureCanvasAgg(figure)  # no pyplot: no window, no state shared with a notebook
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=LETTERS + 1, weight="bold", color=INK)
        drawing = Drawing(figure)
        cells = list(figure.subplots(len(tall), columns, squeeze=False, height_ratios=tall).flat)
        names = []
        for axes, (heading, panel), place in zip(cells, picture.panels, places, strict=False):
            _draw_heading(axes, heading, panel, wide)
            if isinstance(panel, ForestPlot):
                draw_forest_plot(drawing, axes, panel, wide)
            else:
                _draw_plot(drawing, axes, panel, wide)
                names.append(Names(drawing, axes, panel, place, wide))
                names[-1].reserve()
        for spare in cells[len(picture.panels) :]:
            spare.remove()
        layout.execute(figure)  # so that names are placed where the points really are
        figure.set_layout_engine("none")
        for axes, (_, panel) in zip(cells, picture.panels, strict=False):
            if isinstance(panel, ForestPlot):
                settle_rows(axes)
        if all(of_plot.settle() for of_plot in names):
            return drawing
        return draw(picture, width, columns=columns, titled=titled, crowded=True)


def _height(heading: str, panel: Plot | ForestPlot, place: str, width: float) -> float:
    """Of a panel with all its words, in points."""
    words = LINE * (line_count(folded(heading, BOLD * (width - 50))) + line_count(folded(panel.x_label, width - 50)) + 1) + 24
    if isinstance(panel, ForestPlot):
        return words + forest_plot_height(panel, width)
    body = min(300.0, max(215.0, 0.52 * width))
    if place == "below":
        words += legend_height(panel, width)
    else:
        body = max(body, LINE * (len(names_of(panel, width)) + 1))
    return body + words + LINE * line_count(folded(panel.y_label, width - 30))


def _draw_heading(axes: Axes, heading: str, panel: Plot | ForestPlot, width: float) -> None:
    """What the panel is, and below it what its y axis is, both written across."""
    across = folded(panel.y_label, width - 30) if isinstance(panel, Plot) else ""
    if across:
        axes.set_title(across)
    if heading:
        above = 10 + LINE * line_count(across)
        axes.annotate(
            folded(heading, BOLD * (width - 50)),
            (0, 1),
            (0, above),
            xycoords="axes fraction",
            textcoords="offset points",
            weight="bold",
            color=INK,
            va="bottom",
        )
    axes.set_xlabel(folded(panel.x_label, width - 50))


def _draw_plot(drawing: Drawing, axes: Axes, plot: Plot, width: float) -> None:
    axes.set_xscale("log" if plot.x_log else "linear")
    axes.set_yscale("log" if plot.y_log else "linear")
    margin = 0.03 if plot.lines else 0.12
    xs = [mark.x for series in plot.series for mark in series.marks] + [x for x, _ in plot.rules]
    axes.set_xlim(*limits(xs, margin, log=plot.x_log))
    axes.set_ylim(*limits(_heights(plot), max(0.05, margin), log=plot.y_log))
    set_x_ticks(axes, width - 60, log=plot.x_log, at=plot.x_ticks)
    ticks = round_ticks(*axes.get_ylim(), 6, log=plot.y_log)
    axes.set_yticks(ticks, tick_texts(ticks))
    axes.set_yticks([], minor=True)
    axes.grid()
    for x, text in plot.rules:
        _draw_rule(axes, x, text)
    if plot.level is not None:
        axes.axhline(plot.level[0], color=INK, linewidth=1.2)
    if plot.front:
        corners = [*plot.front, (axes.get_xlim()[1], plot.front[-1][1])]
        axes.plot(*zip(*corners, strict=True), color=PALE, linewidth=1.6, drawstyle="steps-post", zorder=1.5)
    for start, end, colour in plot.joins:
        axes.plot(*zip(start, end, strict=True), color=colour, linewidth=0.7, alpha=0.6, zorder=1.6)
    for series in plot.series:
        (_draw_line if series.joined else _draw_points)(drawing, axes, series, plot)


def _heights(plot: Plot) -> list[float]:
    """All values of y that must be seen."""
    ends = [y for series in plot.series for mark in series.marks for y in (mark.y, mark.low, mark.high)]
    ends.append(plot.level[0] if plot.level else None)
    return [y for y in ends if y is not None and (plot.above is None or y <= plot.above)]


def _draw_rule(axes: Axes, x: float, text: str) -> None:
    """A vertical line with its name on the side that has more room."""
    axes.axvline(x, color=RULE, linewidth=1, dashes=(4, 3))
    share, _ = axes.transAxes.inverted().transform(axes.transData.transform((x, axes.get_ylim()[0])))
    shift, side = (-4, "right") if share > 0.5 else (4, "left")
    at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": side, "va": "top"}
    axes.annotate(text, (x, 1), (shift, -2), color=QUIET, fontsize=10, bbox=BEHIND_WORDS, **at)


def _shown(series: Series, plot: Plot) -> list[Mark]:
    return [mark for mark in series.marks if plot.above is None or mark.y <= plot.above]


def _draw_points(drawing: Drawing, axes: Axes, series: Series, plot: Plot) -> None:
    """Markers with their error bars."""
    marks = _shown(series, plot)
    bars = [(m.y - m.low, m.high - m.y) for m in marks if m.low is not None and m.high is not None]
    look = marker_look(series.style, size=10, hollow=series.hollow) | {"capsize": 3.5, "capthick": 1.5, "elinewidth": 1.5}
    x, y = [mark.x for mark in marks], [mark.y for mark in marks]
    both = list(zip(*bars, strict=True)) if len(bars) == len(marks) else None
    container = axes.errorbar(x, y, yerr=both, color=series.style.colour, linestyle="none", zorder=2.5, **look)
    line, caps, stems = container.lines
    drawing.part([*caps, *stems], (series.arm,))
    drawing.part([line], (series.arm,), [mark.hover for mark in marks])


def _draw_line(drawing: Drawing, axes: Axes, series: Series, plot: Plot) -> None:
    """A line with its band, and markers or at least places that can be pointed at."""
    marks, colour, arms, name = _shown(series, plot), series.style.colour, (series.arm,), [series.name]
    banded = [(m.x, m.low, m.high) for m in marks if m.low is not None and m.high is not None]
    if banded and not series.banded:
        places, low, high = map(list, zip(*banded, strict=True))
        drawing.part([axes.vlines(places, low, high, color=colour, linewidth=1)], arms, name)
    elif len(banded) > 1:
        opacity = 0.16 if len(plot.series) < 7 else 0.07
        places, low, high = map(list, zip(*banded, strict=True))
        band = axes.fill_between(places, low, high, color=colour, alpha=opacity, linewidth=0)
        drawing.part([band], arms, name)
    x, y, hovers = [mark.x for mark in marks], [mark.y for mark in marks], [mark.hover for mark in marks]
    drawing.part(axes.plot(x, y, color=colour, linewidth=1.8, linestyle=line_style(series.style)), arms, name)
    look = marker_look(series.style, size=6.4, hollow=series.hollow)
    if not series.dotted:
        look |= {"marker": "o", "markersize": 12, "alpha": 0}
    if series.dotted or any(hovers):
        drawing.part(axes.plot(x, y, linestyle="none", **look), arms, hovers)
