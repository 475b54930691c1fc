"""Schedules start above zero, end where they say, and refuse what does not fit."""

from __future__ import annotations

import math

import pytest

from harness.config.schema import BudgetConfig, ScheduleConfig
from harness.errors import UserError
from harness.training.schedule import build_schedule, decay_begins, steps_from_budget, warmup_steps

COSINE = ScheduleConfig(name="cosine", warmup_fraction=0.1, final_lr_fraction=0.1)
WSD = ScheduleConfig(name="wsd", warmup_fraction=0.1, final_lr_fraction=0.0, decay_fraction=0.25)


@pytest.mark.parametrize("config", [COSINE, WSD], ids=lambda config: config.name)
@pytest.mark.parametrize("steps", [2, 3, 7, 40, 1000])
def test_every_schedule_starts_above_zero_peaks_at_one_and_ends_at_its_final_fraction(
    config: ScheduleConfig, steps: int
) -> None:
    factor = build_schedule(config, steps)
    factors = [factor(step) for step in range(1, steps + 1)]
    assert 0.0 < factors[0] <= 1.0
    assert all(0.0 <= value <= 1.0 for value in factors)
    assert factors[-1] == pytest.approx(config.final_lr_fraction, abs=1e-12)
    if steps >= 40:
        warmup = steps // 10
        assert factors[warmup - 1] == 1.0, "the warm-up ends at the peak"
        assert factors[:warmup] == [pytest.approx(step / warmup) for step in range(1, warmup + 1)]
        assert factors[warmup - 1 :] == sorted(factors[warmup - 1 :], reverse=True), "it never rises again"


def test_cosine_is_half_way_down_in_the_middle() -> None:
    factor = build_schedule(COSINE, 110)  # 11 steps of warm-up, 99 of cosine
    assert factor(11 + 33) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))


def test_wsd_is_flat_between_warm_up_and_a_linear_decay() -> None:
    factor = build_schedule(WSD, 100)
    assert {factor(step) for step in range(10, 76)} == {1.0}
    assert [factor(step) for step in (80, 90, 100)] == [pytest.approx(v) for v in (0.8, 0.4, 0.0)]


def test_before_the_decay_a_budget_changes_no_rate_when_the_warm_up_is_kept() -> None:
    warmup = warmup_steps(WSD, 40)
    small, large = build_schedule(WSD, 40), build_schedule(WSD, 100, warmup=warmup)
    last = decay_begins(WSD, 40, warmup=warmup)
    assert [small(step) for step in range(1, last + 1)] == [large(step) for step in range(1, last + 1)]
    assert small(last) == 1.0 > small(last + 1)
    assert large(decay_begins(WSD, 100, warmup=warmup)) == 1.0 > large(decay_begins(WSD, 100, warmup=warmup) + 1)


def test_warm_up_and_decay_may_fill_the_whole_budget_however_they_round() -> None:
    config = ScheduleConfig(name="wsd", warmup_fraction=0.5, final_lr_fraction=0.0, decay_fraction=0.5)
    for steps in range(2, 30):
        factors = [build_schedule(config, steps)(step) for step in range(1, steps + 1)]
        assert max(factors) == 1.0 and factors[-1] == 0.0


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        (ScheduleConfig("cosine", 1.0, 0.1), 10, "warmup_fraction=1.0 of 10 steps"),
        (ScheduleConfig("cosine", 0.99, 0.1), 10, "leaves none"),
        (ScheduleConfig("cosine", -0.1, 0.1), 10, "warmup_fraction=-0.1"),
        (ScheduleConfig("cosine", 0.1, 1.5), 10, "final_lr_fraction=1.5"),
        (ScheduleConfig("cosine", 0.1, math.nan), 10, "final_lr_fraction=nan"),
        (ScheduleConfig("cosine", 0.1, 0.1, decay_fraction=0.2), 10, "means nothing to schedule=cosine"),
        (ScheduleConfig("wsd", 0.1, 0.0), 10, "decay_fraction=None"),
        (ScheduleConfig("wsd", 0.1, 0.0, decay_fraction=0.0), 10, "no decay"),
        (ScheduleConfig("wsd", 0.5, 0.0, decay_fraction=0.6), 10, "sum to more than 1"),
        (ScheduleConfig("linear", 0.1, 0.0), 10, "choose cosine or wsd"),
        (ScheduleConfig("cosine", 0.0, 0.0), 1, "rate 0"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_in_one_sentence(config: ScheduleConfig, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_schedule(config, steps)


def test_a_budget_buys_whole_steps_and_never_more_tokens_than_it_holds() -> None:
    assert steps_from_budget(BudgetConfig(), tokens_per_step=4096, default_tokens=10_000) == 2
    assert steps_from_budget(BudgetConfig(tokens=4096), tokens_per_step=4096, default_tokens=1) == 1
    assert steps_from_budget(BudgetConfig(steps=7), tokens_per_step=4096, default_tokens=1) == 7


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (BudgetConfig(tokens=100, steps=1), "both given"),
        (BudgetConfig(tokens=99), "99 tokens is less than one step of 100"),
        (BudgetConfig(tokens=0), "less than one step"),
        (BudgetConfig(steps=0), "trains nothing"),
    ],
)
def test_a_budget_of_two_minds_or_of_no_step_is_refused(budget: BudgetConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        steps_from_budget(budget, tokens_per_step=100, default_tokens=1000)
