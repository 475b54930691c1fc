"""Lint, formatting and types of the whole project: `python scripts/check_code.py`. Exit status 1 if one finds fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment
from harness.entry.cli import run_script
from harness.errors import UserError

CHECKS = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])


def main(arguments: list[str]) -> int:
    if arguments:
        raise UserError(f"{arguments[0]}: nothing can be chosen here; leave it out")
    failed = []
    for check in CHECKS:
        print(f"== {' '.join(check)}", flush=True)
        if subprocess.run([sys.executable, "-m", *check], cwd=ROOT).returncode:
            failed.append(" ".join(check))
    print(f"== {'fault found by ' + ', '.join(failed) if failed else 'lint, formatting and types are in order'}")
    return 1 if failed else 0


if __name__ == "__main__":
    enter_environment(also=["ruff", "mypy"])
    run_script(main, description=__doc__)
