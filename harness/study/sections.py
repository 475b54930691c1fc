"""The report in its order: words, tables and figures, the same for the page and for Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.study.drawing import INK, QUIET, Figure, Mark, Plot, Row, Rows, Series, Style, short, styles
from harness.study.findings import Curves, Fact, Findings, Verdict
from harness.study.statistics import Contrast, Mean

ABSENT = "–"
SIDE_BY_SIDE = "Points that would cover one another stand side by side."
WORSE, BETTER = "#D55E00", "#0072B2"  # bars of the staircase

# What a figure of an extra is called in a table.
FIGURE_NAMES = {
    "n": "tokens in an n-gram", "count": "repeats", "share": "share of tokens that repeat", "first_loss": "nats, first time",
    "repeat_loss": "nats, repeated", "gain": "gain, nats", "distance": "tokens between", "scored_tokens": "tokens scored",
    "training_length": "training length", "longest_context": "longest context", "targets": "tokens predicted",
    "in_length_loss": "nats at the training length", "ratio_2x": "of that, up to twice the length",
    "ratio_4x": "of that, up to four times", "sampled_tokens": "tokens sampled", "width": "latent width",
    "effective_rank": "effective rank of latents", "key_effective_rank": "of key weights",
    "value_effective_rank": "of value weights", "rotated_share": "score variance of the rotated part",
}  # fmt: skip
EXTRA_TITLES = {
    "beyond": "Beyond the training length: the same tokens with more and more context",
    "repeats": "Repeated n-grams: what the context saves the second time",
    "recall": "Recall from the context",
    "latents": "Latents: how much of them is used",
}


@dataclass(frozen=True)
class Line:
    """A row of a table; what belongs to an arm lights up with it."""

    cells: list[str]
    arm: str | None = None
    marked: bool = False  # to be seen at once: not equal, not within tolerance


@dataclass(frozen=True)
class Table:
    """Text cells; the first column names the row."""

    title: str
    columns: list[str]
    lines: list[Line]
    note: str = ""
    words: frozenset[int] = frozenset({0})  # columns of words rather than numbers


@dataclass(frozen=True)
class Section:
    """One heading of the report and what stands below it."""

    key: str
    title: str
    words: list[str] = field(default_factory=list)
    points: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: str = ""
    after: list[str] = field(default_factory=list)
    more: list[str] = field(default_factory=list)


def sections(findings: Findings) -> list[Section]:
    """Everything below the question, in order. A section without data is left out, with a word where it matters."""
    found = [
        _verdict(findings), _main(findings), _pareto(findings), _contrasts(findings), _decode(findings), _curves(findings),
        _positions(findings), _staircase(findings), _rates(findings), _extras(findings), _confounds(findings),
        _provenance(findings),
    ]  # fmt: skip
    return [section for section in found if section is not None]


def arm_styles(findings: Findings) -> dict[str, Style]:
    """The same in every figure."""
    return styles({arm.name: arm.info.family for arm in findings.arms})


def with_error(mean: float, low: float | None, high: float | None, *, digits: int = 4) -> str:
    """mean ± half of the interval, with two significant digits of the error; `digits` decimals without one."""
    if low is None or high is None:
        return f"{mean:.{digits}f}"
    half = (high - low) / 2
    decimals = max(0, 1 - math.floor(math.log10(half))) if half > 0 else digits
    return f"{mean:.{decimals}f} ± {half:.{decimals}f}"


def change(contrast: Contrast) -> str:
    """A difference with its sign."""
    text = with_error(contrast.difference, contrast.low, contrast.high)
    return f"+{text}" if contrast.difference > 0 else text.replace("-", "−", 1)


def _mean(mean: Mean | None, *, digits: int = 4) -> str:
    return ABSENT if mean is None else with_error(mean.mean, mean.low, mean.high, digits=digits)


def _count(number: int | float | None) -> str:
    return ABSENT if number is None else f"{number:,.0f}"


# --- question and verdict --------------------------------------------------------------------------------------------


def _verdict(findings: Findings) -> Section:
    declared = findings.declared
    words = []
    if declared:
        resolved = sum(bool(verdict.contrast.resolved) for verdict in declared)
        if findings.sigma:
            words.append(
                f"{resolved} of {len(declared)} declared {_plural(len(declared), 'comparison')} "
                f"{'is' if resolved == 1 else 'are'} resolved at the 5 % level, corrected for their number (Holm)."
            )
        else:
            words.append("No arm has seeds that disagree, so there are no error bars, and nothing below is a verdict.")
    else:
        words.append("No declared comparison can be made, so there is no verdict.")
    points = [f"{verdict.sentence}." for verdict in declared]
    after = ["Looked at besides, neither declared beforehand nor corrected:"] if findings.looked_at else []
    more = [f"{verdict.sentence}." for verdict in findings.looked_at]
    return Section("verdict", "Verdict", words=words, points=points, after=after, more=more)


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


# --- main table ------------------------------------------------------------------------------------------------------


def _main(findings: Findings) -> Section:
    levels = any(arm.info.level for arm in findings.arms)
    decode = _decode_cells(findings)
    metric = findings.results.metric
    columns = ["arm", *(["level"] if levels else []), "parameters", "cache bytes per token", "of MHA's",
               f"test {findings.unit}", "seeds", "learning rate",
               *(["perplexity"] if metric != "perplexity" else []), *(["decode, ms a token"] if decode else [])]  # fmt: skip
    lines = []
    for arm in findings.arms:
        ratio, perplexity = arm.summary("cache_ratio_to_mha"), arm.test("perplexity")
        rates = " / ".join(dict.fromkeys(f"{run.lr:g}" for run in arm.runs))
        lines.append(
            Line(
                [
                    arm.name + (" (reference)" if arm.info.reference else ""),
                    *([arm.info.level or ABSENT] if levels else []),
                    _count(arm.summary("parameters")), _count(arm.summary("cache_bytes_per_token")),
                    ABSENT if ratio is None else f"{ratio:.3f}", _mean(arm.mean), str(len(arm.runs)), rates or ABSENT,
                    *([ABSENT if perplexity is None else f"{perplexity:.2f}"] if metric != "perplexity" else []),
                    *([decode[1].get(arm.name, ABSENT)] if decode else []),
                ],
                arm.name,
            )
        )  # fmt: skip
    note = "Cache: all layers, measured on allocated buffers; MHA's: of an MHA with the model's heads."
    if findings.sigma:
        note = (
            f"± is half of the 95 % interval for comparing arms, from a standard deviation pooled over all "
            f"{'that were trained' if _converted(findings) else 'of them'} "
            f"({findings.sigma:.2g} {findings.unit}, {findings.dof} degrees of freedom); what a seed does to all arms alike "
            f"is not in it.{_apart(findings)} {note}"
        )
    else:
        note = f"No error bars: no arm has seeds that disagree. {note}"
    if decode:
        note += f" Decode: {decode[0]}."
    table = Table("", columns, lines, note, frozenset({0, 1} if levels else {0}))
    return Section("arms", "Arms", tables=[table, *_every_run(findings)])


def _every_run(findings: Findings) -> list[Table]:
    """The metric of each run, where there are several seeds: what the means are made of."""
    values = findings.results.values()
    seeds = sorted({seed for of_arm in values.values() for seed in of_arm})
    if len(seeds) < 2:
        return []
    lines = [
        Line([arm.name, *(f"{values[arm.name][seed]:.4f}" if seed in values[arm.name] else ABSENT for seed in seeds)], arm.name)
        for arm in findings.arms if arm.name in values
    ]  # fmt: skip
    return [Table(f"Test {findings.unit} of every run", ["arm", *(f"seed {seed}" for seed in seeds)], lines)]


def _decode_cells(findings: Findings) -> tuple[str, dict[str, str]] | None:
    """Where and how long: the longest context at the smallest batch."""
    if not findings.decode:
        return None
    context = max(row["context"] for row in findings.decode)
    batch = min(row["batch"] for row in findings.decode if row["context"] == context)
    rows = [row for row in findings.decode if (row["context"], row["batch"]) == (context, batch)]
    cells = {row["arm"]: _ms(row["milliseconds"]) for row in rows}
    return f"one step at context {context:,}, batch {batch:,}", cells


def _ms(milliseconds: float) -> str:
    """Three significant digits."""
    decimals = 2 - math.floor(math.log10(milliseconds)) if 0 < milliseconds < 100 else 0
    return f"{milliseconds:,.{max(0, decimals)}f}"


# --- quality against costs -------------------------------------------------------------------------------------------


def _converted(findings: Findings) -> list[str]:
    return [arm.name for arm in findings.arms if arm.info.converted]


def _apart(findings: Findings) -> str:
    """What is to be known of arms that were converted, not trained."""
    names = _converted(findings)
    if not names:
        return ""
    return (
        f" Not pooled, for what is converted without training scatters on its own: {', '.join(names)}; comparisons with them "
        f"have the variance of their two arms alone."
    )


def _pareto(findings: Findings) -> Section:
    found = arm_styles(findings)
    done = [arm for arm in findings.arms if arm.mean is not None]
    series = []
    for arm in done:
        assert arm.mean is not None
        size = float(arm.summary("cache_bytes_per_token"))
        hover = (
            f"{arm.name}: {_mean(arm.mean)} {findings.unit}, {size:,.0f} cache bytes per token, {_seeds(len(arm.runs))}"
        )
        mark = Mark(size, arm.mean.mean, arm.mean.low, arm.mean.high, hover)
        series.append(Series(arm.name, found[arm.name], [mark], hollow=arm.info.reference))
    far = _far_out({s.arm: s.marks[0].y for s in series})
    series = [s for s in series if s.arm not in far]
    front = [(mark.x, mark.y) for name in findings.front for s in series if s.arm == name for mark in s.marks]
    plot = Plot(
        "KV cache, bytes per token (log scale)", f"test {findings.unit}, lower is better", series, x_log=True,
        x_ticks=[s.marks[0].x for s in series], front=front,
    )  # fmt: skip
    bars = "Bars: 95 % intervals for comparing arms." if findings.sigma else "No error bars: one seed."
    hollow = " Hollow: references beside the comparison." if any(arm.info.reference for arm in done) else ""
    beyond = f" Above the picture: {', '.join(f'{name} ({y:.4f})' for name, y in far.items())}." if far else ""
    figure = Figure(
        "pareto", f"Test {findings.unit} by cache bytes per token",
        f"{bars} Grey: the best mean up to each cache size ({', '.join(findings.front)}), without regard to the bars. "
        f"{SIDE_BY_SIDE}{hollow}{beyond}", [("", plot)],
    )  # fmt: skip
    return Section("pareto", "Quality against cache", figures=[figure])


def _far_out(means: Mapping[str, float]) -> dict[str, float]:
    """Arms so far above the others that a scale with them would press these together: Tukey's "far out", 3 quartile ranges."""
    if len(means) < 8:
        return {}
    lower, _, upper = statistics.quantiles(means.values(), n=4)
    return {name: y for name, y in means.items() if y > upper + 3 * (upper - lower)}


