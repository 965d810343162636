"""A user's file of weak rows: what is scored together, whom it is for, and what cannot be used."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import prompter_of, tokenizer_of

from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example, from_table, to_table
from memmcl.suite.subtasks import PAIRS, SUBTASKS, Subtask
from memmcl.suite.weak import WeakRows, read_weak_rows

TICKETS = Subtask(
    name="tickets",
    group="MAST",
    title="",
    instruction="How urgent?",
    labels=("now", "later"),
    needs=("place",),
    metric="accuracy",
    datasets=("tickets",),
)
ROWS: list[dict[str, Any]] = [
    {"subtask": "sent2", "text": "Fine soup.", "label": "positive"},
    {"subtask": "sent2", "text": "Cold soup.", "label": "negative", "expert": "mine"},
    {"subtask": "uabsa", "text": "The soup is fine.", "label": [["soup", "positive"]]},
    {"subtask": "tickets", "text": "It burns.", "label": "now", "place": "attic"},
    {"prompt": "1 + 1 =", "answer": " 2"},
    {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "answer": "none", "expert": "sums"},
]


def read(path: Path, rows: Sequence[Mapping[str, Any]]) -> list[WeakRows]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_weak_rows(str(path), catalogue={**SUBTASKS, "tickets": TICKETS}, experts=["mine", "sums", "uabsa"])


def test_rows_of_one_question_for_one_expert_are_scored_together(tmp_path: Path) -> None:
    found = read(tmp_path / "weak.jsonl", ROWS)
    assert [(group.name, group.subtask.name, group.expert, len(group.rows)) for group in found] == [
        ("pairs", "pairs", None, 1),
        ("pairs:sums", "pairs", "sums", 1),
        ("sent2", "sent2", None, 1),
        ("sent2:mine", "sent2", "mine", 1),
        ("tickets", "tickets", None, 1),
        ("uabsa", "uabsa", "uabsa", 1),  # an expert that is called like the subtask
    ]
    assert found[-1].rows == (Example.create("uabsa", "The soup is fine.", [("soup", "positive")]),)
    assert found[4].rows[0].fields == {"place": "attic"}
    assert found[0].rows == (Example.create("pairs", "1 + 1 =", " 2"),)
    assert from_table(to_table(found[0].rows)) == list(found[0].rows)


def test_neither_the_order_of_rows_nor_the_format_matters(tmp_path: Path) -> None:
    rows = [{"subtask": "sent2", "text": f"Soup {number}.", "label": "positive", "expert": ""} for number in range(9)]
    for row in rows:
        del row["expert"]
    first = read(tmp_path / "weak.jsonl", rows)
    assert read(tmp_path / "weak.jsonl", rows[::-1]) == first
    with (tmp_path / "weak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["subtask", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    assert read_weak_rows(str(tmp_path / "weak.csv"), catalogue=SUBTASKS, experts=["a"]) == first


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "x", "label": "positive"}, "line 7: expected a subtask, or a prompt and its answer"),
        ({"prompt": "x"}, "expected a subtask, or a prompt and its answer"),
        ({"subtask": "sent9", "text": "x", "label": "y"}, "unknown subtask 'sent9'; known ones: doc2, doc5"),
        ({"subtask": "sent2", "text": "x", "label": "good"}, "unknown label 'good' for subtask 'sent2'"),
        ({"subtask": "tickets", "text": "x", "label": "now"}, "no column 'place'"),
        ({"subtask": "sent2", "text": "x", "label": "positive", "expert": "b"}, "unknown expert 'b'; the experts are"),
        ({"prompt": " ", "answer": "x"}, "'prompt' must be a non-empty string"),
        ({"prompt": "x", "answer": ""}, "'answer' must be a non-empty string"),
        ({"prompt": "x", "answer": 4}, "'answer' must be a non-empty string, got 4"),
        (ROWS[0], "the same question and answer as"),
        ({"prompt": "1 + 1 =", "answer": "3"}, "with another answer; keep the right one"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match="rows that cannot be used: 1, first ") as caught:
        read(tmp_path / "weak.jsonl", [*ROWS, row])
    assert expected in str(caught.value)


def test_no_rows_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"weak\.jsonl has no rows; expected rows of subtasks, or pairs"):
        read(tmp_path / "weak.jsonl", [])
    with pytest.raises(DataError, match="no data file at"):
        read_weak_rows(str(tmp_path / "none.jsonl"), catalogue=SUBTASKS, experts=[])


@pytest.mark.parametrize("base", ["tiny_base", "plain_base"])
def test_a_pair_is_shown_to_the_last_character(base: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(base)
    prompter, tokenizer = prompter_of(directory, max_tokens=24), tokenizer_of(directory)
    prompt, answer = "<|im_start|>user\nThe soup?<|im_end|>\n ", "  positive<|im_start|>"
    ids = prompter.prompt(PAIRS, Example.create("pairs", prompt, answer))
    assert list(ids) == tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[0] == 1  # the control token, as it is
    said = prompter.answer(answer, PAIRS)
    assert list(said) == [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens is 24, but the prompt that begins 'soup soup"):
        prompter.prompt(PAIRS, Example.create("pairs", "soup " * 30, answer))
