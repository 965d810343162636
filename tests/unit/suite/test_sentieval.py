"""SentiEval's directory layout: our JSONL files, and CSV files as they were published."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import SENTIEVAL, needs_sentieval

from memmcl.errors import DataError
from memmcl.suite.examples import Example, drawing_order
from memmcl.suite.sources import Reading, RowPools, read_sources
from memmcl.suite.subtasks import POLARITIES, SUBTASKS


def write(root: Path, dataset: str, **parts: list[object] | bytes) -> Path:
    """Write train, dev and test of `dataset` ("sc/mr"); a part not given holds one valid polarity row."""
    folder = root / dataset
    folder.mkdir(parents=True)
    for part in ("train", "dev", "test"):
        rows = parts.get(part, [{"text": f"a {part} text", "label": "positive"}])
        data = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{part}.jsonl").write_bytes(data)
    return root


def write_csv(path: Path, *records: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(records)


def read(root: Path, *names: str, **options: object) -> RowPools:
    return read_sources([SUBTASKS[name] for name in names], Reading(source=str(root), **options))


def sound(root: Path, name: str) -> dict[str, list[Example]]:
    found = read(root, name)
    assert found.faults.first == []
    return found.pools[name]


def ordered(*examples: Example) -> list[Example]:
    return sorted(examples, key=drawing_order)


def test_a_directory_reads_into_parts_and_data_sets(tmp_path: Path) -> None:
    separator = "a\u2028b"
    write(tmp_path, "sc/mr", train=[{"text": separator, "label": "negative", "extra": 1}])
    write(tmp_path, "sc/sst2", dev=b'\xef\xbb\xbf{"text": "with a mark", "label": "negative"}\r\n\n  \n')
    assert sound(tmp_path, "sent2") == {
        "train": [Example.create("mr", separator, "negative"), Example.create("sst2", "a train text", "positive")],
        "weak": [Example.create("mr", "a dev text", "positive"), Example.create("sst2", "with a mark", "negative")],
        "test": [Example.create("mr", "a test text", "positive"), Example.create("sst2", "a test text", "positive")],
    }


def test_the_folder_above_called_data_is_the_same_place(tmp_path: Path) -> None:
    write(tmp_path / "data", "sc/mr")
    assert sound(tmp_path, "sent2") == sound(tmp_path / "data", "sent2") == sound(Path(f"{tmp_path}/data/"), "sent2")


def test_bad_rows_are_faults_with_file_and_line_and_the_rest_is_read(tmp_path: Path) -> None:
    good = {"text": "t", "label": "positive"}
    lines = [json.dumps(good), '{"text": "half"', "", json.dumps({"text": "u", "label": "Positive"}), '{"text": "v"}']
    write(tmp_path, "sc/mr", train="\n".join(lines).encode(), test=[good])
    found = read(tmp_path, "sent2")
    assert [(fault.place, fault.kind) for fault in found.faults.first] == [
        (f"{tmp_path}/sc/mr/train.jsonl, line 2", "broken line"),
        (f"{tmp_path}/sc/mr/train.jsonl, line 4", "unknown label"),
        (f"{tmp_path}/sc/mr/train.jsonl, line 5", "missing column"),
    ]
    assert {part: len(rows) for part, rows in found.pools["sent2"].items()} == {"train": 1, "weak": 1, "test": 1}


def test_repeated_rows_are_faults_in_train_and_weak_and_kept_with_a_warning_in_test(tmp_path: Path) -> None:
    once, other = {"text": "t", "label": "positive"}, {"text": "t", "label": "negative"}
    write(tmp_path, "sc/mr", train=[once, once, once], dev=[once, other], test=[once, once, other])
    found = read(tmp_path, "sent2")
    assert found.faults.counts == {"repeated row": 2, "contradicting row": 1}
    assert found.faults.warning_counts == {"repeated row": 1, "contradicting row": 1}
    assert [(fault.place, fault.message) for fault in found.faults.first[:1]] == [
        (
            f"{tmp_path}/sc/mr/train.jsonl, line 2",
            f"the same question and answer as {tmp_path}/sc/mr/train.jsonl, line 1; remove one of them",
        )
    ]
    assert {part: len(rows) for part, rows in found.pools["sent2"].items()} == {"train": 1, "weak": 1, "test": 3}


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory; give one in SentiEval's layout"):
        read(tmp_path / "nowhere", "sent2")
    with pytest.raises(DataError, match=r"no data set for subtask 'sent2' .* expected at least one of sc/mr, sc/sst2"):
        read(tmp_path, "sent2")
    write(tmp_path, "sc/mr")
    (tmp_path / "sc/mr/test.jsonl").unlink()
    with pytest.raises(DataError, match=r"sc/mr has no test rows: every data set folder needs .* add the file"):
        read(tmp_path, "sent2")
    (tmp_path / "sc/mr/train.jsonl").unlink()
    with pytest.raises(DataError, match="has no train and no test rows"):
        read(tmp_path, "sent2")


def test_published_csv_files_read_with_their_columns(tmp_path: Path) -> None:
    shot = "shot_1/seed_0/train.csv"
    for file in ("test.csv", shot):
        write_csv(
            tmp_path / "mast/stance" / file,
            ["domain", "text", "label", "label_text"],
            ["climate", f"NULL, {file}", "0", "none"],
        )
        write_csv(
            tmp_path / "mast/compsent19" / file,
            ["text", "tuple", "label_text"],
            [f"c {file}", "['Java', \"it's\", 'worse']", "worse"],
        )
        write_csv(
            tmp_path / "mast/implicit" / file,
            ["domain", "id", "text", "aspect", "label_text"],
            ["r", "7", f"i {file}", "soup", "neutral"],
        )
        write_csv(
            tmp_path / "sc/asc_lap14" / file,
            ["idx", "text", "aspect", "label_text"],
            ["7", f"a {file}", "fan", "positive"],
        )
        write_csv(
            tmp_path / "absa/asqp_rest15" / file,
            ["text", "label_text"],
            [f"q {file}", "[('food quality', 'NULL', 'good', 'positive')]"],
        )
    names = ("stance", "compsent", "implicit", "asc", "asqp")
    found = read(tmp_path, *names)
    assert found.faults.first == []
    tests = {name: found.pools[name]["test"] for name in names}
    assert tests == {
        "stance": [Example.create("stance", "NULL, test.csv", "none", {"target": "climate"})],
        "compsent": [Example.create("compsent19", "c test.csv", "worse", {"object_a": "Java", "object_b": "it's"})],
        "implicit": [Example.create("implicit", "i test.csv", "neutral", {"aspect": "soup"})],
        "asc": [Example.create("asc_lap14", "a test.csv", "positive", {"aspect": "fan"})],
        "asqp": [Example.create("asqp_rest15", "q test.csv", [("food quality", "NULL", "good", "positive")])],
    }
    for name in names:
        assert len(found.pools[name]["train"]) + len(found.pools[name]["weak"]) == 1


def test_compared_objects_that_cannot_be_read_are_faults(tmp_path: Path) -> None:
    header = ["text", "tuple", "label_text"]
    write_csv(tmp_path / "mast/compsent19/train.csv", header, ["t", "['A', 'B', 'better']", "better"])
    write_csv(tmp_path / "mast/compsent19/test.csv", header, ["t", "['A', 'B']", "better"], ["u", "exit()", "better"])
    faults = read(tmp_path, "compsent").faults
    assert [(fault.place.rpartition(", ")[2], fault.kind) for fault in faults.first] == [
        ("line 2", "broken tuples"),
        ("line 3", "broken tuples"),
    ]


def test_all_shots_are_the_training_rows_once_each_and_a_fifth_of_them_weak(tmp_path: Path) -> None:
    header = ["text", "label_text"]
    texts = [f"review {number}" for number in range(200)]
    write_csv(tmp_path / "sc/mr/test.csv", header, ["a test", "positive"])
    for index, (shot, seed) in enumerate([(1, 0), (1, 42), (5, 0), (10, 1)]):
        chosen = texts[index * 40 : index * 40 + 80]
        write_csv(
            tmp_path / f"sc/mr/shot_{shot}/seed_{seed}/train.csv", header, *([text, "negative"] for text in chosen)
        )
    found = read(tmp_path, "sent2")
    assert len(found.faults) == 0
    pools = found.pools["sent2"]
    train, weak = ({row.text for row in pools[part]} for part in ("train", "weak"))
    assert len(train) + len(weak) == len(pools["train"]) + len(pools["weak"]) == 200
    assert train | weak == set(texts)
    assert 20 <= len(weak) <= 60
    twice = tmp_path / "sc/mr/shot_5/seed_42/train.csv"
    write_csv(
        twice, header, ["review 3", "negative"], ["new", "negative"], ["review 3", "negative"], ["review 5", "positive"]
    )
    faults = read(tmp_path, "sent2").faults
    assert [(fault.place, fault.kind) for fault in faults.first] == [
        (f"{twice}, line 4", "repeated row"),
        (f"{twice}, line 5", "contradicting row"),
    ]


def test_a_train_or_dev_file_is_used_instead_of_shots_and_jsonl_instead_of_csv(tmp_path: Path) -> None:
    header = ["text", "label_text"]
    write_csv(tmp_path / "sc/mr/test.csv", header, ["a test", "positive"])
    write_csv(tmp_path / "sc/mr/shot_1/seed_0/train.csv", header, ["a shot", "positive"])
    write_csv(tmp_path / "sc/mr/dev.csv", header, ["a dev", "positive"])
    assert [[row.text for row in rows] for rows in sound(tmp_path, "sent2").values()] == [
        ["a shot"],
        ["a dev"],
        ["a test"],
    ]
    write_csv(tmp_path / "sc/mr/train.csv", header, ["a train", "positive"])
    assert [row.text for row in sound(tmp_path, "sent2")["train"]] == ["a train"]
    for part in ("train", "test"):
        (tmp_path / f"sc/mr/{part}.jsonl").write_text('{"text": "from json", "label": "positive"}\n')
    rows = sound(tmp_path, "sent2")
    assert {row.text for part in rows.values() for row in part} == {"from json"}


@needs_sentieval
def test_every_sentieval_data_set_reads_without_a_fault() -> None:
    found = read(SENTIEVAL, *SUBTASKS)
    assert found.faults.first == []
    assert found.dropped == {}
    assert found.faults.warning_counts.total() == 5
    assert all("/test.jsonl, line" in fault.place for fault in found.faults.warnings)
    for name, subtask in SUBTASKS.items():
        for part, file in (("train", "train"), ("weak", "dev"), ("test", "test")):
            counted = Counter(example.dataset for example in found.pools[name][part])
            assert set(counted) == set(subtask.datasets)
            for dataset in subtask.datasets:
                lines = (SENTIEVAL / subtask.group.lower() / dataset / f"{file}.jsonl").read_bytes()
                assert counted[dataset] == lines.count(b"\n"), (dataset, part)


@needs_sentieval
@pytest.mark.parametrize("name", list(SUBTASKS))
def test_the_catalogue_has_the_labels_and_categories_of_sentieval(name: str) -> None:
    subtask = SUBTASKS[name]
    golds = [example.gold for example in sound(SENTIEVAL, name)["train"]]
    if subtask.is_tuple:
        assert {item[-1] for gold in golds for item in gold} == set(POLARITIES)
    else:
        assert set(golds) == set(subtask.labels)
    if "category" in subtask.tuple_fields:
        named = subtask.instruction.partition("Categories: ")[2].rstrip(".").split(", ")
        assert len(named) == 13
        assert {item[0] for gold in golds for item in gold} <= set(named)
