"""What the verdicts promise, on simulated studies in the regime that was observed: coverage, false findings, power.

Arms of one seed correlate by 0.05, deviations differ by up to three times, runs are missing, arms have two seeds, and some
descend from the same runs. The table of docs/STUDIES.md is what the slow test prints:
python -m pytest -q -n 0 -s tests/study/test_coverage.py -m slow
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import statsmodels.stats.multitest  # noqa: F401  whose every call collects garbage: loaded before the fixture `collected`

from harness.study.statistics import contrasts

CORRELATION = 0.05  # of two arms over the seeds that both have
CONTROL = "a0"


@dataclass(frozen=True)
class Design:
    """Arms a0, a1, ... by their seeds and deviations; every arm is compared with a0, and a1 with a2."""

    seeds: list[int]
    deviations: list[float]
    missing: float = 0.0  # share of runs that are not there; two of each arm always are
    children: dict[str, float] = field(default_factory=dict)  # of a0: arms that add so much noise to its very runs
    conservative: bool = False  # the more cautious of two intervals decides, and here it is much wider than it need be

    @property
    def lineages(self) -> dict[str, str]:
        return dict.fromkeys(self.children, CONTROL)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        arms = [f"a{i}" for i in range(1, len(self.seeds))]
        across = [(child, "a1") for child in self.children]
        return [*((arm, CONTROL) for arm in [*arms, *self.children]), ("a1", "a2"), *across]


DESIGNS = {
    "3 seeds, equal deviations": Design([3] * 6, [1.0] * 6, conservative=True),
    "5 and 3 seeds, equal deviations": Design([5, 5, 3, 3, 3, 3], [1.0] * 6, conservative=True),
    "10 seeds, equal deviations": Design([10] * 4, [1.0] * 4, conservative=True),
    "3 seeds, one arm three times": Design([3] * 6, [3.0, *[1.0] * 5]),
    "5 seeds, one arm three times": Design([5] * 6, [3.0, *[1.0] * 5]),
    "5 seeds, the arm of 3 three times": Design([3, 5, 5, 5], [3.0, 1.0, 1.0, 1.0]),
    "5 seeds, the arm of 2 three times": Design([2, 5, 5, 5], [3.0, 1.0, 1.0, 1.0]),
    "10 seeds, one arm three times": Design([10] * 4, [3.0, 1.0, 1.0, 1.0]),
    "2 seeds, equal deviations": Design([2] * 6, [1.0] * 6, conservative=True),
    "2 seeds, one arm three times": Design([2] * 6, [3.0, *[1.0] * 5], conservative=True),
    "5 seeds, a fifth of the runs missing, 1 to 3 times": Design([5] * 6, [3.0, 2.0, 1.0, 1.0, 1.0, 1.0], missing=0.2),
    "5 seeds, four arms of a0's lineage": Design(
        [5, 5, 5, 5], [1.0] * 4, children={"tuned": 0.1, "other": 0.15, "converted": 1.0, "close": 0.05}
    ),
}


def simulated(random: np.random.Generator, design: Design, effects: dict[str, float]) -> dict[str, dict[int, float]]:
    """1.6, an arm's effect, and what its run adds, of which runs of one seed share a twentieth."""
    of_seed = random.normal(size=max(design.seeds))
    values = {}
    for i, (n, deviation) in enumerate(zip(design.seeds, design.deviations, strict=True)):
        own = random.normal(size=n)
        runs = deviation * (math.sqrt(CORRELATION) * of_seed[:n] + math.sqrt(1 - CORRELATION) * own)
        kept = [seed for seed in range(n) if seed < 2 or random.random() >= design.missing]
        values[f"a{i}"] = {seed: 1.6 + effects.get(f"a{i}", 0.0) + float(runs[seed]) for seed in kept}
    for child, noise in design.children.items():
        added = effects.get(child, 0.0) - effects.get(CONTROL, 0.0)
        values[child] = {seed: run + added + noise * float(random.normal()) for seed, run in values[CONTROL].items()}
    return values


@dataclass(frozen=True)
class Promises:
    """Shares of the simulated studies."""

    coverage: dict[tuple[str, str], float]  # of the intervals, by pair
    family_wise: float  # studies without any difference in which a declared contrast is resolved
    false_same: float  # studies in which arms that differ by the margin are called the same


def measured(design: Design, studies: int, seed: int) -> Promises:
    random = np.random.default_rng(seed)
    covered, wrong, same = dict.fromkeys(design.pairs, 0), 0, 0
    for _ in range(studies):
        found = contrasts(simulated(random, design, {}), primary=design.pairs, lineages=design.lineages)
        for contrast in found:
            assert contrast.low is not None and contrast.high is not None
            covered[contrast.a, contrast.b] += contrast.low <= 0 <= contrast.high
        wrong += any(contrast.resolved for contrast in found)
        (apart,) = contrasts(simulated(random, design, {"a1": 4.0}), primary=[("a1", CONTROL)], margin=4.0)
        same += bool(apart.same)
    return Promises({pair: count / studies for pair, count in covered.items()}, wrong / studies, same / studies)


def error(probability: float, trials: int) -> float:
    """Three standard errors of a share."""
    return 3 * math.sqrt(probability * (1 - probability) / trials)


@pytest.mark.parametrize("name", DESIGNS)
def test_intervals_cover_and_families_are_right_within_the_error_of_few_studies(name: str) -> None:
    studies, design = 250, DESIGNS[name]
    found = measured(design, studies, seed=1)
    assert min(found.coverage.values()) >= 0.95 - error(0.95, studies)
    assert design.conservative or min(found.coverage.values()) <= 0.95 + error(0.95, studies)
    assert found.family_wise <= 0.05 + error(0.05, studies)
    assert found.false_same <= 0.05 + error(0.05, studies)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DESIGNS)
def test_intervals_cover_94_to_96_percent_or_more_where_caution_decides(name: str) -> None:
    design = DESIGNS[name]
    found = measured(design, 10_000, seed=2)
    low, high = min(found.coverage.values()), max(found.coverage.values())
    print(f"\n| {name} | {low:.3f} to {high:.3f} | {found.family_wise:.3f} | {found.false_same:.3f} |")
    for pair, share in found.coverage.items():
        print("   ", pair, share)
    assert low >= 0.94
    assert design.conservative or low <= 0.96
    assert found.family_wise <= 0.055 and found.false_same <= 0.055
