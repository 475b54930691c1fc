"""What a session tells the person who waits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness.runs.session import TIMED_SECONDS, Session
from harness.training.loop import Step
from harness.training.step import WARM_UP


def said(durations: list[float], *, first_step: int = 1) -> list[tuple[int, str]]:
    """What is said after which step of a run whose steps take so long, of 1,000 tokens each."""
    last = first_step - 1 + len(durations)
    schedule = SimpleNamespace(steps=last)
    session: Any = SimpleNamespace(first_step=first_step, schedule=schedule, tokens_per_step=1000, timed_from=None)
    lines = []
    for count, number in enumerate(range(first_step, last + 1), start=1):
        step = Step(number, 1.0, 1.0, 1.0, 1.0, 1000 * number, seconds=sum(durations[:count]))
        if (line := Session.time_line(session, step)) is not None:
            lines.append((number, line))
    return lines


@pytest.mark.parametrize("first_step", [1, 501])
def test_how_long_the_rest_takes_is_said_once_by_steps_that_neither_compile_nor_warm_up(first_step: int) -> None:
    slow, fast = [30.0, 1.0, 1.0, 5.0], 0.125
    assert len(slow) == WARM_UP + 1
    enough = int(TIMED_SECONDS / fast)
    ((number, line),) = said([*slow, *[fast] * 6000], first_step=first_step)
    assert number == first_step - 1 + len(slow) + enough
    left = 6000 - enough
    assert line == f"time        about {round(left * fast / 60)} min for the {1000 * left:,} tokens left, evaluation apart"


def test_steps_of_minutes_are_foretold_after_the_first_that_tells() -> None:
    ((number, line),) = said([300.0, *[120.0] * 63])
    assert (number, line) == (WARM_UP + 2, "time        about 118 min for the 59,000 tokens left, evaluation apart")


def test_nothing_is_said_of_a_run_that_ends_before_it_tells() -> None:
    assert said([1.0] * (WARM_UP + 1)) == said([0.01] * 100) == []
