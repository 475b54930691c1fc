"""From documents to token files: trains the tokenizer, encodes in bounded memory, publishes all in one rename."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.data.documents import SPLITS, Source
from harness.data.hub_client import is_model_name, pretrained_tokenizer
from harness.data.prepared import (
    FORMAT,
    DamagedData,
    Piece,
    PreparedData,
    SplitWriter,
    fingerprint_of,
    is_prepared,
    open_prepared,
    verify_prepared,
)
from harness.data.sources import SOURCES, Opening, check_corpus, open_source
from harness.data.tokenizer import Tokenizer
from harness.errors import UserError, readable, tell, writable
from harness.files.atomic import DISK_ERRORS, flush
from harness.files.folders import remove
from harness.files.hashes import value_sha256
from harness.files.lock import locked
from harness.files.untrusted import Unreadable, read_object

_BATCH = 1_000_000  # characters encoded at once; the encodings take forty times as much memory
_BPE_BYTES = 100_000_000  # a BPE is trained on the first so many bytes of the training split
_BPE_LEAST_BYTES = 1_000_000
_ELSEWHERE = "choose another folder"


def prepare(
    dataset: DatasetConfig,
    tokenizer: TokenizerConfig,
    data_dir: Path,
    *,
    tokenizer_file: Path | None = None,
    for_training: bool = True,
    progress: bool = True,
    verify: bool = False,
) -> PreparedData:
    """Opens data_dir/<dataset name>-<key>, building it first if it is absent or damaged.

    The key hashes everything that shapes the bytes: the source's identity, max_tokens, the tokenizer's settings.
    A dataset.path that names a prepared folder, from this machine or another, opens that folder. `tokenizer_file` (a
    tokenizer.json) takes the place of what `tokenizer` asks for; where that made the very same tokenizer, its folder
    serves. Training needs a training split and every split that the fractions ask for; an evaluation (for_training
    false, or a tokenizer_file, which is a trained run's own) takes the splits that are there. Safe against being killed
    and against other processes that prepare the same data. Of a folder that is there the sizes are checked, and with
    `verify`, or where a preparation of it was killed, every byte: one that is not whole is built again, or, where
    dataset.path names it, refused. Raises UserError (HubUnreachable where the source is out of reach).
    """
    how = Opening(data_dir, for_training and tokenizer_file is None, progress)
    check_corpus(dataset, tokenizer, has_file=tokenizer_file is not None)
    settings = _tokenizer_settings(tokenizer, has_file=tokenizer_file is not None)
    replaced = Tokenizer.load(tokenizer_file).sha256 if tokenizer_file else None
    if dataset.path is not None and is_prepared(Path(dataset.path)):
        prepared = _open_copy(Path(dataset.path), dataset, settings, replaced, how, verify)
    else:
        prepared = _Preparation(dataset, tokenizer, tokenizer_file, how).open_or_build(settings, replaced, verify)
    if how.for_training and "train" not in prepared.splits:  # an evaluation made the folder
        raise _nothing_to_train_on(dataset)
    return prepared


def prepared_as(fingerprint: str, data_dir: Path, *, tokenizer: str, verify: bool = False) -> PreparedData | None:
    """The prepared data in data_dir of this fingerprint and this tokenizer's SHA-256, whatever made it; None: there is none.

    Raises UserError where data_dir may not be listed, and DamagedData where that data is not whole.
    """
    with readable(f"data_dir={data_dir}", "make it readable, or name another"):
        try:
            folders = sorted(path for path in data_dir.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return None
    for folder in folders:
        found = None
        with contextlib.suppress(OSError, Unreadable):  # whatever else lies there
            found = read_object(folder / "meta.json").get("fingerprint")
        if found == fingerprint:
            remedy = f"copy {folder} again, or delete it and name the text with dataset.path=..."
            if (prepared := _open(folder, verify, remedy)).meta["tokenizer"]["sha256"] == tokenizer:
                return prepared
    return None


def _open(folder: Path, verify: bool, remedy: str | None = None) -> PreparedData:
    """An existing folder, read to its end if that is asked for or if somebody was killed while preparing it."""
    prepared = open_prepared(folder, remedy)
    leftovers = list(folder.parent.glob(_leftovers(folder)))
    if verify or leftovers:
        verify_prepared(prepared)
        for leftover in leftovers:  # nobody builds what is whole
            with contextlib.suppress(OSError):
                remove(leftover)
    return prepared


def _open_own(folder: Path, verify: bool) -> PreparedData:
    """The same of a folder that this module has named. Raises DamagedData for what was made of something else."""
    meta = (prepared := _open(folder, verify)).meta
    if _folder_name(meta["dataset"], meta["identity"]) != folder.name:
        raise DamagedData(f"{folder / 'meta.json'} says of what {meta['dataset']} was made, and that has another folder")
    return prepared


def _leftovers(folder: Path) -> str:
    """What the temporary paths are called at which this folder is made."""
    return f".{folder.name}.*.partial"


def _folder_name(name: str, identity: dict[str, Any]) -> str:
    return f"{name}-{value_sha256({'format': FORMAT, **identity})[:12]}"


def _tokenizer_settings(tokenizer: TokenizerConfig, *, has_file: bool) -> dict[str, Any]:
    """What shapes the tokens, known without training or fetching a tokenizer.

    has_file: a file takes the tokenizer's place, and tokenizer.path, which may be that of another machine, is but a word.
    """
    if tokenizer.name == "bpe":
        return {"bpe": tokenizer.vocab_size}
    if tokenizer.name == "bytes":
        return {"bytes": 256}
    if has_file:
        return {"pretrained": tokenizer.path}
    assert tokenizer.path is not None
    file = local_tokenizer(tokenizer.path)
    return {"file": Tokenizer.load(file).sha256} if file else {"pretrained": tokenizer.path}


def local_tokenizer(path: str) -> Path | None:
    """The tokenizer.json that a path of this machine names; None if it is a name on the hub."""
    place = Path(os.path.expanduser(path))
    with readable(f"tokenizer.path={path}", "make it readable, or name another"):
        if place.exists():
            return place / "tokenizer.json" if place.is_dir() else place
    if path.endswith(".json") or not is_model_name(path):
        raise UserError(f"tokenizer.path={path} does not exist: name a tokenizer.json, its folder, or a hub name")
    return None


def _open_copy(
    folder: Path, dataset: DatasetConfig, settings: dict[str, Any], replaced: str | None, how: Opening, verify: bool
) -> PreparedData:
    """Opens the prepared folder that dataset.path names, if it holds what the other settings ask for."""
    prepared = open_prepared(folder, f"copy {folder} again from where it is whole, or have dataset.path name the text itself")
    if verify:
        verify_prepared(prepared)
    asked = {"dataset": dataset.name, "max_tokens": dataset.max_tokens, "tokenizer": settings}
    held = {"dataset": prepared.meta["dataset"], **prepared.meta["identity"]}
    if replaced is not None:
        asked["tokenizer"], held["tokenizer"] = replaced, prepared.meta["tokenizer"]["sha256"]
    if SOURCES[dataset.source].is_pinned:
        asked["source"] = open_source(dataclasses.replace(dataset, path=None), how).identity
    for field, value in asked.items():
        if held[field] != value:
            raise UserError(
                f"dataset.path={folder} was prepared with {field} {held[field]}, not {value}: change one of the two"
            )
    return prepared


@dataclasses.dataclass(frozen=True)
class _Preparation:
    """A folder of data_dir that is opened, or made: what it is made of, and how."""

    dataset: DatasetConfig
    tokenizer: TokenizerConfig
    tokenizer_file: Path | None
    how: Opening

    def open_or_build(self, settings: dict[str, Any], replaced: str | None, verify: bool) -> PreparedData:
        """settings: what shapes the tokens; replaced: the SHA-256 of the tokenizer_file."""
        data_dir, name = self.how.data_dir, self.dataset.name
        source = open_source(self.dataset, self.how)
        identity = {"source": source.identity, "max_tokens": self.dataset.max_tokens, "tokenizer": settings}
        folder = data_dir / _folder_name(name, identity)
        if replaced is not None:
            with contextlib.suppress(DamagedData):
                if (prepared := _open_own(folder, verify)).meta["tokenizer"]["sha256"] == replaced:
                    return prepared
            identity["tokenizer"] = {"file": replaced}
            folder = data_dir / _folder_name(name, identity)
        # A whole folder is opened without the lock, since its disk may be read-only; all else happens under the lock.
        with contextlib.suppress(DamagedData):
            return _open_own(folder, verify)
        with writable(f"data_dir={data_dir}", _ELSEWHERE):
            data_dir.mkdir(parents=True, exist_ok=True)
        with _lock(data_dir / f".{folder.name}.lock"):
            if folder.is_dir():
                try:
                    return _open_own(folder, verify)
                except DamagedData as error:
                    tell(f"{error}. Preparing it again.")
            self._build(folder, source, identity)
        return open_prepared(folder)

    def _build(self, folder: Path, source: Source, identity: dict[str, Any]) -> None:
        """Fills a folder at a temporary path and renames it. The lock is held: what an earlier attempt left is nobody's."""
        leftovers = _leftovers(folder)
        partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
        with writable(f"data_dir={folder.parent}", _ELSEWHERE):
            for leftover in folder.parent.glob(leftovers):
                remove(leftover)
            partial.mkdir()
        try:
            with writable(f"data_dir={folder.parent}", f"make room, or {_ELSEWHERE}", only=DISK_ERRORS):
                self._write(partial, source, identity)
                if os.path.lexists(folder):  # damaged, or it had been opened; a link may lead nowhere
                    os.replace(folder, folder.parent / f".{folder.name}.damaged.partial")
                os.replace(partial, folder)
                flush(folder.parent)
        finally:
            for leftover in folder.parent.glob(leftovers):
                with contextlib.suppress(OSError):
                    remove(leftover)

    def _write(self, folder: Path, source: Source, identity: dict[str, Any]) -> None:
        """All files of the folder, flushed to the disk."""
        dataset = self.dataset
        tokenizer, origin = self._make_tokenizer(source)
        if (tokenizer_copy := tokenizer.save(folder)) is not None:
            flush(tokenizer_copy)
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        writers = {
            split: SplitWriter(folder, split, dtype, tokenizer, dataset.max_tokens if split == "train" else None)
            for split in SPLITS
        }
        for piece, tokens in self._encoded(source, tokenizer):
            writers[piece.split].add(tokens, piece)
            if writers["train"].full:
                break
        splits = {split: counts for split, writer in writers.items() if (counts := writer.finish())}
        self._check_splits(splits, source)
        meta = {
            "format": FORMAT,
            "dataset": dataset.name,
            "identity": identity,
            "tokenizer": {"sha256": tokenizer.sha256, **origin},
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "dtype": dtype.str,
            "splits": splits,
            "fingerprint": fingerprint_of(splits, tokenizer.sha256, with_counts=not tokenizer.keeps_text),
            "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        flush(folder / "meta.json")
        flush(folder)

    def _make_tokenizer(self, source: Source) -> tuple[Tokenizer, dict[str, Any]]:
        """The tokenizer, and what meta.json says of where it comes from."""
        config = self.tokenizer
        if self.tokenizer_file is not None:
            return Tokenizer.load(self.tokenizer_file), {"name": "file"}
        if config.name == "bytes":
            return Tokenizer.plain_bytes(), {"name": "bytes"}
        if config.name == "pretrained":
            assert config.path is not None
            place = local_tokenizer(config.path) or pretrained_tokenizer(config.path)
            return Tokenizer.load(place), {"name": "pretrained"}
        assert config.vocab_size is not None
        tokenizer, n_bytes = self._train_bpe(source, config.vocab_size)
        return tokenizer, {"name": "bpe", "trained_on_first_bytes": n_bytes}

    def _train_bpe(self, source: Source, vocab_size: int) -> tuple[Tokenizer, int]:
        """A BPE of the first _BPE_BYTES of the training split (to the end of a block), and how many bytes those were."""
        name, limit = self.dataset.name, _BPE_BYTES
        if self.dataset.max_tokens is not None:  # several times the text that will be tokenised, so that the cap saves time
            limit = min(limit, max(_BPE_LEAST_BYTES, 8 * self.dataset.max_tokens))
        n_bytes = 0

        def text() -> Iterator[str]:
            nonlocal n_bytes
            for document in source.documents():
                if document.split != "train":
                    continue
                for block in document.blocks:
                    size = len(_utf8(block, name))
                    n_bytes += size
                    bar.update(size)
                    yield block
                    if n_bytes >= limit:
                        return

        total = min(limit, source.text_bytes) if source.text_bytes else None
        with self._bar("text for the tokenizer", total) as bar:
            tokenizer = Tokenizer.train_bpe(text(), vocab_size)
        if tokenizer.vocab_size < vocab_size:
            tell(f"{name} has text for a vocabulary of {tokenizer.vocab_size}, not of {vocab_size}.")
        return tokenizer, n_bytes

    def _encoded(self, source: Source, tokenizer: Tokenizer) -> Iterator[tuple[Piece, list[int]]]:
        """Every piece of every document with its tokens."""
        for batch in self._batches(source, tokenizer):
            yield from zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True)

    def _batches(self, source: Source, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
        """Every document in pieces, about _BATCH characters at a time."""
        batch: list[Piece] = []
        room = _BATCH
        with self._bar("tokens", source.text_bytes) as bar:
            for document in source.documents():
                texts = tokenizer.pieces(_without_blank_start(document.blocks))
                text = next(texts, None)
                while text is not None:
                    following = next(texts, None)
                    batch.append(Piece(document.split, text, len(_utf8(text, self.dataset.name)), last=following is None))
                    room -= len(text)
                    bar.update(batch[-1].n_bytes)
                    if room <= 0:
                        yield batch
                        batch, room = [], _BATCH
                    text = following
            if batch:
                yield batch

    def _check_splits(self, splits: dict[str, Any], source: Source) -> None:
        dataset = self.dataset
        if not splits:
            raise UserError(f"{dataset.name} has no text at all: choose another dataset or another dataset.path")
        if not self.how.for_training:
            return
        if "train" not in splits:
            raise _nothing_to_train_on(dataset)
        for split, fraction in (("validation", dataset.validation_fraction), ("test", dataset.test_fraction)):
            if fraction and split not in splits and source.identity.get(f"{split}_fraction") == 0:
                raise UserError(
                    f"{dataset.name}: the files named for {split} hold no text: give them some, or take them away, so that a "
                    "part of the others takes their place"
                )
            if fraction and split not in splits:
                raise UserError(
                    f"the {split} split of {dataset.name} came out empty: raise dataset.{split}_fraction or "
                    f"dataset.max_tokens, or set dataset.{split}_fraction=0 to do without"
                )

    def _bar(self, what: str, total: int | None) -> tqdm[Any]:
        title = f"{self.dataset.name}: {what}"
        return tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not self.how.progress)


def _without_blank_start(blocks: Iterable[str]) -> Iterator[str]:
    """The same blocks, or none if there are only white-space ones: a document has text."""
    blocks = iter(blocks)
    start = ""
    for block in blocks:
        start += block
        if start.strip():
            yield start
            yield from blocks


def _nothing_to_train_on(dataset: DatasetConfig) -> UserError:
    return UserError(f"{dataset.name} has no text to train on: give it some, or lower the other splits' fractions")


def _utf8(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} has a text with half of a surrogate pair (near {text[max(0, error.start - 20) : error.start]!r}), "
            "which is no character: correct the source"
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a killed one."""
    name = path.name.removeprefix(".").removesuffix(".lock")
    with contextlib.ExitStack() as held:
        with writable(f"data_dir={path.parent}", _ELSEWHERE):
            held.enter_context(locked(path, on_wait=lambda: tell(f"Another process prepares {name}; waiting for it.")))
        yield
