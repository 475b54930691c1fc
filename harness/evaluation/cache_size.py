"""The size of the key/value cache, measured on the buffers of one that is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
