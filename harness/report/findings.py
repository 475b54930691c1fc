"""What a study's runs say, as numbers: verdicts, series for the figures, the differences between arms that are no finding.

An arm without finished runs, a figure that some runs lack, a comparison that cannot be made yet: each is left out and
named in the notes. Nothing is filled in.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.config.schema import EXTRAS
from harness.errors import UserError
from harness.evaluation.metric import BITS_PER_BYTE, LOSS, METRICS, PERPLEXITY, Metric
from harness.files.text import counted
from harness.report.confounds import Fact, differing_fields, facts, protocol, tested
from harness.runs.records import ArmRecord, DecodeRow
from harness.study.evaluation_noise import FEWEST_CLUSTERS, Noise, bootstrap
from harness.study.history import additions
from harness.study.results import LENGTH, RunResult, StudyResults, bytes_at_length
from harness.study.statistics import (
    ALPHA,
    Contrast,
    Mean,
    Pair,
    Trend,
    Values,
    can_be_compared,
    contrasts,
    equal_variances,
    mean_interval,
    pareto_front,
    residual_deviation,
    trends,
)
from harness.study.tuning import Doubt, Optimum, as_named, doubt, optimum, parabola

if TYPE_CHECKING:
    from harness.evaluation.probes import Probe

CURVE_POINTS = 60  # of a curve, at most
FEWEST_RUNS = 8  # that a correlation is said of


@dataclass(frozen=True)
class ArmFindings:
    """An arm and its finished, evaluated runs."""

    name: str
    info: ArmRecord
    runs: list[RunResult]  # by seed, those whose test evaluation has the metric; none: nothing has finished
    mean: Mean | None  # of the study's metric on the test split
    also: dict[str, Mean]  # in nats per token and bits per byte, by the metric's name, where they are not the study's own

    def summary(self, key: str) -> Any:
        """A figure of the summary that all seeds share; None without a run."""
        return dict(self.runs[0].summary)[key] if self.runs else None

    @property
    def cache_context(self) -> int | None:
        """Tokens that its cache was measured for; None without a run, or where its record is older than that."""
        return self.runs[0].summary.get("cache_context") if self.runs else None

    def test(self, metric: Metric) -> float | None:
        """Mean over the seeds of a figure of the test evaluation; None where a run lacks it."""
        values = [metric.of(run.evaluation()) for run in self.runs]
        found = [value for value in values if value is not None]
        return statistics.fmean(found) if found and len(found) == len(values) else None


@dataclass(frozen=True)
class Verdict:
    """A comparison, and what another draw of the test text would have done to it."""

    contrast: Contrast
    sentence: str
    also: dict[str, Contrast]  # the same difference in the other units, by their names
    exploratory: str | None  # why it is, though it stands among the declared ones
    noise: Noise | None  # bits per byte, of the losses averaged over `noise_seeds`
    noise_seeds: list[int]
    noise_units: str  # what was drawn: documents, or segments of the same ones
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
CurvesOfSeeds = dict[str, dict[int, dict[float, float]]]  # arm -> seed -> x -> y


@dataclass(frozen=True)
class Sweep:
    """One arm's learning rates at one budget."""

    arm: str
    tokens: int
    losses: dict[float, float]  # rate -> validation loss
    best: Optimum | None  # None: fewer than three rates
    chosen: float | None  # what the main runs took
    doubt: Doubt | None  # of the best one, by the deviation of the main runs' validation losses

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
    means: dict[str, Mean]  # of the metric on the test split
    also: dict[str, dict[str, Mean]]  # in the other units, by their names
    verdicts: list[Contrast]  # the declared pairs, not part of the declared family


