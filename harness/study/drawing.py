"""Figures as lines, areas and words at their places: laid out once, printed as SVG by page.py and as PNG by figures.py.

Lengths are in points, which are CSS pixels on the page; y grows downwards. A panel is laid out anew for every width, so
that letters stay as large on a phone as on a desk. Words are as wide as in DejaVu Sans, the widest of the fonts that may
be there, so that what fits here fits everywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom

INK, QUIET, RULE, GRID = "#1a1a1a", "#595959", "#8c8c8c", "#e6e6e6"
LETTERS = 11.5  # of axes and labels
LINE = 14.0  # from one line of words to the next
MOST_AT_ENDS = 20  # names that a plot's height has room for at the ends of its lines
MOST_ASIDE = 36.0  # from the first to the last of points that share a place

# Okabe and Ito's palette without its yellow, which vanishes on white. Shapes and dashes tell apart what shares a colour,
# and everything in grayscale.
FAMILY_COLOURS = {"mha": "#0072B2", "gqa": "#D55E00", "mqa": "#CC79A7", "mla": "#009E73"}
COLOURS = ("#E69F00", "#56B4E9", "#000000", "#7F7F7F", *FAMILY_COLOURS.values())
MARKERS = ("circle", "square", "triangle", "diamond", "down", "pentagon", "left", "right", "star")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2.5), (8, 2.5, 2, 2.5), (12, 4))


# --- what a figure shows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How an arm is drawn in every figure."""

    colour: str
    marker: str = "circle"
    dash: tuple[float, ...] = ()


