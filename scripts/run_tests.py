"""Run the tests from any folder: `python scripts/run_tests.py [pytest's arguments]`.

Alone it runs everything but the tests marked slow or gpu; `-m slow` runs those. Paths are relative to the project.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import ROOT, enter_environment


def main(argv: Sequence[str]) -> int:
    import pytest

    os.chdir(ROOT)
    return int(pytest.main(list(argv)))


if __name__ == "__main__":
    enter_environment(also=["pytest", "pytest_timeout"])
    sys.exit(main(sys.argv[1:]))