class Findings:
    """All that is reported of a study. What takes more than a look is worked out when it is first asked for."""

    def __init__(self, results: StudyResults) -> None:
        """Raises UserError when no run has finished, or none has the metric."""
        self.results, self.metric, self.values = results, results.metric, results.values()
        infos = results.record["arms"]
        if not self.values and any(run.evaluation() for run in results.runs):
            raise UserError(
                f"no finished run of {results.folder} has {self.metric.unit} (metric={self.metric.name}) in its test evaluation"
                f": give the study a text and extras that measure it, or another metric"
            )
        if not self.values:
            rates = f", only {counted(len(results.sweep), 'run')} that tried learning rates" if results.sweep else ""
            raise UserError(
                f"{results.folder} holds no finished and evaluated run yet{rates}, so there is nothing to report: let "
                f"{results.record['command'] or 'python scripts/run_study.py'} end"
            )
        self.converted = [name for name, info in infos.items() if info.get("converted")]
        self.lineages = results.lineages()
        self.added = additions(results.record)
        self._kinds: dict[str, Any] = {"apart": self.converted, "lineages": self.lineages}
        self.sigma, self.dof = residual_deviation(self.values, **self._kinds)
        self.unequal = equal_variances(self.values, **self._kinds)
        self.also = self._also()
        scored = [run for run in results.runs if results.value(run) is not None]
        self.arms = [
            ArmFindings(
                name,
                info,
                sorted((run for run in scored if run.arm == name), key=lambda run: run.seed),
                self.mean_of(name, self.values),
                {metric: mean for metric, values in self.also.items() if (mean := self.mean_of(name, values)) is not None},
            )
            for name, info in infos.items()
        ]
        self.done = [arm for arm in self.arms if arm.runs]
        references = [arm.name for arm in self.done if arm.info["reference"]]
        # Whose curves the others' are subtracted from.
        self.baseline = [*references, self.done[0].name][0] if len(self.done) > 1 else None

    def _also(self) -> dict[str, Values]:
        """Of a study of losses what the literature speaks besides: nats per token, for one tokenizer, and bits per byte."""
        if self.metric not in (LOSS, BITS_PER_BYTE, PERPLEXITY):
            return {}
        tokenizers = {run.summary["tokenizer_fingerprint"] for run in self.results.runs}
        found: dict[str, Values] = {}
        for metric in (LOSS, BITS_PER_BYTE):
            values = self.results.values(metric)
            whole = {arm: of_arm.keys() for arm, of_arm in values.items()} == {a: v.keys() for a, v in self.values.items()}
            if metric is not self.metric and whole and (metric is BITS_PER_BYTE or len(tokenizers) == 1):
                found[metric.name] = values
        return found

    @cached_property
    def perplexities(self) -> Values:
        return self.results.values(PERPLEXITY)

    def mean_of(self, name: str, values: Values) -> Mean | None:
        """An arm's mean of any figure; None where it has none."""
        return mean_interval(values, name, **self._kinds) if name in values else None

    def _comparable(self, pair: Pair) -> bool:
        return can_be_compared(self.values, *pair, self.lineages)

    def arm(self, name: str) -> ArmFindings:
        return next(arm for arm in self.arms if arm.name == name)

    @cached_property
    def _declared_pairs(self) -> tuple[list[Pair], list[str]]:
        """Those that can be compared, and notes on those that cannot be."""
        declared, notes = [], []
        for a, b in self.results.record["contrasts"]:
            if hindrance := self._hindrance((a, b)):
                notes.append(f"the declared comparison of {a} with {b} cannot be made yet: {hindrance}")
            else:
                declared.append((a, b))
        return declared, notes

    def _hindrance(self, *pairs: Pair) -> str | None:
        """Why these cannot all be compared yet."""
        if absent := [arm for arm in dict.fromkeys(itertools.chain(*pairs)) if arm not in self.values]:
            return f"no run of {' and '.join(absent)}"
        apart = [
            f"{a} and {b} descend from runs of {self.lineages.get(a, a)}, and they have no seed in common"
            for a, b in pairs
            if not self._comparable((a, b))
        ]
        return "; ".join(apart) or None

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Of the declared comparisons, then of those added after a look and of others that are worth one."""
        named, _ = self._declared_pairs
        late = {pair: reason for pair in named if (reason := self.added.reason(*pair)) is not None}
        declared = [pair for pair in named if pair not in late]
        steps = [(arm, before) for before, arm in itertools.pairwise(self.results.record["staircase"] or [])]
        others = steps or [(arm, self.baseline) for arm in self.values if self.baseline and not named]
        taken = [{*pair} for pair in named]
        others = [*late, *((a, b) for a, b in others if {a, b} not in taken and a != b and self._comparable((a, b)))]
        margin = self.results.record.get("margin")
        found = contrasts(self.values, primary=declared, other=others, margin=margin, **self._kinds)
        in_others = {
            name: contrasts(values, primary=declared, other=others, **self._kinds) for name, values in self.also.items()
        }
        verdicts = []
        for place, contrast in enumerate(found):
            also = {name: of_unit[place] for name, of_unit in in_others.items()}
            noise = _noise(self.arm(contrast.a), self.arm(contrast.b))
            reason = late.get((contrast.a, contrast.b))
            sentence = contrast.sentence(self.metric, also) + (f"; exploratory: {reason}" if reason else "")
            verdicts.append(Verdict(contrast, sentence, also, reason, *noise))
        return verdicts

    @cached_property
    def trends(self) -> list[tuple[Trend, str, str | None]]:
        """With a sentence each, and why it is exploratory. Those whose arms have all been scored."""
        recorded = {
            name: trend
            for name, trend in self.results.record.get("trends", {}).items()
            if self._hindrance(*trend["of"]) is None
        }
        declared = {name: (trend["of"], trend["at"]) for name, trend in recorded.items()}
        told = []
        late = {name: reason for name, (pairs, _) in declared.items() if (reason := self._late_trend(name, pairs)) is not None}
        for trend in trends(self.values, declared, late=late, **self._kinds):
            reason = late.get(trend.name)
            sentence = trend.sentence(self.metric, recorded[trend.name]["over"])
            told.append((trend, sentence + (f"; exploratory: {reason}" if reason else ""), reason))
        return told

    def _late_trend(self, name: str, pairs: Sequence[Pair]) -> str | None:
        """Why a trend is exploratory; None if it is not."""
        late = "the trend was added after the first result" if name in self.added.trends else None
        return next(filter(None, (late, *(self.added.late(a, b) for a, b in pairs))), None)

    def _late(self) -> list[str]:
        """Sentences on what was not declared before the first result."""
        added, notes = self.added, []
        if not added.known:
            notes.append(
                "when arms, seeds and comparisons were declared, before the first result or after, is not known: study.json is "
                "of a version that kept no history"
            )
        late = [f"arm {arm}" for arm in added.arms]
        late += [f"seeds {', '.join(map(str, seeds))} of {arm}" for arm, seeds in added.seeds.items()]
        late += [f"the comparison of {a} with {b}" for a, b in added.contrasts]
        late += [f"the trend {name}" for name in added.trends]
        late += [f"the learning rate of {arm}" for arm in added.rates]
        late += ["the margin, and with it what is called the same"] if added.margin else []
        late += ["the metric, and with it every comparison"] if added.metric else []
        if late:
            notes.append(f"added or changed after the first result, so exploratory: {'; '.join(late)}")
        dropped = [f"the comparison of {', '.join(f'{a} with {b}' for a, b in added.dropped)}"] if added.dropped else []
        dropped += [f"the trend {name}" for name in added.dropped_trends]
        if dropped:
            notes.append(f"declared, and no longer asked for: {'; '.join(dropped)}")
        return notes

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
        compared = []
        for _, (best, *others) in groups:
            pairs = [(best, name) for name in others if self._comparable((best, name))]
            compared.append(contrasts(self.values, primary=(), other=pairs, **self._kinds))
        tested = len({frozenset((each.a, each.b)) for found in compared for each in found if each.p is not None})
        ranked = []
        for (level, (best, *others)), found in zip(groups, compared, strict=True):
            beaten = [each for each in found if self.metric.better(each.difference)]
            worse = [each.b for each in beaten if each.p is not None and each.p * tested < ALPHA]
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

    @cached_property
    def at_length(self) -> dict[str, float]:
        """Cache bytes for each of LENGTH tokens, of every arm; none where no arm's differ from those at the model's context."""
        usual = {arm.name: arm.summary("cache_bytes_per_token") for arm in self.done}
        return per_token_at_length(usual, {arm.name: bytes_at_length(arm.runs[0].summary) for arm in self.done})

    @cached_property
    def front(self) -> list[str]:
        """The arms with the best mean up to their cache's size."""
        means = [(arm, arm.mean.mean) for arm in self.done if arm.mean is not None]
        return pareto_front([(arm.name, float(arm.summary("cache_bytes_per_token")), self.metric.cost(y)) for arm, y in means])

    @cached_property
    def decode(self) -> list[DecodeRow]:
        """Of several paths that decode the same the fastest, as a user would choose, of each arm, context and batch."""
        best: dict[tuple[str, int, int], DecodeRow] = {}
        for row in self.results.decode or []:
            key = (row["arm"], row["context"], row["batch"])
            if row["arm"] in self.values and (key not in best or row["milliseconds"] < best[key]["milliseconds"]):
                best[key] = row
        return list(best.values())

    @property
    def _curve_key(self) -> str:
        tokenizers = {arm.summary("tokenizer_fingerprint") for arm in self.done}
        return "val/loss" if len(tokenizers) == 1 else "val/bits_per_byte"

    @property
    def curve_unit(self) -> str:
        return "nats per token" if self._curve_key == "val/loss" else "bits per byte"

    def _of_seeds(self, curve: Callable[[RunResult], dict[float, float]]) -> CurvesOfSeeds:
        """Of the arms all of whose seeds have it."""
        found = {arm.name: {run.seed: curve(run) for run in arm.runs} for arm in self.done}
        return {arm: of_seeds for arm, of_seeds in found.items() if all(of_seeds.values())}

    @cached_property
    def curves(self) -> CurvesOfSeeds:
        """Validation loss along the training, in curve_unit."""
        return self._of_seeds(lambda run: _curve(run, self._curve_key))

    @cached_property
    def positions(self) -> CurvesOfSeeds:
        """Test loss in nats by context tokens, within the training length."""
        return self._of_seeds(_loss_by_position)

    @cached_property
    def beyond(self) -> CurvesOfSeeds:
        """Loss on the same targets by context, from half the training length on."""
        return self._of_seeds(_loss_beyond)

    @cached_property
    def copying(self) -> dict[str, dict[int, tuple[float, float]]]:
        """What repetition in the context saves a run and the run's figure of the metric, of those that have both."""
        gain = METRICS["repeats_gain"]
        if self.metric is gain:
            return {}
        gains = self.results.values(gain)
        shared = {arm: gains.get(arm, {}).keys() & of_seeds.keys() for arm, of_seeds in self.values.items()}
        return {
            arm: {seed: (gains[arm][seed], self.values[arm][seed]) for seed in sorted(seeds)}
            for arm, seeds in shared.items()
            if seeds
        }

    @property
    def copying_correlation(self) -> tuple[float, int] | None:
        """Of the two, each from its arm's mean, and of how many runs; None of fewer than FEWEST_RUNS or where one is flat."""
        several = [np.array([*points.values()]) for points in self.copying.values() if len(points) > 1]
        if sum(map(len, several)) < FEWEST_RUNS:
            return None
        apart = np.concatenate([points - points.mean(axis=0) for points in several])
        spread = np.sqrt(np.square(apart).sum(axis=0))
        return (float(np.prod(apart / spread, axis=1).sum()), len(apart)) if spread.all() else None

    @property
    def training_length(self) -> int | None:
        """That all arms share."""
        lengths: set[int] = {arm.runs[0].config["model"]["max_seq_len"] for arm in self.done}
        return lengths.pop() if len(lengths) == 1 else None

    def gaps(self, curves: CurvesOfSeeds) -> Curves:
        """Differences from the baseline's curve of the same seed."""
        reference = curves.get(self.baseline or "", {})
        differences: CurvesOfSeeds = {}
        for arm, of_seeds in curves.items():
            for seed in (seed for seed in of_seeds if seed in reference and arm != self.baseline):
                ours, theirs = of_seeds[seed], reference[seed]
                differences.setdefault(arm, {})[seed] = {x: ours[x] - theirs[x] for x in ours if x in theirs}
        return {arm: points for arm, points in over_seeds(differences).items() if points}

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """Every arm's at every budget that was swept, in the order of the arms."""
        losses: dict[tuple[str, int], dict[float, float]] = {}
        for run in self.results.sweep:
            losses.setdefault((run.arm, run.summary["tokens"]), {})[run.lr] = run.summary["loss"]
        validation: dict[str, dict[int, float]] = {}
        for run in self.results.runs:
            validation.setdefault(run.arm, {})[run.seed] = run.summary["loss"]
        sigma, _ = residual_deviation(validation, **self._kinds) if validation else (None, 0)
        order, chosen = [arm.name for arm in self.arms], self.results.record["chosen_lr"]
        return [
            Sweep(arm, tokens, found, optimum(found) if len(found) > 2 else None, chosen.get(arm), doubt(found, sigma))
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

        def at_rate(metric: Metric) -> dict[str, dict[int, float]]:
            values: dict[str, dict[int, float]] = {arm.name: {} for arm in self.arms}
            for run in [*self.results.sweep, *self.results.runs]:
                value = metric.of(run.evaluation())
                if value is not None and math.isclose(run.lr, lr) and run.summary["tokens"] == budget.get(run.arm):
                    values[run.arm][run.seed] = value
            return {arm: of_seeds for arm, of_seeds in values.items() if of_seeds}

        def means(values: Values) -> dict[str, Mean]:
            return {arm: mean_interval(values, arm, **self._kinds) for arm in values}

        values = at_rate(self.metric)
        if len(values) < 2:
            return None
        pairs = [pair for pair in self._declared_pairs[0] if can_be_compared(values, *pair, self.lineages)]
        also = {name: means(at_rate(METRICS[name])) for name in self.also}
        return SharedRate(lr, means(values), also, contrasts(values, primary=(), other=pairs, **self._kinds))

    @cached_property
    def extras(self) -> dict[str, dict[str, dict[str, Mean]]]:
        """extra -> arm -> figure -> mean over the seeds that have it: the plain numbers of each extra."""
        found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}  # extra -> figure -> arm -> seed -> value
        for run in (run for arm in self.done for run in arm.runs):
            for extra, figures in (tested(run).get("extras") or {}).items():
                plain, known = figures or {}, probe_of(extra)
                for figure, value in (known.compared(plain) if known else plain).items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                        by_arm = found.setdefault(extra, {}).setdefault(figure, {})
                        by_arm.setdefault(run.arm, {})[run.seed] = float(value)
        tables: dict[str, dict[str, dict[str, Mean]]] = {}
        for extra, by_figure in found.items():
            for figure, values in by_figure.items():
                for name in values:
                    tables.setdefault(extra, {}).setdefault(name, {})[figure] = mean_interval(values, name, **self._kinds)
        return tables

    @cached_property
    def floors(self) -> dict[str, dict[str, list[str]]]:
        """extra -> what was asked -> arms of which no seed is above its floor, so that the figure says nothing."""
        found: dict[str, dict[str, list[str]]] = {}
        for arm in self.done:
            of_seeds = [(tested(run).get("extras") or {}) for run in arm.runs]
            for extra in dict.fromkeys(name for extras in of_seeds for name in extras):
                marks = [dict(_floors(extras.get(extra))) for extras in of_seeds]
                for what in dict.fromkeys(what for each in marks for what in each):
                    if all(each.get(what) for each in marks):
                        found.setdefault(extra, {}).setdefault(what, []).append(arm.name)
        return found

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
        notes += self._late()
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
        for name, trend in results.record.get("trends", {}).items():
            if hindrance := self._hindrance(*trend["of"]):
                notes.append(f"the declared trend {name} cannot be told yet: {hindrance}")
        return notes + self._declared_pairs[1]


