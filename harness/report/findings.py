"""What a study's runs say, as numbers: verdicts, series for the figures, the differences between arms that are no finding.

An arm without finished runs, a figure that some runs lack, a comparison that cannot be made yet: each is left out and
named in the notes. Nothing is filled in.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.evaluation.metric import Metric
from harness.report.confounds import Fact, differing_fields, facts, protocol, tested
from harness.runs.records import ArmRecord, DecodeRow
from harness.study.results import RunResult, StudyResults
from harness.study.statistics import (
    ALPHA,
    Contrast,
    Mean,
    Noise,
    Values,
    bootstrap,
    contrasts,
    mean_interval,
    pareto_front,
    residual_deviation,
    without,
)
from harness.study.tuning import Optimum, as_named, optimum, parabola

CURVE_POINTS = 60  # of a curve, at most


@dataclass(frozen=True)
class Arm:
    """An arm and its finished, evaluated runs."""

    name: str
    info: ArmRecord
    runs: list[RunResult]  # by seed, those whose test evaluation has the metric; none: nothing has finished
    mean: Mean | None  # of the study's metric on the test split

    def summary(self, key: str) -> Any:
        """A figure of the summary that all seeds share; None without a run."""
        return dict(self.runs[0].summary)[key] if self.runs else None

    def test(self, metric: Metric) -> float | None:
        """Mean over the seeds of a figure of the test evaluation; None where a run lacks it."""
        values = [metric.of(run.evaluation()) for run in self.runs]
        found = [value for value in values if value is not None]
        return statistics.fmean(found) if found and len(found) == len(values) else None


@dataclass(frozen=True)
class Verdict:
    """A comparison, and what another sample of test text would have done to it."""

    contrast: Contrast
    sentence: str
    noise: Noise | None  # bits per byte, of the losses averaged over `noise_seeds`
    noise_seeds: list[int]
    no_noise: str | None  # why there is none


@dataclass(frozen=True)
class Best:
    """The best mean of some arms, and which of the others are told apart from it.

    Whoever is named best was chosen by these very results. An arm is worse where its difference from the best, tested two
    sided, is significant at 5 % over the number of all such differences in the report (Bonferroni): then the truly best
    arm is among the best and those that are not told apart in 95 % of studies, whichever of them comes out on top.
    """

    level: str | None  # of the budget that these arms fill; None: all arms but references
    arms: list[str]  # from best to worst
    even: list[str]  # not told apart from the best
    worse: list[str]
    comparisons: int  # that the correction is for; 0: there are no error bars


@dataclass(frozen=True)
class CurvePoint:
    """The mean over seeds at one place, and the lowest and highest seed."""

    x: float
    mean: float
    low: float
    high: float
    n: int


Curves = dict[str, list[CurvePoint]]  # by arm


@dataclass(frozen=True)
class Sweep:
    """One arm's learning rates at one budget."""

    arm: str
    tokens: int
    losses: dict[float, float]  # rate -> validation loss
    best: Optimum | None  # None: fewer than three rates
    chosen: float | None  # what the main runs took

    @property
    def decides(self) -> bool:
        """Whether the main runs took their rate from this sweep."""
        return self.best is not None and self.chosen is not None and math.isclose(self.best.lr, self.chosen, rel_tol=0.01)

    def parabola(self, points: int = 33) -> list[tuple[float, float]]:
        """Through the lowest and its neighbours, in log(rate); none where the lowest is at an edge."""
        curve = parabola(self.losses)
        if curve is None:
            return []
        first, last = curve.x[0], curve.x[-1]
        grid = [first + (last - first) * step / (points - 1) for step in range(points)]
        return [(math.exp(x), curve.at(x)) for x in grid]


@dataclass(frozen=True)
class SharedRate:
    """The arms at one learning rate for all, each at its whole budget."""

    lr: float
    values: dict[str, dict[int, float]]  # arm -> seed -> the metric on the test split
    means: dict[str, Mean]
    verdicts: list[Contrast]  # the declared pairs, not part of the declared family


