"""The whole way of a newcomer, for real: a fresh copy, a true installation, and the commands in a fresh shell."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.projects import BASE_PYTHON, block, copy_project, installed

OUT_OF_REACH = {"HF_ENDPOINT": "http://127.0.0.1:9", "WANDB_BASE_URL": "http://127.0.0.1:9"}  # the discard port


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readmes_two_lines_work_word_for_word_in_a_fresh_shell_without_the_hub(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "a fresh copy")
    tools = tmp_path / "bin"  # the machine's own `python` and `python3`, which lack every requirement
    tools.mkdir()
    for name in ("python", "python3"):
        (tools / name).write_text(f'#!/bin/sh\nexec "{BASE_PYTHON}" "$@"\n')
        (tools / name).chmod(0o755)
    pip = {key: value for key, value in os.environ.items() if key.startswith("PIP_") or key.lower().endswith("_proxy")}
    fresh = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": os.environ["HOME"], "HF_HOME": str(tmp_path / "hub")}

    def shell(command: str, **environ: str) -> str:
        result = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=project,
            env=fresh | OUT_OF_REACH | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    (run,), (tests,) = (block("README.md", marker).splitlines() for marker in ("run", "test command"))
    said = shell(run.replace("attention=mla", "attention=mla budget.steps=2"), **pip)
    assert "stdlib is prepared instead of wikitext2" in said
    assert len([run for run in (project / "runs").glob("[!.]*") if run.is_dir()]) == 1, "set-up must not train"
    assert {"torch", "pytest", "mypy"} <= set(installed(project / ".venv"))
    assert "Packages: all there" in shell("sh prepare_for_use.sh", PIP_NO_INDEX="1")

    summary = json.loads(said.strip().splitlines()[-1])
    assert (summary["attention"], summary["dataset"], summary["steps"]) == ("mla", "stdlib", 2)
    assert " passed" in shell(f"{tests} tests/setup/test_bootstrap.py", PIP_NO_INDEX="1").strip().splitlines()[-1]
