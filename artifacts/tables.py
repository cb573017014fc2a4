"""Parquet tables with stable bytes: the same rows always give the same file, so that early cutoff works on results.

Rows are written in the given order with zstd, content-defined chunking (so that revisions share bytes) and no metadata
beyond the schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import StoreError

if TYPE_CHECKING:
    import pyarrow


MAX_TABLE_BYTES = 8 << 30
MAX_TABLE_ROWS = 100_000_000
"""What a table may claim to hold; more is a hostile file, or one that needs another reader."""


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pyarrow.Schema) -> None:
    """Write `rows` to `path` with the given schema.

    Raises:
        ValueError: a row's columns are not those of the schema (Arrow alone would fill in nulls).
        pyarrow.ArrowException: a value has another type than its column.
    """
    import pyarrow
    import pyarrow.parquet

    kept = list(rows)
    for number, row in enumerate(kept):
        if row.keys() != set(schema.names):
            raise ValueError(f"{path.name}, row {number}: expected the columns {schema.names}, found {list(row)}")
    table = pyarrow.Table.from_pylist(kept, schema=schema)
    pyarrow.parquet.write_table(table, path, compression="zstd", use_content_defined_chunking=True, store_schema=False)


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a Parquet file, as dicts in file order; only some `columns` if they are given.

    Raises:
        StoreError: the file is not a Parquet table, has no such column, or would not fit into memory.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=False) as file:
            size = sum(file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups))
            if size > MAX_TABLE_BYTES or file.metadata.num_rows > MAX_TABLE_ROWS:
                raise StoreError(f"{path}: {file.metadata.num_rows} rows and {size} bytes are too many for one table")
            missing = set(columns or ()) - set(file.schema_arrow.names)
            if missing:
                raise StoreError(f"{path}: expected the columns {list(columns or ())}, found {file.schema_arrow.names}")
            return file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise StoreError(f"{path}: expected a Parquet table, found {reason}") from error
