"""Attempts at a run, through tests/support/killed.py, and how the run that comes out of them is judged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from harness.training.checkpoint import best_checkpoint
from tests.support.forks import Forks
from tests.support.micro import Workplace, metrics_of, summary_of, without_clocks
from tests.support.tiny_model import find_damage

STEPS = 10
LONG = [
    f"budget.steps={STEPS}",
    "intervals.log=1",
    "intervals.evaluate=3",
    "intervals.checkpoint=2",
    "model.dropout=0.1",
    "attention=mla",
    "spikes.sigma=1",
    "spikes.window=3",
]


class Killer:
    """A process that starts a run as often as it is told to, and `whole`, a run that nobody interrupts."""

    def __init__(self, place: Workplace, forks: Forks) -> None:
        self.place = place
        commands, answers, errors = (place.folder / name for name in ("commands", "answers", "errors.txt"))
        os.mkfifo(commands)
        os.mkfifo(answers)
        errors.touch()
        self.process = forks.start("tests/support/killed.py", streams=[commands, answers, errors])
        self.commands, self.answers = commands.open("w"), answers.open()
        assert self.attempt("first")["status"] == 0
        whole = self.attempt("whole")
        self.whole = place.runs / "whole"
        assert whole["status"] == 0
        assert summary_of(self.whole)["skipped_steps"] > 0, "what is judged by the last steps would go unnoticed"
        self.events: int = whole["events"]
        started = time.monotonic()
        assert self.attempt("timed", after=60)["status"] == 0
        self.seconds = time.monotonic() - started

    def overrides(self, name: str, *more: str) -> list[str]:
        return self.place.overrides(f"name={name}", *LONG, *more)

    def attempt(self, name: str, *more: str, **how: Any) -> dict[str, Any]:
        """One start of a training; `how` as tests/support/killed.py takes it."""
        return self.start("train_model", self.overrides(name, *more), **how)

    def start(self, program: str, overrides: list[str], **how: Any) -> dict[str, Any]:
        """One start of any program."""
        self.commands.write(json.dumps({"program": program, "overrides": overrides} | how) + "\n")
        self.commands.flush()
        answer: dict[str, Any] = json.loads(self.answers.readline())
        return answer

    def close(self) -> None:
        self.commands.close()
        self.process.wait(60)
        self.answers.close()


def weights(run: Path, step: int = STEPS) -> bytes:
    return (run / "checkpoints" / f"step-{step:08}" / "model.safetensors").read_bytes()


def assert_equal_runs(run: Path, whole: Path) -> None:
    """Losses, rates, metrics line by line, final weights, summary: bit for bit the other run's, clocks apart."""
    assert [without_clocks(line) for line in metrics_of(run)] == [without_clocks(line) for line in metrics_of(whole)]
    assert weights(run) == weights(whole)
    assert without_clocks(summary_of(run)) | {"name": whole.name} == without_clocks(summary_of(whole))


def assert_equal_checkpoints(run: Path, whole: Path) -> None:
    """The same steps are kept, all of them whole, and the same is the best."""
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {path.name for path in (whole / "checkpoints").iterdir()} >= {"best"}
    assert all(find_damage(run / "checkpoints" / name) is None for name in names)
    kept, other = best_checkpoint(run / "checkpoints"), best_checkpoint(whole / "checkpoints")
    assert kept is not None and other is not None
    assert kept.weights.read_bytes() == other.weights.read_bytes()
