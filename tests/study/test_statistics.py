"""What the verdicts promise, on studies simulated with known differences: coverage, false positives, power, words."""

from __future__ import annotations

import gc
import math
import statistics
import tracemalloc
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.power import TTestPower

from harness.errors import UserError
from harness.evaluation.metric import BITS_PER_BYTE, METRICS
from harness.study.statistics import MOST_SEEDS, Contrast, bootstrap, contrasts, mean_interval, pareto_front, residual_deviation

SIGMA = 0.0015  # of the residual, in bits per byte; a seed's own effect is ten times that
EFFECTS = {"mha": 0.0, "gqa": 0.003, "mqa": 0.012, "mla": -0.004, "mla_plain": 0.020, "mha_learned": 0.035}
BALANCED = dict.fromkeys(EFFECTS, 3)
UNBALANCED = BALANCED | {"mha": 5, "mla": 5}
STUDIES = 2000


def study(
    random: np.random.Generator, seeds: Mapping[str, int], effects: Mapping[str, float] = EFFECTS
) -> dict[str, dict[int, float]]:
    """Results of one simulated study: 1.6 + arm + seed + residual."""
    of_seed = random.normal(0, 10 * SIGMA, max(seeds.values()))
    return {
        arm: {seed: 1.6 + effects[arm] + of_seed[seed] + random.normal(0, SIGMA) for seed in range(n)}
        for arm, n in seeds.items()
    }


def exact_study(difference: float, *, n: int, sigma: float = SIGMA, arms: int = 2) -> dict[str, dict[int, float]]:
    """Arms a0, a1, ...: a0 - a1 is the difference, the others equal a1, and the residual deviation is sigma."""
    raw_AN = np.random.default_rng(0).normal(size=(arms, n))
    raw_AN -= raw_AN.mean(0)
    raw_AN -= raw_AN.mean(1, keepdims=True)
    raw_AN *= sigma * math.sqrt((arms - 1) * (n - 1) / (raw_AN**2).sum())
    raw_AN += 1.6 + 0.01 * np.arange(n)
    raw_AN[0] += difference
    return {f"a{arm}": dict(enumerate(row.tolist())) for arm, row in enumerate(raw_AN)}


def within_binomial_error(successes: int, trials: int, probability: float) -> bool:
    return abs(successes / trials - probability) < 3 * math.sqrt(probability * (1 - probability) / trials)


def interval(contrast: Contrast) -> tuple[float, float]:
    assert contrast.low is not None and contrast.high is not None
    return contrast.low, contrast.high


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Holm's correction in statsmodels collects garbage at each call, which takes long beside a loaded torch."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("seeds", [BALANCED, UNBALANCED], ids=["3 seeds", "5 and 3 seeds"])
def test_the_interval_covers_the_true_difference_in_95_percent_of_studies(seeds: dict[str, int]) -> None:
    random = np.random.default_rng(1)
    pairs = [("mla", "mha"), ("mqa", "mla")]  # of five seeds each, and of three against five
    covered = [0, 0]
    for _ in range(STUDIES):
        for i, found in enumerate(contrasts(study(random, seeds), primary=(), other=pairs)):
            low, high = interval(found)
            covered[i] += low <= EFFECTS[found.a] - EFFECTS[found.b] <= high
    assert [within_binomial_error(count, STUDIES, 0.95) for count in covered] == [True, True], covered


@pytest.mark.parametrize("seeds", [BALANCED, UNBALANCED], ids=["3 seeds", "5 and 3 seeds"])
def test_the_interval_of_a_mean_covers_what_the_arm_would_have_over_the_same_seeds(seeds: dict[str, int]) -> None:
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(STUDIES):
        of_seed = random.normal(0, 10 * SIGMA, 5)
        values = {
            arm: {seed: EFFECTS[arm] + of_seed[seed] + random.normal(0, SIGMA) for seed in range(n)} for arm, n in seeds.items()
        }
        found = mean_interval(values, "mqa")
        assert found.low is not None and found.high is not None
        covered += found.low <= EFFECTS["mqa"] + of_seed[: max(seeds.values())].mean() <= found.high
    assert within_binomial_error(covered, STUDIES, 0.95), covered


