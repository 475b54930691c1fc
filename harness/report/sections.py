"""The report of a study in its order: what its findings say in words, tables and pictures."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

from harness.evaluation.metric import METRICS, PERPLEXITY
from harness.files.text import counted, number, plural
from harness.report import study_pictures as pictures
from harness.report.confounds import Fact
from harness.report.document import ABSENT, Section, TableLine, TextTable, at_contexts, capital, change, in_ms, mean_text
from harness.report.findings import Best, Findings, Sweep, Verdict, probe_of
from harness.runs.provenance import CHANGED, CHANGES_FILE, has_changes
from harness.runs.records import DecodeRow
from harness.study.results import LENGTH, StudyResults
from harness.study.statistics import ALPHA, Contrast, Mean, decimals_for, with_error


def sections(findings: Findings) -> list[Section]:
    """Everything below the question, in order. A section without data is left out, with a word where it matters."""
    curves = pictures.curves(findings)
    found = [
        _verdict(findings),
        _main(findings),
        Section("pareto", "Quality against cache", pictures=[pictures.pareto(findings)]),
        _contrasts(findings),
        _decode(findings),
        Section("curves", "Loss curves", pictures=[curves]) if curves else None,
        _positions(findings),
        Section("staircase", "Staircase", pictures=[pictures.staircase(findings)]) if findings.staircase else None,
        _rates(findings),
        _extras(findings),
        _confounds(findings),
        _provenance(findings),
    ]
    return [section for section in found if section is not None]


def _count(number: int | float | None) -> str:
    return ABSENT if number is None else f"{number:,.0f}"


def _verdict(findings: Findings) -> Section:
    declared = findings.declared
    words = [_best_words(findings, best) for best in findings.best]
    if tested := max((best.comparisons for best in findings.best), default=0):
        words[-1] += (
            f" (Who is best was seen in these results, so this is no declared comparison: arms are told apart at the "
            f"{100 * ALPHA:.0f} % level, corrected for all {tested} {plural(tested, 'difference')} from the best.)"
        )
    if declared:
        resolved = sum(bool(verdict.contrast.resolved) for verdict in declared)
        count = sum(verdict.contrast.p is not None for verdict in declared)
        if count:
            without = len(declared) - count
            words.append(
                f"{resolved} of {count} declared {plural(count, 'comparison')} {'is' if resolved == 1 else 'are'} resolved at "
                f"the 5 % level, corrected for their number (Holm)."
                + (f" {without} more {'has' if without == 1 else 'have'} no error bar." if without else "")
            )
        elif findings.sigma:
            words.append("No declared comparison has an error bar, so there is no verdict.")
        else:
            words.append("No arm has seeds that disagree, so there are no error bars, and nothing below is a verdict.")
    else:
        words.append("No declared comparison can be made, so there is no verdict.")
    points = [f"{verdict.sentence}." for verdict in declared]
    points += [f"{sentence}." for _, sentence, exploratory in findings.trends if not exploratory]
    more = [f"{verdict.sentence}." for verdict in findings.looked_at]
    more += [f"{sentence}." for _, sentence, exploratory in findings.trends if exploratory]
    after = ["Exploratory, neither declared beforehand nor corrected:"] if more else []
    return Section("verdict", "Verdict", words=words, points=points, after=after, more=more)


def _best_words(findings: Findings, best: Best) -> str:
    """The best arm of a level or of all, and how well it is told from the others."""
    metric = findings.metric
    mean = findings.arm(best.arms[0]).mean
    where = f" at {best.level}" if best.level is not None else " of all" if len(findings.best) > 1 else ""
    also = [f"{mean_text(m, METRICS[name])} {METRICS[name].unit}" for name, m in findings.arm(best.arms[0]).also.items()]
    in_others = f" ({', '.join(also)})" if also else ""
    found = f"{capital(metric.extreme)} {metric.label}{where}: {best.arms[0]}, {mean_text(mean, metric)}{in_others}."
    if not best.comparisons:
        return f"{found} Without error bars that is no finding."
    even = [f"Not told apart from it: {', '.join(best.even)}."] if best.even else []
    worse = [f"Worse: {', '.join(best.worse)}."] if best.worse else []
    return " ".join([found, *even, *worse])


def _main(findings: Findings) -> Section:
    levels = any(arm.info["level"] for arm in findings.arms)
    cache, sizes = at_contexts(
        "cache bytes per token",
        [_count(arm.summary("cache_bytes_per_token")) for arm in findings.arms],
        [arm.cache_context for arm in findings.arms],
    )
    decode = _decode_cells(findings)
    metric, at_length = findings.metric, findings.at_length
    lines = []
    exploratory = {*findings.added.arms, *findings.added.rates}
    for arm, size in zip(findings.arms, sizes, strict=True):
        ratio = arm.summary("cache_ratio_to_mha")
        cells = {
            "arm": arm.name + " (reference)" * arm.info["reference"] + " (exploratory)" * (arm.name in exploratory),
            **({"level": arm.info["level"] or ABSENT} if levels else {}),
            "parameters": _count(arm.summary("parameters")),
            cache: size,
            **({f"at {LENGTH:,} tokens": _count(at_length.get(arm.name))} if at_length else {}),
            "of MHA's": ABSENT if ratio is None else f"{ratio:.3f}",
            metric.label: mean_text(arm.mean, metric),
            **{METRICS[name].label: mean_text(arm.also.get(name), METRICS[name]) for name in findings.also},
            "deviation": _two_digits(arm.mean.deviation if arm.mean else None),
            "seeds": str(len(arm.runs)),
            "learning rate": " / ".join(dict.fromkeys(f"{run.lr:g}" for run in arm.runs)) or ABSENT,
        }
        if metric is not PERPLEXITY:
            cells[PERPLEXITY.unit] = mean_text(findings.mean_of(arm.name, findings.perplexities), PERPLEXITY)
        if decode:
            cells["decode, ms a token"] = decode[1].get(arm.name, ABSENT)
        lines.append(TableLine(list(cells.values()), arm.name))
    note = "Cache: all layers, measured on allocated buffers; MHA's: of an MHA with the model's heads."
    note = f"{_error_bars(findings) if findings.sigma else 'No error bars: no arm has seeds that disagree.'} {note}"
    if decode:
        note += f" Decode: {decode[0]}."
    table = TextTable("", list(cells), lines, note, frozenset({0, 1} if levels else {0}))
    return Section("arms", "Arms", tables=[table, *_every_run(findings)])


def _every_run(findings: Findings) -> list[TextTable]:
    """The figures of each run, where there are several seeds: what the means are made of."""
    tables = []
    for metric, values in [(findings.metric, findings.values), *((METRICS[name], v) for name, v in findings.also.items())]:
        seeds = sorted({seed for of_arm in values.values() for seed in of_arm})
        lines = [
            TableLine([arm, *(metric.text(of_arm[seed]) if seed in of_arm else ABSENT for seed in seeds)], arm)
            for arm, of_arm in ((arm.name, values[arm.name]) for arm in findings.done)
        ]
        columns = ["arm", *(f"seed {seed}" for seed in seeds)]
        tables += [TextTable(f"{capital(metric.label)} of every run", columns, lines)] if len(seeds) > 1 else []
    return tables


def _decode_cells(findings: Findings) -> tuple[str, dict[str, str]] | None:
    """Where and how long: the longest context at the smallest batch."""
    if not findings.decode:
        return None
    context = max(row["context"] for row in findings.decode)
    batch = min(row["batch"] for row in findings.decode if row["context"] == context)
    rows = [row for row in findings.decode if (row["context"], row["batch"]) == (context, batch)]
    cells = {row["arm"]: in_ms(row["milliseconds"]) for row in rows}
    return f"one step at context {context:,}, batch {batch:,}", cells


def _error_bars(findings: Findings) -> str:
    """What the ± of a mean is, and what is known of how widely runs scatter."""
    words = (
        f"deviation: of single runs, from the arm's own seeds; pooled over the arms it is {findings.sigma:.2g} "
        f"{findings.metric.unit} ({findings.dof} degrees of freedom). ± is half of the wider of two 95 % intervals, with the "
        f"pooled deviation and with the arm's own."
    )
    if findings.unequal is not None:
        said = "the deviations differ" if findings.unequal < ALPHA else "no difference between the deviations is found"
        words += f" Bartlett's test of equal variances: p {_equals(findings.unequal)}, {said}."
    if findings.lineages:
        families: dict[str, list[str]] = {}
        for arm, root in findings.lineages.items():
            families.setdefault(root, []).append(arm)
        told = "; ".join(f"{', '.join(arms)} from runs of {root}" for root, arms in families.items())
        words += (
            f" Arms that descend from the same runs ({told}) are compared seed by seed with one another and with them, and "
            f"count once in the pooled deviation."
        )
    if findings.converted:
        words += (
            f" Not pooled, for what is converted without training scatters on its own: {', '.join(findings.converted)}; "
            f"comparisons with them have the deviations of their two arms alone."
        )
    return words


def _equals(p: float) -> str:
    return _p(p) if p < 0.001 else f"= {_p(p)}"


def _decode(findings: Findings) -> Section:
    title = "Quality against decode time"
    if not findings.decode:
        return Section("decode", title, words=["Decode times were not measured in this study."])
    places = sorted({(row["context"], row["batch"]) for row in findings.decode}, key=lambda place: place[::-1])
    columns = ["arm", *(f"context {context:,}, batch {batch:,}" for context, batch in places), "path", "device"]
    lines = []
    for arm in findings.arms:
        rows = {(row["context"], row["batch"]): row for row in findings.decode if row["arm"] == arm.name}
        if rows:
            cells = [_ms_with_quartiles(rows.get(place)) for place in places]
            used = [", ".join(dict.fromkeys(str(row[key]) for row in rows.values())) for key in ("path", "device")]
            lines.append(TableLine([arm.name, *cells, *used], arm.name))
    note = (
        "Milliseconds a step, which is a token in each row of the batch, with quartiles. They hold for this machine and "
        "this implementation; of several paths of one arm the fastest is shown."
    )
    table = TextTable("Decode times", columns, lines, note, frozenset({0, len(columns) - 2, len(columns) - 1}))
    return Section("decode", title, pictures=[pictures.decode_picture(findings)], tables=[table])


def _ms_with_quartiles(row: DecodeRow | None) -> str:
    return ABSENT if row is None else f"{in_ms(row['milliseconds'])} ({in_ms(row['low'])} to {in_ms(row['high'])})"


def _contrasts(findings: Findings) -> Section | None:
    verdicts = findings.verdicts
    if not verdicts:
        return None
    lines = []
    for verdict in verdicts:
        contrast = verdict.contrast
        cells = {
            "a − b": f"{contrast.a} − {contrast.b}",
            "declared": "yes" if contrast.primary else "exploratory" if verdict.exploratory else "no",
            f"difference, {findings.metric.unit}": change(contrast, findings.metric),
            **{f"in {METRICS[name].unit}": change(other, METRICS[name]) for name, other in verdict.also.items()},
            "± pooled": _two_digits(contrast.pooled_half),
            "± own": _two_digits(contrast.own_half),
            "seeds": " and ".join(dict.fromkeys(map(str, (contrast.n_a, contrast.n_b)))) + (", paired" * contrast.paired),
            "p": _p(contrast.p),
            "p after Holm": _p(contrast.p_holm),
            "resolved": _yes_or_no(contrast.resolved),
            "detects": _two_digits(contrast.detectable),
            **({} if contrast.margin is None else {f"same within {contrast.margin:g}": _same_cell(contrast)}),
            "evaluation noise, no verdict": _noise_cell(verdict),
        }
        lines.append(TableLine(list(cells.values())))
    note = (
        "± is half of the 95 % interval over seeds, of each difference alone: the wider of one with the pooled deviation and "
        "one with the two arms' own (Welch's; within a lineage that of the paired differences), which decides. p after Holm is "
        "over the declared comparisons. Detects: the smallest true difference that so many seeds resolve with 80 % power."
    )
    if noises := [verdict for verdict in verdicts if verdict.noise is not None]:
        seeds = sorted({seed for verdict in noises for seed in verdict.noise_seeds})
        units = " or ".join(dict.fromkeys(verdict.noise_units for verdict in noises))
        others = "other places in the same documents" if "segments" in units else "other documents of the same kind"
        note += (
            f" Evaluation noise: the 95 % bootstrap interval of the difference in bits per byte over {units} of the test "
            f"split, of losses averaged over the {plural(len(seeds), 'seed')} that both arms have "
            f"({', '.join(map(str, seeds))}). It says what {others} would have changed for these very weights, nothing "
            f"about other seeds, so it decides nothing."
        )
    if reasons := list(dict.fromkeys(verdict.no_noise for verdict in verdicts if verdict.no_noise)):
        note += f" No evaluation noise where {'; '.join(reasons)}."
    words_in = frozenset({0, 1, list(cells).index("resolved")})
    tables = [TextTable("", list(cells), lines, note, words_in)]
    drawn = [pictures.contrasts_picture(findings)]
    if findings.trends:
        tables.append(_trends(findings))
        sizes = {name: trend["over"] for name, trend in findings.results.record["trends"].items()}
        drawn.append(pictures.trends_picture([trend for trend, _, _ in findings.trends], sizes, findings.metric))
    return Section("contrasts", "Comparisons", pictures=drawn, tables=tables)


def _trends(findings: Findings) -> TextTable:
    lines = [
        TableLine(
            [
                trend.name,
                "exploratory" if reason else "yes",
                ", ".join(f"{a} − {b} at {size:g}" for (a, b), size in zip(trend.pairs, trend.at, strict=True)),
                with_error(trend.slope, trend.low, trend.high, findings.metric.digits, sign="+"),
                _two_digits(trend.pooled_half),
                _two_digits(trend.own_half),
                _p(trend.p),
                _p(trend.p_holm),
                _yes_or_no(trend.resolved),
            ]
        )
        for trend, _, reason in findings.trends
    ]
    slope = f"change for each doubling, {findings.metric.unit}"
    columns = ["trend", "declared", "of", slope, "± pooled", "± own", "p", "p after Holm", "resolved"]
    note = "The slope of the least squares line through the differences over log2 of the size, with error bars as above."
    return TextTable("Trends", columns, lines, note, frozenset({0, 1, 2, len(columns) - 1}))


def _two_digits(figure: float | None) -> str:
    return ABSENT if figure is None else f"{figure:.{decimals_for(figure, 2)}f}"


def _yes_or_no(answer: bool | None) -> str:
    return {True: "yes", False: "no", None: ABSENT}[answer]


def _same_cell(contrast: Contrast) -> str:
    return ABSENT if contrast.p_same is None else f"{_yes_or_no(contrast.same)} (p {_equals(contrast.p_same)})"


def _noise_cell(verdict: Verdict) -> str:
    if verdict.noise is None:
        return ABSENT
    return f"{number(verdict.noise.low, '+.4f')} to {number(verdict.noise.high, '+.4f')}"


def _p(p: float | None) -> str:
    if p is None:
        return ABSENT
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _positions(findings: Findings) -> Section | None:
    picture = pictures.positions(findings)
    if picture is None:
        return None
    absent = [arm.name for arm in findings.done if arm.name not in findings.beyond]
    words = []
    if not findings.beyond:
        words.append("Contexts beyond the training length were not measured.")
    elif absent:
        words.append(f"Not measured beyond the training length: {', '.join(absent)}.")
    shown = [picture]
    if (beside := pictures.copying(findings)) is not None:
        shown.append(beside)
    if found := findings.copying_correlation:
        words.append(
            f"Within arms the {findings.metric.label} of {found[1]} runs and what repetition in the context saves them "
            f"correlate by {number(found[0], '.2f')}: the nearer to ±1, the more seeds differ by whether they have "
            f"learned to copy yet."
        )
    return Section("positions", "Loss by position", pictures=shown, words=words)


def _rates(findings: Findings) -> Section:
    record = findings.results.record
    shared = record["shared_lr"]
    title = "Learning rates"
    if not findings.sweeps:
        words = ["The sweep that the rates come from is not in this folder."]
        if not record["chosen_lr"] and shared is not None:
            words = [f"Every arm ran at the rate {shared:g}: no rate was tuned, which favours the arms that it suits."]
        elif not record["chosen_lr"]:
            words = ["Every arm ran at the rate that the study's file gives it: no rate was tuned in this study."]
        return Section("rates", title, words=words)
    columns = ["arm", "tokens a run", "rates", "range", "best rate", "loss there", "at the edge", "rate of the study"]
    columns += ["95 % of it", "nats that costs", "by a cubic", "nats apart"]
    lines = [_sweep_line(sweep) for sweep in sorted(findings.sweeps, key=lambda sweep: sweep.tokens)]
    note = (
        "An optimum at the edge of the rates may lie beyond them. 95 % of it: where the vertex of the parabola may lie, by the "
        "deviation of the main runs' validation losses; the next column is the loss, in nats per token, that this error costs "
        "on average. By a cubic: the best of a cubic through four rates, and how much higher it lies at the parabola's rate."
    )
    tables = [TextTable("Sweeps", columns, lines, note, frozenset({0, 3, 6}))]
    words = []
    if findings.shared is not None:
        tables.append(_shared_table(findings))
    elif shared is not None:
        words.append(
            f"There is no table at one shared rate: fewer than two arms ran at {shared:g} with the study's whole budget."
        )
    return Section("rates", title, pictures=[pictures.sweeps(findings)], tables=tables, after=words)


def _sweep_line(sweep: Sweep) -> TableLine:
    best, rates = sweep.best, f"{min(sweep.losses):g} to {max(sweep.losses):g}"
    found = [ABSENT] * 3 if best is None else [f"{best.lr:g}", f"{best.loss:.4f}", "yes" if best.at_edge else "no"]
    chosen = ABSENT if sweep.chosen is None else f"{sweep.chosen:g}"
    cells = [sweep.arm, f"{sweep.tokens:,}", str(len(sweep.losses)), rates, *found, chosen, *_doubt_cells(sweep)]
    return TableLine(cells, sweep.arm, marked=best is not None and best.at_edge)


def _doubt_cells(sweep: Sweep) -> list[str]:
    """How exactly the best rate is known."""
    doubt, cells = sweep.doubt, [ABSENT] * 4
    if doubt is not None and sweep.best is not None:
        if doubt.factor is not None and doubt.noise is not None:
            cells[:2] = [f"{sweep.best.lr / doubt.factor:.2g} to {sweep.best.lr * doubt.factor:.2g}", f"{doubt.noise:.4f}"]
        if doubt.cubic_lr is not None and doubt.shape is not None:
            cells[2:] = [f"{doubt.cubic_lr:g}", f"{doubt.shape:.4f}"]
    return cells


def _shared_table(findings: Findings) -> TextTable:
    shared, metric = findings.shared, findings.metric
    assert shared is not None
    lines = []
    for arm, mean in shared.means.items():
        tuned = findings.arm(arm)
        rate = " / ".join(dict.fromkeys(f"{run.lr:g}" for run in tuned.runs))
        others = [mean_text(of_unit.get(arm), METRICS[name]) for name, of_unit in shared.also.items()]
        cells = [arm, mean_text(mean, metric), *others, str(mean.n), mean_text(tuned.mean, metric), str(len(tuned.runs)), rate]
        lines.append(TableLine(cells, arm))
    note = " ".join(f"{contrast.sentence(findings.metric)}." for contrast in shared.verdicts)
    others = [METRICS[name].label for name in shared.also]
    columns = ["arm", f"{metric.label} at {shared.lr:g}", *others, "seeds", "at its own rate", "seeds", "own rate"]
    return TextTable(f"All arms at one learning rate, {shared.lr:g}", columns, lines, note)


def _extras(findings: Findings) -> Section | None:
    tables = []
    for extra, by_arm in findings.extras.items():
        known = probe_of(extra)
        title, called = (known.title, known.words) if known else (extra, {})
        names = list(dict.fromkeys(figure for figures in by_arm.values() for figure in figures))
        values = {name: {_whole(figures[name].mean) for figures in by_arm.values() if name in figures} for name in names}
        same = [name for name in names if len(values[name]) == 1 and next(iter(values[name])) is not None]
        shown = [name for name in names if name not in same]
        lines = []
        for arm in findings.arms:
            if arm.runs:
                figures = by_arm.get(arm.name, {})
                lines.append(TableLine([arm.name, *(_extra_cell(figures.get(name)) for name in shown)], arm.name))
        notes = []
        if same:
            notes.append(
                "For all: " + "; ".join(f"{_figure_name(name, called)} {next(iter(values[name])):,.0f}" for name in same) + "."
            )
        if any(arm.runs and arm.name not in by_arm for arm in findings.arms):
            notes.append(f"{ABSENT}: does not apply to this arm.")
        if floors := findings.floors.get(extra):
            said = "; ".join(f"{what or extra} of {', '.join(arms)}" for what, arms in floors.items())
            notes.append(f"At its floor, where a figure says nothing: {said}.")
        if shown:
            columns = ["arm", *(_figure_name(name, called) for name in shown)]
            tables.append(TextTable(title, columns, lines, " ".join(notes)))
    return Section("extras", "What the loss does not show", tables=tables) if tables else None


def _figure_name(figure: str, called: Mapping[str, str]) -> str:
    return called.get(figure, figure.replace("_", " "))


def _extra_cell(mean: Mean | None) -> str:
    if mean is None:
        return ABSENT
    return (
        f"{mean.mean:,.0f}"
        if _whole(mean.mean) is not None and mean.low is None
        else with_error(mean.mean, mean.low, mean.high)
    )


def _whole(number: float) -> int | None:
    """The whole number that a mean of equal ones is, but for rounding."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else None


