"""Training batches as a pure function of (data_seed, step): the same for every variant and any number of processes.

Windows of max_seq_len + 1 tokens start at multiples of max_seq_len. Each epoch takes every window once, in an order
of its own: a keyed Feistel permutation with cycle walking (Black and Rogaway, 2002) gives the window at any position
at once, so nothing is stored, shuffled or skipped when a run continues.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.errors import UserError

_ROUNDS = 8
_PREFETCH = 4  # batches
_TOGETHER = 64  # batches whose windows are worked out at once: alone they cost as much as a small model's step on a GPU


class WindowLoader:
    """Batches of windows over one split.

    tokens: (n_tokens,) uint16 or uint32, may be memory-mapped. batch_size: windows in the global batch, over all
    processes. Raises UserError if the split is shorter than one window or the processes cannot share a batch evenly.
    """

    def __init__(
        self, tokens: NDArray[Any], *, max_seq_len: int, batch_size: int, data_seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if len(tokens) <= max_seq_len:
            raise UserError(
                f"the split has {len(tokens)} tokens, fewer than one window of {max_seq_len + 1}: lower "
                "model.max_seq_len, or give more text"
            )
        if batch_size % world_size:
            raise UserError(f"batch_size={batch_size} cannot be shared by {world_size} processes: make it a multiple")
        self.tokens = tokens
        self.max_seq_len = max_seq_len
        self.batch_size = batch_size
        self.data_seed = data_seed
        self.rank = rank
        self.world_size = world_size
        self.windows_per_epoch = (len(tokens) - 1) // max_seq_len

    def windows(self, step: int) -> NDArray[np.int64]:
        """The windows of this process in the batch of `step` (from 0): (batch_size // world_size,)."""
        return self._windows(step, 1)[0]

    def _windows(self, first: int, steps: int) -> NDArray[np.int64]:
        """Those of `steps` batches from `first` on, a row each."""
        share = self.batch_size // self.world_size
        begins = np.arange(first, first + steps)[:, None] * self.batch_size + self.rank * share
        epochs, positions = np.divmod(begins + np.arange(share), self.windows_per_epoch)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = permute(positions[here], self.windows_per_epoch, (self.data_seed, int(epoch)))
        return windows

    def batch(self, step: int) -> torch.Tensor:
        """int64 (batch_size // world_size, max_seq_len + 1): inputs are [:, :-1], targets [:, 1:]."""
        return self._batch(self.windows(step))

    def _batch(self, windows: NDArray[np.int64]) -> torch.Tensor:
        starts = windows * self.max_seq_len
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.max_seq_len + 1)].astype(np.int64))

    def iterate(self, start_step: int, *, device: torch.device | str) -> Generator[torch.Tensor, None, None]:
        """Endless batches from `start_step` on, read ahead by a thread; pinned and copied asynchronously to CUDA.

        The thread ends when the generator is closed or collected; what goes wrong in it is raised here.
        """
        device = torch.device(device)

        def read() -> Iterator[torch.Tensor]:
            for first in itertools.count(start_step, _TOGETHER):
                for windows in self._windows(first, _TOGETHER):
                    batch = self._batch(windows)
                    yield batch.pin_memory() if device.type == "cuda" else batch

        batches = read()
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="window-loader")
        try:
            ahead: collections.deque[Future[torch.Tensor]] = collections.deque()
            while True:
                while len(ahead) < _PREFETCH:
                    ahead.append(reader.submit(next, batches))
                yield ahead.popleft().result().to(device, non_blocking=True)
        finally:
            reader.shutdown(wait=True, cancel_futures=True)


def documents_in(windows: NDArray[np.int64], *, max_seq_len: int, document_starts: NDArray[np.int64]) -> list[int]:
    """The documents that these windows touch, by their number in the split, in order."""
    first, last = windows * max_seq_len, (windows + 1) * max_seq_len
    begin, end = (np.searchsorted(document_starts, ends, side="right") - 1 for ends in (first, last))
    return sorted({number for a, b in zip(begin, end, strict=True) for number in range(int(a), int(b) + 1)})


def permute(positions: NDArray[np.int64], size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """A permutation of range(size), chosen by `key`, at these positions.

    The Feistel network permutes the next even power of two; a value outside the range is permuted again until it
    lies inside, which keeps it a permutation and takes fewer than four rounds on average (more if size < 16).
    """
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [_mix(np.uint64(0), *key, index) for index in range(_ROUNDS)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mix(value: np.uint64, *parts: int) -> np.uint64:
    """A hash of integers of any size and sign."""
    state = np.array([value], dtype=np.uint64)
    for part in parts:
        state = _scramble(state ^ np.uint64(part % 2**64))
    return np.uint64(state[0])


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014); the products wrap."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
