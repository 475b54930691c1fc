"""Text in another encoding is refused with the command that makes it UTF-8, and the command does."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.errors import UserError
from tests.data.test_local import everything, prepared, write_parquet

FRENCH = "« L’été à Besançon », dit-il, « fut très court ; l’hiver, où ? » Il mangea du pâté et du maïs.\n"
CURLY = "“It’s a naïve café,” he said — “the cost: €5 …”\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
ENGLISH = "A plain line of English text, without a letter that is not ASCII.\n"
CHINESE = "话说天下大势,分久必合,合久必分。\n"


@pytest.mark.parametrize("name", ["a.txt", "it's a.md", "a.txt.gz"])
@pytest.mark.parametrize(
    ("text", "codec", "said"),
    [
        (FRENCH, "utf-16", "UTF-16"),
        (ENGLISH, "utf-16", "UTF-16"),
        (CHINESE, "utf-16", "UTF-16"),
        (ENGLISH, "utf-16-le", "UTF-16LE"),
        (FRENCH, "utf-16-be", "UTF-16BE"),
        (FRENCH, "utf-32", "UTF-32"),
        (ENGLISH, "utf-32-le", "UTF-32LE"),
        (FRENCH.replace("’", "'"), "latin-1", "ISO-8859-1"),
        (CURLY, "cp1252", "CP1252"),
        (FRENCH, "cp1252", "CP1252"),
        (CURLY, "mac-roman", "MACINTOSH"),
        (FRENCH.replace("’", "'"), "cp850", "CP850"),
        (RUSSIAN, "cp1251", "CP1251"),
        (RUSSIAN, "koi8-r", "KOI8-R"),
    ],
)
def test_the_encoding_is_said_and_the_command_gives_the_text(
    tmp_path: Path, text: str, codec: str, said: str, name: str
) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("this machine has no iconv")
    file, text = tmp_path / "texts" / name, (ENGLISH + text) * 40
    file.parent.mkdir()
    data = text.encode(codec)
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=f"its bytes are {said}: convert it") as refused:
        prepared(tmp_path, file)
    command = str(refused.value).partition("convert it with `")[2].partition("`")[0]
    subprocess.run(["sh", "-c", command], check=True)
    assert "".join(everything(prepared(tmp_path, file))) == text
    assert [path.name for path in file.parent.iterdir()] == [name]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("这本书很好看。".encode("gb18030") * 50, "its bytes show no encoding: find out"),
        ("naïve café — ".encode() * 50 + b"\xff" + "été".encode(), "UTF-8 with damaged bytes: take a whole copy"),
        (gzip.compress(str(list(range(900))).encode()), r"it is packed by gzip: let its name end in \.gz"),
        (b"PK\x03\x04\xff\xfe rest" * 50, "it is a zip file and no text"),
        (b"%PDF-1.7\n\xe2\xe3\xcf\xd3\n" * 50, "it is a PDF file and no text"),
    ],
)
def test_where_no_command_is_right_none_is_given(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=words) as refused:
        prepared(tmp_path, tmp_path / "a.txt")
    assert "`iconv -f" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_text_with_a_zero_character_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    texts, file = ["one é", "two\0 more", "three"], tmp_path / name
    place = {"a.txt": "a.txt has at byte 10 ", "a.jsonl": "a.jsonl:2 holds ", "a.parquet": r"a.parquet \(row 1\) holds "}
    if name == "a.txt":
        file.write_text("\n".join(texts))
    elif name == "a.jsonl":
        file.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    else:
        write_parquet(file, list(texts))
    with pytest.raises(UserError, match=f"{place[name]}a character NUL"):
        prepared(tmp_path, file)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "cp1252"])
def test_json_lines_in_another_encoding_are_named_with_the_command(tmp_path: Path, codec: str) -> None:
    if shutil.which("iconv") is None:
        pytest.skip("this machine has no iconv")
    rows, file = [f"{number}: {CURLY}" for number in range(40)], tmp_path / "a.jsonl"
    file.write_bytes("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows).encode(codec))
    with pytest.raises(UserError, match=r"a\.jsonl:1 .*its bytes are (UTF-16|UTF-16LE|CP1252): convert it") as refused:
        prepared(tmp_path, file)
    subprocess.run(["sh", "-c", str(refused.value).partition("convert it with `")[2].partition("`")[0]], check=True)
    assert sorted(everything(prepared(tmp_path, file))) == sorted(rows)


def test_bytes_of_another_encoding_in_parquet_are_named_with_their_row(tmp_path: Path) -> None:
    import pyarrow.parquet

    values = [*(b"plain" for _ in range(5000)), CURLY.encode("cp1252"), b"more"]
    offsets = pyarrow.array([0, *itertools.accumulate(map(len, values))], pyarrow.int32())
    column = pyarrow.StringArray.from_buffers(
        len(values), offsets.buffers()[1], pyarrow.py_buffer(b"".join(values))
    )  # unchecked, as other writers do
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet \(row 5000\) is not UTF-8 in 'text' \(byte 0\); its bytes are CP1252"):
        prepared(tmp_path, tmp_path / "a.parquet")