def test_without_differences_a_study_of_declared_comparisons_is_wrong_in_at_most_5_percent(quick_collection: None) -> None:
    random = np.random.default_rng(3)
    pairs = [(arm, "mha") for arm in EFFECTS if arm != "mha"]
    wrong, wrong_uncorrected = 0, 0
    for _ in range(STUDIES):
        found = contrasts(study(random, UNBALANCED, dict.fromkeys(EFFECTS, 0.0)), primary=pairs)
        wrong += any(contrast.resolved for contrast in found)
        wrong_uncorrected += any(contrast.p is not None and contrast.p < 0.05 for contrast in found)
    bound = 0.05 + 3 * math.sqrt(0.05 * 0.95 / STUDIES)
    # Not idle either: five comparisons with one common arm lose little to the correction.
    assert 0.025 < wrong / STUDIES <= bound
    assert wrong_uncorrected / STUDIES > 2 * bound


def test_the_residual_deviation_is_that_of_the_simulation() -> None:
    random = np.random.default_rng(4)
    variances = []
    for _ in range(STUDIES):
        sigma, dof = residual_deviation(study(random, UNBALANCED))
        assert sigma is not None and dof == 22 - 6 - 5 + 1
        variances.append(sigma**2)
    assert statistics.mean(variances) == pytest.approx(SIGMA**2, rel=3 * math.sqrt(2 / 12 / STUDIES))


@pytest.mark.parametrize(
    ("n", "arms", "primary", "difference", "needed"),
    [
        pytest.param(3, 2, 1, 0.0015, 18, id="one declared comparison of two arms"),
        pytest.param(3, 6, 3, 0.0020, 14, id="three declared comparisons of six arms"),
        pytest.param(3, 6, 0, 0.0015, 18, id="not declared"),
    ],
)
def test_about_80_percent_of_studies_with_the_seeds_needed_resolve_the_difference(
    quick_collection: None, n: int, arms: int, primary: int, difference: float, needed: int
) -> None:
    declared = [("a0", "a1"), ("a2", "a1"), ("a3", "a1")][:primary]
    other = [] if primary else [("a0", "a1")]
    seen = contrasts(exact_study(difference, n=n, arms=arms), primary=declared, other=other)[0]
    assert seen.difference == pytest.approx(difference) and seen.resolved is False
    assert seen.seeds_needed == needed

    random = np.random.default_rng(5)
    effects = {f"a{arm}": 0.0 for arm in range(arms)} | {"a0": difference}
    seeds = dict.fromkeys(effects, n) | {"a0": needed, "a1": needed}
    trials = 1200
    resolved = sum(
        bool(contrasts(study(random, seeds, effects), primary=declared, other=other)[0].resolved) for _ in range(trials)
    )
    assert 0.80 - 0.035 < resolved / trials < 0.80 + 0.06  # a whole number of seeds overshoots


@pytest.mark.parametrize("n", [3, 5, 8])
def test_the_seeds_needed_by_two_arms_are_those_of_a_paired_t_test(n: int) -> None:
    for difference in (0.0006, 0.0009, 0.0012):
        values = exact_study(difference, n=n)
        size = difference / (SIGMA * math.sqrt(2))
        expected = math.ceil(TTestPower().solve_power(effect_size=size, alpha=0.05, power=0.8))
        assert contrasts(values, primary=[("a0", "a1")])[0].seeds_needed == expected


def test_one_more_seed_may_be_all_that_is_needed() -> None:
    (found,) = contrasts(exact_study(8 * SIGMA, n=2), primary=[("a0", "a1")])
    assert found.resolved is False and found.seeds_needed == 3


def test_seeds_beyond_reason_are_not_counted() -> None:
    for difference in (0.0, SIGMA / 20):
        (found,) = contrasts(exact_study(difference, n=3), primary=[("a0", "a1")])
        assert found.resolved is False and found.seeds_needed is None
        assert found.sentence(BITS_PER_BYTE).endswith(f"; more than {MOST_SEEDS:,} seeds would be needed")


