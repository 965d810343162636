"""Rows of a Parquet file: the columns that are needed, few rows at once, whatever the file says they become."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from memmcl.suite.faults import Fault
from memmcl.suite.rows import Row

COLUMNS = 10_000  # columns of a CSV or Parquet file
EXPANSION = 200
"""A compressed file may become so many times as large, and `EXPANSION_BYTES` more; text becomes 3 to 20 times."""
EXPANSION_BYTES = 1 << 22
PARQUET_ROWS = 8
"""Rows of a Parquet file for each of its bytes, and `FREE_ROWS` more: one row can be repeated in no space at all."""
FREE_ROWS = 1_000_000
CHUNKS = 500_000  # row groups of a Parquet file times its columns
BATCH_BYTES = 1 << 26  # bytes of Parquet rows that are held at once, where more than one row is
BATCH_ROWS = 1024
BLOCK_BYTES = 1 << 22
NOT_UTF8 = "not UTF-8; convert it to UTF-8, or remove it"


def parquet_rows(file: BinaryIO, name: str, columns: Collection[str] | None) -> Iterator[Row | Fault]:
    """Yield the rows of an open Parquet file, row group by row group. `name` is what messages call it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        size = file.seek(0, io.SEEK_END)
        table = pq.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)
        known = table.schema_arrow.names
        wanted = known if columns is None else [column for column in known if column in columns]
        wrong, repeated = _look_at(table.metadata, wanted, size)
        if wrong:
            yield Fault(f"{name}, row 1", "broken line", f"{wrong}: nothing is read")
            return
        table = pq.ParquetFile(
            file, metadata=table.metadata, read_dictionary=repeated, pre_buffer=False, buffer_size=BLOCK_BYTES
        )
        for whole in table.iter_batches(BATCH_ROWS, columns=wanted, use_threads=False):
            for batch in _small_batches(whole):
                for index, values in enumerate(_batch_values(batch), start=number + 1):
                    place = f"{name}, row {index}"
                    yield Fault(place, "encoding", NOT_UTF8) if values is None else Row(place, values)
                number += batch.num_rows
    except pa.ArrowException as error:
        message = f"the Parquet file is damaged or is none ({type(error).__name__}); write or fetch it again"
        yield Fault(f"{name}, row {number + 1}", "broken line", message)


def _look_at(metadata: Any, wanted: list[str], size: int) -> tuple[str, list[str]]:
    """Return what is wrong with a Parquet file of `size` bytes ("": nothing), and the columns that repeat texts."""
    if metadata.num_columns > COLUMNS:
        return f"the file has {metadata.num_columns:,} columns, more than {COLUMNS:,}; keep those that are needed", []
    if metadata.num_rows > FREE_ROWS + PARQUET_ROWS * size:
        return f"the file has {metadata.num_rows:,} rows in {size:,} bytes; take the repeated ones out", []
    if metadata.num_row_groups * metadata.num_columns > CHUNKS:
        return f"the file has {metadata.num_row_groups:,} row groups; write it with fewer", []
    whole, encodings = 0, dict[str, set[str]]()
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        for chunk in (chunks.column(index) for index in range(metadata.num_columns)):
            if chunk.path_in_schema.partition(".")[0] in wanted:
                whole += chunk.total_uncompressed_size
            if chunk.physical_type == "BYTE_ARRAY":
                encodings.setdefault(chunk.path_in_schema, set()).update(chunk.encodings)
    if whole > EXPANSION_BYTES + EXPANSION * size:
        return f"the file becomes more than {EXPANSION} times as large; write it uncompressed, if that is right", []
    plain = {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}
    return "", [column for column, used in encodings.items() if column in wanted and used <= plain]


def _small_batches(batch: Any) -> Iterator[Any]:
    """Yield a batch in slices of no more than `BATCH_BYTES` once its repeated texts are written out, or of one row."""
    import numpy as np
    import pyarrow as pa

    longest = 1
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and len(column.dictionary):
            ends = np.frombuffer(column.dictionary.buffers()[1], dtype=np.int32)[column.dictionary.offset :]
            longest += int(np.diff(ends[: len(column.dictionary) + 1]).max())
    step = max(1, min(batch.num_rows, BATCH_BYTES // longest))
    for start in range(0, batch.num_rows, step):
        rows = batch.slice(start, step)
        columns = [
            column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in rows.columns
        ]
        yield pa.RecordBatch.from_arrays(columns, names=rows.schema.names)


def _batch_values(batch: Any) -> list[dict[str, Any] | None]:
    """Return the values by column of each row; None for a row whose text is no UTF-8."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except UnicodeDecodeError:
        rows = []
        for index in range(batch.num_rows):
            try:
                rows += batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                rows.append(None)
    return rows
