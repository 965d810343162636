"""From a model's text to a label or to tuples. Nothing a model writes is ever evaluated as code."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

MAX_CHARACTERS = 20_000
"""Longer answers are not read: no gold answer comes near, and a parser's stack is finite."""

_MIN_CUT_LABEL = 3
_MAX_LISTS = 8


@dataclass(frozen=True)
class Parsed:
    """Tuples read from an answer. `rejected`: none could be used, though the answer is not "[]"."""

    tuples: tuple[tuple[str, ...], ...]
    rejected: bool


def match_label(text: str, labels: Sequence[str]) -> str | None:
    """Return the label that `text` means, or None where that is not clear.

    In this order: the label itself; the label the text begins with (the longest); a label cut off after
    three characters or more; the only label in the text that stands as a word of its own and not after
    "not". Case, outer punctuation, and the difference between space, hyphen and underscore do not matter.
    """
    by_form = {_form(label): label for label in labels}
    form = _form(text[:MAX_CHARACTERS])
    if form in by_form:
        return by_form[form]
    words = "|".join(re.escape(key) for key in sorted(by_form, key=len, reverse=True) if key)
    if not form or not words:
        return None
    beginning = re.match(rf"(?:{words})(?!\w)", form)
    if beginning:
        return by_form[beginning.group()]
    cut = [label for key, label in by_form.items() if key.startswith(form)]
    if len(form) >= _MIN_CUT_LABEL and len(cut) == 1:
        return cut[0]
    found = {match.group() for match in re.finditer(rf"(?<!\w)(?<!\bnot )(?:{words})(?!\w)", form)}
    return by_form[found.pop()] if len(found) == 1 else None


def _form(text: str) -> str:
    """Lower case, one space for any run of spaces, hyphens and underscores, no punctuation around."""
    spaced = re.sub(r"[\s_-]+", " ", text.lower())
    first, last = re.search(r"\w", spaced), re.search(r"\w", spaced[::-1])
    return spaced[first.start() : len(spaced) - last.start()] if first and last else ""


def read_list(text: str) -> list[object] | None:
    """Return the list that `text` is as a Python literal, or None: SentiEval's own, strict reading."""
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        value = _literal(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) else None


def _literal(text: str) -> object:
    if "\\" not in text:
        return ast.literal_eval(text)
    with warnings.catch_warnings():  # an escape that Python does not know is a warning, not an error
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def parse_tuples(text: str, arity: int) -> Parsed:
    """Return the tuples of `arity` strings that `text` lists, without repetitions, in order.

    Tolerant where the meaning is clear: prose around the list, JSON instead of Python, lists instead of
    tuples, a list that was cut off (its complete tuples count). Items of another shape are left out; a list
    that holds nothing else is passed over, as [1] in "see [1]". For what people see, not for scores:
    `metrics.score` reads strictly.
    """
    if len(text) > MAX_CHARACTERS:
        return Parsed((), rejected=True)
    start = text.find("[")
    for _ in range(_MAX_LISTS):
        if start < 0:
            break
        listed = _list_text(text, start)
        value = _read_list_text(listed)
        if value is not None:
            tuples = tuple(dict.fromkeys(tuple(item) for item in value if _is_tuple_of_strings(item, arity)))
            if tuples or not value:
                return Parsed(tuples, rejected=False)
        start = text.find("[", start + max(len(listed), 1))
    return Parsed((), rejected=True)


def _is_tuple_of_strings(item: object, arity: int) -> TypeGuard[Sequence[str]]:
    return isinstance(item, tuple | list) and len(item) == arity and all(isinstance(part, str) for part in item)


def _read_list_text(text: str) -> list[object] | None:
    value = read_list(text)
    if value is not None:
        return value
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, list) else None


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
