"""Datasets from the Hugging Face hub, at a pinned commit and with every downloaded file verified.

The libraries take wrong bytes of the right length for the file, so each is hashed before its first row is read.
Streamed rows are the exception: of a file read in part no hash can be checked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.config.schema import DatasetConfig
from harness.data import hub_client
from harness.data.documents import Document, Source, carving_by_fraction, evaluation_first, split_of_name
from harness.errors import UserError, in_a_line, tell

_ROWS = 256
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}

Rows = dict[str, Callable[[], Iterator[str]]]  # split -> its texts, row by row


def hub_source(dataset: DatasetConfig, *, for_training: bool) -> Source:
    """Documents of dataset.hub_name at its commit; nothing is fetched before they are asked for.

    With dataset.path, the files named in dataset.sha256 are read from that folder instead. A validation or test split
    that the dataset lacks is carved from its training split, without which there is no training.
    """
    identity = {
        "source": "hub",
        "name": dataset.hub_name,
        "config": dataset.hub_config,
        "revision": dataset.hub_revision,
        "rows": dataset.hub_rows,
        "text_column": dataset.text_column,
        "sha256": dict(sorted(dataset.sha256.items())),
        "streamed": dataset.hub_streaming,
        "validation_fraction": dataset.validation_fraction,
        "test_fraction": dataset.test_fraction,
        "split_seed": dataset.split_seed,
    }
    join = articles if dataset.hub_rows == "wikitext_lines" else _non_empty

    def documents() -> Iterator[Document]:
        rows = _streamed_rows(dataset) if dataset.hub_streaming else _downloaded_rows(dataset)
        if for_training and "train" not in rows:
            raise UserError(f"{dataset.hub_name} has no train split, but {', '.join(rows)}: choose another hub_config")
        validation = 0.0 if "validation" in rows else dataset.validation_fraction
        test = 0.0 if "test" in rows else dataset.test_fraction
        carving = carving_by_fraction(dataset.split_seed, validation, test)
        for split in ("validation", "test"):
            if split in rows:
                yield from (Document(split, (text,)) for text in join(rows[split]()))

        def training() -> Iterator[Document]:
            for text in join(rows["train"]()) if "train" in rows else ():
                yield Document(carving.split(text.encode("utf-8", errors="surrogatepass")), (text,))

        carved_files = (validation or test) and not dataset.hub_streaming
        yield from evaluation_first(training) if carved_files else training()

    return Source(identity, documents)


def articles(rows: Iterable[str]) -> Iterator[str]:
    """Joins WikiText's lines into articles, with the blank lines (" \\n") that the published files have.

    A first-level heading (` = Title = `) between blank lines starts an article. The blank lines matter: two formulas
    of the test split look like headings, but stand within a paragraph.
    """
    article: list[str] = []
    before, begun = "", False
    for line, after in itertools.pairwise(itertools.chain(rows, [""])):
        words = line.split()
        heading = len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "="
        if heading and begun and not before.strip() and not after.strip():
            yield "".join(article)
            article, begun = [], False
        article.append(line if words else " \n")
        begun = begun or bool(words)
        before = line
    if begun:
        yield "".join(article)


def _non_empty(rows: Iterable[str]) -> Iterator[str]:
    return (text for text in rows if text.strip())


def _downloaded_rows(dataset: DatasetConfig) -> Rows:
    """A file is fetched and verified when its first row is asked for, and read through `datasets`."""
    if dataset.sha256:
        hashes = dataset.sha256
        splits: dict[str, list[str]] = {}
        for name in sorted(hashes):
            splits.setdefault(split_of_name(name) or "train", []).append(name)
    else:
        splits, hashes = _files_on_hub(dataset)

    @functools.cache
    def path(name: str) -> Path:
        return _verified_copy(dataset, name, hashes[name]) if dataset.path else _verified(dataset, name, hashes[name])

    def rows(split: str) -> Iterator[str]:
        for name in splits[split]:
            yield from _read_file(path(name), name, dataset)

    return {split: functools.partial(rows, split) for split in splits}


def _files_on_hub(dataset: DatasetConfig) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The files of each split and the hash of each, as the hub states them for the commit."""
    assert dataset.hub_name is not None and dataset.hub_revision is not None
    name, revision = dataset.hub_name, dataset.hub_revision
    splits = _split_files(_builder(dataset), dataset)
    files = [file for files in splits.values() for file in files]
    return splits, hub_client.file_hashes(name, files, revision)


def _builder(dataset: DatasetConfig) -> Any:
    """The `datasets.DatasetBuilder`: it knows which files a config has, and has read none of them."""
    what = f"the dataset {dataset.hub_name}"
    hub_client.connect(f"api/datasets/{dataset.hub_name}/revision/{dataset.hub_revision}", what)
    import datasets

    def ask() -> Any:
        try:
            return datasets.load_dataset_builder(dataset.hub_name, dataset.hub_config, revision=dataset.hub_revision)
        except ValueError as error:
            if "BuilderConfig" not in str(error):
                raise
            raise UserError(f"dataset.hub_config={dataset.hub_config}: {error}") from error

    return hub_client.retried_hub_call(ask, what)


