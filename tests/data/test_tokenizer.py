"""Tokens and back."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.data.tokenizer import END_OF_TEXT, Tokenizer, bytes_specification
from harness.errors import UserError
from tests.support.corpora import text

TEXTS = [text(seed) for seed in range(40)]
STRANGE = ["", " ", "\n\n\r\n\t", "\x00\x1c", "naïve 海 😀", f"a {END_OF_TEXT} b", "x" * 500, "'s 's  's", "\ufffd\u3000"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS, 320)


@pytest.mark.parametrize("string", [*TEXTS[:3], *STRANGE])
def test_text_survives_encoding_and_decoding(bpe: Tokenizer, string: str) -> None:
    for tokenizer in (bpe, Tokenizer.plain_bytes()):
        tokens = tokenizer.encode(string)
        assert tokenizer.decode(tokens) == string
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        assert tokenizer.end_of_text not in tokens
        assert tokenizer.decode([*tokens, tokenizer.end_of_text]) == string


def test_a_bpe_has_the_size_asked_for_and_the_same_text_gives_the_same_one(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 320
    assert Tokenizer.train_bpe(TEXTS, 320).sha256 == bpe.sha256
    assert Tokenizer.train_bpe(TEXTS[1:], 320).sha256 != bpe.sha256


def test_a_bpe_joins_what_it_has_seen(bpe: Tokenizer) -> None:
    assert len(bpe.encode(TEXTS[0])) < 0.6 * len(TEXTS[0].encode())


def test_saving_and_loading_changes_nothing(bpe: Tokenizer, tmp_path: Path) -> None:
    file = bpe.save(tmp_path)
    assert file == tmp_path / "tokenizer.json"
    for path in (tmp_path, file):
        again = Tokenizer.load(path)
        assert (again.sha256, again.vocab_size, again.end_of_text) == (bpe.sha256, 320, bpe.end_of_text)
        assert again.encode(STRANGE[5]) == bpe.encode(STRANGE[5])
    assert Tokenizer.plain_bytes().save(tmp_path / "none") is None
    assert Tokenizer.load(None).vocab_size == 257


def test_cutting_a_document_into_pieces_changes_no_token(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = random.Random(0)
    compared = 0
    for _ in range(100):
        string = "".join(choice.choice(["ab", "é", " ", "  ", "\n", ".", "9", "'s", " the sea ", "海"]) for _ in range(300))
        string += text(choice.randrange(100), 200)
        whole = bpe.encode_batch([string])[0]
        monkeypatch.setattr(bpe, "_piece", choice.choice([40, 200]))
        pieces = list(bpe.pieces([string[:100], "", string[100:]]))
        assert "".join(pieces) == string
        assert pieces == list(bpe.pieces([string]))
        if all(before[-1].isalpha() and after[0] == " " for before, after in itertools.pairwise(pieces)):
            assert bpe.encode(string) == whole
            compared += 1
    assert compared > 30  # the others had a stretch without a space to cut at


def test_a_line_without_spaces_is_cut_all_the_same(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "_piece", 50)
    pieces = list(bpe.pieces(["x" * 1000]))
    assert max(map(len, pieces)) == 50
    assert bpe.decode(bpe.encode("x" * 1000)) == "x" * 1000


def pretrained(folder: Path, **changes: object) -> Path:
    """A word-level tokenizer.json as others make them: with truncation, padding and an opening special token."""
    vocabulary = {"[UNK]": 0, "sea": 1, "ship": 2, "[BOS]": 3}
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[BOS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"[BOS]": {"id": "[BOS]", "ids": [3], "tokens": ["[BOS]"]}},
    }
    specification = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[UNK]",
        },
        "added_tokens": [{"id": 3, "content": "[BOS]", **added}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": template,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(specification))
    return folder


def test_a_pretrained_tokenizer_neither_cuts_nor_pads_nor_adds(tmp_path: Path) -> None:
    assert Tokenizer.load(pretrained(tmp_path)).encode("sea ship sea") == [1, 2, 1]


def test_a_pretrained_tokenizer_without_an_end_of_text_gets_one_and_keeps_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(pretrained(tmp_path / "theirs"))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (4, 5)
    (tmp_path / "ours").mkdir()
    again = Tokenizer.load(tokenizer.save(tmp_path / "ours"))
    assert (again.end_of_text, again.vocab_size, again.sha256) == (4, 5, tokenizer.sha256)


def test_a_pretrained_tokenizer_keeps_its_own_end_of_text(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "sea": 1, "[BOS]": 3, "</s>": 9}, "unk_token": "[UNK]"}
    tokenizer = Tokenizer.load(pretrained(tmp_path, model=model))
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (9, 10)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
ADDED = {"id": 320, "content": "sea", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}


def changed(bpe: Tokenizer, folder: Path, *, model: Mapping[str, Any] = {}, **changes: object) -> Tokenizer:
    """A BPE with other parts."""
    file = bpe.save(folder)
    assert file is not None
    specification = json.loads(file.read_text())
    model = specification["model"] | model
    file.write_text(json.dumps(specification | {"model": model} | changes))
    return Tokenizer.load(file)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"post_processor": BYTE_LEVEL},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}]}},
    ],
    ids=["GPT-2's", "with offsets", "an empty normalizer", "Llama 3's"],
)
def test_a_byte_level_bpe_keeps_every_byte(bpe: Tokenizer, tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = changed(bpe, tmp_path, **changes)
    assert tokenizer.keeps_text and Tokenizer.plain_bytes().keeps_text
    for string in ("", " ", "  a \r\n\t b ", "e\u0301 é ﬁ \u00a0", "\0\x7f😀", "A a", "<|endoftext|>"):
        assert tokenizer.decode(tokenizer.encode(string)) == string


@pytest.mark.parametrize(
    ("changes", "one", "other"),
    [
        ({"normalizer": {"type": "NFKC"}}, "ﬁsh", "fish"),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "a ", "a"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, " a", "a"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Removed"}, BYTE_LEVEL]}},
            "a b",
            "a  b",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}, "a b", "a\nb"),
        ({"model": {"vocab": {"a": 0}, "merges": []}}, "ab", "a"),
        ({"model": {"continuing_subword_prefix": "#", "vocab": {"a": 0}, "merges": []}}, "ab", "a"),
        ({"added_tokens": [ADDED | {"special": False}]}, "a sea", "asea"),
    ],
)
def test_a_tokenizer_that_makes_two_texts_one_is_known(
    bpe: Tokenizer, tmp_path: Path, changes: dict[str, Any], one: str, other: str
) -> None:
    tokenizer = changed(bpe, tmp_path, **changes)
    assert tokenizer.encode(one) == tokenizer.encode(other)
    assert not tokenizer.keeps_text


@pytest.mark.parametrize("content", [None, "{", "[]", "\udcff"])
def test_a_file_that_is_no_tokenizer_is_named_in_one_sentence(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_what_a_tokenizer_would_leave_to_chance_is_switched_off(tmp_path: Path) -> None:
    whole = Tokenizer.train_bpe([text(seed) for seed in range(20)], 320)
    file = whole.save(tmp_path)
    assert file is not None
    specification = json.loads(file.read_text())
    specification["model"]["dropout"] = 0.5
    file.write_text(json.dumps(specification))
    found = Tokenizer.load(file)
    assert all(found.encode(text(seed)) == whole.encode(text(seed)) for seed in range(30))
    assert found.sha256 == whole.sha256


def test_plain_bytes_are_the_same_tokenizer_in_every_version() -> None:
    """It is in the fingerprint of data read with an exported byte run: another one would make an import another corpus."""
    digest = hashlib.sha256(json.dumps(bytes_specification(), sort_keys=True).encode()).hexdigest()
    assert digest == "553bc02aea85fbfdc36b107cb9282679a18b0879d4b0aee273652dcb0732008d"
