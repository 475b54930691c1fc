"""What the pictures of a study show: quality against costs, differences, curves, the staircase and the learning rates."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.evaluation.metric import BITS_PER_BYTE, Metric
from harness.files.text import counted
from harness.report.colours import BETTER, INK, QUIET, WORSE, Style, styles
from harness.report.document import capital, change, in_ms, mean_text
from harness.report.findings import Curves, Findings, Sweep, Verdict, over_seeds
from harness.report.pictures import ForestPlot, ForestRow, Mark, Picture, Plot, Series, short
from harness.study.results import LENGTH
from harness.study.statistics import Mean, Trend, pareto_front, with_error

SIDE_BY_SIDE = "Points that would cover one another stand side by side."
MOST_NAMES = 12  # that a reader tells apart in one panel
ASIDE = 1.02  # points of one size stand so far apart on a logarithmic scale
OCTAVES = [float(2**k) for k in range(0, 24, 2)]


def arm_styles(findings: Findings) -> dict[str, Style]:
    """The same in every picture."""
    return styles({arm.name: arm.info["family"] for arm in findings.arms})


@dataclass(frozen=True)
class PlacedArm:
    """What the picture of quality against cache shows of an arm."""

    name: str
    reference: bool
    mean: Mean
    seeds: int


def pareto(findings: Findings) -> Picture:
    """The metric against the cache's size."""
    usual = {arm.name: float(arm.summary("cache_bytes_per_token")) for arm in findings.done}
    return quality_by_cache(_placed(findings), arm_styles(findings), usual, findings.at_length, findings.metric)


def _placed(findings: Findings) -> list[PlacedArm]:
    return [
        PlacedArm(arm.name, arm.info["reference"], arm.mean, len(arm.runs)) for arm in findings.arms if arm.mean is not None
    ]


def quality_by_cache(
    arms: Sequence[PlacedArm],
    looks: Mapping[str, Style],
    usual: Mapping[str, float],
    at_length: Mapping[str, float],
    metric: Metric,
) -> Picture:
    """The metric against an arm's bytes per token, and in a further panel against those at LENGTH tokens where these differ.

    More arms than a panel has room to name have a row each, by their bytes at LENGTH tokens.
    """
    far = _far_out({arm.name: arm.mean.mean for arm in arms}, metric)
    shown = [arm for arm in arms if arm.name not in far]
    costs = {"": usual} if not at_length else {"at the model's context": usual, f"at {LENGTH:,} tokens": at_length}
    in_rows = len(shown) > MOST_NAMES
    drawn = _a_row_each if in_rows else _side_by_side
    seen = any(arm.mean.low is not None for arm in arms)
    bars = "Bars: the 95 % interval of each mean, from seeds." if seen else "No error bars: one seed."
    panels, how = drawn(shown, looks, costs, metric)
    side = (("Left of", "Right of") if in_rows else ("Below", "Above"))[not metric.higher_is_better]
    names = ", ".join(f"{name} ({metric.text(y)})" for name, y in far.items())
    beyond = f" {side} the picture: {names}." if far else ""
    return Picture("pareto", f"{capital(metric.label)} by cache bytes per token", f"{bars} {how}{beyond}", panels)


def _front(arms: Sequence[PlacedArm], sizes: Mapping[str, float], metric: Metric) -> list[str]:
    return pareto_front([(arm.name, sizes[arm.name], metric.cost(arm.mean.mean)) for arm in arms])


def _hover(arm: PlacedArm, sizes: Mapping[str, float]) -> str:
    return f"{sizes[arm.name]:,.0f} cache bytes per token, {counted(arm.seeds, 'seed')}"


