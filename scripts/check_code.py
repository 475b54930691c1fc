"""Lint, formatting and types of the whole project: `python scripts/check_code.py`. Exit status 1 if one finds fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment

CHECKS = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])


def main() -> int:
    failed = []
    for check in CHECKS:
        print(f"== {' '.join(check)}", flush=True)
        if subprocess.run([sys.executable, "-m", *check], cwd=ROOT).returncode:
            failed.append(" ".join(check))
    print(f"== {'fault found by ' + ', '.join(failed) if failed else 'lint, formatting and types are in order'}")
    return 1 if failed else 0


if __name__ == "__main__":
    enter_environment(also=["ruff", "mypy"])
    sys.exit(main())