def test_two_arms_alone_are_a_paired_t_test() -> None:
    values = study(np.random.default_rng(6), {"mla": 5, "mha": 5})
    (found,) = contrasts(values, primary=[("mla", "mha")])
    paired = stats.ttest_rel(*(list(values[arm].values()) for arm in ("mla", "mha")))
    assert found.p == pytest.approx(paired.pvalue) == found.p_holm
    assert interval(found) == pytest.approx(tuple(paired.confidence_interval()))
    assert found.difference == pytest.approx(-0.004, abs=4 * SIGMA * math.sqrt(2 / 5))


def test_a_study_agrees_with_the_two_way_analysis_of_a_statistics_package() -> None:
    values = study(np.random.default_rng(7), UNBALANCED)
    rows = [(arm, seed, value) for arm, results in values.items() for seed, value in results.items()]
    table = pandas.DataFrame(rows, columns=["arm", "seed", "y"])
    fitted = ols("y ~ C(arm, Treatment('mha')) + C(seed)", table).fit()
    for arm in ("gqa", "mla"):
        (found,) = contrasts(values, primary=(), other=[(arm, "mha")])
        name = f"C(arm, Treatment('mha'))[T.{arm}]"
        assert found.difference == pytest.approx(fitted.params[name])
        assert found.p == pytest.approx(fitted.pvalues[name])
        assert interval(found) == pytest.approx(tuple(fitted.conf_int().loc[name]))
    assert residual_deviation(values) == (pytest.approx(math.sqrt(fitted.scale)), fitted.df_resid)


def test_what_a_seed_does_to_all_arms_is_in_no_difference() -> None:
    values = study(np.random.default_rng(8), UNBALANCED)
    shifted = {arm: {seed: value + 10.0 * seed for seed, value in results.items()} for arm, results in values.items()}
    pairs = [("mla", "mha"), ("mqa", "mla")]
    for before, after in zip(contrasts(values, primary=pairs), contrasts(shifted, primary=pairs), strict=True):
        assert after.difference == pytest.approx(before.difference, abs=1e-9)
        assert interval(after) == pytest.approx(interval(before), abs=1e-9)


def test_pairing_by_seed_narrows_the_interval_to_a_fraction_of_the_unpaired_one(quick_collection: None) -> None:
    random = np.random.default_rng(9)
    ratios = []
    for _ in range(50):
        values = study(random, {"mla": 5, "mha": 5})
        (found,) = contrasts(values, primary=[("mla", "mha")])
        low, high = interval(found)
        unpaired = stats.ttest_ind(*(list(results.values()) for results in values.values())).confidence_interval()
        ratios.append((high - low) / (unpaired.high - unpaired.low))
    assert statistics.median(ratios) < 0.2


def test_the_variance_is_pooled_over_arms_and_an_arm_of_one_seed_adds_none() -> None:
    values = study(np.random.default_rng(10), BALANCED)
    assert residual_deviation({arm: values[arm] for arm in ("mha", "gqa")})[1] == 2
    sigma, dof = residual_deviation(values)
    assert dof == 10
    values["new"] = {1: 7.0}
    assert residual_deviation(values) == (pytest.approx(sigma), 10)
    (found,) = contrasts(values, primary=[("new", "mha")])
    assert found.n == 1 and found.resolved
    assert found.sentence(BITS_PER_BYTE).endswith(
        "worse than mha (1 seed, error bar from arms with more seeds, p < 0.001 after Holm)"
    )


def test_groups_of_arms_without_a_common_seed_are_fitted_beside_each_other() -> None:
    random = np.random.default_rng(11)
    first, second = study(random, {"mha": 3, "gqa": 3}), study(random, {"mla": 3, "mqa": 3})
    later = {arm: {seed + 5: value for seed, value in results.items()} for arm, results in second.items()}
    sigma, dof = residual_deviation(first | later)
    variances = [residual_deviation(part)[0] or math.nan for part in (first, second)]
    assert dof == 4 and sigma == pytest.approx(math.sqrt(statistics.mean(variance**2 for variance in variances)))
    for pair in (("mha", "gqa"), ("mla", "mqa")):
        (found,) = contrasts(first | later, primary=[pair])
        expected = statistics.mean((first | second)[pair[0]].values()) - statistics.mean((first | second)[pair[1]].values())
        assert found.difference == pytest.approx(expected)
    for arm in ("mha", "mla"):
        assert mean_interval(first | later, arm).mean == pytest.approx(statistics.mean((first | second)[arm].values()))


