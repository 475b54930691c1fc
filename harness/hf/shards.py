"""safetensors files read and written one tensor at a time, so that no more than that is ever in memory.

A file is eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets) and the
tensors' bytes. The header is held against the size of the file before anything else is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.files.untrusted import parse_object

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in the library
_ZEROS = bytes(2**20)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file. start: in the file, of its nbytes bytes. dtype: as the header calls it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """The tensor. Raises UserError for a dtype other than DTYPES, or when the file cannot be read."""
        if self.dtype not in DTYPES:
            raise UserError(f"{self.file} holds tensors of {self.dtype}: convert them to {', '.join(DTYPES)} first")
        content = bytearray(self.nbytes)
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                read = file.readinto(content)
        except OSError as error:
            raise UserError(f"{self.file} cannot be read ({error.strerror}): fetch it again") from None
        if read != self.nbytes:
            raise UserError(f"{self.file} ends in the middle of a tensor: fetch it again")
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).view(self.shape)


def open_shards(files: Sequence[Path]) -> dict[str, Stored]:
    """The tensors of all files by name; only the headers are read.

    Raises UserError for a file that is not whole or not safetensors, and for a name that stands in two of them.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in _header(file).items():
            if name in tensors:
                raise UserError(f"{name} stands in {tensors[name].file} and in {file}: remove the shard that is not needed")
            tensors[name] = stored
    return tensors


def _header(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UserError(f"{path} is no whole safetensors file ({size:,} bytes): fetch it again")
            header = parse_object(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fetch it again") from None
    except ValueError as error:
        raise UserError(f"{path} is no safetensors file (its header: {error}): fetch it again") from None
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.nbytes)):
        if stored.start != end:
            raise UserError(f"{path} has tensors that overlap or leave holes: fetch it again")
        end += stored.nbytes
    if end != size:
        raise UserError(f"{path} has {size:,} bytes and its header speaks of {end:,}: fetch it again")
    return tensors


def _stored(path: Path, name: str, entry: Any, base: int) -> Stored:
    try:
        dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(number) is int and number >= 0 for number in (*shape, start, end)) and start <= end
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or (dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize):
        raise UserError(f"{path}: the header's entry of {name} makes no sense: fetch the file again")
    return Stored(path, dtype, shape, base + start, end - start)


@dataclass(frozen=True)
class Slot:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """One safetensors file whose tensors are known beforehand and then given one by one, in `names`' order."""

    def __init__(self, slots: Mapping[str, Slot]) -> None:
        # The widest dtype first: every tensor then begins at a multiple of its own item size.
        self.names = sorted(slots, key=lambda name: -slots[name].dtype.itemsize)
        self.slots = slots
        entries: dict[str, Any] = {}
        start = 0
        for name in self.names:
            end = start + slots[name].nbytes
            entries[name] = {"dtype": _NAMES[slots[name].dtype], "shape": list(slots[name].shape), "data_offsets": [start, end]}
            start = end
        header = json.dumps(entries).encode()
        self.header = header + b" " * (-len(header) % 8)
        self.nbytes = 8 + len(self.header) + start

    def write(self, path: Path, tensors: Iterable[Tensor]) -> None:
        """tensors: one for each of `names`, in their slots' dtypes; one with fewer rows than its slot ends in zeros.

        Raises OSError when the file cannot be written.
        """
        with path.open("wb") as file:
            file.write(len(self.header).to_bytes(8, "little") + self.header)
            for name, tensor in zip(self.names, tensors, strict=True):
                slot = self.slots[name]
                assert tensor.dtype == slot.dtype and tensor.shape[1:] == slot.shape[1:], name
                assert tensor.shape[0] <= slot.shape[0], name
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                missing = slot.nbytes - tensor.nbytes
                while missing:
                    missing -= file.write(_ZEROS[:missing])
        assert path.stat().st_size == self.nbytes