def _seeds(count: int) -> str:
    return f"{count} {_plural(count, 'seed')}"


def _decode(findings: Findings) -> Section | None:
    if not findings.decode:
        return Section("decode", "Quality against decode time", words=["Decode times were not measured in this study."])
    found = arm_styles(findings)
    context = max(row["context"] for row in findings.decode)
    panels = []
    for batch in sorted({row["batch"] for row in findings.decode if row["context"] == context}):
        series = []
        for row in findings.decode:
            arm = findings.arm(row["arm"])
            if (row["context"], row["batch"]) == (context, batch) and arm.mean is not None:
                hover = f"{arm.name}: {_ms(row['milliseconds'])} ms a step ({row['path']}), {_mean(arm.mean)} {findings.unit}"
                mark = Mark(row["milliseconds"], arm.mean.mean, arm.mean.low, arm.mean.high, hover)
                series.append(Series(arm.name, found[arm.name], [mark], hollow=arm.info.reference))
        plot = Plot(
            "ms per step, a token in each row (log scale)", f"test {findings.unit}, lower is better", series, x_log=True
        )
        panels.append((f"batch {batch:,}, context {context:,}", plot))
    places = sorted({(row["context"], row["batch"]) for row in findings.decode}, key=lambda place: place[::-1])
    columns = ["arm", *(f"context {context:,}, batch {batch:,}" for context, batch in places), "path", "device"]
    lines = []
    for arm in findings.arms:
        rows = {(row["context"], row["batch"]): row for row in findings.decode if row["arm"] == arm.name}
        if rows:
            cells = [_ms_with_quartiles(rows.get(place)) for place in places]
            used = [", ".join(dict.fromkeys(str(row[key]) for row in rows.values())) for key in ("path", "device")]
            lines.append(Line([arm.name, *cells, *used], arm.name))
    figure = Figure(
        "decode", f"Test {findings.unit} by the time that a token takes to decode",
        f"One step of decoding with a filled cache, at the longest context that was timed. {SIDE_BY_SIDE}", panels,
    )  # fmt: skip
    note = (
        "Milliseconds a step, which is a token in each row of the batch, with quartiles. They hold for this machine and this "
        "implementation; of several paths of one arm "
        "the fastest is shown."
    )
    table = Table("Decode times", columns, lines, note, frozenset({0, len(columns) - 2, len(columns) - 1}))
    return Section("decode", "Quality against decode time", figures=[figure], tables=[table])


