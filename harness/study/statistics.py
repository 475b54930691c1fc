"""Verdicts of an ablation: differences between arms with error bars that come from seeds.

A run of an arm is its mean and a residual of its own: what a seed sets (initial values and the order of the data) leaves so
little in common between arms (correlation 0.05, docs/RESULTS.md) that arms are compared as independent samples. Two
intervals stand beside each other, and the more cautious one decides:

- pooled: Student's, with one residual variance for all arms of the study. Few seeds become usable that way (six arms of three
  seeds give twelve degrees of freedom), at the price of an assumption: the variances are equal.
- own: Welch's (Biometrika 34, 1947), from the variances of the two arms alone. Its degrees of freedom are Satterthwaite's as
  if both arms had the smaller of their numbers of seeds: with the true numbers, an arm of two seeds beside one of five that
  scatters three times as widely covers 0.90 where 0.95 is promised.

Arms that descend from the same runs (converted from them, or trained on) are no independent samples: those runs' luck is in
all of them. Within such a lineage differences are taken seed by seed (the paired t test), and a lineage counts once in the
pooled variance and in the test of equal variances.

The declared comparisons are one family, corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979), and so are
their tests of equivalence: two one-sided tests at a declared margin (Schuirmann, Journal of Pharmacokinetics and
Biopharmaceutics 15, 1987). Whatever else is looked at is marked as such and uncorrected. Noise of the evaluation, given the
weights, is another thing (harness/study/evaluation_noise.py).
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.errors import UserError
from harness.evaluation.metric import METRICS, Metric
from harness.files.text import number

Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> its result
Lineages = Mapping[str, str]  # arm -> the arm whose runs its own come from; one that is not named stands for itself
Pair = tuple[str, str]

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000  # what would need more is not worth a number


@dataclass(frozen=True)
class Contrast:
    """One difference between two arms. All that rests on an error bar is None without one: where an arm has one seed."""

    a: str
    b: str
    primary: bool  # declared before the results were seen
    n_a: int  # seeds; within a lineage those that both arms have
    n_b: int
    paired: bool  # within a lineage, seed by seed
    difference: float  # a - b
    low: float | None = None  # 95 % interval of this difference alone, not corrected for the others: the wider of the two
    high: float | None = None
    own_half: float | None = None  # half of the interval from the two arms' own deviations
    pooled_half: float | None = None  # half of that from the pooled deviation; None within a lineage, and for arms apart
    p: float | None = None  # two-sided, uncorrected, the larger of the two
    p_holm: float | None = None  # over the declared contrasts; None for others
    resolved: bool | None = None  # primary: p_holm < 0.05; other: the interval excludes 0
    detectable: float | None = None  # the smallest true difference that so many seeds resolve with 80 % power
    margin: float | None = None  # declared: arms that differ by less are the same
    p_same: float | None = None  # of the two one-sided tests, the larger of the two; over the declared contrasts by Holm
    same: bool | None = None  # p_same < 0.05
    seeds_for_margin: int | None = None  # of each arm, to detect the margin with 80 % power; None: above MOST_SEEDS

    @property
    def n(self) -> int:
        """Seeds of the arm that has fewer."""
        return min(self.n_a, self.n_b)

    def size(self, metric: Metric, *, signed: bool = True) -> str:
        """The difference in words, ± half the 95 % interval."""
        difference = self.difference if signed else abs(self.difference)
        return f"{with_error(difference, self.low, self.high, metric.digits, sign='+' if signed else '')} {metric.unit}"

    def sentence(self, metric: Metric, also: Mapping[str, Contrast] | None = None) -> str:
        """The verdict in words. also: the same difference by other metrics, which are named by METRICS' names."""

        def size(*, signed: bool = True) -> str:
            others = []
            for name, other in (also or {}).items():  # a difference that speaks for the other arm keeps its sign
                unlike = METRICS[name].better(other.difference) != metric.better(self.difference)
                others.append(other.size(METRICS[name], signed=signed or unlike))
            return self.size(metric, signed=signed) + (f" ({', '.join(others)})" if others else "")

        against = f"{self.a} against {self.b}"
        if self.p is None:
            reason = "one seed: no error bar" if self.n == 1 else "no error bar: every seed repeats it exactly"
            if self.n == 1 < max(self.n_a, self.n_b):
                reason = f"one seed of {self.a if self.n_a == 1 else self.b}: no error bar"
            return f"{against}: {size()} ({reason})"

        n = f"{self.n_a}" if self.n_a == self.n_b else f"{self.n_a} and {self.n_b}"
        seeds = f"{n} seeds, paired within a lineage" if self.paired else f"{n} seeds"
        within = "" if self.margin is None else f"the same within {self.margin:g}"
        how = ", not a declared comparison" if self.p_holm is None else " after Holm"
        if self.resolved:
            verdict = "better" if metric.better(self.difference) else "worse"
            p = f"{_p(self.p if self.p_holm is None else self.p_holm)}{how}"
            and_yet = f", and yet {within} ({_p(self.p_same)})" if self.same and self.p_same is not None else ""
            return f"{self.a} is {size(signed=False)} {verdict} than {self.b} ({seeds}, {p}){and_yet}"
        if self.same and self.p_same is not None:
            return f"{self.a} and {self.b} are {within} {metric.unit}: {size()} ({seeds}, {_p(self.p_same)}{how})"

        notes = ["paired within a lineage"] if self.paired else []
        # The bar excludes 0 and yet nothing is resolved: without the reason the sentence would contradict itself.
        if self.p_holm is not None and self.p < ALPHA:
            notes.append(f"{_p(self.p_holm)} after Holm")
        note = f" ({', '.join(notes)})" if notes else ""
        found = f"{against}: {size()}, not resolved at n = {n}{note}"
        if within:
            found += f", nor {within}"
        if self.detectable is not None:
            found += f"; so many seeds detect {self.detectable:.{decimals_for(self.detectable, 2)}f} with 80 % power"
        if within:
            many = f"more than {MOST_SEEDS:,}" if self.seeds_for_margin is None else f"about {self.seeds_for_margin}"
            found += f", {self.margin:g} takes {many}"
        return found


