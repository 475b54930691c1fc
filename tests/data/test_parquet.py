"""Columns of parquet files: nested ones, kinds that are no text, and dictionaries that stand for more than memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from harness.config.places import ROOT
from harness.data.parquet import read_parquet
from harness.errors import UserError
from tests.data.test_local import everything, prepared


def written(path: Path, **columns: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_field_of_a_struct_is_chosen_by_its_path_unless_a_column_has_that_name(tmp_path: Path) -> None:
    rows = [{"text": "a", "inner": {"body": "x"}}, None, {"text": None, "inner": None}, {"text": "b", "inner": {"body": "y"}}]
    file = written(tmp_path / "a.parquet", id=[1, 2, 3, 4], meta=rows)
    assert list(read_parquet(file, "meta.text")) == ["a", None, None, "b"]
    assert list(read_parquet(file, "meta.inner.body")) == ["x", None, None, "y"]
    both = written(tmp_path / "b.parquet", **{"meta": rows, "meta.text": ["1", "2", "3", "4"]})
    assert list(read_parquet(both, "meta.text")) == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match=r"no column 'text', .*set dataset.text_column to meta.text or meta.inner.body"):
        list(read_parquet(file, "text"))
    assert sorted(everything(prepared(tmp_path, file, text_column="meta.text", validation_fraction=0))) == ["a", "b"]


def test_a_field_of_an_object_in_json_lines_is_chosen_likewise(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"meta": {"text": "a", "n": 1}}\n{"meta.text": "b", "meta": {"text": "no"}}\n')
    found = prepared(tmp_path, tmp_path / "a.jsonl", text_column="meta.text", validation_fraction=0)
    assert sorted(everything(found)) == ["a", "b"]
    with pytest.raises(UserError, match=r"a.jsonl:1 has no text in 'meta.body' \(its fields: meta.text, meta.n\): set"):
        prepared(tmp_path, tmp_path / "a.jsonl", text_column="meta.body")
    with pytest.raises(UserError, match=r"a.jsonl:1 has no text in 'meta', but an object"):
        prepared(tmp_path, tmp_path / "a.jsonl", text_column="meta")


@pytest.mark.parametrize(
    ("values", "kind"),
    [([["a"], ["b"]], "list<"), ([b"a", b"b"], "binary"), ([1, 2], "int64"), ([{"x": "a"}, None], "struct<x: string>")],
)
def test_a_column_that_holds_no_text_is_said_to_hold_what_it_does(tmp_path: Path, values: object, kind: str) -> None:
    file = written(tmp_path / "a.parquet", text=values, body=["x", "y"])
    with pytest.raises(UserError, match=rf"holds {re.escape(kind)}.* in 'text', which is no text: set .* to .*body"):
        list(read_parquet(file, "text"))


def test_every_form_of_strings_is_text(tmp_path: Path) -> None:
    rows = ["a", None, "b", "a"]
    for number, kind in enumerate((pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string()))):
        file = written(tmp_path / f"{number}.parquet", text=pyarrow.array(rows, pyarrow.string()).cast(kind))
        assert list(read_parquet(file, "text")) == rows
    assert list(read_parquet(written(tmp_path / "n.parquet", text=pyarrow.nulls(3)), "text")) == [None] * 3


READ = """
import resource, sys
from pathlib import Path
from harness.data.parquet import read_parquet
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(len(text) for text in read_parquet(Path(sys.argv[1]), sys.argv[2])),
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("column", ["text", "meta.text"])
def test_a_dictionary_whose_rows_are_gigabytes_is_read_in_little_memory(tmp_path: Path, column: str) -> None:
    long, rows = "x" * 2_500_000, 1_000
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([long]))
    if column == "meta.text":
        texts = pyarrow.StructArray.from_arrays([texts], ["text"])
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({column.partition(".")[0]: texts}), file, compression="zstd")
    assert file.stat().st_size < 2_000
    done = subprocess.run([sys.executable, "-c", READ, file, column], cwd=ROOT, capture_output=True, text=True, check=True)
    characters, growth = map(int, done.stdout.split())
    assert characters == rows * len(long)
    assert growth * (1 if sys.platform == "darwin" else 1024) < 150e6


def test_a_text_longer_than_is_held_whole_is_refused_with_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.data.parquet.MOST_VALUE", 1_000)
    file = written(tmp_path / "a.parquet", text=["short", "x" * 1_001])
    with pytest.raises(UserError, match=r"a.parquet \(row 1\) has 1,001 bytes in 'text', more than 1,000: cut it"):
        list(read_parquet(file, "text"))
