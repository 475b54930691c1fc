"""A run whose budget grows: the one change of what a run is that a command may make while it continues it.

The rate of a warm-up-stable-decay schedule does not depend on the budget until it falls. As long as no step of the decay
has been made, under neither budget, the steps that a larger budget adds go between the last step made and the decay. The
warm-up keeps the length that it had when the run began.
"""

from __future__ import annotations

from pathlib import Path

from harness.config.identity import differences
from harness.config.schema import TrainConfig
from harness.errors import UserError
from harness.runs.state import SavedState, check_resumable
from harness.training.checkpoint import latest_checkpoint
from harness.training.schedule import decay_begins, training_steps

BUDGET = ("budget.steps", "budget.tokens")


def grows(config: TrainConfig, older: TrainConfig, run: Path) -> bool:
    """May the unfinished run in this folder, begun as `older`, go on as `config`, which differs from it?

    Raises UserError when all that differs is a larger budget that comes too late.
    """
    differing = differences(config, older)
    steps, steps_before = training_steps(config), training_steps(older)
    if config.schedule.name != "wsd" or steps <= steps_before:
        return False
    if any(sentence.split(" ", 1)[0] not in BUDGET for sentence in differing):
        return False
    checkpoint = latest_checkpoint(run / "checkpoints", check_resumable)
    if checkpoint is None:
        return True
    saved = SavedState.of(checkpoint)
    if saved.warmup_steps is None:
        raise UserError(
            f"{checkpoint} was written by an older version, which did not note the length of its warm-up: train on with "
            f"the budget that the run was started with ({'; '.join(differing)})"
        )
    warmup = saved.warmup_steps
    decay = min(decay_begins(config.schedule, budget, warmup=warmup) for budget in (steps, steps_before))
    if saved.step > decay:
        raise UserError(
            f"the run {run} is at step {saved.step:,} and its rate has been falling since step {decay:,}, too late for "
            f"another budget ({'; '.join(differing)}): train on with the one it has, or choose another name=..."
        )
    return True
