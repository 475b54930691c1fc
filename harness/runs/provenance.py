"""When a record was made, and by which state of the project."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

from harness.config.places import ROOT
from harness.files.atomic import write_text

CHANGED = "+changes"  # behind a commit from which files differed
CHANGES_FILE = "changes.diff"  # in a run's folder
MOST_CHANGES, MOST_UNTRACKED = 1_000_000, 100  # bytes of it, and names


def now() -> str:
    """When a record was made: ISO 8601 in UTC, so that text sorts by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def keep_changes(folder: Path) -> None:
    """Where the project's files differ from its commit, write how to CHANGES_FILE: of what `has_changes` is true.

    Tracked files only, since others may be anything; those that git does not ignore are named. `git apply` reads the file
    unless it was cut, which its first line says then.
    """
    head, dirty = _head()
    if not dirty:
        return
    command = ["git", "diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--", "."]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        difference = process.stdout.read(MOST_CHANGES + 1)
        process.kill()  # which it does not notice unless there is more than that
    untracked = (
        subprocess.run(["git", "ls-files", "--others", "--exclude-standard", "--", "."], cwd=ROOT, capture_output=True)
        .stdout.decode(errors="replace")
        .splitlines()
    )
    lines = [f"# tracked files of the project against its commit {head}"]
    if len(difference) > MOST_CHANGES:
        lines[0] += f"; cut after {MOST_CHANGES:,} bytes"
    lines += [f"# not in it, untracked: {name}" for name in untracked[:MOST_UNTRACKED]]
    lines += [f"# and {len(untracked) - MOST_UNTRACKED} more"] if len(untracked) > MOST_UNTRACKED else []
    write_text(folder / CHANGES_FILE, "\n".join([*lines, difference[:MOST_CHANGES].decode(errors="replace")]))


def commit() -> str | None:
    """The project's git commit as records hold it, with CHANGED if files differ from it; None outside a checkout."""
    head, dirty = _head()
    return head and head + (CHANGED if dirty else "")


def changed_since(moment: float) -> bool:
    """Whether the project's code is no longer what a process has imported that began then (seconds since the epoch)."""
    parts = ("*.py", "harness/**/*.py", "modeling/**/*.py", "scripts/*.py")
    try:
        return any(file.stat().st_ctime > moment for part in parts for file in ROOT.glob(part))
    except FileNotFoundError:
        return True


def has_changes(commit: str | None) -> bool:
    """Whether the project's files differed from what `commit` returned."""
    return commit is not None and commit.endswith(CHANGED)


def short_commit(commit: str | None) -> str:
    """What `commit` returned, for people."""
    return "none" if commit is None else commit[:9] + (CHANGED if has_changes(commit) else "")


def _head() -> tuple[str | None, bool]:
    """The project's git commit, and whether files differ from it; None outside a checkout."""
    try:
        head, status = (_git(*words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return None, False
    return head, bool(status)


def _git(*words: str) -> str:
    """What git prints. A signal to this process's group, which asks a run to stop, does not reach it."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, start_new_session=True)
    return done.stdout.strip()
