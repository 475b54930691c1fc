"""safetensors files read and written one tensor at a time, so that no more than that is ever in memory.

The library reads them. It writes a file only from all of its tensors at once, so that is done here: a file is eight bytes
(the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets) and the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from harness.errors import UserError, readable

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ZEROS = bytes(2**20)


@dataclass(frozen=True)
class TensorInFile:
    """One tensor of a file. dtype: as the header calls it."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor. Raises UserError when the file cannot be read."""
        with _opened(self.file) as file:
            tensor: Tensor = file.get_tensor(self.name)
            return tensor


def open_shards(files: Sequence[Path]) -> dict[str, TensorInFile]:
    """The tensors of all files by name; only the headers are read.

    Raises UserError for a file that is not whole or not safetensors, and for a name that stands in two of them.
    """
    tensors: dict[str, TensorInFile] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.offset_keys():
                if name in tensors:
                    raise UserError(f"{name} stands in {tensors[name].file} and in {path}: remove the shard that is not needed")
                entry = file.get_slice(name)
                tensors[name] = TensorInFile(path, name, entry.get_dtype(), tuple(entry.get_shape()))
    return tensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with readable(str(path), "fetch it again"), safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{path} is no safetensors file (its header: {reason}): fetch it again") from None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """One safetensors file whose tensors are known beforehand and then given one by one, in `names`' order."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        # The widest dtype first: every tensor then begins at a multiple of its own item size.
        self.names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
        self.specs = specs
        entries: dict[str, Any] = {}
        start = 0
        for name in self.names:
            spec = specs[name]
            end = start + spec.nbytes
            entries[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
            start = end
        header = json.dumps(entries).encode()
        self.header = header + b" " * (-len(header) % 8)
        self.nbytes = 8 + len(self.header) + start

    def write(self, path: Path, tensors: Iterable[Tensor]) -> None:
        """tensors: one for each of `names`, in their specs' dtypes; one with fewer rows than its spec ends in zeros.

        Raises OSError when the file cannot be written.
        """
        with path.open("wb") as file:
            file.write(len(self.header).to_bytes(8, "little") + self.header)
            for name, tensor in zip(self.names, tensors, strict=True):
                spec = self.specs[name]
                assert tensor.dtype == spec.dtype and tensor.shape[1:] == spec.shape[1:], name
                assert tensor.shape[0] <= spec.shape[0], name
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                missing = spec.nbytes - tensor.nbytes
                while missing:
                    missing -= file.write(_ZEROS[:missing])
        assert path.stat().st_size == self.nbytes