@dataclass(frozen=True)
class Trend:
    """How a difference changes with a size: the slope of a - b over log2 of it. Error bars as those of a Contrast."""

    name: str
    pairs: tuple[Pair, ...]
    at: tuple[float, ...]  # the size of each pair's arms
    slope: float  # of the difference, for each doubling: least squares over the pairs
    differences: tuple[tuple[float, float | None], ...]  # of each pair, with half of its 95 % interval, the wider of the two
    low: float | None = None  # 95 % interval, the wider of the two
    high: float | None = None
    own_half: float | None = None
    pooled_half: float | None = None
    p: float | None = None  # two-sided, the larger of the two
    p_holm: float | None = None  # over the declared trends; None for others
    resolved: bool | None = None

    def sentence(self, metric: Metric, over: str) -> str:
        """The verdict in words."""
        where = (
            f"{self.name}: for each doubling of {over} ({', '.join(f'{size:g}' for size in self.at)}) the difference changes by"
        )
        verdict = "no error bar"
        if self.p is not None:
            p = _p(self.p) if self.p_holm is None else f"{_p(self.p_holm)} after Holm"
            verdict = p if self.resolved else "not resolved"
        return f"{where} {with_error(self.slope, self.low, self.high, metric.digits, sign='+')} {metric.unit} ({verdict})"


@dataclass(frozen=True)
class Mean:
    """One arm's mean over its seeds, and how they scatter."""

    mean: float
    low: float | None  # 95 % interval, the wider of the pooled and the arm's own; None with one seed
    high: float | None
    n: int  # seeds
    deviation: float | None  # of single runs, estimated from this arm alone; None with one seed


@dataclass(frozen=True)
class _Estimate:
    """A figure, its standard error and the degrees of freedom of its t distribution."""

    figure: float
    error: float
    dof: float

    @property
    def half(self) -> float:
        """Half of the 95 % interval."""
        return -_quantile(ALPHA / 2, self.dof) * self.error

    @property
    def p(self) -> float:
        """Against 0, two-sided."""
        return 2 * _below(-abs(self.figure) / self.error, self.dof)

    def p_same(self, margin: float) -> float:
        """Of two one-sided tests: that the figure lies at -margin or below, and at margin or above; the larger one."""
        return _below((abs(self.figure) - margin) / self.error, self.dof)

    def detectable(self, alpha: float) -> float:
        """The true figure that a two-sided test at this level finds with 80 % power, this error taken for the true one."""
        from scipy import special

        return float(special.nctdtrinc(self.dof, 1 - POWER, -_quantile(alpha / 2, self.dof))) * self.error


def _quantile(p: float, dof: float) -> float:
    """Of the t distribution; scipy.stats does the same with forty times the overhead."""
    from scipy import special

    return float(special.stdtrit(dof, p))