def styles(families: dict[str, str]) -> dict[str, Style]:
    """Of the arms, from arm -> family: a family has one colour; where there is one family alone, the arms have."""
    names = list(dict.fromkeys(families.values()))
    others = [name for name in names if name not in FAMILY_COLOURS]
    colours = FAMILY_COLOURS | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    found: dict[str, Style] = {}
    seen: dict[str, int] = {}
    alone = [*FAMILY_COLOURS.values(), "#E69F00", "#56B4E9", "#000000", "#7F7F7F"]
    for arm, family in families.items():
        number = seen[family] = seen.get(family, -1) + 1
        colour, dash = colours[family], DASHES[number % len(DASHES)]
        if len(names) == 1:
            colour, dash = alone[number % len(alone)], DASHES[number // len(alone) % len(DASHES)]
        found[arm] = Style(colour, MARKERS[number % len(MARKERS)], dash)
    return found


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
    label: str | None = None  # None: the arm


@dataclass(frozen=True)
class Plot:
    """y against x. Points have their names beside them, lines at their ends or below."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    x_log: bool = False
    x_ticks: Sequence[float] | None = None  # None: round numbers
    front: Sequence[Point] = ()  # a staircase through these, smaller x first
    rules: Sequence[tuple[float, str]] = ()  # vertical lines
    level: tuple[float, str] | None = None  # a horizontal one, and whose it is
    lines: bool = False
    above: float | None = None  # what lies above is cut off


@dataclass(frozen=True)
class Row:
    """A line of a Rows."""

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
class Rows:
    """Intervals below one another: a forest plot, or a waterfall where bars lead from one row to the next."""

    x_label: str
    rows: Sequence[Row]
    level: float | None = None  # a vertical line
    sides: tuple[str, str] | None = None  # words for the left and the right of it


Panel = Plot | Rows


@dataclass(frozen=True)
class Figure:
    """Panels that belong together, under one caption."""

    name: str  # of its file
    title: str
    caption: str
    panels: Sequence[tuple[str, Panel]]  # heading and panel


# --- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    points: Sequence[Point]
    colour: str
    width: float = 1.0
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Area:
    points: Sequence[Point]
    fill: str
    edge: str | None = None
    opacity: float = 1.0


@dataclass(frozen=True)
class Circle:
    x: float
    y: float
    radius: float
    fill: str
    edge: str


@dataclass(frozen=True)
class Words:
    x: float
    y: float  # of the middle of the small letters
    text: str
    size: float = LETTERS
    colour: str = INK
    anchor: str = "start"  # start | middle | end
    bold: bool = False
    halo: bool = False  # what lies behind stays away from the letters


@dataclass(frozen=True)
class Spot:
    """Where a figure can be pointed at without a marker: on the page only."""

    x: float
    y: float
    radius: float = 7.0


Shape = Line | Area | Circle | Words | Spot


@dataclass(frozen=True)
class Group:
    """Shapes that are pointed at together."""

    shapes: list[Shape]
    arms: tuple[str, ...] = ()
    hover: str = ""


@dataclass
class Drawing:
    """A panel at one width."""

    width: float
    height: float
    groups: list[Group] = field(default_factory=list)

    def add(self, *shapes: Shape, arms: tuple[str, ...] = (), hover: str = "") -> None:
        self.groups.append(Group(list(shapes), arms, hover))


_NARROW, _WIDE = set("iljI|.,:;'!()[] "), set("mwMW@%—")


def text_width(text: str, size: float = LETTERS) -> float:
    """An upper estimate, in the unit of size."""
    widths = (
        0.4 if c in _NARROW else 0.98 if c in _WIDE else 0.72 if c.isupper() or c in "+−=±<>" else 0.636 for c in text
    )
    return size * sum(widths)


def darker(colour: str) -> str:
    """Small letters need more contrast than markers."""
    return "#" + "".join(f"{round(0.6 * int(colour[i : i + 2], 16)):02x}" for i in (1, 3, 5))


def marker(x: float, y: float, style: Style, *, size: float = 5.0, hollow: bool = False) -> Shape:
    """A point's shape."""
    fill, edge = ("#ffffff", style.colour) if hollow else (style.colour, "#ffffff")
    if style.marker == "circle":
        return Circle(x, y, size, fill, edge)
    corners, turn, wide = {
        "square": (4, 45, 1.25), "diamond": (4, 0, 1.25), "triangle": (3, -90, 1.3), "down": (3, 90, 1.3),
        "left": (3, 180, 1.3), "right": (3, 0, 1.3), "pentagon": (5, -90, 1.15), "star": (10, -90, 1.4),
    }[style.marker]  # fmt: skip
    points = []
    for i in range(corners):
        radius = size * wide * (0.5 if corners == 10 and i % 2 else 1)
        angle = math.radians(turn + 360 * i / corners)
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return Area(points, fill, edge)


def draw(panel: Panel, width: float) -> Drawing:
    """Lay a panel out."""
    return _draw_rows(panel, width) if isinstance(panel, Rows) else _draw_plot(panel, width)


# --- axes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """From values to places."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _axis(values: Iterable[float], start: float, end: float, *, log: bool = False, margin: float = 0.06) -> _Axis:
    """Over all values, with some room at both ends."""
    found = list(values)
    low, high = min(found), max(found)
    if log:
        room = (high / low) ** margin if high > low else 2.0
        return _Axis(low / room, high * room, start, end, log=True)
    room = (high - low) * margin or max(abs(high) * 0.05, 1e-9)
    return _Axis(low - room, high + room, start, end)


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers from low to high."""
    step = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(step))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= step * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Of 1, 2 and 5 times powers of ten, or round numbers where the range is narrow."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) <= count:
            break
    return ticks if len(ticks) > 1 else round_ticks(low, high, count)


def short(value: float) -> str:
    """A number on an axis."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    if abs(value) >= 10_000 and value % 1000 == 0:
        return f"{value / 1000:.0f}k"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.6g}".replace("-", "−")


def _labels(ticks: Sequence[float]) -> list[str]:
    """As many decimals for all of them as one needs."""
    texts = [short(tick) for tick in ticks]
    decimals = max((len(text.partition(".")[2]) for text in texts if text[-1].isdigit()), default=0)
    if decimals and max(map(abs, ticks)) < 1000:
        texts = [f"{tick + 0.0:.{decimals}f}".replace("-", "−") for tick in ticks]
    return texts


def _draw_x_ticks(
    drawing: Drawing, axis: _Axis, ticks: Sequence[float], texts: Sequence[str], top: float, bottom: float
) -> None:
    """From the right, as far as the labels have room: the largest is most often the reference."""
    limit = math.inf
    shapes: list[Shape] = []
    for tick, text in reversed(list(zip(ticks, texts, strict=True))):
        x, wide = axis(tick), text_width(text)
        if x + wide / 2 + 6 > limit or x + wide / 2 > drawing.width:
            continue
        limit = x - wide / 2
        shapes += [Line([(x, top), (x, bottom)], GRID), Words(x, bottom + 11, text, colour=QUIET, anchor="middle")]
    drawing.add(*shapes)


