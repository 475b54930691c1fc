"""One run of a study, trained and evaluated in a process of its own: started by scripts/run_study.py, not by hand.

python scripts/study_run.py [train_model.py's arguments] -- [eval_model.py's arguments]

It ends when its standard input does, so that no run outlives the study that started it.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.bootstrap import enter_environment

enter_environment()

import eval_model
import train_model
from harness.command_line import run_script


def end_with_standard_input() -> None:
    """Waits for the end of the parent's pipe, which no one writes to."""
    # Not through sys.stdin, whose lock a thread may not hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    train, evaluate = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    return train_model.main(train) or eval_model.main(evaluate)


if __name__ == "__main__":
    run_script(main, description=__doc__)