def _confounds(findings: Findings) -> Section:
    done = [arm.name for arm in findings.done]
    words = []
    unequal = [fact.name for fact in findings.facts if not fact.equal]
    if len(done) > 1:
        words.append(
            "Not equal across the arms: " + (", ".join(unequal) if unequal else "nothing of what is listed here") + ". A "
            "difference between arms is that of all of these together."
        )
    tables = _fact_tables("What a fair comparison would have equal", findings.facts, done)
    matches = [(arm.name, match) for arm in findings.arms for match in arm.info["match"]]
    if matches:
        lines = []
        for arm, match in matches:
            mismatch = f"{number(100 * match['mismatch'], '+.2f')} %"
            how = [str(match["quantity"]), str(match["to"]), f"{match['vary']} = {match['value']}"]
            cells = [arm, *how, _count(match["target"]), _count(match["achieved"]), mismatch]
            lines.append(TableLine(cells, arm, marked=match["mismatch"] != 0))
        columns = ["arm", "matched", "to", "by", "target", "achieved", "mismatch"]
        tables.append(TextTable("How well the sizes are matched", columns, lines, words=frozenset({0, 1, 2, 3})))
    if findings.fields:
        tables += _fact_tables("Fields of the configurations that differ", findings.fields, done)
    return Section("confounds", "What differs besides", words=words, tables=tables)