def wrapped(text: str, width: float, size: float = LETTERS) -> list[str]:
    """Lines of words that are no wider than that, if one word is not."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def fitted(text: str, width: float, size: float = LETTERS) -> str:
    """As much of a name as there is room for: the whole of it stands in the tables."""
    if text_width(text, size) <= width:
        return text
    kept = next(n for n in range(len(text) - 1, -1, -1) if n == 0 or text_width(f"{text[:n]}…", size) <= width)
    return f"{text[:kept]}…"


# --- plots -----------------------------------------------------------------------------------------------------------


def _draw_plot(plot: Plot, width: float) -> Drawing:
    names = {series.arm: series.label or series.arm for series in plot.series}
    at_right = [*names.values(), *([plot.level[1]] if plot.level else [])]
    longest = max(map(text_width, at_right), default=0.0)
    if plot.lines and longest < 0.27 * width and len(at_right) <= MOST_AT_ENDS:
        return _laid_out(plot, width, names, "ends", at_right)[0]
    if not plot.lines:
        drawing, has_room = _laid_out(plot, width, names, "beside", [])
        if has_room:
            return drawing
    return _laid_out(plot, width, names, "below", [])[0]


def _laid_out(
    plot: Plot, width: float, names: dict[str, str], place: str, at_right: Sequence[str]
) -> tuple[Drawing, bool]:
    """With the names at the ends of lines, beside points or in a legend below; False: beside, they cover something."""
    places, legend_lines = _legend_places(list(names.values()), width) if place == "below" else ([], 0)
    longest = max(map(text_width, at_right), default=0.0)
    marks = [mark for series in plot.series for mark in series.marks if plot.above is None or mark.y <= plot.above]
    ends = [
        y for mark in marks for y in (mark.low, mark.high) if y is not None and (plot.above is None or y <= plot.above)
    ]
    ys = [mark.y for mark in marks] + ends + ([plot.level[0]] if plot.level else [])
    top = LINE * len(wrapped(plot.y_label, width)) + 8
    bottom = top + min(300.0, max(215.0, 0.52 * width, 15.0 * len(at_right)))
    y_axis = _axis(ys, bottom, top, margin=0.05 if plot.lines else 0.12)
    y_ticks = round_ticks(y_axis.low, y_axis.high, 5)
    left = max(map(text_width, _labels(y_ticks)), default=0.0) + 8
    right = width - (longest + 12 if at_right else 8)
    xs = [mark.x for series in plot.series for mark in series.marks] + [x for x, _ in plot.rules]
    x_axis = _axis(xs, left, right, log=plot.x_log, margin=0.03 if plot.lines else 0.12)
    x_words = wrapped(plot.x_label, width)
    foot = bottom + 20 + LINE * len(x_words)
    drawing = Drawing(width, foot + LINE * legend_lines + 4)

    for i, line in enumerate(wrapped(plot.y_label, width)):
        drawing.add(Words(0, 8 + LINE * i, line, colour=QUIET))
    drawing.add(*[
        shape for tick, text in zip(y_ticks, _labels(y_ticks), strict=True)
        for shape in (Line([(left, y_axis(tick)), (right, y_axis(tick))], GRID),
                      Words(left - 6, y_axis(tick), text, colour=QUIET, anchor="end"))
    ])  # fmt: skip
    count = max(2, round((right - left) / 75))
    ticks = (log_ticks if plot.x_log else round_ticks)(x_axis.low, x_axis.high, count)
    texts = _labels(ticks)
    if plot.x_ticks is not None:
        ticks = sorted({tick for tick in plot.x_ticks if x_axis.low <= tick <= x_axis.high})
        texts = [short(tick) for tick in ticks]
    _draw_x_ticks(drawing, x_axis, ticks, texts, top, bottom)
    drawing.add(Line([(left, bottom), (right, bottom)], RULE))
    _draw_x_label(drawing, x_words, (left + right) / 2, bottom)
    _draw_rules(drawing, plot, x_axis, y_axis, left, right, top, bottom)
    shifts = {} if plot.lines else _side_by_side(plot, x_axis, y_axis)
    bands = 0.16 if len(plot.series) < 7 else 0.07
    for series in plot.series:
        _draw_series(drawing, series, plot, x_axis, y_axis, shifts.get(series.arm, 0.0), bands)
    has_room = True
    if place == "ends":
        _label_ends(drawing, plot, x_axis, y_axis, names, right, top, bottom)
    elif place == "below":
        _draw_legend(drawing, plot, names, places, foot + 8)
    else:
        has_room = _label_points(drawing, plot, x_axis, y_axis, names, shifts, (left, top, right, bottom))
    return drawing, has_room


def _draw_x_label(drawing: Drawing, lines: Sequence[str], middle: float, bottom: float) -> None:
    for i, line in enumerate(lines):
        half = text_width(line) / 2
        x = min(max(middle, half), drawing.width - half)
        drawing.add(Words(x, bottom + 27 + LINE * i, line, colour=QUIET, anchor="middle"))


def _side_by_side(plot: Plot, x_axis: _Axis, y_axis: _Axis) -> dict[str, float]:
    """How far to the side an arm's points go, so that none covers another: they often share a cache size."""
    clusters: list[tuple[list[str], float, float, float]] = []  # arms, x, top, bottom
    for series in sorted(plot.series, key=lambda series: x_axis(series.marks[0].x)):
        mark = series.marks[0]
        x = x_axis(mark.x)
        above, below = (y_axis(y if y is not None else mark.y) for y in (mark.high, mark.low))
        above, below, arms = min(above, y_axis(mark.y) - 5), max(below, y_axis(mark.y) + 5), [series.arm]
        for cluster in [c for c in clusters if abs(c[1] - x) < 10 and c[2] < below and above < c[3]]:
            clusters.remove(cluster)
            arms, above, below = cluster[0] + arms, min(above, cluster[2]), max(below, cluster[3])
        clusters.append((arms, x, above, below))
    shifts: dict[str, float] = {}
    for arms, *_ in clusters:
        # However many they are, they stay nearer to their own place than to the next.
        step = min(12.0, MOST_ASIDE / max(1, len(arms) - 1))
        shifts |= {arm: step * (i - (len(arms) - 1) / 2) for i, arm in enumerate(arms)}
    return shifts


