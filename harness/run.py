"""A run's folder: claimed by one configuration, finished when it holds summary.json.

<runs_dir>/<name>/  config.yaml  metrics.jsonl  tokenizer.json  checkpoints/  summary.json  evaluations/*.json
                    segments/*.json  downstream/*.json
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from harness.config import ROOT, differences, load_run_config, save_run_config
from harness.errors import UserError
from harness.outside import read_object
from harness.schema import TrainConfig

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)


def run_folder(config: TrainConfig) -> Path:
    """The folder that this run has or will have. Writes nothing.

    Raises UserError when the name is taken by a run of another configuration, naming what differs, or by something
    that is no run. A folder in which nothing has been logged yet is free: its command failed before the first step. The
    budget of an unfinished run may grow, see harness/growth.py.
    """
    folder = Path(config.runs_dir) / config.name
    if not (folder / "config.yaml").is_file():
        if folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir()):
            raise UserError(f"{folder} exists and is no run (it has no config.yaml): choose another name=...")
    elif not config.overwrite and (begun(folder) or finished(folder)):
        older = load_run_config(folder)
        differing = differences(config, older)
        if differing and not (begun(folder) and not finished(folder) and _grows(config, older, folder)):
            shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
            raise UserError(
                f"the run {folder} exists with another configuration ({shown}): choose another name=..., or "
                f"overwrite=true to delete it and train anew"
            )
    return folder


def _grows(config: TrainConfig, older: TrainConfig, folder: Path) -> bool:
    from harness.growth import grows  # which needs torch

    return grows(config, older, folder)


def begun(run: Path) -> bool:
    """Has anything been logged or saved?"""
    return (run / "metrics.jsonl").exists() or any(run.glob("checkpoints/step-*"))


@contextlib.contextmanager
def lock_run(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Nobody else trains this run meanwhile. The system frees the lock of a process that dies.

    Raises UserError when another process still holds it after `patience` seconds, or when the folder above cannot be
    written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise _unwritable(folder, error) from None
    with file:
        until = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() >= until:
                raise UserError(f"another process is training {folder}: wait for its end, or choose another name=...")
            time.sleep(0.2)
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Claim:
    """A run's folder, made if absent, with this configuration inside; an older run that is overwritten lies aside.

    `settle` deletes the older run once the new one has proved that it can train, `undo` puts it back. Killed in between,
    the next command with overwrite=true finds the older run aside and takes it for the one to be overwritten. Raises
    UserError as `run_folder` does, and when the folder cannot be written.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.folder = run_folder(config)
        self.aside = self.folder.with_name(f".{self.folder.name}.overwritten")
        try:
            if config.overwrite and self.folder.exists():
                if self.aside.exists():  # this command was killed before: what stands there now has never settled
                    shutil.rmtree(self.folder)
                else:
                    self.folder.rename(self.aside)
            self.folder.mkdir(parents=True, exist_ok=True)
            save_run_config(config, self.folder)
        except OSError as error:
            raise _unwritable(self.folder, error) from None

    def settle(self) -> None:
        """The new run stands."""
        if self.aside.exists():
            shutil.rmtree(self.aside)

    def undo(self) -> None:
        """As if nothing had been claimed; without an older run the folder stays, free to be claimed again."""
        if self.aside.exists():
            shutil.rmtree(self.folder)
            self.aside.rename(self.folder)


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"the run's folder {folder} cannot be written ({error.strerror}): choose another runs_dir=...")


@contextlib.contextmanager
def writing_to(run: Path) -> Iterator[None]:
    """A disk that takes nothing more (full, over quota, read-only, broken) becomes one sentence, a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        saved = sorted(path.name for path in run.glob("checkpoints/step-*"))
        kept = f"its last checkpoint, {saved[-1]}, is intact" if saved else "it has no checkpoint yet"
        raise UserError(
            f"the run {run} cannot be written ({error.strerror}{f': {error.filename}' if error.filename else ''}); {kept}: "
            f"make room or make it writable, and start the same command again"
        ) from None


def finished(run: Path) -> bool:
    """Has this run been trained to its end?"""
    return (run / "summary.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError when it is not one."""
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): delete it and run the command that wrote it again") \
            from None  # fmt: skip


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)  # in a run from elsewhere it may be a link that leads out of it
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def commit() -> str | None:
    """The project's git commit, with '+changes' if files differ from it; None outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
