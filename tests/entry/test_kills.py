"""A run that is killed, at whatever moment and however often, is in the end the run that was never interrupted.

What is killed is train_model.main in a process of its own, by SIGKILL. `--kills N` makes N kills at random moments, and
one before every change of a file, in place of the few that the ordinary run of the tests has time for.
"""

from __future__ import annotations

import random
import re
import signal
from pathlib import Path

import pytest

from tests.support.attempts import Killer, assert_equal_checkpoints, assert_equal_runs

FEW = 6
pytestmark = pytest.mark.timeout(0)


def assert_never_interrupted(killer: Killer, name: str) -> None:
    assert_equal_runs(killer.place.runs / name, killer.whole)
    assert_equal_checkpoints(killer.place.runs / name, killer.whole)


@pytest.mark.parametrize(("step", "goes_on"), [(1, None), (3, 3), (6, 5)])
def test_killed_within_a_step_a_run_goes_on_from_its_newest_checkpoint(
    killer: Killer, step: int, goes_on: int | None, tmp_path: Path
) -> None:
    name, how, output = f"step-{step}", "checkpoints.background=false", tmp_path / "out"
    assert killer.attempt(name, how, signals=["step", step, [signal.SIGKILL]])["status"] == -9
    assert killer.attempt(name, how, after=60, output=str(output))["status"] == 0
    assert re.findall(r", from step (\d+)$", output.read_text(), re.MULTILINE) == ([str(goes_on)] if goes_on else [])
    assert_never_interrupted(killer, name)


@pytest.mark.parametrize("background", ["true", "false"])
def test_killed_at_random_moments_and_started_again_a_run_is_the_one_never_interrupted(
    killer: Killer, background: str, request: pytest.FixtureRequest
) -> None:
    seed, wanted = random.randrange(2**32), request.config.getoption("--kills") or FEW
    choose, kills, number = random.Random(seed), 0, 0
    while kills < wanted:
        number += 1
        name, how = f"random-{background}-{number}", f"checkpoints.background={background}"
        for _ in range(6):
            status = killer.attempt(name, how, after=choose.uniform(0.0, 1.1 * killer.seconds))["status"]
            assert status in (0, -9)
            kills += status == -9
        assert killer.attempt(name, how, after=60)["status"] == 0
        assert_never_interrupted(killer, name)
    print(f"survived {kills} kills of {number} runs at random moments (seed {seed})")


@pytest.mark.parametrize("background", ["true", "false"])
def test_killed_before_any_change_of_its_files_a_run_is_the_one_never_interrupted(
    killer: Killer, background: str, request: pytest.FixtureRequest
) -> None:
    """A file opened to be written, flushed, renamed, linked, deleted; a folder made or deleted."""
    seed, every = random.randrange(2**32), range(1, killer.events)
    chosen = every if request.config.getoption("--kills") else random.Random(seed).sample(every, FEW)
    kills = 0
    for event in chosen:
        name, how = f"event-{background}-{event}", f"checkpoints.background={background}"
        kills += killer.attempt(name, how, event=event)["status"] == -9
        assert killer.attempt(name, how, after=60)["status"] == 0
        assert_never_interrupted(killer, name)
    print(f"survived {kills} kills, each before another of {killer.events} changes of files (seed {seed})")
    assert kills > len(chosen) / 2, "hardly any was killed"
