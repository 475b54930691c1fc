"""Figures of a study as PNG files, drawn from the same layout as the page's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.study.drawing import Area, Circle, Figure, Line, Shape, Words, draw, stacked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 200
WIDTH = 620.0  # points


def save_figure(figure: Figure, path: Path) -> None:
    """Write the PNG, whole or not at all; panels below one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    drawing = stacked([(heading, draw(panel, WIDTH)) for heading, panel in figure.panels], WIDTH)
    edge = 12.0
    width, height = drawing.width + 2 * edge, drawing.height + 2 * edge
    picture = Picture(figsize=(width / 72, height / 72), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(picture)  # no pyplot: no window, no state shared with a notebook
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-edge, width - edge)
    axes.set_ylim(height - edge, -edge)
    for number, shape in enumerate(shape for group in drawing.groups for shape in group.shapes):
        _add_shape(axes, shape, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}.unfinished.png")
    picture.savefig(aside)
    aside.replace(path)


def _add_shape(axes: Axes, shape: Shape, number: int) -> None:
    """Later shapes lie above earlier ones, as in SVG."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle as Disc
    from matplotlib.patches import Polygon
    from matplotlib.patheffects import withStroke

    if isinstance(shape, Line):
        x, y = zip(*shape.points, strict=True)
        dash: Any = (0, tuple(length / shape.width for length in shape.dash)) if shape.dash else "-"
        axes.add_line(
            Line2D(
                x, y, color=shape.colour, linewidth=shape.width, linestyle=dash, zorder=number, solid_capstyle="butt"
            )
        )
    elif isinstance(shape, Area):
        axes.add_patch(
            Polygon(shape.points, closed=True, facecolor=shape.fill, edgecolor=shape.edge or "none", linewidth=0.8,
                    alpha=shape.opacity, zorder=number)
        )  # fmt: skip
    elif isinstance(shape, Circle):
        disc = Disc(
            (shape.x, shape.y), shape.radius, facecolor=shape.fill, edgecolor=shape.edge, linewidth=0.8, zorder=number
        )
        axes.add_patch(disc)
    elif isinstance(shape, Words):
        text = axes.text(
            shape.x, shape.y, shape.text, fontsize=shape.size, color=shape.colour, va="center_baseline",
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor], zorder=number,
            fontweight="bold" if shape.bold else "normal", parse_math=False,
        )  # fmt: skip
        if shape.halo:
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])
