"""From documents to a folder of tokens: what is in it, and that it is whole or not there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.data import PreparedData, Tokenizer, open_prepared, prepare, verify_prepared
from harness.data.prepared import DamagedData
from harness.errors import UserError
from tests.support.corpora import BPE, BYTES, documents_of, folder_of_texts, local, text
from tests.support.prepare_in_subprocess import ROOT, prepare_in_subprocess


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    return folder_of_texts(tmp_path / "texts", 40)


def prepared(tmp_path: Path, tokenizer: TokenizerConfig = BYTES, **fields: object) -> PreparedData:
    return prepare(local(tmp_path / "texts", **fields), tokenizer, tmp_path / "data", progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_every_document_comes_back_from_its_tokens(tmp_path: Path, texts: dict[str, str], tokenizer: TokenizerConfig) -> None:
    data = prepared(tmp_path, tokenizer)
    assert list(data.splits) == ["train", "validation", "test"]
    back = [document for split in data.splits for document in documents_of(data, split)]
    assert sorted(back) == sorted(texts.values())


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_the_counts_are_those_of_the_text(tmp_path: Path, texts: dict[str, str], tokenizer: TokenizerConfig) -> None:
    data = prepared(tmp_path, tokenizer)
    for name, split in data.splits.items():
        documents = documents_of(data, name)
        assert split.document_bytes.tolist() == [len(document.encode()) for document in documents]
        assert split.document_words.tolist() == [len(document.split()) for document in documents]
        assert split.n_documents == len(documents)
        assert split.n_bytes == sum(split.document_bytes)
        assert split.n_words == sum(split.document_words)
        assert split.document_starts[0] == 0
        assert split.document_starts[-1] == split.n_tokens == len(split.tokens)
        ends = split.document_starts[1:] - 1
        assert (np.flatnonzero(split.tokens == data.meta["end_of_text"]) == ends).all()


def test_the_tokens_of_a_document_are_those_of_encoding_it_alone(tmp_path: Path, texts: dict[str, str]) -> None:
    data = prepared(tmp_path, BPE)
    tokenizer = Tokenizer.load(data.tokenizer_file)
    first = data.splits["train"].tokens[: data.splits["train"].document_starts[1] - 1].tolist()
    assert first in [tokenizer.encode(document) for document in texts.values()]


def test_a_long_document_is_encoded_in_pieces_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    long = "\n".join(text(seed, 400) for seed in range(60)) + " " + "x" * 70_000 + " end"
    (tmp_path / "texts/train.txt").write_text(long)
    data = prepared(tmp_path, BPE, validation_fraction=0, test_fraction=0)
    assert documents_of(data, "train") == [long]
    assert data.splits["train"].n_words == len(long.split())
    assert data.splits["train"].n_bytes == len(long.encode())


def test_special_tokens_in_a_text_do_not_end_it(tmp_path: Path, texts: dict[str, str]) -> None:
    (tmp_path / "texts/000.txt").write_text("before <|endoftext|> after")
    data = prepared(tmp_path, BPE)
    for split in data.splits.values():
        assert (np.asarray(split.tokens) == data.meta["end_of_text"]).sum() == split.n_documents


def test_a_vocabulary_above_65536_takes_32_bits(tmp_path: Path, texts: dict[str, str]) -> None:
    vocabulary = {"[UNK]": 0, "</s>": 70_000, "sea": 69_999}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    file = tmp_path / "tokenizer.json"
    file.write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None,
                "decoder": None,
                "model": model,
            }
        )
    )
    data = prepared(tmp_path, TokenizerConfig(name="pretrained", path=str(file)))
    assert data.splits["train"].tokens.dtype == np.uint32
    assert data.vocab_size == 70_001
    assert set(np.unique(data.splits["train"].tokens)) == {0, 69_999, 70_000}


def test_preparing_again_opens_what_is_there(tmp_path: Path, texts: dict[str, str]) -> None:
    first = prepared(tmp_path, BPE)
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    second = prepared(tmp_path, BPE)
    assert second.folder == first.folder and second.fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in first.folder.iterdir()} == before


def test_two_machines_prepare_the_same_bytes(tmp_path: Path, texts: dict[str, str]) -> None:
    first = prepared(tmp_path, BPE)
    shutil.copytree(tmp_path / "texts", tmp_path / "elsewhere")
    second = prepare(local(tmp_path / "elsewhere"), BPE, tmp_path / "data2", progress=False)
    assert second.folder.name == first.folder.name
    assert contents(second.folder) == contents(first.folder)


def test_whatever_shapes_the_tokens_changes_the_folder(tmp_path: Path, texts: dict[str, str]) -> None:
    folders = {
        prepared(tmp_path, BPE).folder,
        prepared(tmp_path, BYTES).folder,
        prepared(tmp_path, TokenizerConfig(name="bpe", vocab_size=300)).folder,
        prepared(tmp_path, max_tokens=5000).folder,
        prepared(tmp_path, split_seed=1).folder,
        prepared(tmp_path, test_fraction=0.2).folder,
    }
    (tmp_path / "texts/003.txt").write_text("another text")
    folders.add(prepared(tmp_path, BYTES).folder)
    assert len(folders) == 7


def test_the_fingerprint_is_of_the_tokens(tmp_path: Path, texts: dict[str, str]) -> None:
    first = prepared(tmp_path, BYTES)
    (tmp_path / "texts/empty.txt").write_text(" \n")  # another source, the same tokens
    second = prepared(tmp_path, BYTES)
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint
    assert prepared(tmp_path, BYTES, split_seed=1).fingerprint != first.fingerprint


def test_nothing_in_the_folder_names_this_machine(tmp_path: Path, texts: dict[str, str]) -> None:
    for tokenizer in (BPE, TokenizerConfig(name="pretrained", path=str(prepared(tmp_path, BPE).tokenizer_file))):
        for name, content in contents(prepared(tmp_path, tokenizer).folder).items():
            assert str(tmp_path).encode() not in content, name


@pytest.mark.parametrize("limit", [2, 3, 100, 1001, 2500])
@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=["bpe", "bytes"])
def test_the_cap_holds_to_the_token_and_leaves_the_other_splits_alone(
    tmp_path: Path, texts: dict[str, str], tokenizer: TokenizerConfig, limit: int
) -> None:
    whole, capped = prepared(tmp_path, tokenizer), prepared(tmp_path, tokenizer, max_tokens=limit)
    split = capped.splits["train"]
    # A document may lose its last token or two, where the room left is for an end of text only.
    assert limit - 1 <= split.n_tokens <= limit
    assert split.tokens[-1] == capped.meta["end_of_text"]
    documents = documents_of(capped, "train")
    full = documents_of(whole, "train")
    assert documents[:-1] == full[: len(documents) - 1]
    assert full[len(documents) - 1].startswith(documents[-1].rstrip("\ufffd"))
    assert split.document_bytes[-1] == len(documents[-1].rstrip("\ufffd").encode())
    assert documents_of(capped, "test") == documents_of(whole, "test")


@pytest.mark.parametrize("progress", [True, False])
def test_a_bpe_of_a_large_source_is_trained_on_its_beginning(
    tmp_path: Path, progress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("harness.data.prepare"), "_BPE_BYTES", 1000)
    (tmp_path / "texts").mkdir()
    for number, words in enumerate(["aaaa " * 200, "aaaa " * 200, "bbbb " * 200]):
        (tmp_path / f"texts/{number}.txt").write_text(words)
    dataset = local(tmp_path / "texts", validation_fraction=0, test_fraction=0)
    tokenizer = TokenizerConfig(name="bpe", vocab_size=262)
    data = prepare(dataset, tokenizer, tmp_path / "data", progress=progress)
    assert data.meta["tokenizer"]["trained_on_first_bytes"] == 1000
    assert len(Tokenizer.load(data.tokenizer_file).encode("bbbb")) == 4


def test_the_tokenizer_file_of_the_same_data_opens_that_data(tmp_path: Path, texts: dict[str, str]) -> None:
    trained = prepared(tmp_path, BPE)
    (tmp_path / "run").mkdir()
    file = Path(shutil.copy(trained.tokenizer_file or "", tmp_path / "run"))
    for dataset in (local(tmp_path / "texts"), local(trained.folder)):
        again = prepare(dataset, BPE, tmp_path / "data", tokenizer_file=file, progress=False)
        assert again.folder == trained.folder
    shutil.rmtree(trained.folder)
    rebuilt = prepare(local(tmp_path / "texts"), BPE, tmp_path / "data", tokenizer_file=file, progress=False)
    assert rebuilt.fingerprint == trained.fingerprint


def test_a_tokenizer_file_replaces_the_configured_tokenizer(tmp_path: Path, texts: dict[str, str]) -> None:
    trained = prepared(tmp_path, BPE)
    folder_of_texts(tmp_path / "others", 10, words=30)
    other = prepare(
        local(tmp_path / "others", validation_fraction=0.2, test_fraction=0.2),
        BYTES,
        tmp_path / "data",
        tokenizer_file=trained.tokenizer_file,
        progress=False,
    )
    assert other.vocab_size == trained.vocab_size
    assert other.meta["tokenizer"]["sha256"] == trained.meta["tokenizer"]["sha256"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_needs_no_training_split_and_training_does(tmp_path: Path, texts: dict[str, str], split: str) -> None:
    trained = prepared(tmp_path, BPE)
    file = tmp_path / "another" / f"{split}.txt"
    file.parent.mkdir()
    file.write_text("the sea and the ship")
    dataset, data_dir = local(file), tmp_path / "data"
    with_a_file = prepare(dataset, BPE, data_dir, tokenizer_file=trained.tokenizer_file, progress=False)
    with_bytes = prepare(dataset, BYTES, data_dir, for_training=False, progress=False)
    for data in (with_a_file, with_bytes):
        assert list(data.splits) == [split]
        assert documents_of(data, split) == ["the sea and the ship"]
    again = prepare(local(with_a_file.folder), BPE, data_dir, tokenizer_file=trained.tokenizer_file, progress=False)
    assert again.folder == with_a_file.folder
    pretrained = TokenizerConfig(name="pretrained", path=str(trained.tokenizer_file))
    for tokenizer in (BPE, BYTES, pretrained):
        with pytest.raises(UserError, match=f"has files named for {split}, but none for train"):
            prepare(dataset, tokenizer, data_dir, progress=False)
    with pytest.raises(UserError, match="has no text to train on"):
        prepare(local(with_bytes.folder), BYTES, data_dir, progress=False)


def test_training_refuses_what_an_evaluation_prepared_from_a_blank_training_file(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, content in (("train", " \n"), ("validation", "the sea"), ("test", "a ship")):
        (tmp_path / f"texts/{name}.txt").write_text(content)
    dataset = local(tmp_path / "texts")
    assert list(prepare(dataset, BYTES, tmp_path / "data", for_training=False, progress=False).splits) == ["validation", "test"]
    with pytest.raises(UserError, match="has no text to train on"):
        prepared(tmp_path, BYTES)


def test_an_evaluation_finds_the_folder_that_training_prepared(tmp_path: Path, texts: dict[str, str]) -> None:
    for tokenizer in (BYTES, BPE):
        trained = prepared(tmp_path, tokenizer)
        again = prepare(
            local(tmp_path / "texts"),
            tokenizer,
            tmp_path / "data",
            tokenizer_file=trained.tokenizer_file,
            for_training=False,
            progress=False,
        )
        assert again.folder == trained.folder
    assert len([path for path in (tmp_path / "data").iterdir() if path.is_dir()]) == 2


def test_the_bpe_has_seen_the_training_split_only(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.txt").write_text("aaaa bbbb " * 300)
    for split in ("validation", "test"):
        (tmp_path / f"texts/{split}.txt").write_text("qzqzqz " * 300)
    data = prepared(tmp_path, TokenizerConfig(name="bpe", vocab_size=265))
    assert len(Tokenizer.load(data.tokenizer_file).encode("qzqzqz")) == 6
    assert len(Tokenizer.load(data.tokenizer_file).encode("aaaa")) == 1


@pytest.mark.parametrize("name", ["train.bin", "test.bin", "validation.words.npy", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_folder_is_refused_by_name_and_built_again(
    tmp_path: Path, texts: dict[str, str], name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = prepared(tmp_path, BPE)
    before = contents(whole.folder)
    file = whole.folder / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DamagedData, match=name):
        open_prepared(whole.folder)
    again = prepared(tmp_path, BPE)
    assert name in capsys.readouterr().err
    assert again.folder == whole.folder
    assert contents(again.folder) == before
    assert [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()] == [whole.folder.name]


@pytest.mark.parametrize("instead", ["link", "link that leads nowhere", "file"])
def test_a_link_or_file_in_a_prepared_folders_place_is_replaced(tmp_path: Path, texts: dict[str, str], instead: str) -> None:
    whole, elsewhere = prepared(tmp_path), tmp_path / "elsewhere"
    before = contents(whole.folder)
    for _ in range(2):
        if instead == "file":
            shutil.rmtree(whole.folder)
            whole.folder.touch()
        else:  # to another disk, where the data were hurt, or which is not there now
            whole.folder.rename(elsewhere)
            whole.folder.symlink_to(elsewhere)
            (elsewhere / "meta.json").unlink()
            if instead != "link":
                shutil.rmtree(elsewhere)
        assert contents(prepared(tmp_path).folder) == before and not whole.folder.is_symlink()
        assert [path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".lock"] == [whole.folder.name]
        if instead == "link":
            assert {*contents(elsewhere)} == {*before} - {"meta.json"}
            shutil.rmtree(elsewhere)


FLIPPED = ["train.bin", "test.bin", "validation.starts.npy", "train.bytes.npy", "train.words.npy", "tokenizer.json"]


def flip_a_byte(file: Path) -> None:
    """Another content of the same size, in the last third: a header stays whole."""
    content = bytearray(file.read_bytes())
    content[-len(content) // 3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", FLIPPED)
def test_other_content_of_the_same_size_is_found_on_demand_and_built_again(
    tmp_path: Path, texts: dict[str, str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = prepared(tmp_path, BPE)
    before = contents(whole.folder)
    verify_prepared(whole)
    flip_a_byte(whole.folder / name)
    with pytest.raises(UserError):
        verify_prepared(open_prepared(whole.folder))
    again = prepare(local(tmp_path / "texts"), BPE, tmp_path / "data", progress=False, verify=True)
    assert "Preparing it again" in capsys.readouterr().err
    assert contents(again.folder) == before


def move_one(file: Path) -> None:
    """Counts by document with the sum of before: of the first two documents one more and one less; of starts, the second."""
    counts = np.load(file, mmap_mode="r+")
    counts[:2] += (0, 1) if ".starts." in file.name else (1, -1)
    counts.flush()


@pytest.mark.parametrize("kind", ["starts", "bytes", "words"])
def test_counts_by_document_with_the_same_sum_are_other_content_and_older_folders_have_their_sums_alone(
    tmp_path: Path, texts: dict[str, str], kind: str
) -> None:
    whole = prepared(tmp_path)
    move_one(whole.folder / f"test.{kind}.npy")
    moved = open_prepared(whole.folder)
    assert moved.verified("validation").n_tokens == whole.splits["validation"].n_tokens
    for _ in range(2):
        with pytest.raises(DamagedData, match=rf"test\.{kind}\.npy has other content .*: delete {whole.folder} to have it"):
            moved.verified("test")
    meta = json.loads((whole.folder / "meta.json").read_text())
    for counts in meta["splits"].values():
        del counts["columns"]
    (whole.folder / "meta.json").write_text(json.dumps(meta))
    older = open_prepared(whole.folder)
    verify_prepared(older)
    assert older.fingerprint == prepared(tmp_path).fingerprint == whole.fingerprint


def test_the_fingerprint_is_of_tokens_and_tokenizer_and_nothing_else(tmp_path: Path, texts: dict[str, str]) -> None:
    data = prepared(tmp_path)
    tokens = {name: hashlib.sha256((data.folder / f"{name}.bin").read_bytes()).hexdigest() for name in data.splits}
    made_of = {"tokens": tokens, "tokenizer": data.meta["tokenizer"]["sha256"]}
    assert data.fingerprint == hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def test_other_texts_that_a_tokenizer_makes_the_same_have_other_fingerprints_if_counts_tell_them_apart(tmp_path: Path) -> None:
    made = prepare(local(folder_of(tmp_path, "a", "The ﬁsh is ﬁne")), BPE, tmp_path / "data", progress=False)
    specification = json.loads((made.folder / "tokenizer.json").read_text())
    steps = [{"type": "NFKC"}, {"type": "Lowercase"}]
    specification["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (tmp_path / "tokenizer.json").write_text(json.dumps(specification))
    tokenizer = TokenizerConfig(name="pretrained", path=str(tmp_path / "tokenizer.json"))
    texts = {"ligatures": "The ﬁsh is ﬁne", "letters": "The fish is fine", "small": "the fish is fine"}
    data = {
        name: prepare(local(folder_of(tmp_path, name, text)), tokenizer, tmp_path / "data", progress=False)
        for name, text in texts.items()
    }
    assert len({tuple(each.splits["train"].tokens) for each in data.values()}) == 1
    fingerprints = {name: each.fingerprint for name, each in data.items()}
    assert fingerprints["ligatures"] != fingerprints["letters"] == fingerprints["small"]
    for each in data.values():
        verify_prepared(open_prepared(each.folder))


def folder_of(tmp_path: Path, name: str, text: str) -> Path:
    """Its files, named for splits, hold the text, so that nothing is carved by a hash of it."""
    (folder := tmp_path / name).mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text(text)
    return folder


@pytest.mark.parametrize(
    "key", ["fingerprint", "sha256", "tokenizer", "split", "vocab_size", "end_of_text", "dataset", "identity"]
)
def test_a_meta_json_with_a_value_of_its_own_is_not_believed(
    tmp_path: Path, texts: dict[str, str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = prepared(tmp_path, BPE)
    before = contents(whole.folder)
    meta = json.loads(before["meta.json"])
    other = {
        "fingerprint": {"fingerprint": "0" * 64},
        "sha256": {"splits": meta["splits"] | {"test": meta["splits"]["test"] | {"sha256": "0" * 64}}},
        "tokenizer": {"tokenizer": meta["tokenizer"] | {"sha256": "0" * 64}},
        "split": {"splits": {split: counts for split, counts in meta["splits"].items() if split != "test"}},
        "vocab_size": {"vocab_size": meta["vocab_size"] + 1},
        "end_of_text": {"end_of_text": meta["end_of_text"] + 1},
        "dataset": {"dataset": "another"},
        "identity": {"identity": meta["identity"] | {"max_tokens": 10}},
    }[key]
    (whole.folder / "meta.json").write_text(json.dumps(meta | other))
    if key not in ("dataset", "identity"):  # which name the folder, and which a copy's owner may name as he likes
        with pytest.raises(DamagedData, match=r"meta\.json"):
            (opened := open_prepared(whole.folder)).tokenizer  # noqa: B018
            verify_prepared(opened)
    again = prepare(local(tmp_path / "texts"), BPE, tmp_path / "data", progress=False, verify=True)
    assert "Preparing it again" in capsys.readouterr().err
    assert contents(again.folder) == before


def test_after_a_killed_preparation_what_is_there_is_read_to_its_end(
    tmp_path: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = prepared(tmp_path, BYTES)
    before = contents(whole.folder)
    partial = tmp_path / "data" / f".{whole.folder.name}.4711.partial"
    for damage in (False, True):
        partial.mkdir()
        if damage:
            flip_a_byte(whole.folder / "train.bin")
        assert contents(prepared(tmp_path, BYTES).folder) == before
        assert not partial.exists()
        assert ("train.bin has other content" in capsys.readouterr().err) is damage


def test_a_copied_folder_with_other_content_is_refused_on_demand_and_left_as_it_is(
    tmp_path: Path, texts: dict[str, str]
) -> None:
    folder = prepared(tmp_path, BYTES).folder
    flip_a_byte(folder / "train.bin")
    before = contents(folder)
    remedy = rf"train\.bin has other content than meta.json says: copy {folder} again .*, or have dataset\.path name the text"
    with pytest.raises(DamagedData, match=remedy):
        prepare(local(folder), BYTES, tmp_path / "other", progress=False, verify=True)
    with pytest.raises(DamagedData, match=remedy):
        prepare(local(folder), BYTES, tmp_path / "other", progress=False).verified("train")
    (folder / "test.bin").unlink()
    with pytest.raises(DamagedData, match=r"test\.bin is missing: copy .* again .*, or have dataset\.path name the text"):
        prepare(local(folder), BYTES, tmp_path / "other", progress=False)
    del before["test.bin"]
    assert contents(folder) == before


def test_a_folder_of_an_older_format_is_built_again(tmp_path: Path, texts: dict[str, str]) -> None:
    folder = prepared(tmp_path).folder
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    with pytest.raises(DamagedData, match="format 0"):
        open_prepared(folder)
    assert prepared(tmp_path).meta["format"] == meta["format"]


REFUSED = r"data_dir=.* cannot be written \(.+\): choose another folder"


def test_a_data_dir_that_takes_no_files_is_refused_in_one_sentence(tmp_path: Path, texts: dict[str, str]) -> None:
    closed = Path("/sys")  # takes files from nobody, the superuser included, who may write wherever permissions forbid it
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o555)
    elif not closed.is_dir():
        pytest.skip("needs /sys, or a user whom permissions hold back")
    with pytest.raises(UserError, match=REFUSED) as refused:
        prepare(local(tmp_path / "texts"), BYTES, closed, progress=False)
    assert len(str(refused.value).splitlines()) == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=REFUSED):
        prepare(local(tmp_path / "texts"), BYTES, tmp_path / "file", progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not hold back the superuser")
def test_a_data_dir_that_became_read_only_opens_what_is_there_and_refuses_the_rest(
    tmp_path: Path, texts: dict[str, str]
) -> None:
    there = prepared(tmp_path, BYTES)
    shutil.rmtree(prepared(tmp_path, BPE).folder)  # its lock stays, and may be written
    (tmp_path / "data").chmod(0o555)
    try:
        assert prepared(tmp_path, BYTES).folder == there.folder
        with pytest.raises(UserError, match=REFUSED):
            prepared(tmp_path, BPE)
    finally:
        (tmp_path / "data").chmod(0o755)


SLOW_SOURCE = """
import time
from harness.data import prepared as writer
add = writer.SplitWriter.add
def slow(self, tokens, piece):
    time.sleep(0.05)
    print("writing", flush=True)
    add(self, tokens, piece)
