"""What modeling says no with, and what a mistake of ours is where somebody else's errors are caught."""

import contextlib
from collections.abc import Iterator


class Refusal(ValueError):
    """A configuration or an input that cannot be, in words for whoever chose it: the numbers, and what to take instead.

    The commands print it as one sentence. Any other error, a plain ValueError too, is a fault of the code and keeps its
    traceback.
    """


class Mistake(Exception):
    """Of this project, where it answers in place of torch while other code runs; the cause says which. It stays a traceback."""


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Around what this project does in the midst of a call of others, whose errors their caller takes for theirs."""
    try:
        yield
    except Exception as error:
        raise Mistake from error
