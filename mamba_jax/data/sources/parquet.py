"""Reads parquet tables: each row is a document."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mamba_jax.data.sources.formats import FileOnDisk
from mamba_jax.data.sources.records import BadRecord, OnBad, RecordText
from mamba_jax.data.sources.supervised import Dialogue, SupervisedRecord
from mamba_jax.errors import InputError

# Bytes of text that are decoded at once, if all rows are as long as those of their group on average.
_BATCH_BYTES = 4 * 2**20
_MAX_BATCH_ROWS = 8192
_PAGE_BYTES = 2**20


def check_tables(paths: Sequence[Path], text_of: RecordText | SupervisedRecord) -> list[int]:
    """Number of rows of each table, by its footer alone.

    Raises:
        InputError: a file is no table, lacks a column, has no text in it, or has another type there than the others.
    """
    rows, types = [], {}
    for path in paths:
        with _opened(path) as table:
            schema = table.schema_arrow
            try:
                fields = text_of.fields(schema.names)
            except BadRecord as error:
                raise InputError(f"{path} {error}") from None
            for name in fields:
                _, first = types.setdefault(name, (path, schema.field(name).type))
                if (kind := schema.field(name).type) != first:
                    raise InputError(
                        f"tables of mixed schemas: column {name!r} is {first} in {types[name][0]} and {kind} in "
                        f"{path}; give them as separate sources or convert one"
                    )
            rows.append(table.metadata.num_rows)
    return rows


def row_texts(
    file: FileOnDisk, span: tuple[int, int | None], *, text_of: RecordText | SupervisedRecord, on_bad: OnBad
) -> Iterator[tuple[str | Dialogue, int]]:
    """The documents of the rows within a span, read batch by batch.

    Args:
        file: the table.
        span: numbers of rows, from 0; None is the end of the table.
        text_of: makes the document of a row.
        on_bad: is called for each row that has none.

    Yields:
        A document, and how many rows of the span have been read so far.
    """
    start, end = span
    with _opened(file.path) as table:
        end, fields = table.metadata.num_rows if end is None else end, text_of.fields(table.schema_arrow.names)
        number = 0
        for group in range(table.metadata.num_row_groups):
            info = table.metadata.row_group(group)
            if number + info.num_rows <= start or number >= end:
                number += info.num_rows
                continue
            for row in _rows(table, group, info, fields):
                number += 1
                if not start < number <= end:
                    continue
                try:
                    text = text_of(row)
                except BadRecord as error:
                    on_bad(f"{file.path} row {number} {error}")
                    continue
                if text:
                    yield text, number - start
        file.require_unchanged()


def _rows(table: Any, group: int, info: Any, fields: list[str]) -> Iterator[dict[str, Any]]:
    row_bytes = info.total_byte_size // max(1, info.num_rows) + 1
    size = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // row_bytes))
    for batch in table.iter_batches(batch_size=size, row_groups=[group], columns=fields, use_threads=False):
        for values in zip(*(batch.column(name).to_pylist() for name in fields), strict=True):
            yield dict(zip(fields, values, strict=True))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Context manager: the table, open for reading; within the block, a file that is damaged becomes an InputError."""
    import pyarrow
    import pyarrow.parquet

    try:
        # A buffer makes it read a column page by page; without one it would read a whole row group.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_PAGE_BYTES, pre_buffer=False) as table:
            yield table
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} is no parquet table that can be read: {error}; fetch or write it again") from None
