"""One raw row: the example that it holds, or the fault that it is."""

import json
import math

import pytest

from memmcl.suite.examples import Example
from memmcl.suite.faults import KEPT, KINDS, Fault, Faults
from memmcl.suite.parsing import read_any_list
from memmcl.suite.rows import PLAIN, Row, RowError, Shape, example_of
from memmcl.suite.subtasks import SUBTASKS


def read(subtask: str, shape: Shape = PLAIN, *, labelled: bool = True, **values: object) -> Example:
    return example_of(Row("rows, line 1", values), SUBTASKS[subtask], "d", shape, labelled=labelled)


def refused(subtask: str, row: dict[str, object], shape: Shape = PLAIN) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        read(subtask, shape, **row)
    assert caught.value.kind in KINDS
    assert "\n" not in caught.value.message
    caught.value.message.encode()
    return caught.value.kind, caught.value.message


def test_fields_and_tuples_are_read() -> None:
    asc = read("asc", text="t", aspect="pizza", other="left out", label="neutral")
    assert asc == Example.create("d", "t", "neutral", {"aspect": "pizza"})
    assert read("aste", text="t", label=[["a", "b", "positive"]]).gold == (("a", "b", "positive"),)
    assert read("aste", text="t", label=[]).gold == ()
    quads = [["food quality", "NULL", "good", "positive"], ["food prices", "soup", "NULL", "negative"]]
    assert read("asqp", text="t", label=quads).gold == tuple(tuple(quad) for quad in quads)
    compared = read("compsent", text="t", object_a="A", object_b="B", label="better")
    turned = read("compsent", text="t", object_a="B", object_b="A", label="better")
    assert dict(compared.fields) == {"object_a": "A", "object_b": "B"}
    assert compared.id != turned.id


@pytest.mark.parametrize(
    ("subtask", "row", "kind", "message"),
    [
        (
            "sent2",
            {"text": "t", "label": "good"},
            "unknown label",
            "unknown label 'good' for subtask 'sent2'; expected",
        ),
        ("sent2", {"text": "t", "label": "Positive"}, "unknown label", "only: write 'positive'"),
        ("sent2", {"text": "t", "label": " positive"}, "unknown label", "only: write 'positive'"),
        ("doc5", {"text": "t", "label": "very  positive"}, "unknown label", "write 'very positive'"),
        ("doc5", {"text": "t", "label": "very_positive"}, "unknown label", "write 'very positive'"),
        ("hate", {"text": "t", "label": "non_hate"}, "unknown label", "write 'non-hate'"),
        ("sent2", {"text": "t", "label": 1}, "unknown label", "unknown label '1'"),
        ("sent2", {"text": "t", "label": ["positive"]}, "unknown label", "unknown label"),
        ("sent2", {"text": "t", "label": "NA"}, "unknown label", "unknown label 'NA'"),
        ("sent2", {"text": "t", "label": None}, "missing value", "'label' has no value"),
        ("sent2", {"text": "t", "label": math.nan}, "missing value", "'label' has no value"),
        ("sent2", {"text": "t", "label": ""}, "missing value", "'label' is empty"),
        ("sent2", {"text": "t"}, "missing column", "no column 'label'"),
        ("sent2", {"label": "positive"}, "missing column", "no column 'text'"),
        ("sent2", {"text": " \n", "label": "positive"}, "empty text", "'text' must be a non-empty string"),
        ("sent2", {"text": "", "label": "positive"}, "empty text", "'text' must be a non-empty string, got ''"),
        ("sent2", {"text": 3, "label": "positive"}, "missing value", "'text' must be a text, got 3"),
        ("sent2", {"text": None, "label": "positive"}, "missing value", "'text' has no value"),
        ("sent2", {"text": "half \ud83d", "label": "positive"}, "encoding", "half a surrogate pair"),
        ("sent2", {"text": "a\0b", "label": "positive"}, "encoding", "holds a NUL"),
        ("sent2", {"text": "x" * 20_001, "label": "positive"}, "long text", "20001 characters, more than the 20000"),
        ("asc", {"text": "t", "label": "positive"}, "missing column", "no column 'aspect'"),
        ("asc", {"text": "t", "aspect": "", "label": "positive"}, "missing value", "'aspect' must be a non-empty"),
        ("stance", {"text": "t", "target": None, "label": "none"}, "missing value", "'target' has no value"),
        ("uabsa", {"text": "t", "label": "positive"}, "broken tuples", "expected a list of (aspect, polarity)"),
        ("uabsa", {"text": "t", "label": "[('a', 'positive')"}, "broken tuples", "expected a list of"),
        ("uabsa", {"text": "t", "label": "__import__('os')"}, "broken tuples", "expected a list of"),
        ("uabsa", {"text": "t", "label": {"a": "positive"}}, "broken tuples", "expected a list of"),
        ("uabsa", {"text": "t", "label": [["a", "b", "positive"]]}, "tuple arity", "expected 2 strings"),
        ("uabsa", {"text": "t", "label": ["ab"]}, "tuple arity", "expected 2 strings"),
        ("uabsa", {"text": "t", "label": [["a", None]]}, "broken tuples", "takes non-empty strings only"),
        ("uabsa", {"text": "t", "label": [["a", "good"]]}, "unknown polarity", "unknown polarity 'good'"),
        ("uabsa", {"text": "t", "label": [["\udc00", "positive"]]}, "encoding", "half a surrogate pair"),
        ("aste", {"text": "t", "label": [["a", "positive"]]}, "tuple arity", "expected 3 strings"),
        ("asqp", {"text": "t", "label": [["c", "", "o", "positive"]]}, "broken tuples", "non-empty strings only"),
        ("asqp", {"text": "t", "label": [["c", "a", "o", "NULL"]]}, "unknown polarity", "unknown polarity 'NULL'"),
    ],
)
def test_a_row_that_cannot_be_used_is_of_a_kind(subtask: str, row: dict[str, object], kind: str, message: str) -> None:
    found, said = refused(subtask, row)
    assert found == kind
    assert message in said


