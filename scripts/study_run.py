"""One run of a study, trained and evaluated in a process of its own: started by scripts/run_study.py, not by hand.

python scripts/study_run.py [train_model.py's arguments] -- [eval_model.py's arguments]
python scripts/study_run.py convert [scripts/convert.py's arguments] -- [eval_model.py's arguments]

It ends when its standard input does, so that no run outlives the study that started it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import eval_model
import train_model
from harness.entry.cli import run_script
from harness.runs.folder import finished
from harness.runs.from_weights import ORIGIN_FILE


def end_with_standard_input() -> None:
    """Waits for the end of the parent's pipe, which no one writes to."""
    # Not through sys.stdin, whose lock a thread may not hold when the interpreter ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> int:
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    make, evaluate = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    made = convert_run(make[1:]) if make[0] == "convert" else train_model.main(make)
    return made or eval_model.main(evaluate)


def convert_run(arguments: list[str]) -> int:
    """A conversion that was finished before is kept; what a killed one left is made again."""
    from scripts import convert as script

    (target,) = (Path(argument.removeprefix("to=")) for argument in arguments if argument.startswith("to="))
    if finished(target):
        return 0
    if (target / ORIGIN_FILE).is_file():
        shutil.rmtree(target)
    return script.main(arguments)


if __name__ == "__main__":
    run_script(main, description=__doc__)