def _side_by_side(
    arms: Sequence[PlacedArm], looks: Mapping[str, Style], costs: Mapping[str, Mapping[str, float]], metric: Metric
) -> tuple[list[tuple[str, Plot | ForestPlot]], str]:
    panels: list[tuple[str, Plot | ForestPlot]] = []
    fronts = []
    for heading, sizes in costs.items():
        best = _front(arms, sizes, metric)
        fronts.append(", ".join(best))
        series = [_point(arm, looks[arm.name], metric, sizes[arm.name], _hover(arm, sizes)) for arm in arms]
        front = [(s.marks[0].x, s.marks[0].y) for name in best for s in series if s.arm == name]
        ticks = [s.marks[0].x for s in series]
        plot = Plot("KV cache, bytes per token (log scale)", metric.axis, series, x_log=True, x_ticks=ticks, front=front)
        panels.append((heading, plot))
    hollow = " Hollow: references beside the comparison." if any(arm.reference for arm in arms) else ""
    names = "; ".join(dict.fromkeys(fronts))
    return panels, f"Grey: the best mean up to each cache size ({names}), without regard to the bars. {SIDE_BY_SIDE}{hollow}"


def _a_row_each(
    arms: Sequence[PlacedArm], looks: Mapping[str, Style], costs: Mapping[str, Mapping[str, float]], metric: Metric
) -> tuple[list[tuple[str, Plot | ForestPlot]], str]:
    *_, (heading, sizes) = costs.items()
    panel, how = _rows(arms, looks, {name: (size, f"{size:,.0f}") for name, size in sizes.items()}, "cache size", metric)
    return [(", ".join(filter(None, ("KV cache, bytes per token", heading))), panel)], how


def _rows(
    arms: Sequence[PlacedArm], looks: Mapping[str, Style], costs: Mapping[str, tuple[float, str]], cost: str, metric: Metric
) -> tuple[ForestPlot, str]:
    """(A row for each arm in the order of what it costs, a number and its words; what the rows are)."""
    figures = {name: figure for name, (figure, _) in costs.items()}
    best = _front(arms, figures, metric)
    rows = []
    for arm in sorted(arms, key=lambda arm: (figures[arm.name], metric.cost(arm.mean.mean))):
        figure, words = costs[arm.name]
        mark = _point(arm, looks[arm.name], metric, figure, f"{cost} {words}, {counted(arm.seeds, 'seed')}").marks[0]
        row = ForestRow(
            f"{arm.name} · {words}",
            (arm.name,),
            mark.hover,
            mean_text(arm.mean, metric),
            mark.y,
            mark.low,
            mark.high,
            filled=arm.name in best,
            colour=looks[arm.name].colour,
        )
        rows.append(row)
    references = [arm for arm in arms if arm.reference]
    line = ""
    if references:
        first, *others = (arm.name for arm in references)
        also = f"a reference like {', '.join(others)}" if others else "the reference"
        line = f" Line: {first}, {also}."
    panel = ForestPlot(metric.axis, rows, level=references[0].mean.mean if references else None)
    return panel, f"Filled: the best mean up to each {cost}, without regard to the bars.{line}"


def _point(arm: PlacedArm, look: Style, metric: Metric, cost: float, hover: str) -> Series:
    """An arm's mean at what it costs. hover: what follows the mean."""
    words = f"{arm.name}: {mean_text(arm.mean, metric)} {metric.unit}, {hover}"
    mark = Mark(cost, arm.mean.mean, arm.mean.low, arm.mean.high, words)
    return Series(arm.name, look, [mark], hollow=arm.reference)


def _far_out(means: Mapping[str, float], metric: Metric) -> dict[str, float]:
    """Arms so much worse than the others that a scale with them would press these together: Tukey's "far out", 3 quartile
    ranges."""
    if len(means) < 8:
        return {}
    lower, _, upper = statistics.quantiles(map(metric.cost, means.values()), n=4)
    return {name: y for name, y in means.items() if metric.cost(y) > upper + 3 * (upper - lower)}