writer.SplitWriter.add = slow
"""


def start_slowly(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that prepares tmp_path/texts, 0.05 s a document, and says when it writes."""
    code = f"""{SLOW_SOURCE}
from pathlib import Path
from harness.data import prepare
from harness.config.schema import DatasetConfig, TokenizerConfig
prepare(DatasetConfig(name="local", source="local", path={str(tmp_path / "texts")!r}), TokenizerConfig(name="bytes"),
        Path({str(tmp_path / "data")!r}), progress=False)
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_half_written_dataset_is_never_used(tmp_path: Path, texts: dict[str, str]) -> None:
    child = start_slowly(tmp_path)
    assert child.stdout is not None
    for _ in range(10):
        assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    folders = [path for path in (tmp_path / "data").iterdir() if path.is_dir()]
    assert [path.suffix for path in folders] == [".partial"]
    data = prepared(tmp_path)
    assert sorted(d for split in data.splits for d in documents_of(data, split)) == sorted(texts.values())
    assert [path for path in (tmp_path / "data").iterdir() if path.is_dir()] == [data.folder]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, texts: dict[str, str], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refused)
        with pytest.raises(UserError, match=rf"data cannot be written \({os.strerror(number)}\): make room"):
            prepared(tmp_path)
    assert [path for path in (tmp_path / "data").iterdir() if path.is_dir()] == []
    prepared(tmp_path)


def test_two_processes_that_prepare_the_same_data_get_the_same_folder(tmp_path: Path, texts: dict[str, str]) -> None:
    child = start_slowly(tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    started = time.monotonic()
    data = prepared(tmp_path)  # waits for the other one, and does not build
    assert time.monotonic() - started > 0.5
    assert child.stdout.read().count("writing") == 39
    assert child.wait() == 0
    assert sorted(d for split in data.splits for d in documents_of(data, split)) == sorted(texts.values())


def test_a_failed_preparation_leaves_nothing_behind(tmp_path: Path, texts: dict[str, str]) -> None:
    (tmp_path / "texts/zzz.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        prepared(tmp_path)
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


FORBID = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "pyarrow", "pandas", "huggingface_hub", "wandb", "transformers"):
            raise ModuleNotFoundError(f"{name} is not on this machine")
sys.meta_path.insert(0, Forbidden())
"""


