"""The key/value cache: named, preallocated buffers that grow together, with a length per row.

A variant names its buffers (GQA: k, v; MLA: latent, k_rope). Keys are cached after rotation, latents after their norm,
so nothing is computed twice. Letters: B batch, T new tokens, S visible slots, M max_seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from modeling.attention import Attention


@dataclass(frozen=True)
class Placement:
    """Where the new tokens of one call stand and what they may see.

    start: the position of the first new token when all rows are equally long, positions_BT otherwise.
    causal: query t sees keys 0..t, and there are no others. mask_BTS: True where a query may see a key (None: all).
    """

    start: int
    positions_BT: Tensor | None
    causal: bool
    mask_BTS: Tensor | None


class Cache:
    """Buffers of shape (B, max_seq_len, *shape) by name; `lengths_B` counts each row's valid tokens.

    Eager (static=False): reads return views of the slots in use; while all rows are equally long that is exact and free.
    Static (static=True): reads return whole buffers and the mask alone says what is visible, so that shapes never change
    and a decode step can be compiled or captured; the caller checks that it fits (`max_seq_len`).
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        shapes: dict[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        static: bool = False,
    ) -> None:
        self.batch_size, self.max_seq_len, self.static = batch_size, max_seq_len, static
        # Zeros, not empty: slots that a mask hides still meet a weight of 0, and 0 * NaN is NaN.
        self.buffers = {
            name: torch.zeros(batch_size, max_seq_len, *shape, dtype=dtype, device=device)
            for name, shape in shapes.items()
        }
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._extent = 0  # slots in use by the longest row, known without asking the device
        self._ragged = False

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes in this layer, read off the buffers."""
        return sum(buffer[0, 0].nbytes for buffer in self.buffers.values())

    @property
    def elements_per_token(self) -> int:
        """Numbers that one token of one row takes in this layer, read off the buffers."""
        return sum(buffer[0, 0].numel() for buffer in self.buffers.values())

    @property
    def nbytes(self) -> int:
        """Bytes allocated, all rows and slots."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def place(self, new_tokens: int, valid_BT: Tensor | None) -> Placement:
        """Positions and visibility of the next `new_tokens` tokens a row. Call it before `append`."""
        self._check_room(new_tokens)
        device = self.lengths_B.device
        if not (self.static or self._ragged or valid_BT is not None):
            start, visible = self._extent, self._extent + new_tokens
            mask_BTS = None
            if start > 0 and new_tokens > 1:  # aligned to the bottom right: query t sees slots 0..start+t
                slots_T = torch.arange(start, visible, device=device)
                mask_BTS = (torch.arange(visible, device=device) <= slots_T[:, None])[None]
            return Placement(start, None, start == 0 and new_tokens > 1, mask_BTS)

        if valid_BT is None:
            rank_BT = torch.arange(new_tokens, device=device).expand(self.batch_size, -1)
        else:
            rank_BT = valid_BT.long().cumsum(dim=1) - 1
        slots_BT = (self.lengths_B[:, None] + rank_BT).clamp(min=0)  # a leading pad sees slot 0, whatever is there
        visible = self.max_seq_len if self.static else self._extent + new_tokens
        mask_BTS = torch.arange(visible, device=device) <= slots_BT[:, :, None]
        return Placement(0, slots_BT, False, mask_BTS)

    def append(self, valid_BT: Tensor | None = None, **new: Tensor) -> dict[str, Tensor]:
        """Write (B, T, ...) tensors at each row's own next slots; returns what is visible afterwards, by name.

        valid_BT marks real tokens (True) where rows are padded, on either side; pads take no slot. Raises ValueError
        when the tokens do not fit.
        """
        assert new.keys() == self.buffers.keys(), f"cache holds {set(self.buffers)}, got {set(new)}"
        T = next(iter(new.values())).shape[1]
        self._check_room(T)
        if valid_BT is not None:
            self._ragged = True
        if self.static or self._ragged:
            self._scatter(T, valid_BT, new)
        else:
            for name, tensor in new.items():
                self.buffers[name][:, self._extent : self._extent + T] = tensor
            self.lengths_B += T
        if self.static:
            return self.buffers
        self._extent += T
        return {name: buffer[:, : self._extent] for name, buffer in self.buffers.items()}

    def _scatter(self, T: int, valid_BT: Tensor | None, new: dict[str, Tensor]) -> None:
        order_BT = None
        if valid_BT is not None:
            # Real tokens first, in order. The pads land behind them, beyond the row's length: the next token overwrites.
            order_BT = torch.argsort(valid_BT.logical_not().to(torch.uint8), dim=1, stable=True)
        device = self.lengths_B.device
        rows_B1 = torch.arange(self.batch_size, device=device)[:, None]
        slots_BT = self.lengths_B[:, None] + torch.arange(T, device=device)
        for name, tensor in new.items():
            buffer = self.buffers[name]
            source = tensor if order_BT is None else tensor[rows_B1, order_BT]
            buffer.index_put_((rows_B1, slots_BT), source.to(buffer.dtype))
        self.lengths_B += T if valid_BT is None else valid_BT.sum(dim=1)

    def _check_room(self, new_tokens: int) -> None:
        if not self.static and self._extent + new_tokens > self.max_seq_len:
            raise ValueError(
                f"the cache holds {self.max_seq_len} tokens a row and {self._extent} are taken: "
                f"{new_tokens} more do not fit; allocate a longer cache"
            )


def new_cache(
    attention: Attention,
    batch_size: int,
    max_seq_len: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    static: bool = False,
) -> Cache:
    """An empty cache for one layer, of the shapes that the variant states."""
    if not attention.causal:
        raise ValueError("a cache needs causal attention: with model.causal=false later tokens change earlier outputs")
    return Cache(batch_size, max_seq_len, attention.cache_shapes, dtype=dtype, device=device, static=static)


def place_without_cache(new_tokens: int, valid_BT: Tensor | None, *, causal: bool) -> Placement:
    """Placement of a whole sequence: training, scoring, or a padded batch (valid_BT True at real tokens)."""
    if valid_BT is None:
        return Placement(0, None, causal, None)
    T, device = new_tokens, valid_BT.device
    eye_TT = torch.eye(T, dtype=torch.bool, device=device)
    mask_BTS = valid_BT[:, None, :] | eye_TT  # a pad sees itself, so that its softmax is defined
    if causal:
        mask_BTS = mask_BTS & torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return Placement(0, (valid_BT.long().cumsum(dim=1) - 1).clamp(min=0), False, mask_BTS)
