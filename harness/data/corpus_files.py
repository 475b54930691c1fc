"""The files of a corpus that lies on this machine: found, told apart, and read whole as they were when they were found."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import gzip
import hashlib
import os
import re
import shlex
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from harness.data.parquet import open_zstd
from harness.data.prepared import is_prepared
from harness.errors import UserError, in_a_line, readable
from harness.files.hashes import file_sha256

KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".parquet": "parquet"}  # by suffix
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_PACKED = (*_COMPRESSIONS, ".xz", ".bz2", ".zip", ".lz4", ".7z")
READ = ", ".join(KINDS)
BLOCK = 1 << 20  # bytes read at once
_EVERYTHING = ["**"]
# Such files say something of the ones beside them. Whoever wants them as text names them, by a glob for instance.
_ABOUT = re.compile(
    r"(readme([._-]\w+)?|licen[cs]e|copying|notice|changes|changelog|contributing|code_of_conduct)(\.(txt|md))?"
)
_SHOWN = 5
_HIDDEN, _DESCRIBES, _PREPARED = "hidden", "it describes the others", "prepared data"


class FileState(NamedTuple):
    """By this a file is known not to have changed."""

    device: int
    inode: int
    size: int
    changed: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class CorpusFile:
    """A file with text. name: relative to what the user named, so the same on every machine."""

    path: Path
    name: str
    kind: str  # text | jsonl | parquet
    compression: str | None  # gzip | zstd
    state: FileState
    sha256: str  # of the file as it lies there

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Its bytes start:stop, unpacked, a block at a time. Raises UserError when they cannot be read, or have changed."""
        with _reading(self), self._opened() as file:
            place = 0
            if self.compression is None:
                file.seek(start)
                place = start
            while (stop is None or place < stop) and (block := file.read(BLOCK)):
                whole, place = block[: None if stop is None else stop - place], place + len(block)
                if place > start:
                    yield whole[max(0, start - (place - len(block))) :]

    def check(self) -> None:
        """Raises UserError when the file is no longer the one that was found."""
        with readable(str(self.path), "make it readable, or leave it out"):
            if FileState.of(self.path.stat()) != self.state:
                raise changed(self.path)

    def _opened(self) -> IO[bytes]:
        if self.compression == "gzip":
            return cast("IO[bytes]", gzip.open(self.path, "rb"))
        if self.compression == "zstd":
            return open_zstd(self.path)
        return self.path.open("rb")


def changed(path: Path) -> UserError:
    return UserError(f"{path} changed while it was read: let whatever writes it come to its end, and start again")


@contextlib.contextmanager
def _reading(file: CorpusFile) -> Iterator[None]:
    """The file is the same before and after, and what its unpacking raises is one sentence."""
    file.check()
    if file.compression and not file.state.size:  # which gzip and pyarrow take for nothing, packed
        raise UserError(f"{file.path} cannot be unpacked as {file.compression} (it is empty): copy it anew")
    packed: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if file.compression == "zstd":
        packed = (OSError, ValueError)
    try:
        with readable(str(file.path), "make it readable, or leave it out", but_not=packed):
            yield
    except packed as error:
        raise UserError(f"{file.path} cannot be unpacked as {file.compression} ({in_a_line(error)}): copy it anew") from error
    file.check()


@dataclass
class Found:
    """What a path of the user's names. left_out: (name, reason); `others` of them are counted against what is read."""

    paths: dict[str, Path] = field(default_factory=dict)  # by name
    left_out: list[tuple[str, str]] = field(default_factory=list)
    others: int = 0
    other_bytes: int = 0

    def leave_out(self, name: str, reason: str, *, size: int | None = None) -> None:
        """size: of something that might have been text; None: of what nobody takes for it."""
        self.left_out.append((name, reason))
        if size is not None:
            self.others += 1
            self.other_bytes += size

    def said(self) -> str:
        """The first ones, each reason once, and how many more."""
        reasons: dict[str, list[str]] = {}
        for name, reason in sorted(self.left_out, key=lambda one: one[1] in (_HIDDEN, _DESCRIBES, _PREPARED))[:_SHOWN]:
            reasons.setdefault(reason, []).append(name)
        shown = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        more = len(self.left_out) - _SHOWN
        return shown + (f"; and {more} more" if more > 0 else "")


