"""Learning-rate schedules as pure functions of the step, and the number of steps that a budget buys.

A factor multiplies every peak rate. Steps count from 1: step 1 already has a rate above zero, the last step has exactly
`final_lr_fraction` times the peak.
"""

from __future__ import annotations

import math

from harness.config.schema import ScheduleConfig, TrainConfig
from harness.errors import UserError


class Schedule:
    """The factor in [0, 1] of every step from 1 to `steps`: linear warm-up to 1, then down to final_lr_fraction.

    cosine: half a cosine from the end of the warm-up on. wsd: constant, then linear over the last steps (arXiv 2404.06395).
    """

    def __init__(self, config: ScheduleConfig, steps: int, *, warmup: int | None = None) -> None:
        """warmup: steps, of a run whose budget has grown since; None: the fraction of `steps`.

        Raises UserError when the parts do not fit the steps.
        """
        self.config, self.steps = config, steps
        self.warmup = round(config.warmup_fraction * steps) if warmup is None else warmup
        if self.warmup >= steps:
            raise UserError(
                f"schedule.warmup_fraction={config.warmup_fraction} of {steps} steps is {self.warmup} steps of warm-up, which "
                f"leaves none to train at the full rate: lower it or raise the budget"
            )
        if config.name == "cosine" and config.decay_fraction is not None:
            raise UserError(
                f"schedule.decay_fraction={config.decay_fraction} means nothing to schedule=cosine, which falls from "
                f"the end of the warm-up on: leave it out or choose schedule=wsd"
            )
        if config.name == "wsd" and not config.decay_fraction:
            raise UserError(
                f"schedule.decay_fraction={config.decay_fraction} gives schedule=wsd no decay: "
                f"set it above 0 and at most 1 (0.2 is common)"
            )
        if config.warmup_fraction + (config.decay_fraction or 0.0) > 1.0:
            raise UserError(
                f"schedule.warmup_fraction={config.warmup_fraction} and schedule.decay_fraction="
                f"{config.decay_fraction} sum to more than 1: lower one of them"
            )
        if self(1) <= 0.0:
            raise UserError(
                f"a budget of {steps} step with schedule.final_lr_fraction={config.final_lr_fraction} would train at rate 0: "
                f"raise the budget or the final fraction"
            )

    @property
    def decay_begins(self) -> int:
        """The last step at the full rate."""
        if self.config.decay_fraction is None:
            return self.warmup
        # Both parts are rounded, so that together they may pass the end by one step: the warm-up keeps its own.
        return self.steps - min(max(1, round(self.config.decay_fraction * self.steps)), self.steps - self.warmup)

    def __call__(self, step: int) -> float:
        if step <= self.warmup:
            return step / self.warmup
        final, decay = self.config.final_lr_fraction, self.steps - self.decay_begins
        if self.config.name == "wsd":
            return final + (1.0 - final) * min(1.0, (self.steps - step) / decay)
        progress = (step - self.warmup) / decay
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def training_steps(config: TrainConfig) -> int:
    """Optimizer steps, each of batch_size windows, that the budget pays for, never more tokens than asked for.

    An empty budget means the model's default_tokens. Raises UserError when not even one step fits.
    """
    if config.budget.steps is not None:
        return config.budget.steps
    tokens_per_step = config.batch_size * config.model.max_seq_len
    tokens = config.model.default_tokens if config.budget.tokens is None else config.budget.tokens
    if tokens < tokens_per_step:
        raise UserError(
            f"a budget of {tokens} tokens is less than one step of {tokens_per_step} tokens (batch_size x "
            f"max_seq_len): raise budget.tokens to that, or lower batch_size or model.max_seq_len"
        )
    return tokens // tokens_per_step


def steps_due(number: int, last: int, interval: int) -> bool:
    """Is it time, at step `number`, for what happens every `interval` steps and at the end?"""
    return number % interval == 0 or number == last
