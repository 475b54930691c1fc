"""The files of one split, written as the tokens come: memory holds 24 bytes a document and no text."""

from __future__ import annotations

import array
import hashlib
import os
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
        self._arrays = {"starts": array.array("q", [0]), "bytes": array.array("q"), "words": array.array("q")}
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
            self._arrays["starts"].append(self._n_tokens)
            self._arrays["bytes"].append(self._document_bytes)
            self._arrays["words"].append(self._document_words)
            self._document_bytes = self._document_words = 0
            self._word_is_open = False

    def _write(self, tokens: list[int]) -> None:
        data = np.asarray(tokens, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._n_tokens += len(tokens)

    def finish(self) -> dict[str, Any]:
        """Writes the arrays and returns what meta.json says of the split; an empty split is {} and leaves no file."""
        sync(self._file)
        self._file.close()
        if not self._n_tokens:
            (self._folder / f"{self._split}.bin").unlink()
            return {}
        for kind, values in self._arrays.items():
            with (self._folder / f"{self._split}.{kind}.npy").open("wb") as file:
                np.save(file, np.frombuffer(values, dtype=np.int64))
                sync(file)
        return {
            "tokens": self._n_tokens,
            "documents": len(self._arrays["bytes"]),
            "bytes": sum(self._arrays["bytes"]),
            "words": sum(self._arrays["words"]),
            "sha256": self._digest.hexdigest(),
        }


def sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
