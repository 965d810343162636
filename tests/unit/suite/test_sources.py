"""The one door to rows: sources of single subtasks, pools, and weak rows without labels."""

import json
import random
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import EMBEDDED, read_corpus

from memmcl.errors import DataError
from memmcl.suite.examples import Example, drawing_order, normalised
from memmcl.suite.faults import Faults
from memmcl.suite.pool import BEYOND, Pool
from memmcl.suite.sources import SOURCE_SPLITS, Reading, Source, read_sources, split_of
from memmcl.suite.subtasks import SUBTASKS

SENT2, UABSA = SUBTASKS["sent2"], SUBTASKS["uabsa"]
REVIEWS = [{"text": f"review number {number}", "label": ("positive", "negative")[number % 2]} for number in range(100)]


def lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(rows: list[Example]) -> set[str]:
    return {row.text for row in rows}


def test_the_corpus_reads_into_the_parts_that_its_content_gives() -> None:
    subtasks = [SUBTASKS[name] for name in EMBEDDED]
    read = read_sources(subtasks)
    assert read.faults.first == []
    assert read.dropped == {}
    for name, examples in {subtask.name: read_corpus(subtask) for subtask in subtasks}.items():
        pools = read.pools[name]
        assert sorted(examples, key=drawing_order) == sorted(
            (row for part in SOURCE_SPLITS for row in pools[part]), key=drawing_order
        )
        assert all(split_of(row.text) == part for part in SOURCE_SPLITS for row in pools[part])
        assert {row.dataset for part in SOURCE_SPLITS for row in pools[part]} == {f"embedded_{name}"}


def test_the_part_of_a_text_is_that_of_its_letters_and_digits() -> None:
    assert split_of("The pizza, was good!") == split_of("the pizza was GOOD")
    parts = Counter(split_of(f"text {number}") for number in range(2000))
    assert 520 < parts["test"] < 680
    assert 320 < parts["weak"] < 480


def test_one_file_of_all_rows_is_dealt_by_content(tmp_path: Path) -> None:
    read = read_sources([SENT2], Reading(sources={"sent2": Source(path=lines(tmp_path / "a.jsonl", REVIEWS))}))
    assert len(read.faults) == 0
    assert sum(len(read.pools["sent2"][part]) for part in SOURCE_SPLITS) == len(REVIEWS)
    for part in SOURCE_SPLITS:
        assert texts(read.pools["sent2"][part]) == {row["text"] for row in REVIEWS if split_of(row["text"]) == part}
        assert {row.dataset for row in read.pools["sent2"][part]} == {"sent2"}


def test_files_of_parts_with_mapped_columns_beside_the_corpus(tmp_path: Path) -> None:
    table = pa.table({"body": ["good"], "stars": [5], "unused": [b"x"]})
    pq.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "test.csv").write_text("stars;body\n1;bad\n")
    source = Source(
        train=str(tmp_path / "train.parquet"),
        test=f"file://{tmp_path}/test.csv",
        weak=lines(tmp_path / "weak.jsonl", [{"body": "fine", "stars": "5"}]),
        columns={"text": "body", "label": "stars"},
        labels={"5": "positive", "1": "negative"},
    )
    read = read_sources([SENT2, SUBTASKS["irony"]], Reading(sources={"sent2": source}))
    assert read.pools["sent2"] == {
        "train": [Example.create("sent2", "good", "positive")],
        "weak": [Example.create("sent2", "fine", "positive")],
        "test": [Example.create("sent2", "bad", "negative")],
    }
    assert read.pools["irony"]["train"]


def test_without_weak_rows_a_fifth_of_the_training_rows_is_weak(tmp_path: Path) -> None:
    train, test = lines(tmp_path / "train.jsonl", REVIEWS), lines(tmp_path / "test.jsonl", REVIEWS[:3])
    pools = read_sources([SENT2], Reading(sources={"sent2": Source(train=train, test=test)})).pools["sent2"]
    assert len(pools["test"]) == 3
    assert texts(pools["train"]) | texts(pools["weak"]) == {row["text"] for row in REVIEWS}
    assert 10 <= len(pools["weak"]) <= 30
    assert len(pools["train"]) + len(pools["weak"]) == 100
    assert all(split_of(row.text) == "test" for row in pools["weak"])  # the lowest hashes, which path gives to test


