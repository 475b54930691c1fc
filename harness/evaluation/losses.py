"""The nats of every target of a batch: operation by operation, or replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.errors import tell
from modeling.attention.cache import Cache
from modeling.cuda_graphs import CudaGraphs, Graph
from modeling.gpt import GPT


class TokenLosses:
    """`GPT.token_losses` in a precision (an autocast dtype; float32: none), on any device, through any engine."""

    def __init__(self, model: GPT, *, precision: torch.dtype, device: torch.device) -> None:
        self.model, self.precision, self.device = model, precision, device

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor, cache: Sequence[Cache] | None = None) -> Tensor:
        """Nats, (B, T) in float32. cache: an empty one to score through. Without gradient, the model in evaluation mode."""
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            return self.model.token_losses(inputs_BT, targets_BT, cache)

    def beside(self, inputs_BT: Tensor, targets_BT: Tensor, cache: Sequence[Cache]) -> Tensor:
        """Nats through an empty cache, without one, and the divergence between the two, (3, B, T)."""
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            return self.model.token_losses_beside(inputs_BT, targets_BT, cache)


class CapturedLosses(TokenLosses):
    """Windows of the model's max_seq_len, up to as many as the first call had, replayed; all else runs eagerly.

    Scoring with a small model is launches, not arithmetic. The kernels are the eager ones, so that nothing has to be
    compiled and the figures are those of whole batches, bit for bit; a batch of fewer rows is filled up.
    capture: how to record what a function launches on a device; `cuda_graph` unless a test brings another.
    """

    def __init__(
        self,
        model: GPT,
        *,
        precision: torch.dtype,
        device: torch.device,
        capture: Callable[[Callable[[], None]], Graph] | None = None,
    ) -> None:
        super().__init__(model, precision=precision, device=device)
        self._failed = False
        self._capture = capture or CudaGraphs(device).capture
        self._tokens_2BT: Tensor | None = None
        self._nats_BT: Tensor | None = None
        self._graph: Graph | None = None

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor, cache: Sequence[Cache] | None = None) -> Tensor:
        rows, length = inputs_BT.shape
        if cache is not None or length != self.model.max_seq_len or self.model.training or self._failed:
            return super().__call__(inputs_BT, targets_BT, cache)
        if self._graph is None:
            nats_BT = super().__call__(inputs_BT, targets_BT)  # warms up, and is this batch's answer
            self._try(torch.stack((inputs_BT, targets_BT)))
            return nats_BT
        assert self._tokens_2BT is not None
        if rows > self._tokens_2BT.shape[1]:
            return super().__call__(inputs_BT, targets_BT)
        self._tokens_2BT[0, :rows], self._tokens_2BT[1, :rows] = inputs_BT, targets_BT
        self._graph.replay()
        assert self._nats_BT is not None
        return self._nats_BT[:rows].clone()

    def _try(self, tokens_2BT: Tensor) -> None:
        """Record a call; nothing is computed by that."""

        def score() -> None:
            self._nats_BT = TokenLosses.__call__(self, *tokens_2BT)

        try:
            self._graph, self._tokens_2BT = self._capture(score), tokens_2BT
        except RuntimeError as error:
            self._nats_BT = None
            self._failed = True
            tell(f"evaluation is not captured, it runs eagerly: {str(error).strip().splitlines()[0]}")
