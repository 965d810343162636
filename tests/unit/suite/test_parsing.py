"""Parsing: tolerant where the meaning is clear, never evaluating, never crashing."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.suite.parsing import (
    MAX_CHARACTERS,
    MAX_LITERAL,
    Parsed,
    match_label,
    parse_tuples,
    read_answers,
    read_list,
    read_literal,
)
from memmcl.suite.subtasks import SUBTASKS

POLARITY = ("positive", "negative", "neutral")
IRONY = ("irony", "non_irony")
FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
HATE = ("hate", "non-hate")


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ("positive", POLARITY, "positive"),
        ("  Positive.\n", POLARITY, "positive"),
        ("**NEGATIVE**", POLARITY, "negative"),
        ("positive, not negative", POLARITY, "positive"),
        ("positive\n\nText: another one\nAnswer: negative", POLARITY, "positive"),
        ("The sentiment is neutral.", POLARITY, "neutral"),
        ("The sentiment is positive or negative.", POLARITY, None),
        ("It is not positive", POLARITY, None),
        ("positively", POLARITY, None),
        ("pos", POLARITY, "positive"),
        ("ne", POLARITY, None),
        ("neg", POLARITY, "negative"),
        ("p", POLARITY, None),
        ("", POLARITY, None),
        (" ?! ", POLARITY, None),
        ("mixed", POLARITY, None),
        ("irony", IRONY, "irony"),
        ("non_irony", IRONY, "non_irony"),
        ("Non-Irony", IRONY, "non_irony"),
        ("I would call it non irony.", IRONY, "non_irony"),
        ("not irony", IRONY, None),
        ("very positive", FIVE, "very positive"),
        ("I think: very positive!", FIVE, "very positive"),
        ("I think: positive!", FIVE, "positive"),
        ("very", FIVE, None),
        ("very pos", FIVE, "very positive"),
        ("It is non-hate", HATE, "non-hate"),
        ("It is hate", HATE, "hate"),
        ("sad but calm, I think", ("sad", "sad but calm"), "sad but calm"),
        ("anything", (), None),
        ("It is not very positive", FIVE, None),
        ("It isn't positive", POLARITY, None),
        ("There is no irony here", IRONY, None),
        ("Not bad, positive", POLARITY, "positive"),
        ("+", ("+", "-"), "+"),
        ("-", ("+", "-"), "-"),
        ("", ("+", "-"), None),
        ("?", ("+", "-"), None),
        (" GUT ", ("gut", "schlecht"), "gut"),
    ],
)
def test_match_label(text: str, labels: tuple[str, ...], expected: str | None) -> None:
    assert match_label(text, labels) == expected


AB = (("a", "positive"),)
ABC = (("a", "positive"), ("c", "negative"))


@pytest.mark.parametrize(
    ("text", "tuples"),
    [
        ("[('a', 'positive'), ('c', 'negative')]", ABC),
        ('[["a", "positive"], ["c", "negative"]]', ABC),
        ("[['a', 'positive'], ('c', 'negative'), ('c', 'negative')]", ABC),
        ("The answer is: [('a', 'positive')] because [it] is so.", AB),
        ("see [1]: [('a', 'positive')]", AB),
        ("[list]: [('a', 'positive')]", AB),
        ("```python\n[('a', 'positive')]\n```", AB),
        ("[('a', 'positive'), ('c', 'negat", AB),
        ("[('a', 'positive')", AB),
        ("[('a', 'positive'),", AB),
        ('[["a", "positive"], ["b", null]]', AB),
        ("[('a', 'positive'), ('c', 'd', 'negative'), 'x', ('y', 3)]", AB),
        ("[]", ()),
        ("There are none: []", ()),
        ("[('[a]', 'positive')] trailing ]", (("[a]", "positive"),)),
        (r"[('it\'s \d', 'positive')]", (("it's \\d", "positive"),)),
        ("[(\"chef's\", 'positive')]", (("chef's", "positive"),)),
        ("[(“a”, “positive”), (\u2018c’, \u2018negative’)]", ABC),
        ("Sure: [(“chef's”, “positive”)].", (("chef's", "positive"),)),
        ("[('chef’s', 'positive')]", (("chef’s", "positive"),)),
        ('```json\n[["a", "positive"]]\n```\nThat is all.', AB),
    ],
)
def test_parse_tuples_reads(text: str, tuples: tuple[tuple[str, ...], ...]) -> None:
    assert parse_tuples(text, 2) == Parsed(tuples, rejected=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none",
        "('a', 'positive')",
        "{'a': 'positive'}",
        "[",
        "[('a', 'posit",
        "[('chef's', 'positive')]",
        "[('a', 'b', 'positive')]",
        "['a', 'positive']",
        "[[('a', 'positive')]]",
        "[print('a')]",
        "[('a', 'posi' + 'tive')]",
        "__import__('os')",
    ],
)
def test_parse_tuples_rejects(text: str) -> None:
    assert parse_tuples(text, 2) == Parsed((), rejected=True)


@pytest.mark.parametrize("length", [100, 198, 1_000, 9_999, 19_000, MAX_CHARACTERS, 1_000_000])
@pytest.mark.parametrize(
    "unit", ["[", "(", "{", "-", "~", "not ", "1+", "1,", "[(", "{1:", "'", '"""', "\\", "\x00", "f'{", "[[],", "1 if "]
)
def test_hostile_texts_neither_crash_nor_yield_tuples(unit: str, length: int) -> None:
    text = (unit * length)[:length]
    for hostile in (text, text + "1", "[" + text, "[" + text + "]" * text.count("["), "[1" + text + "1]"):
        assert parse_tuples(hostile, 2).tuples == ()
        value = read_list(hostile)
        assert value is None or isinstance(value, list)
        assert match_label(hostile, POLARITY) is None


def test_read_list_is_strict() -> None:
    assert read_list("[('a', 'b')]") == [("a", "b")]
    assert read_list("  []") == []
    for text in ("('a', 'b')", "[('a', 'b')", "x [('a', 'b')]", "[('a', 'b')] x", "[a]", "", "[null]", "list()"):
        assert read_list(text) is None
    assert read_list("[" + "1," * MAX_CHARACTERS + "]") == [1] * MAX_CHARACTERS
    assert read_list("[" + "1," * (MAX_LITERAL // 2) + "]") is None
    assert read_literal("('a', 'b')") == ("a", "b")


FIELDS = ("aspect", "polarity")


@pytest.mark.parametrize(
    ("text", "tuples"),
    [
        ('[{"aspect": "a", "polarity": "positive"}]', AB),
        ('[{"sentiment": "positive", "aspect": "a"}, {"aspect": "c", "polarity": "negative", "why": null}]', ABC),
        ('{"aspects": [{"aspect": "a", "sentiment": "positive"}]}', AB),
        ("[{'aspect': 'a', 'polarity': 'positive'}, {'aspect': 'b'}, {'aspect': 'b', 'polarity': 3}]", AB),
        ("[{“aspect”: “a”, “polarity”: “positive”}]", AB),
        ('[{"aspect": "a", "polarity": "positive"}, {"aspect": "c", "pol', AB),
    ],
)
def test_objects_that_name_all_fields_are_tuples(text: str, tuples: tuple[tuple[str, ...], ...]) -> None:
    assert parse_tuples(text, 2, FIELDS) == Parsed(tuples, rejected=False)
    assert parse_tuples(text, 2).rejected, "nobody said what the fields are called"


def test_label_answers_are_read_as_they_are_meant() -> None:
    answers = ["Positive.", "The sentiment is negative", "good", ""]
    assert read_answers(SUBTASKS["sent2"], answers) == (["positive", "negative", "good", ""], 2)
    for subtask in SUBTASKS.values():
        if not subtask.is_tuple:
            assert read_answers(subtask, subtask.labels) == (list(subtask.labels), 0)


def test_tuple_answers_are_read_as_they_are_meant() -> None:
    answers = ['Here: [["a", "positive"]]', "[]", "none", '[{"aspect": "a", "sentiment": "positive"}]']
    read = ["[('a', 'positive')]", "[]", "[]", "[('a', 'positive')]"]
    assert read_answers(SUBTASKS["uabsa"], answers) == (read, 1)
    assert read_answers(replace(SUBTASKS["uabsa"], tuple_fields=("what", "how")), answers)[1] == 2
    assert read_answers(SUBTASKS["uabsa"], []) == ([], 0)


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.text(alphabet="[](){}'\",“”\u2018’:\\ab1-_ \n\0\ud800", max_size=80),
        st.lists(st.sampled_from(["[", "('a', ", "“b”", '{"aspect": ', "}", "]", ")", "not ", "positive", "é"])).map(
            "".join
        ),
    )
)
def test_no_text_raises(text: str) -> None:
    for name in ("sent5", "irony", "uabsa", "asqp"):
        (read,), rejected = read_answers(SUBTASKS[name], [text])
        if not rejected and not SUBTASKS[name].is_tuple:
            assert read in SUBTASKS[name].labels
        if SUBTASKS[name].is_tuple:
            assert isinstance(read_list(read), list)
            assert rejected == 0 or read == "[]"


@pytest.mark.parametrize(
    "unit", ["[", "]", "[]", "[(", "{[", "[“", "\u2018[", "'[", "[1],", "“,", "not ", "positiv e "]
)
def test_what_reads_an_answer_looks_at_each_character_a_bounded_number_of_times(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    strict = read_list
    monkeypatch.setattr("memmcl.suite.parsing.read_list", lambda text: (read.append(len(text)), strict(text))[1])
    text = (unit * MAX_CHARACTERS)[:MAX_CHARACTERS]
    parse_tuples(text, 2, FIELDS)
    match_label(text, FIVE)
    assert sum(read) <= 16 * MAX_CHARACTERS
    assert len(read) <= 16
