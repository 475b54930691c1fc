"""Verdicts of an ablation: differences between arms with error bars that come from seeds.

The model is y[arm, seed] = arm + seed + residual. A seed sets the initialisation and the order of the data together, the
same pair for every arm, so it is a block of a randomised block design: what it does to all arms alike leaves every
difference (paired comparison; Montgomery, Design and Analysis of Experiments, chapter 4.1). It is fitted by ordinary
least squares over the arms of the whole study, so that the residual variance is pooled, which is what makes three seeds
usable at all: six arms of three seeds give ten degrees of freedom, two of them alone would give two. The price is the
assumption that the residuals of all arms have one variance. Arms may have different seeds; an arm with one seed adds
nothing to the variance.

The family of declared comparisons is corrected by Holm's method (Scandinavian Journal of Statistics 6, 1979). Whatever
else is looked at is marked as such and uncorrected. Noise of the evaluation, given the weights, is another thing and has
its own function: bootstrap.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from harness.errors import UserError
from harness.evaluation.metric import Metric

Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> its result
Pair = tuple[str, str]
Interval = tuple[float, float]

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000  # what would need more is not worth a number
FEWEST_CLUSTERS = 100  # with fewer, intervals from percentiles are too narrow
_BLOCK = 1_000_000  # resampled clusters that the bootstrap holds at a time


@dataclass(frozen=True)
class Contrast:
    """One difference between two arms. The error bar is None where no arm has seeds that disagree."""

    a: str
    b: str
    primary: bool  # declared before the results were seen
    n: int  # seeds that both arms have
    difference: float  # a - b, from the model
    low: float | None  # 95 % interval of this difference alone, not corrected for the others
    high: float | None
    p: float | None  # two-sided, uncorrected
    p_holm: float | None  # over the declared contrasts; None for others
    resolved: bool | None  # primary: p_holm < 0.05; other: the interval excludes 0
    seeds_needed: int | None  # None: resolved, unknown, or more than MOST_SEEDS; see contrasts

    def sentence(self, metric: Metric) -> str:
        """The verdict in words, ± half the 95 % interval."""
        against = f"{self.a} against {self.b}"
        if self.low is None or self.high is None or self.p is None:
            reason = "one seed: no error bar" if self.n == 1 else "no error bar: every seed repeats it exactly"
            return f"{against}: {self.difference:+z.{decimals_for(self.difference, 3)}f} {metric.unit} ({reason})"

        half = (self.high - self.low) / 2
        decimals = decimals_for(half, 2)
        borrowed = "error bar from arms with more seeds"
        if self.resolved:
            verdict = "better" if metric.better(self.difference) else "worse"
            seeds = f"{self.n} seeds" if self.n > 1 else f"1 seed, {borrowed}"
            p = f"{_p(self.p)}, not a declared comparison" if self.p_holm is None else f"{_p(self.p_holm)} after Holm"
            size = f"{abs(self.difference):.{decimals}f} ± {half:.{decimals}f} {metric.unit}"
            return f"{self.a} is {size} {verdict} than {self.b} ({seeds}, {p})"

        notes = [borrowed] if self.n == 1 else []
        # The bar excludes 0 and yet nothing is resolved: without the reason the sentence would contradict itself.
        if self.p_holm is not None and self.p < ALPHA:
            notes.append(f"{_p(self.p_holm)} after Holm")
        note = f" ({', '.join(notes)})" if notes else ""
        remedy = (
            f"more than {MOST_SEEDS:,} seeds would be needed"
            if self.seeds_needed is None
            else f"about {self.seeds_needed} seeds would resolve it"
        )
        size = f"{self.difference:+z.{decimals}f} ± {half:.{decimals}f} {metric.unit}"
        return f"{against}: {size}, not resolved at n = {self.n}{note}; {remedy}"


@dataclass(frozen=True)
class Mean:
    """One arm's mean over the seeds of the study, as the model has it, with the 95 % interval that suits comparison."""

    mean: float
    low: float | None  # None where no arm has seeds that disagree
    high: float | None
    n: int  # seeds of this arm