def _fact_tables(title: str, facts: Sequence[Fact], arms: Sequence[str]) -> list[TextTable]:
    """What differs with a line for each arm, so that twenty fit on a page; what is equal once, for all of them."""
    equal, unequal = [fact for fact in facts if fact.equal], [fact for fact in facts if not fact.equal]
    tables = []
    if unequal:
        columns = ["arm", *(f"{fact.name} (by {_percent(fact.spread)})" if fact.spread else fact.name for fact in unequal)]
        lines = [TableLine([arm, *(fact.values.get(arm, ABSENT) for fact in unequal)], arm) for arm in arms]
        words = {0, *(i for i, fact in enumerate(unequal, start=1) if not fact.is_number)}
        tables.append(TextTable(f"{title}: not equal" if equal else title, columns, lines, words=frozenset(words)))
    if equal and arms:
        lines = [TableLine([fact.name, fact.values[arms[0]]]) for fact in equal]
        tables.append(TextTable(f"{title}: equal in all arms", ["", "in all arms"], lines, words=frozenset({0, 1})))
    return tables


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def _provenance(findings: Findings) -> Section:
    results = findings.results
    sweep = f" and {counted(len(results.sweep), 'run')} of the learning-rate sweep" if results.sweep else ""
    words = [
        f"{counted(len(results.runs), 'run')} of the study{sweep}, one a line in report.csv; the verdicts for machines are in "
        f"report.json. This command trains and evaluates what is missing, and writes the report again:"
    ]
    after = [_changes(results)] if _changes(results) else []
    if findings.sigma:
        after.append(
            "Error bars come from seeds, which set initialisation and order of the data. Two intervals are made for each "
            "difference, one with a deviation pooled over all arms and one with those of its two arms; the wider one decides."
        )
    return Section("provenance", "How this was made", words=words, code=whole_command(results.record["command"]), after=after)


def whole_command(command: str) -> str:
    """The command without what makes it do a part of the study, or leave the report out."""
    partial = ("report=", "arms=")
    return shlex.join(word for word in shlex.split(command) if not word.startswith(partial))


def _changes(results: StudyResults) -> str:
    """Which runs were made from a working tree that differs from its commit, and where the difference is kept."""
    changed = [run for run in (*results.runs, *results.sweep) if has_changes(run.summary.get("commit"))]
    if not changed:
        return ""
    kept = sum((run.folder / CHANGES_FILE).is_file() for run in changed)
    where = "The difference was not kept."
    if kept == len(changed):
        where = f"The difference is in {CHANGES_FILE} in the folder of each."
    elif kept:
        where = f"The difference is in {CHANGES_FILE} in the folders of {kept} of them; of the others it was not kept."
    whose = "All were" if len(changed) == len(results.runs) + len(results.sweep) else f"{counted(len(changed), 'run')} were"
    return f"{whose} made from a working tree that differed from its commit ({CHANGED}). {where}"
