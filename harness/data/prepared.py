"""A tokenised corpus on disk, written as tokens come and opened by memory map: numpy is all that reading it takes.

Folder: SPLIT.bin (tokens, uint16 or uint32), SPLIT.{starts,bytes,words}.npy (int64, per document), tokenizer.json
(absent for plain bytes), meta.json. Nothing in it names a path of the machine that made it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, NewType, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from harness.data.documents import SPLITS
from harness.data.tokenizer import Tokenizer, text_before
from harness.errors import UserError, in_a_line, readable
from harness.files.hashes import value_sha256
from harness.files.untrusted import Unreadable, is_count, read_object, stays_inside

DTYPES = ("<u2", "<u4")
FORMAT = 1  # raised whenever the same source and settings would give other files
_HEADER = b"{'descr': '<i8', 'fortran_order': False, 'shape': ("
_COLUMNS = ("starts", "bytes", "words")
_BLOCK = 1 << 22  # tokens or counts read at once


class DamagedData(UserError):
    """A prepared folder that is not what its meta.json says."""


class Mapped(np.memmap):  # type: ignore[type-arg]
    """A mapped file whose size is looked at before each reading by index: where it was cut, the system would end the process.

    That costs 2 microseconds. A file that was replaced or deleted is read on as it was. Raises DamagedData.
    """

    _opened: BinaryIO | None
    _whole: int

    def __new__(cls, file: Path, **how: Any) -> Mapped:
        opened = file.open("rb")
        self = cast(Mapped, super().__new__(cls, opened, mode="r", **how))  # type: ignore[call-overload]
        self._opened, self._whole = opened, os.fstat(opened.fileno()).st_size
        return self

    def __array_finalize__(self, of: Any) -> None:
        super().__array_finalize__(of)
        self._opened, self._whole = getattr(of, "_opened", None), getattr(of, "_whole", 0)

    def __getitem__(self, index: Any) -> Any:
        if self._opened is not None:
            size = os.fstat(self._opened.fileno()).st_size
            if size < self._whole:
                raise DamagedData(
                    f"{self._opened.name} was cut while it was in use and has {size:,} bytes, not {self._whole:,}: start the "
                    f"same command again, which prepares the data again or says what else to do"
                )
        found = super().__getitem__(index)
        return found.view(np.ndarray) if isinstance(found, Mapped) and found._mmap is None else found  # type: ignore[attr-defined]


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


VerifiedSplit = NewType("VerifiedSplit", TokenSplit)  # what may be scored: see PreparedData.verified


@dataclass(frozen=True)
class PreparedData:
    """fingerprint: see `fingerprint_of`; equal where the data are equal.

    splits: of the sizes that meta.json says. remedy: of damage, None where whoever opened the folder prepares it again.
    """

    folder: Path
    meta: dict[str, Any]
    splits: dict[str, TokenSplit]
    vocab_size: int
    tokenizer_file: Path | None
    fingerprint: str
    remedy: str | None
    _verified: set[str] = field(default_factory=set, repr=False)

    def verified(self, name: str) -> VerifiedSplit:
        """A split to be scored. Whoever asks first has every byte of it read. Raises DamagedData."""
        with _remedied(self._what_to_do):
            _verify_split(self, name)
        return VerifiedSplit(self.splits[name])

    def is_what(self, fingerprint: object) -> bool:
        """Whether whoever recorded this fingerprint learned from these tokens: an older one is of tokens alone."""
        of = self.meta["splits"], self.meta["tokenizer"]["sha256"]
        return fingerprint in (self.fingerprint, fingerprint_of(*of, with_counts=False))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that made the tokens. Raises DamagedData where its file holds another, or none."""
        with _remedied(self._what_to_do):
            return _tokenizer_of(self)

    @property
    def _what_to_do(self) -> str:
        return self.remedy or f"delete {self.folder} to have it prepared again, or copy that folder again"

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


