"""Plain containers as typed values: every field has its kind, or one sentence says which has not."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.config.schema import MOST_FIGURE
from harness.errors import UserError, as_user_error


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The remedy for a misspelt word: the nearest choice, or all of them where none is near."""
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(choices))}"


def shown(value: Any) -> str:
    """A value as a user would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return str(value)
    except ValueError:  # a whole number of thousands of digits, which Python does not print
        return "(a number of thousands of digits)"


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    list: "a list like [a, b]",
    dict: "a group of fields",
}
_DIGITS = {int: r"-?[0-9]+", float: r"-?[0-9]+(\.[0-9]*)?"}


def typed(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind` (a dataclass, int, float, bool, str, list[...], dict[str, ...], X | None), or a UserError.

    Also one of some words (Literal), a number with its least value (Annotated[int, 0]), a tuple, and of records a TypedDict,
    whose other keys are kept. An option's type may carry its help, too (Annotated[int, "what it means"]).
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        return _bounded(parts, value, path)
    if origin is typing.Literal:
        word = typed(str, value, path) if isinstance(value, str) else shown(value)
        if word not in parts:
            raise UserError(f"{path}={word} is unknown; {did_you_mean(word, parts)}")
        return word
    if origin in (types.UnionType, typing.Union):
        (kind,) = (option for option in parts if option is not type(None))
        return None if value is None else typed(kind, value, path)
    if typing.is_typeddict(kind):
        return _typed_record(kind, value, path)
    if dataclasses.is_dataclass(kind):
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        return kind(**typed_fields(_hints(kind), required, value, path))  # type: ignore[operator, arg-type]
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            raise UserError(f"{path}={shown(value)} must be a list of {len(parts)}")
        return tuple(typed(part, item, f"{path}[{i}]") for i, (part, item) in enumerate(zip(parts, value, strict=True)))
    if origin is list and isinstance(value, (list, tuple)):
        return [typed(parts[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): typed(parts[1], item, f"{path}.{k}") for k, item in value.items()}
    if origin is None:
        return _plain(kind, value, path)
    raise UserError(f"{path}={shown(value)} must be {_WORDS[origin]}")


def _bounded(parts: Sequence[Any], value: Any, path: str) -> Any:
    """What an Annotated type allows: its notes are a number's least value, what raises Refusal for others, or help."""
    of, *notes = parts
    checks = [note for note in notes if callable(note)]
    with as_user_error(f"{path}="):
        for check in checks if of is str and value is None else ():
            check(shown(value))  # it names the choices
        number = typed(of, value, path)
        for check in checks:
            check(number)
    for least in (note for note in notes if isinstance(note, (int, float))):
        if not least <= number < MOST_FIGURE:
            raise UserError(f"{path}={shown(value)} must be {least:g} or more{' and below 1e100' if number > least else ''}")
    return number


def _plain(kind: Any, value: Any, path: str) -> Any:
    """A number, a word, true or false."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and _fits(value):
        return float(value)
    if kind is int and is_number and (isinstance(value, int) or value.is_integer()) and _fits(int(value)):
        return int(value)  # budget.tokens=2e6
    if kind is str:
        if isinstance(value, float) or (isinstance(value, int) and _fits(value)) or _is_text(value):
            return shown(value)
        if isinstance(value, str):
            raise UserError(f"{path} is not UTF-8 (byte {_first_bad_byte(value)}); give it in that encoding")
    if kind not in (int, float, str) and isinstance(value, kind):
        return value
    if kind is int and is_number and isinstance(value, int) and value.bit_length() < 1000:
        raise UserError(f"{path}={value} is too large; choose a whole number below 2^63")
    if isinstance(value, str) and re.fullmatch(_DIGITS.get(kind, ""), value):  # nobody would see why it is none
        raise UserError(f'{path}="{value}" must be {_WORDS[kind]}, without quotes')
    raise UserError(f"{path}={shown(value)} must be {_WORDS[kind]}")


def _typed_record(kind: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{path}={shown(value)} must be {_WORDS[dict]}")
    prefix = f"{path}." if path else ""
    if lacking := sorted(kind.__required_keys__ - value.keys()):
        raise UserError(f"{prefix}{lacking[0]} is missing")
    hints = _hints(kind)
    return {key: typed(hints[key], item, f"{prefix}{key}") if key in hints else item for key, item in value.items()}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Types of the fields of a dataclass or of a TypedDict's keys, with what they are annotated by."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {
        key: typing.get_args(hint)[0] if typing.get_origin(hint) is typing.NotRequired else hint for key, hint in hints.items()
    }


def _fits(number: float) -> bool:
    """Finite, and a whole number within 64 bits: a larger one is nothing that can be counted, and may not be printable."""
    return -(2**64) < number < 2**64 if isinstance(number, int) else math.isfinite(number)


def _first_bad_byte(text: str) -> int:
    """From 1: of text that _is_text refuses."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return len(text[: error.start].encode()) + 1
    raise AssertionError("every byte is good")


def _is_text(value: Any) -> bool:
    """Text that a file in UTF-8 can hold: half of a surrogate pair stands for a byte that was none."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def fields_below(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, type) of every field of a dataclass, a group's own before those inside it."""
    for name, hint in typing.get_type_hints(kind).items():
        yield f"{prefix}{name}", hint
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                yield from fields_below(option, f"{prefix}{name}.")


def typed_fields(hints: Mapping[str, Any], required: set[str], value: Any, path: str) -> dict[str, Any]:
    """The fields of a mapping, each typed; unknown and missing ones are a UserError."""
    if not isinstance(value, Mapping):
        raise UserError(f"{path or 'the configuration'}={shown(value)} must be a group of fields: {', '.join(hints)}")
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in hints:
            raise UserError(f"{prefix}{key} is not a field of the configuration; {did_you_mean(str(key), list(hints))}")
    for key in sorted(required - set(value)):
        raise UserError(f"{prefix}{key} is missing from the configuration; give it a value")
    return {key: typed(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