def _below(t: float, dof: float) -> float:
    from scipy import special

    return float(special.stdtr(dof, t))


@dataclass(frozen=True)
class _Compared:
    """Two arms, before anything is corrected or decided."""

    seeds: tuple[int, int]
    paired: bool
    difference: float
    deviation: float  # of a run, the root mean square of the two arms'; of a pair, of its differences
    estimates: list[_Estimate]  # from the arms' own deviations, then the pooled one; none without an error bar

    @property
    def wider(self) -> _Estimate | None:
        """The one that decides."""
        return max(self.estimates, key=lambda each: each.half, default=None)


def contrasts(
    values: Values,
    *,
    primary: Sequence[Pair],
    other: Sequence[Pair] = (),
    apart: Collection[str] = (),
    lineages: Lineages | None = None,
    margin: float | None = None,
) -> list[Contrast]:
    """The differences a - b of pairs of arms (a, b): the declared ones first, each in the order given.

    values: arm -> seed -> result, of every arm of the study, those without a pair too: they add to the pooled variance.
    primary: the comparisons that were declared before the results, one family for Holm's correction; other: the rest.
    apart: arms that scatter unlike the others, such as models converted without training: they add nothing to the pooled
    variance, and a pair with one of them has its own variances alone. lineages: which arms come from the same runs.
    margin: differences below it do not matter; each pair is tested for equivalence too.

    What so many seeds detect takes the deviations that were seen for the true ones, never the difference. A declared
    contrast is tested at the level where Holm's method stopped: 0.05 over the number of declared contrasts that are not
    resolved. Those without an error bar are no tests: Holm's method does not count them either.

    Raises UserError for results that are missing or not finite, and for pairs that cannot be compared: an arm that is
    not there, an arm with itself, two arms of a lineage without a common seed, one pair twice.
    """
    lineages, pairs = lineages or {}, [*primary, *other]
    pooled = residual_deviation(values, apart=apart, lineages=lineages)
    _check_pairs(values, pairs, lineages)
    found = [_compare(values, pair, None if {*pair} & {*apart} else pooled, lineages) for pair in pairs]
    declared = len(primary)
    p = [max((each.p for each in of_pair.estimates), default=None) for of_pair in found]
    p_holm = [*_holm(p[:declared]), *[None] * len(other)]
    p_same: list[float | None] = [None] * len(found)
    if margin is not None:
        p_same = [max((each.p_same(margin) for each in of_pair.estimates), default=None) for of_pair in found]
        p_same[:declared] = _holm(p_same[:declared])
    unresolved = sum(not each < ALPHA for each in p_holm if each is not None)
    verdicts = []
    for i, ((a, b), of_pair) in enumerate(zip(pairs, found, strict=True)):
        contrast = Contrast(a, b, i < declared, *of_pair.seeds, of_pair.paired, of_pair.difference, margin=margin)
        if (wider := of_pair.wider) is not None:
            own = of_pair.estimates[0]
            deciding = p[i] if p_holm[i] is None else p_holm[i]
            assert deciding is not None
            alpha = ALPHA / unresolved if i < declared and deciding >= ALPHA else ALPHA
            contrast = replace(
                contrast,
                low=contrast.difference - wider.half,
                high=contrast.difference + wider.half,
                own_half=own.half,
                pooled_half=of_pair.estimates[1].half if len(of_pair.estimates) > 1 else None,
                p=p[i],
                p_holm=p_holm[i],
                resolved=deciding < ALPHA,
                detectable=wider.detectable(alpha),
                p_same=p_same[i],
                same=_below_alpha(p_same[i]),
                seeds_for_margin=None if margin is None else _seeds_for(margin, of_pair, alpha),
            )
        verdicts.append(contrast)
    return verdicts


