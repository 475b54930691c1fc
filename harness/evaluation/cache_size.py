"""The size of the key/value cache, measured on the buffers of one that is allocated.

A layer with a window holds no more than its tokens, one with a state always the same, and keys by channel wait in 16 bits
until there are enough of them: the cache is a curve over the context, and bytes per token are those of the model's own context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.config.schema import CACHE_CONTEXTS
from harness.errors import as_user_error
from harness.evaluation.metric import CacheRecord
from modeling.attention.quantisation import CacheFormat, as_format
from modeling.gpt import GPT


@dataclass(frozen=True)
class CacheSize:
    """What one sequence takes, in all layers, scales included."""

    dtype: torch.dtype | CacheFormat
    context: int  # tokens: the model's longest
    bytes_per_token: int  # at the context without a window of the evaluation's, rounded to whole bytes
    held_bytes_per_token: float  # of a token that every layer holds: more than the above where layers have windows of their own
    elements_per_token_by_layer: tuple[int, ...]  # of a token that the layer holds
    # At the context, the mean over the layers; an int where it is whole. A state counts as what would take its bytes in dtype.
    elements_per_token_per_layer: float
    state_bytes: int  # that do not grow with the context, the newest keys in 16 bits among them
    bytes_at_context: int  # allocated for one sequence of that length: fewer tokens' worth with a window
    bytes_by_context: dict[int, int]  # the same at each of CACHE_CONTEXTS, whatever the model was trained for

    def record(self) -> CacheRecord:
        return {
            "cache_context": self.context,
            "cache_bytes_per_token": self.bytes_per_token,
            "cache_bytes_at_context": self.bytes_at_context,
            "cache_bytes_by_context": {str(context): size for context, size in self.bytes_by_context.items()},
            "cache_elements_per_token_per_layer": self.elements_per_token_per_layer,
        }


def measure_cache(model: GPT, *, dtype: torch.dtype | CacheFormat, window: int | None = None, sinks: int = 0) -> CacheSize:
    """Allocate a cache for one sequence of the model's longest through the model, and read the sizes off its buffers.

    Those of CACHE_CONTEXTS are read off buffers that have shapes and no memory. Raises UserError for what the variant cannot
    keep.
    """
    context = model.max_seq_len
    with as_user_error():
        plain = model.new_cache(1, context, dtype=dtype, device="meta")
        caches = model.new_cache(1, context, dtype=dtype, device="cpu", window=window, sinks=sinks)
    state_bytes = sum(cache.state_bytes for cache in plain)
    held = sum(cache.elements_per_token * cache.slots for cache in plain) + state_bytes / as_format(dtype).keys.itemsize
    mean = held / context / len(plain)
    by_context = {
        longer: model.new_cache(1, longer, dtype=dtype, device="meta", window=window, sinks=sinks) for longer in CACHE_CONTEXTS
    }
    return CacheSize(
        dtype=dtype,
        context=context,
        bytes_per_token=round(sum(cache.nbytes for cache in plain) / context),
        held_bytes_per_token=sum(cache.bytes_per_token for cache in plain),
        elements_per_token_by_layer=tuple(cache.elements_per_token for cache in plain),
        elements_per_token_per_layer=int(mean) if mean.is_integer() else mean,
        state_bytes=state_bytes + sum(cache.newest_bytes for cache in plain),
        bytes_at_context=sum(cache.nbytes for cache in caches),
        bytes_by_context={longer: sum(cache.nbytes for cache in each) for longer, each in by_context.items()},
    )