def _draw_rules(drawing: Drawing, plot: Plot, x_axis: _Axis, y_axis: _Axis, left: float, right: float, top: float,
                bottom: float) -> None:  # fmt: skip
    for x, text in plot.rules:
        place = x_axis(x)
        side = "start" if place + text_width(text, 10) + 8 < right else "end"
        shift = 4 if side == "start" else -4
        drawing.add(Line([(place, top), (place, bottom)], RULE, dash=(4, 3)),
                    Words(place + shift, top + 6, text, 10, QUIET, side, halo=True))  # fmt: skip
    if plot.level is not None:
        y = y_axis(plot.level[0])
        drawing.add(Line([(left, y), (right, y)], INK, 1.2))
    if plot.front:
        drawing.add(Line(_front_path(plot, x_axis, y_axis, right), "#bdbdbd", 1.6))


def _front_path(plot: Plot, x_axis: _Axis, y_axis: _Axis, right: float) -> list[Point]:
    """The corners of the staircase, out to the right; nothing where there is none."""
    points: list[Point] = []
    for x, y in plot.front:
        points += [(x_axis(x), points[-1][1])] if points else []
        points.append((x_axis(x), y_axis(y)))
    return [*points, (right, points[-1][1])] if points else []


def _draw_series(drawing: Drawing, series: Series, plot: Plot, x_axis: _Axis, y_axis: _Axis, shift: float,
                 bands: float) -> None:  # fmt: skip
    colour, arms = series.style.colour, (series.arm,)
    shown = [mark for mark in series.marks if plot.above is None or mark.y <= plot.above]
    if series.joined:
        banded = [mark for mark in shown if mark.low is not None and mark.high is not None]
        shapes: list[Shape] = []
        if len(banded) > 1:
            most = math.inf if plot.above is None else plot.above
            upper = [(x_axis(m.x), y_axis(min(m.high, most))) for m in banded if m.high is not None]
            lower = [(x_axis(m.x), y_axis(m.low)) for m in reversed(banded) if m.low is not None]
            shapes.append(Area([*upper, *lower], colour, opacity=bands))
        if len(shown) > 1:
            shapes.append(Line([(x_axis(m.x), y_axis(m.y)) for m in shown], colour, 1.8, series.style.dash))
        drawing.add(*shapes, arms=arms, hover=series.label or series.arm)
    for mark in shown:
        x, shapes = x_axis(mark.x) + shift, []
        if not series.joined and mark.low is not None and mark.high is not None:
            low, high = y_axis(mark.low), y_axis(mark.high)
            shapes = [Line([(x, low), (x, high)], colour, 1.5)]
            shapes += [Line([(x - 3.5, y), (x + 3.5, y)], colour, 1.5) for y in (low, high)]
        if series.dotted:
            size = 3.2 if series.joined else 5.0
            drawing.add(*shapes, marker(x, y_axis(mark.y), series.style, size=size, hollow=series.hollow), arms=arms,
                        hover=mark.hover)  # fmt: skip
        elif mark.hover:
            drawing.add(Spot(x, y_axis(mark.y)), arms=arms, hover=mark.hover)


