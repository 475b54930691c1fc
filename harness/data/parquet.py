"""What pyarrow reads: the texts in one column of a parquet file, a few rows at a time, and zstd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from harness.data.encoding import shown_encoding
from harness.errors import UserError, in_a_line

if TYPE_CHECKING:
    import pyarrow

_BATCH = 4 << 20  # bytes of rows decoded at once; a file's own pages may need more
_MOST_ROWS = 4096
MOST_VALUE = 1 << 28  # bytes of one text that is held whole


def read_parquet(path: Path, column: str) -> Iterator[str | None]:
    """Yields a column's texts, row by row; `a.b` is the field b of the struct a unless a column has that very name.

    Few bytes may stand for many: a dictionary holds a text once and rows refer to it. How many rows are decoded at once
    therefore follows from the longest text of each row group's dictionary. Raises UserError, naming the row, for what is
    no text in UTF-8, and for a file that cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    def opened(dictionaries: list[str] | None) -> pyarrow.parquet.ParquetFile:
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=dictionaries)

    number = 0
    try:
        with opened(None) as file:
            names = _field_names(file.schema_arrow, column, path)
            with opened([column]) as peeking:
                for group in range(file.num_row_groups):
                    batches = {"row_groups": [group], "columns": [column]}
                    first = next(peeking.iter_batches(batch_size=1, **batches), None)
                    rows = min(_rows(file.metadata.row_group(group)), _most_rows(first, names))
                    for batch in file.iter_batches(batch_size=rows, **batches):
                        for value in _values(batch, names):
                            yield value if value is None else _text(value, f"{path} (row {number})", column)
                            number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError) as error:  # of its headers
        raise UserError(f"{path} cannot be read as parquet ({in_a_line(error)}): copy or make it anew") from error


def open_zstd(path: Path) -> IO[bytes]:
    """The bytes of a .zst file, which the standard library reads from Python 3.14 on only. Reading raises OSError."""
    import pyarrow

    return cast("IO[bytes]", pyarrow.input_stream(str(path), compression="zstd"))


def _field_names(schema: pyarrow.Schema, column: str, path: Path) -> list[str]:
    """The way to the column: its name, or the names of structs and of the field in the innermost. Raises UserError."""
    import pyarrow

    found: dict[str, tuple[list[str], pyarrow.DataType]] = {}

    def add(field: pyarrow.Field, before: list[str]) -> None:
        names = [*before, field.name]
        found.setdefault(".".join(names), (names, field.type))
        if pyarrow.types.is_struct(field.type):
            for inner in field.type:
                add(inner, names)

    for field in schema:
        found[field.name] = ([field.name], field.type)
    for field in schema:
        add(field, [])
    texts = [name for name, (_, kind) in found.items() if _is_text(kind)]
    remedy = f"set dataset.text_column to {' or '.join(texts[:20])}" if texts else "write the text as a column of strings"
    if column not in found:
        raise UserError(f"{path} has no column {column!r}, but {', '.join(list(found)[:20])}: {remedy}")
    names, kind = found[column]
    if not _is_text(kind) and not pyarrow.types.is_null(kind):
        raise UserError(f"{path} holds {str(kind)[:200]} in {column!r}, which is no text: {remedy}")
    return names


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return any(check(kind) for check in (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view))


def _rows(group: pyarrow.parquet.RowGroupMetaData) -> int:
    """Rows of about _BATCH bytes, if they were all as long."""
    return min(max(_BATCH * group.num_rows // max(group.total_byte_size, 1), 1), _MOST_ROWS)


def _most_rows(first: pyarrow.RecordBatch | None, names: list[str]) -> int:
    """Rows that cannot be more than a few _BATCH, whichever texts of the row group's dictionary they refer to."""
    import pyarrow
    import pyarrow.compute

    column = None if first is None else _column(first, names)
    if not isinstance(column, pyarrow.DictionaryArray) or not len(column.dictionary):
        return _MOST_ROWS
    longest = pyarrow.compute.max(pyarrow.compute.binary_length(column.dictionary)).as_py() or 1
    return int(max(1, 4 * _BATCH // longest))


def _values(batch: pyarrow.RecordBatch, names: list[str]) -> list[bytes | None]:
    """A batch's texts as bytes, which may be anything: pyarrow checks no string that it reads."""
    import pyarrow

    column = _column(batch, names)
    if isinstance(column, pyarrow.DictionaryArray):
        column = column.dictionary_decode()
    values: list[bytes | None] = column.cast(pyarrow.large_binary()).to_pylist()
    return values


def _column(batch: pyarrow.RecordBatch, names: list[str]) -> Any:
    import pyarrow.compute

    column = batch.column(batch.schema.get_field_index(names[0]))
    return pyarrow.compute.struct_field(column, names[1:]) if names[1:] else column


def _text(value: bytes, place: str, column: str) -> str:
    if len(value) > MOST_VALUE:
        raise UserError(f"{place} has {len(value):,} bytes in {column!r}, more than {MOST_VALUE:,}: cut it into several")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = shown_encoding(value[:16], value)
        fits = f"its bytes are {encoding}: write the file anew from that" if encoding else "write the file anew"
        raise UserError(f"{place} is not UTF-8 in {column!r} (byte {error.start}); {fits}, or leave the row out") from error