def test_holms_correction_is_over_the_declared_comparisons_alone() -> None:
    values = study(np.random.default_rng(12), UNBALANCED)
    primary, other = [("gqa", "mha"), ("mla", "mha"), ("mqa", "gqa")], [("mla_plain", "mla"), ("mla_plain", "mqa")]
    found = contrasts(values, primary=primary, other=other)
    assert [(contrast.a, contrast.b) for contrast in found] == primary + other
    assert [contrast.primary for contrast in found] == [True] * 3 + [False] * 2
    assert [contrast.n for contrast in found] == [3, 5, 3, 3, 3]

    p = [contrast.p or 0.0 for contrast in found[:3]]
    smallest, middle, largest = sorted(p)
    by_hand = {smallest: 3 * smallest, middle: max(3 * smallest, 2 * middle)}
    by_hand[largest] = max(by_hand[middle], largest)
    assert [contrast.p_holm for contrast in found] == [*(pytest.approx(by_hand[each]) for each in p), None, None]
    assert contrasts(values, primary=primary) == found[:3]


def test_an_undeclared_comparison_is_resolved_when_its_interval_excludes_0() -> None:
    random = np.random.default_rng(13)
    verdicts = set()
    for _ in range(40):
        (found,) = contrasts(study(random, BALANCED), primary=(), other=[("gqa", "mha")])
        low, high = interval(found)
        assert found.resolved is (low > 0 or high < 0) and found.p_holm is None
        assert found.seeds_needed is None or (not found.resolved and found.seeds_needed > 3)
        verdicts.add(found.resolved)
    assert verdicts == {True, False}


def test_one_seed_has_a_difference_and_no_error_bar() -> None:
    values = {"mla": {0: 1.25}, "gqa": {0: 1.5}, "mha": {0: 2.0}}
    assert residual_deviation(values) == (None, 0)
    found = contrasts(values, primary=[("mla", "gqa")], other=[("mha", "gqa")])
    assert [contrast.difference for contrast in found] == pytest.approx([-0.25, 0.5])
    assert {(c.low, c.high, c.p, c.p_holm, c.resolved, c.seeds_needed) for c in found} == {(None,) * 6}
    assert [contrast.sentence(BITS_PER_BYTE) for contrast in found] == [
        "mla against gqa: -0.250 bits per byte (one seed: no error bar)",
        "mha against gqa: +0.500 bits per byte (one seed: no error bar)",
    ]
    mean = mean_interval(values, "gqa")
    assert (mean.mean, mean.low, mean.high, mean.n) == (pytest.approx(1.5), None, None, 1)


def test_seeds_that_agree_to_the_last_digit_give_no_error_bar() -> None:
    values = {arm: {seed: 1.6 + effect + seed / 10 for seed in range(3)} for arm, effect in EFFECTS.items()}
    assert residual_deviation(values) == (0.0, 10)
    found = contrasts(values, primary=[("mla", "gqa")], other=[("mha", "mqa")])
    assert [(contrast.low, contrast.p, contrast.resolved) for contrast in found] == [(None, None, None)] * 2
    assert found[0].sentence(BITS_PER_BYTE) == (
        "mla against gqa: -0.00700 bits per byte (no error bar: every seed repeats it exactly)"
    )


def test_the_mean_of_an_arm_with_every_seed_is_its_own_and_a_shorter_arm_stands_beside_it() -> None:
    values = study(np.random.default_rng(14), UNBALANCED)
    sigma, dof = residual_deviation(values)
    assert sigma is not None
    full, short = mean_interval(values, "mla"), mean_interval(values, "mqa")
    half = stats.t.isf(0.025, dof) * sigma / math.sqrt(5)
    mean = statistics.mean(values["mla"].values())
    assert (full.mean, full.low, full.high, full.n) == pytest.approx((mean, mean - half, mean + half, 5))

    (found,) = contrasts(values, primary=[("mqa", "mla")])
    assert short.n == 3 and short.mean - full.mean == pytest.approx(found.difference)
    assert short.low is not None and short.mean - short.low > half