def _label_ends(drawing: Drawing, plot: Plot, x_axis: _Axis, y_axis: _Axis, names: dict[str, str], right: float, top: float,
                bottom: float) -> None:  # fmt: skip
    """Names at the right, moved apart where lines end close together."""
    last: dict[str, Point] = {}
    styles_: dict[str, Style] = {}
    for series in plot.series:
        mark = max(series.marks, key=lambda mark: mark.x)
        if series.arm not in last or mark.x > last[series.arm][0]:
            last[series.arm], styles_[series.arm] = (mark.x, mark.y), series.style
    if plot.level is not None:
        last[plot.level[1]], styles_[plot.level[1]] = (x_axis.high, plot.level[0]), Style(INK)
    order = sorted(last, key=lambda arm: y_axis(last[arm][1]))
    places = spread([y_axis(last[arm][1]) for arm in order], 13.5, top + 4, bottom - 4)
    for arm, y in zip(order, places, strict=True):
        from_x, from_y, colour = min(x_axis(last[arm][0]) + 4, right), y_axis(last[arm][1]), styles_[arm].colour
        shapes: list[Shape] = []
        if abs(from_y - y) > 2 or right - from_x > 8:
            shapes.append(Line([(from_x, from_y), (right + 5, y)], colour, 0.7))
        name = names.get(arm, arm)
        drawing.add(*shapes, Words(right + 7, y, name, colour=darker(colour)), arms=(arm,), hover=name)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising places moved apart to a gap, as little as that takes, and kept inside if they fit."""
    clusters: list[tuple[list[float], float]] = []  # members' wanted places, and where the first one stands

    def first(members: Sequence[float]) -> float:
        start = sum(place - gap * i for i, place in enumerate(members)) / len(members)
        return max(low, min(start, high - gap * (len(members) - 1)))

    for place in wanted:
        members, start = [place], first([place])
        while clusters and clusters[-1][1] + gap * len(clusters[-1][0]) > start:
            members = clusters.pop()[0] + members
            start = first(members)
        clusters.append((members, start))
    return [start + gap * i for members, start in clusters for i in range(len(members))]


def _legend_places(names: Sequence[str], width: float) -> tuple[list[Point], int]:
    """Where names stand in lines below a plot (line number for y), and how many lines."""
    places: list[Point] = []
    x, line = 0.0, 0
    for name in names:
        wide = text_width(name) + 40
        if x > 0 and x + wide > width:
            x, line = 0.0, line + 1
        places.append((x, float(line)))
        x += wide
    return places, line + 1


def _draw_legend(drawing: Drawing, plot: Plot, names: dict[str, str], places: Sequence[Point], top: float) -> None:
    first = {series.arm: series for series in reversed(plot.series)}
    for (arm, name), (x, line) in zip(names.items(), places, strict=True):
        style, y = first[arm].style, top + LINE * line
        drawing.add(*([Line([(x, y), (x + 22, y)], style.colour, 1.8, style.dash)] if plot.lines else []),
                    *([marker(x + 11, y, style, size=3.2 if plot.lines else 4.5)] if first[arm].dotted else []),
                    Words(x + 27, y, fitted(name, drawing.width - 27), colour=darker(style.colour)),
                    arms=(arm,), hover=name)  # fmt: skip


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(box: Box, start: Point, end: Point) -> bool:
    """Does the line pass through the box? Seen at steps of about two points."""
    steps = max(2, round(math.dist(start, end) / 2))
    places = (
        (start[0] + (end[0] - start[0]) * i / steps, start[1] + (end[1] - start[1]) * i / steps)
        for i in range(steps + 1)
    )
    return any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in places)


def _label_points(drawing: Drawing, plot: Plot, x_axis: _Axis, y_axis: _Axis, names: dict[str, str],
                  shifts: dict[str, float], inside: Box) -> bool:  # fmt: skip
    """A name beside each arm's mark, where it covers no marker, no bar and no other name. False: there is no room."""
    places = {
        series.arm: (x_axis(series.marks[0].x) + shifts[series.arm], y_axis(series.marks[0].y))
        for series in plot.series
    }
    taken: list[Box] = []
    for series in plot.series:
        (x, y), mark = places[series.arm], series.marks[0]
        low, high = (y_axis(end if end is not None else mark.y) for end in (mark.low, mark.high))
        taken += [(x - 6, y - 6, x + 6, y + 6), (x - 3, high - 2, x + 3, low + 2)]
    limits: Box = (inside[0], inside[1] - 4, drawing.width, inside[3])
    # What a name had better not be struck through by: the front, and the lines to names that stand away.
    leaders = list(itertools.pairwise(_front_path(plot, x_axis, y_axis, inside[2])))
    for series in plot.series:
        x, y = places[series.arm]
        best = min(
            (_candidate(x, y, text_width(names[series.arm]), distance, angle, limits, taken, leaders)
             for distance in (10, 14, 20, 28, 38, 50, 64, 80, 100) for angle in range(0, 360, 15)),
            key=lambda candidate: candidate[0],
        )  # fmt: skip
        cost, dx, dy, anchor, box = best
        if cost >= _COVERS:
            return False
        taken.append(box)
        words = Words(x + dx, y + dy, names[series.arm], colour=darker(series.style.colour), anchor=anchor, halo=True)
        shapes: list[Shape] = [words]
        if math.hypot(dx, dy) > 16:
            leaders.append(((x + 0.25 * dx, y + 0.25 * dy), (x + 0.95 * dx, y + 0.95 * dy)))
            shapes.insert(0, Line(leaders[-1], RULE, 0.7))
        drawing.add(*shapes, arms=(series.arm,), hover=series.marks[0].hover)
    return True


