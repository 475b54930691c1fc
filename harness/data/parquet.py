"""Parquet files read a few rows at a time, through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import UserError

# Rows are whole documents, of which one may be megabytes: few at a time.
_ROWS = 64


def read_parquet(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of one file, these columns only; raises UserError if it cannot be read or lacks a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            for column in columns:
                if column not in there:
                    raise UserError(f"{path} has no column {column!r}, but {', '.join(there)}: set dataset.text_column")
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({error}): copy or make it anew") from error
