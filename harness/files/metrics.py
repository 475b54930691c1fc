"""metrics.jsonl, the record of a run's steps: a line of JSON each."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from harness.errors import UserError, readable, tell
from harness.files.untrusted import Unreadable, is_count, parse_object, whole_lines


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; another process may be writing the last one. None where there is no file."""
    path = run / "metrics.jsonl"
    with readable(str(path), _METRICS_REMEDY):
        lines = whole_lines(path)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_object(line, record=True)
            if lacking := [key for key in ("step", "tokens") if not is_count(row.get(key))]:
                raise Unreadable(f"it has no {lacking[0]} that is a count")
            if wrong := [key for key, value in row.items() if not _is_logged(value)]:
                raise Unreadable(f"{wrong[0]} is no number")
        except Unreadable as error:
            raise UserError(f"line {number} of {path} is damaged ({error}): {_METRICS_REMEDY}") from None
        rows.append(row)
    return rows


_METRICS_REMEDY = "copy the file back from where it is whole, or train the run anew with overwrite=true"


def _is_logged(value: Any) -> bool:
    """A number, or None in the place of one that was not finite."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _whole_lines(file: FileIO, size: int) -> int:
    """Where the last whole line of the first `size` bytes ends: there, unless the file is not the one it was.

    That rows are missing then is said; nothing brings them back, and what is there stays.
    """
    file.seek(0)
    content = file.readall()[:size]
    whole = content.rfind(b"\n") + 1
    if whole < size:
        last = content[:whole].splitlines()[-1:]
        ending = f", the last of them {last[0].decode(errors='replace')[:40]}..." if last else ""
        tell(
            f"{file.name}: it held {size:,} bytes when the checkpoint was written and holds {whole:,} of whole rows "
            f"now{ending}; those between are lost, what is there stays, and the run goes on"
        )
    return whole


class MetricsFile:
    """metrics.jsonl: every line reaches the operating system at once, so that a killed process loses none."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would try again, on closing, what a full disk did not take.
        self._path = path
        self._file = FileIO(path, "a+")
        self._file.truncate(_whole_lines(self._file, keep_bytes))

    def check(self) -> None:
        """Raises UserError unless the file that is open still stands under its name."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            pass
        raise UserError(
            f"{self._path} was removed, moved or replaced while the run was trained, and what was written since is lost: put "
            f"the run's folder back and start the same command again, which otherwise trains anew"
        )

    def append(self, row: Mapping[str, float]) -> None:
        self.check()
        # JSON has no infinity and no NaN; readers other than Python's stop at them.
        finite = {key: value if math.isfinite(value) else None for key, value in row.items()}
        line = memoryview(json.dumps(finite, allow_nan=False).encode() + b"\n")
        while line:  # a disk that fills up takes a part, then refuses
            line = line[self._file.write(line) :]

    def size(self) -> int:
        self.check()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