def decode_picture(findings: Findings) -> Picture:
    """The metric against the time of a token at the longest context, a panel a batch size."""
    looks, metric = arm_styles(findings), findings.metric
    context, placed = max(row["context"] for row in findings.decode), {arm.name: arm for arm in _placed(findings)}
    panels: list[tuple[str, Plot | ForestPlot]] = []
    caption = "One step of decoding with a filled cache, at the longest context that was timed."
    how = SIDE_BY_SIDE
    for batch in sorted({row["batch"] for row in findings.decode if row["context"] == context}):
        place = f"batch {batch:,}, context {context:,}"
        timed = {row["arm"]: row for row in findings.decode if (row["context"], row["batch"]) == (context, batch)}
        arms = [arm for name, arm in placed.items() if name in timed]
        if len(arms) > MOST_NAMES:
            times = {name: (row["milliseconds"], in_ms(row["milliseconds"])) for name, row in timed.items()}
            panel, how = _rows(arms, looks, times, "time", metric)
            panels.append((f"ms a step, {place}", panel))
            continue
        series = []
        for arm in arms:
            row = timed[arm.name]
            hover = f"{in_ms(row['milliseconds'])} ms a step ({row['path']})"
            series.append(_point(arm, looks[arm.name], metric, row["milliseconds"], hover))
        panels.append((place, Plot("ms per step, a token in each row (log scale)", metric.axis, series, x_log=True)))
    return Picture("decode", f"{capital(metric.label)} by the time that a token takes to decode", f"{caption} {how}", panels)


def contrasts_picture(findings: Findings) -> Picture:
    """Every difference between two arms, with its interval."""
    verdicts, metric = findings.verdicts, findings.metric
    in_bits = metric is BITS_PER_BYTE  # as the bootstrap is
    first, second = ("second", "first") if metric.higher_is_better else ("first", "second")
    sides = (f"← {first} arm better", f"{second} arm better →")
    rows = [_contrast_row(verdict, metric, with_noise=in_bits) for verdict in verdicts]
    caption = "Squares: the difference, filled where it is resolved."
    if findings.sigma:
        caption = "Squares: the difference with its 95 % interval from seeds, filled where it is resolved."
    if findings.looked_at:
        caption += " Grey ink and *: not declared beforehand, not corrected."
    if in_bits and any(verdict.noise for verdict in verdicts):
        caption += " Grey bars: noise of the evaluation given these weights (see the table), which is no verdict."
    panel = ForestPlot(f"difference in {metric.label}", rows, level=0.0, sides=sides)
    return Picture("contrasts", "Differences between arms", caption, [("", panel)])


def trends_picture(trends: Sequence[Trend], sizes: Mapping[str, str], metric: Metric) -> Picture:
    """How the differences of the trends change with the size that they are over: a panel for each such size.

    sizes: the name of each trend's size.
    """
    looks = styles({trend.name: trend.name for trend in trends})
    side = "above" if metric.higher_is_better else "below"
    panels = []
    for over in dict.fromkeys(sizes.values()):
        of_size = [trend for trend in trends if sizes[trend.name] == over]
        series = []
        for place, trend in enumerate(of_size):
            marks = []
            for (a, b), size, (y, half) in zip(trend.pairs, trend.at, trend.differences, strict=True):
                low, high = (None, None) if half is None else (y - half, y + half)
                hover = f"{a} − {b}: {with_error(y, low, high, metric.digits, sign='+')} {metric.unit}"
                marks.append(Mark(size * ASIDE ** (place - (len(of_size) - 1) / 2), y, low, high, hover))
            series.append(Series(trend.name, looks[trend.name], marks, joined=True, banded=False))
        ticks = sorted({size for trend in of_size for size in trend.at})
        labels = f"{over} (log scale)", f"difference in {metric.label}; {side} 0 the first is better"
        panels.append(("", Plot(*labels, series, x_log=True, x_ticks=ticks, level=(0.0, "no difference"), lines=True)))
    caption = "Points: the difference at each size with its 95 % interval from seeds."
    return Picture("trends", "How differences change with size", caption, panels)