def find(given: str) -> Found:
    """The files that a path names: itself, those below a folder, or those that a glob matches. Nothing is read.

    Links are followed, each folder is entered once, in the order of names and the real ones first. Raises UserError for
    a folder that cannot be listed, and where there is nothing to read.
    """
    path = Path(os.path.expanduser(given))
    with readable(f"dataset.path={given}", "make it readable, or name another place"):
        mode = _mode(path)
        if mode is not None and not stat.S_ISDIR(mode):
            found = _alone(path, mode, given)
        else:
            base, pattern = (path, _EVERYTHING) if mode is not None else _glob_parts(path)
            found = _below(base, pattern)
            if pattern != _EVERYTHING:
                found = _from_common_folder(found)
            if not found.paths:
                if mode is None and not glob.has_magic(str(path)):
                    reason = "does not exist"
                elif found.left_out:
                    reason = f"has no {READ} file to be read, but {found.said()}"
                else:
                    reason = f"has no {READ} file" if mode is not None else "matches no file"
                raise UserError(f"dataset.path={given} {reason}: name a file, a folder or a quoted glob of such files")
    return found


def check_majority(found: Found, given: str) -> None:
    """Raises UserError where more is left out than read: what was meant is hardly what would be read."""
    size = sum(path.stat().st_size for path in found.paths.values())
    if found.others > len(found.paths) or found.other_bytes > size:
        suffix = Path(next(iter(found.paths))).suffix
        folder = given if Path(os.path.expanduser(given)).is_dir() else str(Path(given).parent)
        example = shlex.quote(f"{folder.rstrip('/')}/**/*{suffix}")
        raise UserError(
            f"dataset.path={given}: more would be left out ({found.others:,} files, {found.other_bytes:,} bytes) than read "
            f"({len(found.paths):,} files, {size:,} bytes). Left out: {found.said()}. Name the files that are meant, for "
            f"instance dataset.path={example}, or take the others away"
        )


def opened(path: Path, name: str) -> CorpusFile:
    """The file, read once for its hash. Raises UserError when it cannot be read or changes meanwhile."""
    kind, compression = _kind(name)
    assert kind is not None
    with readable(str(path), "make it readable, or leave it out"):
        state = FileState.of(path.stat())
        sha256 = file_sha256(path)
        if FileState.of(path.stat()) != state:
            raise changed(path)
    return CorpusFile(path, name, kind, compression, state, sha256)


def _kind(name: str) -> tuple[str | None, str | None]:
    """What a file's name says of its content, and of its packing."""
    lower = name.lower()
    compression = next((kind for suffix, kind in _COMPRESSIONS.items() if lower.endswith(suffix)), None)
    stem = lower.rpartition(".")[0] if compression else lower
    kind = next((kind for suffix, kind in KINDS.items() if stem.endswith(suffix)), None)
    return (None if kind == "parquet" and compression else kind), compression