@dataclass(frozen=True)
class Noise:
    """What another sample of documents would have done to the difference of two given sets of weights; no seeds."""

    difference: float  # a - b, bits per byte
    low: float  # 95 % interval
    high: float
    clusters: int  # with text


@dataclass(frozen=True)
class _Model:
    arms: list[str]
    seeds: list[int]  # but for the first of each group of arms that common seeds link: its effect is set to 0
    fitted: Any  # of statsmodels; the parameters are the arms, then the seeds
    sigma: float | None  # None without a degree of freedom
    dof: int

    def estimates(self, weights_CP: NDArray[np.float64]) -> tuple[list[float], list[float], list[Interval]]:
        """Estimate, p against 0 and 95 % interval of each weighted sum of parameters; the last two empty without σ."""
        if not self.sigma:
            return (weights_CP @ self.fitted.params).tolist(), [], []
        test = self.fitted.t_test(weights_CP)
        intervals = [(float(low), float(high)) for low, high in test.conf_int(alpha=ALPHA)]
        return np.ravel(test.effect).tolist(), np.ravel(test.pvalue).tolist(), intervals


def contrasts(
    values: Values, *, primary: Sequence[Pair], other: Sequence[Pair] = (), apart: Collection[str] = ()
) -> list[Contrast]:
    """The differences a - b of pairs of arms (a, b): the declared ones first, each in the order given.

    values: arm -> seed -> result, of every arm of the study, those without a pair too: they add to the pooled variance.
    primary: the comparisons that were declared before the results, one family for Holm's correction; other: the rest.
    apart: arms that scatter unlike the others, such as models converted without training: they add nothing to the pooled
    variance, and a pair with one of them has the variance of its own two arms alone.

    seeds_needed takes the difference and the σ that were seen for the true ones, so it is a guide and no promise: the
    fewest seeds of both arms, above n, at which the two-sided t test has 80 % power. Every seed more is one degree of
    freedom more, as if the other arms kept theirs. A declared contrast is tested at the level where Holm's method
    stopped: 0.05 over the number of declared contrasts that are not resolved.

    Raises UserError for results that are missing or not finite, and for pairs that cannot be compared: an arm that is
    not there, an arm with itself, two arms without a common seed, one pair twice.
    """
    from statsmodels.stats.multitest import multipletests

    pairs = [*primary, *other]
    pooled = _fit(without(values, apart) or values)
    _check_pairs(values, pairs)
    models = {(a, b): _fit({a: values[a], b: values[b]}) if a in apart or b in apart else pooled for a, b in pairs}
    estimates = [_difference(models[pair], *pair) for pair in pairs]
    common = [len(values[a].keys() & values[b].keys()) for a, b in pairs]
    declared = [p for _, p, _ in estimates[: len(primary)] if p is not None]
    corrected = iter(multipletests(declared, alpha=ALPHA, method="holm")[1].tolist() if declared else [])
    holm = [None if p is None else next(corrected) for _, p, _ in estimates[: len(primary)]]
    unresolved = sum(p is None or p >= ALPHA for p in holm)
    found = []
    for i, ((a, b), (difference, p, interval)) in enumerate(zip(pairs, estimates, strict=True)):
        is_declared = i < len(primary)
        if p is None or interval is None:
            found.append(Contrast(a, b, is_declared, common[i], difference, None, None, None, None, None, None))
            continue
        p_holm = holm[i] if is_declared else None
        resolved = (p if p_holm is None else p_holm) < ALPHA
        needed = None
        if not resolved:
            alpha = ALPHA if p_holm is None else ALPHA / unresolved
            needed = _seeds_needed(difference, models[a, b], n=common[i], alpha=alpha)
        found.append(Contrast(a, b, is_declared, common[i], difference, *interval, p, p_holm, resolved, needed))
    return found


def have_common_seed(values: Values, a: str, b: str) -> bool:
    """Whether two arms have results, some of them of one seed, so that they can be compared."""
    return not values.get(a, {}).keys().isdisjoint(values.get(b, {}))


def without(values: Values, apart: Collection[str]) -> Values:
    """The results of the arms that share one variance."""
    return {arm: by_seed for arm, by_seed in values.items() if arm not in apart}


