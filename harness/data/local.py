"""The user's own text: a file, a folder or a glob of .txt, .md, .jsonl and .parquet files, packed or not."""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.config.schema import DatasetConfig
from harness.data import encoding
from harness.data.corpus_files import BLOCK, CorpusFile, Found, check_majority, find, lines, listing, opened
from harness.data.documents import Carving, Document, Source, carving_by_rank, evaluation_first, seeded_hash, split_of_name
from harness.data.parquet import MOST_VALUE, read_parquet
from harness.errors import UserError, readable, tell
from harness.files.text import plural

_LINE_SEARCH = 1 << 16  # bytes in which a line end is sought when one document is cut into splits
_NUL = "a character NUL (U+0000), which no text has"


def local_source(dataset: DatasetConfig, *, for_training: bool) -> Source:
    """A .txt or .md file is one document, so is a line of .jsonl and a row of .parquet (dataset.text_column).

    Files named for a split (train.txt, validation-0.parquet, test/a.md) make the splits, and then the other files are
    left out; missing splits are carved from the training documents, if any, by a seeded hash. A single document is cut
    by position. What is left out is said. The files are read once to find their identity, which holds no path of this
    machine, and must not change until they have been read for the last time. Raises UserError for files without text, for
    a folder of which more is left out than read, and for_training for files named for splits of which none is train.
    """
    assert dataset.path is not None
    found = find(dataset.path)
    if any(map(split_of_name, found.paths)):
        _keep_only_named(found, dataset, for_training=for_training)
    if found.left_out:
        with readable(f"dataset.path={dataset.path}", "make it readable"):
            check_majority(found, dataset.path)
        count = f"{len(found.paths):,} {plural(len(found.paths), 'file')}"
        tell(f"{dataset.name}: {count} read, {len(found.left_out):,} left out: {found.said()}")
    files = _hashed(found, dataset)
    given = {split_of_name(file.name) for file in files}
    validation = 0.0 if "validation" in given else dataset.validation_fraction
    test = 0.0 if "test" in given else dataset.test_fraction
    training_files = [file for file in files if split_of_name(file.name) in (None, "train")]
    identity = {
        "source": "local",
        "files": len(files),
        "content": listing(files),
        "text_column": dataset.text_column,
        "validation_fraction": validation,
        "test_fraction": test,
        "split_seed": dataset.split_seed,
    }

    documents = _Documents(dataset, files, training_files, validation, test).in_order
    packed = any(file.compression for file in files)
    return Source(identity, documents, None if packed else sum(file.state.size for file in files))


@dataclass(frozen=True)
class _Documents:
    """Those of some files, each with its split."""

    dataset: DatasetConfig
    files: list[CorpusFile]
    training_files: list[CorpusFile]
    validation: float  # share of the training documents
    test: float

    @functools.cached_property
    def carving(self) -> Carving | None:
        """How the training documents are split; None: there is one, which has to be cut by position."""
        seed = self.dataset.split_seed
        if not self.validation and not self.test:
            return Carving(seed, 0, 0)
        contents = (content for file in self.training_files for content, _ in _documents(file, self.dataset))
        hashes = np.fromiter((seeded_hash(seed, content) for content in contents), dtype=np.uint64)
        if not len(hashes):
            return Carving(seed, 0, 0)
        if len(hashes) == 1:
            tell(f"{self.dataset.name}: a single document, cut by position into its splits")
            return None
        return carving_by_rank(seed, hashes, self.validation, self.test)

    def training(self) -> Iterator[Document]:
        for file in self.training_files:
            for content, blocks in _documents(file, self.dataset):
                if self.carving is None:
                    yield from _cut_by_position(file, content, self.validation, self.test)
                else:
                    yield Document(self.carving.split(content), blocks)

    def in_order(self) -> Iterator[Document]:
        """What is evaluated comes first. Raises UserError where there is no text."""
        named = (
            Document(split, blocks)
            for file in self.files
            if (split := split_of_name(file.name)) in ("validation", "test")
            for _, blocks in _documents(file, self.dataset)
        )
        carved = evaluation_first(self.training) if self.validation or self.test else self.training()
        found = itertools.chain(named, carved)
        first = next(found, None)
        if first is None:
            raise UserError(f"dataset.path={self.dataset.path} holds no text: name a file or a folder that does")
        yield first
        yield from found


def _keep_only_named(found: Found, dataset: DatasetConfig, *, for_training: bool) -> None:
    splits = sorted({split for name in found.paths if (split := split_of_name(name))})
    if for_training and "train" not in splits:
        raise UserError(
            f"dataset.path={dataset.path} has files named for {' and '.join(splits)}, but none for train: add one, or "
            "rename them so that their names say no split"
        )
    for name in [name for name in found.paths if split_of_name(name) is None]:
        found.leave_out(name, "its name says no split, others' do", size=found.paths.pop(name).stat().st_size)


def _hashed(found: Found, dataset: DatasetConfig) -> list[CorpusFile]:
    with ThreadPoolExecutor() as pool:
        files = list(pool.map(lambda one: opened(one[1], one[0]), found.paths.items()))
    for file in files:
        if dataset.sha256.get(file.name, file.sha256) != file.sha256:
            raise UserError(f"{file.path} is not the file that dataset.sha256 names: restore it or correct the hash")
    return files


