"""Reading what somebody else may have written: strict JSON objects, and names that stay inside their folder.

Nothing here raises anything but OSError and ValueError, whatever the bytes: callers make their own sentence of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

MOST_BYTES = 1 << 28  # no JSON file of this project comes near it; parsing takes ten times as much memory


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a regular file.

    Raises OSError, or ValueError (half a sentence, one line) for what is too large, no JSON in UTF-8, no object, nested
    too deeply, or holds a number that is no finite one.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is no regular file")
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes are more than any such file has")
    return parse_object(path.read_bytes())


def parse_object(data: bytes) -> dict[str, Any]:
    """The same from bytes."""
    try:
        value = json.loads(data.decode("utf-8"), parse_float=_finite, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    if b"\\ud" in data.lower():  # escaped, half a pair is JSON and no text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
    return value


def stays_inside(name: str) -> bool:
    """Whether a relative name, joined to a folder, names something below that folder."""
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name
    )


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number that can count something: 0 and up, within 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
