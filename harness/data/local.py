"""The user's own text: a file, a folder or a glob of .txt, .md, .jsonl and .parquet files."""

from __future__ import annotations

import codecs
import functools
import glob
import hashlib
import json
import mmap
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.data.documents import (
    Carving,
    Document,
    Source,
    carving_by_rank,
    evaluation_first,
    seeded_hash,
    split_of_name,
)
from harness.data.parquet import read_parquet
from harness.errors import UserError
from harness.schema import DatasetConfig

_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
_BLOCK = 1 << 20  # bytes of a text file decoded at once
_LINE_SEARCH = 1 << 16  # bytes in which a line end is sought when one document is cut into splits


class _File(NamedTuple):
    path: Path
    name: str  # relative to what the user named, so the same on every machine
    split: str | None  # what the name says
    sha256: str

    @property
    def is_text(self) -> bool:
        return self.path.suffix in (".txt", ".md")


def local_source(dataset: DatasetConfig, *, for_training: bool) -> Source:
    """A .txt or .md file is one document, so is a line of .jsonl and a row of .parquet (dataset.text_column).

    Files named for a split (train.txt, validation-0.parquet, test/a.md) make the splits, and then the other files are
    left out; missing splits are carved from the training documents, if any, by a seeded hash. A single document is cut
    by position. The files are read once to find their identity, which holds no path of this machine. Raises UserError
    for files without text, and for_training for files named for splits of which none is train.
    """
    files = _find(dataset)
    if any(file.split for file in files):
        files = _only_named(files, dataset, for_training=for_training)
    given = {file.split for file in files}
    validation = 0.0 if "validation" in given else dataset.validation_fraction
    test = 0.0 if "test" in given else dataset.test_fraction
    training_files = [file for file in files if file.split in (None, "train")]
    listing = "\n".join(f"{file.sha256} {file.name}" for file in files)
    identity = {
        "source": "local",
        "files": len(files),
        "content": hashlib.sha256(listing.encode()).hexdigest(),
        "text_column": dataset.text_column,
        "validation_fraction": validation,
        "test_fraction": test,
        "split_seed": dataset.split_seed,
    }

    @functools.cache
    def carving() -> Carving | None:
        """How the training documents are split; None: there is one, which has to be cut by position."""
        if not validation and not test:
            return Carving(dataset.split_seed, 0, 0)
        contents = (content for file in training_files for content, _ in _documents(file, dataset))
        hashes = np.fromiter((seeded_hash(dataset.split_seed, content) for content in contents), dtype=np.uint64)
        if not len(hashes):
            return Carving(dataset.split_seed, 0, 0)
        if len(hashes) == 1:
            print(f"{dataset.name}: a single document, cut by position into its splits", file=sys.stderr)
            return None
        return carving_by_rank(dataset.split_seed, hashes, validation, test)

    def training() -> Iterator[Document]:
        split = carving()
        for file in training_files:
            for content, blocks in _documents(file, dataset):
                if split is None:
                    yield from _cut_by_position(file, content, validation, test)
                else:
                    yield Document(split.split(content), blocks)

    def documents() -> Iterator[Document]:
        for file in files:
            if file.split in ("validation", "test"):
                yield from (Document(file.split, blocks) for _, blocks in _documents(file, dataset))
        yield from evaluation_first(training) if validation or test else training()

    def some_documents() -> Iterator[Document]:
        found = documents()
        first = next(found, None)
        if first is None:
            raise UserError(f"dataset.path={dataset.path} holds no text: name a file or a folder that does")
        yield first
        yield from found

    return Source(identity, some_documents, sum(file.path.stat().st_size for file in files))


def _find(dataset: DatasetConfig) -> list[_File]:
    """The files that dataset.path names, hashed, in the order of their names."""
    assert dataset.path is not None
    path = Path(dataset.path).expanduser()
    if path.is_file():
        root, paths = path.parent, [path]
    elif path.is_dir():
        root, paths = path, [found for found in path.rglob("*") if found.is_file()]
    else:
        paths = [Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file()]
        root = Path(os.path.commonpath([found.parent for found in paths])) if paths else path
    names = {found.relative_to(root).as_posix(): found for found in paths}
    wanted = {
        name: found
        for name, found in sorted(names.items())
        if found.suffix in _SUFFIXES and not any(part.startswith(".") for part in name.split("/"))
    }
    if not wanted:
        found = f"has no {', '.join(_SUFFIXES)} file" if paths or path.is_dir() else "does not exist"
        raise UserError(f"dataset.path={dataset.path} {found}: name a file, a folder or a quoted glob of such files")
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256, wanted.values()))
    for name, sha256 in zip(wanted, hashes, strict=True):
        if dataset.sha256.get(name, sha256) != sha256:
            raise UserError(f"{wanted[name]} is not the file that dataset.sha256 names: restore it or correct the hash")
    return [
        _File(found, name, split_of_name(name), sha256)
        for (name, found), sha256 in zip(wanted.items(), hashes, strict=True)
    ]


