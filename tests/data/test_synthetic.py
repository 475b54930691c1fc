"""Synthetic corpora: every answer stands in its document, the splits share none, and the same settings give the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.data import prepare
from harness.data.sources import check_corpus
from harness.data.synthetic import CUE, FILLER, KEY_DIGITS, KEYS, VALUES, split_sizes, synthetic_source
from harness.errors import UserError
from tests.support.corpora import BYTES, documents_of

CONFIGS = Path(__file__).parents[2] / "configs" / "dataset"
SHIPPED = {name: DatasetConfig(**yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())) for name in ("mqar", "passkey")}


def small(name: str, **changes: object) -> DatasetConfig:
    return dataclasses.replace(SHIPPED[name], **({"synthetic_documents": 1000} | changes))  # type: ignore[arg-type]


def by_split(dataset: DatasetConfig) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for document in synthetic_source(dataset).documents():
        texts.setdefault(document.split, []).append("".join(document.blocks))
    return texts


def all_texts(dataset: DatasetConfig) -> list[str]:
    return [text for texts in by_split(dataset).values() for text in texts]


def refusal(dataset: DatasetConfig, tokenizer: TokenizerConfig = BYTES) -> str:
    with pytest.raises(UserError) as refused:
        check_corpus(dataset, tokenizer)
    return str(refused.value)


def test_every_key_of_mqar_that_comes_again_is_followed_by_its_value() -> None:
    seen = set()
    for text in all_texts(small("mqar")):
        assert len(text) == 255 and text.isascii() and text.endswith("\n")
        keys, values = text[:-1:2], text[1:-1:2]
        value_of: dict[str, str] = {}
        for key, value in zip(keys, values, strict=True):
            assert value_of.setdefault(key, value) == value
        assert set(keys) <= set(KEYS) and set(values) <= set(VALUES)
        seen.add(len(value_of))
    assert seen == set(SHIPPED["mqar"].synthetic_pairs)


def test_the_newest_keys_of_mqar_are_asked_for_most_and_old_ones_too() -> None:
    """Of n keys the r-th newest with a probability of 1 / r over the sum of them."""
    counts = dict.fromkeys(range(8), 0)
    for text in all_texts(small("mqar", synthetic_pairs=[8])):
        recent: list[str] = []
        for key in text[:-1:2]:
            if key in recent:
                if len(recent) == 8:
                    counts[recent[::-1].index(key)] += 1
                recent.remove(key)
            recent.append(key)
    total = sum(counts.values())
    assert total > 10_000
    harmonic = sum(1 / rank for rank in range(1, 9))
    for rank, count in counts.items():
        assert count / total == pytest.approx(1 / (rank + 1) / harmonic, abs=0.01)


def test_keys_and_values_cannot_be_taken_for_each_other() -> None:
    symbols = KEYS + VALUES
    assert len(set(symbols)) == len(symbols) == 52 + 42 and symbols.isprintable()


def test_the_key_of_passkey_is_stated_between_sentences_of_the_filler_and_asked_for_at_the_end() -> None:
    endless = FILLER * 5
    depths, keys = set(), set()
    for text in all_texts(small("passkey")):
        assert len(text) == 255
        before, stated, asked = text.split(CUE)
        assert len(asked) == KEY_DIGITS and asked.isdigit() and stated.startswith(f"{asked}.")
        after = stated[KEY_DIGITS + 1 :]
        assert before + after in endless
        assert not before or before.endswith(".")
        depths.add(len(before))
        keys.add(asked)
    assert 0 in depths and max(depths) == 255 - len(f"{CUE}12345.{CUE}12345") and len(depths) > 20
    assert len(keys) > 980


@pytest.mark.parametrize("name", SHIPPED)
def test_no_document_of_one_split_stands_in_another(name: str) -> None:
    # With one pair there are 2184 documents of mqar: without care some would be drawn twice.
    dataset = small(name, synthetic_documents=2000, validation_fraction=0.05, test_fraction=0.05, synthetic_pairs=[1])
    texts = by_split(dataset)
    assert {split: len(documents) for split, documents in texts.items()} == split_sizes(dataset)
    train, validation, test = (set(texts[split]) for split in ("train", "validation", "test"))
    assert train.isdisjoint(validation | test) and validation.isdisjoint(test)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_same_settings_give_the_same_documents_and_another_seed_gives_others(name: str) -> None:
    dataset = small(name)
    source = synthetic_source(dataset)
    first = [("".join(document.blocks), document.split) for document in source.documents()]
    assert first == [("".join(document.blocks), document.split) for document in source.documents()]
    other = dataclasses.replace(dataset, split_seed=1)
    assert source.identity != synthetic_source(other).identity
    assert len({text for text, _ in first} & set(all_texts(other))) < 10


def test_these_are_the_documents_that_they_were() -> None:
    """Runs of one configuration were trained on the same text, whatever the version of the libraries."""
    assert by_split(small("mqar", synthetic_tokens=32, synthetic_pairs=[4]))["test"][0] == "X|A=s%s%X|X|X|s%s%s%A=e)X|s%X|\n"
    assert (
        by_split(small("passkey", synthetic_tokens=100))["test"][0]
        == "e and back again. The pass key is:68829. The grass is green. The sky is blue. The pass key is:68829"
    )


def test_validation_and_test_come_first_so_that_a_cap_on_training_leaves_them_alone() -> None:
    order = [document.split for document in synthetic_source(small("mqar")).documents()]
    assert order == ["validation"] * 20 + ["test"] * 20 + ["train"] * 960


@pytest.mark.parametrize("name", SHIPPED)
def test_a_prepared_corpus_has_documents_as_long_as_asked_for_and_its_text_comes_back(name: str, tmp_path: Path) -> None:
    dataset = small(name, synthetic_documents=200, synthetic_tokens=128, synthetic_pairs=[4, 8], max_tokens=12_800)
    prepared = prepare(dataset, BYTES, tmp_path, progress=False)
    assert {split: data.n_documents for split, data in prepared.splits.items()} == {"train": 100, "validation": 4, "test": 4}
    for split, data in prepared.splits.items():
        assert (data.document_starts[1:] - data.document_starts[:-1] == 128).all()
        assert documents_of(prepared, split) == by_split(dataset)[split][: data.n_documents]


def test_only_what_shapes_the_text_is_the_identity_of_the_source() -> None:
    def identities(name: str, **changes: object) -> bool:
        return synthetic_source(small(name, **changes)).identity == synthetic_source(small(name)).identity

    assert not identities("mqar", synthetic_pairs=[4]) and identities("passkey", synthetic_pairs=[4])
    assert not identities("mqar", synthetic_tokens=130) and not identities("mqar", test_fraction=0.1)
    assert identities("mqar", max_tokens=5000)


def test_what_cannot_be_made_is_refused_with_the_numbers() -> None:
    assert refusal(small("mqar", synthetic_task="sort")) == (
        "dataset.synthetic_task=sort is unknown: choose one of mqar, passkey"
    )
    assert refusal(small("mqar", synthetic_pairs=[4, 53])) == (
        "dataset.synthetic_pairs=[4, 53] must be numbers from 1 to 52, as there are keys"
    )
    assert "must be numbers from 1 to 52" in refusal(small("mqar", synthetic_pairs=[]))
    assert refusal(small("mqar", synthetic_tokens=128)) == (
        "dataset.synthetic_tokens=128 have no room for 32 pairs and as many queries, which take 130: raise it or lower "
        "dataset.synthetic_pairs"
    )
    check_corpus(small("mqar", synthetic_tokens=130), BYTES)
    assert "dataset.synthetic_tokens=131 must be even" in refusal(small("mqar", synthetic_tokens=131))
    assert refusal(small("passkey", synthetic_tokens=45)) == (
        "dataset.synthetic_tokens=45 have no room for a statement and a question, which take 46: raise it"
    )
    assert len(all_texts(small("passkey", synthetic_tokens=46))[0]) == 45
    assert "dataset.synthetic_documents=0 must be at least 1" in refusal(small("mqar", synthetic_documents=0))
    assert refusal(small("mqar"), TokenizerConfig("bpe", 4096)) == (
        "tokenizer=bpe joins the symbols of dataset=mqar, each of which is a key or an answer of its own: it takes "
        "tokenizer=bytes"
    )


def test_a_task_with_too_few_documents_says_so_instead_of_drawing_for_ever() -> None:
    dataset = small("mqar", synthetic_documents=60_000, validation_fraction=0.9, synthetic_pairs=[1], synthetic_tokens=6)
    with pytest.raises(UserError, match=r"hardly a document that validation and test .* do not hold: lower"):
        all_texts(dataset)


def test_a_path_that_is_no_prepared_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no prepared folder, which is all that mqar can use"):
        prepare(small("mqar", path=str(tmp_path)), BYTES, tmp_path, progress=False)
