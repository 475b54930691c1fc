"""The key/value cache: named, preallocated buffers that grow together, with a length per row, and states that do not grow.

A variant names its buffers (GQA: k, v; MLA: latent, k_rope) and its states (gated DeltaNet: state, tail). Keys are cached
after rotation, latents after their norm, so nothing is computed twice. Letters: B batch, T new tokens, S visible slots,
M allocated slots.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.attention.positions import in_graph
from modeling.attention.quantisation import GROUP, CachedTensor, CacheFormat, Parts, as_format
from modeling.kernels.attend import band
from modeling.refusal import Refusal

if TYPE_CHECKING:
    from modeling.attention.rope import RotaryEmbedding

Made = TypeVar("Made")


@dataclass(frozen=True)
class Placement:
    """Where the new tokens of one call stand and what they may see.

    start: the position of the first new token when all rows are equally long, positions_BT otherwise.
    causal: query t sees keys 0..t, and there are no others. mask_BTS: True where a query may see a key (None: all).
    keys_at: gives the position of each visible key, (1 or B, S), where it is not its slot (caches with a window): few layers
    ask (key_positions_BS).
    end: one above the largest position or more, where it is known without asking the device (positions.py).
    window: with causal, how many of the newest keys a query sees, for layers with a window of their own (None: all).
    twice: of so many keys, which stand before all others, the same ones as they came follow in the first places behind; the
    mask lets a query see one of the two.
    first: one query a row, which sees the first keys alone (lengths_B): mask_BTS says no more than that.
    """

    start: int
    positions_BT: Tensor | None
    causal: bool
    mask_BTS: Tensor | None
    keys_at: Callable[[], Tensor] | None = None
    end: int | None = None
    window: int | None = None
    twice: int = 0
    first: bool = False
    made: dict[Any, Any] = field(default_factory=dict)  # tables and bias, which layers at one place have in common

    @property
    def key_positions_BS(self) -> Tensor | None:
        """Position of each visible key, (1 or B, S); None where it is its slot."""
        return None if self.keys_at is None else self.keys_at()

    def lengths_B(self, keys_BS: Tensor) -> Tensor:
        """With `first`, how many of these keys each row sees, or more than there are: all; on their device."""
        if "lengths" not in self.made:
            B, S = keys_BS.shape[:2]
            positions_BT = self.positions_BT
            self.made["lengths"] = (
                keys_BS.new_full((B,), S, dtype=torch.long) if positions_BT is None else positions_BT[:, 0] + 1
            )
        lengths_B: Tensor = self.made["lengths"]
        return lengths_B

    def seen(self, new_tokens: int, device: torch.device) -> tuple[bool, Tensor | None]:
        """(causal, mask_BTS) of so many queries for what knows no window."""
        if self.window is None or self.window >= new_tokens:
            return self.causal, self.mask_BTS
        return False, band(new_tokens, self.window, device)[None]

    def bias_BTS(self, new_tokens: int, like: Tensor) -> Tensor:
        """What the logits of so many queries are begun with, in dtype and place of `like`: 0, and -inf where a key is hidden.

        (1 or B, T, S), or (1, 1, 1) where all is seen.
        """
        if ("bias", like.dtype) not in self.made:
            causal, mask_BTS = self.seen(new_tokens, like.device)
            if causal:
                mask_BTS = band(new_tokens, new_tokens, like.device)[None]
            bias_BTS = like.new_zeros(1, 1, 1)
            self.made["bias", like.dtype] = bias_BTS if mask_BTS is None else bias_BTS.where(mask_BTS, float("-inf"))
        bias: Tensor = self.made["bias", like.dtype]
        return bias

    def by_token(self, weights_BHTS: Tensor) -> Tensor:
        """Weights of keys as weights of tokens, each of which has one column."""
        once_BHTS = weights_BHTS[..., self.twice :]
        return once_BHTS + F.pad(weights_BHTS[..., : self.twice], (0, once_BHTS.shape[-1] - self.twice))

    def tables(self, rope: RotaryEmbedding, new_tokens: int, positions_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos, sin of the new tokens, or of other positions where they are given. Raises Refusal beyond the model's."""
        if positions_BT is not None:
            return rope.tables(0, new_tokens, positions_BT)
        if ("tables", rope.angles) not in self.made:
            self.made["tables", rope.angles] = rope.tables(self.start, new_tokens, self.positions_BT, self.end)
        tables: tuple[Tensor, Tensor] = self.made["tables", rope.angles]
        return tables

    def key_tables(self, rope: RotaryEmbedding, slots: int) -> tuple[Tensor, Tensor]:
        """cos, sin of the visible keys of a cache that holds them un-rotated: a slot is its position, but in a window."""
        if ("key tables", rope.angles) not in self.made:
            self.made["key tables", rope.angles] = self._key_tables(rope, slots)
        tables: tuple[Tensor, Tensor] = self.made["key tables", rope.angles]
        return tables

    def _key_tables(self, rope: RotaryEmbedding, slots: int) -> tuple[Tensor, Tensor]:
        last, positions_BS = rope.max_seq_len - 1, self.key_positions_BS
        if positions_BS is None and slots > last + 1:
            # A static cache may have more slots than the model has positions: no query sees those.
            positions_BS = torch.arange(slots, device=rope.cos_SF.device).clamp(max=last)[None]
        elif positions_BS is not None:
            positions_BS = positions_BS.clamp(min=0)
        return rope.tables(0, slots, positions_BS, last + 1)  # no key stands behind the queries, which were checked