def test_a_copied_folder_opens_where_there_is_no_source_and_no_library(tmp_path: Path, texts: dict[str, str]) -> None:
    data = prepared(tmp_path, BPE)
    shutil.copytree(data.folder, tmp_path / "copied")
    shutil.rmtree(tmp_path / "texts")
    shutil.rmtree(data.folder)
    answer = prepare_in_subprocess(local(tmp_path / "copied"), BPE, tmp_path / "data", {}, prelude=FORBID)
    assert answer.get("folder") == str(tmp_path / "copied"), answer
    assert "torch" not in answer["modules"]


@pytest.mark.parametrize(
    ("changes", "tokenizer", "field"),
    [({"name": "other"}, BPE, "dataset"), ({}, BYTES, "tokenizer"), ({"max_tokens": 10}, BPE, "max_tokens")],
)
def test_a_copied_folder_of_other_data_is_refused(
    tmp_path: Path, texts: dict[str, str], changes: dict[str, object], tokenizer: TokenizerConfig, field: str
) -> None:
    folder = prepared(tmp_path, BPE).folder
    wanted = dataclasses.replace(local(folder), **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"prepared with {field} "):
        prepare(wanted, tokenizer, tmp_path / "data", progress=False)


def peak_above_the_imports(source: Path, tokenizer: TokenizerConfig, data_dir: Path) -> float:
    """MB that preparing `source` in a process of its own adds to the memory that the program itself takes."""
    code = f"""
import numpy, tokenizers, tqdm
from pathlib import Path
from harness.data import prepare
from harness.config.schema import DatasetConfig, TokenizerConfig

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak()
prepare(DatasetConfig(name="local", source="local", path={str(source)!r}), TokenizerConfig(**{dataclasses.asdict(tokenizer)!r}),
        Path({str(data_dir)!r}), progress=False)
print(peak() - before)
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(child.stdout) / 1000


def write_shards(folder: Path, megabytes: int) -> Path:
    """Lines of JSON in four files, 2 kB a document, no two alike."""
    folder.mkdir()
    choice = random.Random(0)
    words = ["".join(choice.choices("etaoinshrdlu", k=choice.randrange(2, 9))) for _ in range(20_000)]
    endings = [" ".join(choice.choices(words, k=400)) for _ in range(200)]
    number = itertools.count()
    for shard in range(4):
        with (folder / f"part-{shard}.jsonl").open("w") as file:
            size = 0
            while size < megabytes * 250_000:
                size += file.write(f'{{"text": "{next(number)} {choice.choice(endings)}"}}\n')
    return folder


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")


@linux
def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (4, 24):
        file = tmp_path / f"{megabytes}.txt"
        line = (text(1, 200) + "\n").encode()
        file.write_bytes(line * (megabytes * 1_000_000 // len(line)))
        peaks.append(peak_above_the_imports(file, BYTES, tmp_path / "data"))
    assert peaks[1] - peaks[0] < 5, peaks  # MB; for 20 MB more of text


@linux
def test_a_corpus_several_times_the_ceiling_is_prepared_below_it(tmp_path: Path) -> None:
    assert peak_above_the_imports(write_shards(tmp_path / "texts", 80), BYTES, tmp_path / "data") < 25


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_large_corpus_and_a_line_of_100_megabytes_are_prepared_below_a_ceiling(
    tmp_path: Path, tokenizer: TokenizerConfig
) -> None:
    assert peak_above_the_imports(write_shards(tmp_path / "texts", 400), tokenizer, tmp_path / "data") < 150
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "line.txt").write_text(" ".join(["sea ship whale storm"] * 5_000_000))
    assert peak_above_the_imports(tmp_path / "line.txt", tokenizer, tmp_path / "data") < 150


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_document_more_takes_16_bytes_of_memory_at_most(tmp_path: Path) -> None:
    peaks = []
    for documents in (300_000, 1_000_000):
        lines = "".join(f'{{"text": "d{number}"}}\n' for number in range(documents))
        (tmp_path / f"{documents}.jsonl").write_text(lines)
        peaks.append(1e6 * peak_above_the_imports(tmp_path / f"{documents}.jsonl", BYTES, tmp_path / "data"))
    assert (peaks[1] - peaks[0]) / 700_000 < 16


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "message"),
    [
        ({"name": "a/b"}, {}, "dataset.name=a/b"),
        ({"source": "web"}, {}, "dataset.source=web is unknown.*hub, classic_books, linux, stdlib, synthetic, local"),
        ({"path": None}, {}, "needs dataset.path"),
        ({"path": "/nowhere/at/all"}, {}, "/nowhere/at/all does not exist"),
        ({"test_fraction": 1.0}, {}, "test_fraction=1.0 must lie"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, {}, "leave nothing to train on"),
        ({"max_tokens": 0}, {}, "max_tokens=0"),
        ({"source": "hub"}, {}, "hub_name=None must be OWNER/NAME.*hub_revision=None must be a commit"),
        ({"source": "hub", "hub_name": "a/b", "hub_revision": "main"}, {}, "hub_revision=main must be a commit"),
        ({}, {"name": "wordpiece"}, "tokenizer.name=wordpiece is unknown"),
        ({}, {"name": "bpe"}, "vocab_size=None must be at least 257"),
        ({}, {"name": "bpe", "vocab_size": 256}, "vocab_size=256 must be at least 257"),
        ({}, {"name": "bytes", "vocab_size": 500}, "no meaning for tokenizer=bytes"),
        ({}, {"name": "pretrained"}, "needs tokenizer.path"),
        ({}, {"name": "pretrained", "path": "./gone"}, "./gone does not exist"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(
    tmp_path: Path, texts: dict[str, str], dataset: dict[str, object], tokenizer: dict[str, object], message: str
) -> None:
    fields = {"name": "local", "source": "local", "path": str(tmp_path / "texts"), **dataset}
    settings = {"name": "bytes", **tokenizer}
    with pytest.raises(UserError, match=message):
        prepare(DatasetConfig(**fields), TokenizerConfig(**settings), tmp_path / "data", progress=False)  # type: ignore[arg-type]
    assert not (tmp_path / "data").exists() or not any(path.is_dir() for path in (tmp_path / "data").iterdir())


def test_the_summary_names_every_split(tmp_path: Path, texts: dict[str, str]) -> None:
    data = prepared(tmp_path)
    summary = data.summary()
    for name, split in data.splits.items():
        assert f"{name:<10} {split.n_documents:>11,} documents {split.n_tokens:>15,} tokens" in summary
    assert "1.00 bytes/token" in summary or "0.99 bytes/token" in summary