def per_token_at_length(usual: Mapping[str, float], sizes: Mapping[str, float | None]) -> dict[str, float]:
    """Every arm's cache bytes for each of LENGTH tokens; none where no arm's are other than usual, or a record is from before
    sizes were a curve."""
    of_each = {arm: size / LENGTH for arm, size in sizes.items() if size is not None}
    return of_each if of_each.keys() == usual.keys() and any(abs(of_each[arm] - usual[arm]) > 1 for arm in usual) else {}


def _noise(a: ArmFindings, b: ArmFindings) -> tuple[Noise | None, list[int], str, str | None]:
    """The bootstrap of two arms over the test split, of losses averaged over the seeds both have.

    Its clusters are the documents, where there are enough of them to draw from; else segments, which are other places in the
    same documents and no other text.
    """
    of_a, of_b = ({run.seed: run.segments() for run in arm.runs} for arm in (a, b))
    pairs = {seed: (mine, theirs) for seed, mine in of_a.items() if mine and (theirs := of_b.get(seed))}
    if not pairs:
        return None, [], "", "no segment losses are stored for a common seed"
    found = [segments for pair in pairs.values() for segments in pair]
    if any(segments["bytes"] != found[0]["bytes"] for segments in found):
        return None, [], "", "their segments are cut differently"
    sizes, documents = np.array(found[0]["bytes"]), next((s["documents"] for s in found if "documents" in s), None)
    nats_a, nats_b = (np.mean([pair[which]["nats"] for pair in pairs.values()], axis=0) for which in (0, 1))
    units = "segments of the same documents"
    if documents is not None:
        count = len({document for document, size in zip(documents, sizes, strict=True) if size})
        units = f"segments of the same {count:,} documents"
        if count >= FEWEST_CLUSTERS:
            units = f"{count:,} documents"
            nats_a, nats_b, sizes = (np.bincount(documents, weights=each) for each in (nats_a, nats_b, sizes))
    if (clusters := int((np.asarray(sizes) > 0).sum())) < FEWEST_CLUSTERS:
        return None, [], "", f"{clusters} clusters of text are too few for a bootstrap, which takes {FEWEST_CLUSTERS}"
    return bootstrap(nats_a, nats_b, sizes), [*pairs], units, None


