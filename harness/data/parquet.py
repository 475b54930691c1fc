"""Parquet files read a few rows at a time, through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import UserError

_BATCH = 4 << 20  # bytes of rows decoded at once; a file's own row groups may need more
_MOST_ROWS = 4096


def read_parquet(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of one file, these columns only; raises UserError if it cannot be read or lacks a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            there = file.schema_arrow.names
            for column in columns:
                if column not in there:
                    raise UserError(f"{path} has no column {column!r}, but {', '.join(there)}: set dataset.text_column")
            size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
            rows = _BATCH * file.metadata.num_rows // max(size, 1)
            for batch in file.iter_batches(batch_size=min(max(rows, 1), _MOST_ROWS), columns=columns):
                yield from batch.to_pylist()
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # the last of its headers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as parquet ({reason}): copy or make it anew") from error
