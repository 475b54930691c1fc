"""What a function launches on a GPU, recorded once and replayed: no host between the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None: ...


class CudaGraphs:
    """Graphs that share one pool of memory and are replayed in the order of their capture."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def capture(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What `launch` launches. Raises RuntimeError when that waits for the device, say; the generator is as before."""
        graph = torch.cuda.CUDAGraph()
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        generator = torch.cuda.default_generators[index]
        before = generator.clone_state()
        try:
            # Of this thread alone: another one, which pins the next batches, may allocate meanwhile.
            alone = "thread_local"
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode=alone):
                launch()
        except RuntimeError:  # a capture that breaks off leaves the generator in its middle
            generator.graphsafe_set_state(before)
            raise
        return graph
