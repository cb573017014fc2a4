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
"""What a table may need in memory, as it claims and as it turns out; more is a hostile file, or needs another reader."""
ROW_BYTES = 256
"""Least bytes that a row is counted as: it becomes a dict, whatever little its columns need in the file."""
ROWS_AT_ONCE = 4096


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
            _require_small(path, max(size, file.metadata.num_rows * ROW_BYTES))
            missing = set(columns or ()) - set(file.schema_arrow.names)
            if missing:
                raise StoreError(f"{path}: expected the columns {list(columns or ())}, found {file.schema_arrow.names}")
            texts = [
                c.path for c in map(file.schema.column, range(len(file.schema))) if c.logical_type.type == "STRING"
            ]
            _measure(path, columns, texts)
            return file.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise StoreError(f"{path}: expected a Parquet table, found {reason}") from error


def _measure(path: Path, columns: Sequence[str] | None, texts: Sequence[str]) -> None:
    """Find out what the rows need in memory, a few at a time and without writing out what repeats.

    A file says that itself, but it may lie: a text that is stored once and named by a million rows takes a few bytes.
    """
    import pyarrow.parquet

    size = 0
    with pyarrow.parquet.ParquetFile(path, memory_map=False, read_dictionary=texts) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
            size += batch.num_rows * ROW_BYTES + sum(_plain_bytes(column) for column in batch.columns)
            _require_small(path, size)


def _plain_bytes(column: pyarrow.Array) -> int:
    """Bytes of a column with every repeated text written out."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(column.dictionary).cast(pyarrow.int64())
        return pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0
    if pyarrow.types.is_nested(kind):
        inner = column.flatten()
        return sum(_plain_bytes(array) for array in inner) if isinstance(inner, list) else _plain_bytes(inner)
    return int(column.nbytes)


def _require_small(path: Path, size: int) -> None:
    if size > MAX_TABLE_BYTES:
        raise StoreError(f"{path}: its rows need {size:,} bytes or more, too many for one table ({MAX_TABLE_BYTES:,})")
