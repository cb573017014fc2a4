"""Parquet tables with stable bytes: the same rows always give the same file, so that early cutoff works on results.

Rows are written in the given order with zstd, content-defined chunking (so that revisions share bytes) and no metadata
beyond the schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


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


def read_table(path: Path) -> list[dict[str, Any]]:
    """All rows of a Parquet file, as dicts in file order."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, memory_map=False).to_pylist()
