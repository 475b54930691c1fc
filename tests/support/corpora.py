"""Small corpora and settings for the tests of the data."""

from __future__ import annotations

import random
from pathlib import Path

from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.data import PreparedData, Tokenizer

BYTES = TokenizerConfig(name="bytes")
BPE = TokenizerConfig(name="bpe", vocab_size=320)
_WORDS = [
    "the",
    "a",
    "sea",
    "ship",
    "captain",
    "whale",
    "island",
    "storm",
    "réef",
    "said",
    "saw",
    "and",
    "of,",
    "under",
    "over",
    "old.",
    "new\nhis",
    "Über",
    "海",
    "12",
    "'tis",
]


def text(seed: int, words: int = 60) -> str:
    """Words of prose, the same for the same seed."""
    choice = random.Random(seed)
    return " ".join(choice.choice(_WORDS) for _ in range(words)) + f" {seed}."


def folder_of_texts(folder: Path, documents: int, words: int = 60) -> dict[str, str]:
    """Writes 000.txt and so on; returns name -> text."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"{number:03}.txt": text(number, words) for number in range(documents)}
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return texts


def local(path: Path | str, **fields: object) -> DatasetConfig:
    return DatasetConfig(name="local", source="local", path=str(path), **fields)  # type: ignore[arg-type]


def documents_of(prepared: PreparedData, split: str) -> list[str]:
    """The texts of a split, decoded from its tokens."""
    tokenizer = Tokenizer.load(prepared.tokenizer_file)
    data = prepared.splits[split]
    bounds = zip(data.document_starts[:-1], data.document_starts[1:], strict=True)
    return [tokenizer.decode(data.tokens[start : stop - 1].tolist()) for start, stop in bounds]