_COVERS = 1000.0


def _candidate(x: float, y: float, wide: float, distance: float, angle: float, limits: Box, taken: Sequence[Box],
               leaders: Sequence[tuple[Point, Point]]) -> tuple[float, float, float, str, Box]:  # fmt: skip
    """(cost, dx, dy, anchor, box) of a name at a place around a point."""
    dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
    anchor = "start" if dx > 1 else "end" if dx < -1 else "middle"
    begin = x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    box = (begin - 1, y + dy - 6.5, begin + wide + 1, y + dy + 6.5)
    outside = box[0] < limits[0] or box[2] > limits[2] or box[1] < limits[1] or box[3] > limits[3]
    # A name to the right reads best, then to the left; anything is better than covering something.
    cost = distance + abs(math.sin(math.radians(angle))) * 4 + (2 if dx < 0 else 0)
    cost += _COVERS * (outside + sum(_overlap(box, other) for other in taken))
    cost += 300 * sum(_crosses(box, *leader) for leader in leaders)
    if distance > 16:
        start, end = (x + 0.3 * dx, y + 0.3 * dy), (x + 0.9 * dx, y + 0.9 * dy)
        others = [other for other in taken if not (other[0] <= x <= other[2] and other[1] <= y <= other[3])]
        cost += 200 * sum(_crosses(other, start, end) for other in others)
    return cost, dx, dy, anchor, box


# --- rows ------------------------------------------------------------------------------------------------------------