def _mode(path: Path) -> int | None:
    """None: there is nothing."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise
    except ValueError:  # a zero byte
        return None


def _alone(path: Path, mode: int, given: str) -> Found:
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "a socket"
        raise UserError(
            f"dataset.path={given} is {kind}, which gives its text once, and it is read several times: write it to a file "
            f"first (one that ends in .gz or .zst is read as it is)"
        )
    if _kind(path.name)[0] is None:
        raise UserError(
            f"dataset.path={given} has no {READ} file (they may be packed as .gz or .zst, parquet packs itself): name a "
            f"file, a folder or a quoted glob of such files"
        )
    return Found({path.name: path})


def _glob_parts(path: Path) -> tuple[Path, list[str]]:
    """The longest part of a glob that exists as it is written (with brackets in its name, perhaps), and the rest."""
    parts = list(path.parts)
    count = next(n for n in range(len(parts), -1, -1) if n == 0 or _mode(Path(*parts[:n])) is not None)
    return Path(*parts[:count]), parts[count:]


def _from_common_folder(found: Found) -> Found:
    """The same with names below the innermost folder that holds all files: a corpus is the same whichever glob found it."""
    folders = [os.path.dirname(name) for name in found.paths]
    common = os.path.commonpath(folders) if folders and all(folders) else ""
    found.paths = {os.path.relpath(name, common or "."): path for name, path in found.paths.items()}
    return found


def _below(base: Path, pattern: list[str]) -> Found:
    """What a glob matches below a folder."""
    found = Found()
    if not base.is_dir():
        return found
    entered = {_identity(base.stat())}
    above = [_identity(folder.stat()) for folder in base.resolve().parents]
    real: list[tuple[str, Path, frozenset[int]]] = [("", base, _closure(pattern, {0}))]
    links: list[tuple[str, Path, frozenset[int]]] = []
    while real or links:
        prefix, folder, states = real.pop() if real else links.pop(0)
        inner = []
        if prefix and folder.is_symlink():
            identity = _identity(folder.stat())
            if identity in entered or identity in above:
                found.leave_out(
                    prefix[:-1],
                    "a link to a folder above it" if identity in above else "a link to a folder that is read already",
                )
                continue
            entered.add(identity)
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            reached = _step(pattern, states, entry.name)
            if not reached:
                continue
            name = f"{prefix}{entry.name}"
            if entry.name.startswith("."):
                found.leave_out(name, _HIDDEN)
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                found.leave_out(name, "a link to nothing", size=0)
                continue
            if stat.S_ISDIR(status.st_mode):
                if reached == {len(pattern)}:  # the glob ends here
                    found.leave_out(name, f"a folder, which a glob enters by {entry.name}/**", size=0)
                elif is_prepared(Path(entry.path)):
                    found.leave_out(name, _PREPARED)
                elif entry.is_symlink():
                    links.append((f"{name}/", Path(entry.path), reached))
                elif _identity(status) not in entered:
                    entered.add(_identity(status))
                    inner.append((f"{name}/", Path(entry.path), reached))
            elif len(pattern) in reached:
                _take(found, name, Path(entry.path), status, named=pattern != _EVERYTHING)
        real += reversed(inner)
        links.sort(key=lambda link: link[0])
    found.paths = dict(sorted(found.paths.items()))
    return found


def _take(found: Found, name: str, path: Path, status: os.stat_result, *, named: bool) -> None:
    """A file, or a reason not to take it."""
    kind, _ = _kind(path.name)
    if not stat.S_ISREG(status.st_mode):
        found.leave_out(name, "no regular file", size=0)
    elif not named and _ABOUT.fullmatch(path.name.lower()):
        found.leave_out(name, _DESCRIBES)
    elif kind is not None:
        found.paths[name] = path
    elif path.suffix.lower() in _PACKED and Path(path.stem).suffix.lower() in KINDS:
        found.leave_out(name, "unpack it: only .gz and .zst of text are read packed", size=status.st_size)
    else:
        found.leave_out(name, f"no {READ}", size=status.st_size)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _closure(pattern: list[str], states: set[int]) -> frozenset[int]:
    """Places in a glob that can be reached: `**` stands for no folder too."""
    for place in sorted(states):
        while place < len(pattern) and pattern[place] == "**":
            place += 1
            states.add(place)
    return frozenset(states)


def _step(pattern: list[str], states: frozenset[int], name: str) -> frozenset[int]:
    """The places in a glob after one more part of a path; none: it cannot match."""
    after = set()
    for place in states:
        if place < len(pattern):
            if pattern[place] == "**":
                after.add(place)
            elif fnmatch.fnmatchcase(name, pattern[place]):
                after.add(place + 1)
    return _closure(pattern, after)


def lines(file: CorpusFile, most: int) -> Iterator[bytes]:
    """The lines of a file. Raises UserError for one of more than `most` bytes, which would have to be held whole."""
    parts: list[bytes] = []
    size, number = 0, 1
    for block in file.blocks():
        first, *others = block.split(b"\n")
        parts.append(first)
        size += len(first)
        for other in others:
            yield b"".join(parts)
            parts, size, number = [other], len(other), number + 1
        if size > most:
            raise UserError(f"{file.path}:{number} has more than {most:,} bytes: cut it into several documents")
    if size:
        yield b"".join(parts)


def listing(files: list[CorpusFile]) -> Any:
    """SHA-256 over all of them and their names, which may be any bytes."""
    text = "\n".join(f"{file.sha256} {file.name}" for file in files)
    return hashlib.sha256(os.fsencode(text)).hexdigest()
