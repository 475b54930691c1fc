"""The cache of one layer: made as the layer states it (protocol.py), and its bytes by the paper's formula."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from modeling.attention.cache import Cache, check_window, per_token
from modeling.attention.protocol import Attention
from modeling.attention.quantisation import GROUP, NAMED, CacheFormat, Storage, as_format, newest_bytes
from modeling.cache_formats import ROTATED
from modeling.refusal import Refusal


def new_cache(
    attention: Attention,
    batch_size: int,
    max_seq_len: int,
    *,
    dtype: torch.dtype | CacheFormat,
    device: torch.device | str,
    static: bool = False,
    window: int | None = None,
    sinks: int = 0,
    reads: Cache | None = None,
) -> Cache:
    """An empty cache for one layer, of the shapes that the variant states, and no longer than the layer sees.

    reads: that of the layer whose keys and values, or latents, it reads in place of its own.
    Raises Refusal for a window where the layer has states: all that was taken in is in them.
    """
    if not attention.causal:
        raise Refusal("a cache needs causal attention: with model.causal=false later tokens change earlier outputs")
    own, explicit = getattr(attention, "window", None), attention.kernel in getattr(attention, "kernels", ())
    if not explicit:
        check_window(attention.kernel, window)
    elif sinks and window is not None and own is not None and own > window:
        raise Refusal(
            f"attention.kernel={attention.kernel} sees the first slots of a cache: with sinks={sinks} further back than the "
            f"layer's own window of {own} take attention.kernel=torch"
        )
    states = states_of(attention, dtype)
    if window is not None and states:
        raise Refusal(
            f"window={window} would hide tokens that {', '.join(states)} of {type(attention).__name__} holds: leave "
            f"cache.window and cache.sinks out for layers with a state"
        )
    return Cache(
        batch_size,
        max_seq_len,
        attention.cache_shapes,
        dtype=dtype,
        device=device,
        sixteen_bits=sixteen_bits_of(attention),
        values=value_names(attention),
        static=static,
        window=window,
        sinks=sinks,
        reach=own,
        states=states,
        reads=reads,
    )


def sixteen_bits_of(attention: Attention) -> tuple[str, ...]:
    """The cached tensors that stay in 16 bits where the others take fewer, as the class states them."""
    return getattr(attention, "sixteen_bits", ())


def states_of(attention: Attention, dtype: torch.dtype | CacheFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each state of a layer, by name, in a cache of that dtype.

    Those that the class names in `wide_states` are in float32 at least. Where tokens take few bits, the others take 16.
    """
    kept = as_format(dtype).state_dtype
    wide = getattr(attention, "wide_states", ())
    return {
        name: (shape, torch.promote_types(kept, torch.float32) if name in wide else kept)
        for name, shape in getattr(attention, "state_shapes", {}).items()
    }


def state_bytes_of(attention: Attention, dtype: torch.dtype | CacheFormat) -> int:
    """Bytes of one row that do not grow, by the paper's element count."""
    wide, others = getattr(attention, "state_formula", (0, 0))
    kept = as_format(dtype).state_dtype
    return int(wide * torch.promote_types(kept, torch.float32).itemsize + others * kept.itemsize)


def value_names(attention: Attention) -> tuple[str, ...]:
    """The cached tensors that are values and nothing else, as the class states them."""
    return getattr(attention, "cached_values", ())


def check_values(attentions: Sequence[Attention], dtype: torch.dtype | CacheFormat) -> None:
    """Raises Refusal for a format that tells keys and values apart where no layer caches values alone."""
    kept = as_format(dtype)
    if not kept.tells_apart or any(map(value_names, attentions)):
        return
    named = next(name for name, storage in NAMED.items() if storage == kept.keys)
    asked = "keys by channel" if kept.by_channel else "values in bits of their own"
    raise Refusal(
        f"cache.dtype={kept} keeps {asked}, and what this variant caches serves as key and value at once: take "
        f"cache.dtype={named}{ROTATED if kept.rotated else ''}, as its keys are kept"
    )


def formula_bytes(attention: Attention, dtype: torch.dtype | CacheFormat) -> float:
    """Bytes per token of one layer by the paper's element count and the storage's arithmetic, not by any buffer."""
    together = sum(GROUP // storage.tokens * storage.nbytes(shape) for storage, shape in _stored(attention, dtype))
    return per_token(together + GROUP * _unlike_bytes(attention, dtype))


def formula_bytes_at(attention: Attention, dtype: torch.dtype | CacheFormat, context: int) -> int:
    """The same for a sequence of so many tokens, of which a layer with a window keeps the newest, and its states.

    Of tokens that are stored together, with the room of those that are not yet; where a window ends within such tokens, all.
    """
    held = keys_seen(attention, context)
    grown = sum(
        min(context // storage.tokens, math.ceil(held / storage.tokens)) * storage.nbytes(shape)
        for storage, shape in _stored(attention, dtype)
    )
    fixed = newest_bytes_of(attention, dtype, context) + state_bytes_of(attention, dtype)
    return grown + held * _unlike_bytes(attention, dtype) + fixed


def newest_bytes_of(attention: Attention, dtype: torch.dtype | CacheFormat, context: int) -> int:
    """Of these bytes the ones for tokens not yet stored together: no more of them from GROUP tokens on."""
    return sum(newest_bytes(storage, shape, context) for storage, shape in _stored(attention, dtype))


def _stored(attention: Attention, dtype: torch.dtype | CacheFormat) -> list[tuple[Storage, tuple[int, ...]]]:
    """How each cached tensor is stored, and its shape."""
    kept, sixteen_bits, values = as_format(dtype), sixteen_bits_of(attention), value_names(attention)
    shapes = attention.cache_shapes
    return [(kept.storage(name, sixteen_bits=sixteen_bits, values=values), shape) for name, shape in shapes.items()]


def _unlike_bytes(attention: Attention, dtype: torch.dtype | CacheFormat) -> int:
    """Of elements by which the class contradicts itself; 0 where it does not."""
    unlike = attention.cache_formula - sum(map(math.prod, attention.cache_shapes.values()))
    return as_format(dtype).state_dtype.itemsize * unlike


def keys_seen(attention: Attention, context: int) -> int:
    """Of a sequence of so many tokens those that its last one sees: a layer with a window of its own, the newest."""
    return min(context, getattr(attention, "window", None) or context)