def trends(
    values: Values,
    declared: Mapping[str, tuple[Sequence[Pair], Sequence[float]]],
    *,
    late: Collection[str] = (),
    apart: Collection[str] = (),
    lineages: Lineages | None = None,
) -> list[Trend]:
    """The slopes of differences over log2 of a size; name -> (pairs (a, b), the size of each pair's arms).

    late: the names of those that were added after a look: they are not corrected and do not count in the declared family.

    The slope of the least squares line is a weighted sum of the differences, so its error is that of their sum; the degrees of
    freedom of the arms' own deviations are Satterthwaite's once more. apart, lineages: see `contrasts`. Raises UserError
    as that does, and for an arm or a lineage in two pairs of one trend, whose differences would not be independent.
    """
    if not declared:
        return []
    lineages, pooled = lineages or {}, residual_deviation(values, apart=apart, lineages=lineages)
    found = []
    for name, (pairs, at) in declared.items():
        _check_pairs(values, pairs, lineages)
        roots = [root for pair in pairs for root in {_root(arm, lineages) for arm in pair}]
        if len({*roots}) < len(roots):
            raise UserError(f"trend {name} has arms that come from the same runs in two of its pairs: leave one out")
        compared = [_compare(values, pair, None if {*pair} & {*apart} else pooled, lineages) for pair in pairs]
        x_N = np.log2(at) - np.log2(at).mean()
        weights = (x_N / (x_N @ x_N)).tolist()
        slope = sum(weight * each.difference for weight, each in zip(weights, compared, strict=True))
        differences = tuple((each.difference, None if each.wider is None else each.wider.half) for each in compared)
        trend = Trend(name, tuple(pairs), tuple(at), slope, differences)
        if all(each.estimates for each in compared):
            kinds = zip(*(each.estimates for each in compared), strict=False)  # the pooled ones only where every pair has one
            estimates = [_summed(slope, weights, of_kind, shared_dof=kind == 1) for kind, of_kind in enumerate(kinds)]
            own, *others = (each.half for each in estimates)
            half = max([own, *others])
            trend = replace(
                trend,
                low=slope - half,
                high=slope + half,
                own_half=own,
                pooled_half=others[0] if others else None,
                p=max(each.p for each in estimates),
            )
        found.append(trend)
    family = [trend for trend in found if trend.name not in late]
    corrected = dict(zip((trend.name for trend in family), _holm([trend.p for trend in family]), strict=True))
    return [
        replace(trend, p_holm=corrected.get(trend.name), resolved=_below_alpha(corrected.get(trend.name, trend.p)))
        for trend in found
    ]


def _summed(figure: float, weights: Sequence[float], parts: Sequence[_Estimate], *, shared_dof: bool) -> _Estimate:
    """A weighted sum of independent estimates. shared_dof: they have one variance in common."""
    variances = [(weight * part.error) ** 2 for weight, part in zip(weights, parts, strict=True)]
    whole = sum(variances)
    satterthwaite = 1 / sum((variance / whole) ** 2 / part.dof for variance, part in zip(variances, parts, strict=True))
    return _Estimate(figure, math.sqrt(whole), parts[0].dof if shared_dof else satterthwaite)


def residual_deviation(
    values: Values, *, apart: Collection[str] = (), lineages: Lineages | None = None
) -> tuple[float | None, int]:
    """(σ, degrees of freedom): how single runs of an arm deviate from its mean, pooled over all arms but those apart.

    Arms of one lineage count as one, with the mean of their variances. σ is None without a degree of freedom, as with one
    seed an arm. Raises UserError for results that are missing or not finite.
    """
    _check_values(values)
    squares, dof = 0.0, 0
    for arms in _of_lineages(values, lineages or {}):
        if several := [[*values[arm].values()] for arm in arms if len(values[arm]) > 1 and arm not in apart]:
            freedom = max(map(len, several)) - 1
            squares, dof = squares + freedom * float(np.mean([_variance(runs) for runs in several])), dof + freedom
    return (math.sqrt(squares / dof) if dof else None), dof


def equal_variances(values: Values, *, apart: Collection[str] = (), lineages: Lineages | None = None) -> float | None:
    """p of Bartlett's test that all arms except `apart` scatter alike. A lineage is represented by its first arm whose seeds
    differ. None with fewer than two groups.

    Bartlett's, although it takes outliers for unequal variances. Tests that do not, such as Brown and Forsythe's, look at
    distances from the median: with two seeds these are equal, with three one of them is zero, and the test finds nothing
    (docs/STUDIES.md). A false alarm costs nothing: the wider interval decides in any case.
    """
    from scipy import stats

    _check_values(values)
    groups = []
    for arms in _of_lineages(values, lineages or {}):
        several = ([*values[arm].values()] for arm in arms if len(values[arm]) > 1 and arm not in apart)
        groups += [runs for runs in several if _variance(runs)][:1]
    return float(stats.bartlett(*groups).pvalue) if len(groups) > 1 else None


