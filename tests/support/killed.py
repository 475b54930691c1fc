"""Training runs that are killed for good: python tests/support/killed.py, commands on standard input.

The process trains the first command itself, so that everything is imported, and forks a child for every other one: a kill
costs no seconds of imports. A line of JSON is a command, {"overrides": [...], "after": seconds or null, "event": n or
null}: train_model.main, killed by SIGKILL after so many seconds, or by itself right before its n-th change of a file below
a folder `runs` (writing, flushing, renaming, linking, deleting). The answer is a line of JSON too, {"status": returncode,
"events": n}.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.copyfile")


def count_changes(last: int | None, pipe: int) -> None:
    """Report every change of a run's files through the pipe, and die before the last one."""
    seen = 0
    lock = threading.Lock()
    fsync = os.fsync

    def change() -> None:
        nonlocal seen
        with lock:
            seen += 1
            os.write(pipe, b".")
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            written = isinstance(path, (str, os.PathLike)) and (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) != 0
            if written and f"{os.sep}runs{os.sep}" in os.fspath(path):
                change()
        elif event in CHANGES:
            change()

    def counted_fsync(descriptor: int) -> None:
        change()
        fsync(descriptor)

    sys.addaudithook(look)
    os.fsync = counted_fsync


def attempt(command: dict[str, Any], train: Any) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if command.get("after") is None:
            count_changes(command.get("event"), writing)
        status = 1
        try:
            status = train(command["overrides"])
        finally:
            os._exit(status)
    os.close(writing)
    timer = None
    if command.get("after") is not None:
        timer = threading.Timer(command["after"], os.kill, (child, signal.SIGKILL))
        timer.start()
    events = 0
    while got := os.read(reading, 4096):
        events += len(got)
    os.close(reading)
    if timer is not None:  # before the child's number can be another process's
        timer.cancel()
        timer.join()
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "events": events}


def main() -> None:
    import train_model

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    compose = train_model.load_train_config
    composed: dict[tuple[str, ...], Any] = {}

    def remembered(overrides: list[str]) -> Any:
        """Composing the configuration takes longer than the run."""
        return copy.deepcopy(composed[tuple(overrides)])

    train_model.load_train_config = remembered
    for number, line in enumerate(sys.stdin):
        command = json.loads(line)
        overrides = tuple(command["overrides"])
        if overrides not in composed:
            composed[overrides] = compose(command["overrides"])
        if number == 0:
            answer = {"status": train_model.main(command["overrides"]), "events": 0}
        else:
            answer = attempt(command, train_model.main)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
