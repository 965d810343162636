"""Readers: SentiEval's layout on disk, and the embedded corpus."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from tiny import EMBEDDED

from memmcl.errors import DataError
from memmcl.suite.datasets import read_directory
from memmcl.suite.embedded import read_corpus, read_embedded
from memmcl.suite.examples import Example
from memmcl.suite.splits import load_splits, split_embedded
from memmcl.suite.subtasks import POLARITIES, SUBTASKS

SENTIEVAL = Path(
    os.environ.get("MEMMCL_SENTIEVAL", Path(__file__).resolve().parents[2].parent / "shared/data/sentieval")
)
needs_sentieval = pytest.mark.skipif(not SENTIEVAL.is_dir(), reason="set MEMMCL_SENTIEVAL to SentiEval's files")


def write(root: Path, dataset: str, **parts: list[object] | bytes) -> Path:
    """Write train, dev and test of `dataset` ("sc/mr"); a part not given holds one valid polarity row."""
    folder = root / dataset
    folder.mkdir(parents=True)
    for part in ("train", "dev", "test"):
        rows = parts.get(part, [{"text": f"a {part} text", "label": "positive"}])
        data = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{part}.jsonl").write_bytes(data)
    return root


def test_a_directory_reads_into_parts_and_data_sets(tmp_path: Path) -> None:
    separator = "a\u2028b"
    write(tmp_path, "sc/mr", train=[{"text": separator, "label": "negative", "extra": 1}])
    write(tmp_path, "sc/sst2", dev=b'\xef\xbb\xbf{"text": "with a mark", "label": "negative"}\r\n\n  \n')
    read = read_directory(tmp_path, [SUBTASKS["sent2"]])
    assert read == {
        "sent2": {
            "train": [
                Example.create("mr", separator, "negative"),
                Example.create("sst2", "a train text", "positive"),
            ],
            "weak": [
                Example.create("mr", "a dev text", "positive"),
                Example.create("sst2", "with a mark", "negative"),
            ],
            "test": [
                Example.create("mr", "a test text", "positive"),
                Example.create("sst2", "a test text", "positive"),
            ],
        }
    }


def test_fields_and_tuples_are_read(tmp_path: Path) -> None:
    aspect = [{"text": "t", "aspect": "pizza", "other": "left out", "label": "neutral"}]
    write(tmp_path, "sc/asc_lap14", train=aspect, dev=aspect, test=aspect)
    triples = [{"text": "t", "label": [["a", "b", "positive"]]}, {"text": "u", "label": []}]
    write(tmp_path, "absa/aste_rest15", train=triples, dev=triples, test=triples)
    read = read_directory(str(tmp_path), [SUBTASKS["asc"], SUBTASKS["aste"]])
    assert read["asc"]["test"] == [Example.create("asc_lap14", "t", "neutral", {"aspect": "pizza"})]
    assert [example.gold for example in read["aste"]["weak"]] == [(("a", "b", "positive"),), ()]


def test_quadruples_keep_an_aspect_that_is_not_named(tmp_path: Path) -> None:
    quads = [["food quality", "NULL", "good", "positive"], ["food prices", "soup", "NULL", "negative"]]
    rows = [{"text": "t", "label": quads}, {"text": "u", "label": []}]
    write(tmp_path, "absa/asqp_rest16", train=rows, dev=rows, test=rows)
    read = read_directory(tmp_path, [SUBTASKS["asqp"]])["asqp"]["train"]
    assert [example.gold for example in read] == [tuple(tuple(quad) for quad in quads), ()]
    assert read[0].answer == repr([tuple(quad) for quad in quads])
    assert read[1].answer == "[]"


def test_targets_and_compared_objects_are_read_and_domains_are_not(tmp_path: Path) -> None:
    stance = [{"text": "t", "target": "NULL", "label": "none"}]
    write(tmp_path, "mast/stance", train=stance, dev=stance, test=stance)
    implied = [{"text": "t", "aspect": "NULL", "domain": "", "label": "neutral"}]
    write(tmp_path, "mast/implicit", train=implied, dev=implied, test=implied)
    compared = [
        {"text": "t", "object_a": "A", "object_b": "B", "label": "better"},
        {"text": "t", "object_a": "B", "object_b": "A", "label": "worse"},
    ]
    write(tmp_path, "mast/compsent19", train=compared, dev=compared, test=compared)
    read = read_directory(tmp_path, [SUBTASKS[name] for name in ("stance", "implicit", "compsent")])
    assert read["stance"]["test"] == [Example.create("stance", "t", "none", {"target": "NULL"})]
    assert read["implicit"]["test"] == [Example.create("implicit", "t", "neutral", {"aspect": "NULL"})]
    assert [dict(example.fields) for example in read["compsent"]["weak"]] == [
        {"object_a": "A", "object_b": "B"},
        {"object_a": "B", "object_b": "A"},
    ]
    assert len({example.id for example in read["compsent"]["weak"]}) == 2


@pytest.mark.parametrize(
    ("subtask", "dataset", "row", "message"),
    [
        (
            "sent2",
            "sc/mr",
            {"text": "t", "label": "Positive"},
            "unknown label 'Positive' for subtask 'sent2'",
        ),
        ("sent2", "sc/mr", {"text": "t", "label": 1}, "unknown label 1"),
        ("sent2", "sc/mr", {"text": "t", "label": ["positive"]}, "unknown label"),
        ("sent2", "sc/mr", {"text": "t"}, "no field 'label'"),
        ("sent2", "sc/mr", {"label": "positive"}, "no field 'text'"),
        ("sent2", "sc/mr", {"text": " \n", "label": "positive"}, "'text' must be a non-empty string"),
        ("sent2", "sc/mr", {"text": 3, "label": "positive"}, "'text' must be a non-empty string, got 3"),
        ("sent2", "sc/mr", {"text": "half \ud83d", "label": "positive"}, "half a surrogate pair"),
        ("sent2", "sc/mr", ["text"], "expected a JSON object"),
        ("asc", "sc/asc_lap14", {"text": "t", "label": "positive"}, "no field 'aspect'"),
        (
            "asc",
            "sc/asc_lap14",
            {"text": "t", "aspect": "", "label": "positive"},
            "'aspect' must be a non-empty",
        ),
        ("uabsa", "absa/uabsa_rest14", {"text": "t", "label": "positive"}, "expected a list of"),
        (
            "uabsa",
            "absa/uabsa_rest14",
            {"text": "t", "label": [["a", "b", "positive"]]},
            "expected 2 strings",
        ),
        ("uabsa", "absa/uabsa_rest14", {"text": "t", "label": ["ab"]}, "expected 2 strings"),
        ("uabsa", "absa/uabsa_rest14", {"text": "t", "label": [["a", None]]}, "takes non-empty strings only"),
        ("uabsa", "absa/uabsa_rest14", {"text": "t", "label": [["a", "good"]]}, "unknown polarity 'good'"),
        ("aste", "absa/aste_rest14", {"text": "t", "label": [["a", "positive"]]}, "expected 3 strings"),
        (
            "uabsa",
            "absa/uabsa_rest14",
            {"text": "t", "label": [["\udc00", "positive"]]},
            "half a surrogate pair",
        ),
        ("doc5", "sc/yelp5", {"text": "t", "label": "very  positive"}, "unknown label 'very  positive'"),
        ("hate", "mast/hate", {"text": "t", "label": "non_hate"}, "unknown label 'non_hate'"),
        ("stance", "mast/stance", {"text": "t", "label": "none"}, "no field 'target'"),
        ("stance", "mast/stance", {"text": "t", "target": "t", "label": None}, "unknown label None"),
        ("stance", "mast/stance", {"text": "t", "target": None, "label": "none"}, "'target' must be a non-empty"),
        ("implicit", "mast/implicit", {"text": "t", "aspect": " ", "label": "neutral"}, "'aspect' must be a non-empty"),
        ("compsent", "mast/compsent19", {"text": "t", "object_a": "A", "label": "better"}, "no field 'object_b'"),
        ("asqp", "absa/asqp_rest15", {"text": "t", "label": [["c", "", "o", "positive"]]}, "non-empty strings only"),
        ("asqp", "absa/asqp_rest15", {"text": "t", "label": [["a", "o", "positive"]]}, "expected 4 strings"),
        ("asqp", "absa/asqp_rest15", {"text": "t", "label": [["c", "a", "o", "NULL"]]}, "unknown polarity 'NULL'"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(
    tmp_path: Path, subtask: str, dataset: str, row: object, message: str
) -> None:
    asked = SUBTASKS[subtask]
    good = {"text": "t", **dict.fromkeys(asked.needs, "a"), "label": [] if asked.is_tuple else asked.labels[0]}
    write(tmp_path, dataset, train=[good, row], dev=[good], test=[good])
    with pytest.raises(DataError, match=r"train\.jsonl, line 2: ") as caught:
        read_directory(tmp_path, [SUBTASKS[subtask]])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [(b'{"text": "t", ', "broken JSON"), (b'{"text": "\xff"}', "not UTF-8"), (b"[" * 100_000, "broken JSON")],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    write(tmp_path, "sc/mr", dev=b"\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"dev\.jsonl, line 2: {message}"):
        read_directory(tmp_path, [SUBTASKS["sent2"]])


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory; give one in SentiEval's layout"):
        read_directory(tmp_path / "nowhere", [SUBTASKS["sent2"]])
    with pytest.raises(DataError, match=r"no data set for subtask 'sent2' .* expected at least one of sc/mr, sc/sst2"):
        read_directory(tmp_path, [SUBTASKS["sent2"]])
    write(tmp_path, "sc/mr")
    (tmp_path / "sc/mr/dev.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot read .*mr/dev\.jsonl .* add the file"):
        read_directory(tmp_path, [SUBTASKS["sent2"]])


def corpus(root: Path, *sentences: object) -> Path:
    (root / "absa_a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences))
    return root


def quad(aspect: str, opinion: str, polarity: str) -> dict[str, str]:
    return {"aspect": aspect, "opinion": opinion, "polarity": polarity, "category": "food quality"}


def test_one_annotated_sentence_serves_three_subtasks(tmp_path: Path) -> None:
    both = [
        quad("pizza", "good", "positive"),
        quad("wait", "long", "negative"),
        quad("pizza", "hot", "positive"),
    ]
    mixed = [
        quad("bar", "loud", "negative"),
        quad("bar", "cosy", "positive"),
        quad("beer", "fine", "neutral"),
    ]
    root = corpus(
        tmp_path,
        {"text": "s", "quads": both},
        {"text": "no aspect", "quads": []},
        {"text": "m", "quads": mixed},
    )
    read = read_corpus(root, [SUBTASKS[name] for name in ("uabsa", "aste", "asc")])
    assert [(e.dataset, e.text, e.gold) for e in read["uabsa"]] == [
        ("embedded_uabsa", "s", (("pizza", "positive"), ("wait", "negative"))),
        ("embedded_uabsa", "no aspect", ()),
        ("embedded_uabsa", "m", (("bar", "negative"), ("bar", "positive"), ("beer", "neutral"))),
    ]
    assert [(e.text, len(e.gold)) for e in read["aste"]] == [("s", 3), ("m", 3)]
    assert read["aste"][0].gold[0] == ("pizza", "good", "positive")
    assert [(e.text, e.fields["aspect"], e.gold) for e in read["asc"]] == [
        ("s", "pizza", "positive"),
        ("s", "wait", "negative"),
        ("m", "beer", "neutral"),
    ]


def test_a_corpus_without_rows_or_with_bad_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rows for subtask 'uabsa'; set data\.source to a directory"):
        read_corpus(tmp_path, [SUBTASKS["uabsa"]])
    with pytest.raises(DataError, match="no rows for subtask 'irony'"):
        read_corpus(tmp_path, [SUBTASKS["irony"]])
    for row, message in [
        ({"text": "t"}, "expected 'quads' as a list"),
        ({"text": "t", "quads": ["a"]}, "expected 'quads' as a list"),
        ({"text": "t", "quads": [quad("a", "b", "good")]}, "unknown polarity 'good'"),
        ({"text": "t", "quads": [quad("", "b", "positive")]}, "'aspect' must be a non-empty string"),
    ]:
        with pytest.raises(DataError, match=rf"corpus/absa_a\.jsonl, line 1: {message}"):
            read_corpus(corpus(tmp_path, row), [SUBTASKS["aste"]])


def test_the_embedded_corpus_fills_every_part_of_every_subtask() -> None:
    read = read_embedded([SUBTASKS[name] for name in EMBEDDED])
    assert tuple(read) == EMBEDDED
    pools = split_embedded(read)
    for name in EMBEDDED:
        subtask = SUBTASKS[name]
        assert len(read[name]) >= 120, name
        assert len({example.id for example in read[name]}) == len(read[name]), name
        assert {example.dataset for example in read[name]} == {f"embedded_{name}"}
        sizes = {part: len(rows) for part, rows in pools[name].items()}
        assert sizes["train"] >= 64, (name, sizes)
        assert sizes["weak"] >= 24, (name, sizes)
        assert sizes["test"] >= 32, (name, sizes)
        for part, rows in pools[name].items():
            labels = Counter(example.gold for example in rows)
            assert subtask.is_tuple or set(labels) == set(subtask.labels), (name, part)


def test_embedded_annotations_occur_in_their_sentences() -> None:
    read = read_embedded([SUBTASKS["aste"]])["aste"]
    for example in read:
        for aspect, opinion, _ in example.gold:
            assert aspect in example.text, example
            assert opinion in example.text, example


def test_the_embedded_splits_of_the_quickstart() -> None:
    splits = load_splits("embedded", EMBEDDED, train_rows=None, weak_rows=24, selection_rows=0, test_rows=None)
    assert splits.dropped == {}
    for name, parts in splits.parts.items():
        assert len(parts["weak"]) == 24, name
        assert parts["selection"] == ()


@needs_sentieval
@pytest.mark.parametrize("name", list(SUBTASKS))
def test_every_sentieval_data_set_reads(name: str) -> None:
    read = read_directory(SENTIEVAL, [SUBTASKS[name]])[name]
    for part, file in (("train", "train"), ("weak", "dev"), ("test", "test")):
        counted = Counter(example.dataset for example in read[part])
        assert set(counted) == set(SUBTASKS[name].datasets)
        for dataset in SUBTASKS[name].datasets:
            lines = (SENTIEVAL / SUBTASKS[name].group.lower() / dataset / f"{file}.jsonl").read_bytes()
            assert counted[dataset] == lines.count(b"\n"), (dataset, part)


@needs_sentieval
@pytest.mark.parametrize("name", list(SUBTASKS))
def test_the_catalogue_has_the_labels_and_categories_of_sentieval(name: str) -> None:
    subtask = SUBTASKS[name]
    golds = [example.gold for example in read_directory(SENTIEVAL, [subtask])[name]["train"]]
    if subtask.is_tuple:
        assert {item[-1] for gold in golds for item in gold} == set(POLARITIES)
    else:
        assert set(golds) == set(subtask.labels)
    if "category" in subtask.tuple_fields:
        named = subtask.instruction.partition("Categories: ")[2].rstrip(".").split(", ")
        assert len(named) == 13
        assert {item[0] for gold in golds for item in gold} <= set(named)


@needs_sentieval
def test_sentieval_splits_without_overlap() -> None:
    """Documents have 96 train and 24 dev rows, fewer than the others."""
    splits = load_splits(str(SENTIEVAL), list(SUBTASKS), train_rows=90, weak_rows=16, selection_rows=8, test_rows=50)
    for name, parts in splits.parts.items():
        sizes = {part: len(rows) for part, rows in parts.items()}
        assert sizes == {"train": 90, "weak": 16, "selection": 8, "test": 50}, name
    assert splits.dropped["train rows whose text is in a weak part"] > 0
