"""Commands that are killed or asked to stop: python tests/support/killed.py, commands on standard input.

The process runs the first command of each program itself, so that everything is imported, and forks a child for every other
one: a kill costs no seconds of imports. A line of JSON is a command: its "program" (train_model without), whose main takes
"overrides", and one of

    "after"     seconds, then SIGKILL, or the signal of that number as "signal"; with "whom": "all" it and every process that
                it started, with "runs" those alone
    "event"     SIGKILL from the process itself right before its n-th change of a file below a folder `runs` (writing,
                flushing, renaming, linking, deleting)
    "signals"   [where, n, numbers]: it sends itself these signals at the n-th "step", "evaluation" (batch) or "write"

and "output", a file for its standard output. The answer is a line of JSON, {"status": returncode, "events": n}.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import signal
import sys
import threading
import time
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


def send_signals(where: str, n: int, numbers: list[int]) -> None:
    """At the n-th call of what `where` stands for."""
    import safetensors.torch

    from harness.training.optimizer import Optimizer
    from modeling.gpt import GPT

    owner, name = {"step": (Optimizer, "step"), "evaluation": (GPT, "token_losses"), "write": (safetensors.torch, "save_file")}[
        where
    ]
    original: Any = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(1.1 if len(numbers) > 1 else 0.0)  # two that come together are one
        return original(*arguments, **options)

    setattr(owner, name, counted)


def strike(process: int, number: int, whom: str | None) -> None:
    """A signal to a process, to what it started, or to both at one moment."""
    if whom is None:
        os.kill(process, number)
        return
    os.kill(process, signal.SIGSTOP)  # so that it starts nothing in between
    started = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    for each in [int(child) for child in started]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)
    os.kill(process, number if whom == "all" else signal.SIGCONT)


def attempt(command: dict[str, Any], main: Any) -> dict[str, Any]:
    from tqdm import tqdm

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        # tqdm's own lock is shared by all children: one that is killed while it draws would hold it for ever.
        tqdm.set_lock(threading.RLock())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if "output" in command:
            os.dup2(os.open(command["output"], os.O_WRONLY | os.O_CREAT), 1)
        if "signals" in command:
            send_signals(*command["signals"])
        elif "after" not in command:
            count_changes(command.get("event"), writing)
        status = 1
        try:
            status = main(command["overrides"])
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writing)
    timer = None
    if "after" in command:
        blow = child, command.get("signal", signal.SIGKILL), command.get("whom")
        timer = threading.Timer(command["after"], strike, blow)
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
        if tuple(overrides) not in composed:
            composed[tuple(overrides)] = compose(overrides)
        return copy.deepcopy(composed[tuple(overrides)])

    train_model.load_train_config = remembered
    known: dict[str, Any] = {}
    for line in sys.stdin:
        command = json.loads(line)
        program = command.get("program", "train_model")
        if program == "train_model":
            remembered(command["overrides"])
        if program not in known:
            known[program] = importlib.import_module(program).main
            answer = {"status": known[program](command["overrides"]), "events": 0}
        else:
            answer = attempt(command, known[program])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
