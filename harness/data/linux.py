"""linux: the C sources of the Linux kernel, read out of a release's archive, which is never unpacked.

A document is a file *.c or *.h: one language, and nine tenths of the tree's bytes. Left out are tools/ (programs of its own,
and copies of headers that lie elsewhere) and tables: register maps, code pages, keys, which would be two fifths of the text.
Split by folders: what lies below the same first three is in one split, since drivers of one maker are written from each other.
"""

from __future__ import annotations

import functools
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from harness.config.schema import DatasetConfig
from harness.data.documents import EVALUATION_FIRST, SPLITS, Document, Source, carving_by_fraction, seeded_hash
from harness.data.download import download
from harness.data.network import HubUnreachable, reason_unreachable
from harness.errors import UserError, in_a_line, readable
from harness.files.hashes import file_sha256
from harness.files.untrusted import stays_inside

RELEASE = "https://cdn.kernel.org/pub/linux/kernel/v6.x/linux-6.12.tar.xz"
SHA256 = "b1a2562be56e42afb3f8489d4c2a7ac472ac23098f1ef1c1e40da601f54625eb"  # in sha256sums.asc beside it
_URL_VARIABLE = "ATTENTION_LINUX_URL"  # a mirror: the address of the same file elsewhere
_READERS: dict[str, Callable[[Path], IO[bytes]]] = {".xz": lzma.open, ".gz": gzip.open}  # type: ignore[dict-item]
_KINDS = [".c", ".h"]
_COPIES = "tools/"
_TREE = {
    "arch",
    "block",
    "crypto",
    "drivers",
    "fs",
    "include",
    "init",
    "ipc",
    "kernel",
    "lib",
    "mm",
    "net",
    "security",
    "sound",
}
_PACK = "tar -czf linux.tar.gz -C PARENT FOLDER"
_MOST_BYTES = 1 << 21  # of a file; all larger ones of 6.12 are tables
_MOST_CLAIMED = 1 << 30  # of any member: for terabytes that a header claims tarfile reads on for hours behind the end
# A line of a table: a #define, a number (perhaps in brackets), or NAME = NUMBER with a comma.
_ROW = re.compile(r"[ \t{(\[]*[-+]?\d|[ \t]*(?:#[ \t]*define\b|\[?\w+\]?[ \t]*=[ \t]*[-+]?\d\w*[ \t]*,)")
_MOST_ROWS = 0.5  # share of the lines that are not blank
_FOLDERS = 3


def linux_source(dataset: DatasetConfig, data_dir: Path, *, progress: bool) -> Source:
    """The files of dataset.path, a .tar.xz or .tar.gz of the kernel's sources, or of the release, kept in data_dir/downloads.

    They come in an order of hashes, so that a cap on training tokens keeps a bit of everything. Of an archive that is given
    the bytes are read at once, for the identity. Raises UserError for one that cannot be read, or holds no such file.
    """
    given = None if dataset.path is None else Path(dataset.path)
    sha256 = SHA256 if given is None else _checked(given)
    identity = {
        "source": "linux",
        "archive": sha256,
        "rules": [_KINDS, _COPIES, _MOST_BYTES, _ROW.pattern, _MOST_ROWS, _FOLDERS],
        "validation_fraction": dataset.validation_fraction,
        "test_fraction": dataset.test_fraction,
        "split_seed": dataset.split_seed,
    }
    carving = carving_by_fraction(dataset.split_seed, dataset.validation_fraction, dataset.test_fraction)

    @functools.cache
    def packed() -> dict[str, list[bytes]]:
        """The texts of each split; packed they take a fifth of the memory."""
        archive = _downloaded(data_dir, progress) if given is None else given
        if file_sha256(archive) != sha256:
            raise UserError(f"{archive} changed while it was read: let whatever writes it come to its end, and start again")
        texts = {name: zlib.compress(text.encode(), 1) for name, text in _files(archive)}
        splits: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        for name in sorted(texts, key=lambda name: seeded_hash(dataset.split_seed, _as_stored(name))):
            folders = "/".join(name.split("/")[:-1][:_FOLDERS])
            splits[carving.split(_as_stored(folders))].append(texts[name])
        return splits

    def documents() -> Iterator[Document]:
        for split in EVALUATION_FIRST:
            for text in packed()[split]:
                yield Document(split, (zlib.decompress(text).decode(),))

    return Source(identity, documents)


