"""The sources of the running Python's standard library as a corpus: real text that every machine has.

It depends on the interpreter, hence the fingerprint. Left out: tests, site-packages, and what a program wrote
(encodings/ is tables; pydoc_data/topics.py is prose, but one file longer than a whole validation split).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from harness.config.schema import DatasetConfig
from harness.data.documents import Document, Source, carving_by_fraction
from harness.errors import UserError

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
_GENERATED = re.compile(r"auto-?generated|automatically generated|file is generated|generated from", re.IGNORECASE)
_HEAD = 1500  # characters in which a generated file says so
_NEAR_DUPLICATE = 0.8  # share of a file's distinct lines that stand in another file


def stdlib_source(dataset: DatasetConfig) -> Source:
    """One document per file, in the order of their paths; the split is decided by a hash of the path.

    Raises UserError where the standard library has no sources (embedded, zipped or stripped Pythons).
    """
    texts = _distinct(_read(Path(sysconfig.get_path("stdlib"))))
    if not texts:
        raise UserError(
            f"this Python ({platform.python_version()}) has no sources of its standard library in "
            f"{sysconfig.get_path('stdlib')}: use another Python or another dataset"
        )
    carving = carving_by_fraction(dataset.split_seed, dataset.validation_fraction, dataset.test_fraction)
    splits = {name: carving.split(name.encode()) for name in texts}

    def documents() -> Iterator[Document]:
        for part in (("validation", "test"), ("train",)):
            for name, text in texts.items():
                if splits[name] in part:
                    yield Document(splits[name], (text,))

    identity = {
        "source": "stdlib",
        "fingerprint": _fingerprint(texts),
        "files": len(texts),
        "validation_fraction": dataset.validation_fraction,
        "test_fraction": dataset.test_fraction,
        "split_seed": dataset.split_seed,
    }
    return Source(identity, documents, sum(len(text.encode()) for text in texts.values()))


def _read(root: Path) -> dict[str, str]:
    """Relative path -> text, sorted. Files that are not valid Python text are left out (a few hold test data)."""
    texts = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in files:
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(folder, name)
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
            if text.strip() and not _GENERATED.search(text[:_HEAD]):
                texts[path.relative_to(root).as_posix()] = text
    return dict(sorted(texts.items()))


def _distinct(texts: dict[str, str]) -> dict[str, str]:
    """Without near-duplicates: files most of whose lines stand in one other file that is at least as long."""
    lines = {name: {line.strip() for line in text.splitlines()} - {""} for name, text in texts.items()}
    kept: set[str] = set()
    holders: dict[str, list[str]] = {}  # line -> kept files that hold it
    for name in sorted(texts, key=lambda name: (-len(lines[name]), name)):
        shared = Counter(holder for line in lines[name] for holder in holders.get(line, ()))
        if shared and max(shared.values()) >= _NEAR_DUPLICATE * len(lines[name]):
            continue
        kept.add(name)
        for line in lines[name]:
            holders.setdefault(line, []).append(name)
    return {name: text for name, text in texts.items() if name in kept}


def _fingerprint(texts: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name, text in texts.items():
        digest.update(f"{name}\0{hashlib.sha256(text.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()