def _split_files(builder: Any, dataset: DatasetConfig) -> dict[str, list[str]]:
    prefix = f"hf://datasets/{dataset.hub_name}@{dataset.hub_revision}/"
    return {
        str(split): [str(file).removeprefix(prefix) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }


def _verified(dataset: DatasetConfig, name: str, expected: str) -> Path:
    """The file in the hub's cache, downloaded if need be. One with other content is deleted, never used."""
    assert dataset.hub_name is not None
    what = f"{name} of {dataset.hub_name}"
    for _ in range(2):
        path = hub_client.hub_file(dataset.hub_name, name, dataset.hub_revision, what)
        if hub_client.is_as_stated(path, expected):
            return path
        tell(f"{what} arrived with wrong content and is deleted")
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise UserError(
        f"{what} arrived twice with content other than its hash says ({expected[:12]}...): something on the way "
        "changes it; use another network, or a mirror with HF_ENDPOINT=URL, or dataset=stdlib"
    )


def _verified_copy(dataset: DatasetConfig, name: str, expected: str) -> Path:
    assert dataset.path is not None
    path = Path(dataset.path, name)
    if not path.is_file():
        raise UserError(f"dataset.path={dataset.path} has no {name}: it must hold the files of {dataset.hub_name}")
    if not hub_client.is_as_stated(path, expected):
        raise UserError(f"{path} is not the file that dataset.sha256 names: copy it again")
    return path


def _read_file(path: Path, name: str, dataset: DatasetConfig) -> Iterator[str]:
    import datasets

    reader = _READERS.get(Path(name).suffix)
    if reader is None:
        raise UserError(f"{name} of {dataset.hub_name} is none of {', '.join(_READERS)}: convert it for dataset=local")
    options = {"keep_linebreaks": True} if reader == "text" else {}

    def opened() -> Any:
        return datasets.load_dataset(reader, data_files=[str(path)], split="train", streaming=True, **options)

    def unreadable(error: Exception) -> UserError:  # a file with the right hash, and whatever its reader makes of its content
        return UserError(f"{name} of {dataset.hub_name} cannot be read ({in_a_line(error)}): choose another dataset")

    return _column(opened, dataset, unreadable)


def _streamed_rows(dataset: DatasetConfig) -> Rows:
    """The rows as they arrive: only what is read is transferred."""
    what = f"{dataset.hub_name} (streamed)"
    builder = _builder(dataset)
    for files in _split_files(builder, dataset).values():
        hub_client.connect(f"datasets/{dataset.hub_name}/resolve/{dataset.hub_revision}/{files[0]}", what)
    import datasets

    # The library's own 20 retries, five seconds apart, lie above five retries of each request.
    datasets.config.STREAMING_READ_MAX_RETRIES = 1

    def rows(split: str) -> Iterator[str]:  # what is raised: a failed request, or whatever the reader makes of wrong bytes
        opened = functools.partial(builder.as_streaming_dataset, split)
        return _column(opened, dataset, functools.partial(hub_client.broken_off, what))

    return {split: functools.partial(rows, split) for split in _split_files(builder, dataset)}


@contextlib.contextmanager
def _library(failed: Callable[[Exception], UserError]) -> Iterator[None]:
    """What `datasets` raises inside, where no code of ours stands, as `failed` says it."""
    try:
        yield
    except Exception as error:
        raise failed(error) from error


def _column(opened: Callable[[], Any], dataset: DatasetConfig, failed: Callable[[Exception], UserError]) -> Iterator[str]:
    """The texts of the `datasets.IterableDataset` that `opened` returns, a few rows in memory at a time."""
    with _library(failed):
        rows = opened()
    column = dataset.text_column
    if rows.column_names is not None:  # they may be known with the rows alone
        rows = rows.select_columns([_way(column, rows.column_names, dataset)[0]])
    batches = rows.iter(batch_size=_ROWS)
    while True:
        with _library(failed):
            batch = next(batches, None)
        if batch is None:
            return
        names = _way(column, batch, dataset)
        for text in batch[names[0]]:
            for name in names[1:]:
                if isinstance(text, dict) and name not in text:
                    raise UserError(f"{column!r} of {dataset.hub_name} is not there: set dataset.text_column")
                text = text[name] if isinstance(text, dict) else text
            if isinstance(text, str):
                yield text
            elif text is not None:
                raise UserError(
                    f"{column!r} of {dataset.hub_name} holds {type(text).__name__}, not text: set dataset.text_column"
                )


def _way(column: str, columns: Collection[str], dataset: DatasetConfig) -> list[str]:
    """The column's name, or the names of a struct's column and of fields down to one of it. Raises UserError."""
    names = [column] if column in columns else column.split(".")
    if names[0] not in columns:
        raise UserError(
            f"{dataset.hub_name} has no column {column!r}, but {', '.join(columns)}: set dataset.text_column to one of them"
        )
    return names
