"""The user's own files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from harness.config.schema import TokenizerConfig
from harness.data import PreparedData, prepare
from harness.errors import UserError
from tests.support.corpora import BPE, BYTES, documents_of, folder_of_texts, local, text

SPLITS = ["train", "validation", "test"]


def prepared(tmp_path: Path, path: Path | str, **fields: object) -> PreparedData:
    return prepare(local(path, **fields), BYTES, tmp_path / "data", progress=False)


def everything(data: PreparedData) -> list[str]:
    return [document for split in data.splits for document in documents_of(data, split)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> None:
    path.write_text("".join(json.dumps({"id": number, field: one}) + "\n" for number, one in enumerate(texts)))


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=7)


def test_text_markdown_json_lines_and_parquet_are_read_together(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a text\n")
    (folder / "deep/b.md").write_text("# Markdown\r\n")
    write_jsonl(folder / "c.jsonl", ["one line", "naïve 海"])
    write_parquet(folder / "d.parquet", [f"row {number}" for number in range(20)])
    (folder / "ignored.csv").write_text("1,2")
    (folder / ".hidden.txt").write_text("hidden")
    data = prepared(tmp_path, folder)
    rows = [f"row {number}" for number in range(20)]
    assert sorted(everything(data)) == sorted(["a text\n", "# Markdown\r\n", "one line", "naïve 海", *rows])


def test_a_glob_takes_what_it_matches(tmp_path: Path) -> None:
    texts = folder_of_texts(tmp_path / "texts", 12)
    data = prepared(tmp_path, f"{tmp_path}/texts/00*.txt", validation_fraction=0.1, test_fraction=0.1)
    assert sorted(everything(data)) == sorted(one for name, one in texts.items() if name.startswith("00"))


def test_files_named_for_splits_make_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00002.parquet", ["t0", "t1"])
    write_parquet(folder / "train-00001-of-00002.parquet", ["t2"])
    (folder / "valid.txt").write_text("v0")
    write_jsonl(folder / "test.jsonl", ["e0", "e1"])
    (folder / "README.md").write_text("about this data")
    data = prepared(tmp_path, folder)
    assert [documents_of(data, split) for split in SPLITS] == [["t0", "t1", "t2"], ["v0"], ["e0", "e1"]]
    (folder / "more.md").write_text("of no split")
    assert documents_of(prepared(tmp_path, folder), "train") == ["t0", "t1", "t2"]
    assert capsys.readouterr().err.splitlines() == [
        "local: 4 files read, 1 left out: README.md (it describes the others)",
        "local: 4 files read, 2 left out: more.md (its name says no split, others' do); README.md (it describes the others)",
    ]


def test_folders_named_for_splits_make_the_splits(tmp_path: Path) -> None:
    for split in SPLITS:
        folder_of_texts(tmp_path / "texts" / split, 3)
    data = prepared(tmp_path, tmp_path / "texts")
    assert [data.splits[split].n_documents for split in SPLITS] == [3, 3, 3]


def test_a_word_in_a_name_is_not_a_split(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("test-driven-design.md", "training-plan.md", "devices.md", "a.md"):
        (folder / name).write_text(f"{name} says nothing")
    assert sum(split.n_documents for split in prepared(tmp_path, folder).splits.values()) == 4


def test_a_missing_split_is_carved_from_the_training_files(tmp_path: Path) -> None:
    folder = tmp_path / "named"
    folder.mkdir()
    texts = [text(seed) for seed in range(50)]
    write_jsonl(folder / "train.jsonl", texts)
    write_jsonl(folder / "validation.jsonl", ["the given one"])
    data = prepared(tmp_path, folder, test_fraction=0.1)
    assert documents_of(data, "validation") == ["the given one"]
    assert data.splits["test"].n_documents == 5
    assert sorted(documents_of(data, "train") + documents_of(data, "test")) == sorted(texts)


def test_the_carved_splits_have_their_sizes_and_follow_the_seed_alone(tmp_path: Path) -> None:
    texts = [text(seed) for seed in range(200)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    a, b = (prepared(tmp_path, tmp_path / f"{name}.jsonl") for name in "ab")
    other = prepared(tmp_path, tmp_path / "a.jsonl", split_seed=1)
    for split, size in (("validation", 10), ("test", 10), ("train", 180)):
        assert a.splits[split].n_documents == size
        assert sorted(documents_of(a, split)) == sorted(documents_of(b, split))
        assert sorted(documents_of(a, split)) != sorted(documents_of(other, split))


def test_equal_documents_are_never_in_two_splits(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [text(seed % 30) for seed in range(300)])
    data = prepared(tmp_path, tmp_path / "a.jsonl", validation_fraction=0.3, test_fraction=0.3)
    sets = [set(documents_of(data, split)) for split in SPLITS]
    assert sum(map(len, sets)) == len(set().union(*sets)) == 30


def test_few_documents_still_fill_every_split(tmp_path: Path) -> None:
    folder_of_texts(tmp_path / "texts", 3)
    data = prepared(tmp_path, tmp_path / "texts")
    assert [data.splits[split].n_documents for split in SPLITS] == [1, 1, 1]


def test_too_few_documents_for_the_splits_are_refused(tmp_path: Path) -> None:
    folder_of_texts(tmp_path / "texts", 2)
    with pytest.raises(UserError, match=r"2 distinct documents, too few .*test_fraction to 0"):
        prepared(tmp_path, tmp_path / "texts")
    data = prepared(tmp_path, tmp_path / "texts", test_fraction=0)
    assert {split: data.splits[split].n_documents for split in data.splits} == {"train": 1, "validation": 1}


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_single_document_is_cut_by_position(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = "".join(f"{seed} é {text(seed, 8)}\n" for seed in range(400))
    file = tmp_path / f"one.{suffix}"
    if suffix == "txt":
        file.write_text(whole)
    elif suffix == "jsonl":
        write_jsonl(file, [whole])
    else:
        write_parquet(file, [whole])
    data = prepared(tmp_path, file)
    assert "a single document, cut by position" in capsys.readouterr().err
    assert "".join(everything(data)) == whole
    sizes = [data.splits[split].n_bytes / len(whole.encode()) for split in SPLITS]
    assert np.allclose(sizes, [0.9, 0.05, 0.05], atol=0.01)
    assert all(part.endswith("\n") for part in everything(data))


def test_one_huge_line_is_read_and_cut_between_characters(tmp_path: Path) -> None:
    whole = "海é" * 300_000
    (tmp_path / "line.txt").write_text(whole, encoding="utf-8")
    data = prepared(tmp_path, tmp_path / "line.txt")
    assert "".join(everything(data)) == whole
    assert sum(split.n_words for split in data.splits.values()) == 3


@pytest.mark.parametrize("name", ["empty.txt", "empty.md", "empty.jsonl", "empty.parquet", "train.txt", "folder"])
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_a_file_or_folder_without_text_is_said_to_hold_none(
    tmp_path: Path, name: str, tokenizer: TokenizerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "empty.txt").touch()
        (path / "blank.md").write_text(" \n\n")
    elif path.suffix == ".parquet":
        write_parquet(path, [None, ""])
    else:
        path.touch()
    with pytest.raises(UserError) as refused:
        prepare(local(path), tokenizer, tmp_path / "data", progress=False)
    assert str(refused.value) == f"dataset.path={path} holds no text: name a file or a folder that does"
    assert capsys.readouterr().err == ""
    assert not [file for file in (tmp_path / "data").iterdir() if file.is_dir()]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_file_named_for_a_split_that_holds_no_text_is_said_to(tmp_path: Path, split: str) -> None:
    folder_of_texts(tmp_path / "texts", 0)
    for each in ("train", "validation", "test"):
        (tmp_path / "texts" / f"{each}.txt").write_text("" if each == split else "the sea")
    with pytest.raises(UserError, match=rf"the files named for {split} hold no text: give them some, or take them away"):
        prepare(local(tmp_path / "texts"), BYTES, tmp_path / "data", progress=False)
    (tmp_path / "texts" / f"{split}.txt").unlink()
    (tmp_path / "texts" / "train.txt").write_text("the sea\n" * 99)
    assert split in prepare(local(tmp_path / "texts"), BYTES, tmp_path / "data", progress=False).splits


def test_a_single_document_too_short_to_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("word\n")
    with pytest.raises(UserError, match="one document too short to give a validation part"):
        prepared(tmp_path, tmp_path / "one.txt")


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    texts = folder_of_texts(folder, 5)
    (folder / "empty.txt").write_text("")
    (folder / "blank.md").write_text(" \n\t\n" * 300_000)
    write_jsonl(folder / "lines.jsonl", ["", "  ", "kept"])
    with (folder / "lines.jsonl").open("a") as file:
        file.write('\n\n{"text": null}\n')
    write_parquet(folder / "rows.parquet", [None, "", "kept too"])
    assert sorted(everything(prepared(tmp_path, folder))) == sorted([*texts.values(), "kept", "kept too"])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    texts = folder_of_texts(folder, 3)
    (folder / "bom.txt").write_text("after the mark", encoding="utf-8-sig")
    assert sorted(everything(prepared(tmp_path, folder))) == sorted([*texts.values(), "after the mark"])


def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(b"x" * (1 << 20) + "naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"train.txt is not UTF-8 \(byte 1048578\).*iconv"):
        prepared(tmp_path, tmp_path / "train.txt", validation_fraction=0, test_fraction=0)


def test_a_text_cut_off_within_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes("abc é".encode()[:-1])
    with pytest.raises(UserError, match=r"not UTF-8 \(byte 4\)"):
        prepared(tmp_path, tmp_path / "train.txt", validation_fraction=0, test_fraction=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "a.jsonl:2 is not a line of JSON"),
        ('{"text": "a"}\n["b"]\n', "a.jsonl:2 is not a JSON object"),
        ('{"content": "a", "id": 1}\n', r"no text in 'text' \(its fields: content, id\): set dataset.text_column"),
        ('{"text": 5}\n', "no text in 'text'"),
        ('{"text": "half \\ud800 pair"}\n', r"a.jsonl:1 holds half of a surrogate pair, which is no text: correct it"),
        ("", "a.jsonl holds no text: name a file or a folder that does"),
    ],
)
def test_wrong_json_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, tmp_path / "a.jsonl", validation_fraction=0, test_fraction=0)


def test_the_text_may_stand_in_another_field(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["x", "y", "z"], field="body")
    write_parquet(tmp_path / "b.parquet", ["x", "y", "z"], column="body")
    for name in ("a.jsonl", "b.parquet"):
        assert sorted(everything(prepared(tmp_path, tmp_path / name, text_column="body"))) == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"no column 'text', but id, body: set dataset.text_column"):
        prepared(tmp_path, tmp_path / "b.parquet")


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"a.parquet cannot be read as parquet"):
        prepared(tmp_path, tmp_path / "a.parquet")


def test_a_kind_of_file_that_is_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UserError, match=r"has no .txt, .md, .jsonl, .parquet file"):
        prepared(tmp_path, tmp_path / "a.docx")


def test_test_files_without_training_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/test.txt").write_text("x")
    with pytest.raises(UserError, match="files named for test, but none for train"):
        prepared(tmp_path, tmp_path / "texts")


def test_a_file_with_another_hash_than_the_config_says_is_refused(tmp_path: Path) -> None:
    folder_of_texts(tmp_path / "texts", 4)
    with pytest.raises(UserError, match=r"001.txt is not the file that dataset.sha256 names"):
        prepared(tmp_path, tmp_path / "texts", sha256={"001.txt": "0" * 64})
