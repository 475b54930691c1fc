"""Text for people: tables, Markdown and CSV in which nothing that is quoted can leave its place.

Names and sentences come from files that somebody else may have written. Whatever shows them makes them `visible` first.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from harness.errors import escaped

# Control characters, marks that turn the direction of text, ends of lines and paragraphs, halves of surrogate pairs.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|])")
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet computes begins so


def visible(text: str, *, but: str = "") -> str:
    """The text with whatever would steer a terminal escaped (\\x1b, \\n, \\u202e), except the characters in `but`."""
    return _STEERING.sub(lambda found: found[0] if found[0] in but else escaped(found[0]), text)


def number(figure: float, form: str) -> str:
    """As format() writes it, with a minus sign for its hyphen; what rounds to 0 has no sign."""
    text = format(figure, form)
    return (text if re.search("[1-9a-z]", text) else text.lstrip("+-")).replace("-", "−")


def mebibytes(size: int) -> str:
    """Bytes in MiB: three digits, or all that stand before the point."""
    shown = size / 2**20
    return f"{shown:,.0f}" if shown >= 999.5 else f"{shown:.3g}"


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """The lines of a table for a terminal; the columns in `left` begin at the left, the others end at the right.

    A row may be shorter than others.
    """
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in shown if i < len(row)) for i in range(max(map(len, shown)))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in shown
    ]


def markdown(text: str) -> str:
    """As it stands, whatever characters it is made of, in one line."""
    return _MARKDOWN.sub(r"\\\1", visible(text))


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(markdown, cells))} |"


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The names of the columns, then the cells of each row, all of which have the same."""
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def csv_text(rows: Sequence[Sequence[Any]]) -> str:
    """Comma-separated values. A text that a spreadsheet would compute is marked as text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(_cell, row) for row in rows])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if value.startswith(_FORMULA) else visible(value)


def differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, str]:
    """A sentence on each field, by its name, in which two sets of fields differ."""
    return {
        path: f"{path} is {theirs.get(path, 'absent')} there and {ours.get(path, 'absent')} here"
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    }


def first_few(sentences: Sequence[str]) -> str:
    """The first ones, and how many more there are."""
    more = len(sentences) - 4
    return "; ".join([*sentences[:4], *([f"and {more} more"] if more > 0 else [])])


def some_of(names: Sequence[str], most: int = 8) -> str:
    """The same of names: a, b and 3 more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def span(counts: Sequence[int]) -> str:
    """Of whole numbers the least and the largest, 2–4, or what all of them are."""
    return "–".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))


def at_tokens(contexts: Collection[int | None]) -> str:
    """For how many tokens the bytes of caches are, behind what they are called; nothing where that is not known of all."""
    known = [context for context in contexts if context is not None]
    return f" at {span(known)} tokens" if known and len(known) == len(contexts) else ""


def duration(seconds: float) -> str:
    """For people: 150 s, 9 min, 2 h 10 min."""
    if seconds < 180:  # in whole minutes 91 s would be 2 min, a third too many
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def counted(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count} {plural(count, noun)}"


def plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"