def probe_of(extra: str) -> Probe | None:
    """Its words; None for one of another version."""
    from harness.evaluation.probes import probe  # with torch, a second that a report without extras does not take

    return probe(extra) if extra in EXTRAS else None


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


def over_seeds(curves: CurvesOfSeeds) -> Curves:
    """At the places that every seed has, thinned out evenly, the last one kept."""
    found: Curves = {}
    for arm, of_seeds in curves.items():
        common = sorted(set.intersection(*map(set, of_seeds.values())))
        step = max(1, math.ceil(len(common) / CURVE_POINTS))
        values_at = {x: [curve[x] for curve in of_seeds.values()] for x in common[::-1][::step][::-1]}
        found[arm] = [CurvePoint(x, statistics.fmean(ys), min(ys), max(ys), len(ys)) for x, ys in values_at.items()]
    return found


def _floors(figures: Any, what: str = "") -> Iterator[tuple[str, bool]]:
    """Every at_floor inside an extra's figures, and where it stands, as "passkey in 64"; nothing stands for the whole."""
    if isinstance(figures, Mapping):
        if isinstance(mark := figures.get("at_floor"), bool):
            yield what + (f" in {figures['length']}" if "length" in figures else ""), mark
        for name, part in figures.items():
            yield from _floors(part, name)
    elif isinstance(figures, list):
        for part in figures:
            yield from _floors(part, what)
