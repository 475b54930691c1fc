"""The picture of a comparison: bits per byte against cache bytes per token, one marker a row, labels beside them.

Rows of one configuration on several caches share colour and shape: thin lines lead from the plain one, which has the
configuration's name, to the others, which have their cache's.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.comparison import Comparison, Setup, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Okabe and Ito's palette without its yellow, which vanishes on white. Shapes tell the markers apart in grayscale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p", "h")
PANEL_INCHES = (7.0, 4.6)
DOTS_PER_INCH = 200


def save_scatter(comparison: Comparison, path: Path) -> None:
    """Writes the PNG, whole or not at all."""
    aside = path.with_name(f"{path.stem}.unfinished.png")
    draw_scatter(comparison).savefig(aside)
    aside.replace(path)


def draw_scatter(comparison: Comparison) -> Figure:
    """One panel a table; error bars are sample standard deviations over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(comparison.tables)
    width, height = PANEL_INCHES
    height = max(height, *(0.2 * len(table.setups) for table in comparison.tables))
    figure = Figure(figsize=(width, height * count), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no window, no state shared with a notebook
    names = sorted({setup.configuration for table in comparison.tables for setup in table.setups})
    for axes, table in zip(figure.subplots(count, squeeze=False)[:, 0], comparison.tables, strict=True):
        _draw_panel(axes, table, names)
    figure.canvas.draw()  # settles the layout, so that labels are placed where the points really are
    figure.set_layout_engine("none")
    for axes, table in zip(figure.axes, comparison.tables, strict=True):
        _label_points(axes, table, names)
    return figure


def _draw_panel(axes: Axes, table: Table, names: Sequence[str]) -> None:
    axes.set_xscale("log")
    front = _front(table)
    axes.step(
        [table.cache_size(setup) for setup in front], [setup.bits_per_byte for setup in front],
        where="post", color="0.82", linewidth=1.2, zorder=1,
    )  # fmt: skip
    origins = _origins(table)
    for setup in table.setups:
        number = names.index(setup.configuration)
        colour, origin = COLOURS[number % len(COLOURS)], origins[setup.setup_hash]
        hollow = table.has_caches_as_rows and setup.through_cache
        if origin is not setup:
            axes.plot(
                [table.cache_size(origin), table.cache_size(setup)], [origin.bits_per_byte, setup.bits_per_byte],
                color=colour, linewidth=0.7, alpha=0.6, zorder=2,
            )  # fmt: skip
        axes.errorbar(
            table.cache_size(setup), setup.bits_per_byte, yerr=setup.bits_per_byte_deviation,
            color=colour, marker=MARKERS[number % len(MARKERS)], markersize=8,
            markerfacecolor="white" if hollow else colour, markeredgecolor=colour if hollow else "white",
            markeredgewidth=1.4 if hollow else 0.8, elinewidth=1.4, capsize=3, linestyle="none",
            zorder=3 if hollow else 3.5,
        )  # fmt: skip
    axes.margins(x=0.14, y=0.16)
    _set_cache_ticks(axes, sorted({table.cache_size(setup) for setup in table.setups}))
    of = "of context" if table.has_caches_as_rows else f"in {table.conditions['cache_dtype']}"
    axes.set_xlabel(f"KV cache, bytes per token {of} (log scale)")
    axes.set_ylabel(f"{table.conditions['split']} bits per byte")
    seeds = sorted({setup.n for setup in table.setups})
    bars = f"mean ± standard deviation of {'–'.join(map(str, seeds[:: len(seeds) - 1 or 1]))} seeds"
    axes.tick_params(labelsize=9)
    models = sorted({setup.model for setup in table.setups})
    title = textwrap.fill(f"model {', '.join(models)}, {table.heading}", 100)
    axes.set_title(title, loc="left", fontsize=9, pad=18)
    hollows = "; hollow: scored through the cache" if table.has_caches_as_rows else ""
    axes.text(
        0, 1.02, f"{bars if seeds[-1] > 1 else 'one seed each'}; grey: the best up to each cache size{hollows}",
        transform=axes.transAxes, fontsize=8, color="0.35",
    )  # fmt: skip
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _origins(table: Table) -> dict[str, Setup]:
    """By setup_hash the row that a configuration's other caches are seen from: the plain one, else the largest."""
    ordered = sorted(table.setups, key=lambda setup: (setup.through_cache, -table.cache_size(setup)))
    return {setup.setup_hash: setup for setup in reversed(ordered)}


def _front(table: Table) -> list[Setup]:
    """The setups that no other beats in both cache and bits per byte, by growing cache."""
    front: list[Setup] = []
    for setup in sorted(table.setups, key=lambda setup: (table.cache_size(setup), setup.bits_per_byte)):
        if not front or setup.bits_per_byte < front[-1].bits_per_byte:
            front.append(setup)
    return front


def _set_cache_ticks(axes: Axes, sizes: Sequence[float]) -> None:
    """Ticks at the cache sizes themselves, as far as their labels have room."""
    low, high = (math.log(limit) for limit in axes.get_xlim())
    ticks: list[float] = []
    for size in reversed(sizes):  # the largest is most often the reference
        if not ticks or (math.log(ticks[-1]) - math.log(size)) / (high - low) > 0.075:
            ticks.append(size)
    axes.set_xticks(ticks, [f"{size:,.0f}" for size in ticks])
    axes.set_xticks([], minor=True)


def _label_points(axes: Axes, table: Table, names: Sequence[str]) -> list[Annotation]:
    """A name beside each marker, where it covers no marker, no error bar and no other name."""
    from matplotlib.colors import to_rgb
    from matplotlib.path import Path as Line
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    point = DOTS_PER_INCH / 72
    taken: list[Bbox] = []
    for setup in table.setups:
        deviation = setup.bits_per_byte_deviation or 0.0
        ends = axes.transData.transform(
            [(table.cache_size(setup), setup.bits_per_byte + sign * deviation) for sign in (-1, 1)]
        )
        (x, low), (_, high) = ends
        taken.append(Bbox.from_extents(x - 5 * point, low - 5 * point, x + 5 * point, high + 5 * point))
    labels, origins = [], _origins(table)
    joins = [
        Line(axes.transData.transform([(table.cache_size(end), end.bits_per_byte) for end in (origin, setup)]))
        for setup in table.setups
        if (origin := origins[setup.setup_hash]) is not setup
    ]
    for setup in table.setups:
        where = (table.cache_size(setup), setup.bits_per_byte)
        label = axes.annotate(setup.variant, where, xytext=(0, 0), textcoords="offset points", fontsize=9, zorder=4)
        if origins[setup.setup_hash] is not setup:
            colour = COLOURS[names.index(setup.configuration) % len(COLOURS)]
            darker = [0.6 * part for part in to_rgb(colour)]  # small letters need more contrast than markers
            label.set(text=setup.cache, fontsize=7.5, color=darker)
        label.set_path_effects([withStroke(linewidth=3.5, foreground="white")])  # lines pass behind a name
        best: tuple[float, tuple[float, float], str, Bbox] | None = None
        for distance in (9, 14, 20, 28, 38, 50):
            for angle in range(0, 360, 30):
                dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
                side = "left" if dx > 1 else "right" if dx < -1 else "center"
                label.set(position=(dx, dy), ha=side, va="center")
                box = label.get_window_extent(renderer).padded(1.5 * point)
                outside = not (
                    inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
                )
                # A name to the right reads best, then to the left; anything is better than covering something.
                cost = distance + abs(math.sin(math.radians(angle))) * 4 + (2 if dx < 0 else 0) + 1000 * outside
                cost += 1000 * sum(box.overlaps(other) for other in taken)
                cost += 10 * any(join.intersects_bbox(box) for join in joins)
                if best is None or cost < best[0]:
                    best = (cost, (dx, dy), side, box)
        assert best is not None
        _, (dx, dy), side, box = best
        label.set(position=(dx, dy), ha=side, va="center")
        taken.append(box)
        if math.hypot(dx, dy) > 15:
            axes.annotate(
                "", where, xytext=(dx, dy), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}, zorder=2,
            )  # fmt: skip
        labels.append(label)
    return labels