@dataclass(frozen=True)
class Findings:
    """All that is reported."""

    results: StudyResults
    arms: list[Arm]
    baseline: str | None  # whose curves the others' are subtracted from
    declared: list[Verdict]
    looked_at: list[Verdict]  # neither declared nor corrected
    best: list[Best]  # by level where there are several, then of all
    sigma: float | None  # pooled
    dof: int
    front: list[str]
    decode: list[DecodeRow]  # the fastest path of each arm, context and batch
    curves: Curves
    curve_unit: str
    curve_gaps: Curves  # minus the baseline's of the same seed
    positions: Curves  # test loss in nats by context tokens
    position_gaps: Curves
    beyond: Curves  # loss on the same targets by context, from half the training length on
    training_length: int | None
    staircase: list[tuple[str, Verdict | None]]  # an arm and the step to it
    sweeps: list[Sweep]
    shared: SharedRate | None
    extras: dict[str, dict[str, dict[str, Mean]]]  # extra -> arm -> figure -> mean over seeds
    facts: list[Fact]
    fields: list[Fact]  # of the configurations, those that differ
    notes: list[str]  # what is missing or went wrong

    @property
    def metric(self) -> Metric:
        return self.results.metric

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def find(results: StudyResults) -> Findings:
    """Work everything out. Raises UserError when no run has finished."""
    values = results.values()
    if not values:
        raise UserError(
            f"{results.folder} holds no finished and evaluated run yet, so there is nothing to report: let "
            f"{results.record['command'] or 'python scripts/run_study.py'} end"
        )
    apart = [name for name, info in results.record["arms"].items() if info.get("converted")]
    pooled = without(values, apart) or values
    arms = [_arm(results, name, _mean(values, pooled, name)) for name in results.record["arms"]]
    done = [arm for arm in arms if arm.runs]
    runs = {arm.name: arm.runs for arm in done}
    baseline = next((arm.name for arm in done if arm.info["reference"]), done[0].name) if len(done) > 1 else None
    declared, others, lacking = _pairs(results, values, baseline)
    found = contrasts(values, primary=declared, other=others, apart=apart)
    by_arm = {arm.name: arm for arm in arms}
    verdicts = [_verdict(contrast, by_arm, results.metric) for contrast in found]
    sigma, dof = residual_deviation(pooled)
    positions, beyond = _by_context(done)
    curve_key = "val/loss" if len({arm.summary("tokenizer_fingerprint") for arm in done}) == 1 else "val/bits_per_byte"
    curves = {arm.name: [_curve(run, curve_key) for run in arm.runs] for arm in done}
    return Findings(
        results=results,
        arms=arms,
        baseline=baseline,
        declared=[verdict for verdict in verdicts if verdict.contrast.primary],
        looked_at=[verdict for verdict in verdicts if not verdict.contrast.primary],
        best=_best(results, values, by_arm, apart),
        sigma=sigma,
        dof=dof,
        front=_front(done, results.metric),
        decode=_fastest(results, {arm.name for arm in done}),
        curves={name: _over_seeds(of_seeds) for name, of_seeds in curves.items()},
        curve_unit="nats per token" if curve_key == "val/loss" else "bits per byte",
        curve_gaps=_gaps(done, curves, baseline),
        positions={name: _over_seeds(of_seeds) for name, of_seeds in positions.items()},
        position_gaps=_gaps(done, positions, baseline),
        beyond={name: _over_seeds(of_seeds) for name, of_seeds in beyond.items()},
        training_length=_only(arm.runs[0].config["model"]["max_seq_len"] for arm in done),
        staircase=_staircase(results, verdicts, values),
        sweeps=_sweeps(results),
        shared=_shared(results, declared),
        extras=_extras(done),
        facts=facts(runs),
        fields=differing_fields(runs),
        notes=_notes(results, arms) + lacking,
    )


def _arm(results: StudyResults, name: str, mean: Mean | None) -> Arm:
    runs = [run for run in results.runs if run.arm == name and results.value(run) is not None]
    return Arm(name, results.record["arms"][name], sorted(runs, key=lambda run: run.seed), mean)


def _front(arms: Sequence[Arm], metric: Metric) -> list[str]:
    """The arms with the best mean up to their cache's size."""
    sizes = {arm.name: float(arm.summary("cache_bytes_per_token")) for arm in arms}
    return pareto_front([(arm.name, sizes[arm.name], metric.cost(arm.mean.mean)) for arm in arms if arm.mean])


