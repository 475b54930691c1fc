"""What is recorded on a GPU is replayed, whatever other threads do meanwhile."""

from __future__ import annotations

import threading

import pytest
import torch

from modeling.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.gpu


def test_another_thread_may_pin_memory_while_a_graph_is_captured() -> None:
    """As the one does that reads the next batches: each block is new, so that the driver is asked for it."""
    device = torch.device("cuda", torch.cuda.current_device())
    graphs, ended = CudaGraphs(device), threading.Event()
    x = torch.zeros(64, device=device)
    pinned, faults = [0], []

    def pin() -> None:
        kept = []
        try:
            while not ended.is_set() and len(kept) < 20_000:
                kept.append(torch.empty(4096 + 512 * len(kept) % 65_536, dtype=torch.uint8).pin_memory())
                pinned[0] += 1
        except RuntimeError as error:
            faults.append(error)

    def launch() -> None:
        before = pinned[0]
        for _ in range(100_000):
            x.add_(1.0)
            if pinned[0] > before + 2 or faults:  # some were pinned while this was captured
                return

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        captured = [graphs.capture(launch) for _ in range(20)]
    finally:
        ended.set()
        thread.join()
    assert faults == [] and pinned[0] > 40
    captured[0].replay()
    assert bool((x > 0).all())


def test_what_cannot_be_captured_leaves_the_generator_as_it_was() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.manual_seed(0)
    wanted = torch.rand(4, device=device)
    torch.cuda.manual_seed(0)
    x = torch.zeros(1, device=device)

    def reads_back() -> None:
        torch.rand(8, device=device)
        x.item()

    with pytest.raises(RuntimeError):
        CudaGraphs(device).capture(reads_back)
    assert torch.equal(torch.rand(4, device=device), wanted)