DECLARED = {
    "a": "mla",
    "b": "gqa",
    "primary": True,
    "n": 5,
    "difference": -0.0110,
    "low": -0.0140,
    "high": -0.0080,
    "p": 0.002,
    "p_holm": 0.004,
    "resolved": True,
    "seeds_needed": None,
}
OPEN = {
    "n": 3,
    "difference": -0.0020,
    "low": -0.0055,
    "high": 0.0015,
    "p": 0.21,
    "p_holm": 0.42,
    "resolved": False,
    "seeds_needed": 9,
}
CLOSE = OPEN | {"difference": 0.0020, "low": 0.0001, "high": 0.0039, "p": 0.04}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "mla is 0.0110 ± 0.0030 bits per byte better than gqa (5 seeds, p = 0.004 after Holm)"),
        (
            {"difference": 0.0110, "low": 0.0080, "high": 0.0140, "p_holm": 0.0004},
            "mla is 0.0110 ± 0.0030 bits per byte worse than gqa (5 seeds, p < 0.001 after Holm)",
        ),
        (
            {"primary": False, "p": 0.0497, "p_holm": None},
            "mla is 0.0110 ± 0.0030 bits per byte better than gqa (5 seeds, p < 0.05, not a declared comparison)",
        ),
        (
            {"difference": -1.53, "low": -1.95, "high": -1.11},
            "mla is 1.53 ± 0.42 bits per byte better than gqa (5 seeds, p = 0.004 after Holm)",
        ),
        (OPEN, "mla against gqa: -0.0020 ± 0.0035 bits per byte, not resolved at n = 3; about 9 seeds would resolve it"),
        (
            CLOSE | {"p_holm": 0.08},
            "mla against gqa: +0.0020 ± 0.0019 bits per byte, not resolved at n = 3 (p = 0.080 after Holm); "
            "about 9 seeds would resolve it",
        ),
        (
            CLOSE | {"p_holm": 0.0503, "n": 1},
            "mla against gqa: +0.0020 ± 0.0019 bits per byte, not resolved at n = 1 "
            "(error bar from arms with more seeds, p ≥ 0.05 after Holm); about 9 seeds would resolve it",
        ),
        (
            OPEN | {"difference": -0.00001, "low": -0.00351, "high": 0.00349, "seeds_needed": None},
            "mla against gqa: +0.0000 ± 0.0035 bits per byte, not resolved at n = 3; more than 1,000 seeds would be needed",
        ),
    ],
)
def test_a_verdict_reads(changes: dict[str, Any], sentence: str) -> None:
    assert Contrast(**DECLARED | changes).sentence(BITS_PER_BYTE) == sentence


def test_a_metric_of_which_more_is_better_turns_the_verdict_round() -> None:
    recall = Contrast(**DECLARED | {"difference": 0.12, "low": 0.09, "high": 0.15})
    assert recall.sentence(METRICS["answer_accuracy"]) == (
        "mla is 0.120 ± 0.030 answer accuracy better than gqa (5 seeds, p = 0.004 after Holm)"
    )
    assert "worse" in recall.sentence(METRICS["loss"])


RESULTS = {"mla": {0: 1.5, 1: 1.6}, "gqa": {0: 1.7, 2: 1.8}, "mha": {3: 1.9}}