def _only_named(files: list[_File], dataset: DatasetConfig, *, for_training: bool) -> list[_File]:
    named = [file for file in files if file.split]
    splits = sorted({str(file.split) for file in named})
    if for_training and "train" not in splits:
        raise UserError(
            f"dataset.path={dataset.path} has files named for {' and '.join(splits)}, but none for train: add one, or "
            "rename them so that their names say no split"
        )
    if others := [file.name for file in files if not file.split]:
        listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        print(f"{dataset.name}: left out, since their names say no split: {listed}", file=sys.stderr)
    return named


def _documents(file: _File, dataset: DatasetConfig) -> Iterator[tuple[bytes, Iterable[str]]]:
    """What identifies each document of a file, and its text in blocks. Those without text are left out."""
    if file.is_text:
        if not _is_blank(file.path):
            yield file.sha256.encode(), _text_blocks(file.path, 0, file.path.stat().st_size)
        return
    rows = _json_rows(file.path) if file.path.suffix == ".jsonl" else _parquet_rows(file.path, dataset.text_column)
    for place, row in rows:
        text = row.get(dataset.text_column)
        if text is None and dataset.text_column in row:
            continue
        if not isinstance(text, str):
            raise UserError(
                f"{place} has no text in {dataset.text_column!r} (its fields: {', '.join(map(str, row))}): set "
                "dataset.text_column to the field that holds it"
            )
        if text.strip():
            yield text.encode("utf-8", errors="surrogatepass"), (text,)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else error
                raise UserError(f"{path}:{number} is not a line of JSON in UTF-8 ({reason}): correct it") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} is not a JSON object: each line must be one")
            yield f"{path}:{number}", row


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(read_parquet(path, [column])):
        yield f"{path} (row {number})", row


def _text_blocks(path: Path, start: int, stop: int) -> Iterator[str]:
    """The text in bytes start:stop of a file, a block at a time; raises UserError if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        if start == 0 and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:
            start = len(codecs.BOM_UTF8)
        file.seek(start)
        while start < stop:
            block = file.read(min(_BLOCK, stop - start))
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=start + len(block) >= stop)
            except UnicodeDecodeError as error:
                place = start - pending + error.start
                raise UserError(
                    f"{path} is not UTF-8 (byte {place}): convert it, for instance with "
                    f"`iconv -f latin1 -t utf-8`, or leave it out"
                ) from error
            start += len(block)


def _is_blank(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(block.strip() for block in iter(functools.partial(file.read, _BLOCK), b""))


def _cut_by_position(file: _File, content: bytes, validation: float, test: float) -> Iterator[Document]:
    """One document as contiguous parts: training first, then validation, then test, cut at line ends."""
    if not file.is_text:
        for split, start, stop in _parts(content, file, validation, test):
            yield Document(split, (content[start:stop].decode("utf-8", errors="surrogatepass"),))
        return
    with file.path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        parts = _parts(data, file, validation, test)
    for split, start, stop in parts:
        yield Document(split, _text_blocks(file.path, start, stop))


def _parts(data: bytes | mmap.mmap, file: _File, validation: float, test: float) -> list[tuple[str, int, int]]:
    size = len(data)
    first = _line_end(data, round(size * (1 - validation - test)))
    second = _line_end(data, round(size * (1 - test)))
    cuts = [("train", 0, first), ("validation", first, second), ("test", second, size)]
    parts = [part for part, fraction in zip(cuts, (1.0, validation, test), strict=True) if fraction]
    for split, start, stop in parts:
        if not data[start : min(stop, start + _BLOCK)].strip():
            raise UserError(
                f"{file.path} is one document too short to give a {split} part: add text, or raise "
                "dataset.validation_fraction and dataset.test_fraction"
            )
    return parts


def _line_end(data: bytes | mmap.mmap, place: int) -> int:
    """The first place from `place` on after a line end, or, in a very long line, between two characters."""
    found = data.find(b"\n", max(place - 1, 0), place + _LINE_SEARCH)
    if found >= 0:
        return found + 1
    while place < len(data) and data[place] & 0xC0 == 0x80:
        place += 1
    return place


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
