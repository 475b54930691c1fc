"""linux: the kernel's sources, out of an archive from a loopback server or from this machine."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.config.schema import DatasetConfig
from harness.data import HubUnreachable, PreparedData, download, linux, prepare
from harness.errors import UserError
from tests.support.corpora import BYTES, documents_of, text
from tests.support.file_server import FileServer

LINUX = DatasetConfig(name="linux", source="linux", validation_fraction=0.2, test_fraction=0.2)
NAME = "linux-6.12.tar.xz"


def code(seed: int) -> str:
    return f"/* {text(seed)} */\nint f{seed}(int réef)\n{{\n\treturn réef + {seed};\n}}\n"


def tree() -> dict[str, str]:
    """120 files in 40 folders of the third level, some of which lie deeper."""
    return {
        f"drivers/net/maker{number // 3}/{'deep/er/' if number % 3 else ''}{number}.{'h' if number % 2 else 'c'}": code(number)
        for number in range(120)
    }


def write_archive(file: Path, texts: Mapping[str, str | bytes], *others: tarfile.TarInfo) -> Path:
    """The texts below linux-6.12/, and members of other kinds as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    mode: Any = f"w:{file.suffix[1:]}"
    with tarfile.open(file, mode) as archive:
        for name, content in texts.items():
            member = tarfile.TarInfo(f"linux-6.12/{name}")
            data = content.encode() if isinstance(content, str) else content
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for other in others:
            archive.addfile(other, io.BytesIO(b"x" * other.size))
    return file


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, size
    return made


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """It has the release, whose hash stands in the place of the real one's."""
    release = write_archive(tmp_path / "served" / NAME, tree())
    monkeypatch.setattr(linux, "SHA256", hashlib.sha256(release.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "TIMEOUT", 2)
    with FileServer(tmp_path / "served") as server:
        monkeypatch.setenv("ATTENTION_LINUX_URL", f"{server.url}/{NAME}")
        yield server


def prepared(tmp_path: Path, path: Path | None = None, **fields: object) -> PreparedData:
    dataset = dataclasses.replace(LINUX, path=str(path) if path else None, **fields)  # type: ignore[arg-type]
    return prepare(dataset, BYTES, tmp_path / "data", progress=False)


def texts_of(data: PreparedData) -> dict[str, set[str]]:
    return {split: set(documents_of(data, split)) for split in data.splits}


def downloads(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "data/downloads").iterdir()]


def test_the_release_is_downloaded_once_and_every_folder_is_in_one_split(tmp_path: Path, server: FileServer) -> None:
    data = prepared(tmp_path)
    names = {content: name for name, content in tree().items()}
    folders: dict[str, set[str]] = {}
    for split, texts in texts_of(data).items():
        for content in texts:
            folders.setdefault(names.pop(content).split("/")[2], set()).add(split)
    assert not names  # every file is somewhere
    assert len(folders) == 40 and all(len(splits) == 1 for splits in folders.values())
    assert set.union(*folders.values()) == {"train", "validation", "test"}
    prepared(tmp_path, max_tokens=2000)  # other tokens of the same text
    assert server.requests == {NAME: 1} and downloads(tmp_path) == [NAME]


def test_what_a_cap_keeps_is_drawn_from_all_of_the_tree(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "linux.tar.gz", tree())
    data = prepared(tmp_path, archive, max_tokens=6000)
    names = {content: name for name, content in tree().items()}
    kept = [int(names[content].split("/")[2].removeprefix("maker")) for content in documents_of(data, "train")[:-1]]
    assert len(kept) > 10 and min(kept) < 10 and max(kept) > 30
    whole = prepared(tmp_path, archive)
    assert texts_of(data)["test"] == texts_of(whole)["test"]
    assert documents_of(whole, "train")[: len(kept)] == documents_of(data, "train")[:-1]


def test_an_archive_of_this_machine_gives_the_same_data_without_a_server(tmp_path: Path, server: FileServer) -> None:
    downloaded = prepared(tmp_path)
    server.silent = True
    given = Path(shutil.copy(tmp_path / "served" / NAME, tmp_path / "other name.tar.xz"))
    assert prepared(tmp_path, given).folder == downloaded.folder
    other = prepared(tmp_path, write_archive(tmp_path / "6.6.tar.xz", tree() | {"mm/more.c": code(1000)}))
    assert other.folder != downloaded.folder and other.fingerprint != downloaded.fingerprint
    assert prepared(tmp_path, other.folder).fingerprint == other.fingerprint  # prepared, where the archive is not


