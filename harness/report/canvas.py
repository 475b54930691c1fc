"""What all pictures are drawn with: a figure whose unit is the point, the conventions, letters, ticks and markers."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.files.text import number, visible
from harness.report.colours import GRID, PAPER, QUIET, RULE, Style
from harness.report.pictures import short

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

LETTERS, LINE, LETTER = 11.5, 15.0, 6.6  # the size of letters, from one line of words to the next, and a letter's width
BEHIND_WORDS = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # so that no line strikes them through

_CONVENTIONS: dict[str, Any] = {
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "legend.fontsize"), LETTERS),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), LETTERS),
    **dict.fromkeys(("axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), QUIET),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size", "xtick.minor.size", "ytick.minor.size"), 0),
    **dict.fromkeys(("axes.spines.left", "axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("legend.borderpad", "legend.borderaxespad"), 0),
    **{"legend.handletextpad": 0.5, "legend.columnspacing": 1.2, "legend.labelspacing": 0.2},
    **{"axes.facecolor": "none", "axes.edgecolor": RULE, "grid.color": GRID, "figure.facecolor": PAPER},
    **{"axes.titlelocation": "left", "axes.titlepad": 8, "axes.axisbelow": True, "grid.linewidth": 1},
    **{"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "text.parse_math": False},
    **{"lines.scale_dashes": False, "svg.fonttype": "none"},
}


@dataclass
class Drawing:
    """A picture at one width: matplotlib's figure, whose unit is the point, and the parts that can be pointed at."""

    figure: Figure
    parts: dict[str, tuple[tuple[str, ...], Sequence[str]]] = field(default_factory=dict)

    def part(self, artists: Sequence[Artist | None], arms: tuple[str, ...], hovers: Sequence[str] = ()) -> None:
        """These belong to arms. hovers: of the markers that are drawn, in their order; a single one is of all."""
        for artist in filter(None, artists):
            artist.set_gid(f"part-{len(self.parts)}")
            self.parts[f"part-{len(self.parts)}"] = (arms, hovers)

    @property
    def points(self) -> Transform:
        """From points to wherever they are at any resolution."""
        from matplotlib.transforms import Affine2D

        return Affine2D().scale(1 / 72) + self.figure.dpi_scale_trans


@contextlib.contextmanager
def conventions(**more: Any) -> Iterator[None]:
    """The same pictures whatever a matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: dict[str, Any] = matplotlib.rcParams  # type: ignore[assignment]
        settings.update(_CONVENTIONS | more)
        yield


def shortened(name: str, width: float) -> str:
    """As much of a name as there is room for, from both of its ends; the whole of it stands in the tables."""
    name, longest = visible(name), max(8, letters_in(width))
    tail = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def letters_in(width: float) -> int:
    """How many fit; n in what n take, whatever 6.6 n / 6.6 is rounded to."""
    return int(width / LETTER + 1e-6)


def folded(text: str, width: float) -> str:
    return textwrap.fill(text, max(12, letters_in(width)))


def line_count(text: str) -> int:
    return text.count("\n") + 1 if text else 0


def limits(values: Sequence[float], margin: float, *, log: bool) -> tuple[float, float]:
    """Over all values, with some room at both ends."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** margin if high > low else 2.0
        return low / room, high * room
    room = (high - low) * margin or max(abs(high) * 0.05, 1e-9)
    return low - room, high + room


def round_ticks(low: float, high: float, count: int, *, log: bool) -> list[float]:
    """About so many round numbers; on a log scale 1, 2 and 5 times powers of ten where these are enough."""
    from matplotlib.ticker import MaxNLocator

    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            ticks = [factor * 10.0**power for power in powers for factor in factors]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) <= count:
                break
        if len(ticks) > 2:
            return ticks
    return [tick for tick in MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """As many decimals for all of them as one needs."""
    texts = [short(tick) for tick in ticks]
    decimals = max((len(text.partition(".")[2]) for text in texts if text[-1].isdigit()), default=0)
    if decimals and max(map(abs, ticks)) < 1000:
        texts = [number(tick, f".{decimals}f") for tick in ticks]
    return texts


def set_x_ticks(axes: Axes, width: float, *, log: bool = False, at: Sequence[float] | None = None) -> None:
    """From the right, as far as the labels have room: the largest is most often the reference."""
    low, high = axes.get_xlim()
    ticks = (
        round_ticks(low, high, max(2, round(width / 75)), log=log)
        if at is None
        else sorted({tick for tick in at if low <= tick <= high})
    )
    texts = tick_texts(ticks) if at is None else [short(tick) for tick in ticks]
    scale = math.log if log else float
    limit, kept = math.inf, []
    for tick, text in reversed(list(zip(ticks, texts, strict=True))):
        place, half = (scale(tick) - scale(low)) / (scale(high) - scale(low)) * width, len(text) * LETTER / 2
        if place + half + 8 < limit:
            limit = place - half
            kept.append((tick, text))
    axes.set_xticks([tick for tick, _ in kept], [text for _, text in kept])
    axes.set_xticks([], minor=True)


def marker_look(style: Style, *, size: float, hollow: bool = False) -> dict[str, Any]:
    """Of a marker, so that all shapes look as large."""
    factor = {"o": 1.0, "s": 0.9, "D": 0.85, "*": 1.35, "p": 1.1}.get(style.marker, 1.1)
    fill, edge = (PAPER, style.colour) if hollow else (style.colour, PAPER)
    return {
        "marker": style.marker,
        "markersize": size * factor,
        "markerfacecolor": fill,
        "markeredgecolor": edge,
        "markeredgewidth": 1.3 if hollow else 0.8,
    }


def line_style(style: Style) -> Any:
    return (0, style.dash) if style.dash else "solid"
