"""Which files are a corpus: found by file, folder and glob; what is left out is said, what cannot be read is an error.

These tests may run as root, who reads everything: refusals of the system are made by a child that gives up its rights
(`as_nobody`), or, for a disk that fails, by an OSError from the real call.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from harness.config.places import ROOT
from harness.data import prepare
from harness.data.corpus_files import CorpusFile, find, opened
from harness.errors import UserError
from harness.files.hashes import file_sha256
from tests.data.test_local import everything, prepared, write_jsonl, write_parquet
from tests.support.corpora import BYTES, folder_of_texts, local, text

TEXTS = [text(seed) for seed in range(6)]


def packed(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    zstd = path.suffix.lower() == ".zst"
    path.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True) if zstd else gzip.compress(content))
    return path


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": one}) + "\n" for one in texts).encode()


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
def test_packed_files_and_suffixes_in_any_case_are_read(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "texts"
    packed(folder / f"a.jsonl{suffix}", lines_of(TEXTS[:2]))
    packed(folder / f"deep/b.txt{suffix}", TEXTS[2].encode())
    (folder / "C.TXT").write_text(TEXTS[3])
    (folder / "d.Md").write_text(TEXTS[4])
    write_parquet(folder / "e.PARQUET", [TEXTS[5]])
    assert sorted(everything(prepared(tmp_path, folder))) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz"])
def test_a_packed_document_is_cut_where_it_would_be_unpacked(tmp_path: Path, suffix: str) -> None:
    whole = "".join(f"{seed} é {text(seed, 8)}\n" for seed in range(400))
    (tmp_path / "one.txt").write_text(whole)
    content = lines_of([whole]) if "jsonl" in suffix else whole.encode()
    ways = (tmp_path / "one.txt", packed(tmp_path / f"one{suffix}", content))
    plain, unpacked = (everything(prepared(tmp_path, path)) for path in ways)
    assert "".join(unpacked) == whole and unpacked == plain and len(plain) == 3


def test_files_packed_one_behind_the_other_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        parts = [packed(tmp_path / f"{half}{suffix}", lines_of(TEXTS[half::2])).read_bytes() for half in (0, 1)]
        (tmp_path / f"all.jsonl{suffix}").write_bytes(b"".join(parts))
        assert sorted(everything(prepared(tmp_path, tmp_path / f"all.jsonl{suffix}"))) == sorted(TEXTS)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_that_is_cut_off_or_none_is_named(tmp_path: Path, suffix: str) -> None:
    whole = packed(tmp_path / f"a.txt{suffix}", (" ".join(TEXTS) * 50).encode())
    for wrong in (whole.read_bytes()[:-9], b"no packing at all", b""):
        whole.write_bytes(wrong)
        kind = "zstd" if suffix == ".zst" else "gzip"
        with pytest.raises(UserError, match=rf"a.txt{suffix} cannot be unpacked as {kind} .*: copy it anew"):
            prepared(tmp_path, whole)


def test_links_are_followed_and_each_folder_is_entered_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    folder_of_texts(folder / "real", 2)
    folder_of_texts(elsewhere, 3)
    (folder / "a_link").symlink_to(elsewhere)
    (folder / "file.txt").symlink_to(tmp_path / "elsewhere" / "002.txt")
    (folder / "again").symlink_to(folder / "real")
    (folder / "real" / "loop").symlink_to(folder)
    (folder / "real" / "up").symlink_to(tmp_path)
    (elsewhere / "back").symlink_to(folder / "a_link")
    names = ["a_link/000.txt", "a_link/001.txt", "a_link/002.txt", "file.txt", "real/000.txt", "real/001.txt"]
    assert list(find(str(folder)).paths) == names
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    prepared(tmp_path, folder)
    said = capsys.readouterr().err
    assert said.startswith("local: 6 files read, 5 left out: ")
    for words in ("gone.txt", "(a link to nothing)", "real/loop", "read already", "real/up", "a folder above it"):
        assert words in said


def test_what_is_left_out_is_named_with_its_reason_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "texts"
    folder_of_texts(folder, 9)
    for name in ("LICENSE", "README.md", "CHANGES.txt", ".hidden.txt", "x.csv"):
        (folder / name).write_text("no text of this corpus")
    packed(folder / "y.parquet.gz", b"x")
    (folder / "z.txt.xz").write_bytes(b"x")
    data = prepared(tmp_path, folder)
    assert sum(split.n_documents for split in data.splits.values()) == 9
    said = capsys.readouterr().err
    assert said.startswith("local: 9 files read, 7 left out: x.csv (no .txt, .md, .jsonl, .parquet)")
    assert "y.parquet.gz, z.txt.xz (unpack it: only .gz and .zst of text are read packed)" in said and said.endswith(
        "; and 2 more\n"
    )
    assert "(it describes the others)" in said


def test_prepared_data_within_their_text_are_no_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_texts(tmp_path, 9)
    first = prepared(tmp_path, tmp_path)  # into tmp_path/data
    again = prepared(tmp_path, tmp_path)
    assert again.folder == first.folder
    assert f"local: 9 files read, 2 left out: data/.{first.folder.name}.lock (hidden)" in (said := capsys.readouterr().err)
    assert said.endswith(f"; data/{first.folder.name} (prepared data)\n")


def test_files_about_a_folder_are_read_where_they_are_named(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "repositories" / str(number)).mkdir(parents=True)
        (tmp_path / "repositories" / str(number) / "README.md").write_text(TEXTS[number])
    with pytest.raises(UserError, match=r"has no .* file to be read, but 0/README.md, .*\(it describes the others\)"):
        prepared(tmp_path, tmp_path / "repositories")
    assert sorted(everything(prepared(tmp_path, tmp_path / "repositories/*/README.md"))) == sorted(TEXTS)
    single = tmp_path / "repositories/0/README.md"
    single.write_text("\n".join(TEXTS))
    assert "".join(everything(prepared(tmp_path, single))) == "\n".join(TEXTS)


@pytest.mark.parametrize("others", [{"a.csv": 1, "b.csv": 1, "c.csv": 1}, {"all.csv": 50_000}], ids=["count", "bytes"])
def test_a_folder_of_which_more_is_left_out_than_read_is_refused_and_the_remedy_works(
    tmp_path: Path, others: dict[str, int]
) -> None:
    folder = tmp_path / "my texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("\n".join(TEXTS) + name)
    for name, size in others.items():
        (folder / name).write_bytes(b"1" * size)
    with pytest.raises(UserError, match=r"more would be left out .* than read \(2 files, .*\.csv \(no \.txt") as refused:
        prepared(tmp_path, folder)
    remedy = str(refused.value).partition("for instance dataset.path='")[2].partition("'")[0]
    assert remedy == f"{folder}/**/*.txt"
    assert len(everything(prepared(tmp_path, remedy, test_fraction=0))) == 2


@pytest.mark.parametrize("folder", ["plain", "odd [1] {name}", "star*"])
def test_a_glob_below_a_folder_of_any_name_takes_what_it_matches(tmp_path: Path, folder: str) -> None:
    for place in ("x", "x/deep", "y"):
        folder_of_texts(tmp_path / folder / place, 2)
    (tmp_path / folder / "x" / "000.csv").write_text("1")

    def names(glob: str) -> list[str]:
        return [str(path.relative_to(tmp_path / folder)) for path in find(f"{tmp_path / folder}/{glob}").paths.values()]

    assert names("x/*.txt") == ["x/000.txt", "x/001.txt"]
    assert names("*/00[0].txt") == ["x/000.txt", "y/000.txt"]
    assert names("**/000.*") == ["x/000.txt", "x/deep/000.txt", "y/000.txt"]
    assert names("x/**") == ["x/000.txt", "x/001.txt", "x/deep/000.txt", "x/deep/001.txt"]
    assert find(f"{tmp_path / folder}/x/*").left_out == [
        ("000.csv", "no .txt, .md, .jsonl, .parquet"),
        ("deep", "a folder, which a glob enters by deep/**"),
    ]
    with pytest.raises(UserError, match=r"\*\.md matches no file: name"):
        names("*.md")


def test_what_gives_its_text_once_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path, kind in ((tmp_path / "pipe.txt", "a pipe"), (Path("/dev/null"), "a device")):
        with pytest.raises(UserError, match=rf"dataset.path={path} is {kind}, which gives its text once.*write it to a"):
            prepared(tmp_path, path)
    read, write = os.pipe()  # as in <(zcat ...) and in a shell's pipe to /dev/stdin
    with pytest.raises(UserError, match=rf"dataset.path=/dev/fd/{read} is a pipe, which gives its text once"):
        prepared(tmp_path, f"/dev/fd/{read}")
    os.close(read), os.close(write)


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    folder_of_texts(tmp_path / "texts", 3)
    file = os.fsencode(tmp_path / "texts") + b"/caf\xe9.txt"
    with open(file, "wb") as written:
        written.write(TEXTS[0].encode())
    assert TEXTS[0] in everything(prepared(tmp_path, tmp_path / "texts"))


@pytest.mark.parametrize("path", ["x" * 300, "y/" * 3000 + "z.txt", "~nobody-of-this-name/texts", "zero\0byte"])
def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=r"dataset.path=.* (cannot be read \(File name too long\)|does not exist)"):
        prepared(tmp_path, path)


# --- what cannot be read ---------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys
from harness.data.local import local_source
from harness.errors import UserError
from tests.support.corpora import local
os.setgroups([]), os.setgid(65534), os.setuid(65534)  # after the imports: the interpreter may be root's alone
try:
    print(sum(1 for _ in local_source(local(sys.argv[1]), for_training=True).documents()))
except UserError as error:
    print(error)
"""


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that everybody may enter: pytest closes its own, and those of all sessions again whenever one begins."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_nobody(path: Path | str) -> str:
    """What is said of a corpus by a process without root's rights: the number of its documents, or a sentence."""
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("what", ["file", "folder", "subfolder", "glob"])
def test_what_may_not_be_read_is_an_error_and_never_left_out(open_to_all: Path, what: str) -> None:
    folder = open_to_all / "texts"
    folder_of_texts(folder, 3)
    folder_of_texts(folder / "sub", 3)
    closed = {"file": folder / "001.txt", "folder": folder}.get(what, folder / "sub")
    path = f"{folder}/**/*.txt" if what == "glob" else folder
    assert as_nobody(path) == "6"
    closed.chmod(0)
    try:
        said = as_nobody(path)
    finally:
        closed.chmod(0o755)
    assert str(closed) in said and "cannot be read (Permission denied" in said