def _ms_with_quartiles(row: dict[str, Any] | None) -> str:
    return ABSENT if row is None else f"{_ms(row['milliseconds'])} ({_ms(row['low'])} to {_ms(row['high'])})"


# --- contrasts -------------------------------------------------------------------------------------------------------


def _contrasts(findings: Findings) -> Section | None:
    verdicts = [*findings.declared, *findings.looked_at]
    if not verdicts:
        return None
    rows, lines = [], []
    in_bits = findings.results.metric == "bits_per_byte"
    for verdict in verdicts:
        contrast, noise = verdict.contrast, verdict.noise
        label = f"{contrast.a} − {contrast.b}" + ("" if contrast.primary else " *")
        shown = (noise.low, noise.high) if noise is not None and in_bits else None
        rows.append(
            Row(label, (contrast.a, contrast.b), f"{verdict.sentence}.", change(contrast), contrast.difference, contrast.low,
                contrast.high, noise=shown, filled=bool(contrast.resolved), colour=INK if contrast.primary else QUIET)
        )  # fmt: skip
        lines.append(
            Line([
                f"{contrast.a} − {contrast.b}", "yes" if contrast.primary else "no", change(contrast), str(contrast.n),
                ABSENT if contrast.p is None else _p(contrast.p), ABSENT if contrast.p_holm is None else _p(contrast.p_holm),
                {True: "yes", False: "no", None: ABSENT}[contrast.resolved], _noise_cell(verdict),
            ])
        )  # fmt: skip
    panel = Rows(
        f"difference in test {findings.unit}", rows, level=0.0, sides=("← first arm better", "second arm better →")
    )
    noises = [verdict for verdict in verdicts if verdict.noise is not None]
    caption = "Black: the difference, filled where it is resolved."
    if findings.sigma:
        caption = "Black: the difference with its 95 % interval from seeds, filled where it is resolved."
    if findings.looked_at:
        caption += " Grey ink and *: not declared beforehand, not corrected."
    if noises and in_bits:
        caption += " Grey bars: noise of the evaluation given these weights (see the table), which is no verdict."
    figure = Figure("contrasts", "Differences between arms", caption, [("", panel)])
    seeds = sorted({seed for verdict in noises for seed in verdict.noise_seeds})
    note = "± is half of the 95 % interval over seeds, of each difference alone; p after Holm is over the declared comparisons."
    if noises:
        note += (
            f" Evaluation noise: the 95 % bootstrap interval of the difference in bits per byte over "
            f"segments of the test text, of losses averaged over the {_plural(len(seeds), 'seed')} that both arms have "
            f"({', '.join(map(str, seeds))}). It says what other test text would have changed for these very "
            f"weights, nothing about other seeds, so it decides nothing."
        )
    if reasons := list(dict.fromkeys(verdict.no_noise for verdict in verdicts if verdict.no_noise)):
        note += f" No evaluation noise where {'; '.join(reasons)}."
    columns = ["a − b", "declared", f"difference, {findings.unit}", "common seeds", "p", "p after Holm", "resolved",
               "evaluation noise, no verdict"]  # fmt: skip
    table = Table("", columns, lines, note, frozenset({0, 1, 6}))
    return Section("contrasts", "Comparisons", figures=[figure], tables=[table])


