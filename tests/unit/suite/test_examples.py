"""Examples: identity, answers, content keys, the subtask table, and the Parquet round trip."""

import ast
import io
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memmcl import seeds
from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example, format_tuples, from_table, normalised, to_table
from memmcl.suite.metrics import DATASETS, subtask_of
from memmcl.suite.subtasks import GROUPS, SUBTASKS, get_subtask


def test_id_is_the_digest_of_the_question_alone() -> None:
    example = Example.create("asc_rest14", "Good pizza .", "positive", {"b": "2", "aspect": "pizza"})
    assert example.id == seeds.digest(["asc_rest14", "Good pizza .", [["aspect", "pizza"], ["b", "2"]]])[:16]
    assert replace(example, gold="negative").id == example.id
    others = [
        Example.create("asc_lap14", "Good pizza .", "positive", {"b": "2", "aspect": "pizza"}),
        Example.create("asc_rest14", "Good pizza.", "positive", {"b": "2", "aspect": "pizza"}),
        Example.create("asc_rest14", "Good pizza .", "positive", {"b": "2", "aspect": "pizzas"}),
    ]
    assert len({example.id, *(other.id for other in others)}) == 4


def test_examples_are_hashable_and_frozen_whatever_mapping_they_are_made_from() -> None:
    fields = {"aspect": "pizza"}
    example = Example.create("d", "t", [["pizza", "positive"]], fields)
    fields["aspect"] = "wait"
    assert example.fields == {"aspect": "pizza"}
    assert example.fields["aspect"] == "pizza"
    assert example.fields.get("target") is None
    assert example.gold == (("pizza", "positive"),)
    assert {example} == {Example(example.id, "d", "t", example.gold, {"aspect": "pizza"})}
    with pytest.raises(FrozenInstanceError):
        example.text = "u"  # type: ignore[misc]
    with pytest.raises(TypeError):
        example.fields["aspect"] = "wait"  # type: ignore[index]
    with pytest.raises(KeyError):
        example.fields["target"]


def test_answers_are_sentieval_texts() -> None:
    assert Example.create("d", "t", "very positive").answer == "very positive"
    assert Example.create("d", "t", []).answer == "[]"
    pairs = (("pizza", "positive"), ("wait", "negative"))
    assert Example.create("d", "t", pairs).answer == "[('pizza', 'positive'), ('wait', 'negative')]"
    awkward = (('chef\'s "special" \\ menu', "positive"), ("crème", "neutral"))
    assert ast.literal_eval(format_tuples(awkward)) == list(awkward)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Did n't LIKE it -- 10/10 !", "didntlikeit1010"), ("Crème brûlée", "crèmebrûlée"), ("😒 !!", "😒 !!"), ("", "")],
)
def test_normalised(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_table_round_trip_is_lossless() -> None:
    examples = [
        Example.create("d", 'quotes " and\nlines \u2028 \t 😒', "label"),
        Example.create("d", "none", []),
        Example.create("e", "tuples", [("a", "b", "positive"), ("c'", 'd"', "negative")], {"aspect": "é", "x": ""}),
        Example("0" * 16, "e", "an id of its own", "[]", {}),
    ]
    assert from_table(to_table(examples)) == examples
    assert from_table(to_table([])) == []
    assert pq.read_schema(io.BytesIO(to_table([]))).names == ["id", "dataset", "text", "gold", "fields"]


def test_bytes_that_are_no_table_are_refused() -> None:
    other = io.BytesIO()
    pq.write_table(pa.table({"id": ["1"], "text": ["t"]}), other)
    broken = io.BytesIO()
    columns = {"id": ["1"], "dataset": ["d"], "text": ["t"], "gold": ["{"], "fields": ["{}"]}
    pq.write_table(pa.table(columns), broken)
    whole = to_table([Example.create("d", "t", "label")])
    for data in (b"", b"PAR1", whole[: len(whole) // 2], other.getvalue(), broken.getvalue()):
        with pytest.raises(DataError, match="expected a Parquet table of examples"):
            from_table(data)


def test_the_table_of_subtasks_is_consistent() -> None:
    for name, subtask in SUBTASKS.items():
        assert subtask.name == name
        assert subtask.group in GROUPS
        assert subtask.is_tuple == (subtask.metric == "tuple_f1") == (not subtask.labels)
        assert (subtask.metric == "label_f1") == (subtask.positive_label is not None)
        # asqp also names the 13 categories that SentiEval knows.
        assert len(subtask.instruction.split()) <= (50 if name == "asqp" else 25)
        for label in subtask.labels:
            assert label in subtask.instruction
        for dataset in subtask.datasets:
            assert DATASETS[dataset] is subtask
        assert subtask_of(f"embedded_{name}").metric == subtask.metric


def test_an_unknown_subtask_lists_the_known_ones() -> None:
    assert get_subtask("aste") is SUBTASKS["aste"]
    with pytest.raises(
        ConfigError, match=f"unknown subtask 'sentiment'; known ones: {', '.join(SUBTASKS)}; one of your own"
    ):
        get_subtask("sentiment")


def test_the_suite_loads_neither_torch_nor_pyarrow() -> None:
    modules = ", ".join(
        f"memmcl.suite.{name}"
        for name in ("subtasks", "examples", "sources", "embedded", "parsing", "metrics", "splits")
    )
    heavy = "{'torch', 'transformers', 'pyarrow', 'sklearn', 'prefect', 'ray'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