def _draw_rows(panel: Rows, width: float) -> Drawing:
    """Names at the left and figures at the right, or both above the intervals where there is no room beside them."""
    label = max(text_width(row.label) for row in panel.rows)
    words = max(text_width(row.words) for row in panel.rows)
    beside = width - label - words - 28 > 0.4 * width
    noisy = any(row.noise is not None for row in panel.rows)
    room = width if beside or label + words + 14 <= width else width - words - 14
    labels = [[fitted(line, room) for line in wrapped(row.label, room)] for row in panel.rows]
    above = 0.0 if beside else LINE * max(map(len, labels))
    pitch = above + (30.0 if noisy else 25.0) + (0.0 if beside else 6.0)
    left, right = (label + 14, width - words - 14) if beside else (6.0, width - 6.0)
    values = [
        v for row in panel.rows for v in (row.value, row.low, row.high, row.begin, *(row.noise or ())) if v is not None
    ]
    axis = _axis([*values, *([panel.level] if panel.level is not None else [])], left, right, margin=0.05)
    top = LINE + 8 if panel.sides else 6.0
    bottom = top + pitch * len(panel.rows)
    x_words = wrapped(panel.x_label, width)
    drawing = Drawing(width, bottom + 20 + LINE * len(x_words) + 4)
    ticks = round_ticks(axis.low, axis.high, max(2, round((right - left) / 80)))
    _draw_x_ticks(drawing, axis, ticks, _labels(ticks), top, bottom)
    drawing.add(Line([(left, bottom), (right, bottom)], RULE))
    _draw_x_label(drawing, x_words, (left + right) / 2, bottom)
    if panel.level is not None:
        x = axis(panel.level)
        drawing.add(Line([(x, top - 2), (x, bottom)], INK, 1.2))
        if panel.sides:
            if text_width(panel.sides[0], 10) <= x - 6:
                drawing.add(Words(x - 6, 8, panel.sides[0], 10, QUIET, "end"))
            if text_width(panel.sides[1], 10) <= width - x - 6:
                drawing.add(Words(x + 6, 8, panel.sides[1], 10, QUIET))
    before: Point | None = None
    for i, (row, lines) in enumerate(zip(panel.rows, labels, strict=True)):
        start = top + pitch * i
        y = start + pitch / 2 if beside else start + above + 14.0
        first = y if beside else start + 10
        texts: list[Shape] = []
        if not beside:  # the vertical lines end where words are
            wide = max(map(text_width, lines))
            texts.append(Area(_rectangle(0, first - 7, wide, first + LINE * len(lines) - 7), "#ffffff"))
            texts.append(Area(_rectangle(width - text_width(row.words), first - 7, width, first + 7), "#ffffff"))
        texts += [Words(0, first + LINE * n, line) for n, line in enumerate(lines)]
        texts.append(Words(width, first, row.words, anchor="end"))
        middle = y - 4 if row.noise else y
        if before is not None and row.begin is not None:
            texts.append(Line([before, (before[0], middle + 7)], RULE, 0.8, (2, 2)))
        drawing.add(*texts, *_interval(row, axis, middle), arms=row.arms, hover=row.hover)
        before = (axis(row.value), middle + 7)
    return drawing


def _interval(row: Row, axis: _Axis, y: float) -> Iterator[Shape]:
    """What a row shows between its words."""
    if row.begin is not None:
        yield Area(_rectangle(axis(row.begin), y - 7, axis(row.value), y + 7), row.colour, opacity=0.75)
    if row.low is not None and row.high is not None:
        colour, thick = (row.colour, 2.2) if row.begin is None else (INK, 1.2)
        yield Line([(axis(row.low), y), (axis(row.high), y)], colour, thick)
        for end in (row.low, row.high):
            yield Line([(axis(end), y - 3.5), (axis(end), y + 3.5)], colour, 1.2)
    if row.noise is not None:
        yield Area(_rectangle(axis(row.noise[0]), y + 8, axis(row.noise[1]), y + 12), "#bdbdbd", RULE)
    if row.begin is None:
        yield marker(axis(row.value), y, Style(row.colour, "square"), size=4.5, hollow=not row.filled)


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def stacked(drawings: Sequence[tuple[str, Drawing]], width: float) -> Drawing:
    """Panels below one another, each under its heading, in one drawing."""
    whole, top = Drawing(width, 0.0), 0.0
    for heading, drawing in drawings:
        if heading:
            for line in wrapped(heading, width, 12.5):
                whole.add(Words(0, top + 9, line, 12.5, bold=True))
                top += 18
            top += 4
        for group in drawing.groups:
            whole.groups.append(dataclasses.replace(group, shapes=[_lowered(shape, top) for shape in group.shapes]))
        top += drawing.height + 14
    whole.height = top - 14
    return whole


def _lowered(shape: Shape, by: float) -> Shape:
    if isinstance(shape, (Line, Area)):
        return dataclasses.replace(shape, points=[(x, y + by) for x, y in shape.points])
    return dataclasses.replace(shape, y=shape.y + by)
