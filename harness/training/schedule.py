"""Learning-rate schedules as pure functions of the step, and the number of steps that a budget buys.

A factor multiplies every peak rate. Steps count from 1: step 1 already has a rate above zero, the last step has exactly
`final` times the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from harness.config.schema import BudgetConfig, ScheduleConfig, TrainConfig
from harness.errors import UserError


def cosine(step: int, steps: int, *, warmup: int, final: float) -> float:
    """Linear warm-up over `warmup` steps to 1, then half a cosine down to `final` at step `steps`."""
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / (steps - warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stable_decay(step: int, steps: int, *, warmup: int, decay: int, final: float) -> float:
    """Linear warm-up to 1, constant, linear over the last `decay` steps down to `final` (arXiv 2404.06395)."""
    if step <= warmup:
        return step / warmup
    return final + (1.0 - final) * min(1.0, (steps - step) / decay)


def warmup_steps(config: ScheduleConfig, steps: int) -> int:
    """The length of the warm-up of a run of so many steps."""
    return round(config.warmup_fraction * steps)


def decay_begins(config: ScheduleConfig, steps: int, *, warmup: int) -> int:
    """The last step that a warm-up-stable-decay schedule makes at the full rate."""
    assert config.decay_fraction is not None
    # Both parts are rounded, so that together they may pass the end by one step: the warm-up keeps its own.
    return steps - min(max(1, round(config.decay_fraction * steps)), steps - warmup)


def build_schedule(config: ScheduleConfig, steps: int, *, warmup: int | None = None) -> Callable[[int], float]:
    """The factor in [0, 1] of every step from 1 to `steps`. Raises UserError when the parts do not fit the steps.

    warmup: steps, of a run whose budget has grown since; None: the fraction of `steps`.
    """
    final = config.final_lr_fraction
    _check_fraction("warmup_fraction", config.warmup_fraction)
    _check_fraction("final_lr_fraction", final)
    warmup = warmup_steps(config, steps) if warmup is None else warmup
    if warmup >= steps:
        raise UserError(
            f"schedule.warmup_fraction={config.warmup_fraction} of {steps} steps is {warmup} steps of warm-up, which "
            f"leaves none to train at the full rate: lower it or raise the budget"
        )

    if config.name == "cosine":
        if config.decay_fraction is not None:
            raise UserError(
                f"schedule.decay_fraction={config.decay_fraction} means nothing to schedule=cosine, which falls from "
                f"the end of the warm-up on: leave it out or choose schedule=wsd"
            )

        def factor(step: int) -> float:
            return cosine(step, steps, warmup=warmup, final=final)

    elif config.name == "wsd":
        if config.decay_fraction is None or config.decay_fraction <= 0.0:
            raise UserError(
                f"schedule.decay_fraction={config.decay_fraction} gives schedule=wsd no decay: "
                f"set it above 0 and at most 1 (0.2 is common)"
            )
        _check_fraction("decay_fraction", config.decay_fraction)
        if config.warmup_fraction + config.decay_fraction > 1.0:
            raise UserError(
                f"schedule.warmup_fraction={config.warmup_fraction} and schedule.decay_fraction="
                f"{config.decay_fraction} sum to more than 1: lower one of them"
            )
        decay = steps - decay_begins(config, steps, warmup=warmup)

        def factor(step: int) -> float:
            return warmup_stable_decay(step, steps, warmup=warmup, decay=decay, final=final)

    else:
        raise UserError(f"schedule.name={config.name} is unknown: choose cosine or wsd")

    if factor(1) <= 0.0:
        raise UserError(
            f"a budget of {steps} step with schedule.final_lr_fraction={final} would train at rate 0: "
            f"raise the budget or the final fraction"
        )
    return factor


def steps_from_budget(budget: BudgetConfig, *, tokens_per_step: int, default_tokens: int) -> int:
    """Optimizer steps that the budget pays for, never more tokens than asked for; an empty budget means default_tokens.

    Raises UserError when both tokens and steps are given, or when not even one step fits.
    """
    if budget.tokens is not None and budget.steps is not None:
        raise UserError(f"budget.tokens={budget.tokens} and budget.steps={budget.steps} are both given: keep one of them")
    if budget.steps is not None:
        if budget.steps < 1:
            raise UserError(f"budget.steps={budget.steps} trains nothing: give at least 1")
        return budget.steps
    tokens = default_tokens if budget.tokens is None else budget.tokens
    if tokens < tokens_per_step:
        raise UserError(
            f"a budget of {tokens} tokens is less than one step of {tokens_per_step} tokens (batch_size x "
            f"max_seq_len): raise budget.tokens to that, or lower batch_size or model.max_seq_len"
        )
    return tokens // tokens_per_step


def _check_fraction(field: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"schedule.{field}={value} is no fraction: give a number from 0 to 1")


def training_steps(config: TrainConfig) -> int:
    """Optimizer steps of a run, each of batch_size windows. Raises UserError as `steps_from_budget`."""
    return steps_from_budget(
        config.budget, tokens_per_step=config.batch_size * config.model.max_seq_len, default_tokens=config.model.default_tokens
    )


def steps_due(number: int, last: int, interval: int) -> bool:
    """Is it time, at step `number`, for what happens every `interval` steps and at the end?"""
    return number % interval == 0 or number == last
