"""classic_books, rebuilt from a loopback server or read from a folder."""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from harness.config.schema import DatasetConfig
from harness.data import HubUnreachable, PreparedData, books, download, prepare
from harness.errors import UserError
from tests.support.corpora import BYTES, documents_of, text
from tests.support.file_server import FileServer

SHARED_BOOKS = Path(__file__).parents[3] / "shared/data/books"
SPLITS = {"train": 6, "validation": 2, "test": 2}


def raw(number: int) -> bytes:
    """A book as its repository has it."""
    header = f"# Book {number}\r\n## Year: 18{number:02}\r\n-------\r\n" if number % 2 else ""
    return (header + f"\r\n  Chapter é {number}\r\n\r\n{text(number, 300)}\r\n------- a later line\r\n\r\n").encode()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten books in a folder that a file server can serve, and their manifest in the place of the real one."""
    rows = []
    for number, split in enumerate(split for split, count in SPLITS.items() for _ in range(count)):
        path = f"Author {number}/A Book: its {number}? part.md"
        file = tmp_path / "served" / books.COMMIT / path
        file.parent.mkdir(parents=True)
        file.write_bytes(raw(number))
        content = books.clean(raw(number)).encode()
        blob = hashlib.sha1(b"blob %d\0" % len(raw(number)) + raw(number)).hexdigest()
        rows.append([path, split, blob, hashlib.sha256(content).hexdigest(), len(content)])
    manifest = tmp_path / "manifest.csv"
    with manifest.open("w", newline="") as handle:
        csv.writer(handle).writerows([books.Book._fields, *rows])
    monkeypatch.setattr(books, "MANIFEST", manifest)
    monkeypatch.setattr(download, "TIMEOUT", 2)
    return tmp_path / "served"


@pytest.fixture
def server(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with FileServer(repository) as server:
        monkeypatch.setenv("ATTENTION_BOOKS_URL", server.url)
        yield server


def prepared(tmp_path: Path, path: Path | None = None) -> PreparedData:
    dataset = DatasetConfig(name="classic_books", source="classic_books", path=str(path) if path else None)
    return prepare(dataset, BYTES, tmp_path / "data", progress=False)


def check(data: PreparedData) -> None:
    numbers = iter(range(10))
    for split, count in SPLITS.items():
        assert documents_of(data, split) == [books.clean(raw(next(numbers))) for _ in range(count)]


def write_folder(folder: Path, texts: dict[str, list[str]]) -> Path:
    folder.mkdir()
    for split, contents in texts.items():
        rows = {"title": contents, "author": contents, "year": contents, "text": contents}
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / f"{split}.parquet")
    return folder


def folder_texts() -> dict[str, list[str]]:
    numbers = iter(range(10))
    return {split: [books.clean(raw(next(numbers))) for _ in range(count)] for split, count in SPLITS.items()}


def test_a_book_is_cleaned_as_the_manifest_says() -> None:
    assert books.clean(b"# T\r\n-------\r\n\r\n body\r\nof it \r\n\r\n") == "body\nof it\n"
    assert books.clean(b"no header\n" + b"x" * 700 + b"\n-------\nrest") == "no header\n" + "x" * 700 + "\n-------\nrest\n"
    assert books.clean(b"caf\xe9 -- --\n") == "caf\ufffd -- --\n"


def test_the_committed_manifest_is_whole() -> None:
    manifest = books.read_manifest()
    splits = [book.split for book in manifest]
    assert (splits.count("train"), splits.count("validation"), splits.count("test")) == (365, 11, 8)
    assert len({book.text_sha256 for book in manifest}) == len({book.path for book in manifest}) == 384
    authors = [{book.path.split("/")[0] for book in manifest if book.split == split} for split in SPLITS]
    assert sum(map(len, authors)) == len(set().union(*authors))
    assert sum(book.text_bytes for book in manifest) == 179_930_174


def test_the_books_are_downloaded_once_and_in_the_manifests_order(tmp_path: Path, server: FileServer) -> None:
    check(prepared(tmp_path))
    assert len(server.requests) == 10 and set(server.requests.values()) == {1}
    dataset = DatasetConfig(name="classic_books", source="classic_books", max_tokens=5000)
    prepare(dataset, BYTES, tmp_path / "data", progress=False)  # other tokens of the same books
    assert set(server.requests.values()) == {1}


def test_broken_off_and_refused_downloads_are_tried_again(tmp_path: Path, server: FileServer) -> None:
    server.cut, server.unavailable = 2, 2
    check(prepared(tmp_path))
    assert sum(server.requests.values()) == 14


def test_an_interrupted_download_continues_where_it_was(tmp_path: Path, server: FileServer) -> None:
    missing = server.root / books.COMMIT / "Author 9/A Book: its 9? part.md"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(HubUnreachable, match=r"Author 9.*404.*ATTENTION_BOOKS_URL"):
        prepared(tmp_path)
    missing.write_bytes(content)
    before = {path.name for path in (tmp_path / "data/downloads").rglob("*") if path.is_file()}
    server.requests.clear()
    check(prepared(tmp_path))
    assert len(server.requests) == 10 - len(before)


def test_wrong_bytes_of_the_right_length_are_never_used(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.corrupt = True
    with pytest.raises(UserError, match=r"arrived .* with content other than the manifest's"):
        prepared(tmp_path)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_download_damaged_on_disk_is_never_used(tmp_path: Path, server: FileServer) -> None:
    prepared(tmp_path)
    victim = next(path for path in (tmp_path / "data/downloads").rglob("*") if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-5] + b"abcd\n")
    dataset = DatasetConfig(name="classic_books", source="classic_books", max_tokens=10**6)
    with pytest.raises(UserError, match="was damaged and is deleted: run it again"):
        prepare(dataset, BYTES, tmp_path / "data", progress=False)
    check(prepare(dataset, BYTES, tmp_path / "data", progress=False))


@pytest.mark.parametrize("how", ["silent", "closed"])
def test_a_server_out_of_reach_is_noticed_within_five_seconds(
    tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    server.silent = True
    if how == "closed":
        monkeypatch.setenv("ATTENTION_BOOKS_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match=r"out of reach.*dataset=stdlib.*dataset.path=FOLDER.*ATTENTION_BOOKS_URL"):
        prepared(tmp_path)
    assert time.monotonic() - started < 5


def test_a_folder_of_the_books_gives_the_same_data_without_a_server(tmp_path: Path, server: FileServer) -> None:
    downloaded = prepared(tmp_path)
    server.silent = True
    assert prepared(tmp_path, write_folder(tmp_path / "books", folder_texts())).folder == downloaded.folder
    dataset = DatasetConfig(name="classic_books", source="classic_books", path=str(tmp_path / "books"))
    read = prepare(dataset, BYTES, tmp_path / "data2", progress=False)
    check(read)
    assert (read.folder.name, read.fingerprint) == (downloaded.folder.name, downloaded.fingerprint)


def test_a_folder_with_other_texts_is_refused(tmp_path: Path, repository: Path) -> None:
    texts = folder_texts()
    changed = texts | {"train": [*texts["train"][:3], texts["train"][3] + "!", *texts["train"][4:]]}
    with pytest.raises(UserError, match="where the manifest has Author 3/"):
        prepared(tmp_path, write_folder(tmp_path / "changed", changed))
    with pytest.raises(UserError, match="has nothing where the manifest has Author 7/"):
        prepared(tmp_path, write_folder(tmp_path / "short", texts | {"validation": texts["validation"][:1]}))
    with pytest.raises(UserError, match=r"has no validation\*.parquet"):
        prepared(tmp_path, write_folder(tmp_path / "none", {"train": texts["train"]}))


@pytest.mark.skipif(not SHARED_BOOKS.is_dir(), reason="needs ../shared/data/books")
def test_the_real_books_are_those_of_the_committed_manifest(tmp_path: Path) -> None:
    dataset = DatasetConfig(name="classic_books", source="classic_books", path=str(SHARED_BOOKS), max_tokens=100_000)
    data = prepare(dataset, BYTES, tmp_path / "data", progress=False)
    assert (data.splits["validation"].n_documents, data.splits["test"].n_documents) == (11, 8)
    assert (data.splits["validation"].n_bytes, data.splits["test"].n_bytes) == (4_886_249, 4_784_500)
