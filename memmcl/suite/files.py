"""Raw rows of JSONL, CSV and Parquet files by path or URL, in a stream: no file is ever whole in memory.

JSONL: one object a line, UTF-8. CSV: UTF-8 with a header, fields quoted with `"` and separated by what the header has
most of: comma (also where that is not clear), semicolon or tab; in .tsv a tab. Every value is the text that stands
there. Parquet: row group by row group, only the columns that are needed. Text files may be compressed (.gz).
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from memmcl.errors import DataError, short
from memmcl.files.places import is_local, name_of, open_file, open_place, reading
from memmcl.suite.faults import Fault
from memmcl.suite.parquet import BLOCK_BYTES, COLUMNS, EXPANSION, EXPANSION_BYTES, NOT_UTF8, parquet_rows
from memmcl.suite.rows import Row
from memmcl.urls import public

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")
LINE_BYTES = 1 << 24  # no longer line is read

_STEP = 1 << 13
_BOM = b"\xef\xbb\xbf"
_NOT_UTF8 = re.compile("[\ud800-\udfff]")  # as surrogateescape decodes a byte that is not UTF-8


def read_files(
    url: str, *, columns: Collection[str] | None = None, storage: Mapping[str, Any] | None = None
) -> Iterator[Row | Fault]:
    """Yield the rows of the file(s) at `url` in order, and a fault for each that cannot be read.

    url: a file, a glob, or a directory, whose files with a known ending are read in sorted order.
    columns: what is read of Parquet files; None for all.
    storage: options of the S3 file system.

    Raises:
        DataError: no such place, no access, or a file whose ending is unknown.
    """
    with reading(url):
        fs, paths = find_files(url, storage)
    for path in paths:
        yield from read_file(fs, path, name_of(fs, path), columns=columns)


def find_files(url: str, storage: Mapping[str, Any] | None = None) -> tuple[Any, list[str]]:
    """Return the file system and the paths that `url` means. Raises DataError for none, or for an unknown ending."""
    fs, path = open_place(url, storage)
    if url.startswith("https://"):
        paths = [path]
    elif fs.isdir(path):
        paths = sorted(str(name) for name in fs.ls(path, detail=False) if ending_of(str(name)))
        paths = [name for name in paths if not name.rsplit("/", 1)[-1].startswith((".", "_"))]
    elif any(sign in path for sign in "*?[") and not fs.exists(path):
        paths = sorted(str(name) for name in fs.glob(path))
    else:
        paths = [path] if fs.exists(path) else []
    if not paths:
        raise DataError(
            f"no data file at {public(url)}; expected a file, a glob or a folder of files with one of the "
            f"endings {', '.join(ENDINGS[:5])}: correct the path"
        )
    for name in paths:
        if not ending_of(name):
            raise DataError(
                f"cannot tell what {public(name)} is; known endings: {', '.join(ENDINGS)}; rename or convert the file"
            )
    return fs, paths


def ending_of(path: str) -> str:
    """Return the one of `ENDINGS` that `path` has, or ""."""
    name = urlsplit(path).path if "://" in path else path
    return max((ending for ending in ENDINGS if name.lower().endswith(ending)), key=len, default="")


def read_file(fs: Any, path: str, name: str, *, columns: Collection[str] | None = None) -> Iterator[Row | Fault]:
    """Yield the rows of one file that messages call `name`; else as `read_files`."""
    ending = ending_of(path)
    if is_local(fs) and Path(path).exists() and not Path(path).is_file():
        raise DataError(f"{name} is no file but a folder, a pipe or a device; name a file, or copy it into one")
    with reading(name), open_file(fs, path, **({} if is_local(fs) else {"block_size": BLOCK_BYTES})) as file:
        if ending == ".parquet":
            with _seekable(file) as whole:
                yield from parquet_rows(whole, name, columns)
            return
        lines = read_lines(by_lines(fs, file), ending)
        if ending.startswith((".csv", ".tsv")):
            yield from csv_rows(lines, name, delimiter="\t" if ending.startswith(".tsv") else None)
        else:
            yield from json_rows(lines, name)


def by_lines(fs: Any, file: Any) -> BinaryIO:
    """Return an open file of `fs` so that lines of a bounded length can be read: fsspec's own know no bound."""
    return cast(BinaryIO, file if is_local(fs) else io.BufferedReader(file, BLOCK_BYTES))