class Cache:
    """Buffers of shape (B, M, *shape) by name; `lengths_B` counts the tokens that each row has taken in.

    Eager (static=False): reads return views of the slots in use; while all rows are equally long that is exact and free.
    Static (static=True): reads return whole buffers and the mask alone says what is visible, so that shapes never change
    and a decode step can be compiled or captured. Inside such a step nothing can be refused: whoever drives it says
    `check_room` before and `count` after it (modeling/generation.py, decode_step).

    Few bits (quantisation.py): reads return entries in the dtype that was appended. The buffers named in `values` are values
    alone and take the format's bits for these, all others those for keys; those in `sixteen_bits` stay in bfloat16.

    Keys by channel: a query sees the keys of a group once it is complete, and of its own unfinished group as they came. Where
    several tokens go in at once these differ from query to query: reads then return both, groups first (Placement.twice), and
    the same slots of everything else. With a window the groups that it touches are held whole, the sinks' for good and the
    others in a ring of their own. reads: the cache of the layer whose entries this layer reads.

    window (None: all is kept): a query sees the `window` newest positions, its own included, and the first `sinks` ones
    (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453; without its re-numbering: keys keep the positions they were
    rotated at). M is then sinks + window at most, whatever the context, and tokens may come without end.

    reach (None: everything): how many of the newest positions, its own included, a query of this layer sees at all: the
    window that it was trained with. Where it is the smaller one it takes the place of window and sinks; sinks further back
    are never seen. With reach alone a row still takes max_seq_len tokens, as in layers that see everything.

    states: shape and dtype, by name, of what a row has one of whatever it has taken in: (B, *shape), zeros at first, changed by
    `keep`. They are never in few bits. A row takes max_seq_len tokens all the same, as in layers that see everything.
    """

    def __init__(
        self,
        batch_size: int,
        max_seq_len: int,
        shapes: dict[str, tuple[int, ...]],
        *,
        dtype: torch.dtype | CacheFormat,
        device: torch.device | str,
        sixteen_bits: Sequence[str] = (),
        values: Sequence[str] = (),
        static: bool = False,
        window: int | None = None,
        sinks: int = 0,
        reach: int | None = None,
        states: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
        reads: Cache | None = None,
    ) -> None:
        if (window is not None and window < 1) or sinks < 0 or (sinks and window is None):
            raise Refusal(f"window={window} and sinks={sinks}: a window holds at least 1 token, sinks need a window")
        self.batch_size, self.max_seq_len, self.static = batch_size, max_seq_len, static
        fits = window is not None and sinks + window <= max_seq_len
        if reach is not None and (window is None or reach <= window):
            window, sinks = reach, 0
        self.window, self.sinks, self.reach = window, sinks, reach
        self.slots = self._entries(1)
        self._sink_groups = min(-(-sinks // GROUP), self._entries(GROUP))
        stored_as = as_format(dtype)
        self.stored: dict[str, CachedTensor] = {}
        for name, shape in shapes.items():
            storage = stored_as.storage(name, sixteen_bits=sixteen_bits, values=values)
            rows_entries = batch_size, self._entries(storage.tokens)
            waiting = min(max_seq_len, storage.tokens)
            self.stored[name] = CachedTensor(
                storage, shape, rows_entries, waiting=waiting, device=device, rotated=stored_as.rotated
            )
        # Tokens may come without end where whatever is stored together, once touched by the window, has a place of its own.
        together = {1, *(stored.storage.tokens for stored in self.stored.values())}
        fits = fits and all(self._touched(tokens) <= max_seq_len // tokens for tokens in together)
        self._endless: bool = fits and (reads is None or reads._endless)
        own = any(stored.newest is not None for stored in self.stored.values())
        self.groups: bool = own or (reads is not None and reads.groups)
        self.states = {
            name: torch.zeros(batch_size, *shape, dtype=kept, device=device) for name, (shape, kept) in (states or {}).items()
        }
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._extent = 0  # tokens of the longest row, or more, known without asking the device
        self._counted = True  # False: a compiled or captured step has taken tokens in, and the device alone knows
        self._ragged = False
        self.common: dict[Any, Any] | None = None  # in a call of several layers (one_call): what those alike have made

    def make_static(self) -> None:
        """From now on shapes stay as they are: a prompt is read eagerly, then decoding is compiled or captured."""
        self.static = True

    def growing(self) -> Iterator[Tensor]:
        """Every tensor that tokens go into."""
        for stored in self.stored.values():
            yield from stored.tensors

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The entries of each cached tensor, without their scales."""
        return {name: stored.parts[0] for name, stored in self.stored.items()}

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that decoding needs again."""
        yield from self.growing()
        yield from self.states.values()

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one row takes in this layer, scales included, read off the buffers; an int where whole."""
        return per_token(sum(stored.group_bytes for stored in self.stored.values()))

    @property
    def elements_per_token(self) -> int:
        """Numbers that one token of one row takes in this layer, scales not counted."""
        return sum(math.prod(stored.shape) for stored in self.stored.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of one row that do not grow, read off the states."""
        return sum(state[0].nbytes for state in self.states.values())

    @property
    def newest_bytes(self) -> int:
        """Bytes of one row that hold tokens not yet stored as they stay, read off the buffers."""
        return sum(stored.newest[0].nbytes for stored in self.stored.values() if stored.newest is not None)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, all rows and slots, and states."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def place(self, new_tokens: int, valid_BT: Tensor | None) -> Placement:
        """Positions and visibility of the next `new_tokens` tokens a row. Call it before `append`.

        Raises Refusal when they do not fit.
        """
        self.check_room(new_tokens)
        return self._once("place", lambda: self._place(new_tokens, valid_BT))

    def _once(self, what: str, make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave another cache of this call whose tokens lie as they do here."""
        if self.common is None:
            return make()
        alike = what, self.slots, self.window, self.sinks, self.reach, self.groups
        if alike not in self.common:
            self.common[alike] = make()
        made: Made = self.common[alike]
        return made

    def _place(self, new_tokens: int, valid_BT: Tensor | None) -> Placement:
        twice = self.groups and new_tokens > 1
        alike = not (self.static or self._ragged or valid_BT is not None or twice)
        if alike and self._extent == 0 and new_tokens > 1 and self.window == self.reach:
            return Placement(0, None, True, None, window=self.window)
        if self.window is not None and new_tokens > 1:
            return self._place_in_window(new_tokens, valid_BT)
        device, reach = self.lengths_B.device, self.reach if self.sinks else None  # sinks may lie beyond it
        if alike and reach is None:
            start, visible = self._extent, self._extent + new_tokens
            mask_BTS = None
            if start > 0 and new_tokens > 1:  # aligned to the bottom right: query t sees slots 0..start+t
                slots_T = torch.arange(start, visible, device=device)
                mask_BTS = (torch.arange(visible, device=device) <= slots_T[:, None])[None]
            return Placement(start, None, False, mask_BTS, self._keys_at(start), first=new_tokens == 1)

        slots_BT = self._positions(new_tokens, valid_BT)  # a leading pad sees slot 0, whatever is there
        slots_S = torch.arange(self._slots_shown(new_tokens), device=device)
        mask_BTS = slots_S <= slots_BT[:, :, None]  # of a ring too: once it is full, all that it holds is seen
        if reach is not None:
            mask_BTS = mask_BTS & ((slots_S >= self.sinks) | (slots_BT[:, :, None] - slots_S < reach))
        if twice:
            return self._place_twice(slots_BT, slots_S.expand(self.batch_size, -1), mask_BTS)
        first = new_tokens == 1 and reach is None
        return Placement(0, slots_BT, False, mask_BTS, self._keys_at(slots_BT), self._end(new_tokens), first=first)

    def append(self, valid_BT: Tensor | None = None, **new: Tensor) -> dict[str, Tensor]:
        """Take in (B, T, ...) tensors at each row's own next positions; returns what is visible afterwards, by name.

        valid_BT marks real tokens (True) where rows are padded, on either side; pads take no slot. Raises Refusal
        when the tokens do not fit.
        """
        seen = self.append_stored(valid_BT, **new)
        return {name: self.stored[name].decode(parts, new[name].dtype) for name, parts in seen.items()}

    def append_stored(self, valid_BT: Tensor | None = None, **new: Tensor) -> dict[str, Parts]:
        """The same, and what is visible as it is stored: for a kernel that reads it so."""
        assert new.keys() == self.stored.keys(), f"cache holds {set(self.stored)}, got {set(new)}"
        T = next(iter(new.values())).shape[1]
        self.check_room(T)
        self._ragged = self._ragged or valid_BT is not None
        encoded = {name: self.stored[name].encode(tensor) for name, tensor in new.items()}
        entries = {name: parts for name, parts in encoded.items() if self.stored[name].newest is None}
        if self.window is not None and T > 1:
            seen = self._through_window(T, entries, valid_BT)
        else:
            if self.static or self._ragged:
                self._scatter(T, valid_BT, entries)
            else:
                first, ring = self._extent, self.slots - self.sinks
                if first >= self.slots:  # of a window
                    first = self.sinks + (first - self.sinks) % ring
                for name, parts in entries.items():
                    for buffer, part in zip(self.stored[name].parts, parts, strict=True):
                        buffer[:, first : first + T] = part
            visible = self._slots_shown(T)
            seen = {name: self._shown(self.stored[name].parts, visible) for name in entries}
        if self.groups:
            seen = self._in_groups(
                T, valid_BT, seen, {name: parts[0] for name, parts in encoded.items() if name not in entries}
            )
        self.advance(T, valid_BT)
        return {name: seen[name] for name in new}

    def keep(self, new_tokens: int, valid_BT: Tensor | None = None, **states: Tensor) -> None:
        """Count tokens as taken in, after which the states are these. Raises Refusal when the tokens do not fit."""
        assert states.keys() == self.states.keys(), f"cache holds {set(self.states)}, got {set(states)}"
        self.check_room(new_tokens)
        for name, state in states.items():
            self._hold(name, state)
        self.advance(new_tokens, valid_BT)

    def _hold(self, name: str, state: Tensor) -> None:
        """In place where a compiled or captured step looks; elsewhere a backward pass may need what was there before."""
        if self.static:
            self.states[name].copy_(state)
        else:
            self.states[name] = state.to(self.states[name].dtype, copy=True)

    def advance(self, new_tokens: int, valid_BT: Tensor | None = None) -> None:
        """Count tokens as taken in. `append` and `keep` do; a layer that reads another one's latents has nothing to append."""
        self._ragged = self._ragged or valid_BT is not None
        self.lengths_B += new_tokens if valid_BT is None else valid_BT.sum(dim=1)
        if self.static and in_graph(self.lengths_B.device):
            self._counted = False
        else:
            self._extent += new_tokens

    def take_back(self, tokens: int, states: Mapping[str, Tensor] | None = None) -> None:
        """Forget the last tokens of every row: a benchmark decodes one token again.

        A window has by then forgotten those in whose slots they came, and holds them in their place; so has the ring of keys
        that wait for their group, where more goes back than a begun group. states: copies of the states from before these
        tokens; ValueError without them where there are any.
        """
        if states is None and self.states:
            raise ValueError(
                f"{', '.join(self.states)} holds all {tokens} tokens that are to be taken back and gives none back: "
                f"copy `states` before they come, and hand the copies over"
            )
        for name, state in (states or {}).items():
            self._hold(name, state)
        self.lengths_B -= tokens
        self._extent -= tokens

    def count(self, new_tokens: int) -> None:
        """Note what a compiled or captured step took in, before which `longest` or `check_room` was asked."""
        self._extent, self._counted = self._extent + new_tokens, True

    def longest(self, at_most: int) -> int:
        """Tokens of the longest row, or a number above it that is no more than `at_most`, for which no device is asked."""
        if self._counted and self._extent <= at_most:
            return self._extent
        longest = int(self.lengths_B.max())
        if self.static:  # elsewhere it says how much of the buffers is in use, pads included
            self._extent, self._counted = longest, True
        return longest

    def check_room(self, new_tokens: int) -> None:
        """Raises Refusal unless so many more tokens a row fit. Inside a step that is compiled or captured: nothing."""
        if self._endless or (self.static and in_graph(self.lengths_B.device)):
            return
        taken = self.longest(self.max_seq_len - new_tokens) if self.static else self._extent
        if taken + new_tokens > self.max_seq_len:
            raise Refusal(
                f"the cache holds {self.max_seq_len} tokens a row and {taken} are taken: "
                f"{new_tokens} more do not fit; allocate a longer cache"
            )

    # --- where entries lie -------------------------------------------------------------------------------------------

    def _entries(self, tokens: int) -> int:
        """How many are held of what is stored so many tokens together: all, or those that sinks and the window touch."""
        whole = self.max_seq_len // tokens
        return whole if self.window is None else min(whole, self._touched(tokens))

    def _touched(self, tokens: int) -> int:
        """Of so many tokens together: how many sinks and a window can touch."""
        assert self.window is not None
        return -(-self.sinks // tokens) + -(-self.window // tokens)

    def _slots_shown(self, new_tokens: int) -> int:
        """After a call of so many tokens, or of one token where there is a window."""
        return self.slots if self.static else min(self._extent + new_tokens, self.slots)

    def _shown(self, parts: Parts, slots: int) -> Parts:
        return parts if self.static else tuple(part[:, :slots] for part in parts)

    def _scatter(self, T: int, valid_BT: Tensor | None, entries: dict[str, Parts]) -> None:
        rows_B1, slots_BT, order_BT = self._once("slots", lambda: self._written(T, valid_BT))
        for name, parts in entries.items():
            for buffer, part in zip(self.stored[name].parts, parts, strict=True):
                new = part if order_BT is None else part[rows_B1, order_BT]
                if self.window is not None and valid_BT is not None:  # a full one has nothing behind its tokens
                    new = torch.where(_beside(valid_BT, part), new, buffer[rows_B1, slots_BT])
                buffer.index_put_((rows_B1, slots_BT), new)

    def _written(self, T: int, valid_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows, slots) that new tokens go to, and indices that bring real tokens to the front, where some are none.

        The pads then land behind them, beyond the row's length: the next token overwrites.
        """
        device = self.lengths_B.device
        rows_B1 = torch.arange(self.batch_size, device=device)[:, None]
        slots_BT = self.lengths_B[:, None] + torch.arange(T, device=device)
        if self.window is not None:
            in_ring_BT = self.sinks + torch.remainder(slots_BT - self.sinks, max(1, self.slots - self.sinks))
            slots_BT = torch.where(slots_BT < self.sinks, slots_BT, in_ring_BT)
        return rows_B1, slots_BT, real_first(valid_BT) if valid_BT is not None and T > 1 else None

    def _positions(self, new_tokens: int, valid_BT: Tensor | None) -> Tensor:
        """Position of each new token, counted in real tokens of its row; a pad has that of the one before it, or 0."""
        if valid_BT is None:
            rank_BT = torch.arange(new_tokens, device=self.lengths_B.device).expand(self.batch_size, -1)
        else:
            rank_BT = valid_BT.long().cumsum(dim=1) - 1
        return (self.lengths_B[:, None] + rank_BT).clamp(min=0)

    def _end(self, new_tokens: int) -> int | None:
        if self.static and in_graph(self.lengths_B.device):
            return None  # a number read here would be compiled in
        return self._extent + new_tokens if self._counted else None

    # --- keys by channel: tokens are stored in groups --------------------------------------------------------------------

    def _place_twice(self, positions_BT: Tensor, keys_BS: Tensor, mask_BTS: Tensor) -> Placement:
        """A query sees of these keys the groups that are complete with it, and behind them the others as they came."""
        known_BT1 = (positions_BT[:, :, None] + 1) // GROUP * GROUP
        grouped_BTS = (keys_BS[:, None, :] >= 0) & (keys_BS[:, None, :] < known_BT1)
        mask_BTS = torch.cat((mask_BTS & grouped_BTS, mask_BTS & ~grouped_BTS), dim=-1)
        twice_BS = keys_BS.repeat(1, 2)
        end = self._end(positions_BT.shape[1])
        return Placement(0, positions_BT, False, mask_BTS, lambda: twice_BS, end, twice=keys_BS.shape[1])

    def _in_groups(self, T: int, valid_BT: Tensor | None, seen: dict[str, Parts], new: dict[str, Tensor]) -> dict[str, Parts]:
        """Take in keys by channel; what is visible then, of all: to one query a row, or as `_place_twice` says."""
        before_B1 = self.lengths_B[:, None]
        after_B1 = before_B1 + (T if valid_BT is None else valid_BT.sum(dim=1, keepdim=True))
        begun_B1, complete_B1 = before_B1 // GROUP, after_B1 // GROUP
        keys_BS = self._keys_shown(T, valid_BT).clamp(min=0)
        group_BS, made = keys_BS // GROUP, -(-T // GROUP)
        shown = (
            seen if T == 1 else {name: tuple(torch.cat((part, part), dim=1) for part in parts) for name, parts in seen.items()}
        )
        for name, tensor in new.items():
            stored = self.stored[name]
            came, groups = stored.take_in(tensor, before_B1, after_B1, None if valid_BT is None else real_first(valid_BT))
            held = stored.parts[0].shape[1] if self.static else min(stored.parts[0].shape[1], self._extent // GROUP)
            all_groups = tuple(
                torch.cat((part[:, :held], more), dim=1) for part, more in zip(stored.parts, groups, strict=True)
            )
            slot_BS = torch.where(group_BS < begun_B1, self._group_slot(stored, group_BS), held + group_BS - begun_B1)
            first_B1 = begun_B1 * GROUP
            came_BS = (held + made) * GROUP + (keys_BS - first_B1).minimum(after_B1 - 1 - first_B1).clamp(min=0)
            index_BS = torch.where(group_BS < complete_B1, slot_BS * GROUP + keys_BS % GROUP, came_BS)
            shown[name] = (*all_groups, came, index_BS if T == 1 else torch.cat((index_BS, came_BS), dim=1))
            self._settle(stored, groups, begun_B1, complete_B1)
        return shown

    def _keys_shown(self, T: int, valid_BT: Tensor | None) -> Tensor:
        """Position of each key that a call of T tokens shows, -1 where none; before the tokens are counted."""
        if self.window is None:
            return torch.arange(self._slots_shown(T), device=self.lengths_B.device)[None]
        positions_BT = self._positions(T, valid_BT)
        return self._held(positions_BT, self._slots_shown(T)) if T == 1 else self._keys_in_window(positions_BT, valid_BT)

    def _group_slot(self, stored: CachedTensor, group: Tensor) -> Tensor:
        """Where a group lies: the sinks' ones first, then a ring of the others."""
        first = self._sink_groups
        ring = max(1, stored.parts[0].shape[1] - first)
        return torch.where((group >= 0) & (group < first), group, first + torch.remainder(group - first, ring))

    def _settle(self, stored: CachedTensor, groups: Parts, begun_B1: Tensor, complete_B1: Tensor) -> None:
        """Store the groups from `begun` on that are complete: of those that share a slot the last one."""
        device, made = begun_B1.device, groups[0].shape[1]
        rows_B1 = torch.arange(self.batch_size, device=device)[:, None]
        newest = torch.arange(min(made, stored.parts[0].shape[1] - self._sink_groups), device=device)
        sinks = torch.arange(self._sink_groups, device=device).expand(self.batch_size, -1)
        group_BN = torch.cat((sinks, complete_B1 - 1 - newest), dim=1)  # neighbours: no two of them in one slot, or alike
        slot_BN = self._group_slot(stored, group_BN)
        is_new_BN = (group_BN >= begun_B1) & (group_BN < complete_B1)
        source_BN = (group_BN - begun_B1).clamp(0, made - 1)
        for buffer, part in zip(stored.parts, groups, strict=True):
            is_new = _beside(is_new_BN, part)
            buffer.index_put_((rows_B1, slot_BN), torch.where(is_new, part[rows_B1, source_BN], buffer[rows_B1, slot_BN]))

    # --- windows: position p lives in slot p, then in a ring behind the sinks ----------------------------------------

    # A call of one token a row writes before it reads: in its slot lay the one that it no longer sees.

    def _keys_at(self, newest: Tensor | int) -> Callable[[], Tensor] | None:
        """Positions of the visible keys after a call of one token, which stands at `newest` in its row."""
        return None if self.window is None else functools.partial(self._held, newest, self._slots_shown(1))

    def _held(self, newest: Tensor | int, shown: int | None = None) -> Tensor:
        """Position that each slot holds in rows whose newest token is at (B, 1) `newest`, (B or 1, M); -1 where none yet."""
        slot_1M = torch.arange(self.slots, device=self.lengths_B.device)[None]
        ring = self.slots - self.sinks
        in_ring = newest - torch.remainder(newest - slot_1M, ring) if ring > 0 else slot_1M
        held_BM = torch.where(slot_1M < self.sinks, slot_1M, in_ring)
        return torch.where((held_BM >= slot_1M) & (held_BM <= newest), held_BM, -1)[:, :shown]

    def _place_in_window(self, new_tokens: int, valid_BT: Tensor | None) -> Placement:
        """The visible keys are what the slots hold, then the new tokens."""
        assert self.window is not None
        positions_BT = self._positions(new_tokens, valid_BT)
        keys_BS = self._keys_in_window(positions_BT, valid_BT)
        query, key = positions_BT[:, :, None], keys_BS[:, None, :]
        mask_BTS = (key >= 0) & (key <= query) & ((key < self.sinks) | (query - key < self.window))
        if self.sinks and self.reach is not None:
            mask_BTS = mask_BTS & (query - key < self.reach)
        if valid_BT is not None:  # a pad sees itself, so that its softmax is defined
            itself = torch.arange(new_tokens - keys_BS.shape[1], new_tokens, device=keys_BS.device)
            mask_BTS = mask_BTS | (itself == torch.arange(new_tokens, device=keys_BS.device)[:, None])
        if self.groups and new_tokens > 1:
            return self._place_twice(positions_BT, keys_BS, mask_BTS)
        return Placement(0, positions_BT, False, mask_BTS, lambda: keys_BS, self._end(new_tokens))

    def _keys_in_window(self, positions_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
        """Position of what each slot holds, then of the new tokens; -1 where there is none, and of pads."""
        used = self.slots if self.static else min(self._extent, self.slots)
        new_BT = positions_BT if valid_BT is None else torch.where(valid_BT, positions_BT, -1)
        return torch.cat((self._held(self.lengths_B[:, None] - 1)[:, :used], new_BT), dim=1)

    def _through_window(self, T: int, entries: dict[str, Parts], valid_BT: Tensor | None) -> dict[str, Parts]:
        """What the slots held before, then the new entries; afterwards the slots hold what is still needed."""
        device = self.lengths_B.device
        used = self.slots if self.static else min(self._extent, self.slots)
        seen = {
            name: tuple(
                torch.cat((buffer[:, :used], part), dim=1) for buffer, part in zip(self.stored[name].parts, parts, strict=True)
            )
            for name, parts in entries.items()
        }
        held_BM = self._held(self.lengths_B[:, None] + (T if valid_BT is None else valid_BT.sum(dim=1, keepdim=True)) - 1)
        rank_BM = held_BM - self.lengths_B[:, None]  # among the row's new tokens; below 0: it is there already
        order_BT = torch.arange(T, device=device).expand(self.batch_size, -1)
        if valid_BT is not None:
            order_BT = real_first(valid_BT)
        source_BM = order_BT.gather(1, rank_BM.clamp(0, T - 1))
        rows_B1 = torch.arange(self.batch_size, device=device)[:, None]
        for name, parts in entries.items():
            for buffer, part in zip(self.stored[name].parts, parts, strict=True):
                buffer.copy_(torch.where(_beside(rank_BM >= 0, buffer), part[rows_B1, source_BM], buffer))
        return seen


@contextlib.contextmanager
def one_call(caches: Sequence[Cache] | None) -> Iterator[None]:
    """Inside, where tokens stand and what they see is worked out once for all layers whose caches are alike.

    For one call of a model, to which each layer's cache takes in the same tokens.
    """
    common: dict[Any, Any] = {}
    for cache in caches or ():
        cache.common = common
    try:
        yield
    finally:
        for cache in caches or ():
            cache.common = None


def _beside(flags_BS: Tensor, entries_BS: Tensor) -> Tensor:
    """Flags of entries, in a shape that goes with theirs."""
    return flags_BS.view(*flags_BS.shape, *(1 for _ in entries_BS.shape[2:]))


def real_first(valid_BT: Tensor) -> Tensor:
    """Indices that bring each row's real tokens to the front, in order."""
    return torch.argsort(valid_BT.logical_not().to(torch.uint8), dim=1, stable=True)


def per_token(group_bytes: int) -> float:
    """Of the bytes of GROUP tokens; an int where it is whole."""
    return group_bytes / GROUP if group_bytes % GROUP else group_bytes // GROUP


def check_window(kernel: str, window: int | None) -> None:
    """Raises Refusal for a window that the decode kernel cannot read."""
    if window is not None and kernel not in ("auto", "torch"):
        raise Refusal(f"attention.kernel={kernel} reads caches without a window: take attention.kernel=torch")


def place_without_cache(new_tokens: int, valid_BT: Tensor | None, *, causal: bool, window: int | None = None) -> Placement:
    """Placement of a whole sequence: training, scoring, or a padded batch (valid_BT True at real tokens)."""
    if valid_BT is None:
        return Placement(0, None, causal, None, window=window)
    T, device = new_tokens, valid_BT.device
    eye_TT = torch.eye(T, dtype=torch.bool, device=device)
    mask_BTS = valid_BT[:, None, :] | eye_TT  # a pad sees itself, so that its softmax is defined
    if causal:  # real tokens of a row stand side by side: places are as far apart as positions
        mask_BTS = mask_BTS & band(T, T if window is None else window, device)
    return Placement(0, (valid_BT.long().cumsum(dim=1) - 1).clamp(min=0), False, mask_BTS, end=T)
