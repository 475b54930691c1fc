"""Runs of a study, one after another, each trained and evaluated: started by scripts/run_study.py, not by hand.

python scripts/study_run.py, with a socket for its standard input, on which a line of JSON asks for a run:

    log        the file that takes all output of the run
    make       train_model.py's arguments, or `convert` and those of scripts/convert.py
    evaluate   eval_model.py's arguments

A line there in answer says that it has ended well. After one that has not, the process ends with the run's status. It ends when
its standard input does, so that no run outlives the study that started it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import torch

import eval_model
import train_model
from harness.entry.cli import run_script
from harness.runs.folder import finished
from harness.runs.from_weights import ORIGIN_FILE


def main(arguments: list[str]) -> int:
    for request in requests():
        write_to(request["log"])
        if status := make_run(request["make"], request["evaluate"]):
            return status
        gc.collect()  # models are full of circles, and their memory on a GPU is other processes' too
        torch.cuda.empty_cache()
    return 0


def requests() -> Iterator[dict[str, Any]]:
    """What is asked for; whoever takes the next one has done the one before. SIGTERM comes where the input ends in between."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    under_way = threading.Event()

    def listen() -> None:
        # Not through sys.stdin, whose lock a thread may not hold when the interpreter ends.
        rest = b""
        while got := os.read(0, 65536):
            *whole, rest = (rest + got).split(b"\n")
            for line in whole:
                under_way.set()
                lines.put(line)
        if under_way.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)
        under_way.clear()
        with contextlib.suppress(OSError):  # no one waits for it any more
            os.write(0, b"\n")


def write_to(log: str) -> None:
    """Standard output and error of this process, what native code writes there included, go to this file's end."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def make_run(make: Sequence[str], evaluate: Sequence[str]) -> int:
    """Its status: 0 for one that is trained, or converted, and evaluated."""
    made = convert_run(make[1:]) if make[0] == "convert" else train_model.main([*make])
    return made or eval_model.main([*evaluate])


def convert_run(arguments: Sequence[str]) -> int:
    """A conversion that was finished before is kept; what a killed one left is made again."""
    from scripts import convert as script

    (target,) = (Path(argument.removeprefix("to=")) for argument in arguments if argument.startswith("to="))
    if finished(target):
        return 0
    if (target / ORIGIN_FILE).is_file():
        shutil.rmtree(target)
    return script.main([*arguments])


if __name__ == "__main__":
    run_script(main, description=__doc__)