def _contrast_row(verdict: Verdict, metric: Metric, *, with_noise: bool) -> ForestRow:
    contrast, noise = verdict.contrast, verdict.noise
    return ForestRow(
        f"{contrast.a} − {contrast.b}" + ("" if contrast.primary else " *"),
        (contrast.a, contrast.b),
        f"{verdict.sentence}.",
        change(contrast, metric),
        contrast.difference,
        contrast.low,
        contrast.high,
        noise=(noise.low, noise.high) if noise is not None and with_noise else None,
        filled=bool(contrast.resolved),
        colour=INK if contrast.primary else QUIET,
    )


def staircase(findings: Findings) -> Picture:
    """What each change does, on top of those before it."""
    rows: list[ForestRow] = []
    metric = findings.metric
    for arm, verdict in findings.staircase:
        mean = findings.arm(arm).mean
        assert mean is not None
        hover = f"{arm}: {mean_text(mean, metric)} {metric.unit}"
        row = ForestRow(arm, (arm,), hover, metric.text(mean.mean), mean.mean)
        if verdict is not None and rows:
            contrast = verdict.contrast
            if contrast.low is not None and contrast.high is not None:
                half = (contrast.high - contrast.low) / 2
                row = replace(row, low=mean.mean - half, high=mean.mean + half)
            colour = BETTER if metric.better(contrast.difference) else WORSE
            words = change(contrast, metric)
            row = replace(row, hover=f"{verdict.sentence}.", words=words, begin=rows[-1].value, colour=colour)
        rows.append(row)
    caption = (
        "Every bar leads from the arm above to this one; orange is worse, blue is better. Whiskers: the 95 % interval of "
        "the step."
    )
    title = "What each change does, on top of those before it"
    return Picture("staircase", title, caption, [("", ForestPlot(metric.axis, rows))])


def _lines(findings: Findings, curves: Curves, unit: str, place: str, *, dotted: bool) -> list[Series]:
    looks = arm_styles(findings)
    series = []
    for arm, points in curves.items():
        marks = []
        for point in points:
            low, high = (point.low, point.high) if point.n > 1 else (None, None)
            hover = f"{arm}: {point.mean:.4f} {unit} at {short(round(point.x))} {place}"
            marks.append(Mark(point.x, point.mean, low, high, hover))
        if len(marks) > 1:  # of what was converted, not trained, there is one
            series.append(Series(arm, looks[arm], marks, joined=True, dotted=dotted))
    return series


def _minus_baseline(findings: Findings, plot: Plot, gaps: list[Series], unit: str) -> list[tuple[str, Plot]]:
    """A panel like that plot, of differences from the baseline."""
    if not gaps or findings.baseline is None:
        return []
    label, level = f"difference from {findings.baseline}, {unit}", (0.0, findings.baseline)
    panel = replace(plot, y_label=label, series=gaps, level=level, above=None)
    return [(f"minus {findings.baseline} of the same seed", panel)]


def curves(findings: Findings) -> Picture | None:
    """Validation loss along the training, and its difference from the baseline's."""
    unit = findings.curve_unit
    drawn = over_seeds(findings.curves)
    series = _lines(findings, drawn, unit, "tokens", dotted=False)
    if not series:
        return None
    last = max(mark.x for s in series for mark in s.marks)
    # The fall of the first tenth would press everything after it together.
    late = [mark.y for s in series for mark in s.marks if mark.x >= 0.1 * last and len(s.marks) > 4]
    above = max(late, default=None)
    plot = Plot("training tokens", f"validation loss, {unit}", series, lines=True, above=above)
    panels = [("validation loss", plot)]
    gaps = _lines(findings, findings.gaps(findings.curves), unit, "tokens", dotted=False)
    panels += _minus_baseline(findings, plot, gaps, unit)
    cut = " What lies above the losses of the last nine tenths is cut off." if above is not None else ""
    several = any(point.n > 1 for points in drawn.values() for point in points)
    bands = "Lines: means over seeds; bands: from the lowest seed to the highest." if several else "One seed each."
    return Picture("curves", "Loss while training", f"{bands}{cut}", panels)


