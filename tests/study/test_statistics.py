"""What a verdict is made of: the estimates against scipy's and statsmodels', what is corrected and tested, and the words.

What the verdicts promise over many studies is measured in test_coverage.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind, ttost_paired

from harness.errors import UserError
from harness.evaluation.metric import BITS_PER_BYTE, METRICS
from harness.study.statistics import (
    MOST_SEEDS,
    Contrast,
    _holm,
    can_be_compared,
    contrasts,
    equal_variances,
    mean_interval,
    pareto_front,
    residual_deviation,
    trends,
)

SIGMA = 0.0045  # of a run, in bits per byte
EFFECTS = {"mha": 0.0, "gqa": 0.003, "mqa": 0.012, "mla": -0.004, "mla_plain": 0.020, "mha_learned": 0.035}
BALANCED = dict.fromkeys(EFFECTS, 3)
UNBALANCED = BALANCED | {"mha": 5, "mla": 5}

Study = dict[str, dict[int, float]]


def study(random: np.random.Generator, seeds: Mapping[str, int], effects: Mapping[str, float] = EFFECTS) -> Study:
    """Results of one simulated study: 1.6 + arm + residual."""
    return {arm: {seed: 1.6 + effects[arm] + random.normal(0, SIGMA) for seed in range(n)} for arm, n in seeds.items()}


def lists(values: Study, *arms: str) -> list[list[float]]:
    return [[*values[arm].values()] for arm in arms]


def exact_study(difference: float, *, n: int, sigma: float = SIGMA, arms: int = 2) -> Study:
    """Arms a0, a1, ...: a0 - a1 is the difference, the others equal a1, and every arm's deviation is sigma."""
    raw_N = np.random.default_rng(0).normal(size=n)
    raw_N = sigma * (raw_N - raw_N.mean()) / raw_N.std(ddof=1)
    return {f"a{arm}": dict(enumerate((1.6 + raw_N + (difference if arm == 0 else 0)).tolist())) for arm in range(arms)}


def interval(contrast: Contrast) -> tuple[float, float]:
    assert contrast.low is not None and contrast.high is not None
    return contrast.low, contrast.high


def half(low: float, high: float) -> float:
    return (high - low) / 2


# --- against scipy and statsmodels, on random designs ------------------------------------------------------------------


def random_design(random: np.random.Generator, *, equal_counts: bool = False) -> Study:
    """Four to seven arms of two to nine seeds, whose deviations differ by up to nine times."""
    arms = [f"a{i}" for i in range(random.integers(4, 8))]
    counts = dict.fromkeys(arms, int(random.integers(2, 10)))
    if not equal_counts:
        counts = {arm: int(random.integers(2, 10)) for arm in arms}
    return {
        arm: dict(enumerate((1.6 + random.normal(0, 0.01) + random.normal(0, SIGMA * 3 ** random.uniform(-1, 1), n)).tolist()))
        for arm, n in counts.items()
    }


@pytest.mark.parametrize("design", range(12))
def test_both_intervals_are_those_of_statistics_packages(design: int) -> None:
    values = random_design(np.random.default_rng(design), equal_counts=True)
    a, b = lists(values, "a0", "a1")
    (found,) = contrasts(values, primary=[("a0", "a1")])
    assert found.own_half is not None and found.pooled_half is not None
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found.own_half == pytest.approx(half(*welch.confidence_interval()))
    assert (found.own_half, found.difference) == pytest.approx(
        (half(*CompareMeans(DescrStatsW(a), DescrStatsW(b)).tconfint_diff(usevar="unequal")), np.mean(a) - np.mean(b))
    )
    rows = [(arm, value) for arm, results in values.items() for value in results.values()]
    fitted = ols("y ~ C(arm, Treatment('a1'))", pandas.DataFrame(rows, columns=["arm", "y"])).fit()
    name = "C(arm, Treatment('a1'))[T.a0]"
    assert found.pooled_half == pytest.approx(half(*fitted.conf_int().loc[name]))
    assert residual_deviation(values) == (pytest.approx(math.sqrt(fitted.scale)), fitted.df_resid)
    assert half(*interval(found)) == pytest.approx(max(found.own_half, found.pooled_half))
    assert found.p == pytest.approx(max(welch.pvalue, fitted.pvalues[name])) == found.p_holm
    assert equal_variances(values) == pytest.approx(stats.bartlett(*lists(values, *values)).pvalue)