def _noise_cell(verdict: Verdict) -> str:
    if verdict.noise is None:
        return ABSENT
    return f"{verdict.noise.low:+.4f} to {verdict.noise.high:+.4f}".replace("-", "−")


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# --- curves ----------------------------------------------------------------------------------------------------------


def _lines(findings: Findings, curves: Curves, unit: str, place: str, *, dotted: bool) -> list[Series]:
    found = arm_styles(findings)
    series = []
    for arm, points in curves.items():
        marks = [
            Mark(point.x, point.mean, point.low if point.n > 1 else None, point.high if point.n > 1 else None,
                 f"{arm}: {point.mean:.4f} {unit} at {short(round(point.x))} {place}")
            for point in points
        ]  # fmt: skip
        if len(marks) > 1:  # of what was converted, not trained, there is one
            series.append(Series(arm, found[arm], marks, joined=True, dotted=dotted))
    return series


def _curves(findings: Findings) -> Section | None:
    series = _lines(findings, findings.curves, findings.curve_unit, "tokens", dotted=False)
    if not series:
        return None
    last = max(mark.x for s in series for mark in s.marks)
    # The fall of the first tenth would press everything after it together.
    late = [mark.y for s in series for mark in s.marks if mark.x >= 0.1 * last and len(s.marks) > 4]
    above = max(late) if late else None
    panels = [
        (
            "validation loss",
            Plot("training tokens", f"validation loss, {findings.curve_unit}", series, lines=True, above=above),
        )
    ]
    gaps = _lines(findings, findings.curve_gaps, findings.curve_unit, "tokens", dotted=False)
    if gaps:
        late = [mark.y for s in gaps for mark in s.marks if mark.x >= 0.1 * last]
        plot = Plot("training tokens", f"difference from {findings.baseline}, {findings.curve_unit}", gaps, lines=True,
                    level=(0.0, findings.baseline or ""))  # fmt: skip
        panels.append((f"minus {findings.baseline} of the same seed", plot))
    cut = " What lies above the losses of the last nine tenths is cut off." if above is not None else ""
    several = any(point.n > 1 for points in findings.curves.values() for point in points)
    bands = "Lines: means over seeds; bands: from the lowest seed to the highest." if several else "One seed each."
    figure = Figure("curves", "Loss while training", f"{bands}{cut}", panels)
    return Section("curves", "Loss curves", figures=[figure])