def _difference(model: _Model, a: str, b: str) -> tuple[float, float | None, Interval | None]:
    """a - b, its p and its 95 % interval."""
    weights_P = np.zeros(len(model.fitted.params))
    weights_P[model.arms.index(a)], weights_P[model.arms.index(b)] = 1, -1
    (difference,), p_values, intervals = model.estimates(weights_P[None])
    return (difference, p_values[0], intervals[0]) if p_values else (difference, None, None)


def residual_deviation(values: Values) -> tuple[float | None, int]:
    """(σ, degrees of freedom): the standard deviation of what neither arm nor seed explains, pooled over all arms.

    σ is None without a degree of freedom, as with one seed. A difference of two arms over n common seeds has the
    standard error σ √(2/n). Raises UserError for results that are missing or not finite.
    """
    model = _fit(values)
    return model.sigma, model.dof


def mean_interval(values: Values, arm: str) -> Mean:
    """An arm's mean with an error bar of the pooled σ: t σ/√n where the arm has every seed.

    The mean is over all seeds of the study that common arms link to this one; a seed that the arm lacks counts as the
    model expects it, so that an arm of three seeds can stand beside one of five, and differences of such means are those
    of contrasts. What a seed does to all arms alike is not in the error bar: single runs scatter more widely.

    Raises UserError for an arm that is not there, and for results that are missing or not finite.
    """
    model = _fit(values)
    _check_arm(values, arm)
    linked = _linked_seeds(values, arm)
    weights_P = np.zeros(len(model.fitted.params))
    weights_P[model.arms.index(arm)] = 1
    for column, seed in enumerate(model.seeds, start=len(model.arms)):
        weights_P[column] = (seed in linked) / len(linked)
    (mean,), _, intervals = model.estimates(weights_P[None])
    low, high = intervals[0] if intervals else (None, None)
    return Mean(mean, low, high, len(values[arm]))


