"""The files of one split, written as the tokens come: memory holds neither text nor anything of a document that has ended."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from harness.data.tokenizer import Tokenizer, text_before


class Piece(NamedTuple):
    split: str
    text: str
    n_bytes: int
    last: bool  # ends its document


class SplitWriter:
    """Appends the tokens of one split to its file, and counts. `room`: tokens that the split may have (None: any)."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], tokenizer: Tokenizer, room: int | None) -> None:
        self.full = False
        self._folder, self._split, self._dtype, self._tokenizer, self._room = folder, split, dtype, tokenizer, room
        self._file = (folder / f"{split}.bin").open("wb")
        self._digest = hashlib.sha256()
        self._n_tokens = 0
        kinds = ("starts", "bytes", "words")
        self._starts, self._bytes, self._words = (_Column(folder / f"{split}.{kind}.npy") for kind in kinds)
        self._starts.append(0)
        self._document_bytes = self._document_words = 0
        self._word_is_open = False

    def add(self, tokens: list[int], piece: Piece) -> None:
        """One piece of a document. The document that exceeds the room is cut, and nothing after it is taken."""
        text, n_bytes, last = piece.text, piece.n_bytes, piece.last
        if self.full:
            return
        if self._room is not None and self._n_tokens + len(tokens) + 1 >= self._room:
            self.full = last = True
            if self._n_tokens + len(tokens) + 1 > self._room:
                room = self._room - self._n_tokens - 1
                text = text_before(self._tokenizer.decode, tokens, room)
                tokens = tokens[:room]
                n_bytes = len(text.encode())
            if not tokens and not self._document_bytes:
                return
        self._write(tokens)
        self._document_bytes += n_bytes
        # A word that a cut went through is one word.
        self._document_words += len(text.split()) - (self._word_is_open and bool(text) and not text[0].isspace())
        self._word_is_open = bool(text) and not text[-1].isspace()
        if last:
            self._write([self._tokenizer.end_of_text])
            self._starts.append(self._n_tokens)
            self._bytes.append(self._document_bytes)
            self._words.append(self._document_words)
            self._document_bytes = self._document_words = 0
            self._word_is_open = False

    def _write(self, tokens: list[int]) -> None:
        data = np.asarray(tokens, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._n_tokens += len(tokens)

    def finish(self) -> dict[str, Any]:
        """Completes the files and returns what meta.json says of the split; an empty split is {} and leaves no file."""
        sync(self._file)
        self._file.close()
        for column in (self._starts, self._bytes, self._words):
            column.close()
        if not self._n_tokens:
            for file in self._folder.glob(f"{self._split}.*"):
                file.unlink()
            return {}
        return {
            "tokens": self._n_tokens,
            "documents": self._bytes.n,
            "bytes": self._bytes.total,
            "words": self._words.total,
            "sha256": self._digest.hexdigest(),
        }


class _Column:
    """An array of int64 in a .npy file that is written value by value. `n` values so far, and their `total`."""

    def __init__(self, path: Path) -> None:
        self.n = self.total = 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """NumPy pads a header so that it keeps its length while the first axis grows: it is written again over itself."""
        self._file.seek(0)
        header = {"descr": np.dtype(np.int64).str, "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, value: int) -> None:
        self._file.write(value.to_bytes(8, sys.byteorder))
        self.n += 1
        self.total += value

    def close(self) -> None:
        self._write_header()
        sync(self._file)
        self._file.close()


def sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