def _positions(findings: Findings) -> Section | None:
    unit = "nats per token"
    within = _lines(findings, findings.positions, unit, "tokens of context (middle of a bin)", dotted=True)
    gaps = _lines(findings, findings.position_gaps, unit, "tokens of context (middle of a bin)", dotted=True)
    beyond = _lines(findings, findings.beyond, unit, "tokens of context (middle of a bin)", dotted=True)
    if not within and not beyond:
        return None
    context = "context, tokens (log scale)"
    octaves = [float(2**k) for k in range(0, 24, 2)]
    panels = []
    if within:
        panels.append(
            (
                "within the training length",
                Plot(context, f"test loss, {unit}", within, x_log=True, lines=True, x_ticks=octaves),
            )
        )
    if gaps:
        level = (0.0, findings.baseline or "")
        plot = Plot(
            context,
            f"difference from {findings.baseline}, {unit}",
            gaps,
            x_log=True,
            lines=True,
            level=level,
            x_ticks=octaves,
        )
        panels.append((f"minus {findings.baseline} of the same seed", plot))
    words = []
    if beyond:
        length = findings.training_length
        rules = [(float(length), "training length")] if length else []
        plot = Plot(
            context,
            f"test loss of the same tokens, {unit}",
            beyond,
            x_log=True,
            lines=True,
            rules=rules,
            x_ticks=octaves,
        )
        panels.append(("beyond the training length", plot))
        if absent := [arm.name for arm in findings.arms if arm.runs and arm.name not in findings.beyond]:
            words.append(f"Not measured beyond the training length: {', '.join(absent)}.")
    else:
        words.append("Contexts beyond the training length were not measured.")
    caption = "Loss of a token by how many tokens stood before it; a point is a bin of contexts, bands run over seeds."
    if beyond:
        caption += (
            " Beyond the training length every point is of the same tokens, fewer than the whole split, so its level is not "
            "that of the other panel."
        )
    figure = Figure("positions", "Loss by context", caption, panels)
    return Section("positions", "Loss by position", figures=[figure], words=words)


