"""What tests of studies share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.small_study import forked_runs


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The runs of studies in this process are forked; those of a command are started as ever."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with forked_runs():
        yield
