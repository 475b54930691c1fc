"""A run's folder: claimed by one configuration, finished when it holds summary.json.

<runs_dir>/<name>/  config.yaml  metrics.jsonl  tokenizer.json  checkpoints/  summary.json  evaluations/*.json
                    segments/*.json  downstream/*.json  changes.diff  .checkpoints-written
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.config.identity import differences
from harness.config.run_config import load_run_config, save_run_config
from harness.config.schema import TrainConfig
from harness.errors import UserError, readable, writable
from harness.files.atomic import DISK_ERRORS
from harness.files.folders import checkpoint_folders, listed, refuse_links, remove, step_of
from harness.files.lock import locked
from harness.files.text import first_few
from harness.runs.provenance import keep_changes
from harness.runs.records import FIGURES

_UNSEEN = "make it readable, or choose another runs_dir=... or name=..."


def run_folder(config: TrainConfig) -> Path:
    """The folder that this run has or will have. Writes nothing.

    Raises UserError when the name is taken by a run of another configuration, naming what differs, or by something
    that is no run. A folder in which nothing has been logged yet is free: its command failed before the first step. The
    budget of an unfinished run may grow, see harness/runs/training_state.py.
    """
    folder = Path(config.runs_dir) / config.name
    with readable(str(folder), _UNSEEN):
        is_run = (folder / "config.yaml").is_file()
        if _is_foreign(folder):
            raise UserError(f"{folder} exists and is no run (it has no config.yaml): choose another name=...")
    if is_run and not config.overwrite and (begun(folder) or finished(folder)):
        from harness.runs.training_state import grows  # which needs torch

        older = load_run_config(folder)
        differing = differences(config, older)
        if differing and not (begun(folder) and not finished(folder) and grows(config, older, folder)):
            raise UserError(
                f"the run {folder} exists with another configuration ({first_few(differing)}): choose another name=..., or "
                f"overwrite=true to delete it and train anew"
            )
    return folder


def _is_foreign(folder: Path) -> bool:
    """Something that is no run, nor what a killed command has left of the beginning of one."""
    holds_something = folder.is_dir() and any(path.suffix != ".tmp" for path in folder.iterdir())
    return holds_something and not (folder / "config.yaml").is_file()


def begun(run: Path) -> bool:
    """Has anything been logged or saved? Raises UserError where that cannot be seen, or where what was saved is gone."""
    saved = checkpoint_folders(run / "checkpoints")
    with readable(str(run), "make it readable, or choose another name=..."):
        return bool(saved) or (run / "metrics.jsonl").exists()


@contextlib.contextmanager
def lock_run(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Nobody else trains this run meanwhile. The system frees the lock of a process that dies.

    Raises UserError when another process still holds it after `patience` seconds, or when the folder above cannot be
    written.
    """
    with contextlib.ExitStack() as held:
        with _made(folder):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                root = folder.resolve()  # a run that is reached under two names is one run
                held.enter_context(locked(root.with_name(f".{root.name}.lock"), patience=patience))
            except TimeoutError:
                raise UserError(f"another process is training {folder}: wait for its end, or choose another name=...") from None
        yield


@contextlib.contextmanager
def claimed(config: TrainConfig, patience: float = 0.0) -> Iterator[Callable[[], None]]:
    """A run's folder, locked and made if absent, with this configuration inside.

    An older run that is overwritten lies beside it until what is handed out is called: when the new run has a checkpoint.
    What goes wrong before puts it back; without an older run the folder stays, free to be claimed again. Killed in between,
    `put_back` does one of the two. Raises UserError as `lock_run`, `run_folder` and `refuse_links` do, and when the folder
    cannot be written.
    """
    folder = Path(config.runs_dir) / config.name
    with lock_run(folder, patience), writing_to(folder):
        run_folder(config)
        root = folder.resolve()
        try:
            with _made(folder):
                if config.overwrite and root.exists():
                    root.rename(_older_of(root))
                root.mkdir(parents=True, exist_ok=True)
                refuse_links(folder)
                save_run_config(config, root)
                keep_changes(root)
            yield lambda: remove(_older_of(root))
        except BaseException:
            if _older_of(root).exists():
                _restore(root)
            raise


def put_back(config: TrainConfig) -> None:
    """End what a killed command with overwrite=true has left: delete the older run if the new one has a checkpoint or is
    finished, else put the older one back. Raises UserError when another process is training the run.
    """
    folder = Path(config.runs_dir) / config.name
    root = folder.resolve()
    with readable(str(folder), _UNSEEN):
        if not _older_of(root).exists():
            return
    with lock_run(folder), writing_to(folder):
        if checkpoint_folders(root / "checkpoints") or finished(root):
            remove(_older_of(root))
        elif not _is_foreign(root):  # else run_folder says so
            _restore(root)


def _restore(root: Path) -> None:
    undone = root.with_name(f".{root.name}.undone")
    remove(undone)
    if root.exists():  # renamed first: at no moment half a run stands under the name
        root.rename(undone)
    _older_of(root).rename(root)
    remove(undone)


def _older_of(root: Path) -> Path:
    return root.with_name(f".{root.name}.overwritten")


def _made(folder: Path) -> contextlib.AbstractContextManager[None]:
    return writable(f"the run's folder {folder}", "choose another runs_dir=...")


@contextlib.contextmanager
def writing_to(run: Path) -> Iterator[None]:
    """A disk that takes nothing more (full, over quota, read-only, broken) becomes one sentence, a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT and str(error.filename).startswith(f"{run}{os.sep}"):
            raise UserError(
                f"{error.filename} was removed while the run was trained: put the run's folder back and start the same command "
                f"again, which otherwise trains anew"
            ) from None
        if error.errno not in DISK_ERRORS:
            raise
        saved = [path.name for path in listed(run / "checkpoints") if step_of(path.name) is not None]
        kept = f"its last checkpoint, {saved[-1]}, is intact" if saved else "it has no checkpoint yet"
        raise UserError(
            f"the run {run} cannot be written ({error.strerror}{f': {error.filename}' if error.filename else ''}); {kept}: "
            f"make room or make it writable, and start the same command again"
        ) from None


@contextlib.contextmanager
def storing(what: str, run: Path) -> Iterator[None]:
    """A record that a finished run's folder does not take becomes one sentence, a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the record of {what} cannot be stored in {run} ({error.strerror}): make the folder writable, or copy the run to "
            f"one that is"
        ) from None


def finished(run: Path) -> bool:
    """Has this run been trained to its end?"""
    return (run / "summary.json").is_file()


# Of a run's or an evaluation's record: what its line of JSON shows beside its figures.
_SHORT = (
    *("name", "attention", "model", "dataset", "split", "seed", "steps", "evaluated_tokens"),
    *("cache_dtype", "cache_elements_per_token_per_layer"),
)


def short_line(record: Mapping[str, Any], path: Path) -> str:
    """JSON of the figures that matter most; `path` holds them all."""
    return json.dumps(
        {key: record[key] for key in (*_SHORT, *FIGURES) if record.get(key) is not None} | {"record": str(path.absolute())}
    )