def _only(values: Iterable[Any]) -> Any:
    """The one value that all share, else None."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


# --- what is missing -------------------------------------------------------------------------------------------------


def _notes(results: StudyResults, arms: Sequence[Arm]) -> list[str]:
    notes = []
    if results.missing:
        total = len(results.runs) + results.missing
        notes.append(f"{results.missing} of {total} runs are not finished: this is a report of the other {len(results.runs)}")
    if unfinished := [arm.name for arm in arms if not arm.runs]:
        notes.append(f"no finished run of {', '.join(unfinished)}")
    if unscored := [run.folder.name for run in results.runs if run.evaluation() is None]:
        notes.append(f"not evaluated on the test split, so left out: {', '.join(unscored)}")
    if lacking := [run.folder.name for run in results.runs if run.evaluation() and results.value(run) is None]:
        notes.append(f"the test evaluation has no {results.metric.unit}, so left out: {', '.join(lacking)}")
    protocols: dict[str, list[str]] = {}
    for run in (run for arm in arms for run in arm.runs):
        protocols.setdefault(protocol(run), []).append(run.folder.name)
    if len(protocols) > 1:
        usual = max(protocols, key=lambda protocol: len(protocols[protocol]))
        others = "; ".join(f"{', '.join(runs)} ({how})" for how, runs in protocols.items() if how != usual)
        notes.append(
            f"the test split was not scored alike in all runs, so the comparisons below do not hold: most with {usual}, "
            f"but {others}; score these again with eval_model.py as the others were"
        )
    counts = {len(arm.runs) for arm in arms if arm.runs}
    if len(counts) > 1:
        notes.append(
            "the arms have different numbers of seeds: " + ", ".join(f"{a.name} {len(a.runs)}" for a in arms if a.runs)
        )
    for sweep in _sweeps(results):
        if sweep.best is not None and sweep.best.at_edge and sweep.decides:
            notes.append(
                f"the rate of {sweep.arm}, {sweep.best.lr:g}, is at the edge of those that were tried "
                f"({min(sweep.losses):g} to {max(sweep.losses):g}): a better one may lie beyond, and this arm be tuned worse "
                f"than the others"
            )
    for arm in arms:
        if len({run.summary["setup_hash"] for run in arm.runs}) > 1:
            notes.append(f"the runs of {arm.name} differ in more than their seed: they are no repetitions of one setup")
    return notes


# --- comparisons -----------------------------------------------------------------------------------------------------


def _pairs(
    results: StudyResults, values: Values, baseline: str | None
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """Declared pairs that can be compared, others worth a look, and notes on those that cannot be."""
    declared, notes = [], []
    for a, b in results.record["contrasts"]:
        if absent := [arm for arm in (a, b) if arm not in values]:
            notes.append(f"the declared comparison of {a} with {b} cannot be made yet: no run of {' and '.join(absent)}")
        elif not values[a].keys() & values[b].keys():
            notes.append(f"the declared comparison of {a} with {b} cannot be made yet: they have no seed in common")
        else:
            declared.append((a, b))
    stairs = results.record["staircase"] or []
    steps = [(arm, before) for before, arm in itertools.pairwise(stairs)]
    others = steps or ([(arm, baseline) for arm in values if baseline and not declared])
    taken = {frozenset(pair) for pair in declared}
    others = [
        (a, b)
        for a, b in others
        if frozenset((a, b)) not in taken and a != b and a in values and b in values and values[a].keys() & values[b].keys()
    ]
    return declared, others, notes


def _best(results: StudyResults, values: Values, arms: Mapping[str, Arm], apart: Sequence[str]) -> list[Best]:
    """At each level of several, and of all arms that are no references; none where there is nothing to choose from."""
    metric = results.metric
    infos = {name: info for name, info in results.record["arms"].items() if name in values}
    levels = dict.fromkeys(info["level"] for info in results.record["arms"].values() if info["level"] is not None)
    groups: list[tuple[str | None, list[str]]] = []
    for level in [*levels, None] if len(levels) > 1 else [None]:
        names = [name for name, info in infos.items() if level in (None, info["level"]) and not info["reference"]]
        if len(names) > 1:
            means = {name: mean.mean for name in names if (mean := arms[name].mean) is not None}
            groups.append((level, sorted(means, key=lambda name: metric.cost(means[name]))))
    pairs = {
        frozenset((names[0], name)): (names[0], name)
        for _, names in groups
        for name in names[1:]
        if values[names[0]].keys() & values[name].keys()
    }
    found = {frozenset((c.a, c.b)): c for c in contrasts(values, primary=(), other=list(pairs.values()), apart=apart)}
    tested = sum(contrast.p is not None for contrast in found.values())

    def is_worse(best: str, name: str) -> bool:
        contrast = found.get(frozenset((best, name)))
        if contrast is None or contrast.p is None:
            return False
        ahead = contrast.difference if contrast.a == best else -contrast.difference
        return contrast.p * tested < ALPHA and metric.better(ahead)

    return [
        Best(
            level,
            names,
            [name for name in names[1:] if not is_worse(names[0], name)],
            [name for name in names[1:] if is_worse(names[0], name)],
            tested,
        )
        for level, names in groups
    ]


def _verdict(contrast: Contrast, arms: Mapping[str, Arm], metric: Metric) -> Verdict:
    noise, seeds, why = _noise(arms[contrast.a], arms[contrast.b])
    return Verdict(contrast, contrast.sentence(metric), noise, seeds, why)


def _noise(a: Arm, b: Arm) -> tuple[Noise | None, list[int], str | None]:
    """The bootstrap of two arms over segments of the test split, of losses averaged over the seeds both have."""
    of_a, of_b = ({run.seed: run.segments() for run in arm.runs} for arm in (a, b))
    seeds = [seed for seed in of_a if of_a[seed] is not None and of_b.get(seed) is not None]
    if not seeds:
        return None, [], "no segment losses are stored for a common seed"
    found = [(of_a[seed], of_b[seed]) for seed in seeds]
    sizes = [segments["bytes"] for pair in found for segments in pair if segments is not None]
    if any(size != sizes[0] for size in sizes):
        return None, [], "their segments are cut differently"
    nats_a, nats_b = (
        np.mean([pair[which]["nats"] for pair in found], axis=0)  # type: ignore[index]
        for which in (0, 1)
    )
    try:
        return bootstrap(nats_a, nats_b, sizes[0]), seeds, None
    except UserError as error:
        return None, [], str(error).partition(":")[0]


def _staircase(results: StudyResults, verdicts: Sequence[Verdict], values: Values) -> list[tuple[str, Verdict | None]]:
    """The finished arms in the order of their changes. A step over an unfinished arm has no verdict."""
    by_pair = {(verdict.contrast.a, verdict.contrast.b): verdict for verdict in verdicts}
    steps: list[tuple[str, Verdict | None]] = []
    for before, arm in itertools.pairwise([None, *(results.record["staircase"] or [])]):
        if arm is not None and arm in values:
            steps.append((arm, by_pair.get((arm, before)) if before is not None else None))
    return steps if len(steps) > 1 else []


# --- series ----------------------------------------------------------------------------------------------------------


def _mean(values: Values, pooled: Values, arm: str) -> Mean | None:
    """Of an arm that shares the others' variance with their error bar; of one that does not, the plain mean."""
    if arm not in values:
        return None
    return mean_interval(pooled, arm) if arm in pooled else mean_interval({arm: values[arm]}, arm)


