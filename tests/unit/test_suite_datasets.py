"""Readers: SentiEval's layout on disk, and the embedded corpus."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from memmcl.errors import DataError
from memmcl.suite.datasets import read_directory
from memmcl.suite.embedded import read_corpus, read_embedded
from memmcl.suite.examples import Example
from memmcl.suite.splits import load_splits, split_embedded
from memmcl.suite.subtasks import SUBTASKS

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
    ],
)
def test_a_bad_row_is_named_with_file_and_line(
    tmp_path: Path, subtask: str, dataset: str, row: object, message: str
) -> None:
    good = {"text": "t", "aspect": "a", "label": [] if SUBTASKS[subtask].is_tuple else "positive"}
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
    read = read_embedded(list(SUBTASKS.values()))
    assert list(read) == list(SUBTASKS)
    pools = split_embedded(read)
    for name, subtask in SUBTASKS.items():
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
    splits = load_splits("embedded", list(SUBTASKS), train_rows=None, weak_rows=24, selection_rows=0, test_rows=None)
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
        for dataset in SUBTASKS[name].datasets:
            lines = (SENTIEVAL / SUBTASKS[name].group.lower() / dataset / f"{file}.jsonl").read_bytes()
            assert counted[dataset] == lines.count(b"\n"), (dataset, part)


@needs_sentieval
def test_sentieval_splits_without_overlap() -> None:
    splits = load_splits(str(SENTIEVAL), list(SUBTASKS), train_rows=100, weak_rows=48, selection_rows=16, test_rows=50)
    for parts in splits.parts.values():
        assert {part: len(rows) for part, rows in parts.items()} == {
            "train": 100,
            "weak": 48,
            "selection": 16,
            "test": 50,
        }
    assert splits.dropped["train rows whose text is in a weak part"] > 0
