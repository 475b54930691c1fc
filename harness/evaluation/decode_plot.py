"""What the figures of decode_speed.py say: where MLA's paths change places, a table, a CSV and a picture."""

from __future__ import annotations

import csv
import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.evaluation.decode_speed import Figure, Results, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette without its yellow, which vanishes on white. Shapes tell the markers apart in grayscale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p", "h")
PANEL_INCHES = (6.4, 4.2)
DOTS_PER_INCH = 160


# --- where the paths change places -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossover:
    """Where MLA's absorbed path becomes faster or slower than the expanding one, along one axis."""

    variant: str
    batch_size: int
    axis: str  # context | queries
    context: int | None  # of the axis queries
    measured: tuple[int, ...]
    at: tuple[float, ...]  # interpolated; none: one path is faster throughout
    words: str
    absorbs_up_to: int  # what attention.decode=auto goes by, in queries


def crossings(points: Sequence[tuple[float, float]]) -> list[float]:
    """Where a curve through (x, ratio) crosses 1, straight between its points on logarithmic axes."""
    logs = [(math.log(x), math.log(ratio)) for x, ratio in points]
    return [
        math.exp(x + (next_x - x) * y / (y - next_y))
        for (x, y), (next_x, next_y) in itertools.pairwise(logs) if (y < 0) != (next_y < 0)
    ]  # fmt: skip


def compared(points: Sequence[tuple[int, float]], unit: str) -> str:
    """Points (x, absorbed time / expand time) in a sentence."""
    found = crossings(points)
    first, second = ("absorbed", "expand") if points[0][1] < 1 else ("expand", "absorbed")
    if len(found) == 1:
        return f"{first} is faster up to about {found[0]:,.0f} {unit}, {second} above"
    if found:
        return f"not settled: the paths change places at about {', '.join(f'{x:,.0f}' for x in found)} {unit}"
    span = f"{points[0][0]:,}" + (f" to {points[-1][0]:,}" if len(points) > 1 else "")
    return f"{first} is faster at all that was measured, {span} {unit}"


def crossovers(figures: Sequence[Figure], absorbs_up_to: Mapping[str, int]) -> list[Crossover]:
    """Of every variant that was timed in both paths: along the context at one new token, along the new tokens a call."""
    seconds = {(f.variant, f.batch_size, f.context, f.queries, f.path): f.call.median for f in figures}
    both = sorted(key[:4] for key in seconds if key[4] == "expand" and (*key[:4], "absorbed") in seconds)
    ratio = {key: seconds[*key, "absorbed"] / seconds[*key, "expand"] for key in both}
    lines: dict[tuple[str, int, str, int | None], list[tuple[int, float]]] = {}
    for variant, B, S, T in both:
        if T == 1:
            lines.setdefault((variant, B, "context", None), []).append((S, ratio[variant, B, S, T]))
    for variant, B, S, T in both:
        lines.setdefault((variant, B, "queries", S), []).append((T, ratio[variant, B, S, T]))
    return [
        Crossover(
            variant, B, axis, context, tuple(x for x, _ in points), tuple(crossings(points)),
            compared(points, "cached tokens" if axis == "context" else "new tokens a call"), absorbs_up_to[variant],
        )
        for (variant, B, axis, context), points in lines.items() if axis == "context" or len(points) > 1
    ]  # fmt: skip


def sentence(crossover: Crossover) -> str:
    """For a person."""
    where = f"{crossover.variant}, batch {crossover.batch_size:,}"
    if crossover.axis == "context":
        return f"{where}, one new token: {crossover.words}"
    limit = f"attention.decode=auto absorbs up to {crossover.absorbs_up_to:,}"
    return f"{where}, context {crossover.context:,}: {crossover.words} ({limit})"


# --- table and CSV ---------------------------------------------------------------------------------------------------

COLUMNS = ("batch", "context", "new", "variant", "first token ms", "ms a step", "quartiles", "tokens/s", "MB a step",
           "of bandwidth", "cache MiB", "largest batch")  # fmt: skip
_LEFT = COLUMNS.index("variant")


def table(results: Results) -> list[str]:
    """Aligned columns, a batch size, context and number of new tokens together; what was skipped has its line there."""
    rows: list[tuple[tuple[int, int, int], list[str]]] = [((0, 0, 0), list(COLUMNS))]
    rows += [((f.batch_size, f.context, f.queries), _cells(f)) for f in results.figures]
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(COLUMNS))]
    skipped = [((s.batch_size, s.context, s.queries), s) for s in results.skipped]
    widths[_LEFT] = max([widths[_LEFT], *(len(s.row) for _, s in skipped)])

    def aligned(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, strict=False)
        return "  ".join(c.ljust(w) if i == _LEFT else c.rjust(w) for i, (c, w) in enumerate(pairs)).rstrip()

    lines = [(key, aligned(cells)) for key, cells in rows]
    lines += [
        (key, f"{aligned([f'{s.batch_size:,}', f'{s.context:,}', f'{s.queries:,}', s.row])}  skipped: {s.reason}")
        for key, s in skipped
    ]
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]  # stable: variants stay in order


