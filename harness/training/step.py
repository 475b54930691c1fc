"""One optimizer step, in two halves: the gradient of a batch, then the update. Eager, or captured in CUDA graphs.

A step of a small model is launches, not arithmetic: captured once and replayed, the same kernels follow each other without
the host in between. Two graphs, so that the host reads loss and gradient norm before it decides about the update, as it does
eagerly: no number that is not finite reaches the weights, and nothing is read late.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.training.optimizer import Optimizer
from harness.training.parallel import OneProcess
from modeling.cuda_graphs import CudaGraphs, Graph

WARM_UP = 3  # eager steps before the capture: compilation, the optimizer's state, the libraries' workspaces


class EagerStep:
    """Operation by operation, on any device and through any engine.

    Rows of a batch are split into micro-batches; loss and gradient are those of the mean over all its tokens. Weights stay
    float32; precision is the autocast dtype (float32: none). grad_clip=0 only measures.
    """

    is_captured = False
    remark: str | None = None  # why a step that should have been captured is not

    def __init__(
        self,
        engine: OneProcess,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        grad_clip: float,
        precision: torch.dtype,
        compile: bool,
        device: torch.device,
    ) -> None:
        self.engine, self.optimizer, self.device = engine, optimizer, device
        self._micro_batch_size, self._precision = micro_batch_size, precision
        self._max_norm = grad_clip if grad_clip > 0 else math.inf
        self._loss_of = engine.loss_of(compile)
        self._figures: Tensor | None = None

    def start(self, batch: Tensor) -> None:
        """Launch the gradient of a batch (B, T+1) of token ids."""
        self._figures = self._gradient(batch)

    def read(self) -> tuple[float, float]:
        """Loss (nats, mean over the batch) and gradient norm before clipping, once they are there."""
        # The one synchronisation of a step. It costs the device the few kernel launches of the update, well under a
        # millisecond, and buys that no bad gradient ever reaches the weights.
        assert self._figures is not None, "start() comes before read()"
        loss, norm = self._figures.tolist()
        return loss, norm

    def update(self) -> None:
        """Change the weights by the gradient."""
        self.optimizer.step()

    def end(self) -> None:
        """Give the gradient up, whether or not there was an update."""
        self.optimizer.zero_grad()

    def _gradient(self, batch: Tensor) -> Tensor:
        """Forward, backward, clipping; loss and norm as a tensor of two."""
        loss = torch.zeros((), device=self.device)
        micros = batch.split(self._micro_batch_size)
        for index, micro in enumerate(micros, start=1):
            share = len(micro) / len(batch)
            with self.engine.micro_batch(last=index == len(micros)):
                with torch.autocast(self.device.type, dtype=self._precision, enabled=self._precision != torch.float32):
                    micro_loss = self._loss_of(micro[:, :-1], micro[:, 1:]) * share
                micro_loss.backward()
            loss += micro_loss.detach()
        return torch.stack((self.engine.mean(loss), self.engine.clip(self._max_norm)))


class CapturedStep(EagerStep):
    """The first WARM_UP steps are eager, then both halves are captured and replayed with new batches.

    A model that cannot be captured (one that reads a value back in its forward pass, say) stays eager; `remark` says why.
    capture: how to record what a function launches on a device; `cuda_graph` unless a test brings another.
    """

    def __init__(
        self,
        engine: OneProcess,
        optimizer: Optimizer,
        *,
        capture: Callable[[Callable[[], None]], Graph] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(engine, optimizer, **options)
        self._capture = capture or CudaGraphs(self.device).capture
        self._warm = 0
        self._batch: Tensor | None = None
        self._graphs: tuple[Graph, Graph] | None = None

    @property
    def is_captured(self) -> bool:  # type: ignore[override]
        return self._graphs is not None

    def start(self, batch: Tensor) -> None:
        if self._graphs is None and self.remark is None and self._warm == WARM_UP:
            self._try(batch)
        if self._graphs is None:
            super().start(batch)
            self._warm = min(WARM_UP, self._warm + 1)
            return
        assert self._batch is not None and self._batch.shape == batch.shape, "every batch of a run has one shape"
        self._batch.copy_(batch)
        self._graphs[0].replay()

    def update(self) -> None:
        if self._graphs is None:
            super().update()
        else:
            self._graphs[1].replay()

    def end(self) -> None:
        if self._graphs is None:  # a graph writes its gradients anew, where they lie
            super().end()

    def _try(self, batch: Tensor) -> None:
        """Record the two halves; nothing is computed by that."""
        self._batch = batch.clone()

        def gradient() -> None:
            assert self._batch is not None
            self.optimizer.zero_grad()
            self._figures = self._gradient(self._batch)

        try:
            self._graphs = self._capture(gradient), self._capture(self.optimizer.step)
        except RuntimeError as error:
            self._batch = self._figures = None
            self.optimizer.zero_grad()
            self.remark = f"the step is not captured, it runs eagerly: {str(error).strip().splitlines()[0]}"


def select_capture(name: str, device: torch.device, *, processes: int, update_can_be: bool = True) -> bool:
    """auto | on | off. auto captures on CUDA, in one process, where the optimizer's update (if any) can be captured."""
    hindrance = (
        f"this device is {device.type}"
        if device.type != "cuda"
        else f"this run has {processes} processes"
        if processes > 1
        else None
        if update_can_be
        else "the update of this optimizer cannot be captured"
    )
    if name == "on" and hindrance is not None:
        raise UserError(f"capture=on replays CUDA graphs, and {hindrance}; leave capture=auto")
    return name != "off" and hindrance is None