def _curve(run: RunResult, key: str) -> dict[float, float]:
    """tokens -> value; those that the weights had seen before count too."""
    before = run.summary.get("initial_tokens", 0)
    return {float(line["tokens"] + before): float(line[key]) for line in run.metrics if line.get(key) is not None}


def _over_seeds(curves: Sequence[Mapping[float, float]]) -> list[CurvePoint]:
    """At the places that every seed has, thinned out evenly, the last one kept."""
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    step = max(1, math.ceil(len(common) / CURVE_POINTS))
    kept = common[::-1][::step][::-1]
    points = []
    for x in kept:
        values = [curve[x] for curve in curves]
        points.append(CurvePoint(x, statistics.fmean(values), min(values), max(values), len(values)))
    return points


def _gaps(arms: Sequence[Arm], curves: Mapping[str, Sequence[Mapping[float, float]]], baseline: str | None) -> Curves:
    """Differences from the baseline's curve of the same seed."""
    if baseline is None or baseline not in curves:
        return {}
    seeds = {arm.name: [run.seed for run in arm.runs] for arm in arms}
    reference = dict(zip(seeds[baseline], curves[baseline], strict=False))
    gaps: Curves = {}
    for arm, of_seeds in curves.items():
        pairs = [(curve, reference[s]) for s, curve in zip(seeds[arm], of_seeds, strict=False) if s in reference]
        points = _over_seeds([{x: c[x] - r[x] for x in c if x in r} for c, r in pairs])
        if arm != baseline and points:
            gaps[arm] = points
    return gaps


def _by_context(arms: Sequence[Arm]) -> tuple[dict[str, list[dict[float, float]]], dict[str, list[dict[float, float]]]]:
    """Per arm and seed: loss by context tokens within the training length, and on the same targets beyond it.

    A bin of contexts stands at its geometric middle. Arms in which one seed lacks the figures are left out.
    """
    within: dict[str, list[dict[float, float]]] = {}
    beyond: dict[str, list[dict[float, float]]] = {}
    for arm in arms:
        records = [tested(run) for run in arm.runs]
        if all(record.get("loss_by_position") for record in records):
            within[arm.name] = [
                {math.sqrt(low * high): loss for low, high, loss in record["loss_by_position"] if loss is not None}
                for record in records
            ]
        extras = [(record.get("extras") or {}).get("beyond") for record in records]
        if all(extras):
            beyond[arm.name] = [
                {math.sqrt(entry["low"] * entry["high"]): entry["loss"] for entry in extra["bins"]} for extra in extras if extra
            ]
    return within, beyond