def _cells(f: Figure) -> list[str]:
    largest = "-" if f.largest_batch is None or f.queries > 1 else f"{f.largest_batch:,}"
    return [
        f"{f.batch_size:,}", f"{f.context:,}", f"{f.queries:,}", f.row,
        "-" if f.first_token is None else in_ms(f.first_token.median), in_ms(f.call.median),
        f"{in_ms(f.call.low)}-{in_ms(f.call.high)}", f"{f.tokens_per_second:,.0f}", f"{f.step_bytes / 1e6:,.1f}",
        f"{f.of_bandwidth:.1%}", f"{f.cache_bytes / 2**20:,.1f}", largest,
    ]  # fmt: skip


def in_ms(seconds: float) -> str:
    """Three figures."""
    ms = 1e3 * seconds
    return f"{ms:,.{max(0, 2 - math.floor(math.log10(ms))) if ms < 100 else 0}f}" if ms >= 0.01 else f"{ms:.4f}"


def as_csv(figures: Sequence[Figure]) -> str:
    """One line a figure, unrounded, times in seconds."""
    text = io.StringIO()
    rows = [_flat(figure) for figure in figures]
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["row"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(figure: Figure) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in vars(figure).items():
        if name in ("first_token", "call"):
            spread: Spread | None = value
            flat |= {f"{name}_{part}": None if spread is None else getattr(spread, part)
                     for part in ("median", "low", "high", "n")}  # fmt: skip
        else:
            flat[name] = value
    return flat


# --- picture ---------------------------------------------------------------------------------------------------------


def save_picture(figures: Sequence[Figure], path: Path, *, title: str) -> None:
    """Time per token against context above, cache against context below, a column a batch size. Whole or not at all.

    A colour a variant; dashed is MLA's expanding path, dotted somebody else's generation. Ours end to end is left out: it
    is the step's line again.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    figures = [f for f in figures if f.queries == 1 and f.path != "generate"]
    batches = sorted({f.batch_size for f in figures})
    variants = list(dict.fromkeys(f.variant for f in figures))
    width, height = PANEL_INCHES
    picture = Picture(figsize=(width * len(batches), 2 * height + 0.8), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(picture)  # no pyplot: no window, no state shared with a notebook
    panels = picture.subplots(2, len(batches), squeeze=False, sharex=True)
    legend: dict[str, Any] = {}
    for (above, below), batch in zip(panels.T, batches, strict=True):
        lines: dict[str, list[Figure]] = {}
        for figure in sorted((f for f in figures if f.batch_size == batch), key=lambda f: f.context):
            lines.setdefault(figure.row, []).append(figure)
        for row in dict.fromkeys(f.row for f in figures if f.row in lines):
            legend.setdefault(row, _draw(above, lines[row], variants.index(lines[row][0].variant)))
        for variant, points in cache_lines([f for f in figures if f.batch_size == batch]).items():
            below.plot(*zip(*points, strict=True), **_style(variants.index(variant)))
        above.set_title(f"batch {batch:,}", loc="left", fontsize=9)
        _finish(above, "time per token, ms (quartiles)")
        _finish(below, "cache of the context, MiB")
        below.set_xlabel("context, tokens (log scales)", fontsize=9)
        contexts = sorted({f.context for f in figures})
        below.set_xticks(contexts, [f"{context:,}" for context in contexts])
        below.set_xticks([], minor=True)
    picture.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=min(4, len(legend)), fontsize=8, frameon=False
    )
    picture.suptitle(textwrap.fill(title, 95 * len(batches)), fontsize=8, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.stem}.unfinished.png")
    picture.savefig(aside)
    aside.replace(path)


def cache_lines(figures: Sequence[Figure]) -> dict[str, list[tuple[int, float]]]:
    """(context, MiB) along the context, by variant. Its paths and writers share it: what one was skipped at, another has."""
    found: dict[str, dict[int, float]] = {}
    for figure in figures:
        found.setdefault(figure.variant, {}).setdefault(figure.context, figure.cache_bytes / 2**20)
    return {variant: sorted(points.items()) for variant, points in found.items()}


def _style(number: int) -> dict[str, Any]:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.4}


def _draw(axes: Axes, points: Sequence[Figure], number: int) -> Any:
    """One row's line; returns what stands for it in the legend."""
    calls = [f.call for f in points]
    bars = [[1e3 * (c.median - c.low) for c in calls], [1e3 * (c.high - c.median) for c in calls]]
    return axes.errorbar(
        [f.context for f in points], [1e3 * c.median for c in calls], yerr=bars, elinewidth=1, capsize=2,
        linestyle={"auto": "-", "absorbed": "-", "expand": "--"}.get(points[0].path, ":"), **_style(number),
    )  # fmt: skip


def _finish(axes: Axes, label: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(label, fontsize=9)
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