def _documents(file: CorpusFile, dataset: DatasetConfig) -> Iterator[tuple[bytes, Iterable[str]]]:
    """What identifies each document of a file, and its text in blocks. Those without text are left out."""
    if file.kind == "text":
        if any(block.strip() for block in file.blocks()):
            yield _identity(file), _text_blocks(file)
        return
    rows = _json_texts if file.kind == "jsonl" else _parquet_texts
    for place, text in rows(file, dataset.text_column):
        if text.strip():
            if "\0" in text:
                raise UserError(f"{place} holds {_NUL}: take it out, or leave the document out")
            try:
                content = text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{place} holds half of a surrogate pair, which is no text: correct it") from error
            yield content, (text,)


def _identity(file: CorpusFile) -> bytes:
    """The same for equal texts, packed or not."""
    if file.compression is None:
        return file.sha256.encode()
    digest = hashlib.sha256()
    for block in file.blocks():
        digest.update(block)
    return digest.hexdigest().encode()


def _parquet_texts(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    file.check()
    for number, text in enumerate(read_parquet(file.path, column)):
        if text is not None:
            yield f"{file.path} (row {number})", text
    file.check()


def _json_texts(file: CorpusFile, column: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(lines(file, MOST_VALUE), start=1):
        place = f"{file.path}:{number}"
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            advice = encoding.advice(file.path, _head(file), line, file.compression)
            raise UserError(f"{place} is not UTF-8 (byte {error.start} of the line); {advice}") from error
        except (ValueError, RecursionError) as error:
            if b"\0" in line:
                raise UserError(f"{place} holds {_NUL}; {_advice_on_nul(file)}") from error
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{place} is not a line of JSON in UTF-8 ({reason}): correct it") from error
        if not isinstance(row, dict):
            raise UserError(f"{place} is not a JSON object: each line must be one")
        there, text = _field(row, column)
        if there and text is None:
            continue
        if not isinstance(text, str):
            instead = f", but {_WORDS[type(text)]}" if there else ""
            fields = ", ".join(_field_names(row))[:500]
            raise UserError(
                f"{place} has no text in {column!r}{instead} (its fields: {fields}): set dataset.text_column to the field "
                f"that holds it"
            )
        yield place, text


_WORDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _field(row: Mapping[str, Any], column: str) -> tuple[bool, Any]:
    """Whether a row has a field, and its value. `a.b` is b of the object a, unless a field has that very name."""
    if column in row:
        return True, row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _field_names(row: Mapping[str, Any]) -> Iterator[str]:
    for name, value in row.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) else (name,)


def _head(file: CorpusFile) -> bytes:
    return next(file.blocks(), b"")[:4096]


def _text_blocks(file: CorpusFile, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The text in bytes start:stop of a file, a block at a time; raises UserError if it is not UTF-8, or has a NUL."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    place, waiting = start, b""
    for block in file.blocks(start, stop):
        if place == 0:
            place = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
            block = block[place:]
        pending = decoder.getstate()[0]
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise _not_utf8(
                file, place - len(pending) + error.start, (pending + block)[max(0, error.start - BLOCK // 32) :]
            ) from error
        if "\0" in text:
            at = place - len(pending) + len(text[: text.index("\0")].encode())
            raise UserError(f"{file.path} has at byte {at} {_NUL}; {_advice_on_nul(file)}")
        yield text
        place += len(block)
    if waiting := decoder.getstate()[0]:
        raise _not_utf8(file, place - len(waiting), waiting)


def _advice_on_nul(file: CorpusFile) -> str:
    """For text of another encoding, a file of another kind, or text that was made badly."""
    head = _head(file)
    if encoding.packed_as(head) is None and encoding.shown_encoding(head, head) is None:
        return "take it out, or leave the file out"
    return encoding.advice(file.path, head, head, file.compression)


def _not_utf8(file: CorpusFile, place: int, around: bytes) -> UserError:
    advice = encoding.advice(file.path, _head(file), around, file.compression)
    return UserError(f"{file.path} is not UTF-8 (byte {place}); {advice}")


def _cut_by_position(file: CorpusFile, content: bytes, validation: float, test: float) -> Iterator[Document]:
    """One document as contiguous parts: training first, then validation, then test, cut at line ends."""
    if file.kind != "text":
        for split, start, stop in _parts(file, len(content), lambda a, b: content[a:b], validation, test):
            yield Document(split, (content[start:stop].decode("utf-8"),))
        return
    size = sum(len(block) for block in file.blocks()) if file.compression else file.state.size
    for split, start, stop in _parts(file, size, lambda a, b: b"".join(file.blocks(a, b)), validation, test):
        yield Document(split, _text_blocks(file, start, stop))


def _parts(
    file: CorpusFile, size: int, read: Callable[[int, int], bytes], validation: float, test: float
) -> list[tuple[str, int, int]]:
    """read: the bytes from one place to another."""
    first = _line_end(read, size, round(size * (1 - validation - test)))
    second = _line_end(read, size, round(size * (1 - test)))
    cuts = [("train", 0, first), ("validation", first, second), ("test", second, size)]
    parts = [part for part, fraction in zip(cuts, (1.0, validation, test), strict=True) if fraction]
    for split, start, stop in parts:
        if not read(start, min(stop, start + BLOCK)).strip():
            raise UserError(
                f"{file.path} is one document too short to give a {split} part: add text, or raise "
                "dataset.validation_fraction and dataset.test_fraction"
            )
    return parts


def _line_end(read: Callable[[int, int], bytes], size: int, place: int) -> int:
    """The first place from `place` on after a line end, or, in a very long line, between two characters."""
    start = max(place - 1, 0)
    data = read(start, min(place + _LINE_SEARCH, size))
    found = data.find(b"\n")
    if found >= 0:
        return start + found + 1
    while place - start < len(data) and data[place - start] & 0xC0 == 0x80:
        place += 1
    return place
