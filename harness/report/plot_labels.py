"""Names in a plot: beside its points, at the ends of its lines, or in a legend below it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.report.canvas import (
    BEHIND_WORDS,
    LETTER,
    LETTERS,
    LINE,
    Drawing,
    folded,
    line_count,
    line_style,
    marker_look,
    shortened,
)
from harness.report.colours import INK, RULE, darker
from harness.report.pictures import Mark, Plot, Point, Series

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

MOST_AT_ENDS = 20  # names that a plot's height has room for at the ends of its lines
_COVERS = 1000.0  # what a name pays for covering something
MOST_ASIDE = 36.0  # from the first to the last of points that share a place


def place_of_names(plot: Plot, width: float, crowded: bool) -> str:
    """ends: of the lines. beside: the points. below: in a legend."""
    if not plot.lines:
        return "below" if crowded else "beside"
    names = [*names_of(plot, width).values(), *([plot.level[1]] if plot.level else [])]
    fits = max(map(len, names)) * LETTER < 0.27 * width and len(names) <= MOST_AT_ENDS
    return "ends" if fits else "below"


def names_of(plot: Plot, width: float) -> dict[str, str]:
    """By arm, short enough for a plot of that width."""
    return {series.arm: shortened(series.name, max(190.0, width / 2)) for series in plot.series}


def _legend_columns(names: Collection[str], width: float) -> int:
    return max(1, int((width - 50) / (max(map(len, names)) * LETTER + 45)))


def legend_height(plot: Plot, width: float) -> float:
    names = names_of(plot, width).values()
    return 1.15 * LINE * math.ceil(len(names) / _legend_columns(names, width)) + 8


def _handle(series: Series, *, lines: bool) -> Artist:
    from matplotlib.lines import Line2D

    dash: Any = line_style(series.style) if lines else "none"
    look = marker_look(series.style, size=6.4 if lines else 9) if series.dotted else {}
    return Line2D([], [], color=series.style.colour, linewidth=1.8, linestyle=dash, **look)


class Names:
    """Those of a plot's arms, on its axes. where: as `place_of_names` says."""

    def __init__(self, drawing: Drawing, axes: Axes, plot: Plot, where: str, width: float) -> None:
        self.drawing, self.axes, self.plot, self.where, self.width = drawing, axes, plot, where, width
        self.names = names_of(plot, width)

    def reserve(self) -> None:
        """Names at the ends and in a legend, for which the layout makes room."""
        if self.where == "below":
            self._draw_legend()
        if self.where == "ends":
            at: dict[str, Any] = {"transform": self.axes.get_yaxis_transform(), "va": "center"}
            for arm, (_, y), colour in self._ends():
                text = self.axes.text(1, y, f"   {self.names.get(arm, arm)}", color=darker(colour), **at)
                self.drawing.part([text], (arm,), [arm])

    def settle(self) -> bool:
        """Move what would cover something, now that places are known. False: there is no room for all names."""
        if self.where == "ends":
            self._settle_ends()
        if self.plot.lines:
            return True
        shifts = np.zeros(len(self.plot.series)) if self.plot.joins else self._side_by_side()
        self._shift(shifts)
        return self.where != "beside" or self._name_points(shifts)

    def _draw_legend(self) -> None:
        from matplotlib.transforms import ScaledTranslation

        first = {series.arm: series for series in reversed(self.plot.series)}
        handles = [_handle(first[arm], lines=self.plot.lines) for arm in self.names]
        below = 26 + LINE * line_count(folded(self.plot.x_label, self.width - 50))
        moved = self.axes.transAxes + ScaledTranslation(0, -below / 72, self.drawing.figure.dpi_scale_trans)
        at: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": moved, "handlelength": 2}
        legend = self.axes.legend(
            handles, list(self.names.values()), ncols=_legend_columns(self.names.values(), self.width), **at
        )
        for arm, handle, text in zip(self.names, legend.legend_handles, legend.get_texts(), strict=True):
            text.set_color(darker(first[arm].style.colour))
            self.drawing.part([handle, text], (arm,), [first[arm].name])

    def _ends(self) -> list[tuple[str, Point, str]]:
        """The last point of each arm's lines, and the level's."""
        last: dict[str, tuple[Mark, str]] = {}
        for series in self.plot.series:
            mark = max(series.marks, key=lambda mark: mark.x)
            if series.arm not in last or mark.x > last[series.arm][0].x:
                last[series.arm] = mark, series.style.colour
        found = [(arm, (mark.x, mark.y), colour) for arm, (mark, colour) in last.items()]
        return found + ([(self.plot.level[1], (self.axes.get_xlim()[1], self.plot.level[0]), INK)] if self.plot.level else [])

    def _settle_ends(self) -> None:
        """Names moved apart where lines end close together, in the order of the lines."""
        found = self._ends()
        texts = zip(found, self.axes.texts[-len(found) :], strict=True)
        ends = sorted(texts, key=lambda pair: pair[0][1][1])
        box, places = self.axes.get_window_extent(), self.axes.transData.transform([point for (_, point, _), _ in ends])
        heights = spread(places[:, 1], LINE - 1, box.y0 + 4, max(box.y1 - 4, box.y0 + 4 + (LINE - 1) * (len(ends) - 1)))
        for ((arm, _, colour), text), (x, y), height in zip(ends, places, heights, strict=True):
            text.set(transform=self.drawing.points, position=(box.x1 + 7, height), text=text.get_text().strip())
            start = min(x + 4, box.x1)
            if abs(y - height) > 2 or box.x1 - start > 8:
                self.drawing.part(self._leader([(start, y), (box.x1 + 5, height)], colour), (arm,))

    def _leader(self, points: Sequence[Any], colour: str) -> list[Line2D]:
        """A thin line from what a name is of to the name."""
        fixed: dict[str, Any] = {"transform": self.drawing.points, "clip_on": False, "scalex": False, "scaley": False}
        return self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, zorder=1.7, **fixed)

    def _boxes(self) -> np.ndarray:
        """Left, bottom, right and top of every point with its error bar."""
        marks = [series.marks[0] for series in self.plot.series]
        ends = [(m.y, m.y if m.low is None else m.low, m.y if m.high is None else m.high) for m in marks]
        places = [[(mark.x, y) for y in of_mark] for mark, of_mark in zip(marks, ends, strict=True)]
        pixels = self.axes.transData.transform(np.reshape(places, (-1, 2))).reshape(-1, 3, 2)
        x, (y, low, high) = pixels[:, 0, 0], pixels[:, :, 1].T
        return np.stack([x - 6, np.minimum(low, y - 6), x + 6, np.maximum(high, y + 6)], axis=1)

    def _side_by_side(self) -> np.ndarray:
        """How far to the side each arm's point goes, so that none covers another: they often share a cache size."""
        boxes = self._boxes()
        clusters: list[tuple[list[int], np.ndarray]] = []
        for i in np.argsort(boxes[:, 0], kind="stable"):
            members, box = [int(i)], boxes[i]
            for cluster in [c for c in clusters if abs(c[1][0] - box[0]) < 10 and c[1][1] < box[3] and box[1] < c[1][3]]:
                clusters.remove(cluster)
                members = cluster[0] + members
                box = np.array([*cluster[1][:1], min(cluster[1][1], box[1]), box[2], max(cluster[1][3], box[3])])
            clusters.append((members, box))
        shifts = np.zeros(len(boxes))
        for members, _ in clusters:
            # However many they are, they stay nearer to their own place than to the next.
            step = min(12.0, MOST_ASIDE / max(1, len(members) - 1))
            shifts[members] = step * (np.arange(len(members)) - (len(members) - 1) / 2)
        return shifts

    def _shift(self, shifts: np.ndarray) -> None:
        from matplotlib.transforms import ScaledTranslation

        containers: Any = self.axes.containers  # of error bars, one a series
        for container, shift in zip(containers, shifts, strict=True):
            moved = self.axes.transData + ScaledTranslation(shift / 72, 0, self.drawing.figure.dpi_scale_trans)
            line, caps, stems = container.lines
            for artist in (line, *caps, *stems):
                artist.set_transform(moved)

    def _name_points(self, shifts: np.ndarray) -> bool:
        """A name beside each mark, where it covers no marker, no bar and no other name. False: there is no room.

        Names stand on paper, so the front and other thin lines pass behind them.
        """
        taken = self._boxes() + shifts[:, None] * [1, 0, 1, 0]
        x, y = self.axes.transData.transform([(series.marks[0].x, series.marks[0].y) for series in self.plot.series]).T
        for series, place in zip(self.plot.series, np.stack([x + shifts, y], axis=1), strict=True):
            look: dict[str, Any] = {"color": darker(series.style.colour), "va": "center_baseline", "zorder": 3}
            text = self.axes.text(
                0, 0, self.names[series.arm], transform=self.drawing.points, bbox=BEHIND_WORDS | {"pad": 0.5}, **look
            )
            text.set_fontsize(LETTERS if series.label is None else LETTERS - 2)
            cost, away, box = _best_place(text, place, self.axes, taken)
            if cost >= _COVERS:
                return False
            taken = np.vstack([taken, box])
            text.set(position=place + away, ha="left" if away[0] > 1 else "right" if away[0] < -1 else "center")
            self.drawing.part([text], (series.arm,), [series.marks[0].hover])
            if np.hypot(*away) > 16:
                ends = [place + 0.25 * away, place + 0.95 * away]
                self.drawing.part(self._leader(ends, RULE), (series.arm,))
        return True


