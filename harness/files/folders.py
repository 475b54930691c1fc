"""What lies in a run's folders, and what may be written into them.

A folder that cannot be listed is an error: what cannot be seen is not absent. A run's own folder may be a link, to another
disk say; below it nothing that is written, cut or deleted may lead to what others have.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError, readable

# In a run: what is appended to, cut or cleared. Any other file is replaced as a whole, which leaves what it led to alone.
WRITTEN = ("metrics.jsonl", "checkpoints", "evaluations", "segments", "downstream", "wandb")
_REMEDY = "make it readable (is its disk mounted?) and start the same command again"
BEST = "best"  # the name of the checkpoint that validated best
_STEP = re.compile(r"step-([0-9]{8,})")


def listed(folder: Path, what: str | None = None) -> list[Path]:
    """What a folder holds, by name; nothing where there is no such folder. `what`: it, as the user knows it.

    Raises UserError where it may not be listed.
    """
    with readable(what or str(folder), _REMEDY):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def refuse_links(folder: Path, names: Sequence[str] = WRITTEN) -> None:
    """Raises UserError if one of these entries of a run's folder, or anything inside one, is a link or is neither a file nor
    a folder.

    A file with a second name (a hard link) is refused too: writing to it would change what the other name stands for. The
    second names that we give ourselves, checkpoints/best/, are of files that are never written to.
    """
    for path in (folder / name for name in names):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink > 1:
            raise UserError(
                f"{path} has a second name (a hard link) that would change with it: put a copy in its place "
                f"(cp -p FILE COPY && mv COPY FILE)"
            )
        inside = [] if path.is_symlink() or not path.is_dir() else listed(path)
        for link in (each for each in (path, *inside) if each.is_symlink()):
            raise UserError(
                f"{link} is a link, and nothing is written or deleted through one: put what it leads to in its place (a whole "
                f"run may lie elsewhere, with a link to it in runs_dir)"
            )
        for each in (path, *(each for each in inside if step_of(each.name) is not None or each.name == BEST)):
            is_file = each.suffix == ".jsonl"
            if each.exists() and not (each.is_file() if is_file else each.is_dir()):
                raise UserError(f"{each} is no {'file' if is_file else 'folder'}, as it has to be: move it away")


def step_folder(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The reverse; None for every other name, a user's copy `step-00000002.backup` among them."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and name == step_folder(int(match[1])) else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run, damaged ones too, the newest first. folder: its checkpoints/.

    Raises UserError where they cannot be listed, and where there are none although some have been written (`mark`).
    """
    found = numbered_folders(folder)
    with readable(str(folder), _REMEDY):
        is_missing = not found and os.path.lexists(_mark_of(folder))
    if is_missing:
        raise UserError(
            f"{folder} holds no checkpoint, and this run has written some: bring them back (is their disk mounted?), or "
            f"train anew with overwrite=true or another name=..."
        )
    return found


def numbered_folders(folder: Path) -> list[Path]:
    """As `checkpoint_folders`, whatever should be there."""
    numbered = [(step, path) for path in listed(folder) if (step := step_of(path.name)) is not None]
    with readable(str(folder), _REMEDY):
        steps = {step: path for step, path in numbered if path.is_dir()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def remove(folder: Path) -> None:
    """With all that is in it; what stands in its place, which ours never is, alone: a file, or a link without what it leads to.

    What is gone, also meanwhile, is gone.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        with contextlib.suppress(FileNotFoundError):  # whose file rmtree names without its folder
            shutil.rmtree(folder)


def mark(folder: Path) -> None:
    """Note beside checkpoints/, so on another disk where that is a mount, that a checkpoint has been written into it."""
    if not os.path.lexists(_mark_of(folder)):  # a link that leads nowhere would make a file there
        _mark_of(folder).touch()


def _mark_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-written")
