"""Unlabelled texts: read, dealt, shown in a user's own template, and rows of every subtask with a forced answer."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import corpus, tokenizer_of

from memmcl.errors import ConfigError, DataError
from memmcl.experts.forced import CATEGORIES, LEAST, OWN_SHARES, TemplatePrompter, forced_rows, read_texts, split_texts
from memmcl.suite.examples import Example
from memmcl.suite.faults import Faults
from memmcl.suite.parsing import read_list
from memmcl.suite.rows import Row, example_of
from memmcl.suite.subtasks import POLARITIES, SUBTASKS, Subtask

TEXTS = [example.text for example in corpus("sent2", 40)]
ODD = ["ok", "😀!!", "¿?", "x" * 500, "今天天气很好", "It's the 'best' (so far) \\ \"ever\"", "a b c", "well-made"]
OTHERS = ("asc", "uabsa", "emotion")


@pytest.mark.parametrize("subtask", SUBTASKS.values(), ids=SUBTASKS)
@pytest.mark.parametrize("texts", [TEXTS, ODD], ids=["sentences", "odd"])
def test_a_forced_row_reads_like_a_gold_row(subtask: Subtask, texts: list[str]) -> None:
    """The reader of labelled rows takes it as it is, and the strict reading of its answer gives its gold back."""
    rows = forced_rows(subtask, texts, seed=0)
    assert [row.text for row in rows] == texts
    for row in rows:
        label = row.gold if isinstance(row.gold, str) else [list(item) for item in row.gold]
        assert example_of(Row("here", {"text": row.text, **row.fields, "label": label}), subtask, row.dataset) == row
        assert set(row.fields) == set(subtask.needs)
        assert all(value in row.text for value in row.fields.values())
        if subtask.is_tuple:
            assert read_list(row.answer) == list(row.gold)
            check_tuples(subtask, row)


def check_tuples(subtask: Subtask, row: Example) -> None:
    assert 1 <= len(row.gold) == len(set(row.gold)) <= 2
    for item in row.gold:
        named = dict(zip(subtask.tuple_fields, item, strict=True))
        assert named.pop("polarity") in POLARITIES
        assert named.pop("category", CATEGORIES[0]) in CATEGORIES
        assert all(value in row.text and 0 < len(value) <= 61 for value in named.values())


def test_the_categories_are_those_that_the_model_is_told() -> None:
    told = re.search(r"Categories: (.*)\.$", SUBTASKS["asqp"].instruction)
    assert told is not None
    assert told[1].split(", ") == list(CATEGORIES)


def test_a_row_depends_on_nothing_but_its_text_and_the_seed() -> None:
    for subtask in SUBTASKS.values():
        rows = forced_rows(subtask, TEXTS, seed=3)
        assert forced_rows(subtask, TEXTS[::-1], seed=3) == rows[::-1]
        assert forced_rows(subtask, TEXTS[7:8], seed=3) == rows[7:8]
        assert forced_rows(subtask, TEXTS, seed=4) != rows


def test_forced_answers_know_nothing_of_the_text() -> None:
    """Each answer comes about equally often, whatever the gold labels are."""
    texts = [f"note {number}" for number in range(600)]
    for subtask in SUBTASKS.values():
        if not subtask.is_tuple:
            counts = Counter(str(row.gold) for row in forced_rows(subtask, texts, seed=0))
            assert set(counts) == set(subtask.labels)
            assert max(counts.values()) < 1.5 * 600 / len(subtask.labels)
    tuples = list(chain(*(row.gold for row in forced_rows(SUBTASKS["asqp"], texts, seed=0))))
    assert {item[0] for item in tuples} == set(CATEGORIES)
    assert {item[3] for item in tuples} == set(POLARITIES)
    assert 840 < len(tuples) < 960


def test_long_words_come_first_and_none_twice_before_all_others() -> None:
    (row,) = forced_rows(SUBTASKS["compsent"], ["The choir is on at the ferry"], seed=0)
    assert set(row.fields.values()) == {"choir", "ferry"}


# --- dealing


def test_texts_are_dealt_once_each_and_whatever_their_order() -> None:
    texts = [f"text number {number}" for number in range(400)]
    dealt = split_texts(texts, OTHERS, rows=32, seed=0)
    parts = [dealt.own, dealt.held_out, *dealt.others.values()]
    assert [len(part) for part in parts] == [OWN_SHARES * 32, 32, 32, 32, 32]
    assert len(set(chain(*parts))) == sum(map(len, parts))
    assert split_texts(texts[::-1], OTHERS, rows=32, seed=0) == dealt
    assert split_texts(texts, OTHERS, rows=32, seed=1) != dealt


def test_fewer_texts_make_smaller_shares() -> None:
    dealt = split_texts(TEXTS, OTHERS, rows=32, seed=0)
    assert {len(part) for part in dealt.others.values()} == {5}
    assert (len(dealt.own), len(dealt.held_out)) == (20, 5)


@pytest.mark.parametrize(("others", "rows"), [(OTHERS, 32), (("asc",), 32), (tuple(SUBTASKS), 32), (OTHERS, 1)])
def test_the_error_names_the_smallest_number_that_is_enough(others: tuple[str, ...], rows: int) -> None:
    texts = [f"text number {number}" for number in range(200)]
    with pytest.raises(DataError, match="got 5; add texts, or name fewer subtasks") as caught:
        split_texts(texts[:5], others, rows, seed=0)
    needed = int(re.findall(r"at least (\d+) distinct texts", str(caught.value))[0])
    assert f"against {len(others)} other" in str(caught.value)
    dealt = split_texts(texts[:needed], others, rows, seed=0)
    assert {len(part) for part in dealt.others.values()} == {min(LEAST, rows)}
    with pytest.raises(DataError):
        split_texts(texts[: needed - 1], others, rows, seed=0)


# --- reading


def test_plain_text_is_a_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffOne, two.\r\n\n  Three: [4] \nONE two\nn/a\nlast".encode() + b"\n\xff\xfe\n")
    faults = Faults()
    assert read_texts(str(path), faults=faults) == ["One, two.", "Three: [4]", "last"]
    assert faults.counts == {"missing value": 1, "encoding": 1}
    assert [fault.place for fault in faults.first] == [f"{path}, line 5", f"{path}, line 7"]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_files_with_a_text_column(tmp_path: Path, ending: str) -> None:
    texts = ["One, two.", "Three\nlines of\ntext", "One, two!"]
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps({"label": 3, "text": text}) + "\n" for text in texts))
    elif ending == "csv":
        path.write_text("label,text\n" + "".join(f'x,"{text}"\n' for text in texts))
    else:
        pq.write_table(pa.table({"text": texts, "label": [1, 2, 3]}), path)
    assert read_texts(str(path)) == texts[:2], "the third is the first again"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.txt", None, "there is no .*none.txt; correct the path"),
        ("none.csv", None, "no data file at .*none.csv"),
        ("a.txt", "\n \n", r"expected texts in .*a.txt, one a line or a column 'text'; got none \(it is empty\)"),
        ("a.csv", "words\nfine\n", r"the first of 1 faults: .*a.csv, line 2: no column 'text'"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, name: str, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected):
        read_texts(str(tmp_path / name))


# --- a user's own template


def test_a_template_is_shown_to_the_last_character(tiny_base: Path) -> None:
    tokenizer = tokenizer_of(tiny_base)
    template = "<|im_start|>user\nHow is this? {text} {label} {{}}\n<|im_end|>\n<|im_start|>assistant\n"
    prompts = TemplatePrompter(tokenizer, 200, template).prompts(TEXTS[:3])
    shown = [tokenizer.decode(prompt) for prompt in prompts]
    assert shown == [template.replace("{text}", text) for text in TEXTS[:3]]
    assert prompts[0][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_text_that_is_long_is_cut_and_the_template_is_not(tiny_base: Path) -> None:
    tokenizer = tokenizer_of(tiny_base)
    (prompt,) = TemplatePrompter(tokenizer, 40, "Text: {text}\nAnswer:").prompts([" ".join(TEXTS)])
    assert 35 < len(prompt) <= 40
    assert tokenizer.decode(prompt).startswith(f"Text: {TEXTS[0][:20]}")
    assert tokenizer.decode(prompt).endswith("\nAnswer:")


def test_control_tokens_of_a_text_end_no_turn(tiny_base: Path) -> None:
    tokenizer = tokenizer_of(tiny_base)
    (prompt,) = TemplatePrompter(tokenizer, 60, "{text}<|im_end|>").prompts(["Fine.<|im_end|> {text}"])
    assert list(prompt).count(tokenizer.eos_token_id) == 1
    assert prompt[-1] == tokenizer.eos_token_id


def test_a_template_without_room(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"the template alone takes \d+ tokens, and data\.max_prompt_tokens is 16"):
        TemplatePrompter(tokenizer_of(tiny_base), 16, "word " * 30 + "{text}")
