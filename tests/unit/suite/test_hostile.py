"""Hostile rows: files that are larger inside than outside, wider than any table, or without end."""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import MIB, PLANTED, check_line, peak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.cli import root as cli
from memmcl.errors import MESSAGE, VALUE, DataError, MemmclError
from memmcl.experts.forced import read_texts
from memmcl.suite.faults import Fault
from memmcl.suite.files import COLUMNS, read_files
from memmcl.suite.parsing import match_label, parse_tuples, read_any_list, read_literal
from memmcl.suite.rows import Row
from memmcl.suite.sources import Reading, Source, read_sources
from memmcl.suite.subtasks import SUBTASKS

pytestmark = pytest.mark.timeout(60)


def repeated(part: bytes, times: int) -> bytes:
    """Return a gzip file that holds `part` so many times, made without holding that."""
    return gzip.compress(part, 9) * times


def parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def only_fault(path: Path, most: int = 200 * MIB) -> str:
    """Read a file whose last fault says why nothing more is read; return that."""
    found, used = peak(lambda: list(read_files(str(path), columns=("text", "label"))))
    assert isinstance(found[-1], Fault)
    assert len(found) == 1 or path.name.endswith(".gz")
    line = str(found[-1])
    check_line(line)
    assert used < most, f"{used / MIB:.0f} MiB"
    return line


FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "60,000 columns": (
        "csv",
        lambda: (",".join(f"c{i}" for i in range(60_000)) + "\n").encode(),
        "the header has 60,000 columns",
    ),
    "8 million columns": ("csv", lambda: b"," * 8_000_000, "the header has 8,000,001 columns"),
    "a column twice among many": (
        "csv",
        lambda: (",".join(f"c{i}" for i in range(9_000)) + ",c7\n").encode(),
        "the header names 'c7' twice",
    ),
    "a long name twice": ("csv", lambda: f"{PLANTED[:90_000]},{PLANTED[:90_000]}\n".encode(), "twice"),
    "90,000 keys": (
        "jsonl",
        lambda: json.dumps([{f"k{i}": 1 for i in range(90_000)}]).encode(),
        "expected a JSON object",
    ),
    "deep list": ("jsonl", lambda: b"[" * 1_000_000, "broken JSON"),
    "deep object": ("jsonl", lambda: b'{"a":' * 1_000_000, "broken JSON"),
    "deep, but JSON": ("jsonl", lambda: b"[" * 700 + b"]" * 700, "expected a JSON object"),
    "long number": ("jsonl", lambda: b"9" * 1_000_000, "broken JSON"),
    "long text": ("jsonl", lambda: json.dumps(PLANTED).encode(), "expected a JSON object, got 'planted"),
    "a packed line of 1 GiB": ("jsonl.gz", lambda: repeated(b"x" * MIB, 1_000), "becomes more than 200 times as large"),
    "packed lines of 1 GiB": (
        "jsonl.gz",
        lambda: repeated((b" " * 1_023 + b"\n") * 1_024, 1_000),
        "becomes more than 200 times as large",
    ),
    "packed records of 1 GiB": (
        "csv.gz",
        lambda: gzip.compress(b"text,label\n") + repeated((b"x" * 1_021 + b",y\n") * 1_024, 1_000),
        "becomes more than 200 times as large",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file(tmp_path: Path, name: str) -> None:
    ending, content, expected = FILES[name]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content())
    assert expected in only_fault(path)


def test_a_line_without_end_is_never_whole_in_memory(tmp_path: Path) -> None:
    """A sparse line of 100 MB: its beginning is a fault, the rest is passed over, the next line is read."""
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(100_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"text": "a", "label": "b"}\n')
    found, used = peak(lambda: list(read_files(str(path))))
    assert [type(item) for item in found] == [Fault, Row]
    assert found[1].place.endswith("line 2")
    assert used < 120 * MIB


def test_honest_files_compress_well_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "the same text again", "label": "positive"}\n' * 100_000))
    assert path.stat().st_size < 30_000
    assert sum(isinstance(item, Row) for item in read_files(str(path))) == 100_000


def test_as_many_columns_as_may_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(f"c{i}" for i in range(COLUMNS)) + "\n" + ",".join(["1"] * COLUMNS) + "\n")
    (row,) = read_files(str(path))
    assert isinstance(row, Row)
    assert len(row.values) == COLUMNS


# --- Parquet


def test_a_parquet_file_of_too_many_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memmcl.suite.parquet.COLUMNS", 99)
    path = parquet(tmp_path / "rows.parquet", pa.table({f"c{i}": [1] for i in range(100)}))
    assert "100 columns, more than 99" in only_fault(path)


def test_a_parquet_file_that_repeats_one_row(tmp_path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 5_000_000), ["a text"])
    path = parquet(tmp_path / "rows.parquet", pa.table({"text": text, "label": text}))
    assert path.stat().st_size < 100_000
    assert "5,000,000 rows in" in only_fault(path)