@pytest.mark.parametrize("design", range(12))
def test_with_other_numbers_of_seeds_the_own_interval_is_never_narrower_than_welchs(design: int) -> None:
    values = random_design(np.random.default_rng(design))
    a, b = lists(values, "a0", "a1")
    (found,) = contrasts(values, primary=[("a0", "a1")], apart=["a0"])
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found.own_half is not None and found.pooled_half is None
    error, fewest = math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)), min(len(a), len(b))
    dof = stats.t.isf(0.025, [2 * (fewest - 1), fewest - 1])  # the same error, between the two extremes
    assert half(*welch.confidence_interval()) <= found.own_half * (1 + 1e-9)
    assert dof[0] * error <= found.own_half * (1 + 1e-9) and found.own_half <= dof[1] * error * (1 + 1e-9)


@pytest.mark.parametrize("design", range(6))
def test_equivalence_is_the_two_one_sided_tests_of_statsmodels(design: int) -> None:
    random = np.random.default_rng(100 + design)
    values = random_design(random, equal_counts=True)
    margin = float(random.uniform(0.002, 0.02))
    (found,) = contrasts(values, primary=[("a0", "a1")], apart=["a0"], margin=margin)
    a, b = lists(values, "a0", "a1")
    assert found.p_same == pytest.approx(ttost_ind(np.array(a), np.array(b), -margin, margin, usevar="unequal")[0])
    assert found.same is (found.p_same < 0.05)
    (paired,) = contrasts(values, primary=[("a0", "a1")], lineages={"a0": "a1"}, margin=margin)
    assert paired.p_same == pytest.approx(ttost_paired(np.array(a), np.array(b), -margin, margin)[0])


@pytest.mark.parametrize("design", range(6))
def test_holms_corrections_are_those_of_statsmodels_over_the_declared_alone(design: int) -> None:
    values = random_design(np.random.default_rng(200 + design))
    primary, other = [("a1", "a0"), ("a2", "a0"), ("a3", "a1")], [("a3", "a0"), ("a3", "a2")]
    found = contrasts(values, primary=primary, other=other, margin=0.004)
    assert [(contrast.a, contrast.b) for contrast in found] == primary + other
    assert [contrast.primary for contrast in found] == [True] * 3 + [False] * 2
    alone = [contrasts(values, primary=(), other=[pair], margin=0.004)[0] for pair in primary]
    for key, corrected in (("p", "p_holm"), ("p_same", "p_same")):
        expected = multipletests([getattr(contrast, key) for contrast in alone], method="holm")[1]
        assert [getattr(contrast, corrected) for contrast in found[:3]] == pytest.approx(list(expected))
    assert [contrast.p_holm for contrast in found[3:]] == [None, None]
    assert contrasts(values, primary=primary, margin=0.004) == found[:3]


@pytest.mark.parametrize("place", range(4))
def test_a_p_that_is_no_number_stays_one_and_counts_as_a_test_that_finds_nothing(place: int) -> None:
    p = [0.02, 0.03, 0.004]
    expected = list(multipletests([*p, 1.0], method="holm")[1][:3])
    p.insert(place, math.nan), expected.insert(place, math.nan)
    assert _holm([*p, None]) == [*(pytest.approx(each, nan_ok=True) for each in expected), None]


def test_verdicts_are_the_same_of_results_as_large_as_a_record_holds() -> None:
    values = random_design(np.random.default_rng(300))
    huge = {arm: {seed: result * 1e99 for seed, result in results.items()} for arm, results in values.items()}
    pairs, declared = [("a1", "a0"), ("a2", "a0")], {"t": ([("a0", "a1"), ("a2", "a3")], [1, 2])}
    for compare in (lambda of: contrasts(of, primary=pairs), lambda of: trends(of, declared)):
        plain, large = ([found.p for found in compare(of)] for of in (values, huge))
        assert large == pytest.approx(plain)


# --- lineages ----------------------------------------------------------------------------------------------------------


