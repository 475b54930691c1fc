"""How a cache stores vectors: as they are, in eight bits or in four; keys and values alike, or each in its own bits.

`cache_format` reads the names of `cache.dtype`:

    float32, bfloat16, float16   as they are
    int8, fp8                    8 bits (fp8: e4m3) and a bfloat16 scale for each vector
    int4                         4 bits and a bfloat16 scale for each 32 elements of a vector
    k8v4                         keys in int8, values in int4; any two of 16 (bfloat16), 8 and 4 bits
    kc4v4                        values likewise; keys in 8 or 4 bits, with a scale for each channel of 32 tokens

Keys by channel are those of KIVI (Liu et al. 2024, arXiv 2402.02750): a channel that is large for every token has a scale of
its own. The newest keys, of which there are not yet 32 to share scales, are kept in bfloat16.

What is stored in 8 or 4 bits may be rotated before that and turned back when it is read (int4_rotated, k8v4_rotated): a
fixed random orthogonal matrix of a vector's width spreads what stands out in a few channels over all of them (QuaRot, Ashkboos
et al. 2024, arXiv 2404.00456, there a Hadamard matrix). It is made of the width alone and is not counted as cache.

Scales are divided by as they are stored, so that their own rounding adds no error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.cache_formats import read_format

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # magnitude that each type holds
SCALE = torch.bfloat16
SIXTEEN = torch.bfloat16  # what stays in 16 bits where other things take fewer
GROUP = 32  # elements of a vector that share a scale in 4 bits; the last group of another width is shorter. Tokens by channel

Parts = tuple[Tensor, ...]  # what a storage makes of vectors (..., width): tensors that begin with the same dimensions


class Storage(Protocol):
    """One way to store vectors. A shape is that of one token, (..., width).

    What is said of a token is said of `tokens` of them where they are stored together.
    """

    @property
    def tokens(self) -> int:
        """How many are stored together."""

    @property
    def itemsize(self) -> float:
        """Bytes of an element, scales apart."""

    def tensors(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of each part of a token."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a token, by arithmetic and not by any tensor."""

    def encode(self, x: Tensor) -> Parts:
        """Vectors (..., width) as parts."""

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        """The vectors that parts stand for; in `dtype`, unless they are stored as they are."""