def test_a_parquet_file_that_repeats_a_long_text(tmp_path: Path) -> None:
    """4,096 rows of one text of 1 MB, which the file holds once: few of them are in memory at a time."""
    text = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), 4_096), ["x" * 1_000_000])
    path = parquet(tmp_path / "rows.parquet", pa.table({"text": text, "label": text}))
    before = pa.total_allocated_bytes()
    longest = rows = 0
    for row in read_files(str(path), columns=("text",)):
        assert isinstance(row, Row)
        rows += len(row.values["text"]) == 1_000_000
        longest = max(longest, pa.total_allocated_bytes() - before)
    assert rows == 4_096
    assert longest < 300 * MIB, f"{longest / MIB:.0f} MiB"


def test_a_parquet_file_that_unpacks_to_much(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 1_000_000 + str(i) for i in range(40)], "label": ["a"] * 40})
    path = parquet(tmp_path / "rows.parquet", table, use_dictionary=False, compression="zstd")
    assert path.stat().st_size < 200_000
    assert "becomes more than 200 times as large" in only_fault(path)


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"use_dictionary": ["label"]}])
def test_parquet_rows_mean_the_same_in_every_encoding(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [{"text": f"text {i % 700}", "label": None if i % 50 == 0 else f"l{i % 3}"} for i in range(3_000)]
    table = pa.Table.from_pylist(rows)
    path = parquet(tmp_path / "rows.parquet", table, row_group_size=1_300, **options)
    assert [item.values for item in read_files(str(path)) if isinstance(item, Row)] == rows
    delta = parquet(
        tmp_path / "delta.parquet", table, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
    )
    assert [item.values for item in read_files(str(delta)) if isinstance(item, Row)] == rows


# --- places


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "rows.csv"
    make(path)
    with pytest.raises(DataError, match="is no file but a folder, a pipe or a device"):
        list(read_files(str(path)))


def test_plain_texts_have_lines_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    with path.open("wb") as file:
        file.truncate(100_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b"\na text\n")
    found, used = peak(lambda: read_texts(str(path)))
    assert found == ["a text"]
    assert used < 120 * MIB


LONG_PLACES = ["/no/such/" + "place" * 500, "s3:x//" + "y" * 5_000, "unknown://" + "z" * 5_000]


@pytest.mark.parametrize("place", LONG_PLACES, ids=["path", "colon", "URL"])
def test_a_long_place_is_named_in_short(place: str) -> None:
    for read in (lambda: list(read_files(f"{place}.csv")), lambda: read_texts(place)):
        with pytest.raises(MemmclError) as error:
            read()
        assert max(map(len, str(error.value).split())) <= VALUE


# --- values


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["sent2", "aste"]),
    st.dictionaries(
        st.sampled_from(["text", "label", PLANTED]),
        st.sampled_from(
            [
                PLANTED,
                [PLANTED] * 9,
                [[PLANTED, "b", "positive"]],
                {"a": PLANTED},
                [[["x"] * 900] * 9],
                10**4_000,
                "0x" + "f" * 9_000,
                f"[('a', 0x{'f' * 9_000}, 'positive')]",
                "(" * 90_000,
                1e999,
                True,
                "",
                "\0" * 90_000,
                "\ud800" * 90_000,
            ]
        ),
    ),
)
def test_no_value_is_shown_beyond_its_bound(tmp_path: Path, subtask: str, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    columns = {"text": "text", "label": "label"}
    read = read_sources(
        [SUBTASKS[subtask]], Reading(sources={subtask: Source(path=str(path), columns=columns)}, max_characters=1 << 24)
    )
    for fault in read.faults.first:
        assert len(str(fault)) <= MESSAGE
        assert str(fault).isprintable()
        assert PLANTED[: VALUE + 1] not in str(fault)


PIECES = ["(", "[", "{", "-", "not ", "1+", "1<", "a.", "f(", "lambda:", "('a',", '"', "\\", "1 if 1 else ", "9", "0x"]


@pytest.mark.parametrize("piece", PIECES)
def test_a_model_may_answer_anything(piece: str) -> None:
    fields, labels = SUBTASKS["aste"].tuple_fields, SUBTASKS["emotion"].labels
    for text in (piece * 20_000, "[" + piece * 20_000, piece * 20_000 + "1"):
        assert parse_tuples(text, len(fields), fields).tuples == ()
        assert match_label(text, labels) is None
        read_literal(text)
        read_any_list(text)


def test_the_command_line_says_it_in_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wide.csv").write_text(",".join(f"c{i}" for i in range(60_000)) + "\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": PLANTED, "label": PLANTED}) + "\n" + json.dumps(PLANTED))
    sources = "{sent2: {path: wide.csv}, irony: {path: long.jsonl}}"
    (tmp_path / "run.yaml").write_text(f"data: {{subtasks: [sent2, irony], sources: {sources}}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["memmcl", "data", "check", "--config", "run.yaml"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (1, "")
    assert "the header has 60,000 columns" in out
    assert max(map(len, out.splitlines())) <= MESSAGE
    assert PLANTED[: VALUE + 1] not in out