def family(random: np.random.Generator, n: int = 5) -> Study:
    """gqa, two arms made from its very runs, and one of its own."""
    gqa = random.normal(1.7, SIGMA, n)
    made = {"gqa": gqa, "small": gqa + 0.01 + random.normal(0, SIGMA / 20, n), "other": gqa + 0.0105}
    made |= {"other": made["other"] + random.normal(0, SIGMA / 20, n), "mla": random.normal(1.71, SIGMA, n)}
    return {arm: dict(enumerate(runs.tolist())) for arm, runs in made.items()}


LINEAGES = {"small": "gqa", "other": "gqa"}


def test_within_a_lineage_a_difference_is_a_paired_t_test_over_common_seeds() -> None:
    values = family(np.random.default_rng(3))
    del values["other"][4]
    (found,) = contrasts(values, primary=[("other", "small")], lineages=LINEAGES)
    assert found.paired and (found.n_a, found.n_b) == (4, 4) and found.pooled_half is None
    paired = stats.ttest_rel([*values["other"].values()], [*values["small"].values()][:4])
    assert found.p == pytest.approx(paired.pvalue)
    assert interval(found) == pytest.approx(tuple(paired.confidence_interval()))
    unpaired = contrasts(values, primary=[("other", "small")])[0]
    assert not unpaired.paired and half(*interval(unpaired)) > 10 * half(*interval(found))


def test_descendants_of_the_same_runs_count_once_in_the_pooled_deviation_and_in_the_test_of_variances() -> None:
    values = family(np.random.default_rng(4))
    sigma, dof = residual_deviation(values, lineages=LINEAGES)
    variances = {arm: statistics.variance(runs.values()) for arm, runs in values.items()}
    lineage = statistics.mean(variances[arm] for arm in ("gqa", "small", "other"))
    assert dof == 8 and sigma == pytest.approx(math.sqrt((lineage + variances["mla"]) / 2))
    assert residual_deviation(values)[1] == 16
    alone = {arm: values[arm] for arm in ("gqa", "mla")}
    assert equal_variances(values, lineages=LINEAGES) == pytest.approx(equal_variances(alone))
    across = contrasts(values, primary=[("small", "mla")], lineages=LINEAGES)[0]
    assert across.pooled_half == pytest.approx(stats.t.isf(0.025, 8) * (sigma or 0) * math.sqrt(2 / 5))


def test_two_arms_of_a_lineage_need_a_common_seed_and_others_need_none() -> None:
    values = {"gqa": {0: 1.7, 1: 1.71}, "small": {2: 1.72, 3: 1.74}, "mla": {7: 1.8, 9: 1.81}}
    assert not can_be_compared(values, "gqa", "small", {"small": "gqa"})
    assert can_be_compared(values, "gqa", "mla", {}) and not can_be_compared(values, "gqa", "absent", {})
    with pytest.raises(UserError, match=r"gqa \(seeds 0, 1\) and small \(seeds 2, 3\) descend from the same runs and have no"):
        contrasts(values, primary=[("gqa", "small")], lineages={"small": "gqa"})
    (found,) = contrasts(values, primary=[("mla", "gqa")])
    assert found.p == pytest.approx(stats.ttest_ind([1.8, 1.81], [1.7, 1.71], equal_var=False).pvalue)


# --- deviations --------------------------------------------------------------------------------------------------------


def test_the_residual_deviation_is_that_of_the_simulation() -> None:
    random = np.random.default_rng(4)
    variances = []
    for _ in range(2000):
        sigma, dof = residual_deviation(study(random, UNBALANCED))
        assert sigma is not None and dof == 22 - 6
        variances.append(sigma**2)
    assert statistics.mean(variances) == pytest.approx(SIGMA**2, rel=3 * math.sqrt(2 / 16 / 2000))


def test_an_arm_that_scatters_three_times_as_widely_widens_its_own_intervals() -> None:
    random = np.random.default_rng(8)
    values = study(random, dict.fromkeys(EFFECTS, 6))
    wild = {seed: 1.62 + float(random.normal(0, 4 * SIGMA)) for seed in range(6)}
    found = contrasts(values | {"wild": wild}, primary=[("wild", "mha"), ("mla", "mha")])
    assert found[0].own_half is not None and found[0].pooled_half is not None and found[0].pooled_half < found[0].own_half
    assert half(*interval(found[0])) == pytest.approx(found[0].own_half)
    deviation = mean_interval(values | {"wild": wild}, "wild").deviation
    assert deviation == pytest.approx(statistics.stdev(wild.values()))
    p = equal_variances(values | {"wild": wild})
    assert p is not None and p < 0.01 < (equal_variances(values) or 0)


