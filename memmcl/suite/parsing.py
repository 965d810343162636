"""From a model's text to a label or to tuples. Nothing a model writes is ever evaluated as code."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from memmcl.suite.examples import Tuples, format_tuples
from memmcl.suite.subtasks import Subtask

MAX_CHARACTERS = 20_000  # the tolerant reading leaves longer answers alone: no gold answer comes near

MAX_LITERAL = 200_000
"""The strict reading goes this far, as SentiEval reads any length; Python's parser can bring the interpreter down on
texts without bound, and up to here it refuses whatever nests too deep."""

_MIN_CUT_LABEL = 3
_MAX_LISTS = 8
_NEGATION = re.compile(r"(?:\b(?:not|no|never)|n['’]t)(?: \w+)? $")
_NEGATION_REACH = 40
_SMART_OPEN = re.compile(r"([\[({,:]\s*)[“”„\u2018’]")
_SMART_CLOSE = re.compile(r"[“”\u2018’](\s*[\])},:])")


@dataclass(frozen=True)
class Parsed:
    """Tuples read from an answer. `rejected`: none could be used, though the answer is not "[]"."""

    tuples: Tuples
    rejected: bool


def read_answers(subtask: Subtask, answers: Sequence[str]) -> tuple[list[str], int]:
    """Return the answers as they are scored, and how many could not be read.

    Labels go through `match_label`, tuples through `parse_tuples`. What cannot be read stays as it is, or is "[]"
    for tuples.
    """
    if subtask.is_tuple:
        parsed = [parse_tuples(answer, len(subtask.tuple_fields), subtask.tuple_fields) for answer in answers]
        return [format_tuples(item.tuples) for item in parsed], sum(item.rejected for item in parsed)
    matched = [match_label(answer, subtask.labels) for answer in answers]
    read = [answer if label is None else label for answer, label in zip(answers, matched, strict=True)]
    return read, matched.count(None)


def match_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that `text` means, or None where that is not clear.

    In this order: the label itself; the label the text begins with (the longest); a label cut off after
    three characters or more; the only label in the text that stands as a word of its own and is not negated
    ("not positive", "isn't very positive"). Case, outer punctuation, and the difference between space, hyphen and
    underscore do not matter, unless a label consists of nothing else, as "+".
    """
    exact = text[:MAX_CHARACTERS].strip().lower()
    for label in labels:
        if exact and label.strip().lower() == exact:
            return label
    by_form = {_form(label): label for label in labels if _form(label)}
    form = _form(exact)
    if form in by_form:
        return by_form[form]
    words = "|".join(re.escape(key) for key in sorted(by_form, key=len, reverse=True))
    if not form or not words:
        return None
    beginning = re.match(rf"(?:{words})(?!\w)", form)
    if beginning:
        return by_form[beginning.group()]
    cut = [label for key, label in by_form.items() if key.startswith(form)]
    if len(form) >= _MIN_CUT_LABEL and len(cut) == 1:
        return cut[0]
    named = {
        match.group()
        for match in re.finditer(rf"(?<!\w)(?:{words})(?!\w)", form)
        if not _NEGATION.search(form, max(0, match.start() - _NEGATION_REACH), match.start())
    }
    return by_form[named.pop()] if len(named) == 1 else None


def _form(text: str) -> str:
    """Lower case, one space for any run of spaces, hyphens and underscores, no punctuation around."""
    spaced = re.sub(r"[\s_-]+", " ", text.lower())
    first, last = re.search(r"\w", spaced), re.search(r"\w", spaced[::-1])
    return spaced[first.start() : len(spaced) - last.start()] if first and last else ""


def read_list(text: str) -> list[object] | None:
    """Return the list that `text` is as a Python literal, or None: SentiEval's own, strict reading."""
    value = read_literal(text)
    return value if isinstance(value, list) else None


def read_any_list(text: str) -> list[object] | None:
    """Return the list that `text` is as JSON (tried first: its escapes are others), or as a Python literal, or None."""
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError):
        return read_list(text.strip())
    return decoded if isinstance(decoded, list) else None


def read_literal(text: object) -> object:
    """Return what `text` is as a Python literal; None where it is none, or longer than `MAX_LITERAL`."""
    if not isinstance(text, str) or len(text) > MAX_LITERAL:
        return None
    try:
        with warnings.catch_warnings():  # an escape that Python does not know is a warning, not an error
            warnings.simplefilter("ignore")
            literal: object = ast.literal_eval(text)
            return literal
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def parse_tuples(text: str, arity: int, fields: Sequence[str] = ()) -> Parsed:
    """Return the tuples of `arity` strings that `text` lists, without repetitions, in order.

    Tolerant where the meaning is clear: prose or a code fence around the list, JSON instead of Python, lists instead
    of tuples, objects that name all `fields` ("sentiment" stands for "polarity"), typographic quotes, a list that
    was cut off (its complete tuples count). Items of another shape are left out; a list that holds nothing else is
    passed over, as [1] in "see [1]". For what people see, and run before scores: `metrics.score` reads strictly.
    """
    if len(text) > MAX_CHARACTERS:
        return Parsed((), rejected=True)
    straight = _SMART_CLOSE.sub(r'"\1', _SMART_OPEN.sub(r'\1"', text))
    for spelling in dict.fromkeys((text, straight)):
        tuples = _find_tuples(spelling, arity, fields)
        if tuples is not None:
            return Parsed(tuples, rejected=False)
    return Parsed((), rejected=True)


def _find_tuples(text: str, arity: int, fields: Sequence[str]) -> Tuples | None:
    """Return the tuples of the first list of tuples in `text`, () for an empty list, or None where there is none."""
    start = text.find("[")
    for _ in range(_MAX_LISTS):
        if start < 0:
            break
        listed = _list_text(text, start)
        value = read_any_list(listed)
        if value is not None:
            items = (_as_tuple(item, arity, fields) for item in value)
            tuples = tuple(dict.fromkeys(item for item in items if item is not None))
            if tuples or not value:
                return tuples
        start = text.find("[", start + max(len(listed), 1))
    return None


def _as_tuple(item: object, arity: int, fields: Sequence[str]) -> tuple[str, ...] | None:
    if isinstance(item, dict) and fields:
        named = {"polarity": item["sentiment"], **item} if "sentiment" in item else item
        item = [named.get(name) for name in fields]
    if not isinstance(item, tuple | list) or len(item) != arity:
        return None
    return tuple(item) if all(isinstance(value, str) for value in item) else None


def _list_text(text: str, start: int) -> str:
    """Return the bracketed text from `start` on; one that never ends is closed after its last whole item."""
    depth, quote, skip, last_item = 0, "", False, -1
    for position in range(start, len(text)):
        character = text[position]
        if skip:
            skip = False
        elif quote:
            skip = character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[({":
            depth += 1
        elif character in "])}":
            depth -= 1
            if depth == 0:
                return text[start : position + 1]
            if depth == 1:
                last_item = position
    return text[start : last_item + 1] + "]" if last_item >= 0 else ""
