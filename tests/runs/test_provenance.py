"""A run made from a working tree that differs from its commit says how it differed, and nothing else of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.runs import provenance


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@x"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project below a repository's root that has other files too."""
    folder = tmp_path / "outer" / "project"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text("width = 64\n")
    (folder.parent / "letters.txt").write_text("dear\n")
    (folder / ".gitignore").write_text("ignored.py\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-qm", "first")
    monkeypatch.setattr(provenance, "ROOT", folder)
    return folder


def test_a_clean_tree_keeps_nothing(project: Path, tmp_path: Path) -> None:
    provenance.keep_changes(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_differs_is_kept_so_that_git_can_apply_it(project: Path, tmp_path: Path) -> None:
    (project / "model.py").write_text("width = 128\n")
    (project / "new.py").write_text("password = 'hunter2'\n")
    (project / "ignored.py").write_text("password = 'hunter3'\n")
    (project.parent / "letters.txt").write_text("dear Anna\n")
    provenance.keep_changes(tmp_path / "run")
    text = (tmp_path / "run" / "changes.diff").read_text()
    head = git(project, "rev-parse", "HEAD").strip()
    assert text.startswith(f"# tracked files of the project against its commit {head}\n# not in it, untracked: new.py\n")
    assert "hunter" not in text and "Anna" not in text and "ignored.py" not in text
    git(project, "checkout", "-q", "--", ".")
    git(project, "apply", str(tmp_path / "run" / "changes.diff"))
    assert (project / "model.py").read_text() == "width = 128\n"


def test_a_long_difference_is_cut_and_says_so(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "MOST_CHANGES", 1000)
    monkeypatch.setattr(provenance, "MOST_UNTRACKED", 2)
    (project / "model.py").write_text("width = 64\n" * 100_000)
    for name in "abcd":
        (project / f"{name}.py").touch()
    provenance.keep_changes(tmp_path / "run")
    text = (tmp_path / "run" / "changes.diff").read_text()
    assert len(text) < 1500 and "; cut after 1,000 bytes" in text.splitlines()[0]
    assert "untracked: b.py\n# and 2 more\n" in text


def test_without_git_there_is_nothing_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    provenance.keep_changes(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_signal_to_the_runs_group_leaves_the_commit_known(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study passes on what asks it to stop, perhaps just when a run writes its summary."""
    known, real = provenance.commit(), shutil.which("git")
    assert known is not None
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\n"
        f"if os.getpgid(0) == {os.getpgid(0)}:\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"os.execv({real!r}, [{real!r}, *sys.argv[1:]])\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    assert provenance.commit() == known
