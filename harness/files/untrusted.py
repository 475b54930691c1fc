"""Reading what somebody else may have written: strict JSON objects, and names that stay inside their folder.

Whatever the bytes, what is read here raises OSError or Unreadable, of which callers make their own sentence. Any other
error, a plain ValueError too, is a fault of the code.
"""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NoReturn

# Numbers of a record, with the least that each may be.
Count = Annotated[int, 0]
Positive = Annotated[int, 1]
Figure = Annotated[float, 0.0]
Rate = Annotated[float, 1e-30]
MOST_BYTES = 1 << 28  # no JSON file of this project comes near it; parsing takes ten times as much memory


class Unreadable(ValueError):
    """What a file is instead of what was asked for: half a sentence, one line."""


def read_object(path: Path, *, record: bool = False, infinite: bool = False) -> dict[str, Any]:
    """A JSON object from a regular file.

    record: one of this project's own, in which no name stands twice and whole numbers have 64 bits. infinite: numbers need
    not be finite, as in a config.json that Python wrote. Raises OSError, or Unreadable for what
    is too large, no JSON in UTF-8, no object, nested too deeply, or holds a number that is no finite one.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise Unreadable("it is no regular file")
    if size > MOST_BYTES:
        raise Unreadable(f"{size:,} bytes are more than any such file has")
    return parse_object(path.read_bytes(), record=record, infinite=infinite)


def parse_object(data: bytes, *, record: bool = False, infinite: bool = False) -> dict[str, Any]:
    """The same from bytes."""
    strict: dict[str, Any] = {"object_pairs_hook": _once_each, "parse_int": _whole} if record else {"parse_int": _printable}
    if not infinite:
        strict |= {"parse_float": _finite, "parse_constant": _refuse}
    try:
        value = json.loads(data.decode("utf-8"), **strict)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Unreadable(str(error)) from None
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise Unreadable("it holds no JSON object")
    if b"\\ud" in data.lower():  # escaped, half a pair is JSON and no text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Unreadable("it holds half of a surrogate pair") from None
    return value


def whole_lines(path: Path) -> list[bytes]:
    """The lines that have their end: another process may be writing the last one. None where there is no file.

    Raises OSError, also for what is no regular file: of a pipe the end may never come.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    content = path.read_bytes() if path.exists() else b""
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def stays_inside(name: str) -> bool:
    """Whether a relative name, joined to a folder, names something below that folder that a file system can hold."""
    path = PurePosixPath(name)
    fits = len(name) <= 1024 and all(len(part.encode(errors="surrogatepass")) <= 255 for part in path.parts)
    is_plain = "\\" not in name and "\0" not in name
    return fits and is_plain and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def is_count(value: Any) -> bool:
    """Whether a value from JSON is a whole number that can count something: 0 and up, within 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Unreadable(f"{text[:20]} is no finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**64) < (value := int(text)) < 2**64:
        raise Unreadable(f"{text[:20]} is beyond 64 bits")
    return value


def _printable(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:  # thousands of digits, which Python refuses
        raise Unreadable(str(error)) from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise Unreadable("a name stands twice in one object")
    return value


def _refuse(text: str) -> NoReturn:
    raise Unreadable(f"{text} is no number of JSON")
