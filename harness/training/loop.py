"""The training loop: a generator that yields a Step after every update. What to do with it is the caller's."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.training.device import generators, set_generators
from harness.training.nonfinite import Guard, NonFiniteError
from harness.training.optimizer import Optimizer

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


class Engine(Protocol):
    """What the loop asks of several processes (harness/training/parallel.py) and, as `OneProcess`, of one alone."""

    world_size: int

    def loss_of(self, compile: bool) -> Callable[[Tensor, Tensor], Tensor]: ...

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]: ...

    def clip(self, max_norm: float) -> Tensor: ...

    def mean(self, loss: Tensor) -> Tensor: ...


class LanguageModel(Protocol):
    """What the loop asks of a model."""

    training: bool

    def train(self) -> nn.Module: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean nats of the targets, differentiable."""


class OneProcess:
    """The model as it is."""

    world_size = 1

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._parameters = list(model.parameters())

    def loss_of(self, compile: bool) -> Callable[[Tensor, Tensor], Tensor]:
        return torch.compile(self._model.loss, dynamic=False) if compile else self._model.loss

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(self._parameters, max_norm)

    def mean(self, loss: Tensor) -> Tensor:
        return loss


def train(
    model: LanguageModel,
    batches: Iterator[Tensor],
    *,
    optimizer: Optimizer,
    schedule: Callable[[int], float],
    first_step: int,
    last_step: int,
    micro_batch_size: int,
    grad_clip: float,
    precision: torch.dtype,
    compile: bool,
    device: torch.device,
    guard: Guard | None = None,
    engine: Engine | None = None,
) -> Iterator[Step]:
    """Make the updates first_step..last_step (1-based, inclusive) and yield each one's Step.

    batches yields token ids (B, T+1) on `device`, the first for first_step. schedule gives the factor of every peak
    rate at a step. Weights stay float32; precision is the autocast dtype (float32: none). grad_clip=0 only measures.
    engine: what several processes train the model through; each then gets its share of the batches, and Steps are about
    all shares together.
    guard: which steps make no update (None: stop at the first number that is not finite). Raises NonFiniteError before
    the update that such a number would spoil; weights and generators are then as the step before left them.
    """
    guard = guard or Guard()
    engine = engine or OneProcess(model)
    loss_of = engine.loss_of(compile)
    recent: deque[float] = deque(maxlen=SPEED_WINDOW)
    seconds = 0.0

    for number in range(first_step, last_step + 1):
        started = time.perf_counter()
        if not model.training:
            model.train()
        batch = next(batches)
        factor = schedule(number)
        before = generators(device)

        loss = torch.zeros((), device=device)
        micros = batch.split(micro_batch_size)
        for index, micro in enumerate(micros, start=1):
            share = len(micro) / len(batch)
            with engine.micro_batch(last=index == len(micros)):
                with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                    micro_loss = loss_of(micro[:, :-1], micro[:, 1:]) * share
                micro_loss.backward()
            loss += micro_loss.detach()

        loss = engine.mean(loss)
        grad_norm = engine.clip(grad_clip if grad_clip > 0 else math.inf)
        # The one synchronisation of a step. It costs the device the few kernel launches of the update, well under a
        # millisecond, and buys that no bad gradient ever reaches the weights.
        loss_value, norm_value = torch.stack((loss, grad_norm)).tolist()
        skipped = guard.judge(loss_value, norm_value)
        if skipped is not None and (ending := guard.ending(loss_value, norm_value)) is not None:
            optimizer.zero_grad()
            set_generators(before, device)
            raise NonFiniteError(
                f"step {number}: {skipped} (learning rate factor {factor:.3g}); {ending}: lower optimizer.lr or raise "
                f"schedule.warmup_fraction", step=number, batch=batch,
            )  # fmt: skip
        lr = optimizer.set_lr(factor)
        if skipped is None:
            optimizer.step()
        optimizer.zero_grad()

        elapsed = time.perf_counter() - started
        seconds += elapsed
        if number == first_step + 1:
            recent.clear()  # the first step compiled and warmed up
        recent.append(elapsed)
        tokens_per_step = batch.shape[0] * (batch.shape[1] - 1) * engine.world_size
        yield Step(
            number=number,
            loss=loss_value,
            lr=lr,
            grad_norm=norm_value,
            tokens_per_second=tokens_per_step * len(recent) / sum(recent),
            tokens=number * tokens_per_step,
            seconds=seconds,
            skipped=skipped,
        )