def positions(findings: Findings) -> Picture | None:
    """Test loss by the tokens before it, within the training length and beyond it."""
    unit, place = "nats per token", "tokens of context (middle of a bin)"
    within, gaps, beyond = (
        _lines(findings, found, unit, place, dotted=True)
        for found in (over_seeds(findings.positions), findings.gaps(findings.positions), over_seeds(findings.beyond))
    )
    base = Plot("context, tokens (log scale)", f"test loss, {unit}", within, x_log=True, x_ticks=OCTAVES, lines=True)
    panels = [("within the training length", base)] if within else []
    panels += _minus_baseline(findings, base, gaps, unit)
    if beyond:
        length = findings.training_length
        rules = [(float(length), "training length")] if length else []
        label = f"test loss of the same tokens, {unit}"
        panels.append(("beyond the training length", replace(base, y_label=label, series=beyond, rules=rules)))
    caption = "Loss of a token by how many tokens stood before it; a point is a bin of contexts, bands run over seeds."
    if beyond:
        caption += (
            " Beyond the training length every point is of the same tokens, fewer than the whole split, so its level is "
            "not that of the other panel."
        )
    return Picture("positions", "Loss by context", caption, panels) if panels else None


def copying(findings: Findings) -> Picture | None:
    """Every run's figure of the metric by what repetition saves it, which shows what it has learned to copy."""
    family = {arm.name: arm.info["family"] for arm in findings.arms}
    looks, metric = styles({name: name for name in family.values()}), findings.metric
    marks: dict[str, list[Mark]] = {}
    for arm, points in findings.copying.items():
        for seed, (gain, figure) in points.items():
            hover = f"{arm}, seed {seed}: {metric.text(figure)} {metric.unit}, repetition saves {gain:.2f} nats"
            marks.setdefault(family[arm], []).append(Mark(gain, figure, hover=hover))
    if not marks:
        return None
    series = [Series(name, looks[name], of_family) for name, of_family in marks.items()]
    plot = Plot("nats saved where an n-gram repeats", metric.axis, series)
    caption = "A point is a run. Runs that have learned to copy from their context stand at the right (docs/STUDIES.md)."
    return Picture("copying", f"{capital(metric.label)} by what repetition saves", caption, [("", plot)])


def sweeps(findings: Findings) -> Picture:
    """Loss by learning rate, a panel a budget."""
    looks = arm_styles(findings)
    panels = []
    for tokens in sorted({sweep.tokens for sweep in findings.sweeps}):
        of_budget = [sweep for sweep in findings.sweeps if sweep.tokens == tokens]
        series = [series for sweep in of_budget for series in _sweep_series(sweep, looks[sweep.arm])]
        ticks = sorted({lr for sweep in of_budget for lr in sweep.losses})
        labels = "learning rate (log scale)", "validation loss, nats per token"
        panels.append((f"{short(tokens)} tokens a run", Plot(*labels, series, x_log=True, lines=True, x_ticks=ticks)))
    caption = "Hollow: runs of the sweep. Line: the parabola through the lowest and its neighbours. Star: the chosen rate."
    return Picture("sweep", "Validation loss by learning rate", caption, panels)


def _sweep_series(sweep: Sweep, look: Style) -> list[Series]:
    series = []
    parabola = [Mark(x, y) for x, y in sweep.parabola()]
    if parabola:
        series.append(Series(sweep.arm, look, parabola, joined=True, dotted=False))
    marks = [Mark(lr, loss, hover=f"{sweep.arm}: {loss:.4f} at rate {lr:g}") for lr, loss in sorted(sweep.losses.items())]
    series.append(Series(sweep.arm, look, marks, hollow=True))
    if sweep.best is not None and sweep.chosen is not None and sweep.decides:
        hover = f"{sweep.arm}: chosen rate {sweep.chosen:g}, {sweep.best.loss:.4f}"
        star = Style(look.colour, "*")
        series.append(Series(sweep.arm, star, [Mark(sweep.chosen, sweep.best.loss, hover=hover)]))
    return series
