"""The flag: set by a signal in the main thread, never elsewhere, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from harness.training.interruption import Interrupted, interruptible


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_sets_the_flag_and_leaves_the_rest_to_who_looks(number: signal.Signals, code: int) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with interruptible() as interruption:
        interruption.poll()
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested and interruption.exit_code == code
        with pytest.raises(Interrupted):
            interruption.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.exit_code == code, "what comes right behind it is the same request, passed on by a launcher"
    assert {each: signal.getsignal(each) for each in before} == before


def test_outside_the_main_thread_signals_mean_what_they_meant() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with interruptible() as interruption:
            seen.append((signal.getsignal(signal.SIGTERM), interruption.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