def test_arms_that_scatter_on_their_own_widen_no_interval_but_their_own() -> None:
    random = np.random.default_rng(8)
    values = study(random, {"mla": 5, "mha": 5, "gqa": 5})
    wild = {seed: result + float(random.normal(0, 10 * SIGMA)) for seed, result in values["gqa"].items()}
    alone = contrasts(values, primary=[("mla", "mha")])[0]
    apart, against = contrasts(values | {"wild": wild}, primary=[("mla", "mha"), ("wild", "mha")], apart=["wild"])
    assert interval(apart) == interval(alone) and apart.p == alone.p
    pooled = contrasts(values | {"wild": wild}, primary=[("mla", "mha")])[0]
    assert pooled.p is not None and alone.p is not None and pooled.p > 5 * alone.p
    welch = stats.ttest_ind([*wild.values()], [*values["mha"].values()], equal_var=False)
    assert against.p == pytest.approx(welch.pvalue) and against.pooled_half is None
    assert interval(against) == pytest.approx(tuple(welch.confidence_interval()))
    assert equal_variances(values | {"wild": wild}, apart=["wild"]) == equal_variances(values)


def test_an_arm_of_one_seed_has_no_error_bar_however_far_it_lies() -> None:
    values = study(np.random.default_rng(10), BALANCED)
    before = residual_deviation(values)
    values["new"] = {1: 7.0}
    assert residual_deviation(values) == before
    (found,) = contrasts(values, primary=[("new", "mha")])
    assert (found.n_a, found.n_b, found.low, found.p, found.resolved, found.same) == (1, 3, None, None, None, None)
    assert found.sentence(BITS_PER_BYTE).endswith(" bits per byte (one seed of new: no error bar)")
    mean = mean_interval(values, "new")
    assert (mean.mean, mean.low, mean.high, mean.n, mean.deviation) == (7.0, None, None, 1, None)


def test_a_mean_has_the_wider_of_its_own_and_the_pooled_interval() -> None:
    random = np.random.default_rng(14)
    sides = set()
    for _ in range(20):
        values = study(random, UNBALANCED)
        sigma, dof = residual_deviation(values)
        runs = [*values["mqa"].values()]
        own = half(*stats.ttest_1samp(runs, 0).confidence_interval())
        pooled = stats.t.isf(0.025, dof) * (sigma or 0) / math.sqrt(3)
        found = mean_interval(values, "mqa")
        assert found.low is not None and found.high is not None
        assert (found.mean, found.n) == (pytest.approx(statistics.mean(runs)), 3)
        assert half(found.low, found.high) == pytest.approx(max(own, pooled))
        assert half(*_ends(mean_interval(values, "mqa", apart=["mqa"]))) == pytest.approx(own)
        sides.add(own > pooled)
    assert sides == {True, False}


def _ends(mean: Any) -> tuple[float, float]:
    return mean.low, mean.high


# --- what so many seeds detect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 8])
def test_what_so_many_seeds_detect_is_what_statsmodels_says_of_the_test_that_decides(n: int) -> None:
    values = exact_study(SIGMA / 50, n=n)
    (found,) = contrasts(values, primary=[("a0", "a1")])
    effect = TTestIndPower().solve_power(nobs1=n, alpha=0.05, power=0.8)
    assert found.resolved is False and found.detectable == pytest.approx(effect * SIGMA, rel=1e-5)
    raw = np.random.default_rng(1).normal(size=n)
    child = {seed: values["a0"][seed] + noise for seed, noise in enumerate(raw.tolist())}
    (found,) = contrasts(values | {"child": child}, primary=[("child", "a0")], lineages={"child": "a0"})
    effect = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)
    assert found.detectable == pytest.approx(effect * raw.std(ddof=1), rel=1e-5)