# --- staircase -------------------------------------------------------------------------------------------------------


def _staircase(findings: Findings) -> Section | None:
    if not findings.staircase:
        return None
    rows = []
    before: float | None = None
    for arm, verdict in findings.staircase:
        mean = findings.arm(arm).mean
        assert mean is not None
        if verdict is None or before is None:
            rows.append(Row(arm, (arm,), f"{arm}: {_mean(mean)} {findings.unit}", f"{mean.mean:.4f}", mean.mean))
        else:
            contrast = verdict.contrast
            half = None if contrast.low is None or contrast.high is None else (contrast.high - contrast.low) / 2
            low, high = (None, None) if half is None else (mean.mean - half, mean.mean + half)
            colour = WORSE if contrast.difference > 0 else BETTER
            rows.append(
                Row(arm, (arm,), f"{verdict.sentence}.", change(contrast), mean.mean, low, high, begin=before, colour=colour)
            )  # fmt: skip
        before = mean.mean
    figure = Figure(
        "staircase", "What each change does, on top of those before it",
        "Every bar leads from the arm above to this one; orange is worse, blue is better. Whiskers: the 95 % interval of the "
        "step.",
        [("", Rows(f"test {findings.unit}, lower is better", rows))],
    )  # fmt: skip
    return Section("staircase", "Staircase", figures=[figure])


# --- learning rates --------------------------------------------------------------------------------------------------