def fingerprint_of(splits: dict[str, Any], tokenizer: str, *, with_counts: bool) -> str:
    """SHA-256 over the hashes of every split's tokens and of the tokenizer.

    with_counts: and of the counts by document, which other texts of the same tokens may have: what a tokenizer makes of
    ligatures, capitals or blanks is the same for several, and figures per byte and word are not.
    """
    of = {"tokens": {name: counts.get("sha256") for name, counts in splits.items()}, "tokenizer": tokenizer}
    return value_sha256(of | ({"counts": {name: each.get("columns") for name, each in splits.items()}} if with_counts else {}))


def is_prepared(folder: Path) -> bool:
    """Whether this looks like a folder that `prepare` made (whole or damaged)."""
    with readable(f"dataset.path={folder}", "make it readable, or name another place"):
        return (
            folder.is_dir()
            and (folder / "meta.json").is_file()
            and any((folder / f"{split}.bin").is_file() for split in SPLITS)
        )


def _read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, after comparing the size of every file with what it says. Raises DamagedData, naming the file."""
    file = folder / "meta.json"
    try:
        meta = read_object(file)
    except PermissionError:  # which is no damage
        raise
    except (OSError, Unreadable) as error:
        raise DamagedData(f"{file} cannot be read ({error})") from error
    if meta.get("format") != FORMAT:
        raise DamagedData(f"{folder} has format {str(meta.get('format'))[:20]}, this program reads {FORMAT}")
    problem = _problem_of(meta)
    if problem is not None:
        raise DamagedData(f"{file} is not what `prepare` writes ({problem})")
    for name, size in meta["files"].items():
        _check_size(folder / name, size)
    return meta


def _problem_of(meta: dict[str, Any]) -> str | None:
    """What is wrong with the form of a meta.json, None if nothing: after this, whatever is read of it is there."""
    forms = {
        "dataset": str,
        "identity": dict,
        "tokenizer": dict,
        "dtype": str,
        "splits": dict,
        "fingerprint": str,
        "files": dict,
    }
    for key, kind in forms.items():
        if not isinstance(meta.get(key), kind):
            return f"no {key}"
    if not all(key in meta["identity"] for key in ("source", "max_tokens", "tokenizer")):
        return "an identity without source, max_tokens or tokenizer"
    if not all(isinstance(meta["tokenizer"].get(key), str) for key in ("sha256", "name")):
        return "a tokenizer without its name or hash"
    for key in ("vocab_size", "end_of_text"):
        if not is_count(meta.get(key)) or meta[key] > 2**32:
            return f"no {key}"
    if meta["end_of_text"] >= meta["vocab_size"]:
        return "an end of text outside the vocabulary"
    if meta["dtype"] not in DTYPES:  # any other, object above all, would make numpy read tokens as something else
        return f"a dtype that is none of {', '.join(DTYPES)}"
    for name, size in meta["files"].items():
        if not stays_inside(name) or not is_count(size):
            return "a file outside its folder, or without a size"
    for split, counts in meta["splits"].items():
        if split not in SPLITS or not isinstance(counts, dict):
            return "a split that does not exist"
        if not all(is_count(counts.get(key)) for key in ("tokens", "documents", "bytes", "words")):
            return f"a count of the {split} split"
        if not isinstance(counts.get("columns", {}), dict):
            return f"hashes of the {split} split"
        if not counts["documents"] or counts["tokens"] < counts["documents"]:
            return f"fewer tokens than documents in the {split} split"
    of = meta["splits"], meta["tokenizer"]["sha256"]
    if meta["fingerprint"] not in [fingerprint_of(*of, with_counts=with_counts) for with_counts in (False, True)]:
        return "a fingerprint of other hashes"
    return None


def _check_size(file: Path, size: int) -> None:
    actual = None
    if file.is_file():
        with file.open("rb") as opened:  # a file that may not be read is found here
            actual = os.fstat(opened.fileno()).st_size
    if actual != size:
        found = "is missing" if actual is None else f"has {actual:,} bytes, not {size:,}"
        raise DamagedData(f"{file} {found}")


@contextlib.contextmanager
def _remedied(remedy: str | None) -> Iterator[None]:
    """Damage that is found inside is said with what to do about it."""
    try:
        yield
    except DamagedData as error:
        raise (DamagedData(f"{error}: {remedy}") if remedy else error) from error.__cause__


def open_prepared(folder: Path, remedy: str | None = None) -> PreparedData:
    """Opens a folder that `prepare` made; raises DamagedData, naming it, for a file missing or of another size.

    Sizes alone are checked, in headers and counts too; `verify_prepared` reads everything. remedy: see PreparedData. Raises
    UserError, which is no damage, for a file that may not be read.
    """
    with _remedied(remedy), readable(str(folder), "make it readable"):
        meta = _read_meta(folder)
        splits = {name: _open_split(folder, name, meta) for name in SPLITS if name in meta["splits"]}
    tokenizer_file = folder / "tokenizer.json"
    return PreparedData(
        folder=folder,
        meta=meta,
        splits=splits,
        vocab_size=meta["vocab_size"],
        tokenizer_file=tokenizer_file if tokenizer_file.name in meta["files"] else None,
        fingerprint=meta["fingerprint"],
        remedy=remedy,
    )


def verify_prepared(prepared: PreparedData) -> None:
    """Reads every file of an open folder, a block at a time. Raises DamagedData, naming the first that is not whole.

    Tokens must have the hash of meta.json and lie in the vocabulary; a document must end where the next one begins; counts
    by document must have their hashes (older folders have none: their sums alone tell); the tokenizer must be the one that
    made them.
    """
    with _remedied(prepared.remedy):
        _tokenizer_of(prepared)
        for name in prepared.splits:
            _verify_split(prepared, name)


def _tokenizer_of(prepared: PreparedData) -> Tokenizer:
    file = prepared.folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.load(prepared.tokenizer_file)
    except UserError as error:
        raise DamagedData(f"{file} holds no tokenizer") from error
    made_by = (prepared.meta["tokenizer"]["sha256"], prepared.vocab_size, prepared.meta["end_of_text"])
    if (tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text) != made_by:
        raise DamagedData(f"{file} is not the tokenizer that meta.json says")
    return tokenizer


def _verify_split(prepared: PreparedData, name: str) -> None:
    """Once of one split's files."""
    if name in prepared._verified:
        return
    split, counts, file = prepared.splits[name], prepared.meta["splits"][name], prepared.folder / f"{name}.bin"
    digest, largest = hashlib.sha256(), 0
    count = -(-split.n_tokens // _BLOCK)
    # About a second a GB, at every start of a training: a bar where that takes longer than one waits for.
    for block in tqdm(_blocks(split.tokens), f"{file.name} is read whole", count, delay=5, leave=False, disable=None):
        digest.update(block.data)
        largest = max(largest, int(block.max()))
    if digest.hexdigest() != counts.get("sha256"):
        raise DamagedData(f"{file} has other content than meta.json says")
    if largest >= prepared.vocab_size:
        raise DamagedData(f"{file} holds a token outside the vocabulary")
    starts, columns = split.document_starts, (split.document_starts, split.document_bytes, split.document_words)
    fits = (
        starts[0] == 0 and starts[-1] == split.n_tokens and bool((np.diff(starts) > 0).all()),
        bool((split.document_bytes >= 0).all()) and int(split.document_bytes.sum()) == split.n_bytes,
        bool((split.document_words >= 0).all()) and int(split.document_words.sum()) == split.n_words,
    )
    hashes = counts.get("columns")
    for kind, column, column_fits in zip(_COLUMNS, columns, fits, strict=True):
        if not column_fits or (hashes is not None and hashes.get(kind) != _sha256(column)):
            raise DamagedData(f"{prepared.folder / f'{name}.{kind}.npy'} has other content than meta.json says")
    prepared._verified.add(name)


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (array[start : start + _BLOCK] for start in range(0, len(array), _BLOCK))


def _sha256(array: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for block in _blocks(array):
        digest.update(block.data)
    return digest.hexdigest()


def _open_split(folder: Path, name: str, meta: dict[str, Any]) -> TokenSplit:
    counts = meta["splits"][name]
    dtype, n_documents = np.dtype(meta["dtype"]), counts["documents"]
    file = folder / f"{name}.bin"
    _check_size(file, dtype.itemsize * counts["tokens"])
    split = TokenSplit(
        tokens=Mapped(file, dtype=dtype),
        document_starts=_open_array(folder / f"{name}.starts.npy", n_documents + 1),
        document_bytes=_open_array(folder / f"{name}.bytes.npy", n_documents),
        document_words=_open_array(folder / f"{name}.words.npy", n_documents),
        n_tokens=counts["tokens"],
        n_documents=n_documents,
        n_bytes=counts["bytes"],
        n_words=counts["words"],
    )
    if split.document_starts[0] != 0 or split.document_starts[-1] != split.n_tokens:
        raise DamagedData(f"{folder / f'{name}.starts.npy'} does not fit {file.name}")
    return split


def _open_array(file: Path, length: int) -> NDArray[np.int64]:
    """A memory-mapped int64 array of this length: mapped, so that a header neither unpickles nor allocates anything."""
    try:
        with file.open("rb") as opened:
            start = opened.read(128)
        if not start.startswith(b"\x93NUMPY\x01\x00") or _HEADER not in start:  # else numpy reads any dtype at all
            raise Unreadable("it does not begin as an array of int64")
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # of wrong headers numpy raises a dozen kinds, the tokenizer's of Python among them
            raise Unreadable(in_a_line(error)) from error
    except (OSError, Unreadable) as error:
        raise DamagedData(f"{file} cannot be read ({error})") from error
    if array.dtype != np.dtype("<i8") or array.shape != (length,):
        raise DamagedData(f"{file} is not {length:,} whole numbers")
    return array


class Piece(NamedTuple):
    split: str
    text: str
    n_bytes: int
    last: bool  # ends its document


class SplitWriter:
    """Appends the tokens of one split to its file as they come, and counts: memory holds no text and no document.

    `room`: tokens that the split may have (None: any)."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], tokenizer: Tokenizer, room: int | None) -> None:
        self.full = False
        self._folder, self._split, self._dtype, self._tokenizer, self._room = folder, split, dtype, tokenizer, room
        self._file = (folder / f"{split}.bin").open("wb")
        self._digest = hashlib.sha256()
        self._n_tokens = 0
        self._columns = {kind: _Column(folder / f"{split}.{kind}.npy") for kind in _COLUMNS}
        self._starts, self._bytes, self._words = self._columns.values()
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
        _close(self._file)
        for column in self._columns.values():
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
            "columns": {kind: column.digest.hexdigest() for kind, column in self._columns.items()},
        }


class _Column:
    """An array of int64 in a .npy file that is written value by value. `n` values so far, their `total` and SHA-256."""

    def __init__(self, path: Path) -> None:
        self.n = self.total = 0
        self.digest = hashlib.sha256()
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        """NumPy pads a header so that it keeps its length while the first axis grows: it is written again over itself."""
        self._file.seek(0)
        header = {"descr": np.dtype(np.int64).str, "fortran_order": False, "shape": (self.n,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, value: int) -> None:
        data = value.to_bytes(8, sys.byteorder)
        self._file.write(data)
        self.digest.update(data)
        self.n += 1
        self.total += value

    def close(self) -> None:
        self._write_header()
        _close(self._file)


def _close(file: IO[Any]) -> None:
    """Once all of it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