def test_what_is_detected_depends_on_the_deviations_and_not_on_the_difference() -> None:
    found = [contrasts(exact_study(d, n=3), primary=[("a0", "a1")])[0] for d in (0.0, 0.0001, 0.001, -0.003)]
    assert all(contrast.resolved is False for contrast in found)
    assert [contrast.detectable for contrast in found] == pytest.approx([found[0].detectable] * 4)


def test_a_declared_comparison_is_detected_at_the_level_where_holms_method_stopped() -> None:
    values = exact_study(0.0, n=4, arms=4) | {"far": {seed: 9 + value for seed, value in exact_study(0.0, n=4)["a0"].items()}}
    pairs = [("a0", "a1"), ("a2", "a1"), ("far", "a3")]
    found = contrasts(values, primary=pairs)
    assert [contrast.resolved for contrast in found] == [False, False, True]
    level = TTestIndPower().solve_power(nobs1=4, alpha=0.05 / 2, power=0.8) * SIGMA
    assert found[0].detectable == pytest.approx(level, rel=1e-5)


@pytest.mark.parametrize(("n", "arms"), [(3, 6), (5, 3)])
def test_about_80_percent_of_studies_resolve_what_their_seeds_detect(n: int, arms: int) -> None:
    """A little fewer where either of the two intervals may turn out to be the wider one."""
    random = np.random.default_rng(5)
    seeds = dict.fromkeys((f"a{arm}" for arm in range(arms)), n)
    null = [contrasts(study(random, seeds, dict.fromkeys(seeds, 0.0)), primary=(), other=[("a0", "a1")])[0] for _ in range(300)]
    detectable = statistics.median(found.detectable or math.nan for found in null)
    effects = dict.fromkeys(seeds, 0.0) | {"a0": detectable}
    trials = 600
    resolved = sum(
        bool(contrasts(study(random, seeds, effects), primary=(), other=[("a0", "a1")])[0].resolved) for _ in range(trials)
    )
    assert 0.75 - 0.055 < resolved / trials < 0.80 + 0.05


def test_the_seeds_for_a_margin_are_those_of_a_t_test_of_two_samples() -> None:
    for margin in (0.002, 0.005, 0.010):
        (found,) = contrasts(exact_study(0.0, n=4), primary=[("a0", "a1")], margin=margin)
        expected = math.ceil(TTestIndPower().solve_power(effect_size=margin / SIGMA, alpha=0.05, power=0.8))
        assert found.seeds_for_margin == expected
    (found,) = contrasts(exact_study(0.0, n=4), primary=[("a0", "a1")], margin=SIGMA / 20)
    assert found.seeds_for_margin is None and found.sentence(BITS_PER_BYTE).endswith(f"takes more than {MOST_SEEDS:,}")


@pytest.mark.parametrize("scatter", [(1, 1), (1, 8), (8, 1)])
@pytest.mark.parametrize("others", [0, 3])
def test_so_many_seeds_as_there_are_detect_what_they_are_said_to_detect(scatter: tuple[int, int], others: int) -> None:
    for n in (2, 3, 5):
        raw = exact_study(0.0, n=n, arms=2 + others)
        values = raw | {
            arm: {k: 1.6 + by * (x - 1.6) for k, x in raw[arm].items()} for arm, by in zip(raw, scatter, strict=False)
        }
        (found,) = contrasts(values, primary=[("a0", "a1")])
        assert found.detectable is not None
        for margin, fewest in ((found.detectable * 1.001, n), (found.detectable * 0.999, n + 1)):
            (at,) = contrasts(values, primary=[("a0", "a1")], margin=margin)
            assert at.seeds_for_margin == fewest


# --- verdicts ----------------------------------------------------------------------------------------------------------


def test_an_undeclared_comparison_is_resolved_when_its_interval_excludes_0() -> None:
    random = np.random.default_rng(13)
    verdicts = set()
    for _ in range(40):
        (found,) = contrasts(study(random, BALANCED), primary=(), other=[("mqa", "mha")])
        low, high = interval(found)
        assert found.resolved is (low > 0 or high < 0) and found.p_holm is None
        verdicts.add(found.resolved)
    assert verdicts == {True, False}