def test_a_source_without_training_or_test_rows_is_refused(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", REVIEWS)
    for source, message in [
        (Source(train=file), r"'sent2' has no test rows; add test: to it: name a file"),
        (Source(test=file), r"'sent2' has no train rows; add train: to it"),
        (Source(weak=file), r"no train and no test rows; add train: and test: to it"),
    ]:
        with pytest.raises(DataError, match=message):
            read_sources([SENT2], Reading(sources={"sent2": source}))


def test_weak_rows_need_no_label_where_none_is_wanted(tmp_path: Path) -> None:
    plain = [{"text": row["text"]} for row in REVIEWS]
    source = {"sent2": Source(path=lines(tmp_path / "a.jsonl", plain))}
    assert read_sources([SENT2], Reading(sources=source)).faults.counts == {"missing column": 100}
    read = read_sources([SENT2], Reading(sources=source, weak_labels=False))
    weak = [row for row in plain if split_of(row["text"]) == "weak"]
    assert read.faults.counts == {"missing column": 100 - len(weak)}
    assert texts(read.pools["sent2"]["weak"]) == {row["text"] for row in weak}
    assert {row.gold for row in read.pools["sent2"]["weak"]} == {""}
    corpus = read_sources([SENT2, UABSA], Reading(weak_labels=False)).pools
    assert {row.gold for row in corpus["sent2"]["weak"]} == {""}
    assert {row.gold for row in corpus["uabsa"]["weak"]} == {()}
    assert {row.gold for row in corpus["sent2"]["train"]} == {"positive", "negative"}


def test_a_pool_keeps_the_first_rows_in_drawing_order_and_counts_the_others(tmp_path: Path) -> None:
    file, again = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines(file, REVIEWS)
    lines(again, random.Random(1).sample(REVIEWS, len(REVIEWS)))
    for path in (file, again):
        source = Source(train=str(path), weak=str(path), test=str(path))
        read = read_sources([SENT2], Reading(sources={"sent2": source}, pool_rows=7))
        expected = sorted((Example.create("sent2", **_gold(row)) for row in REVIEWS), key=drawing_order)[:7]
        assert read.pools["sent2"] == dict.fromkeys(SOURCE_SPLITS, expected)
        assert read.dropped == {BEYOND: 3 * 93}


def _gold(row: dict[str, str]) -> dict[str, str]:
    return {"text": row["text"], "gold": row["label"]}


def test_of_contradicting_rows_the_same_one_is_kept_in_any_order() -> None:
    rows = [Example.create("d", "t", gold) for gold in ("positive", "negative", "neutral")]
    for order in (rows, rows[::-1]):
        faults = Faults()
        pool = Pool(5, keep_repeats=False, faults=faults, dropped=Counter())
        for number, row in enumerate(order):
            pool.add(row, f"row {number}")
        assert [row.gold for row in pool.rows()] == ["negative"]
        assert faults.counts == {"contradicting row": 2}


def test_a_long_text_is_a_fault_at_the_limit_that_is_set(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [{"text": "x" * size, "label": "positive"} for size in (9, 10, 11)])
    read = read_sources([SENT2], Reading(sources={"sent2": Source(train=file, test=file)}, max_characters=10))
    assert read.faults.counts == {"long text": 2}
    assert "row" not in read.faults.first[0].place
    assert read.faults.first[0].place == f"{file}, line 3"


@pytest.fixture
def hub_set() -> datasets.DatasetDict:
    features = datasets.Features({"review": datasets.Value("string"), "y": datasets.ClassLabel(names=["neg", "pos"])})
    rows = {"train": [("one", 0), ("two", 1)], "validation": [("three", 1)], "test": [("four", 0), ("five", -1)]}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list([{"review": text, "y": y} for text, y in found], features=features)
            for split, found in rows.items()
        }
    )


MAPPED = {"columns": {"text": "review", "label": "y"}, "labels": {"neg": "negative", "pos": "positive"}}


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_data_set_of_the_hub_is_read_from_a_local_directory(
    tmp_path: Path, hub_set: datasets.DatasetDict, form: str
) -> None:
    place = str(tmp_path / form)
    if form == "saved":
        hub_set.save_to_disk(place)
    else:
        Path(place).mkdir()
        for split, rows in hub_set.items():
            rows.to_parquet(f"{place}/{split}.parquet")
    read = read_sources([SENT2], Reading(sources={"sent2": Source(dataset=place, **MAPPED)}))
    assert {part: {row.text: row.gold for row in rows} for part, rows in read.pools["sent2"].items()} == {
        "train": {"one": "negative", "two": "positive"},
        "weak": {"three": "positive"},
        "test": {"four": "negative"},
    }
    assert [(fault.place, fault.kind) for fault in read.faults.first] == [
        (f"{place}, split test, row 2", "missing value")
    ]
    named = read_sources([SENT2], Reading(sources={"sent2": Source(dataset=place, test="validation", **MAPPED)}))
    assert texts(named.pools["sent2"]["test"]) == {"three"}


