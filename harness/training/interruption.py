"""Being asked to stop: SIGTERM (a scheduler, `kill`), SIGINT (Ctrl-C) and SIGHUP (the terminal is closed) set a flag that
training looks at.

A run that is asked to stop finishes the step in hand, writes a checkpoint and says how it goes on. Nothing is done in the
handler itself, where any lock may be held. A second signal, of either kind, ends the process at once, as it would have
without a handler. Within a second of the first it is the same request: schedulers send a signal to every process of a job,
and launchers among these pass it on once more. A hang-up is never the second: shells and the system send it more than once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_SECONDS = 1.0


class Interrupted(Exception):
    """Raised at a safe point, by `Interruption.poll`, in what has to be left before it is done."""


class Interruption:
    """Whether the process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells say it: 143, 130 or 129."""
        assert self.signal is not None
        return 128 + self.signal

    def poll(self) -> None:
        """Raises Interrupted once the process has been asked to stop."""
        if self.requested:
            raise Interrupted


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Inside, SIGNALS set the flag that is handed out; afterwards they mean what they meant before.

    A hang-up that is ignored (nohup) stays ignored. Outside the main thread, where Python allows no handler, the flag is
    never set.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    first = 0.0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal first
        if not interruption.requested:
            interruption.signal, first = number, time.monotonic()
        elif number != signal.SIGHUP and time.monotonic() - first > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before: dict[int, Any] = {
        number: signal.signal(number, note) for number in SIGNALS if number != signal.SIGHUP or not ignored
    }
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if interruption.signal == signal.SIGHUP:  # sent once more while the process leaves
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
