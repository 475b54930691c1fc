"""A study whose runs cost no seconds of imports: forked_runs(), and a program for tests/support/killed.py.

The program's first argument is the folder above study/NAME.yaml, the others are those of scripts/run_study.py. Runs
have processes of their own here too, forked from the one that runs the study and not started anew.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
import torch._dynamo

import harness.runs.evaluate_run
import harness.runs.session
import harness.study.plan
import harness.study.runner
from harness.errors import UserError
from scripts import run_study, study_run


class Forked:
    """What harness/study/runner.py uses of subprocess.Popen."""

    def __init__(self, command: Sequence[str], *, env: dict[str, str], stdin: int, stdout: IO[bytes], **_: Any) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(stdin, 0)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # else others' pipes and locks live as long as this run
            torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # more would wait for threads of the process it comes from
            _run(command[2:])

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a run", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def _run(arguments: Sequence[str]) -> None:
    """Runs, and the end of their process."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    status = 1
    try:
        status = study_run.main(list(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def forked_runs() -> Iterator[None]:
    """The runs of all studies inside are forked from this process. OMP_NUM_THREADS has to be set for them."""
    forking = SimpleNamespace(
        Popen=Forked, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT, TimeoutExpired=subprocess.TimeoutExpired
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(harness.study.runner, "subprocess", forking)
        patched.setattr(harness.study.runner, "POLL_SECONDS", 0.05)
        yield


def main(arguments: list[str]) -> int:
    harness.study.plan.CONFIGS = Path(arguments[0])
    try:
        with forked_runs():
            return run_study.main(arguments[1:])
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
