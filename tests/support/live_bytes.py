"""Live memory as a decoder sees it: what a cache costs, measured without asking the cache."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def live_bytes_slope(decode_to: Callable[[int], object], contexts: tuple[int, int]) -> float:
    """Bytes per token by which live memory grows with the context, however the decoder keeps what it keeps.

    decode_to(context) decodes to that many tokens from nothing, with a cache allocated for no more, and returns what a
    decoder would hold on to for the next token. Every storage that an operation returned and that is not freed by then
    counts, Python's or not; what does not depend on the context cancels.
    """
    short, long = contexts
    return (_live_bytes(decode_to, long) - _live_bytes(decode_to, short)) / (long - short)


def _live_bytes(decode_to: Callable[[int], object], context: int) -> int:
    storages = _Storages()
    gc.freeze()  # what was there before has no part in this, and looking through it takes most of the time
    with storages:
        held = decode_to(context)
    gc.collect()
    live = storages.live_bytes()
    del held  # alive until here, or there would be nothing to count
    return live


class _Storages(TorchDispatchMode):
    """Remembers, without keeping them alive, the storages of all tensors that operations return inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def live_bytes(self) -> int:
        return sum([nbytes for reference, nbytes in self._seen.values() if not reference.expired()])
