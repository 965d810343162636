"""Parsing: tolerant where the meaning is clear, never evaluating, never crashing."""

import pytest

from memmcl.suite.parsing import MAX_CHARACTERS, Parsed, match_label, parse_tuples, read_list

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
    "unit",
    [
        "[",
        "(",
        "{",
        "-",
        "~",
        "not ",
        "1+",
        "1,",
        "[(",
        "{1:",
        "'",
        '"""',
        "\\",
        "\x00",
        "f'{",
        "[[],",
        "1 if ",
    ],
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
    for text in (
        "('a', 'b')",
        "[('a', 'b')",
        "x [('a', 'b')]",
        "[('a', 'b')] x",
        "[a]",
        "",
        "[null]",
        "list()",
    ):
        assert read_list(text) is None
    assert read_list("[" + "1," * MAX_CHARACTERS + "]") is None
