"""What a checkpoint knows of its training besides the tensors, read back, and what may go on from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.identity import differences
from harness.config.schema import TrainConfig
from harness.config.typed import typed
from harness.errors import UserError
from harness.files.untrusted import Count, is_count
from harness.tracking.wandb_run import RUN_ID
from harness.training.checkpoint import STATE, Checkpoint, DamagedCheckpoint, check_generators, latest_checkpoint
from harness.training.loop import Step
from harness.training.schedule import Schedule, training_steps


@dataclass(frozen=True)
class SavedGuard:
    """Guard.state()."""

    skipped: Count
    in_a_row: Count
    losses: list[float]
    norms: list[float]


_MAY_BE_NAN = ("loss", "grad_norm", "tokens_per_second")  # of a step that was skipped


@dataclass(frozen=True)
class SavedState:
    """What Session.save hands to a checkpoint, without what is compared elsewhere. Older checkpoints lack the defaults."""

    step: int
    last_step: Step
    seconds: float
    metrics_bytes: Count
    wandb_id: str | None
    warmup_steps: Count | None = None
    initial_tokens: Count | None = None
    evaluation_due: bool = False
    best: list[float] | None = None  # step and loss
    guard: SavedGuard | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SavedState:
        """Raises DamagedCheckpoint, naming the field, for what is no such state."""
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            content = {key: value for key, value in checkpoint.state.items() if key in known}
            step = content.get("last_step")
            lost: dict[str, Any] = {}
            if isinstance(step, Mapping):  # what was not finite stands as null in JSON
                lost = {key: math.nan for key in _MAY_BE_NAN if step.get(key, 0) is None}
                content["last_step"] = {**step, **dict.fromkeys(lost, 0.0)}
            saved: SavedState = typed(cls, content, "state")
        except UserError as error:
            raise DamagedCheckpoint(checkpoint.path, f"{STATE}: {error}") from None
        odd = [] if is_count(saved.last_step.tokens) else [f"last_step.tokens={saved.last_step.tokens}, no count"]
        if saved.last_step.number != saved.step:
            odd.append(f"last_step.number={saved.last_step.number} after step {saved.step}")
        if saved.best is not None and (len(saved.best) != 2 or saved.best[0] not in range(1, saved.step + 1)):
            odd.append(f"best={saved.best}, no pair of a step up to {saved.step} and its loss")
        if saved.wandb_id is not None and not RUN_ID.fullmatch(saved.wandb_id):
            odd.append(f"wandb_id={saved.wandb_id}, no name of a W&B run")
        if odd:
            raise DamagedCheckpoint(checkpoint.path, f"{STATE}: {odd[0]}")
        return dataclasses.replace(saved, last_step=dataclasses.replace(saved.last_step, **lost))


def check_resumable(checkpoint: Checkpoint) -> None:
    """Raises DamagedCheckpoint for a checkpoint that is whole and whose state no training can go on from."""
    SavedState.of(checkpoint)
    check_generators(checkpoint)


BUDGET = ("budget.steps", "budget.tokens")


def grows(config: TrainConfig, older: TrainConfig, run: Path) -> bool:
    """May the unfinished run in this folder, begun as `older`, go on as `config`, which differs from it?

    A larger budget is the one change of what a run is that a command may make. The rate of a warm-up-stable-decay schedule
    does not depend on the budget until it falls: as long as the decay has begun under neither budget, the added steps go
    between the last step made and the decay. The warm-up keeps the length that it had when the run began.

    Raises UserError when all that differs is a larger budget that comes too late.
    """
    budgets = training_steps(config), training_steps(older)
    if config.schedule.name != "wsd" or budgets[0] <= budgets[1]:
        return False
    if differences(config, older, apart_from=BUDGET):
        return False
    checkpoint = latest_checkpoint(run / "checkpoints", check_resumable)
    if checkpoint is None:
        return True
    differing = differences(config, older)
    saved = SavedState.of(checkpoint)
    if saved.warmup_steps is None:
        raise UserError(
            f"{checkpoint.path} was written by an older version, which did not note the length of its warm-up: train on with "
            f"the budget that the run was started with ({'; '.join(differing)})"
        )
    decay = min(Schedule(config.schedule, budget, warmup=saved.warmup_steps).decay_begins for budget in budgets)
    if saved.step > decay:
        raise UserError(
            f"the run {run} is at step {saved.step:,} and its rate has been falling since step {decay:,}, too late for "
            f"another budget ({'; '.join(differing)}): train on with the one it has, or choose another name=..."
        )
    return True
