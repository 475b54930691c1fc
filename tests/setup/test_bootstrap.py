"""enter_environment(): which interpreter an entry script ends up in. Interpreters here are tiny environments."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.entry import bootstrap
from harness.entry.bootstrap import ESSENTIAL, REQUIRED
from tests.support.projects import ROOT, make_environment

ENTRY = """\
import json, os, sys
from harness.entry.bootstrap import enter_environment
enter_environment()
print(json.dumps({"prefix": sys.prefix, "argv": sys.argv[1:], "folder": os.getcwd(), "pid": os.getpid(),
                  "dont_write_bytecode": sys.flags.dont_write_bytecode, "rank": os.environ.get("RANK"),
                  "leaked": [name for name in os.environ if name == "_STARTED_AGAIN_IN_VENV"]}))
sys.exit(7)
"""
# What is read before the environment is entered, below harness/.
BOOTSTRAP = ("__init__.py", "entry/__init__.py", "entry/bootstrap.py")
SENTENCE = "run `sh prepare_for_use.sh`"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one entry script, without an environment."""
    folder = tmp_path / "a project"
    (folder / "harness" / "entry").mkdir(parents=True)
    for file in BOOTSTRAP:
        shutil.copy(ROOT / "harness" / file, folder / "harness" / file)
    (folder / "entry.py").write_text(ENTRY)
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """An interpreter that lacks every requirement."""
    return make_environment(tmp_path / "bare")


def start(python: Path, project: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, *arguments],
        cwd=project.parent,
        env={**os.environ, **environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the entry script found out about itself; its own exit status must have come through."""
    output, errors = process.communicate()
    assert process.returncode == 7, errors
    found: dict[str, Any] = json.loads(output)
    return found


def assert_refused(process: subprocess.Popen[str], *words: str) -> None:
    output, errors = process.communicate()
    assert process.returncode == 2, errors
    assert output == ""
    assert len(errors.splitlines()) == 1
    for word in (SENTENCE, *words):
        assert word in errors


def test_without_the_requirements_the_script_starts_again_in_the_projects_environment(project: Path, bare: Path) -> None:
    make_environment(project / ".venv", REQUIRED)
    arguments = ["attention=mla", "prompt=a b, (c) = 'd'", "", "-m"]
    process = start(bare, project, "-B", str(project / "entry.py"), *arguments, RANK="1")
    assert answer(process) == {
        "prefix": str(project / ".venv"),
        "argv": arguments,
        "folder": str(project.parent),
        "pid": process.pid,
        "dont_write_bytecode": 1,
        "rank": "1",
        "leaked": [],
    }


def test_an_interpreter_that_has_everything_is_kept(project: Path, tmp_path: Path) -> None:
    make_environment(project / ".venv", REQUIRED)
    python = make_environment(tmp_path / "whole", REQUIRED)
    assert answer(start(python, project, str(project / "entry.py")))["prefix"] == str(tmp_path / "whole")


def test_one_missing_requirement_is_enough_to_move(project: Path, tmp_path: Path) -> None:
    make_environment(project / ".venv", REQUIRED)
    python = make_environment(tmp_path / "nearly", [name for name in REQUIRED if name != "wandb"])
    assert answer(start(python, project, str(project / "entry.py")))["prefix"] == str(project / ".venv")


def test_a_machine_with_the_essentials_and_no_environment_runs_on(project: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "essential", ESSENTIAL)
    assert answer(start(python, project, str(project / "entry.py")))["prefix"] == str(tmp_path / "essential")


@pytest.mark.parametrize("lacking", ESSENTIAL)
def test_without_an_essential_one_and_no_environment_one_sentence_says_what_to_do(
    project: Path, tmp_path: Path, lacking: str
) -> None:
    python = make_environment(tmp_path / "some", [name for name in ESSENTIAL if name != lacking])
    assert_refused(start(python, project, str(project / "entry.py")), f"lacks {lacking}", str(project))


def test_an_unfinished_environment_gets_the_sentence_and_no_loop(project: Path, bare: Path) -> None:
    make_environment(project / ".venv", ["torch"])
    assert_refused(start(bare, project, str(project / "entry.py")), "lacks hydra")


def test_an_environment_that_leads_back_here_does_not_loop(project: Path, bare: Path) -> None:
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{bare}" "$@"\n')
    python.chmod(0o755)
    assert_refused(start(bare, project, str(project / "entry.py")))


def test_a_folder_named_like_a_package_is_not_taken_for_it(project: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "essential", ESSENTIAL)
    make_environment(project / ".venv", REQUIRED)
    for name in set(REQUIRED) - set(ESSENTIAL):
        (project / name).mkdir()  # W&B writes its runs to wandb/
    assert answer(start(python, project, str(project / "entry.py")))["prefix"] == str(project / ".venv")


def test_an_unsupported_python_gets_the_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "OLDEST", (3, 99))
    with pytest.raises(SystemExit) as stopped:
        bootstrap.enter_environment()
    assert stopped.value.code == 2
    assert SENTENCE in capsys.readouterr().err


def test_windows_is_said_to_be_unsupported_before_anything_else(project: Path, bare: Path) -> None:
    make_environment(project / ".venv", REQUIRED)
    line = "import sys; sys.platform = 'win32'; from harness.entry.bootstrap import enter_environment; enter_environment()"
    process = start(bare, project, "-c", f"import sys; sys.path.insert(0, {str(project)!r}); {line}")
    output, errors = process.communicate()
    assert (process.returncode, output, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith("Windows is not supported") and "wsl --install" in errors


ENTRY_SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")])
UNTIL_THE_SENTENCE = [*(ROOT / "harness" / name for name in BOOTSTRAP), *ENTRY_SCRIPTS]


@pytest.mark.parametrize("file", UNTIL_THE_SENTENCE, ids=lambda file: str(file.relative_to(ROOT)))
def test_an_old_interpreter_can_read_everything_on_its_way_to_the_sentence(file: Path) -> None:
    ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's Python files and an interpreter `bare` beside them that lacks every requirement."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("harness", "modeling", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    make_environment(folder / "bare")
    return folder


@pytest.mark.parametrize("script", ENTRY_SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_every_script_says_the_sentence_before_any_heavy_import(script: Path, sources: Path) -> None:
    python = sources / "bare" / "bin" / "python"
    assert_refused(start(python, sources, str(sources / script.relative_to(ROOT))))


@pytest.mark.parametrize("script", ENTRY_SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_every_script_finds_the_project_where_python_is_told_not_to_look_beside_it(script: Path, sources: Path) -> None:
    python, file = sources / "bare" / "bin" / "python", str(sources / script.relative_to(ROOT))
    assert_refused(start(python, sources, "-I", file))
    assert_refused(start(python, sources, file, PYTHONSAFEPATH="1"))
