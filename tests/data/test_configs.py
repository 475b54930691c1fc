"""The shipped dataset and tokenizer choices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.data import check_corpus

CONFIGS = Path(__file__).parents[2] / "configs"
DATASETS = sorted((CONFIGS / "dataset").glob("*.yaml"))
TOKENIZERS = sorted((CONFIGS / "tokenizer").glob("*.yaml"))


@pytest.mark.parametrize("file", DATASETS, ids=lambda file: file.stem)
def test_a_dataset_is_a_valid_choice_and_has_the_name_of_its_file(file: Path) -> None:
    dataset = DatasetConfig(**yaml.safe_load(file.read_text()))
    assert dataset.name == file.stem
    if dataset.source == "local":
        dataset = dataclasses.replace(dataset, path="text.txt")
    check_corpus(dataset, TokenizerConfig(name="bytes"))
    assert all(len(hash_) == 64 for hash_ in dataset.sha256.values())


@pytest.mark.parametrize("file", TOKENIZERS, ids=lambda file: file.stem)
def test_a_tokenizer_is_a_valid_choice_and_has_the_name_of_its_file(file: Path) -> None:
    tokenizer = TokenizerConfig(**yaml.safe_load(file.read_text()))
    assert tokenizer.name == file.stem
    if tokenizer.name == "pretrained":
        tokenizer = dataclasses.replace(tokenizer, path="gpt2")
    check_corpus(DatasetConfig(name="stdlib", source="stdlib"), tokenizer)


def test_all_datasets_of_the_readme_are_there() -> None:
    assert [file.stem for file in DATASETS] == [
        "classic_books",
        "fineweb_edu",
        "linux",
        "local",
        "mqar",
        "passkey",
        "stdlib",
        "tinystories",
        "wikitext103",
        "wikitext2",
    ]
    assert [file.stem for file in TOKENIZERS] == ["bpe", "bytes", "pretrained"]