def test_tables_copies_and_other_kinds_of_files_are_left_out(tmp_path: Path) -> None:
    table = "".join(f"#define REG_{n}_MASK 0x{n:04x}\n" for n in range(9))
    rows = "static const u16 rows[] = {\n" + "".join(f"\t{{ 0x{n:02x}, {n} }}, -{n},\n" for n in range(9)) + "};\n"
    names = "enum regs {\n" + "".join(f"\tREG_{n} = 0x{n},\n\t[{n}]\t= {n}u,\n" for n in range(9)) + "};\n"
    left_out: dict[str, str | bytes] = {
        "tools/include/linux/list.h": code(1),
        "Documentation/a.rst": code(2),
        "arch/x86/entry.S": code(3),
        "include/regs.h": f"/* registers */\n\n{table}",
        "sound/codec.c": rows,
        "sound/enum.h": names,
        "lib/latin.c": b"/* na\xefve */\nint a;\n",
        "lib/blank.h": " \n\n\t\n",
        "lib/huge.c": code(4) * 40_000,
        "list.h": "",
    }
    half = "".join(f"#define A{n} {n}\nint f{n}(void);\nint g{n}(void);\n" for n in range(9))
    kept: dict[str, str | bytes] = {"include/half.h": half, "kernel/tools/x.c": code(5), "fs/a.c": code(6), "init.c": code(7)}
    archive = write_archive(tmp_path / "linux.tar.xz", left_out | kept)
    data = prepared(tmp_path, archive, validation_fraction=0, test_fraction=0)
    assert sorted(documents_of(data, "train")) == sorted(map(str, kept.values()))


def test_nothing_is_written_or_read_outside_the_archive(tmp_path: Path) -> None:
    secret = tmp_path / "secret.c"
    secret.write_text("int secret;\n")
    links = [
        member("linux-6.12/a.c", tarfile.SYMTYPE, str(secret)),
        member("linux-6.12/b.c", tarfile.LNKTYPE, "linux-6.12/drivers/net/maker0/0.c"),
        member("linux-6.12/c.c", tarfile.FIFOTYPE),
        member("linux-6.12/d.c", tarfile.DIRTYPE),
    ]
    data = prepared(tmp_path, write_archive(tmp_path / "links.tar.gz", tree(), *links))
    assert sorted(text for texts in texts_of(data).values() for text in texts) == sorted(tree().values())
    for number, name in enumerate(["linux-6.12/../../out.c", f"{tmp_path}/out.c"]):
        archive = write_archive(tmp_path / f"{number}.tar.gz", tree(), member(name, size=3))
        with pytest.raises(UserError, match=r"out\.c, which leads out of it: take another archive"):
            prepared(tmp_path, archive)
    assert not list(tmp_path.rglob("out.c"))


def test_however_the_folder_was_packed_it_is_read_as_one_or_refused(tmp_path: Path) -> None:
    """By tar itself: splits and left-out folders hang on where a file lies below the sources' own folder."""
    sources = tmp_path / "src" / "linux-6.12"
    for name, content in (tree() | {"fs/a.c": code(1), "tools/b.c": code(2)}).items():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text(content)
    ways = {"named": ["-C", tmp_path / "src", "linux-6.12"], "dotted": ["-C", tmp_path / "src", "./linux-6.12"]}
    data = []
    for way, arguments in ways.items():
        subprocess.run(["tar", "-czf", tmp_path / f"{way}.tar.gz", *arguments], check=True)
        data.append(prepared(tmp_path, tmp_path / f"{way}.tar.gz"))
    assert [len(each.splits["train"].tokens) for each in data] == [len(data[0].splits["train"].tokens)] * 2
    for way, arguments in {"deep": ["-C", tmp_path, "src/linux-6.12"], "inside": ["-C", sources, "."]}.items():
        subprocess.run(["tar", "-czf", tmp_path / f"{way}.tar.gz", *arguments], check=True)
        with pytest.raises(UserError, match=r"does not begin with the one folder of the kernel's sources.* -C PARENT FOLDER"):
            prepared(tmp_path, tmp_path / f"{way}.tar.gz")