def read_lines(file: BinaryIO, ending: str = "") -> Iterator[bytes]:
    """Yield lines with their ends, without a byte order mark; of a line too long only the beginning.

    ending: of the file's name; `.gz` is unpacked.
    """
    packed = _Counted(file) if ending.endswith(".gz") else None
    source: Any = file if packed is None else gzip.GzipFile(fileobj=cast(BinaryIO, packed), mode="rb")
    read, begins = 0, True
    while line := source.readline(LINE_BYTES):
        if begins:
            yield line if read else line.removeprefix(_BOM)
        begins = line.endswith(b"\n")
        read += len(line)
        if packed is not None and read > EXPANSION_BYTES + EXPANSION * packed.taken:
            raise _Expanded(
                f"the compressed file becomes more than {EXPANSION} times as large; unpack it, if that is right"
            )


class _Expanded(Exception):
    """A compressed file becomes too large."""


class _Counted:
    """A file that is read in small steps, and knows how many bytes were read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.taken = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(min(size, _STEP) if size >= 0 else size)
        self.taken += len(data)
        return data


def _until_damage(lines: Iterable[bytes], name: str, faults: list[Fault]) -> Iterator[bytes]:
    """Yield `lines`; where a compressed file is damaged, or becomes too large, end there, with a fault."""
    number = 0
    try:
        for number, line in enumerate(lines, start=1):  # noqa: B007
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile, _Expanded) as error:
        damaged = "the compressed file is damaged or cut off; fetch it again"
        message = str(error) if isinstance(error, _Expanded) else damaged
        faults.append(Fault(f"{name}, line {number + 1}", "broken line", message))


def json_rows(lines: Iterable[bytes], name: str) -> Iterator[Row | Fault]:
    """Yield the rows of JSON lines; blank ones are skipped. `name` is what messages call the file."""
    damage: list[Fault] = []
    for number, line in enumerate(_until_damage(lines, name, damage), start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            values = json.loads(line.decode())
        except UnicodeDecodeError:
            yield Fault(place, "encoding", "not UTF-8; expected one JSON object a line in UTF-8: convert or remove it")
        except (ValueError, RecursionError):
            yield Fault(place, "broken line", "broken JSON; expected one JSON object a line: correct or remove it")
        else:
            if isinstance(values, dict):
                yield Row(place, values)
            else:
                message = f"expected a JSON object, got {short(values)}; correct or remove the line"
                yield Fault(place, "broken line", message)
    yield from damage


def csv_rows(lines: Iterable[bytes], name: str, delimiter: str | None = None) -> Iterator[Row | Fault]:
    """Yield the rows of a CSV file with a header; a record's place is the line where it starts.

    delimiter: what separates fields; None for what the header has most of.
    """
    damage: list[Fault] = []
    texts = (line.decode(errors="surrogateescape") for line in _until_damage(lines, name, damage))
    first = next(texts, "")
    outside_quotes = re.sub(r'"[^"]*"', "", first)
    delimiter = delimiter or max((",", ";", "\t"), key=outside_quotes.count)
    reader = csv.reader(itertools.chain([first], texts), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        try:
            record = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            message = f"broken CSV ({error}); expected fields in double quotes that are closed: correct the quotes"
            yield Fault(place, "broken line", message)
            continue
        if not record:
            continue
        if _NOT_UTF8.search("".join(record)):
            yield Fault(place, "encoding", NOT_UTF8)
            if header is None:
                return
        elif header is None:
            header = record
            wrong = _wrong_header(header)
            if wrong:
                yield Fault(place, "broken line", f"{wrong}: nothing is read")
                return
        elif len(record) != len(header):
            message = f"expected {len(header)} fields as in the header, got {len(record)}; correct or remove the line"
            yield Fault(place, "broken line", message)
        else:
            yield Row(place, dict(zip(header, record, strict=True)))
    yield from damage


def _wrong_header(header: list[str]) -> str:
    """Return what is wrong with the columns that a header names, "" where nothing is."""
    if len(header) > COLUMNS:
        return f"the header has {len(header):,} columns, more than {COLUMNS:,}; keep those that are needed"
    named = Counter(column for column in header if column)
    twice = next((column for column, count in named.items() if count > 1), None)
    return "" if twice is None else f"the header names {short(twice)} twice; rename one"


@contextmanager
def _seekable(file: BinaryIO) -> Iterator[BinaryIO]:
    """Give `file`, or a copy on disk where a web server sends it from the beginning only."""
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy, BLOCK_BYTES)
        copy.seek(0)
        yield copy
