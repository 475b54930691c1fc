"""Run the tests from any folder: `python scripts/run_tests.py [pytest's arguments]`.

Alone it runs everything but the tests marked slow or gpu; `-m slow` runs those. Paths are relative to the project. Files of
tests are shared out over the processors, eight at most; `-n 0` runs all in this process. `--durations=40` says in the end which
took longest; a test that only needs a command to run takes `forks` (tests/support/forks.py), which starts none anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment


def main(argv: Sequence[str]) -> int:
    import pytest

    os.chdir(ROOT)
    workers = min(8, os.cpu_count() or 1)
    return int(pytest.main(["-n", str(workers), "--dist", "loadfile", *argv]))


if __name__ == "__main__":
    enter_environment(also=["pytest", "pytest_timeout", "xdist"])
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        print(f"{__doc__}\nPytest's:\n", flush=True)
    sys.exit(main(sys.argv[1:]))