def test_one_seed_has_a_difference_and_no_error_bar() -> None:
    values = {"mla": {0: 1.25}, "gqa": {0: 1.5}, "mha": {0: 2.0}}
    assert residual_deviation(values) == (None, 0) and equal_variances(values) is None
    found = contrasts(values, primary=[("mla", "gqa")], other=[("mha", "gqa")])
    assert [contrast.difference for contrast in found] == pytest.approx([-0.25, 0.5])
    assert {(c.low, c.high, c.p, c.p_holm, c.resolved, c.detectable) for c in found} == {(None,) * 6}
    assert [contrast.sentence(BITS_PER_BYTE) for contrast in found] == [
        "mla against gqa: −0.2500 bits per byte (one seed: no error bar)",
        "mha against gqa: +0.5000 bits per byte (one seed: no error bar)",
    ]


def test_seeds_that_agree_to_the_last_digit_give_no_error_bar() -> None:
    values = {arm: {seed: 1.6 + effect for seed in range(3)} for arm, effect in EFFECTS.items()}
    assert residual_deviation(values) == (0.0, 12) and equal_variances(values) is None
    found = contrasts(values, primary=[("mla", "gqa")], other=[("mha", "mqa")])
    assert [(contrast.low, contrast.p, contrast.resolved) for contrast in found] == [(None, None, None)] * 2
    assert found[0].sentence(BITS_PER_BYTE) == (
        "mla against gqa: −0.0070 bits per byte (no error bar: every seed repeats it exactly)"
    )
    mean = mean_interval(values, "mla")
    assert (mean.low, mean.high, mean.deviation) == (None, None, pytest.approx(0, abs=1e-15))


@pytest.mark.parametrize("far", [{0: 1e20}, {0: 1e20, 1: 1e20 + 2**14, 2: 1e20}], ids=["one seed", "rounding alone"])
def test_an_arm_that_diverged_makes_no_noise_of_others_rounding(far: dict[int, float]) -> None:
    values = study(np.random.default_rng(10), BALANCED)
    with_far = values | {"far": far}
    alike = {"primary": [("mla", "mha")], "lineages": {"gqa": "mqa"}, "other": [("gqa", "mqa")]}
    before, after = contrasts(values, **alike), contrasts(with_far, **alike)
    assert [contrast.own_half for contrast in after] == [contrast.own_half for contrast in before]
    assert all(contrast.p for contrast in after) and mean_interval(with_far, "mla").low is not None
    assert equal_variances(with_far) == equal_variances(values)
    # To its own size the difference from it is known to no more digits than all seeds share.
    (against,) = contrasts(with_far, primary=[("far", "mha")])
    assert against.p is None


def test_a_declared_comparison_without_an_error_bar_counts_in_no_correction() -> None:
    values = exact_study(0.001, n=4, arms=3) | {"single": {0: 2.0}}
    pairs = [("a0", "a1"), ("a2", "a1")]
    alone = contrasts(values, primary=pairs, margin=0.01)
    beside = contrasts(values, primary=[*pairs, ("single", "a1")], margin=0.01)
    assert beside[:2] == alone and alone[0].resolved is False and beside[2].p is None