def test_a_data_set_of_the_hub_that_cannot_be_read_is_named(tmp_path: Path, hub_set: datasets.DatasetDict) -> None:
    hub_set["train"].to_parquet(tmp_path / "train.parquet")
    for source, message in [
        (Source(dataset=str(tmp_path / "nowhere")), r"cannot read data set '.*nowhere' .* or give the path of a local"),
        (Source(dataset=str(tmp_path), subset="xx"), r"cannot read data set '.*', subset 'xx' \(ValueError"),
        (Source(dataset=str(tmp_path)), r"has no test rows; add test: to it: name one of its splits \(train\)"),
        (Source(dataset=str(tmp_path), test="dev"), r"has no split 'dev'; it has train: name one of them"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            read_sources([SENT2], Reading(sources={"sent2": source}))
        assert "\n" not in str(caught.value)


def test_the_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot read data set 'nobody/nothing', revision 'v1' \(.*\); check the name"):
        read_sources([SENT2], Reading(sources={"sent2": Source(dataset="nobody/nothing", revision="v1")}))


def test_rows_that_agree_in_letters_and_digits_are_not_repeated_rows(tmp_path: Path) -> None:
    rows = [{"text": "Good!", "label": "positive"}, {"text": "good", "label": "positive"}]
    assert normalised("Good!") == normalised("good")
    file = lines(tmp_path / "a.jsonl", rows)
    read = read_sources([SENT2], Reading(sources={"sent2": Source(train=file, weak=file, test=file)}))
    assert len(read.faults) == 0
    assert len(read.pools["sent2"]["train"]) == 2


def test_a_corpus_without_rows_or_with_bad_ones_is_refused(tmp_path: Path) -> None:
    for name in ("uabsa", "irony"):
        with pytest.raises(DataError, match=rf"no rows for subtask '{name}'; set data\.source to a directory"):
            read_corpus(SUBTASKS[name], tmp_path)
    quad = {"category": "food quality", "aspect": "a", "opinion": "b", "polarity": "neutral"}
    for row, message in [
        ({"text": "t"}, "expected 'quads' as a list"),
        ({"text": "t", "quads": ["a"]}, "expected 'quads' as a list"),
        ({"text": "t", "quads": [quad | {"polarity": "good"}]}, "unknown polarity 'good'"),
        ({"text": "t", "quads": [quad | {"aspect": ""}]}, "'aspect' must be a non-empty string"),
        ({"text": " ", "quads": [quad]}, "'text' must be a non-empty string"),
    ]:
        lines(tmp_path / "absa_a.jsonl", [row])
        with pytest.raises(DataError, match=rf"corpus/absa_a\.jsonl, line 1: {message}"):
            read_corpus(SUBTASKS["aste"], tmp_path)


def test_repeated_rows_are_faults_in_every_part_that_content_gives(tmp_path: Path) -> None:
    source = {"sent2": Source(path=lines(tmp_path / "a.jsonl", [*REVIEWS, *REVIEWS]))}
    read = read_sources([SENT2], Reading(sources=source))
    assert read.faults.counts == {"repeated row": len(REVIEWS)}
    assert read.faults.warning_counts == {}
    assert sum(len(rows) for rows in read.pools["sent2"].values()) == len(REVIEWS)


def test_a_row_that_repeats_the_last_one_kept_is_a_repeated_row() -> None:
    rows = sorted((Example.create("d", f"t{number}", "positive") for number in range(9)), key=drawing_order)
    faults, dropped = Faults(), Counter[str]()
    pool = Pool(3, keep_repeats=False, faults=faults, dropped=dropped)
    for number, row in enumerate([*rows, rows[2], rows[3]]):
        pool.add(row, f"row {number}")
    assert pool.rows() == rows[:3]
    assert [fault.place for fault in faults.first] == ["row 9"]
    assert dropped == {BEYOND: 7}
