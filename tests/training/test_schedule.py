"""Schedules start above zero, end where they say, and refuse what does not fit."""

from __future__ import annotations

import math

import pytest

from harness.config.compose import load_train_config
from harness.config.schema import ScheduleConfig
from harness.errors import UserError
from harness.training.schedule import Schedule, training_steps

COSINE = ScheduleConfig(name="cosine", warmup_fraction=0.1, final_lr_fraction=0.1)
WSD = ScheduleConfig(name="wsd", warmup_fraction=0.1, final_lr_fraction=0.0, decay_fraction=0.25)


@pytest.mark.parametrize("config", [COSINE, WSD], ids=lambda config: config.name)
@pytest.mark.parametrize("steps", [2, 3, 7, 40, 1000])
def test_every_schedule_starts_above_zero_peaks_at_one_and_ends_at_its_final_fraction(
    config: ScheduleConfig, steps: int
) -> None:
    factor = Schedule(config, steps)
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
    factor = Schedule(COSINE, 110)  # 11 steps of warm-up, 99 of cosine
    assert factor(11 + 33) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))


def test_wsd_is_flat_between_warm_up_and_a_linear_decay() -> None:
    factor = Schedule(WSD, 100)
    assert {factor(step) for step in range(10, 76)} == {1.0}
    assert [factor(step) for step in (80, 90, 100)] == [pytest.approx(v) for v in (0.8, 0.4, 0.0)]


def test_before_the_decay_a_budget_changes_no_rate_when_the_warm_up_is_kept() -> None:
    small = Schedule(WSD, 40)
    large, last = Schedule(WSD, 100, warmup=small.warmup), small.decay_begins
    assert [small(step) for step in range(1, last + 1)] == [large(step) for step in range(1, last + 1)]
    assert small(last) == 1.0 > small(last + 1)
    assert large(large.decay_begins) == 1.0 > large(large.decay_begins + 1)


def test_warm_up_and_decay_may_fill_the_whole_budget_however_they_round() -> None:
    config = ScheduleConfig(name="wsd", warmup_fraction=0.5, final_lr_fraction=0.0, decay_fraction=0.5)
    for steps in range(2, 30):
        factors = [Schedule(config, steps)(step) for step in range(1, steps + 1)]
        assert max(factors) == 1.0 and factors[-1] == 0.0


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        (ScheduleConfig("cosine", 1.0, 0.1), 10, "warmup_fraction=1.0 of 10 steps"),
        (ScheduleConfig("cosine", 0.99, 0.1), 10, "leaves none"),
        (ScheduleConfig("cosine", 0.1, 0.1, decay_fraction=0.2), 10, "means nothing to schedule=cosine"),
        (ScheduleConfig("wsd", 0.1, 0.0), 10, "decay_fraction=None"),
        (ScheduleConfig("wsd", 0.1, 0.0, decay_fraction=0.0), 10, "no decay"),
        (ScheduleConfig("wsd", 0.5, 0.0, decay_fraction=0.6), 10, "sum to more than 1"),
        (ScheduleConfig("cosine", 0.0, 0.0), 1, "rate 0"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_in_one_sentence(config: ScheduleConfig, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Schedule(config, steps)


def test_a_budget_buys_whole_steps_and_never_more_tokens_than_it_holds() -> None:
    def steps(*overrides: str) -> int:
        return training_steps(load_train_config(["batch_size=16", "model.max_seq_len=256", *overrides]))

    assert steps("model.default_tokens=10000") == 2
    assert steps("budget.tokens=4096", "model.default_tokens=1") == 1
    assert steps("budget.steps=7", "model.default_tokens=1") == 7
    with pytest.raises(UserError, match="a budget of 4095 tokens is less than one step of 4096"):
        steps("budget.tokens=4095")
