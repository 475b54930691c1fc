"""What a study's runs say, as numbers: verdicts, series for the figures, the differences between arms that are no finding.

An arm without finished runs, a figure that some runs lack, a comparison that cannot be made yet: each is left out and
named in the notes. Nothing is filled in.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    Pair,
    bootstrap,
    contrasts,
    have_common_seed,
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
CurvesOfSeeds = dict[str, list[dict[float, float]]]  # arm -> x -> y of each seed


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


class Findings:
    """All that is reported of a study. What takes more than a look is worked out when it is first asked for."""

    def __init__(self, results: StudyResults) -> None:
        """Raises UserError when no run has finished."""
        self.results, self.metric, self.values = results, results.metric, results.values()
        infos = results.record["arms"]
        if not self.values:
            raise UserError(
                f"{results.folder} holds no finished and evaluated run yet, so there is nothing to report: let "
                f"{results.record['command'] or 'python scripts/run_study.py'} end"
            )
        self.converted = [name for name, info in infos.items() if info.get("converted")]
        self._pooled = without(self.values, self.converted) or self.values
        self.sigma, self.dof = residual_deviation(self._pooled)
        self.arms = [Arm(name, info, self._runs_of(name), self._mean_of(name)) for name, info in infos.items()]
        self.done = [arm for arm in self.arms if arm.runs]
        references = [arm.name for arm in self.done if arm.info["reference"]]
        # Whose curves the others' are subtracted from.
        self.baseline = [*references, self.done[0].name][0] if len(self.done) > 1 else None

    def _runs_of(self, name: str) -> list[RunResult]:
        runs = [run for run in self.results.runs if run.arm == name and self.results.value(run) is not None]
        return sorted(runs, key=lambda run: run.seed)

    def _mean_of(self, name: str) -> Mean | None:
        """Of an arm that shares the others' variance with their error bar; of one that does not, the plain mean."""
        if name not in self.values:
            return None
        return mean_interval(self._pooled if name in self._pooled else {name: self.values[name]}, name)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    # --- comparisons -------------------------------------------------------------------------------------------------

    @cached_property
    def _declared_pairs(self) -> tuple[list[Pair], list[str]]:
        """Those that can be compared, and notes on those that cannot be."""
        declared, notes = [], []
        for a, b in self.results.record["contrasts"]:
            if absent := [arm for arm in (a, b) if arm not in self.values]:
                notes.append(f"the declared comparison of {a} with {b} cannot be made yet: no run of {' and '.join(absent)}")
            elif not have_common_seed(self.values, a, b):
                notes.append(f"the declared comparison of {a} with {b} cannot be made yet: they have no seed in common")
            else:
                declared.append((a, b))
        return declared, notes

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Of the declared comparisons, then of others that are worth a look."""
        declared, _ = self._declared_pairs
        steps = [(arm, before) for before, arm in itertools.pairwise(self.results.record["staircase"] or [])]
        others = steps or [(arm, self.baseline) for arm in self.values if self.baseline and not declared]
        taken = [{*pair} for pair in declared]
        others = [(a, b) for a, b in others if {a, b} not in taken and a != b and have_common_seed(self.values, a, b)]
        found = contrasts(self.values, primary=declared, other=others, apart=self.converted)
        return [
            Verdict(contrast, contrast.sentence(self.metric), *_noise(self.arm(contrast.a), self.arm(contrast.b)))
            for contrast in found
        ]

    @property
    def declared(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.contrast.primary]

    @property
    def looked_at(self) -> list[Verdict]:
        """Neither declared nor corrected."""
        return [verdict for verdict in self.verdicts if not verdict.contrast.primary]

    @cached_property
    def best(self) -> list[Best]:
        """At each level of several, then of all arms that are no references; none where there is nothing to choose from."""
        levels = dict.fromkeys(arm.info["level"] for arm in self.arms if arm.info["level"] is not None)
        groups: list[tuple[str | None, list[str]]] = []
        for level in [*levels, None] if len(levels) > 1 else [None]:
            of_level = [arm for arm in self.done if level in (None, arm.info["level"]) and not arm.info["reference"]]
            costs = {arm.name: self.metric.cost(arm.mean.mean) for arm in of_level if arm.mean is not None}
            if len(costs) > 1:
                groups.append((level, sorted(costs, key=lambda name: costs[name])))
        pairs = {
            frozenset((best, name)): (best, name)
            for _, (best, *others) in groups
            for name in others
            if have_common_seed(self.values, best, name)
        }
        found = {
            frozenset((contrast.a, contrast.b)): contrast
            for contrast in contrasts(self.values, primary=(), other=list(pairs.values()), apart=self.converted)
        }
        tested = sum(contrast.p is not None for contrast in found.values())

        def is_worse(best: str, name: str) -> bool:
            contrast = found.get(frozenset((best, name)))
            if contrast is None or contrast.p is None:
                return False
            ahead = contrast.difference if contrast.a == best else -contrast.difference
            return contrast.p * tested < ALPHA and self.metric.better(ahead)

        ranked = []
        for level, (best, *others) in groups:
            worse = [name for name in others if is_worse(best, name)]
            ranked.append(Best(level, [best, *others], [name for name in others if name not in worse], worse, tested))
        return ranked

    @cached_property
    def staircase(self) -> list[tuple[str, Verdict | None]]:
        """The finished arms in the order of their changes, with the step to each. One over an unfinished arm has no verdict."""
        by_pair = {(verdict.contrast.a, verdict.contrast.b): verdict for verdict in self.verdicts}
        stairs = self.results.record["staircase"] or []
        steps = [(arm, by_pair.get((arm, before))) for before, arm in zip(["", *stairs], stairs, strict=False)]
        finished = [(arm, verdict) for arm, verdict in steps if arm in self.values]
        return finished if len(finished) > 1 else []

    # --- costs -------------------------------------------------------------------------------------------------------

    @cached_property
    def front(self) -> list[str]:
        """The arms with the best mean up to their cache's size."""
        return pareto_front(
            [
                (arm.name, float(arm.summary("cache_bytes_per_token")), self.metric.cost(arm.mean.mean))
                for arm in self.done
                if arm.mean
            ]
        )

    @cached_property
    def decode(self) -> list[DecodeRow]:
        """Of several paths that decode the same the fastest, as a user would choose, of each arm, context and batch."""
        best: dict[tuple[str, int, int], DecodeRow] = {}
        for row in self.results.decode or []:
            key = (row["arm"], row["context"], row["batch"])
            if row["arm"] in self.values and (key not in best or row["milliseconds"] < best[key]["milliseconds"]):
                best[key] = row
        return list(best.values())

    # --- series ------------------------------------------------------------------------------------------------------

    @property
    def _curve_key(self) -> str:
        tokenizers = {arm.summary("tokenizer_fingerprint") for arm in self.done}
        return "val/loss" if len(tokenizers) == 1 else "val/bits_per_byte"

    @property
    def curve_unit(self) -> str:
        return "nats per token" if self._curve_key == "val/loss" else "bits per byte"

    def _of_seeds(self, curve: Callable[[RunResult], dict[float, float]]) -> CurvesOfSeeds:
        """Of the arms all of whose seeds have it."""
        found = {arm.name: [curve(run) for run in arm.runs] for arm in self.done}
        return {arm: of_seeds for arm, of_seeds in found.items() if all(of_seeds)}

    @cached_property
    def _curves(self) -> CurvesOfSeeds:
        return self._of_seeds(lambda run: _curve(run, self._curve_key))

    @cached_property
    def curves(self) -> Curves:
        return _means(self._curves)

    @cached_property
    def curve_gaps(self) -> Curves:
        return self._gaps(self._curves)

    @cached_property
    def _positions(self) -> CurvesOfSeeds:
        return self._of_seeds(_loss_by_position)

    @cached_property
    def positions(self) -> Curves:
        """Test loss in nats by context tokens, within the training length."""
        return _means(self._positions)

    @cached_property
    def position_gaps(self) -> Curves:
        return self._gaps(self._positions)

    @cached_property
    def beyond(self) -> Curves:
        """Loss on the same targets by context, from half the training length on."""
        return _means(self._of_seeds(_loss_beyond))

    @property
    def training_length(self) -> int | None:
        """That all arms share."""
        lengths: set[int] = {arm.runs[0].config["model"]["max_seq_len"] for arm in self.done}
        return lengths.pop() if len(lengths) == 1 else None

    def _gaps(self, curves: CurvesOfSeeds) -> Curves:
        """Differences from the baseline's curve of the same seed."""
        if self.baseline is None or self.baseline not in curves:
            return {}
        seeds = {arm.name: [run.seed for run in arm.runs] for arm in self.done}
        by_seed = {arm: dict(zip(seeds[arm], of_seeds, strict=True)) for arm, of_seeds in curves.items()}
        reference = by_seed.pop(self.baseline)
        gaps = {}
        for arm, of_seeds in by_seed.items():
            pairs = [(curve, reference[seed]) for seed, curve in of_seeds.items() if seed in reference]
            if points := _over_seeds([{x: ours[x] - theirs[x] for x in ours if x in theirs} for ours, theirs in pairs]):
                gaps[arm] = points
        return gaps

    # --- learning rates ----------------------------------------------------------------------------------------------

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """Every arm's at every budget that was swept, in the order of the arms."""
        losses: dict[tuple[str, int], dict[float, float]] = {}
        for run in self.results.sweep:
            losses.setdefault((run.arm, run.summary["tokens"]), {})[run.lr] = run.summary["loss"]
        order, chosen = [arm.name for arm in self.arms], self.results.record["chosen_lr"]
        return [
            Sweep(arm, tokens, found, optimum(found) if len(found) > 2 else None, chosen.get(arm))
            for (arm, tokens), found in sorted(losses.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
            if len(found) > 1
        ]

    @cached_property
    def shared(self) -> SharedRate | None:
        """Runs of the sweep and of the study at the shared rate, if they had the study's whole budget."""
        shared_lr = self.results.record["shared_lr"]
        if not self.results.record["chosen_lr"] or shared_lr is None:
            return None
        lr = as_named(shared_lr)
        budget = {run.arm: run.summary["tokens"] for run in self.results.runs}
        values: dict[str, dict[int, float]] = {arm.name: {} for arm in self.arms}
        for run in [*self.results.sweep, *self.results.runs]:
            value = self.results.value(run)
            if value is not None and math.isclose(run.lr, lr) and run.summary["tokens"] == budget.get(run.arm):
                values[run.arm][run.seed] = value
        values = {arm: of_seeds for arm, of_seeds in values.items() if of_seeds}
        if len(values) < 2:
            return None
        pairs = [pair for pair in self._declared_pairs[0] if have_common_seed(values, *pair)]
        means = {arm: mean_interval(values, arm) for arm in values}
        return SharedRate(lr, values, means, contrasts(values, primary=(), other=pairs))

    # --- what else there is ------------------------------------------------------------------------------------------

    @cached_property
    def extras(self) -> dict[str, dict[str, dict[str, Mean]]]:
        """extra -> arm -> figure -> mean over the seeds that have it: the plain numbers of each extra."""
        found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}  # extra -> figure -> arm -> seed -> value
        for run in (run for arm in self.done for run in arm.runs):
            for extra, figures in (tested(run).get("extras") or {}).items():
                plain = figures if isinstance(figures, Mapping) else {}
                for figure, value in (_recall(plain) if extra == "recall" else plain).items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                        by_arm = found.setdefault(extra, {}).setdefault(figure, {})
                        by_arm.setdefault(run.arm, {})[run.seed] = float(value)
        tables: dict[str, dict[str, dict[str, Mean]]] = {}
        for extra, by_figure in found.items():
            for figure, values in by_figure.items():
                for name in values:
                    tables.setdefault(extra, {}).setdefault(name, {})[figure] = mean_interval(values, name)
        return tables

    @cached_property
    def facts(self) -> list[Fact]:
        return facts({arm.name: arm.runs for arm in self.done})

    @cached_property
    def fields(self) -> list[Fact]:
        """Of the configurations, those that differ."""
        return differing_fields({arm.name: arm.runs for arm in self.done})

    @cached_property
    def notes(self) -> list[str]:
        """What is missing or went wrong."""
        results, there = self.results, len(self.results.runs)
        notes = []
        if lacking := results.missing:
            notes.append(f"{lacking} of {there + lacking} runs are not finished: this is a report of the other {there}")
        if unfinished := [arm.name for arm in self.arms if not arm.runs]:
            notes.append(f"no finished run of {', '.join(unfinished)}")
        if unscored := [run.folder.name for run in results.runs if run.evaluation() is None]:
            notes.append(f"not evaluated on the test split, so left out: {', '.join(unscored)}")
        if unlike := [run.folder.name for run in results.runs if run.evaluation() and results.value(run) is None]:
            notes.append(f"the test evaluation has no {self.metric.unit}, so left out: {', '.join(unlike)}")
        protocols: dict[str, list[str]] = {}
        for run in (run for arm in self.done for run in arm.runs):
            protocols.setdefault(protocol(run), []).append(run.folder.name)
        if len(protocols) > 1:
            usual = max(protocols, key=lambda protocol: len(protocols[protocol]))
            others = "; ".join(f"{', '.join(runs)} ({how})" for how, runs in protocols.items() if how != usual)
            notes.append(
                f"the test split was not scored alike in all runs, so the comparisons below do not hold: most with {usual}, "
                f"but {others}; score these again with eval_model.py as the others were"
            )
        if len({len(arm.runs) for arm in self.done}) > 1:
            counts = ", ".join(f"{arm.name} {len(arm.runs)}" for arm in self.done)
            notes.append(f"the arms have different numbers of seeds: {counts}")
        for sweep in self.sweeps:
            if sweep.best is not None and sweep.best.at_edge and sweep.decides:
                notes.append(
                    f"the rate of {sweep.arm}, {sweep.best.lr:g}, is at the edge of those that were tried "
                    f"({min(sweep.losses):g} to {max(sweep.losses):g}): a better one may lie beyond, and this arm be tuned "
                    f"worse than the others"
                )
        for arm in self.done:
            if len({run.summary["setup_hash"] for run in arm.runs}) > 1:
                notes.append(f"the runs of {arm.name} differ in more than their seed: they are no repetitions of one setup")
        return notes + self._declared_pairs[1]


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


def _curve(run: RunResult, key: str) -> dict[float, float]:
    """tokens -> value; those that the weights had seen before count too."""
    before = run.summary.get("initial_tokens", 0)
    return {float(line["tokens"] + before): float(line[key]) for line in run.metrics if line.get(key) is not None}


def _loss_by_position(run: RunResult) -> dict[float, float]:
    """Context tokens -> test loss; a bin of contexts stands at its geometric middle. Nothing where it was not measured."""
    bins = tested(run).get("loss_by_position") or []
    return {math.sqrt(low * high): loss for low, high, loss in bins if loss is not None}


def _loss_beyond(run: RunResult) -> dict[float, float]:
    """The same of contexts up to beyond the training length."""
    bins = ((tested(run).get("extras") or {}).get("beyond") or {"bins": []})["bins"]
    return {math.sqrt(entry["low"] * entry["high"]): entry["loss"] for entry in bins}


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


def _means(curves: CurvesOfSeeds) -> Curves:
    return {arm: _over_seeds(of_seeds) for arm, of_seeds in curves.items()}


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