@pytest.mark.parametrize(
    ("values", "pairs", "sentence"),
    [
        ({}, [], "a study of 0 arms has nothing to compare: give results of at least one arm"),
        (RESULTS | {"mqa": {}}, [], "arm mqa has 0 seeds: train it, or leave it out of the study"),
        (
            RESULTS | {"mqa": {0: 1.0, 4: math.nan}},
            [],
            "arm mqa, seed 4 has the result nan: train it again or leave the arm out",
        ),
        (RESULTS, [("mla", "mqa")], "there is no arm mqa among the 3 of the study: choose of mla, gqa, mha"),
        (RESULTS, [("mla", "mla")], "mla is to be compared with itself: name two arms"),
        (RESULTS, [("mla", "gqa"), ("gqa", "mla")], "gqa and mla are to be compared twice: declare every pair of arms once"),
        (RESULTS, [("mla", "mha")], "mla (seeds 0, 1) and mha (seeds 3) have no seed in common: train both with one"),
    ],
)
def test_a_study_that_cannot_be_compared_is_refused(
    values: dict[str, dict[int, float]], pairs: list[tuple[str, str]], sentence: str
) -> None:
    for primary, other in ((pairs, []), (pairs[:1], pairs[1:])):
        with pytest.raises(UserError) as refused:
            contrasts(values, primary=primary, other=other)
        assert str(refused.value) == sentence


def test_a_study_without_pairs_has_no_contrasts() -> None:
    assert contrasts(RESULTS, primary=()) == []


def test_the_mean_of_an_unknown_arm_is_refused() -> None:
    with pytest.raises(UserError, match="there is no arm mqa among the 3 of the study: choose of mla, gqa, mha"):
        mean_interval(RESULTS, "mqa")


Floats = NDArray[np.float64]


def clusters_of_text(random: np.random.Generator, n: int) -> tuple[Floats, Floats, Floats]:
    """(nats_a, nats_b, bytes): a needs 0.01 bits per byte less; a document is as hard for both, lengths vary widely."""
    bytes_C = np.round(random.gamma(1.5, 800, n)) + 1
    hardness_C = random.normal(1.2, 0.25, n)
    difference_C = random.normal(-0.01, 0.04, n)
    nats = [math.log(2) * bytes_C * (hardness_C + shift) for shift in (difference_C, 0.0)]
    return nats[0], nats[1], bytes_C


def test_the_bootstrap_covers_the_true_difference_of_two_models_in_95_percent_of_samples() -> None:
    random = np.random.default_rng(15)
    samples = 1000
    covered = 0
    for i in range(samples):
        noise = bootstrap(*clusters_of_text(random, 200), draws=1000, seed=i)
        covered += noise.low <= -0.01 <= noise.high
    assert within_binomial_error(covered, samples, 0.945)  # a percentile interval of 200 clusters is slightly narrow


def test_the_bootstrap_compares_ratios_of_totals_and_is_paired() -> None:
    nats_a, nats_b, bytes_C = clusters_of_text(np.random.default_rng(16), 300)
    noise = bootstrap(nats_a, nats_b, bytes_C)
    totals = [nats.sum() / math.log(2) / bytes_C.sum() for nats in (nats_a, nats_b)]
    assert noise.difference == pytest.approx(totals[0] - totals[1]) and noise.clusters == 300
    assert noise == bootstrap(nats_a, nats_b, bytes_C) != bootstrap(nats_a, nats_b, bytes_C, seed=1)

    # The linear approximation of the ratio's deviation; hardness, six times the differences, must not be in it.
    spread = (nats_a - nats_b) / math.log(2) - noise.difference * bytes_C
    expected = 2 * 1.96 * math.sqrt((spread**2).sum()) / bytes_C.sum()
    assert noise.high - noise.low == pytest.approx(expected, rel=0.05)


def test_equal_models_have_no_noise_and_clusters_without_text_do_not_count() -> None:
    nats_a, _, bytes_C = clusters_of_text(np.random.default_rng(17), 120)
    noise = bootstrap(np.append(nats_a, 0.1), np.append(nats_a, 0.1), np.append(bytes_C, 0), draws=100)
    assert (noise.difference, noise.low, noise.high, noise.clusters) == (0.0, 0.0, 0.0, 120)


def test_the_bootstrap_of_many_clusters_takes_bounded_memory() -> None:
    nats_a, nats_b, bytes_C = clusters_of_text(np.random.default_rng(18), 50_000)
    bootstrap(nats_a, nats_b, bytes_C, draws=10)  # what an import takes is not counted
    tracemalloc.start()
    try:
        bootstrap(nats_a, nats_b, bytes_C, draws=500)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # all draws at once: 600 MB


