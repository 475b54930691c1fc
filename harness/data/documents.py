"""What a source is to the rest of the package: documents in a fixed order, each in one split, read in blocks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError

SPLITS = ("train", "validation", "test")
EVALUATION_FIRST = ("validation", "test", "train")  # the order of documents: a cap on training leaves the others alone
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_SPLIT_FILE = re.compile(r"([a-z]+)([-_.]?\d[^/]*)?\.[a-z]+")
_HASHES = 2**64


class Document(NamedTuple):
    """One document. Its text comes in blocks, so that a file larger than memory can be a document."""

    split: str
    blocks: Iterable[str]


@dataclass(frozen=True)
class Source:
    """A corpus.

    identity: everything that shapes the text, JSON-able, without paths of this machine.
    documents: yields the documents; the same ones in the same order at every call. Validation and test come before
        training (so a cap on training leaves them alone) except where `identity["streamed"]`: there they are mixed.
    text_bytes: UTF-8 bytes of it all where that is known before reading (for a progress bar).
    """

    identity: dict[str, Any]
    documents: Callable[[], Iterator[Document]]
    text_bytes: int | None = None


@dataclass(frozen=True)
class Carving:
    """Splits that a source lacks, carved from its documents by a seeded hash: equal documents fall into one split."""

    seed: int
    validation_below: int
    test_below: int

    def split(self, content: bytes) -> str:
        """The split of the document that `content` (its text or its name) identifies."""
        value = seeded_hash(self.seed, content)
        return "validation" if value < self.validation_below else "test" if value < self.test_below else "train"


def seeded_hash(seed: int, content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "little")


def carving_by_fraction(seed: int, validation: float, test: float) -> Carving:
    """Fractions hold on average: for sources that cannot be counted first, or whose split must not depend on them."""
    return Carving(seed, int(validation * _HASHES), int((validation + test) * _HASHES))


def carving_by_rank(seed: int, hashes: NDArray[np.uint64], validation: float, test: float) -> Carving:
    """Fractions of the distinct documents, exact but for rounding; at least one document in each split asked for.

    `hashes` are the documents' `seeded_hash` values, which are sorted here. Raises UserError if there are too few of them.
    """
    hashes.sort()  # in place: np.unique takes 56 bytes a document
    ranked = hashes[np.concatenate(([True], hashes[1:] != hashes[:-1]))]
    n_validation = max(1, round(validation * len(ranked))) if validation else 0
    n_test = max(1, round(test * len(ranked))) if test else 0
    if n_validation + n_test >= len(ranked):
        raise UserError(
            f"the source has {len(ranked)} distinct documents, too few for {n_validation} in the validation and "
            f"{n_test} in the test split: add documents, name files train, validation and test, or set "
            "dataset.validation_fraction or dataset.test_fraction to 0"
        )
    return Carving(seed, int(ranked[n_validation]), int(ranked[n_validation + n_test]))


def split_of_name(name: str) -> str | None:
    """The split that a relative path says: `validation-00000-of-00001.parquet`, `a/dev.txt`, `test/b.md`; or None."""
    *folders, file = name.lower().split("/")
    found = _SPLIT_FILE.match(file)
    for word in (found[1] if found else None, *reversed(folders)):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def evaluation_first(documents: Callable[[], Iterator[Document]]) -> Iterator[Document]:
    """The same documents, those for training last (the source is read twice)."""
    for document in documents():
        if document.split != "train":
            yield document
    for document in documents():
        if document.split == "train":
            yield document