def _rates(findings: Findings) -> Section:
    results = findings.results
    title = "Learning rates"
    if not findings.sweeps:
        words = ([f"Every arm ran at the rate {results.shared_lr:g}: no rate was tuned, which favours the arms that it suits."]
                 if not results.chosen_lr and results.shared_lr is not None
                 else ["The sweep that the rates come from is not in this folder."])  # fmt: skip
        return Section("rates", title, words=words)
    found = arm_styles(findings)
    panels, lines = [], []
    for tokens in sorted({sweep.tokens for sweep in findings.sweeps}):
        series = []
        for sweep in (sweep for sweep in findings.sweeps if sweep.tokens == tokens):
            style = found[sweep.arm]
            parabola = [Mark(x, y) for x, y in sweep.parabola()]
            if parabola:
                series.append(Series(sweep.arm, style, parabola, joined=True, dotted=False))
            marks = [
                Mark(lr, loss, hover=f"{sweep.arm}: {loss:.4f} at rate {lr:g}")
                for lr, loss in sorted(sweep.losses.items())
            ]
            series.append(Series(sweep.arm, style, marks, hollow=True))
            if (
                sweep.best is not None
                and sweep.chosen is not None
                and math.isclose(sweep.best.lr, sweep.chosen, rel_tol=0.01)
            ):
                hover = f"{sweep.arm}: chosen rate {sweep.chosen:g}, {sweep.best.loss:.4f}"
                star = Style(style.colour, "star")
                series.append(Series(sweep.arm, star, [Mark(sweep.chosen, sweep.best.loss, hover=hover)]))
        ticks = sorted({lr for sweep in findings.sweeps if sweep.tokens == tokens for lr in sweep.losses})
        plot = Plot(
            "learning rate (log scale)",
            "validation loss, nats per token",
            series,
            x_log=True,
            lines=True,
            x_ticks=ticks,
        )
        panels.append((f"{short(tokens)} tokens a run", plot))
        for sweep in (sweep for sweep in findings.sweeps if sweep.tokens == tokens):
            best = sweep.best
            lines.append(
                Line([sweep.arm, f"{sweep.tokens:,}", str(len(sweep.losses)), f"{min(sweep.losses):g} to {max(sweep.losses):g}",
                      ABSENT if best is None else f"{best.lr:g}", ABSENT if best is None else f"{best.loss:.4f}",
                      ABSENT if best is None else "yes" if best.at_edge else "no",
                      ABSENT if sweep.chosen is None else f"{sweep.chosen:g}"],
                     sweep.arm, marked=best is not None and best.at_edge)
            )  # fmt: skip
    caption = (
        "Hollow: runs of the sweep. Line: the parabola through the lowest and its neighbours. Star: the chosen rate."
    )
    figure = Figure("sweep", "Validation loss by learning rate", caption, panels)
    columns = ["arm", "tokens a run", "rates", "range", "best rate", "loss there", "at the edge", "rate of the study"]
    tables = [
        Table(
            "Sweeps", columns, lines, "An optimum at the edge of the rates may lie beyond them.", frozenset({0, 3, 6})
        )
    ]
    words = []
    if findings.shared is not None:
        tables.append(_shared_table(findings))
    elif results.shared_lr is not None:
        words.append(
            f"There is no table at one shared rate: fewer than two arms ran at {results.shared_lr:g} with the study's whole "
            f"budget."
        )
    return Section("rates", title, figures=[figure], tables=tables, after=words)


def _shared_table(findings: Findings) -> Table:
    shared = findings.shared
    assert shared is not None
    lines = []
    for arm, mean in shared.means.items():
        tuned = findings.arm(arm)
        rate = " / ".join(dict.fromkeys(f"{run.lr:g}" for run in tuned.runs))
        lines.append(Line([arm, _mean(mean), str(mean.n), _mean(tuned.mean), str(len(tuned.runs)), rate], arm))
    note = " ".join(f"{contrast.sentence(findings.unit)}." for contrast in shared.verdicts)
    columns = ["arm", f"test {findings.unit} at {shared.lr:g}", "seeds", "at its own rate", "seeds", "own rate"]
    return Table(f"All arms at one learning rate, {shared.lr:g}", columns, lines, note)


# --- extras ----------------------------------------------------------------------------------------------------------