@dataclass(frozen=True)
class Plain:
    """Numbers as they are."""

    dtype: torch.dtype
    tokens: ClassVar[int] = 1

    @property
    def itemsize(self) -> float:
        return self.dtype.itemsize

    def tensors(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return ((shape, self.dtype),)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def encode(self, x: Tensor) -> Parts:
        return (x.to(self.dtype),)

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        return parts[0]


@dataclass(frozen=True)
class EightBits:
    """One scale a vector (`quantise`). Float8 is held as its bytes: few operations know the type itself."""

    dtype: torch.dtype  # a key of LARGEST
    tokens: ClassVar[int] = 1
    itemsize: ClassVar[float] = 1

    def tensors(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return (shape, torch.int8 if self.dtype == torch.int8 else torch.uint8), (shape[:-1], SCALE)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) + SCALE.itemsize * math.prod(shape[:-1])

    def encode(self, x: Tensor) -> Parts:
        payload, scale = quantise(x, self.dtype)
        return payload if self.dtype == torch.int8 else payload.view(torch.uint8), scale

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        payload, scale = parts
        return dequantise(payload if self.dtype == torch.int8 else payload.view(self.dtype), scale, dtype)


@dataclass(frozen=True)
class FourBits:
    """One scale for each GROUP elements, two elements a byte; the last byte of an odd width holds one (`quantise_four`)."""

    tokens: ClassVar[int] = 1
    itemsize: ClassVar[float] = 0.5

    def tensors(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        *heads, width = shape
        return ((*heads, (width + 1) // 2), torch.uint8), ((*heads, -(-width // GROUP)), SCALE)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[:-1]) * (math.ceil(shape[-1] / 2) + SCALE.itemsize * math.ceil(shape[-1] / GROUP))

    def encode(self, x: Tensor) -> Parts:
        return quantise_four(x)

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        payload, scale = parts
        return dequantise_four(payload, scale, width, dtype)


@dataclass(frozen=True)
class ByChannel:
    """GROUP tokens that follow one another together: each channel's numbers as `of` stores a vector.

    encode takes (B, N, GROUP, *shape), and what is decoded is (B, N * GROUP, *shape).
    """

    of: Storage
    tokens: ClassVar[int] = GROUP

    @property
    def itemsize(self) -> float:
        return self.of.itemsize

    def tensors(self, shape: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return self.of.tensors((*shape, GROUP))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return self.of.nbytes((*shape, GROUP))

    def encode(self, x: Tensor) -> Parts:
        return self.of.encode(x.movedim(2, -1))

    def decode(self, parts: Parts, width: int, dtype: torch.dtype) -> Tensor:
        return self.of.decode(parts, GROUP, dtype).movedim(-1, 2).flatten(1, 2)


@dataclass(frozen=True)
class CacheFormat:
    """What a cache keeps. keys: also of what serves as key and value at once. by_channel: keys that are nothing else."""

    name: str
    keys: Storage
    values: Storage
    rotated: bool = False
    by_channel: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def in_few_bits(self) -> bool:
        """Whether something is stored in less than 16 bits, so that a model computes something else through it."""
        return not (isinstance(self.keys, Plain) and isinstance(self.values, Plain))

    @property
    def tells_apart(self) -> bool:
        """Whether keys and values are stored differently."""
        return self.by_channel or self.keys != self.values

    def storage(self, name: str, *, sixteen_bits: Collection[str], values: Collection[str]) -> Storage:
        """How the cached tensor of this name is stored; the others are those that a variant states.

        By channel where keys are apart: what has no values beside it serves as both.
        """
        if self.in_few_bits and name in sixteen_bits:
            return Plain(SIXTEEN)
        if name in values:
            return self.values
        return ByChannel(self.keys) if self.by_channel and values else self.keys

    @property
    def state_dtype(self) -> torch.dtype:
        """In what a state is kept, which belongs to no token."""
        return SIXTEEN if self.in_few_bits or not isinstance(self.keys, Plain) else self.keys.dtype

    def read_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In what keys of `dtype` are read back."""
        return self.keys.dtype if isinstance(self.keys, Plain) else dtype


NAMED: dict[str, Storage] = {
    "float32": Plain(torch.float32),
    "bfloat16": Plain(torch.bfloat16),
    "float16": Plain(torch.float16),
    "int8": EightBits(torch.int8),
    "fp8": EightBits(torch.float8_e4m3fn),
    "int4": FourBits(),
}


def cache_format(name: str) -> CacheFormat:
    """The format of that name. Raises Refusal, with the forms there are, for any other (modeling/cache_formats.py)."""
    read = read_format(name)
    return CacheFormat(name, NAMED[read.keys], NAMED[read.values], read.rotated, read.by_channel)


def as_format(dtype: torch.dtype | CacheFormat) -> CacheFormat:
    """A format, or the one that keeps everything in this dtype."""
    if isinstance(dtype, CacheFormat):
        return dtype
    storage = EightBits(dtype) if dtype in LARGEST else Plain(dtype)
    name = next((name for name, named in NAMED.items() if named == storage), str(dtype).removeprefix("torch."))
    return CacheFormat(name, storage, storage)


def newest_bytes(storage: Storage, shape: tuple[int, ...], tokens: int) -> int:
    """Bytes of one row of so many tokens that are kept for those not yet stored together, by arithmetic."""
    return 0 if storage.tokens == 1 else min(tokens, storage.tokens) * math.prod(shape) * SIXTEEN.itemsize


class CachedTensor:
    """One cached tensor of `shape` a token for all rows and slots: its parts, and how vectors go in and come out.

    Where several tokens are stored together, `newest` is a ring of as many, in which the token at position p lies at p
    modulo its length: those that are not yet all there are in it, as they came (`take_in`).
    """

    def __init__(
        self,
        storage: Storage,
        shape: tuple[int, ...],
        rows_entries: tuple[int, int],
        *,
        waiting: int,
        device: torch.device | str,
        rotated: bool,
    ) -> None:
        """rows_entries: an entry is of storage.tokens tokens. waiting: the length of `newest`, where there is one."""
        self.storage, self.shape = storage, shape
        # Zeros, not empty: slots that a mask hides still meet a weight of 0, and 0 * NaN is NaN.
        self.parts = tuple(
            torch.zeros(*rows_entries, *part, dtype=dtype, device=device) for part, dtype in storage.tensors(shape)
        )
        self.newest: Tensor | None = None
        if storage.tokens > 1:
            self.newest = torch.zeros(rows_entries[0], waiting, *shape, dtype=SIXTEEN, device=device)
        rotated = rotated and not isinstance(storage, Plain)
        self.rotation_KK = rotation(shape[-1]).to(device) if rotated else None

    @property
    def in_words(self) -> bool:
        """Whether it is one vector a token of 8 bits with one scale, in whole words of four: as the decode kernel reads it."""
        return (
            isinstance(self.storage, EightBits) and self.rotation_KK is None and len(self.shape) == 1 and self.shape[0] % 4 == 0
        )

    def payload_and_scale(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Parts of 8 bits, the first in the type that its numbers have."""
        assert isinstance(self.storage, EightBits)
        payload, scale = parts
        return payload if self.storage.dtype == payload.dtype else payload.view(self.storage.dtype), scale

    @property
    def tensors(self) -> Parts:
        """All that is held."""
        return self.parts if self.newest is None else (*self.parts, self.newest)

    @property
    def group_bytes(self) -> int:
        """Bytes that GROUP tokens of one row take, once they are stored as they stay: read off the parts."""
        together = sum(math.prod(part.shape[2:]) * part.itemsize for part in self.parts)
        return together * (GROUP // self.storage.tokens)

    def take_in(self, new: Tensor, before_B1: Tensor, after_B1: Tensor, order_BT: Tensor | None) -> tuple[Tensor, Parts]:
        """Tokens (B, T, *shape) that rows of `before` tokens take in, after which they have `after`.

        order_BT: indices that bring each row's real tokens to the front. Returns (tokens as they came, from the first of the
        group that was begun; the groups from that one on, as many as T tokens can complete).
        """
        assert self.newest is not None
        T, R, together = new.shape[1], self.newest.shape[1], self.storage.tokens
        rows_B1 = torch.arange(new.shape[0], device=new.device)[:, None]
        rank_BX = torch.arange(R + T, device=new.device) - before_B1 % together  # among the new tokens
        source_BX = rank_BX.clamp(0, T - 1)
        if order_BT is not None:
            source_BX = order_BT.gather(1, source_BX)
        is_new = ((rank_BX >= 0) & (rank_BX < after_B1 - before_B1)).view(*rank_BX.shape, *(1 for _ in self.shape))
        came = torch.where(is_new, new[rows_B1, source_BX], torch.cat((self.newest, torch.zeros_like(new)), dim=1))
        made = -(-T // together)
        groups = came[:, : made * together]
        groups = F.pad(groups, (0, 0) * len(self.shape) + (0, made * together - groups.shape[1]))  # of a shorter context
        last_B1 = after_B1 - 1 - before_B1 // together * together
        kept_BR = last_B1 - torch.remainder(last_B1 - torch.arange(R, device=new.device), R)  # below 0: as it was
        self.newest.copy_(came[rows_B1, torch.where(kept_BR < 0, kept_BR + R, kept_BR)])
        return came, self.storage.encode(groups.unflatten(1, (made, together)))

    def encode(self, new: Tensor) -> Parts:
        """Vectors (B, T, *shape) as they are written."""
        if self.newest is not None:
            return (new.to(self.newest.dtype),)
        return self.storage.encode(new if self.rotation_KK is None else _product(new, self.rotation_KK))

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """What parts of any slots stand for; in `dtype`, unless they are stored as they are.

        Of tokens that are stored together: groups, tokens as they came, and which of all these tokens are meant.
        """
        if self.newest is not None:
            *groups, came, index_BS = parts
            whole = torch.cat((self.storage.decode(tuple(groups), self.shape[-1], dtype), came.to(dtype)), dim=1)
            return whole[torch.arange(whole.shape[0], device=whole.device)[:, None], index_BS]
        if self.rotation_KK is None:
            return self.storage.decode(parts, self.shape[-1], dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return _product(self.storage.decode(parts, self.shape[-1], wide), self.rotation_KK.T).to(dtype)


@functools.cache
def rotation(width: int) -> Tensor:
    """An orthogonal matrix (width, width) in float32, the same wherever it is asked for: Gaussian noise orthogonalised."""
    noise = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(width))
    q, r = torch.linalg.qr(noise)
    return (q * r.diagonal().sign()).float()  # without the signs it would be one library's choice


def _product(x: Tensor, matrix_KK: Tensor) -> Tensor:
    """In float32 at least, whatever autocast says."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(wide) @ matrix_KK.to(wide)


# --- eight bits ------------------------------------------------------------------------------------------------------


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(payload of x's shape in `dtype`, scale of x's shape without its last dimension in SCALE).

    Scales are rounded upwards, so that nothing saturates. int8: within half a step of each element; a step is the stored
    scale, 0.3 to 1.2 % above amax / 127, so half of one is at most 0.506 amax / 127. What is read back in bfloat16 is rounded
    once more.
    """
    largest = LARGEST[dtype]
    peak = x.abs().amax(dim=-1).float() / largest
    # bfloat16 has 8 significant bits: 2^-7 relative makes up for rounding down; the floor keeps 0 / 0 away.
    scale = (peak * (1 + 2**-7)).to(SCALE).clamp(min=torch.finfo(SCALE).tiny)
    scaled = x.float() / scale.float().unsqueeze(-1)
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(dtype), scale


def dequantise(payload: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that (payload, scale) stand for."""
    return payload.to(dtype) * scale.to(dtype).unsqueeze(-1)


# --- four bits -------------------------------------------------------------------------------------------------------


def quantise_four(x: Tensor) -> tuple[Tensor, Tensor]:
    """(two elements a byte, a scale for each GROUP elements in SCALE).

    An element is a whole number of scales, -8 to 7, and a group's scale has the sign that makes its largest element -8.
    """
    width = x.shape[-1]
    groups_GK = F.pad(x.float(), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    peak = groups_GK.gather(-1, groups_GK.abs().argmax(dim=-1, keepdim=True))
    scale = (peak / -8).to(SCALE)
    scale = scale.abs().clamp(min=torch.finfo(SCALE).tiny).copysign(scale)  # 0 / 0 is no number
    levels = (groups_GK / scale.float()).round().clamp(-8, 7) + 8
    levels = levels.flatten(-2)[..., : width + width % 2].to(torch.uint8)
    return levels[..., 0::2] | levels[..., 1::2] << 4, scale.squeeze(-1)


def dequantise_four(payload: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The numbers, (..., width), that (payload, scale) stand for."""
    levels = torch.stack((payload & 15, payload >> 4), dim=-1).flatten(-2)[..., :width]
    scales = scale.to(dtype).repeat_interleave(GROUP, dim=-1)[..., :width]
    return (levels.to(dtype) - 8) * scales