def mean_interval(values: Values, arm: str, *, apart: Collection[str] = (), lineages: Lineages | None = None) -> Mean:
    """An arm's mean and the wider of two 95 % intervals: from its own deviation and from that pooled over all arms.

    apart, lineages: see `contrasts`. Raises UserError for an arm that is not there, and for results that are missing or
    not finite.
    """
    _check_values(values)
    _check_arm(values, arm)
    numbers = [*values[arm].values()]
    mean, n = statistics.fmean(numbers), len(numbers)
    if n == 1:
        return Mean(mean, None, None, n, None)
    deviation = float(np.std(numbers, ddof=1))
    pooled = (None, 0) if arm in apart else residual_deviation(values, apart=apart, lineages=lineages)
    estimates = (_above_rounding(deviation, numbers), n - 1), pooled
    halves = [_Estimate(mean, sigma / math.sqrt(n), dof).half for sigma, dof in estimates if sigma]
    half = max(halves, default=None)
    return Mean(mean, None if half is None else mean - half, None if half is None else mean + half, n, deviation)


def origins(sources: Mapping[str, str | None]) -> dict[str, str]:
    """name -> the first of its line, of what comes from something; that may have no name among these.

    sources: what each comes from itself; None: from nothing.
    """
    found = {}
    for name, source in sources.items():
        if source is not None:
            for _ in sources:  # no longer than names that stand in a circle
                source = sources.get(source) or source
            found[name] = source
    return found


def can_be_compared(values: Values, a: str, b: str, lineages: Lineages) -> bool:
    """Whether two arms have results, and within a lineage some of one seed."""
    if a not in values or b not in values:
        return False
    return _root(a, lineages) != _root(b, lineages) or not values[a].keys().isdisjoint(values[b])


def pareto_front(points: Sequence[tuple[str, float, float]]) -> list[str]:
    """Names of the points (name, x, y) that no other one beats, smaller being better in both, from small x to large.

    A point is beaten by one that is nowhere larger and somewhere smaller; equal points stay or go together. Raises
    UserError for a coordinate that is not a number.
    """
    for name, x, y in points:
        if math.isnan(x) or math.isnan(y):
            raise UserError(f"{name} lies at ({x}, {y}), which has no place on a Pareto front: leave it out")
    front: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda point: point[1:]):
        # All before it have no larger x, so it stays if its y is a new minimum, or if it repeats the last one that did.
        if not front or point[2] < front[-1][2] or point[1:] == front[-1][1:]:
            front.append(point)
    return [name for name, _, _ in front]


def _compare(values: Values, pair: Pair, pooled: tuple[float | None, int] | None, lineages: Lineages) -> _Compared:
    """pooled: σ and its degrees of freedom; None where the arms' own deviations are all there is."""
    a, b = (values[arm] for arm in pair)
    if _root(pair[0], lineages) == _root(pair[1], lineages):
        differences = [a[seed] - b[seed] for seed in a if seed in b]
        n, mean = len(differences), statistics.fmean(differences)
        sigma = _above_rounding(float(np.std(differences, ddof=1)), [*a.values(), *b.values()]) if n > 1 else 0.0
        estimates = [_Estimate(mean, sigma / math.sqrt(n), n - 1)] if sigma else []
        return _Compared((n, n), True, mean, sigma, estimates)

    numbers = [[*of_arm.values()] for of_arm in (a, b)]
    n_a, n_b = map(len, numbers)
    difference = statistics.fmean(numbers[0]) - statistics.fmean(numbers[1])
    if min(n_a, n_b) == 1:
        return _Compared((n_a, n_b), False, difference, 0.0, [])
    variances = [float(np.var(of_arm, ddof=1)) for of_arm in numbers]
    shares = [variance / n for variance, n in zip(variances, (n_a, n_b), strict=True)]
    sigma, error = math.sqrt(statistics.fmean(variances)), _above_rounding(math.sqrt(sum(shares)), [*a.values(), *b.values()])
    estimates = []
    if error:
        # Of shares of the whole: squares of these fit, of a diverged run's variances they may not.
        dof = (min(n_a, n_b) - 1) / sum((share / sum(shares)) ** 2 for share in shares)
        estimates.append(_Estimate(difference, error, dof))
        if pooled is not None and pooled[0]:
            estimates.append(_Estimate(difference, pooled[0] * math.sqrt(1 / n_a + 1 / n_b), pooled[1]))
    return _Compared((n_a, n_b), False, difference, sigma, estimates)


def _holm(p: Sequence[float | None]) -> list[float | None]:
    """The corrected ones, in the places of those that are there. A nan stays one and counts as a test that finds nothing.

    statsmodels' multipletests calls Python's collector each time, a tenth of what a report takes.
    """
    known = [(value, place) for place, value in enumerate(p) if value is not None]
    known.sort(key=lambda pair: (math.isnan(pair[0]), pair[0]))
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[place] = value if math.isnan(value) else largest
    return corrected


