"""A run that is killed, at whatever moment and however often, is in the end the run that was never interrupted.

What is killed is train_model.main in a process of its own, by SIGKILL. `--kills N` makes N kills at random moments, and
one before every change of a file, in place of the few that the ordinary run of the tests has time for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.attempts import Killer, assert_equal_checkpoints, assert_equal_runs
from tests.support.micro import Workplace

FEW = 6
pytestmark = pytest.mark.timeout(0)


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    killer = Killer(Workplace(tmp_path_factory.mktemp("kills")))
    yield killer
    killer.close()


def assert_never_interrupted(killer: Killer, name: str) -> None:
    assert_equal_runs(killer.place.runs / name, killer.whole)
    assert_equal_checkpoints(killer.place.runs / name, killer.whole)


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
