"""A run that is killed, at whatever moment and however often, is in the end the run that was never interrupted.

What is killed is train_model.main in a process of its own, by SIGKILL. `--kills N` makes N kills of each kind in place of
the few that the ordinary run of the tests has time for.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config import ROOT
from harness.training.checkpoint import best_checkpoint, find_damage
from tests.support.micro import Workplace, metrics_of, summary_of, without_clocks

STEPS = 10
LONG = [f"budget.steps={STEPS}", "intervals.log=1", "intervals.evaluate=3", "intervals.checkpoint=2",
        "model.dropout=0.1", "attention=mla", "spikes.sigma=3", "spikes.window=3"]  # fmt: skip


class Killer:
    """tests/support/killed.py at the other end of a pipe."""

    def __init__(self, place: Workplace) -> None:
        self.place, self.kills = place, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "killed.py")], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def attempt(self, name: str, *more: str, after: float | None = None, event: int | None = None) -> dict[str, Any]:
        """One start of the command, whole or killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        overrides = self.place.overrides(f"name={name}", *LONG, *more)
        command = {"overrides": overrides, "after": after, "event": event}
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert answer["status"] in (0, -9), "neither finished nor killed"
        self.kills += answer["status"] == -9
        return answer


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    """With a run, `whole`, that nobody interrupted."""
    killer = Killer(Workplace(tmp_path_factory.mktemp("kills")))
    killer.attempt("first")  # which prepares the data
    whole = killer.attempt("whole")
    started = time.monotonic()
    killer.attempt("timed", after=60.0)
    killer.seconds, killer.events = time.monotonic() - started, whole["events"]  # type: ignore[attr-defined]
    yield killer
    killer.process.communicate()


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / f"step-{STEPS:08}" / "model.safetensors").read_bytes()


def assert_never_interrupted(run: Path, whole: Path) -> None:
    """Losses, rates, metrics line by line, weights, summary, what is kept: bit for bit those of the other run."""
    assert [without_clocks(line) for line in metrics_of(run)] == [without_clocks(line) for line in metrics_of(whole)]
    assert weights(run) == weights(whole)
    assert without_clocks(summary_of(run)) | {"name": whole.name} == without_clocks(summary_of(whole))
    names = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert names == {"best", f"step-{STEPS - 2:08}", f"step-{STEPS:08}"}
    assert all(find_damage(run / "checkpoints" / name) is None for name in names)
    kept, other = best_checkpoint(run / "checkpoints"), best_checkpoint(whole / "checkpoints")
    assert kept is not None and other is not None
    assert (kept / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def number_of_kills(request: pytest.FixtureRequest, few: int) -> int:
    return request.config.getoption("--kills") or few


@pytest.mark.timeout(0)
@pytest.mark.parametrize("background", ["true", "false"])
def test_killed_at_random_moments_and_started_again_a_run_is_the_one_never_interrupted(
    killer: Killer, background: str, request: pytest.FixtureRequest
) -> None:
    seed = random.randrange(2**32)
    choose, wanted, number = random.Random(seed), number_of_kills(request, 6), 0
    before = killer.kills
    while killer.kills - before < wanted:
        number += 1
        name = f"random-{background}-{number}"
        for _ in range(6):
            after = choose.uniform(0.0, 1.1 * killer.seconds)  # type: ignore[attr-defined]
            if killer.attempt(name, f"checkpoints.background={background}", after=after)["status"] == 0:
                break
        killer.attempt(name, f"checkpoints.background={background}")
        assert_never_interrupted(killer.place.runs / name, killer.place.runs / "whole")
    print(f"survived {killer.kills - before} kills at random moments (seed {seed})")


@pytest.mark.timeout(0)
@pytest.mark.parametrize("background", ["true", "false"])
def test_killed_before_any_change_of_its_files_a_run_is_the_one_never_interrupted(
    killer: Killer, background: str, request: pytest.FixtureRequest
) -> None:
    """Every change from the first file written to the last renamed, in the long mode; a sample of them otherwise."""
    events: int = killer.events  # type: ignore[attr-defined]
    few = request.config.getoption("--kills") is None
    seed = random.randrange(2**32)
    chosen = random.Random(seed).sample(range(1, events), 6) if few else range(1, events)
    before = killer.kills
    for event in chosen:
        name = f"event-{background}-{event}"
        killer.attempt(name, f"checkpoints.background={background}", event=event)
        killer.attempt(name, f"checkpoints.background={background}")
        assert_never_interrupted(killer.place.runs / name, killer.place.runs / "whole")
    print(f"survived {killer.kills - before} kills before one of {events} changes of files (seed {seed})")