@pytest.mark.parametrize(
    ("nats_a", "nats_b", "bytes_", "sentence"),
    [
        (
            [1.0] * 63,
            [1.0] * 63,
            [4] * 63,
            "63 clusters of text are too few for a bootstrap, which takes 100: "
            "evaluate more documents or cut long ones into shorter segments",
        ),
        ([1.0] * 120, [1.0] * 120, [4] * 99 + [0] * 21, "99 clusters of text are too few"),
        (
            [1.0] * 120,
            [1.0] * 119,
            [4] * 120,
            "losses of 120 and 119 clusters and bytes of 120 do not belong together: "
            "evaluate both models on the same text, cut in the same way",
        ),
        (
            [1.0] * 118 + [math.nan, 1.0],
            [1.0] * 120,
            [4] * 119 + [-1],
            "2 of 120 clusters have a loss that is not finite or a size below 0 bytes, the first is number 118",
        ),
    ],
)
def test_a_bootstrap_without_a_base_is_refused(
    nats_a: list[float], nats_b: list[float], bytes_: list[int], sentence: str
) -> None:
    with pytest.raises(UserError) as refused:
        bootstrap(nats_a, nats_b, bytes_)
    assert str(refused.value).startswith(sentence)


def test_the_pareto_front_is_what_no_other_point_beats() -> None:
    points = [
        ("mha", 2048, 1.620),
        ("gqa", 1024, 1.625),
        ("mqa", 512, 1.647),
        ("mla", 640, 1.6205),
        ("mla_plain", 512, 1.651),
        ("mha_wide", 3072, 1.620),
    ]
    assert pareto_front(points) == ["mqa", "mla", "mha"]
    assert pareto_front(points[::-1]) == ["mqa", "mla", "mha"]
    assert pareto_front([]) == []


def test_points_that_tie_in_both_stay_or_go_together() -> None:
    assert pareto_front([("a", 1, 2), ("b", 2, 1), ("c", 1, 2)]) == ["a", "c", "b"]
    assert pareto_front([("a", 1, 2), ("b", 1, 1), ("c", 1, 2)]) == ["b"]
    assert pareto_front([("a", 1, 2), ("b", 1, 2), ("c", 2, 2), ("d", 1, 3)]) == ["a", "b"]


def test_every_point_of_a_front_is_unbeaten_and_every_other_is_beaten() -> None:
    random = np.random.default_rng(19)
    points = [(str(i), float(x), float(y)) for i, (x, y) in enumerate(random.integers(0, 12, (60, 2)))]
    beaten = {name for name, x, y in points if any(u <= x and v <= y and (u, v) != (x, y) for _, u, v in points)}
    assert set(pareto_front(points)) == {name for name, _, _ in points} - beaten


def test_a_point_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"mla lies at \(640, nan\), which has no place on a Pareto front"):
        pareto_front([("mha", 2048, 1.62), ("mla", 640, math.nan)])


def test_arms_that_scatter_on_their_own_widen_no_interval_but_their_own() -> None:
    random = np.random.default_rng(8)
    values = study(random, {"mla": 5, "mha": 5, "gqa": 5})
    wild = {seed: result + float(random.normal(0, 30 * SIGMA)) for seed, result in values["gqa"].items()}
    alone = contrasts(values, primary=[("mla", "mha")])[0]
    pooled = contrasts(values | {"wild": wild}, primary=[("mla", "mha")])[0]
    apart, against = contrasts(values | {"wild": wild}, primary=[("mla", "mha"), ("wild", "mha")], apart=["wild"])
    assert interval(apart) == pytest.approx(interval(alone)) and apart.p == pytest.approx(alone.p)
    assert alone.p is not None and pooled.p is not None and pooled.p > 10 * alone.p
    paired = stats.ttest_rel(list(wild.values()), list(values["mha"].values()))
    assert against.p == pytest.approx(paired.pvalue)
    assert interval(against) == pytest.approx(tuple(paired.confidence_interval()))
