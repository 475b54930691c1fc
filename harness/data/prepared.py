"""A tokenised corpus on disk, opened by memory map: numpy is all that reading it takes.

Folder: SPLIT.bin (tokens, uint16 or uint32), SPLIT.{starts,bytes,words}.npy (int64, per document), tokenizer.json
(absent for plain bytes), meta.json. Nothing in it names a path of the machine that made it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.documents import SPLITS
from harness.errors import UserError

FORMAT = 1  # raised whenever the same source and settings would give other files


class DamagedError(UserError):
    """A prepared folder that is not what its meta.json says."""


@dataclass(frozen=True)
class TokenSplit:
    """One split. Every document is followed by one end-of-text token, which `n_tokens` counts.

    tokens: uint16 or uint32 (n_tokens,), memory-mapped. document_starts: int64 (n_documents + 1,), token offsets, the
    last is n_tokens. document_bytes, document_words: int64 (n_documents,), UTF-8 bytes and white-space words of the
    text, without the end of text.
    """

    tokens: NDArray[Any]
    document_starts: NDArray[np.int64]
    document_bytes: NDArray[np.int64]
    document_words: NDArray[np.int64]
    n_tokens: int
    n_documents: int
    n_bytes: int
    n_words: int


@dataclass(frozen=True)
class PreparedData:
    """fingerprint: SHA-256 over the tokens of every split and the tokenizer; equal where the training data is equal."""

    folder: Path
    meta: dict[str, Any]
    splits: dict[str, TokenSplit]
    vocab_size: int
    end_of_text: int
    tokenizer_file: Path | None
    fingerprint: str

    def summary(self) -> str:
        """A few lines for people: documents, tokens, bytes and bytes per token of each split."""
        lines = [
            f"{self.meta['dataset']} in {self.folder}",
            f"  tokenizer {self.meta['tokenizer']['name']}, {self.vocab_size:,} tokens in the vocabulary, "
            f"fingerprint {self.fingerprint[:12]}",
        ]
        for name, split in self.splits.items():
            lines.append(
                f"  {name:<10} {split.n_documents:>11,} documents {split.n_tokens:>15,} tokens {split.n_bytes:>16,} "
                f"bytes {split.n_bytes / split.n_tokens:6.2f} bytes/token"
            )
        return "\n".join(lines)


def is_prepared(folder: Path) -> bool:
    """Whether this looks like a folder that `prepare` made (whole or damaged)."""
    return (folder / "meta.json").is_file() and any((folder / f"{split}.bin").is_file() for split in SPLITS)


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, after comparing the size of every file with what it says. Raises DamagedError, naming the file."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        files: dict[str, int] = meta["files"]
        version: int = meta["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder / 'meta.json'} cannot be read ({error}): prepare the data again") from error
    if version != FORMAT:
        raise DamagedError(f"{folder} has format {version}, this program reads {FORMAT}: prepare the data again")
    for name, size in files.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual:,} bytes, not {size:,}"
            raise DamagedError(f"{file} {found}: prepare the data again, or copy the folder again")
    return meta


def open_prepared(folder: Path) -> PreparedData:
    """Opens a folder that `prepare` made; raises DamagedError, naming it, for a file missing or of another size."""
    meta = _read_meta(folder)
    splits = {name: _open_split(folder, name, meta) for name in SPLITS if name in meta["splits"]}
    tokenizer_file = folder / "tokenizer.json"
    return PreparedData(
        folder=folder,
        meta=meta,
        splits=splits,
        vocab_size=meta["vocab_size"],
        end_of_text=meta["end_of_text"],
        tokenizer_file=tokenizer_file if tokenizer_file.name in meta["files"] else None,
        fingerprint=meta["fingerprint"],
    )


def _open_split(folder: Path, name: str, meta: dict[str, Any]) -> TokenSplit:
    counts = meta["splits"][name]
    arrays = {kind: np.load(folder / f"{name}.{kind}.npy", mmap_mode="r") for kind in ("starts", "bytes", "words")}
    return TokenSplit(
        tokens=np.memmap(folder / f"{name}.bin", dtype=meta["dtype"], mode="r"),
        document_starts=arrays["starts"],
        document_bytes=arrays["bytes"],
        document_words=arrays["words"],
        n_tokens=counts["tokens"],
        n_documents=counts["documents"],
        n_bytes=counts["bytes"],
        n_words=counts["words"],
    )