def test_what_is_no_archive_of_sources_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "linux-6.12").mkdir()
    for path in (tmp_path / "linux-6.12", tmp_path / "linux.zip"):
        with pytest.raises(UserError, match=r"is no \.tar\.xz or \.tar\.gz .* tar -czf linux\.tar\.gz -C PARENT FOLDER"):
            prepared(tmp_path, path)
    with pytest.raises(UserError, match=r"linux\.tar\.xz cannot be read \(No such file"):
        prepared(tmp_path, tmp_path / "linux.tar.xz")
    with pytest.raises(UserError, match=r"has no \*\.c or \*\.h file below its folder"):
        prepared(tmp_path, write_archive(tmp_path / "docs.tar.gz", {"README": "text"}))
    for suffix in ("xz", "gz"):
        whole = write_archive(tmp_path / f"whole.tar.{suffix}", tree())
        for kept in (0, 50, whole.stat().st_size // 2, whole.stat().st_size - 1):
            cut = tmp_path / f"{kept}.tar.{suffix}"
            cut.write_bytes(whole.read_bytes()[:kept])
            with pytest.raises(UserError, match="cannot be unpacked"):
                prepared(tmp_path, cut)


def test_an_archive_whose_members_do_not_lead_to_its_end_is_refused(tmp_path: Path) -> None:
    """tarfile takes what is no header for the end, and reads on for hours behind the end for a size of terabytes."""
    with gzip.open(write_archive(tmp_path / "whole.tar.gz", {"a.c": code(1) * 999, **tree()})) as file:
        whole = file.read()
    second = whole.index(b"ustar", 1024) - 257
    wrong = {
        "header": whole[:second] + b"?" + whole[second + 1 :],
        "claim": whole[:second] + member("linux-6.12/b.c", size=10**13).tobuf() + whole[second:],
        "two": whole * 2,
    }
    for name, content in wrong.items():
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress(content))
        with pytest.raises(
            UserError, match=rf"{name}\.tar\.gz (cannot be unpacked .*: copy it anew|has a file .*take another)"
        ):
            prepared(tmp_path, tmp_path / f"{name}.tar.gz")


def test_a_name_that_is_not_utf8_is_the_name_of_a_file(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "linux.tar.gz", tree() | {"fs/na\udcefve/\udcff.c": code(999)})
    assert code(999) in set.union(*texts_of(prepared(tmp_path, archive)).values())


def test_a_download_that_breaks_off_goes_on_from_there(tmp_path: Path, server: FileServer) -> None:
    server.unavailable, server.cut = 1, 2
    prepared(tmp_path)
    size = (tmp_path / "served" / NAME).stat().st_size
    assert server.requests == {NAME: 4} and downloads(tmp_path) == [NAME]
    assert server.sent == 2 * size  # the probe's answer, and the file once


def test_a_server_that_sends_no_parts_sends_the_whole_again(tmp_path: Path, server: FileServer) -> None:
    server.cut, server.parts = 2, False
    whole = texts_of(prepared(tmp_path))
    assert sum(map(len, whole.values())) == 120 and server.requests == {NAME: 3}


def test_wrong_bytes_of_the_right_length_are_never_used(tmp_path: Path, server: FileServer) -> None:
    server.corrupt = True
    with pytest.raises(UserError, match=r"arrived twice from .* other than its SHA-256 .* ATTENTION_LINUX_URL to a mirror"):
        prepared(tmp_path)
    assert not downloads(tmp_path)


def test_a_download_damaged_on_disk_is_fetched_anew(tmp_path: Path, server: FileServer) -> None:
    whole = texts_of(prepared(tmp_path))
    victim = tmp_path / "data/downloads" / NAME
    victim.write_bytes(victim.read_bytes()[:-8] + b"damaged!")
    again = prepared(tmp_path, max_tokens=10**6)
    assert texts_of(again) == whole and server.requests == {NAME: 2}


def test_a_file_that_is_not_there_is_not_asked_for_again(tmp_path: Path, server: FileServer) -> None:
    (tmp_path / "served" / NAME).unlink()
    with pytest.raises(HubUnreachable, match=r"linux-6.12.tar.xz could not be had .*404.*ATTENTION_LINUX_URL to a mirror"):
        prepared(tmp_path)
    assert server.requests == {NAME: 1}


def test_a_server_out_of_reach_is_noticed_within_five_seconds(tmp_path: Path, server: FileServer) -> None:
    server.silent = True
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match=r"out of reach.*dataset=stdlib.*dataset.path=FILE.*ATTENTION_LINUX_URL"):
        prepared(tmp_path)
    assert time.monotonic() - started < 5


def test_an_archive_that_changes_before_it_is_read_is_refused(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "linux.tar.gz", tree())
    source = linux.linux_source(dataclasses.replace(LINUX, path=str(archive)), tmp_path, progress=False)
    write_archive(archive, {"mm/a.c": code(0)})
    with pytest.raises(UserError, match="changed while it was read"):
        next(source.documents())
