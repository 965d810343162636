"""Rows that are written and read back, whatever their texts hold and whatever order they come in."""

import csv
import json
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.suite.examples import Example, drawing_order
from memmcl.suite.faults import Faults
from memmcl.suite.files import read_files
from memmcl.suite.pool import BEYOND, Pool
from memmcl.suite.rows import MISSING, Row
from memmcl.suite.sources import Reading, Source, read_sources
from memmcl.suite.subtasks import SUBTASKS

COLUMNS = ("text", "aspect", "label")
PIECES = st.sampled_from(
    [
        '"',
        '""',
        "'",
        ",",
        ";",
        "\t",
        "\n",
        "\r\n",
        "\\",
        "NA",
        "null",
        "None",
        "nan",
        "😀",
        "👩‍👧",
        "שלום",
        "\u202e",
        "\u2028",
        "\x85",
        "\r",
        "\0",
        "\ufeff",
        "é",
        "e\u0301",
        " ",
        "word",
        "{",
        "[",
    ]
)
CELLS = st.lists(st.one_of(PIECES, st.text(st.characters(codec="utf-8"), max_size=5)), max_size=6)
ROWS = st.lists(st.tuples(*[CELLS.map("".join)] * 3), max_size=12)


def write_all(folder: Path, rows: list[tuple[str, ...]]) -> list[Path]:
    """Write the rows as JSONL, CSV with each separator, and Parquet."""
    paths = [folder / name for name in ("a.jsonl", "b.csv", "c.csv", "d.tsv", "e.parquet")]
    objects = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    paths[0].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects), "utf-8", newline="\n")
    for path, delimiter in zip(paths[1:4], ",;\t", strict=True):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=delimiter).writerows([COLUMNS, *rows])
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    pq.write_table(pa.Table.from_pylist(objects, schema), paths[4], row_group_size=5)
    return paths


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_what_is_written_is_read_back_in_every_format(rows: list[tuple[str, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in write_all(Path(folder), rows):
            found = list(read_files(str(path)))
            assert all(isinstance(row, Row) for row in found), (path.name, found)
            assert [tuple(row.values[name] for name in COLUMNS) for row in found] == rows, path.name
            assert len({row.place for row in found}) == len(rows)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_every_format_gives_the_same_examples_and_as_many_faults(rows: list[tuple[str, ...]]) -> None:
    usable = {
        (text, aspect)
        for text, aspect, _ in rows
        if all(cell.strip() and cell.strip().lower() not in MISSING and "\0" not in cell for cell in (text, aspect))
    }
    labelled = [(text, aspect, "positive") for text, aspect, _ in rows]
    with tempfile.TemporaryDirectory() as folder:
        reads = []
        for path in write_all(Path(folder), labelled):
            source = Source(train=str(path), weak=str(path), test=str(path))
            reads.append(read_sources([SUBTASKS["asc"]], Reading(sources={"asc": source})))
        for read in reads:
            assert read.pools == reads[0].pools
            assert read.faults.counts == reads[0].faults.counts
            assert read.faults.warning_counts == reads[0].faults.warning_counts
            assert {(row.text, row.fields["aspect"]) for row in read.pools["asc"]["train"]} == usable


EXAMPLES = st.lists(
    st.builds(
        Example.create,
        st.just("d"),
        st.sampled_from([f"{word}{end}" for word in "abcdefghijklmnop" for end in ("", "!", " !")]),
        st.sampled_from(["positive", "negative"]),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(EXAMPLES, st.randoms(use_true_random=False), st.integers(1, 30), st.booleans())
def test_what_a_pool_keeps_depends_on_no_order(
    examples: list[Example], random: object, limit: int, repeats: bool
) -> None:
    shuffled = list(examples)
    random.shuffle(shuffled)
    kept = []
    for order in (examples, shuffled):
        faults, dropped = Faults(), Counter[str]()
        pool = Pool(limit, keep_repeats=repeats, faults=faults, dropped=dropped)
        for number, example in enumerate(order):
            pool.add(example, f"row {number}")
        kept.append(pool.rows())
        assert len(examples) == len(kept[-1]) + dropped[BEYOND] + (0 if repeats else len(faults))
    ordered = sorted(examples, key=drawing_order)
    distinct = list({example.id: example for example in reversed(ordered)}.values())[::-1]
    assert kept[0] == kept[1] == (ordered if repeats else sorted(distinct, key=drawing_order))[:limit]
