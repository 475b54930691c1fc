"""Wrong inputs made of right ones: bytes flipped, cut, swapped and repeated; values of JSON replaced by odd ones."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63) - 1,
    10**400,
    10**5000,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    " ",
    "x" * 300,
    "O",
    "|O",
    "<u8",
    "../../etc/passwd",
    "/etc/passwd",
    "${oc.env:HOME}",
    "${oc.decode:'1'}",
    "${",
    "???",
    "NaN",
    "nan",
    "1e999",
    "0x10",
    "\ud800",
    "a\nb",
    "\x00",
    "\x1b[31m",
    "é",
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"_target_": "os.system", "_args_": ["touch x"]},
    [1, "a"],
    "null",
    "~",
)
_PIECES = (
    b"\x00",
    b"\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xff\xff\xff\xff",
    b"\n",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 40,
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 2000,
    b"&a [*a,*a]",
    b"!!python/object/apply:os.system [true]",
    b"${oc.env:HOME}",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"%",
    b"---\n",
    b"\t",
    b": ",
    b"'",
    b"\xef\xbb\xbf",
)


def mutated_bytes(data: bytes, choice: random.Random) -> bytes:
    """The data with one to four faults."""
    wrong = bytearray(data)
    for _ in range(choice.choice((1, 1, 1, 2, 4))):
        place = choice.randrange(len(wrong) + 1)
        stop = min(len(wrong), place + choice.choice((1, 2, 8, 64, 1024)))
        match choice.randrange(8):
            case 0 | 1 if place < len(wrong):
                wrong[place] ^= 1 << choice.randrange(8)
            case 2 if place < len(wrong):
                wrong[place] = choice.randrange(256)
            case 3:
                del wrong[place:]
            case 4:
                del wrong[place:stop]
            case 5:
                wrong[place:place] = wrong[place:stop]
            case 6:
                wrong[place:place] = choice.choice(_PIECES)
            case _:
                wrong[place:stop] = choice.choice(_PIECES)
    return bytes(wrong)


def mutated_value(value: Any, choice: random.Random) -> Any:
    """A copy of nested lists and mappings in which one to three values are odd, gone or renamed."""
    wrong = copy.deepcopy(value)
    for _ in range(choice.choice((1, 1, 2, 3))):
        places = list(_places(wrong))
        if not places:
            break
        holder, key = choice.choice(places)
        match choice.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[choice.choice(("", "../x", "_target_", f"{key} "))] = holder.pop(key)
            case 2:
                other, name = choice.choice(places)
                holder[key] = copy.deepcopy(other[name])
            case 3 if isinstance(holder[key], int):
                holder[key] += choice.choice((-1, 1, 2**20, 2**40))
            case _:
                holder[key] = copy.deepcopy(choice.choice(ODD_VALUES))
    return wrong


def as_json(value: Any) -> bytes:
    """JSON of it, and where Python prints no whole number of so many digits, JSON with such a number."""
    try:
        return json.dumps(value).encode()
    except ValueError:
        return b'{"format": ' + b"9" * 5000 + b"}"


def _places(value: Any) -> Any:
    """(container, key) of everything inside."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    """A file without its last seven bytes."""
    file.write_bytes(file.read_bytes()[:-7])