def test_a_disk_that_fails_while_a_corpus_is_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_texts(tmp_path / "texts", 4)

    def fail(self: CorpusFile, *_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path))

    monkeypatch.setattr(CorpusFile, "_opened", fail)
    with pytest.raises(UserError, match=r"00\d.txt cannot be read \(Input/output error\): make it readable, or leave"):
        prepared(tmp_path, tmp_path / "texts")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_a_corpus_that_changes_after_it_was_found_is_refused_and_nothing_is_kept(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    grown = folder / f"b.{suffix}"
    for number in range(4):
        (folder / f"{number}.txt").write_text(TEXTS[number])
    write = {
        "txt": lambda: grown.write_text(TEXTS[4]),
        "jsonl": lambda: write_jsonl(grown, TEXTS),
        "jsonl.gz": lambda: packed(grown, lines_of(TEXTS)),
        "parquet": lambda: write_parquet(grown, list(TEXTS)),
    }[suffix]
    write()
    from harness.data import local as reading

    def change_then(*arguments: Any) -> Iterator[Any]:
        write()  # the very bytes: that a file was written to is enough
        os.utime(grown, ns=(1, 1))
        yield from original(*arguments)

    original = reading.evaluation_first
    monkeypatch.setattr(reading, "evaluation_first", change_then)
    with pytest.raises(UserError, match=rf"b.{suffix} changed while it was read: let whatever writes it come to its end"):
        prepare(local(folder), BYTES, tmp_path / "data", progress=False)
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


def test_a_file_that_grows_while_it_is_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a text")

    def grow(path: Path) -> str:
        digest = file_sha256(path)
        with path.open("a") as writing:
            writing.write(" that goes on")
        return digest

    monkeypatch.setattr("harness.data.corpus_files.file_sha256", grow)
    with pytest.raises(UserError, match=r"a.txt changed while it was read"):
        opened(file, "a.txt")


def test_a_line_that_unpacks_to_more_than_is_held_whole_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.data.local.MOST_VALUE", 1 << 20)
    packed(tmp_path / "a.jsonl.gz", lines_of(["short", "x" * (1 << 24)]))
    with pytest.raises(UserError, match=r"a.jsonl.gz:2 has more than 1,048,576 bytes: cut it into several documents"):
        prepared(tmp_path, tmp_path / "a.jsonl.gz")