@pytest.mark.parametrize("word", ["NA", "N/A", "NaN", "nan", "null", "NULL", "None", "nil", " na "])
def test_a_word_for_no_value_is_one_only_when_it_stands_alone(word: str) -> None:
    assert refused("sent2", {"text": word, "label": "positive"})[0] == "missing value"
    assert refused("asc", {"text": "t", "aspect": word, "label": "positive"})[0] == "missing value"
    assert read("sent2", text=f"{word} is a word", label="positive").text == f"{word} is a word"


def test_none_is_a_label_where_the_subtask_says_so() -> None:
    assert read("stance", text="t", target="x", label="none").gold == "none"
    assert refused("stance", {"text": "t", "target": "x", "label": "None"})[1].endswith("write 'none'")


def test_columns_and_labels_are_mapped() -> None:
    shape = Shape(
        columns={"text": "review", "label": "stars", "aspect": "part"}, labels={"5": "positive", "true": "neutral"}
    )
    assert read("asc", shape, review="r", part="p", stars=5) == Example.create("d", "r", "positive", {"aspect": "p"})
    assert read("asc", shape, review="r", part="p", stars="5").gold == "positive"
    assert read("asc", shape, review="r", part="p", stars="negative").gold == "negative"
    assert read("asc", shape, review="r", part="p", stars=True).gold == "neutral"
    assert refused("asc", {"text": "r", "part": "p", "stars": 5}, shape) == (
        "missing column",
        "no column 'review'; every row needs it: add it, or remove the row",
    )
    assert shape.needed(SUBTASKS["asc"]) == ("review", "part", "stars")


def test_tuples_come_as_python_as_json_or_in_columns() -> None:
    gold = (("it's", "positive"), ("b", "negative"))
    for text in (
        repr(list(gold)),
        json.dumps(gold),
        f" {list(gold)!r}\n",
        '[["it\\u0027s", "positive"], ["b", "negative"]]',
    ):
        assert read("uabsa", text="t", label=text).gold == gold, text
    flat = Shape(columns={"aspect": "what"}, labels={"POS": "positive"})
    assert flat.needed(SUBTASKS["uabsa"]) == ("text", "what", "polarity")
    assert read("uabsa", flat, text="t", what="a", polarity="POS").gold == (("a", "positive"),)
    assert read("uabsa", flat, text="t", what=["a", "b"], polarity=["POS", "neutral"]).gold == (
        ("a", "positive"),
        ("b", "neutral"),
    )
    assert read("uabsa", flat, text="t", what=[], polarity=[]).gold == ()
    assert refused("uabsa", {"text": "t", "what": ["a"], "polarity": []}, flat)[0] == "broken tuples"
    assert refused("uabsa", {"text": "t", "what": ["a"], "polarity": "POS"}, flat)[0] == "broken tuples"


def test_a_row_without_a_label_is_read_where_none_is_needed() -> None:
    assert read("sent2", labelled=False, text="t").gold == ""
    assert read("sent2", labelled=False, text="t", label="positive").gold == ""
    assert read("uabsa", labelled=False, text="t", label=None).gold == ()


def test_a_list_is_read_and_never_evaluated() -> None:
    assert read_any_list("[1, 'a']") == [1, "a"]
    assert read_any_list('["\\ud83d\\ude00"]') == ["😀"]
    for text in ("(1, 2)", "{}", "[" * 10_000, "[open('x')]", "", "nothing", "[1"):
        assert read_any_list(text) is None, text[:20]


def test_faults_are_counted_beyond_those_that_are_kept() -> None:
    faults = Faults()
    for number in range(KEPT + 5):
        faults.add(Fault(f"f, line {number}", "encoding", "not UTF-8"))
        faults.warn(Fault("f, line 1", "repeated row", "again"))
    faults.add(Fault("f", "broken line", "x"))
    assert len(faults) == KEPT + 6
    assert faults.counts == {"encoding": KEPT + 5, "broken line": 1}
    assert faults.warning_counts == {"repeated row": KEPT + 5}
    assert len(faults.first) == len(faults.warnings) == KEPT
    assert str(faults.first[3]) == "f, line 3: not UTF-8"
