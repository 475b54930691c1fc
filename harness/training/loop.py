"""The training loop: a generator that yields a Step after every update. What to do with it is the caller's."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from harness.training.device import generators, set_generators
from harness.training.nonfinite import Guard, NonFiniteError
from harness.training.step import EagerStep

SPEED_WINDOW = 20  # steps over which tokens per second are averaged


@dataclass(frozen=True)
class Step:
    """What one optimizer update did. Seconds leave out what the caller did between steps."""

    number: int  # 1-based: this many updates have been made
    loss: float  # nats, mean over all tokens of the step
    lr: float
    grad_norm: float  # over all parameters, before clipping
    tokens_per_second: float  # over the last SPEED_WINDOW steps, the first of this call left out
    tokens: int  # seen so far, all steps from 1 on
    seconds: float  # spent training in this call so far
    skipped: str | None = None  # why there was no update, see harness/training/nonfinite.py
    captured: bool = False  # replayed from a CUDA graph, see harness/training/step.py
    remark: str | None = None  # said once: why the steps from this one on are not captured


def train(
    step: EagerStep,
    batches: Iterator[Tensor],
    *,
    schedule: Callable[[int], float],
    first_step: int,
    last_step: int,
    guard: Guard | None = None,
) -> Iterator[Step]:
    """Make the updates first_step..last_step (1-based, inclusive) and yield each one's Step.

    batches yields token ids (B, T+1) on the device, the first for first_step; each of several processes gets its share of
    them, and Steps are about all shares together. schedule gives the factor of every peak rate at a step.
    guard: which steps make no update (None: stop at the first number that is not finite). Raises NonFiniteError before
    the update that such a number would spoil; weights and generators are then as the step before left them.
    """
    guard, model = guard or Guard(), step.engine.model
    recent: deque[float] = deque(maxlen=SPEED_WINDOW)
    seconds, remark = 0.0, None
    ahead: Tensor | None = None

    for number in range(first_step, last_step + 1):
        started = time.perf_counter()
        if not model.training:
            model.train()
        batch = next(batches) if ahead is None else ahead
        factor = schedule(number)
        before = generators(step.device)

        step.start(batch)
        ahead = next(batches) if number < last_step else None  # while the device computes
        loss, grad_norm = step.read()
        skipped = guard.judge(loss, grad_norm)
        if skipped is not None and (ending := guard.ending(loss, grad_norm)) is not None:
            step.end()
            set_generators(before, step.device)
            raise NonFiniteError(
                f"step {number}: {skipped} (learning rate factor {factor:.3g}); {ending}: lower optimizer.lr or raise "
                f"schedule.warmup_fraction",
                step=number,
                batch=batch,
            )
        lr = step.optimizer.set_lr(factor)
        if skipped is None:
            step.update()
        step.end()

        elapsed = time.perf_counter() - started
        seconds += elapsed
        if number == first_step + 1:
            recent.clear()  # the first step compiled and warmed up
        recent.append(elapsed)
        tokens_per_step = batch.shape[0] * (batch.shape[1] - 1) * step.engine.world_size
        yield Step(
            number=number,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_step * len(recent) / sum(recent),
            tokens=number * tokens_per_step,
            seconds=seconds,
            skipped=skipped,
            captured=step.is_captured,
            remark=step.remark if step.remark != remark else None,
        )
        remark = step.remark
