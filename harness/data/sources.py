"""Which source a DatasetConfig means, and what is wrong with one that means none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.data.books import books_source
from harness.data.documents import Source
from harness.data.hub import hub_source
from harness.data.linux import linux_source
from harness.data.local import local_source
from harness.data.stdlib import stdlib_source
from harness.data.synthetic import synthetic_problems, synthetic_source
from harness.errors import UserError
from harness.files.untrusted import stays_inside

TOKENIZERS = ("bpe", "bytes", "pretrained")
_BPE_MINIMUM = 257  # the bytes and the end of text


@dataclass(frozen=True)
class Origin:
    """Where text comes from, by the name that dataset.source gives it."""

    open: Callable[[DatasetConfig, Opening], Source]
    problems: Callable[[DatasetConfig], list[str]] = lambda dataset: []  # of its own fields, a sentence each
    has_path: bool = False  # whether dataset.path may be text, not only a prepared folder
    is_pinned: bool = False  # whether its identity is known without reading the text


@dataclass(frozen=True)
class Opening:
    """How a source is opened. for_training: without a training split it is refused."""

    data_dir: Path
    for_training: bool
    progress: bool


def _path_problems(dataset: DatasetConfig) -> list[str]:
    return [] if dataset.path else ["dataset=local needs dataset.path: a file, a folder or a quoted glob"]


def _hub_problems(dataset: DatasetConfig) -> list[str]:
    problems = []
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset.hub_name or ""):
        problems.append(f"dataset.hub_name={dataset.hub_name} must be OWNER/NAME, as in the dataset's address")
    if not re.fullmatch(r"[0-9a-f]{40}", dataset.hub_revision or ""):
        problems.append(
            f"dataset.hub_revision={dataset.hub_revision} must be a commit (40 hexadecimal digits, see the dataset's "
            "history), so that a run can be repeated"
        )
    if dataset.hub_rows not in ("documents", "wikitext_lines"):
        problems.append(f"dataset.hub_rows={dataset.hub_rows} must be documents or wikitext_lines")
    if dataset.hub_streaming and dataset.sha256:
        problems.append("dataset.hub_streaming reads parts of files, which no SHA-256 can check: empty dataset.sha256")
    return problems


# A source is a function in a file and a line here.
SOURCES: dict[str, Origin] = {
    "hub": Origin(
        lambda dataset, how: hub_source(dataset, for_training=how.for_training), _hub_problems, has_path=True, is_pinned=True
    ),
    "classic_books": Origin(
        lambda dataset, how: books_source(dataset, how.data_dir, progress=how.progress), has_path=True, is_pinned=True
    ),
    "linux": Origin(lambda dataset, how: linux_source(dataset, how.data_dir, progress=how.progress), has_path=True),
    "stdlib": Origin(lambda dataset, how: stdlib_source(dataset)),
    "synthetic": Origin(lambda dataset, how: synthetic_source(dataset), synthetic_problems),
    "local": Origin(lambda dataset, how: local_source(dataset, for_training=how.for_training), _path_problems, has_path=True),
}


def open_source(dataset: DatasetConfig, how: Opening) -> Source:
    """The source of a checked dataset. Local and stdlib text is read at once, for its identity; the rest on demand.

    dataset.path, if any, is no prepared folder: UserError where only such a folder would do.
    """
    origin = SOURCES[dataset.source]
    if dataset.path is not None and (not origin.has_path or dataset.hub_streaming):
        raise UserError(
            f"dataset.path={dataset.path} is no prepared folder, which is all that {dataset.name} can use: leave it out"
        )
    return origin.open(dataset, how)


def check_corpus(dataset: DatasetConfig, tokenizer: TokenizerConfig, *, has_file: bool = False) -> None:
    """Raises UserError for settings that cannot work, before anything is read or fetched.

    has_file: the tokenizer is a file that is there, such as a run's own.
    """
    problems = _dataset_problems(dataset) + _tokenizer_problems(tokenizer, has_file)
    if dataset.source == "synthetic" and tokenizer.name != "bytes":
        problems.append(
            f"tokenizer={tokenizer.name} joins the symbols of dataset={dataset.name}, each of which is a key or an answer "
            "of its own: it takes tokenizer=bytes"
        )
    if problems:
        raise UserError("; ".join(problems))


def _dataset_problems(dataset: DatasetConfig) -> list[str]:
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", dataset.name):
        problems.append(f"dataset.name={dataset.name} names a folder: use letters, digits, '.', '_' and '-' only")
    for field in ("validation_fraction", "test_fraction"):
        if not 0 <= getattr(dataset, field) < 1:
            problems.append(f"dataset.{field}={getattr(dataset, field)} must lie in [0, 1)")
    if dataset.validation_fraction + dataset.test_fraction >= 1:
        problems.append("dataset.validation_fraction and dataset.test_fraction leave nothing to train on: lower them")
    if dataset.max_tokens is not None and dataset.max_tokens < 2:
        problems.append(f"dataset.max_tokens={dataset.max_tokens} must be at least 2, or null for no cap")
    if not 0 <= dataset.split_seed < 2**64:
        problems.append(f"dataset.split_seed={dataset.split_seed} must lie in [0, 2^64)")
    for name in dataset.sha256:
        if not stays_inside(name):
            problems.append(f"dataset.sha256 names {name}, which leads out of the dataset's folder: use names below it")
    if dataset.source not in SOURCES:
        return [*problems, f"dataset.source={dataset.source} is unknown: choose one of {', '.join(SOURCES)}"]
    return problems + SOURCES[dataset.source].problems(dataset)


def _tokenizer_problems(tokenizer: TokenizerConfig, has_file: bool) -> list[str]:
    if tokenizer.name not in TOKENIZERS:
        return [f"tokenizer.name={tokenizer.name} is unknown: choose one of {', '.join(TOKENIZERS)}"]
    problems = []
    if tokenizer.name == "bpe" and (tokenizer.vocab_size or 0) < _BPE_MINIMUM:
        problems.append(f"tokenizer.vocab_size={tokenizer.vocab_size} must be at least {_BPE_MINIMUM} for a BPE")
    if tokenizer.name != "bpe" and tokenizer.vocab_size is not None:
        problems.append(f"tokenizer.vocab_size={tokenizer.vocab_size} has no meaning for tokenizer={tokenizer.name}")
    if tokenizer.name == "pretrained" and tokenizer.path is None and not has_file:
        problems.append("tokenizer=pretrained needs tokenizer.path: a hub name, a folder or a tokenizer.json")
    if tokenizer.name != "pretrained" and tokenizer.path is not None:
        problems.append(f"tokenizer.path={tokenizer.path} has no meaning for tokenizer={tokenizer.name}")
    return problems
