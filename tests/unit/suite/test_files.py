"""Raw rows of JSONL, CSV and Parquet files, wherever they lie."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from web import web_server

from memmcl.errors import ConfigError, DataError
from memmcl.suite import files
from memmcl.suite.faults import Fault
from memmcl.suite.files import read_files
from memmcl.suite.rows import Row


def written(path: Path, data: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def values(url: str) -> list[dict[str, object]]:
    found = list(read_files(url))
    assert all(isinstance(row, Row) for row in found), found
    return [dict(row.values) for row in found if isinstance(row, Row)]


def told(url: str) -> list[tuple[str, str]]:
    """Return (end of the place, kind of fault, or "row") of everything that is read."""
    return [(row.place.rpartition(", ")[2], row.kind if isinstance(row, Fault) else "row") for row in read_files(url)]


def test_json_lines_with_a_mark_blank_lines_and_a_line_separator(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "with a mark"}\r\n\n  \n{"text": "a\xe2\x80\xa8b"}')
    assert values(file) == [{"text": "with a mark"}, {"text": "a\u2028b"}]
    assert told(file) == [("line 1", "row"), ("line 4", "row")]


def test_one_bad_json_line_is_one_fault_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b'{"a": ', b'{"a": "\xff"}', b"[" * 100_000, b'["a"]', b"NaN", b'{"a": 2}']
    assert told(written(tmp_path / "a.jsonl", b"\n".join(lines))) == [
        ("line 1", "row"),
        ("line 2", "broken line"),
        ("line 3", "encoding"),
        ("line 4", "broken line"),
        ("line 5", "broken line"),
        ("line 6", "broken line"),
        ("line 7", "row"),
    ]


def test_a_line_without_end_is_one_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_BYTES", 64)
    file = written(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 1000 + '"}\n{"a": 2}\n')
    assert told(file) == [("line 1", "row"), ("line 2", "broken line"), ("line 3", "row")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_values_are_the_texts_that_stand_there(tmp_path: Path, delimiter: str) -> None:
    header = delimiter.join(["text", '"a,b;c\td,,;;\t\t"', "label"])
    words = ["NA", "null", "None", "nan", "1", "01", "", " spaced "]
    lines = [delimiter.join([f'"{word}, ; \t"', word, word]) for word in words]
    file = written(tmp_path / "a.csv", b"\xef\xbb\xbf" + "\r\n".join([header, *lines]).encode())
    assert [list(row.values()) for row in values(file)] == [[f"{word}, ; \t", word, word] for word in words]
    assert list(values(file)[0]) == ["text", "a,b;c\td,,;;\t\t", "label"]


def test_a_csv_record_stands_where_it_starts(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", 'text,label\n"two\nlines ""quoted""",a\n\none,b\n"three\r\n\n",c\nlast,d\n')
    assert [row["text"] for row in values(file)] == ['two\nlines "quoted"', "one", "three\r\n\n", "last"]
    assert [place for place, _ in told(file)] == ["line 2", "line 5", "line 6", "line 9"]


def test_a_bad_csv_record_is_one_fault_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = ["text,label", "one,a", "two", "three,b,c", "four\ufffd,d", '"five"x,e', "six,f", '"seven,g', "eight,h"]
    data = "\n".join(lines).encode().replace("\ufffd".encode(), b"\xe9")
    assert told(written(tmp_path / "a.csv", data)) == [
        ("line 2", "row"),
        ("line 3", "broken line"),
        ("line 4", "broken line"),
        ("line 5", "encoding"),
        ("line 6", "broken line"),
        ("line 7", "row"),
        ("line 8", "broken line"),
    ]


def test_a_header_that_cannot_be_used_is_one_fault(tmp_path: Path) -> None:
    assert told(written(tmp_path / "a.csv", "text,text\na,b\nc,d\n")) == [("line 1", "broken line")]
    assert told(written(tmp_path / "b.csv", "text,label\na,b\n".encode("utf-16"))) == [("line 1", "encoding")]
    assert told(written(tmp_path / "c.csv", "")) == []