def _extras(findings: Findings) -> Section | None:
    tables = []
    for extra, by_arm in findings.extras.items():
        names = list(dict.fromkeys(figure for figures in by_arm.values() for figure in figures))
        values = {
            name: {_whole(figures[name].mean) for figures in by_arm.values() if name in figures} for name in names
        }
        same = [name for name in names if len(values[name]) == 1 and next(iter(values[name])) is not None]
        shown = [name for name in names if name not in same]
        lines = []
        for arm in findings.arms:
            if arm.runs:
                figures = by_arm.get(arm.name, {})
                lines.append(Line([arm.name, *(_extra_cell(figures.get(name)) for name in shown)], arm.name))
        notes = []
        if same:
            notes.append(
                "For all: " + "; ".join(f"{_figure_name(name)} {next(iter(values[name])):,.0f}" for name in same) + "."
            )
        if any(arm.runs and arm.name not in by_arm for arm in findings.arms):
            notes.append(f"{ABSENT}: does not apply to this arm.")
        if shown:
            title = EXTRA_TITLES.get(extra, extra)
            tables.append(Table(title, ["arm", *map(_figure_name, shown)], lines, " ".join(notes)))
    return Section("extras", "What the loss does not show", tables=tables) if tables else None


def _figure_name(figure: str) -> str:
    return FIGURE_NAMES.get(figure, figure.replace("_", " "))


def _extra_cell(mean: Mean | None) -> str:
    if mean is None:
        return ABSENT
    return f"{mean.mean:,.0f}" if _whole(mean.mean) is not None and mean.low is None else _mean(mean)


def _whole(number: float) -> int | None:
    """The whole number that a mean of equal ones is, but for rounding."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else None


# --- what else differs -----------------------------------------------------------------------------------------------


def _confounds(findings: Findings) -> Section:
    done = [arm.name for arm in findings.arms if arm.runs]
    words = []
    unequal = [fact.name for fact in findings.facts if not fact.equal]
    if len(done) > 1:
        words.append(
            "Not equal across the arms: "
            + (", ".join(unequal) if unequal else "nothing of what is listed here")
            + ". A "
            "difference between arms is that of all of these together."
        )
    tables = [_fact_table("What a fair comparison would have equal", findings.facts, done)]
    matches = [(arm.name, match) for arm in findings.arms for match in arm.info.match]
    if matches:
        lines = [
            Line([arm, str(match["quantity"]), str(match["to"]), f"{match['vary']} = {match['value']}", _count(match["target"]),
                  _count(match["achieved"]), f"{100 * match['mismatch']:+.2f} %".replace("-", "−")], arm,
                 marked=match["mismatch"] != 0)
            for arm, match in matches
        ]  # fmt: skip
        columns = ["arm", "matched", "to", "by", "target", "achieved", "mismatch"]
        tables.append(Table("How well the sizes are matched", columns, lines, words=frozenset({0, 1, 2, 3})))
    if findings.fields:
        tables.append(_fact_table("Fields of the configurations that differ", findings.fields, done))
    return Section("confounds", "What differs besides", words=words, tables=tables)


def _fact_table(title: str, facts: Sequence[Fact], arms: Sequence[str]) -> Table:
    lines = []
    for fact in facts:
        state = "equal" if fact.equal else "differs" if not fact.spread else f"differs by {100 * fact.spread:.1f} %"
        lines.append(Line([fact.name, state, *(fact.values.get(arm, ABSENT) for arm in arms)], marked=not fact.equal))
    return Table(title, ["", "across arms", *arms], lines, words=frozenset({0, 1}))


def _provenance(findings: Findings) -> Section:
    results = findings.results
    sweep = f" and {_runs(len(results.sweep))} of the learning-rate sweep" if results.sweep else ""
    words = [
        f"{_runs(len(results.runs))} of the study{sweep}, one a line in report.csv; the verdicts for machines are in "
        f"report.json. This command trains and evaluates what is missing, and writes the report again:"
    ]
    after = []
    if findings.sigma:
        after.append(
            f"Error bars come from ordinary least squares over arms and seeds, with one residual variance for all arms"
            f"{' that were trained' if _converted(findings) else ''}. A seed "
            f"sets initialisation and order of the data alike for every arm, so differences are within seeds.{_apart(findings)}"
        )
    return Section("provenance", "How this was made", words=words, code=results.command, after=after)


def _runs(count: int) -> str:
    return f"{count} {_plural(count, 'run')}"
