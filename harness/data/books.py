"""classic_books: 384 public-domain books, rebuilt from their repository at one commit and checked against a manifest.

classic_books.csv names each book's file, split, git blob and the SHA-256 of its cleaned text, in the order (shuffled,
no author in two splits) in which the documents come. Repository: mlschmitt/classic-books-markdown on GitHub.
"""

from __future__ import annotations

import csv
import hashlib
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from harness.config.schema import DatasetConfig
from harness.data import download
from harness.data.documents import EVALUATION_FIRST, Document, Source
from harness.data.network import HubUnreachable, reason_unreachable
from harness.data.parquet import read_parquet
from harness.errors import UserError, readable
from harness.files.hashes import file_sha256

MANIFEST = Path(__file__).with_name("classic_books.csv")
COMMIT = "944882722e9a96fa6cf2739dc2ea757e101f412f"
_REPOSITORY = "https://raw.githubusercontent.com/mlschmitt/classic-books-markdown"
_URL_VARIABLE = "ATTENTION_BOOKS_URL"  # a mirror of the line above: it must answer URL/COMMIT/PATH
_PARALLEL = 8
_HEADER_END = "-------"
_HEADER_CHARACTERS = 600


class Book(NamedTuple):
    path: str
    split: str
    git_blob_sha1: str
    text_sha256: str
    text_bytes: int


def books_source(dataset: DatasetConfig, data_dir: Path, *, progress: bool) -> Source:
    """The books, from dataset.path (a folder with the parquet files) or downloaded to data_dir/downloads.

    Either way the texts are those of the manifest, so both have one identity. Nothing is read before it is asked for.
    """
    books = read_manifest()
    identity = {"source": "classic_books", "manifest": file_sha256(MANIFEST)}
    folder = Path(dataset.path) if dataset.path is not None else None
    downloads = data_dir / "downloads" / f"classic_books-{COMMIT[:12]}"

    def documents() -> Iterator[Document]:
        if folder is None:
            _download(books, downloads, progress)
        for split in EVALUATION_FIRST:
            wanted = [book for book in books if book.split == split]
            texts = _read_folder(folder, split, wanted) if folder else (_read_text(downloads, book) for book in wanted)
            yield from (Document(split, (text,)) for text in texts)

    return Source(identity, documents, sum(book.text_bytes for book in books))


def read_manifest() -> list[Book]:
    with MANIFEST.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Book(path, split, blob, text, int(size)) for path, split, blob, text, size in rows]


def clean(raw: bytes) -> str:
    """The text of a book's file: line ends made LF, the header cut off, one newline at the end."""
    text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
    header_end = text.find(_HEADER_END)
    if 0 <= header_end < _HEADER_CHARACTERS:
        text = text[header_end + len(_HEADER_END) :]
    return text.strip() + "\n"


def _read_folder(folder: Path, split: str, books: list[Book]) -> Iterator[str]:
    """The texts in SPLIT*.parquet, which must be the manifest's, in its order."""
    with readable(f"dataset.path={folder}", "name the folder that holds the books, or none"):
        files = sorted(file for file in folder.iterdir() if file.match(f"{split}*.parquet"))
    if not files:
        raise UserError(f"dataset.path={folder} has no {split}*.parquet: name the folder that holds the books, or none")
    texts = (text for file in files for text in read_parquet(file, "text"))
    for book in books:
        text = next(texts, None)
        if text is None or _sha256(text.encode()) != book.text_sha256:
            raise UserError(
                f"{folder} has {'nothing' if text is None else 'another text'} where the manifest has {book.path}: take an "
                "unchanged copy, or leave dataset.path empty to download the books"
            )
        yield text


def _read_text(downloads: Path, book: Book) -> str:
    text = (downloads / book.text_sha256).read_bytes()
    if _sha256(text) != book.text_sha256:
        (downloads / book.text_sha256).unlink()
        raise UserError(f"the downloaded copy of {book.path} was damaged and is deleted: run it again")
    return text.decode()


def _download(books: list[Book], downloads: Path, progress: bool) -> None:
    """Fetches the books that are not there yet, several at a time; each is verified before it gets its name."""
    missing = [book for book in books if not (downloads / book.text_sha256).is_file()]
    if not missing:
        return
    base = f"{os.environ.get(_URL_VARIABLE, '').rstrip('/') or _REPOSITORY}/{COMMIT}"
    if reason := reason_unreachable(f"{base}/{urllib.parse.quote(missing[0].path)}"):
        raise HubUnreachable(
            f"classic_books: {base} is out of reach ({reason}): take dataset=stdlib (needs no network), or a folder "
            f"that holds the books with dataset.path=FOLDER, or a mirror with {_URL_VARIABLE}=URL"
        )
    downloads.mkdir(parents=True, exist_ok=True)
    total = sum(book.text_bytes for book in missing)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="classic_books: download", disable=not progress) as bar,
        ThreadPoolExecutor(_PARALLEL) as pool,
    ):
        started = {pool.submit(_fetch, base, book, downloads): book for book in missing}
        try:
            for done in as_completed(started):
                done.result()
                bar.update(started[done].text_bytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(base: str, book: Book, downloads: Path) -> None:
    """One book, tried several times. Raises UserError for other content, HubUnreachable if it does not come whole."""
    url = f"{base}/{urllib.parse.quote(book.path)}"
    for _ in range(download.ATTEMPTS):
        raw = download.retried_download(lambda: _read(url), f"{book.path} of classic_books", base, _URL_VARIABLE)
        text = clean(raw).encode()
        blob = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
        if (blob, _sha256(text)) == (book.git_blob_sha1, book.text_sha256):
            partial = downloads / f"{book.text_sha256}.{os.getpid()}.partial"
            partial.write_bytes(text)
            os.replace(partial, downloads / book.text_sha256)
            return
    raise UserError(
        f"{book.path} arrived from {base} {download.ATTEMPTS} times with content other than the manifest's: something on the "
        f"way changes it; use another network, or set {_URL_VARIABLE} to a mirror"
    )


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=download.TIMEOUT) as answer:
        content: bytes = answer.read()
    return content


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