def _seeds_for(margin: float, of_pair: _Compared, alpha: float) -> int | None:
    """The fewest seeds of each arm that detect such a difference, by the test that decides and from the same deviations."""
    own, *pooled = of_pair.estimates
    (n_a, n_b), samples = of_pair.seeds, 1 if of_pair.paired else 2

    def detects(n: int) -> bool:
        error, dof = of_pair.deviation * math.sqrt(samples / n), own.dof * (n - 1) / (min(n_a, n_b) - 1)
        estimates = [_Estimate(margin, error, dof)]
        for each in pooled:  # a deviation of all arms, of which these two have more seeds now
            error = each.error * math.sqrt(2 / n / (1 / n_a + 1 / n_b))
            estimates.append(_Estimate(margin, error, each.dof + 2 * n - n_a - n_b))
        return max(estimates, key=lambda each: each.half).detectable(alpha) <= margin

    candidates = range(2, MOST_SEEDS + 1)
    first = bisect.bisect_left(candidates, True, key=detects)
    return candidates[first] if first < len(candidates) else None


def _below_alpha(p: float | None) -> bool | None:
    return None if p is None else p < ALPHA


def _root(arm: str, lineages: Lineages) -> str:
    return lineages.get(arm, arm)


def _of_lineages(values: Values, lineages: Lineages) -> list[list[str]]:
    """The arms, those of a lineage together."""
    found: dict[str, list[str]] = {}
    for arm in values:
        found.setdefault(_root(arm, lineages), []).append(arm)
    return [*found.values()]


def _above_rounding(deviation: float, results: Sequence[float]) -> float:
    """0 for what is below the rounding of float64 in the results that it is of: there is no noise to divide by."""
    return deviation if deviation > 1e-12 * max(map(abs, results)) else 0.0


def _variance(results: Sequence[float]) -> float:
    """Of a sample of two or more."""
    variance = float(np.var(results, ddof=1))
    return variance if _above_rounding(math.sqrt(variance), results) else 0.0


def _check_values(values: Values) -> None:
    if not values:
        raise UserError("a study of 0 arms has nothing to compare: give results of at least one arm")
    for arm, results in values.items():
        if not results:
            raise UserError(f"arm {arm} has 0 seeds: train it, or leave it out of the study")
        for seed, result in results.items():
            if not math.isfinite(result):
                raise UserError(f"arm {arm}, seed {seed} has the result {result}: train it again or leave the arm out")


def _check_arm(values: Values, arm: str) -> None:
    if arm not in values:
        raise UserError(f"there is no arm {arm} among the {len(values)} of the study: choose of {', '.join(values)}")


def _check_pairs(values: Values, pairs: Sequence[Pair], lineages: Lineages) -> None:
    seen: set[frozenset[str]] = set()
    for a, b in pairs:
        _check_arm(values, a)
        _check_arm(values, b)
        if a == b:
            raise UserError(f"{a} is to be compared with itself: name two arms")
        if frozenset((a, b)) in seen:
            raise UserError(f"{a} and {b} are to be compared twice: declare every pair of arms once")
        seen.add(frozenset((a, b)))
        if not can_be_compared(values, a, b, lineages):
            raise UserError(
                f"{a} (seeds {', '.join(map(str, sorted(values[a])))}) and {b} (seeds "
                f"{', '.join(map(str, sorted(values[b])))}) descend from the same runs and have no seed in common: train both "
                f"with one"
            )


def with_error(figure: float, low: float | None, high: float | None, digits: int = 4, *, sign: str = "") -> str:
    """± half of its interval, with two digits of that; `digits` decimals without one. sign: "+" shows it."""
    half = None if low is None or high is None else (high - low) / 2
    decimals = decimals_for(half, 2) if half else digits
    return number(figure, f"{sign},.{decimals}f") + ("" if half is None else f" ± {half:,.{decimals}f}")


def decimals_for(number: float, digits: int) -> int:
    """Decimals that show so many significant digits of a number."""
    return max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0


def _p(p: float) -> str:
    if p < 0.001:
        return "p < 0.001"
    if f"{p:.3f}" == f"{ALPHA:.3f}":  # rounded, it would not tell the side
        return f"p < {ALPHA}" if p < ALPHA else f"p ≥ {ALPHA}"
    return f"p = {p:.3f}"