def _fastest(results: StudyResults, arms: set[str]) -> list[DecodeRow]:
    """Of several paths that decode the same the fastest, as a user would choose."""
    best: dict[tuple[str, int, int], DecodeRow] = {}
    for row in results.decode or []:
        key = (row["arm"], row["context"], row["batch"])
        if row["arm"] in arms and (key not in best or row["milliseconds"] < best[key]["milliseconds"]):
            best[key] = row
    return list(best.values())


# --- learning rates --------------------------------------------------------------------------------------------------


def _sweeps(results: StudyResults) -> list[Sweep]:
    """Every arm's at every budget that was swept, in the order of the arms."""
    losses: dict[tuple[str, int], dict[float, float]] = {}
    for run in results.sweep:
        losses.setdefault((run.arm, run.summary["tokens"]), {})[run.lr] = run.summary["loss"]
    order = [*results.record["arms"]]
    return [
        Sweep(arm, tokens, found, optimum(found) if len(found) > 2 else None, results.record["chosen_lr"].get(arm))
        for (arm, tokens), found in sorted(losses.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
        if len(found) > 1
    ]


def _shared(results: StudyResults, declared: Sequence[tuple[str, str]]) -> SharedRate | None:
    """Runs of the sweep and of the study at the shared rate, if they had the study's whole budget."""
    shared_lr = results.record["shared_lr"]
    if not results.record["chosen_lr"] or shared_lr is None:
        return None
    lr = as_named(shared_lr)
    budget = {run.arm: run.summary["tokens"] for run in results.runs}
    values: dict[str, dict[int, float]] = {}
    for run in [*results.sweep, *results.runs]:
        value = results.value(run)
        if value is not None and math.isclose(run.lr, lr) and run.summary["tokens"] == budget.get(run.arm):
            values.setdefault(run.arm, {})[run.seed] = value
    if len(values) < 2:
        return None
    ordered = {arm: values[arm] for arm in results.record["arms"] if arm in values}
    pairs = [(a, b) for a, b in declared if a in values and b in values and values[a].keys() & values[b].keys()]
    means = {arm: mean_interval(ordered, arm) for arm in ordered}
    return SharedRate(lr, ordered, means, contrasts(ordered, primary=(), other=pairs))


# --- extras ----------------------------------------------------------------------------------------------------------


def _extras(arms: Sequence[Arm]) -> dict[str, dict[str, dict[str, Mean]]]:
    """The plain numbers of each extra, over the seeds that have them."""
    found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}  # extra -> figure -> arm -> seed -> value
    for arm in arms:
        for run in arm.runs:
            for extra, figures in (tested(run).get("extras") or {}).items():
                plain = figures if isinstance(figures, Mapping) else {}
                plain = _recall(plain) if extra == "recall" else plain
                for figure, value in plain.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                        by_arm = found.setdefault(extra, {}).setdefault(figure, {})
                        by_arm.setdefault(arm.name, {})[run.seed] = float(value)
    tables: dict[str, dict[str, dict[str, Mean]]] = {}
    for extra, by_figure in found.items():
        for figure, values in by_figure.items():
            for name in values:
                tables.setdefault(extra, {}).setdefault(name, {})[figure] = mean_interval(values, name)
    return tables


def _recall(figures: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers of harness/evaluation/probes/recall.py that arms are compared by, under names for people."""
    found: dict[str, float] = {}
    for task in ("passkey", "copying"):
        for entry in figures.get(task) or []:
            found[f"{task} in {entry['length']}: share right"] = entry["accuracy"]
            found[f"{task} in {entry['length']}: nats gained"] = entry["gain"]
    if answers := figures.get("answers"):
        found["answers: share right"] = answers["accuracy"]
        found["answers: share by guessing"] = answers["chance"]
        if answers.get("newest") is not None:  # what a model gets right that always says the newest value
            found["answers: share by saying the newest value"] = answers["newest"]
        found |= {f"answers of {entry['pairs']} pairs: share right": entry["accuracy"] for entry in answers["by_pairs"]}
    return found
