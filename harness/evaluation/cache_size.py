"""The size of the key/value cache as measured: on a cache's buffers, and on all memory that decoding keeps alive."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling.gpt import GPT


@dataclass(frozen=True)
class CacheSize:
    """What one token of one sequence takes."""

    dtype: torch.dtype
    bytes_per_token: int  # all layers, scales of 8-bit entries included
    elements_per_token_by_layer: tuple[int, ...]
    context: int  # tokens
    bytes_at_context: int  # allocated for one sequence of that length, all layers: fewer tokens' worth with a window

    @property
    def elements_per_token_per_layer(self) -> float:
        """The mean over the layers; an int where it is whole, as it is when all layers are alike."""
        mean = sum(self.elements_per_token_by_layer) / len(self.elements_per_token_by_layer)
        return int(mean) if mean.is_integer() else mean


def measure_cache(model: GPT, *, dtype: torch.dtype, window: int | None = None, sinks: int = 0) -> CacheSize:
    """Allocate a cache for one sequence of the model's longest through the model, and read the sizes off its buffers."""
    context = model.max_seq_len
    caches = model.new_cache(1, context, dtype=dtype, device="cpu", window=window, sinks=sinks)
    return CacheSize(
        dtype=dtype,
        bytes_per_token=sum(cache.bytes_per_token for cache in caches),
        elements_per_token_by_layer=tuple(cache.elements_per_token for cache in caches),
        context=context,
        bytes_at_context=sum(cache.nbytes for cache in caches),
    )


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