def spread(wanted: Sequence[float] | np.ndarray, gap: float, low: float, high: float) -> list[float]:
    """Rising places moved apart to a gap, as little as that takes (least squares), and kept inside if they fit."""
    from scipy.optimize import isotonic_regression

    steps = gap * np.arange(len(wanted))
    moved = isotonic_regression(np.asarray(wanted) - steps).x
    return list(np.clip(moved, low, high - steps[-1]) + steps)


def _best_place(text: Text, point: np.ndarray, axes: Axes, taken: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """(cost, shift from the point, box) of the place around a point where a name costs least."""
    size, inside = text.get_window_extent(), axes.get_window_extent()
    distance, angle = (grid.ravel() for grid in np.meshgrid((10, 14, 20, 28, 38, 50, 64, 80, 100), np.arange(0, 360, 15)))
    dx, dy = distance * np.cos(np.radians(angle)), distance * np.sin(np.radians(angle))
    left = point[0] + dx - np.where(dx > 1, 0, np.where(dx < -1, size.width, size.width / 2))
    middle = point[1] + dy
    boxes = np.stack([left - 1, middle - 7, left + size.width + 1, middle + 7], axis=1)
    # A name to the right reads best, then to the left; anything is better than covering something.
    cost = distance + 4 * np.abs(np.sin(np.radians(angle))) + 2.0 * (dx < 0)
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    cost += _COVERS * ((low < taken[None, :, 2:]) & (taken[None, :, :2] < high)).all(-1).sum(1)
    outside = (low[:, 0] < (inside.x0, inside.y0)) | (high[:, 0] > (inside.x1 + 4, inside.y1 + 4))
    cost += _COVERS * outside.any(-1)
    best = int(np.argmin(cost))
    return float(cost[best]), np.array([dx[best], dy[best]]), boxes[best]
