"""What W&B's client kept on this machine and its server lacks: parts of runs, one folder for each time it was started.

A part that was offline is sent by the client's own command, one at a time and in order: given several, that command stops
at the first whose end is torn. It marks what it has sent with an empty file beside it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.tracking.wandb_run import UNSENT, client_root, kept_id

_PART = "*run-*/run-*.wandb"


def is_tracked(folder: Path) -> bool:
    """Whether W&B's client has ever been started for this folder."""
    return kept_id(folder) is not None or next(folder.glob(f"wandb/{_PART}"), None) is not None


def parts_of(folder: Path) -> list[Path]:
    """All that the client has kept of this folder's run, the oldest first."""
    root, run_id = client_root(folder), kept_id(folder)
    own = root == folder.absolute()  # else other runs have their parts there too
    return [file.parent for file in _files(root) if own or file.stem == f"run-{run_id}"]


def pending(folder: Path) -> list[Path]:
    """Those that the server lacks, or has not taken whole."""
    return [
        part
        for part in parts_of(folder)
        if (part / UNSENT).exists() or (part.name.startswith("offline-") and not _is_marked(part))
    ]


def known_id(folder: Path) -> str | None:
    """The run's name in W&B, of runs that are older than the file that keeps it from the newest part."""
    files = _files(folder)
    return kept_id(folder) or (files[-1].stem.removeprefix("run-") if files else None)


def _files(root: Path) -> list[Path]:
    """The client's files in the order in which it was started: its folders are [offline-]run-DATE_TIME-ID."""
    return sorted(root.glob(f"wandb/{_PART}"), key=lambda file: file.parent.name.partition("run-")[2])


def upload(parts: Sequence[Path]) -> str | None:
    """Send parts by the client's command until one is torn or refused: why, None when the server has them all."""
    for part in parts:
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(part)]
        cache = {"WANDB_CACHE_DIR": str(part.parent / "cache"), "WANDB_DATA_DIR": str(part.parent / "data")}
        done = subprocess.run(
            command,
            env=cache | {"WANDB_ERROR_REPORTING": "false"} | os.environ,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if not _is_marked(part):
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
            return f"{part.name}: {lines[-1].removeprefix('wandb:').strip() if lines else f'status {done.returncode}'}"
        (part / UNSENT).unlink(missing_ok=True)
    return None


def mark_sent(parts: Sequence[Path]) -> None:
    """The server has all that these parts tell, from the run's own files."""
    with contextlib.suppress(OSError):  # a folder that cannot be written is uploaded again
        for part in parts:
            for file in part.glob("run-*.wandb"):
                _mark(file).touch()
            (part / UNSENT).unlink(missing_ok=True)


def _is_marked(part: Path) -> bool:
    return all(_mark(file).exists() for file in part.glob("run-*.wandb"))


def _mark(file: Path) -> Path:
    return file.with_name(f"{file.name}.synced")