def test_parquet_is_read_in_batches_and_only_what_is_asked_for(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": [f"t{number}" for number in range(2500)],
            "label": pa.array(["a", None] * 1250).dictionary_encode(),
            "items": [[["a", "b"]]] * 2500,
            "other": [0] * 2500,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    found = list(read_files(str(tmp_path / "a.parquet"), columns=["text", "label", "items", "absent"]))
    assert [row.values["text"] for row in found if isinstance(row, Row)] == [f"t{number}" for number in range(2500)]
    assert found[1] == Row(f"{tmp_path}/a.parquet, row 2", {"text": "t1", "label": None, "items": [["a", "b"]]})
    assert found[-1].place.endswith("row 2500")


def test_parquet_text_that_is_no_utf8_is_one_fault(tmp_path: Path) -> None:
    broken = pa.array([b"one", b"t\xffo", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert told(str(tmp_path / "a.parquet")) == [("row 1", "row"), ("row 2", "encoding"), ("row 3", "row")]


def test_damaged_files_are_faults(tmp_path: Path) -> None:
    assert told(written(tmp_path / "a.parquet", b"PAR1 is not enough")) == [("row 1", "broken line")]
    whole = gzip.compress(b"".join(b'{"a": "%s"}\n' % os.urandom(40).hex().encode() for _ in range(2000)))
    found = told(written(tmp_path / "a.jsonl.gz", whole[: len(whole) // 2]))
    assert [kind for _, kind in found].count("broken line") >= 1
    assert 100 < [kind for _, kind in found].count("row") < 1900
    assert found[-1][1] == "broken line"
    assert told(written(tmp_path / "b.csv.gz", b"no gzip")) == [("line 1", "broken line")]


def test_compressed_texts_are_read(tmp_path: Path) -> None:
    assert values(written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": "1"}\n'))) == [{"a": "1"}]
    assert values(written(tmp_path / "a.tsv.gz", gzip.compress(b"a\tb,c\n1\t2\n"))) == [{"a": "1", "b,c": "2"}]


def test_globs_and_folders_are_read_in_sorted_order(tmp_path: Path) -> None:
    written(tmp_path / "d/b.csv", "a\n2\n")
    written(tmp_path / "d/a.jsonl", '{"a": "1"}\n')
    written(tmp_path / "d/c.tsv", "a\n3\n")
    for ignored in ("d/README.md", "d/_SUCCESS.json", "d/.a.csv", "d/inner/z.csv"):
        written(tmp_path / ignored, "nothing")
    expected = [{"a": "1"}, {"a": "2"}, {"a": "3"}]
    assert values(str(tmp_path / "d")) == expected
    assert values(f"file://{tmp_path}/d/[abc].*s*") == expected
    assert values(written(tmp_path / "odd [1]*.csv", "a\n4\n")) == [{"a": "4"}]


def test_what_is_not_there_or_unknown_is_named(tmp_path: Path) -> None:
    for missing in ("nowhere.csv", "*.csv", "nowhere/*.csv"):
        with pytest.raises(DataError, match=r"no data file at .*csv; expected a file, a glob or a folder"):
            list(read_files(str(tmp_path / missing)))
    with pytest.raises(DataError, match=r"cannot tell what .*a\.xlsx is; known endings: \.jsonl, .*\.parquet"):
        list(read_files(written(tmp_path / "a.xlsx", b"")))
    with pytest.raises(ConfigError, match=r"cannot open strange://a\.csv: expected a path or a URL"):
        list(read_files("strange://a.csv"))


def test_rows_in_memory_are_read() -> None:
    fsspec.filesystem("memory").pipe_file("/rows/a.csv", b"a\n1\n")
    assert values("memory://rows/*.csv") == [{"a": "1"}]
    assert next(iter(read_files("memory://rows/a.csv"))).place == "memory:///rows/a.csv, line 2"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    with web_server(tmp_path) as server:
        yield server.url


def test_rows_are_read_over_https_and_messages_keep_its_secrets(tmp_path: Path, web: str) -> None:
    rows = [{"text": f"row {number}"} for number in range(500)]
    written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    assert values(f"{web}/a.jsonl?token=SECRET") == rows
    assert values(f"{web}/a.jsonl") == rows
    assert values(f"{web}/a.parquet?token=SECRET") == rows
    assert next(iter(read_files(f"{web}/a.jsonl?token=SECRET"))).place == f"{web}/a.jsonl, line 1"
    for name, message in [
        ("b.jsonl", "there is no https"),
        ("closed.csv", "no access to https"),
        ("busy.csv", "HTTP status 429"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            list(read_files(f"{web}/{name}?token=SECRET"))
        assert "SECRET" not in str(caught.value)
        assert "\n" not in str(caught.value)
        assert f"{web}/{name}" in str(caught.value)


def test_a_server_that_does_not_answer_is_named(free_port: int) -> None:
    with pytest.raises(DataError, match=r"cannot read https://127\.0\.0\.1:\d+/a\.csv \(.*\); check the address"):
        list(read_files(f"https://127.0.0.1:{free_port}/a.csv?key=SECRET"))


@pytest.fixture
def free_port() -> int:
    from servers import free_ports

    return free_ports(1)[0]
