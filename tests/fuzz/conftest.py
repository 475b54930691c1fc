"""What all fuzzers share: how many inputs, and what may come of one."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.errors import UserError
from tests.support.micro import contents

SECONDS = 20  # that one input may take, on a busy machine
GROWTH = 600  # MB that all inputs of a fuzzer may add to the peak of the process


class Fuzzing:
    """Tries inputs and counts what came of them. A test fails at the first that is neither taken nor refused."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self.outcomes: Counter[str] = Counter()

    def share(self, percent: float) -> range:
        """Numbers of a fuzzer's inputs: its part of all."""
        return range(max(1, round(self.inputs * percent / 100)))

    def try_one(self, label: str, action: Callable[[], object], *, leaves: Path | None = None) -> None:
        """`action` must end in time, in a result or in a UserError of one line; files below `leaves` stay as they are."""
        before = contents(leaves) if leaves is not None else {}
        started = time.monotonic()
        try:
            action()
            self.outcomes["taken"] += 1
        except UserError as error:
            message = str(error)
            assert message.strip() and message.isprintable(), f"{label}: {message!r}"
            self.outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - started < SECONDS, f"{label} took {time.monotonic() - started:.0f} seconds"
        if leaves is not None:
            assert contents(leaves) == before, f"{label} changed its input"


@pytest.fixture
def fuzzing(request: pytest.FixtureRequest) -> Iterator[Fuzzing]:
    """Counts are printed at the end (`pytest -rP` shows them)."""
    fuzzing = Fuzzing(request.config.getoption("--fuzz-inputs"))
    unit = 1e6 if sys.platform == "darwin" else 1e3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield fuzzing
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / unit
    print(f"{request.node.name}: {sum(fuzzing.outcomes.values())} inputs, {dict(fuzzing.outcomes)}, {growth:.0f} MB")
    assert growth < GROWTH


@pytest.fixture
def choice(request: pytest.FixtureRequest) -> random.Random:
    """The same inputs at every run of a test; a longer one goes on where a shorter one ends."""
    return random.Random(request.node.name)