def _as_stored(name: str) -> bytes:
    """The bytes of a name in an archive, which may be any."""
    return name.encode(errors="surrogateescape")


def _checked(archive: Path) -> str:
    """The SHA-256 of an archive that can be meant."""
    if archive.is_dir() or archive.suffix not in _READERS:
        raise UserError(
            f"dataset.path={archive} is no .tar.xz or .tar.gz of the kernel's sources: pack their folder first, with {_PACK}"
        )
    with readable(f"dataset.path={archive}", "name an archive of the kernel's sources, or none"):
        return file_sha256(archive)


def _downloaded(data_dir: Path, progress: bool) -> Path:
    """The release, fetched where it is not there or damaged."""
    archive = data_dir / "downloads" / RELEASE.rpartition("/")[2]
    if archive.is_file() and file_sha256(archive) == SHA256:
        return archive
    url = os.environ.get(_URL_VARIABLE) or RELEASE
    if reason := reason_unreachable(url):
        raise HubUnreachable(
            f"linux: {url} is out of reach ({reason}): take dataset=stdlib (needs no network), or an archive of the sources "
            f"with dataset.path=FILE, or a mirror with {_URL_VARIABLE}=URL"
        )
    download(url, archive, SHA256, what=archive.name, mirror=_URL_VARIABLE, progress=progress)
    return archive


def _files(archive: Path) -> Iterator[tuple[str, str]]:
    """The path below the archive's one folder and the text of each file that is taken, in a stream.

    Nothing is written to the disk; links, devices and the like are no files. Raises UserError for a path that leads out of
    the archive, for one whose members do not lead to its end, and where nothing is taken.
    """
    top, below = set[str](), set[str]()  # of what is taken: the archive's folder, and the folders in it
    try:
        with _READERS[archive.suffix](archive) as stream, tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                if not stays_inside(member.name) and not (member.isdir() and member.name == "."):
                    raise UserError(f"{archive} has a file {member.name}, which leads out of it: take another archive")
                if member.size > _MOST_CLAIMED:
                    size = f"of {member.size:,} bytes, as no kernel has"
                    raise UserError(f"{archive} has a file {member.name} {size}: take another archive")
                first, *path = PurePosixPath(member.name).parts or ("",)  # without a "." in front
                text = _text(members, member, "/".join(path))
                if text is not None:
                    top.add(first)
                    below.update(path[:-1][:1])
                    yield "/".join(path), text
            while rest := stream.read(_MOST_BYTES):  # the checksum comes at the end
                if rest.strip(b"\0"):  # tarfile takes for the end whatever is no header
                    raise tarfile.ReadError("files follow behind what is no header of one")
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked ({in_a_line(error)}): copy it anew") from error
    if len(top) > 1 or (below and not below & _TREE):
        raise UserError(
            f"{archive} does not begin with the one folder of the kernel's sources, so what lies where cannot be told: pack "
            f"that folder from the one above it, {_PACK}"
        )
    if not top:
        raise UserError(f"{archive} has no *.c or *.h file below its folder: name an archive of the kernel's sources")


def _text(members: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str | None:
    """Of a file that is taken, by its name below the archive's folder. Those that are not UTF-8 (none in 6.12) are not."""
    if not member.isreg() or member.size > _MOST_BYTES or not name.endswith(tuple(_KINDS)) or name.startswith(_COPIES):
        return None
    file: Any = members.extractfile(member)
    try:
        text: str = file.read().decode()
    except UnicodeDecodeError:
        return None
    lines = [line for line in text.split("\n") if line and not line.isspace()]
    rows = sum(_ROW.match(line) is not None for line in lines)
    return text if rows < _MOST_ROWS * len(lines) else None