DECLARED: dict[str, Any] = {
    "a": "mla",
    "b": "gqa",
    "primary": True,
    "n_a": 5,
    "n_b": 5,
    "paired": False,
    "difference": -0.0110,
    "low": -0.0140,
    "high": -0.0080,
    "p": 0.002,
    "p_holm": 0.004,
    "resolved": True,
    "detectable": 0.0045,
}
OPEN = {
    "n_a": 3,
    "n_b": 3,
    "difference": -0.0020,
    "low": -0.0055,
    "high": 0.0015,
    "p": 0.21,
    "p_holm": 0.42,
    "resolved": False,
    "detectable": 0.0061,
}
CLOSE = OPEN | {"difference": 0.0020, "low": 0.0001, "high": 0.0039, "p": 0.04}
MARGIN = {"margin": 0.005, "p_same": 0.03, "same": True, "seeds_for_margin": 21}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "mla is 0.0110 ± 0.0030 bits per byte better than gqa (5 seeds, p = 0.004 after Holm)"),
        (
            {"difference": 0.0110, "low": 0.0080, "high": 0.0140, "p_holm": 0.0004},
            "mla is 0.0110 ± 0.0030 bits per byte worse than gqa (5 seeds, p < 0.001 after Holm)",
        ),
        (
            {"primary": False, "p": 0.0497, "p_holm": None, "n_b": 3},
            "mla is 0.0110 ± 0.0030 bits per byte better than gqa (5 and 3 seeds, p < 0.05, not a declared comparison)",
        ),
        (
            {"difference": -1.53, "low": -1.95, "high": -1.11, "paired": True},
            "mla is 1.53 ± 0.42 bits per byte better than gqa (5 seeds, paired within a lineage, p = 0.004 after Holm)",
        ),
        (
            {"difference": -0.0010, "low": -0.0015, "high": -0.0005, **MARGIN},
            "mla is 0.00100 ± 0.00050 bits per byte better than gqa (5 seeds, p = 0.004 after Holm), and yet the same within "
            "0.005 (p = 0.030)",
        ),
        (
            OPEN,
            "mla against gqa: −0.0020 ± 0.0035 bits per byte, not resolved at n = 3; so many seeds detect 0.0061 with 80 % "
            "power",
        ),
        (
            OPEN | MARGIN | {"p_same": 0.2, "same": False},
            "mla against gqa: −0.0020 ± 0.0035 bits per byte, not resolved at n = 3, nor the same within 0.005; so many seeds "
            "detect 0.0061 with 80 % power, 0.005 takes about 21",
        ),
        (
            OPEN | MARGIN,
            "mla and gqa are the same within 0.005 bits per byte: −0.0020 ± 0.0035 bits per byte (3 seeds, p = 0.030 after "
            "Holm)",
        ),
        (
            OPEN | MARGIN | {"p_holm": None, "primary": False},
            "mla and gqa are the same within 0.005 bits per byte: −0.0020 ± 0.0035 bits per byte (3 seeds, p = 0.030, not a "
            "declared comparison)",
        ),
        (
            CLOSE | {"p_holm": 0.08},
            "mla against gqa: +0.0020 ± 0.0019 bits per byte, not resolved at n = 3 (p = 0.080 after Holm); "
            "so many seeds detect 0.0061 with 80 % power",
        ),
        (
            CLOSE | {"p_holm": 0.0503, "n_a": 5, "paired": True},
            "mla against gqa: +0.0020 ± 0.0019 bits per byte, not resolved at n = 5 and 3 "
            "(paired within a lineage, p ≥ 0.05 after Holm); so many seeds detect 0.0061 with 80 % power",
        ),
        (
            OPEN | {"difference": -0.00001, "low": -0.00351, "high": 0.00349},
            "mla against gqa: 0.0000 ± 0.0035 bits per byte, not resolved at n = 3; so many seeds detect 0.0061 with 80 % "
            "power",
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
    dearer, cheaper = (Contrast(**DECLARED | {"difference": d, "low": d - 0.002, "high": d + 0.002}) for d in (0.006, -0.006))
    said = recall.sentence(METRICS["answer_accuracy"], {"loss": dearer, "bits_per_byte": cheaper})
    assert (
        "(+0.0060 ± 0.0020 nats per token, 0.0060 ± 0.0020 bits per byte) better than gqa" in said
    )  # the first speaks for gqa


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


# --- trends ------------------------------------------------------------------------------------------------------------

ARMS = ("a1", "b1", "a2", "b2", "a3", "b3")
WIDTHS = {"a - b": ([("a1", "b1"), ("a2", "b2"), ("a3", "b3")], [192, 256, 384])}


def widths(random: np.random.Generator, deviations: Mapping[str, float], seeds: Mapping[str, int], slope: float = 0.0) -> Study:
    """Six arms, of which a1, a2, a3 lie `slope` times log2(width / 192) above b1, b2, b3."""
    rise = {"a1": 0.0, "a2": math.log2(256 / 192), "a3": 1.0}
    return {
        arm: {seed: 3.5 + slope * rise.get(arm, 0) + random.normal(0, deviations.get(arm, 0.01)) for seed in range(seeds[arm])}
        for arm in ARMS
    }


def test_a_trends_pooled_error_is_that_of_a_linear_combination_of_means() -> None:
    seeds = {"a1": 5, "b1": 4, "a2": 3, "b2": 5, "a3": 3, "b3": 2}
    values = widths(np.random.default_rng(3), {}, seeds, slope=0.02)
    (trend,) = trends(values, WIDTHS)
    frame = pandas.DataFrame([{"arm": arm, "y": y} for arm, runs in values.items() for y in runs.values()])
    fit = ols("y ~ C(arm) - 1", frame).fit()  # a1 a2 a3 b1 b2 b3
    x_N = np.log2([192, 256, 384])
    weights_N = (x_N - x_N.mean()) / ((x_N - x_N.mean()) ** 2).sum()
    test = fit.t_test(np.concatenate((weights_N, -weights_N)))
    low, high = test.conf_int()[0]
    assert trend.slope == pytest.approx(float(test.effect[0]))
    assert trend.pooled_half == pytest.approx((high - low) / 2)
    differences = [statistics.fmean(values[a].values()) - statistics.fmean(values[b].values()) for a, b in WIDTHS["a - b"][0]]
    assert trend.slope == pytest.approx(np.polyfit(x_N, differences, 1)[0])


def test_a_trend_over_two_sizes_is_the_difference_of_two_differences_by_welch() -> None:
    values = widths(np.random.default_rng(4), {"a1": 0.03}, dict.fromkeys(ARMS, 4))
    (trend,) = trends(values, {"doubled": ([("a1", "b1"), ("a3", "b3")], [192, 384])})
    numbers = [[*values[arm].values()] for arm in ("a1", "b1", "a3", "b3")]
    shares = [statistics.variance(runs) / 4 for runs in numbers]
    dof = sum(shares) ** 2 / sum(share**2 / 3 for share in shares)
    assert trend.own_half == pytest.approx(stats.t.ppf(0.975, dof) * math.sqrt(sum(shares)))
    assert trend.pooled_half is not None and trend.own_half is not None and trend.low is not None
    assert trend.slope - trend.low == pytest.approx(max(trend.own_half, trend.pooled_half))
    assert trend.sentence(BITS_PER_BYTE, "model.d_model").startswith(
        "doubled: for each doubling of model.d_model (192, 384) the"
    )


def test_a_trend_that_was_added_later_is_not_corrected_and_does_not_count_in_the_family() -> None:
    values = widths(np.random.default_rng(3), {}, dict.fromkeys(ARMS, 4), slope=0.02)
    pairs, at = WIDTHS["a - b"]
    twice = {"a - b": (pairs, at), "of two": (pairs[:2], at[:2])}
    (alone,) = trends(values, {"a - b": (pairs, at)})
    declared, late = trends(values, twice, late=["of two"])
    assert declared == alone
    (uncorrected,) = trends(values, {"of two": (pairs[:2], at[:2])})
    assert (late.p, late.p_holm, late.low) == (uncorrected.p, None, uncorrected.low)
    assert late.resolved == (late.p is not None and late.p < 0.05)
    assert trends(values, twice)[0].p_holm != alone.p_holm, "declared, it counts"


def test_a_trends_interval_covers_the_slope_in_nineteen_of_twenty_studies() -> None:
    random, seeds = np.random.default_rng(5), {"a1": 5, "b1": 5, "a2": 4, "b2": 4, "a3": 3, "b3": 3}
    deviations, slope, draws = {"a3": 0.03, "b3": 0.02}, -0.01, 1500
    covered = false = 0
    for _ in range(draws):
        (trend,) = trends(widths(random, deviations, seeds, slope), WIDTHS)
        assert trend.low is not None and trend.high is not None
        covered += trend.low <= slope <= trend.high
        (still,) = trends(widths(random, deviations, seeds), WIDTHS)
        false += bool(still.resolved)
    assert covered / draws > 0.935 and false / draws < 0.065


def test_a_trend_with_one_seed_somewhere_has_no_error_bar_and_none_is_made_within_a_lineage_twice() -> None:
    values = widths(np.random.default_rng(6), {}, dict.fromkeys(ARMS, 3) | {"b2": 1}, slope=0.02)
    (trend,) = trends(values, WIDTHS)
    assert trend.p is trend.resolved is trend.low is None and trend.sentence(BITS_PER_BYTE, "width").endswith("(no error bar)")
    with pytest.raises(UserError, match="trend a - b has arms that come from the same runs in two of its pairs"):
        trends(values, WIDTHS, lineages={"a2": "a1"})
