"""What the figures of harness/decode/speed.py say: where MLA's paths change places, a table, a CSV and a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.decode.speed import DecodeTime, Results
from harness.files.text import aligned, csv_text, table_of, visible
from harness.report.colours import Style, styles
from harness.report.document import in_ms
from harness.report.pictures import Mark, Picture, Plot, Series


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
        for (x, y), (next_x, next_y) in itertools.pairwise(logs)
        if (y < 0) != (next_y < 0)
    ]


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


def crossovers(figures: Sequence[DecodeTime], absorbs_up_to: Mapping[str, int]) -> list[Crossover]:
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
            variant,
            B,
            axis,
            context,
            tuple(x for x, _ in points),
            tuple(crossings(points)),
            compared(points, "cached tokens" if axis == "context" else "new tokens a call"),
            absorbs_up_to[variant],
        )
        for (variant, B, axis, context), points in lines.items()
        if axis == "context" or len(points) > 1
    ]


def crossover_sentence(crossover: Crossover) -> str:
    """For a person."""
    where = f"{crossover.variant}, batch {crossover.batch_size:,}"
    if crossover.axis == "context":
        return f"{where}, one new token: {crossover.words}"
    limit = f"attention.decode=auto absorbs up to {crossover.absorbs_up_to:,}"
    return f"{where}, context {crossover.context:,}: {crossover.words} ({limit})"


COLUMNS: dict[str, Callable[[DecodeTime], str]] = {
    "batch": lambda f: f"{f.batch_size:,}",
    "context": lambda f: f"{f.context:,}",
    "new": lambda f: f"{f.queries:,}",
    "variant": lambda f: f.row,
    "first token ms": lambda f: "-" if f.first_token is None else in_ms(1e3 * f.first_token.median),
    "ms a step": lambda f: in_ms(1e3 * f.call.median),
    "quartiles": lambda f: f"{in_ms(1e3 * f.call.low)}-{in_ms(1e3 * f.call.high)}",
    "tokens/s": lambda f: f"{f.tokens_per_second:,.0f}",
    "MB a step": lambda f: f"{f.step_bytes / 1e6:,.1f}",
    "of bandwidth": lambda f: f"{f.of_bandwidth:.1%}",
    "cache MiB": lambda f: f"{f.cache_bytes / 2**20:,.1f}",
    "largest batch": lambda f: "-" if f.largest_batch is None or f.queries > 1 else f"{f.largest_batch:,}",
}
_LEFT = list(COLUMNS).index("variant")


def speed_table(results: Results) -> list[str]:
    """Aligned columns, a batch size, context and number of new tokens together; what was skipped has its line there."""
    rows = [((0, 0, 0), list(COLUMNS), "")]
    rows += [((f.batch_size, f.context, f.queries), [of(f) for of in COLUMNS.values()], "") for f in results.figures]
    rows += [
        (
            (s.batch_size, s.context, s.queries),
            [f"{s.batch_size:,}", f"{s.context:,}", f"{s.queries:,}", s.row],
            f"  skipped: {visible(s.reason)}",
        )
        for s in results.skipped
    ]
    rows.sort(key=lambda row: row[0])  # stable: variants stay in order
    lines = aligned([cells for _, cells, _ in rows], left=(_LEFT,))
    return [line + remark for line, (_, _, remark) in zip(lines, rows, strict=True)]


def speed_csv(figures: Sequence[DecodeTime]) -> str:
    """One line a figure, unrounded, times in seconds."""
    return csv_text(table_of([_flat(figure) for figure in figures]) if figures else [["row"]])


def _flat(figure: DecodeTime) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in vars(figure).items():
        if name in ("first_token", "call"):
            parts = dict.fromkeys(("median", "low", "high", "n")) | (vars(value) if value else {})
            flat |= {f"{name}_{part}": seconds for part, seconds in parts.items()}
        else:
            flat[name] = value
    return flat


_SOLID, _EXPAND, _OTHERS = (), (6.0, 3.0), (2.0, 2.5)  # dashes: the step itself, MLA's expanding path, another library


def picture(figures: Sequence[DecodeTime], *, title: str) -> Picture:
    """Time per token against context above, cache against context below, a column a batch size.

    A colour a variant; dashed is MLA's expanding path, dotted somebody else's generation. Ours end to end is left out: it
    is the step's line again.
    """
    figures = [f for f in figures if f.queries == 1 and f.path != "generate"]
    batches = sorted({f.batch_size for f in figures})
    looks = styles({f.variant: "" for f in figures})
    contexts = sorted({float(f.context) for f in figures})

    def panel(y_label: str, series: list[Series]) -> Plot:
        x_label = "context, tokens (log scales)"
        return Plot(x_label, y_label, series, x_log=True, y_log=True, x_ticks=contexts, lines=True)

    above, below = [], []
    for batch in batches:
        of_batch = sorted((f for f in figures if f.batch_size == batch), key=lambda f: f.context)
        rows = [row for row in dict.fromkeys(f.row for f in figures) if any(f.row == row for f in of_batch)]
        times = [_times(row, [f for f in of_batch if f.row == row], looks) for row in rows]
        caches = [
            Series(variant, looks[variant], [Mark(context, mib) for context, mib in points], joined=True)
            for variant, points in cache_lines(of_batch).items()
        ]
        above.append((f"batch {batch:,}", panel("time per token, ms (bars: quartiles)", times)))
        below.append((f"batch {batch:,}", panel("cache of the context, MiB", caches)))
    return Picture("decode", title, "", [*above, *below])


def _times(row: str, points: Sequence[DecodeTime], looks: Mapping[str, Style]) -> Series:
    look, path = looks[points[0].variant], points[0].path
    dash = {"auto": _SOLID, "absorbed": _SOLID, "expand": _EXPAND}.get(path, _OTHERS)
    marks = [Mark(f.context, 1e3 * f.call.median, 1e3 * f.call.low, 1e3 * f.call.high) for f in points]
    return Series(row, Style(look.colour, look.marker, dash), marks, joined=True, banded=False)


def cache_lines(figures: Sequence[DecodeTime]) -> dict[str, list[tuple[int, float]]]:
    """(context, MiB) along the context, by variant. Its paths and writers share it: what one was skipped at, another has."""
    found: dict[str, dict[int, float]] = {}
    for figure in figures:
        found.setdefault(figure.variant, {}).setdefault(figure.context, figure.cache_bytes / 2**20)
    return {variant: sorted(points.items()) for variant, points in found.items()}
