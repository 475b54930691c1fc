"""Files and folders that are there whole or not at all, and JSON read back."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError, writable
from harness.files.untrusted import Unreadable, read_object

# What a disk, or what lies in the place of a file of ours, refuses.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EISDIR)


def read_json(path: Path, *, record: bool = False) -> dict[str, Any]:
    """A JSON object from a file; record: as strictly as `read_object` takes it. Raises UserError when it is not one."""
    try:
        return read_object(path, record=record)
    except (OSError, Unreadable) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): delete it and run the command that wrote it again") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raises UserError where the disk has fewer bytes free than `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{what} needs {needed:,} bytes and the disk of {folder} has {free:,} free: {remedy}")


def flush(path: Path) -> None:
    """Force a file, or a folder's list of names, out to the disk: what is renamed after it is whole after a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside it for the new content, which takes its place at the end."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # in a run from elsewhere it may be a link that leads out of it
    yield temporary
    os.replace(temporary, path)


@contextlib.contextmanager
def written_together(folder: Path, *, record: str, stale: Sequence[str] = (), what: str, remedy: str) -> Iterator[Path]:
    """A place to write files that belong together; at the end they take their places in `folder`, or none of them does.

    record: the one by whose presence the others are known to be its own: it goes first and comes last. stale: patterns of
    what an earlier set may have left there that this one does not have. An error of the disk is a UserError with `what`
    and `remedy`.
    """
    temporary = folder / f".unfinished-{os.getpid()}"
    with writable(what, remedy), contextlib.ExitStack() as at_the_end:
        at_the_end.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary
        new = [path.relative_to(temporary) for path in sorted(temporary.rglob("*")) if path.is_file()]
        for name in new:
            (folder / name).parent.mkdir(exist_ok=True)
        (folder / record).unlink(missing_ok=True)
        for name in new:
            if str(name) != record:
                os.replace(temporary / name, folder / name)
        for old in [path for pattern in stale for path in folder.glob(pattern) if path.relative_to(folder) not in new]:
            old.unlink()
        os.replace(temporary / record, folder / record)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside it that is renamed to `target` at the end: `target` is there whole, or not at all.

    Raises UserError when `target` exists and is not an empty folder, or cannot be written.
    """
    check_target(target)
    _remove_leftovers(target)
    temporary = _partial(target)
    with writable(f"to={target}", "choose another folder"), contextlib.ExitStack() as at_the_end:
        at_the_end.callback(shutil.rmtree, temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, target)


def check_target(target: Path) -> None:
    """Raises UserError unless the folder is absent or empty."""
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"to={target} exists and is no empty folder: choose another one, or remove it first")


def _remove_leftovers(target: Path) -> None:
    """Delete what killed commands left of this folder, weights included: partial folders of this machine's processes that
    are gone, and other machines' that nobody has written to for a day.
    """
    here = _partial(target).name.rpartition("-")[0]
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        machine, _, number = leftover.name.rpartition("-")
        if machine == here and number.isdigit():
            gone = not _runs_here(int(number))
        else:
            newest = max((path.lstat().st_mtime for path in (leftover, *leftover.rglob("*"))), default=0.0)
            gone = newest < time.time() - 86_400
        if gone:
            shutil.rmtree(leftover, ignore_errors=True)


def _partial(target: Path) -> Path:
    """Where this process writes what it renames to `target` once it is whole."""
    return target.with_name(f".{target.name}.partial-{platform.node()}-{os.getpid()}")


def _runs_here(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
