from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def quick_collection() -> Iterator[None]:
    """Holm's correction in statsmodels collects garbage at each call, which takes long beside a loaded torch."""
    import statsmodels.stats.multitest  # noqa: F401  what it loads too

    gc.freeze()
    yield
    gc.unfreeze()