def bootstrap(nats_a: ArrayLike, nats_b: ArrayLike, bytes_: ArrayLike, *, draws: int = 10_000, seed: int = 0) -> Noise:
    """Noise of the evaluation, given these weights: a paired bootstrap over clusters of text.

    nats_a, nats_b, bytes_: (clusters,), the summed loss of each model and the UTF-8 bytes of each document, or of fixed
    segments where documents are long. Clusters are drawn with replacement, the same for both models, and each draw is a
    ratio of totals in bits per byte; the interval lies between the percentiles 2.5 and 97.5 (Efron and Tibshirani, An
    Introduction to the Bootstrap, chapter 13). It says nothing about other seeds, so it is never a verdict on an arm.

    Raises UserError for fewer than 100 clusters with text, and for figures that do not belong together.
    """
    from scipy import stats

    sizes = [np.size(numbers) for numbers in (nats_a, nats_b, bytes_)]
    if len(set(sizes)) > 1:
        raise UserError(
            f"losses of {sizes[0]} and {sizes[1]} clusters and bytes of {sizes[2]} do not belong together: "
            "evaluate both models on the same text, cut in the same way"
        )
    a_C, b_C, bytes_C = (np.ravel(np.asarray(numbers, dtype=np.float64)) for numbers in (nats_a, nats_b, bytes_))
    broken = ~(np.isfinite(a_C) & np.isfinite(b_C) & np.isfinite(bytes_C) & (bytes_C >= 0))
    if broken.any():
        raise UserError(
            f"{broken.sum()} of {sizes[0]} clusters have a loss that is not finite or a size below 0 bytes, the first "
            f"is number {broken.argmax()}: evaluate again with weights that are not broken"
        )
    clusters = int((bytes_C > 0).sum())
    if clusters < FEWEST_CLUSTERS:
        raise UserError(
            f"{clusters} clusters of text are too few for a bootstrap, which takes {FEWEST_CLUSTERS}: "
            "evaluate more documents or cut long ones into shorter segments"
        )

    def difference(nats: NDArray[np.float64], size: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        ratio: NDArray[np.float64] = nats.sum(axis) / (math.log(2) * size.sum(axis))
        return ratio

    delta_C = a_C - b_C
    interval = stats.bootstrap(
        (delta_C, bytes_C),
        difference,
        paired=True,
        vectorized=True,
        n_resamples=draws,
        method="percentile",
        confidence_level=1 - ALPHA,
        batch=max(1, _BLOCK // sizes[0]),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Noise(float(difference(delta_C, bytes_C)), float(interval.low), float(interval.high), clusters)


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


def _fit(values: Values) -> _Model:
    from statsmodels.regression.linear_model import OLS

    if not values:
        raise UserError("a study of 0 arms has nothing to compare: give results of at least one arm")
    for arm, results in values.items():
        if not results:
            raise UserError(f"arm {arm} has 0 seeds: train it, or leave it out of the study")
        for seed, result in results.items():
            if not math.isfinite(result):
                raise UserError(f"arm {arm}, seed {seed} has the result {result}: train it again or leave the arm out")

    arms = list(values)
    references = {min(_linked_seeds(values, arm)) for arm in arms}
    seeds = sorted({seed for results in values.values() for seed in results} - references)
    cells = [(arm, seed) for arm in arms for seed in values[arm]]
    y_N = np.array([values[arm][seed] for arm, seed in cells], dtype=np.float64)
    x_NP = np.array(
        [[*(arm == other for other in arms), *(seed == other for other in seeds)] for arm, seed in cells], dtype=np.float64
    )
    model = OLS(y_N, x_NP)
    dof = int(model.df_resid)
    with np.errstate(invalid="ignore", divide="ignore"):  # a variance over 0 degrees of freedom, which is not used
        fitted = model.fit()
    if not dof:
        return _Model(arms, seeds, fitted, None, 0)
    sigma = math.sqrt(fitted.ssr / dof)
    # Below the rounding of float64 there is no noise to divide by.
    return _Model(arms, seeds, fitted, sigma if sigma > 1e-12 * np.abs(y_N).max() else 0.0, dof)


def _check_arm(values: Values, arm: str) -> None:
    if arm not in values:
        raise UserError(f"there is no arm {arm} among the {len(values)} of the study: choose of {', '.join(values)}")


def _check_pairs(values: Values, pairs: Sequence[Pair]) -> None:
    seen: set[frozenset[str]] = set()
    for a, b in pairs:
        _check_arm(values, a)
        _check_arm(values, b)
        if a == b:
            raise UserError(f"{a} is to be compared with itself: name two arms")
        if frozenset((a, b)) in seen:
            raise UserError(f"{a} and {b} are to be compared twice: declare every pair of arms once")
        seen.add(frozenset((a, b)))
        if not have_common_seed(values, a, b):
            raise UserError(
                f"{a} (seeds {', '.join(map(str, sorted(values[a])))}) and {b} (seeds "
                f"{', '.join(map(str, sorted(values[b])))}) have no seed in common: train both with one"
            )


def _linked_seeds(values: Values, arm: str) -> set[int]:
    """The seeds of an arm, of all arms that share a seed with it, and so on: what its mean can be carried over to."""
    linked, size = set(values[arm]), 0
    while len(linked) > size:
        size = len(linked)
        linked.update(*(results for results in values.values() if not linked.isdisjoint(results)))
    return linked


def _seeds_needed(difference: float, model: _Model, *, n: int, alpha: float) -> int | None:
    from scipy import stats

    assert model.sigma
    effect = abs(difference) / (model.sigma * math.sqrt(2))

    def power(seeds: int) -> float:
        dof = model.dof + seeds - n
        # The other tail, a verdict for the wrong side, is not counted as success.
        return float(stats.nct.sf(stats.t.isf(alpha / 2, dof), dof, effect * math.sqrt(seeds)))

    candidates = range(n + 1, MOST_SEEDS + 1)
    first = bisect.bisect_left(candidates, POWER, key=power)
    return candidates[first] if first < len(candidates) else None


def decimals_for(number: float, digits: int) -> int:
    """Decimals that show so many significant digits of a number."""
    return max(0, digits - 1 - math.floor(math.log10(abs(number)))) if number else 0


def _p(p: float) -> str:
    if p < 0.001:
        return "p < 0.001"
    if f"{p:.3f}" == f"{ALPHA:.3f}":  # rounded, it would not tell the side
        return f"p < {ALPHA}" if p < ALPHA else f"p ≥ {ALPHA}"
    return f"p = {p:.3f}"
