"""Standard streams that no printed line can fail on.

A stream that was closed, a pipe whose reader has gone, a terminal that is no more, a full disk behind a redirection: the
null device takes its place, and the work goes on. Characters that the stream's encoding lacks are replaced; whatever would
steer a terminal is escaped on standard output, which shows names and values of files from elsewhere.
"""

from __future__ import annotations

import io
import os
import select
import sys

from harness.files.text import visible


class _Unfailing(io.FileIO):
    """Writes to a descriptor, and to the null device in its place once that has failed."""

    def __init__(self, descriptor: int, *, ends: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.ends = ends

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """Raises BrokenPipeError when the reader of a pipe has gone and `ends` is true."""
        try:
            # None: a pipe or terminal that some other program has made non-blocking is full.
            while (written := super().write(data)) is None:
                select.select([], [self], [])
        except OSError as error:
            _to_null(self.fileno())
            if self.ends and isinstance(error, BrokenPipeError):
                raise
            return memoryview(data).nbytes
        return written


class _Visible(io.TextIOWrapper):
    """Text of which a terminal shows every character."""

    def write(self, text: str) -> int:
        super().write(visible(text, but="\n\t"))
        return len(text)


def protect_streams(*, ends_with_reader: bool = False, verbatim: bool = False) -> None:
    """Standard input, output and error of this process become open and unfailing; done again, it changes nothing.

    ends_with_reader: a closed pipe behind standard output raises BrokenPipeError, once: for what is only printed.
    verbatim: standard output that is no terminal takes every character as it is: for what is itself the result.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # or the next file that is opened would take the number, and every line printed
            _to_null(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for descriptor, name, errors in ((1, "stdout", "replace"), (2, "stderr", "backslashreplace")):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__") or isinstance(
            getattr(getattr(before, "buffer", None), "raw", None), _Unfailing
        ):
            continue  # a test's or a notebook's
        if before is not None:
            before.flush()
        as_it_is = descriptor == 2 or (verbatim and not os.isatty(1))  # standard error has progress bars, too
        stream = (io.TextIOWrapper if as_it_is else _Visible)(
            io.BufferedWriter(_Unfailing(descriptor, ends=ends_with_reader and descriptor == 1)),  # type: ignore[type-var]
            encoding="utf-8" if before is None else before.encoding,
            errors=errors,
            line_buffering=True,  # a table's rows are there as they come, and stay when the process is ended
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
    else:
        os.dup2(null, descriptor)
        os.close(null)
