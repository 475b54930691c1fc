"""The picture of a comparison: bits per byte against cache bytes per token, one marker a row, names beside them.

Below it the cache against the context, one line a row: straight but for rows with windows.

Rows of one configuration on several caches share colour and shape: thin lines lead from the plain one, which has the
configuration's name, to the others, which have their cache's.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.config.schema import CACHE_CONTEXTS
from harness.files.text import span
from harness.report.colours import Style, styles
from harness.report.comparison import Comparison, ComparisonTable, Setup
from harness.report.pictures import Mark, Picture, Plot, Series
from harness.study.statistics import pareto_front


def scatter(comparison: Comparison) -> Picture:
    """One panel a table; error bars are sample standard deviations over seeds."""
    names = sorted({setup.configuration for table in comparison.tables for setup in table.setups})
    looks = styles(dict.fromkeys(names, ""))
    panels = []
    for table in comparison.tables:
        models = sorted({setup.model for setup in table.setups})
        panels.append((f"model {', '.join(models)}, {table.heading}", _panel(table, looks)))
    curves = [curve for table in comparison.tables if (curve := _curve(table, looks)) is not None]
    panels += [("cache of one sequence by its length", curve) for curve in curves]
    return Picture("comparison", "Bits per byte by cache bytes per token", "", panels)


def _panel(table: ComparisonTable, looks: Mapping[str, Style]) -> Plot:
    places = [(table.cache_size(setup), setup.bits_per_byte) for setup in table.setups]
    origins = _origins(table)
    series, joins = [], []
    for setup, (x, y) in zip(table.setups, places, strict=True):
        look, origin = looks[setup.configuration], origins[setup.setup_hash]
        bar = setup.deviations["bits_per_byte"]
        mark = Mark(x, y) if bar is None else Mark(x, y, y - bar, y + bar)
        hollow = table.has_caches_as_rows and setup.through_cache
        label = None if origin is setup else setup.cache
        series.append(Series(setup.variant, look, [mark], hollow=hollow, label=label))
        if origin is not setup:
            joins.append(((table.cache_size(origin), origin.bits_per_byte), (x, y), look.colour))
    front = pareto_front([(str(i), x, y) for i, (x, y) in enumerate(places)])
    seeds = [setup.n for setup in table.setups]
    bars = f"mean ± standard deviation of {span(seeds)} seeds"
    hollows = "; hollow: scored through the cache" if table.has_caches_as_rows else ""
    of = "of context" if table.has_caches_as_rows else f"in {table.conditions['cache_dtype']}"
    return Plot(
        f"KV cache, bytes per token {of}{table.at_tokens} (log scale)",
        f"{table.conditions['split']} bits per byte; {bars if max(seeds) > 1 else 'one seed each'}; "
        f"grey: the best up to each cache size{hollows}",
        series,
        x_log=True,
        x_ticks=sorted({x for x, _ in places}),
        front=[places[int(i)] for i in front],
        joins=joins,
    )


def _curve(table: ComparisonTable, looks: Mapping[str, Style]) -> Plot | None:
    """The cache's size at each of CACHE_CONTEXTS; None where no record says it. Rows whose records are older are left out."""
    series = []
    for setup in table.setups:
        sizes = setup.cache_bytes_by_context or {}
        marks = [Mark(context, sizes[str(context)] / 2**20) for context in CACHE_CONTEXTS if sizes.get(str(context))]
        if marks:
            series.append(Series(setup.variant, looks[setup.configuration], marks, joined=True))
    if not series:
        return None
    x_label, y_label = "context, tokens (log scales)", "MiB, measured"
    return Plot(x_label, y_label, series, x_log=True, y_log=True, x_ticks=[float(c) for c in CACHE_CONTEXTS], lines=True)


def _origins(table: ComparisonTable) -> dict[str, Setup]:
    """By setup_hash the row that a configuration's other caches are seen from: the plain one, else the largest."""
    ordered = sorted(table.setups, key=lambda setup: (setup.through_cache, -table.cache_size(setup)))
    return {setup.setup_hash: setup for setup in reversed(ordered)}
