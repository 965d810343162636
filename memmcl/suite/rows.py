"""One raw row, as a file has it, and the example that it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from memmcl.errors import short
from memmcl.suite.examples import Example
from memmcl.suite.faults import Fault, Faults
from memmcl.suite.parsing import read_any_list
from memmcl.suite.subtasks import POLARITIES, Subtask

T = TypeVar("T")

MISSING = frozenset({"na", "n/a", "nan", "null", "none", "nil"})
"""A text or field that is only one of these words, in any case, stands for no value."""


class RowError(Exception):
    """A row that cannot be used: its kind (of `faults.KINDS`), and the message. Never leaves the suite."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True, slots=True)
class Row:
    """Values by column as they were read, and the place they were read from, as "rows.csv, line 3"."""

    place: str
    values: Mapping[str, Any]

    def fault(self, error: RowError) -> Fault:
        """Return `error` with this row's place."""
        return Fault(self.place, error.kind, error.message)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How rows are to be read.

    columns: our field -> their column; a field that is not named has a column of its own name.
    labels: their label -> ours; applied before labels (of tuples: polarities) are compared.
    max_characters: a longer text is a fault.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    max_characters: int = 20_000

    def column(self, name: str) -> str:
        """Return the column of our field `name`."""
        return self.columns.get(name, name)

    def needed(self, subtask: Subtask) -> tuple[str, ...]:
        """Return the columns that `subtask` is read from; a file may lack some of them."""
        answer = subtask.tuple_fields if self.is_flat(subtask) else ("label",)
        return tuple(dict.fromkeys(self.column(name) for name in ("text", *subtask.needs, *answer)))

    def is_flat(self, subtask: Subtask) -> bool:
        """Return whether each field of a tuple has a column, instead of one column with a list of tuples."""
        return "label" not in self.columns and any(name in self.columns for name in subtask.tuple_fields)


PLAIN = Shape()


def usable(rows: Iterable[Row | Fault], read: Callable[[Row], T], faults: Faults) -> Iterator[tuple[Row, T]]:
    """Yield each row with what `read` makes of it; what is wrong with the others goes to `faults`."""
    for row in rows:
        if isinstance(row, Fault):
            faults.add(row)
            continue
        try:
            value = read(row)
        except RowError as error:
            faults.add(row.fault(error))
        else:
            yield row, value


def text_of(row: Row, shape: Shape) -> str:
    """Return the row's text. Raises RowError if it is missing, empty, too long, or cannot be stored."""
    column = shape.column("text")
    text = _string(row.values, column, "empty text")
    if len(text) > shape.max_characters:
        raise RowError(
            "long text",
            f"{short(column)} has {len(text)} characters, more than the {shape.max_characters} of data.max_characters; "
            f"shorten it, or raise the limit",
        )
    return text


def example_of(row: Row, subtask: Subtask, dataset: str, shape: Shape = PLAIN, *, labelled: bool = True) -> Example:
    """Return the example that `row` holds. Raises RowError where it does not fit the subtask.

    With `labelled=False` no answer is looked for: the example has the gold "" or ().
    """
    text = text_of(row, shape)
    fields = {name: _string(row.values, shape.column(name), "missing value") for name in subtask.needs}
    if not labelled:
        return Example.create(dataset, text, () if subtask.is_tuple else "", fields)
    if not subtask.is_tuple:
        return Example.create(dataset, text, _label(row.values, subtask, shape), fields)
    items_of = _items_of_columns if shape.is_flat(subtask) else _items_of_list
    tuples = [_tuple(item, subtask, shape) for item in items_of(row.values, subtask, shape)]
    return Example.create(dataset, text, tuples, fields)


def _value(values: Mapping[str, Any], column: str) -> Any:
    """Return what is in a column, but never None or NaN."""
    if column not in values:
        raise RowError("missing column", f"no column {short(column)}; every row needs it: add it, or remove the row")
    value = values[column]
    if value is None or value != value:  # NaN alone differs from itself
        raise RowError("missing value", f"{short(column)} has no value (null); fill it in, or remove the row")
    return value


def _string(values: Mapping[str, Any], column: str, when_blank: str) -> str:
    value = _value(values, column)
    if not isinstance(value, str):
        raise RowError("missing value", f"{short(column)} must be a text, got {short(value)}; correct the row")
    if not value.strip():
        raise RowError(when_blank, f"{short(column)} must be a non-empty string, got {short(value)}; correct the row")
    if value.strip().lower() in MISSING:
        raise RowError(
            "missing value",
            f"{short(column)} is only the word {short(value)}, which stands for no value; fill it in, or remove "
            "the row",
        )
    return storable(value, column)


def storable(value: str, column: str) -> str:
    """Return `value`. Raises RowError for a NUL, or half of a surrogate pair, which UTF-8 does not store."""
    if "\0" in value:
        raise RowError("encoding", f"{short(column)} holds a NUL character, got {short(value)}; remove the character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "encoding", f"{short(column)} holds half a surrogate pair, got {short(value)}; replace the character"
        ) from error
    return value


def _label(values: Mapping[str, Any], subtask: Subtask, shape: Shape) -> str:
    column = shape.column("label")
    value = _value(values, column)
    if value == "":
        raise RowError("missing value", f"{short(column)} is empty; fill in a label, or remove the row")
    text = str(value).lower() if isinstance(value, bool) else str(value)  # true and false, as JSON has them
    label = shape.labels.get(text, text)
    if label in subtask.labels:
        return label
    similar = [known for known in subtask.labels if _form(known) == _form(label)]
    advice = "correct the row"
    if similar:
        right = short(similar[0])
        advice = f"it differs from {right} by case, spaces, hyphens or underscores only: write {right}"
    raise RowError(
        "unknown label",
        f"unknown label {short(label)} for subtask {subtask.name!r}; "
        f"expected exactly one of {', '.join(subtask.labels)}: {advice}",
    )


def _form(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label).strip().lower()


def _items_of_list(values: Mapping[str, Any], subtask: Subtask, shape: Shape) -> Iterable[Any]:
    value = _value(values, shape.column("label"))
    read = read_any_list(value) if isinstance(value, str) else value
    if not isinstance(read, list):
        raise RowError(
            "broken tuples", f"expected a list of {_shape(subtask)} as label, got {short(value)}; correct the row"
        )
    return read


def _items_of_columns(values: Mapping[str, Any], subtask: Subtask, shape: Shape) -> Iterable[Any]:
    """Return one tuple of texts, or as many tuples as the lists in all columns are long."""
    cells = [_value(values, shape.column(name)) for name in subtask.tuple_fields]
    lists = [cell for cell in cells if isinstance(cell, list)]
    if not lists:
        return [cells]
    if len(lists) < len(cells) or len({len(cell) for cell in lists}) > 1:
        raise RowError(
            "broken tuples", f"expected texts, or lists of one length, for {_shape(subtask)}; correct the row"
        )
    return zip(*lists, strict=True)


def _tuple(item: Any, subtask: Subtask, shape: Shape) -> tuple[str, ...]:
    fields = subtask.tuple_fields
    if not isinstance(item, list | tuple) or len(item) != len(fields):
        raise RowError(
            "tuple arity",
            f"expected {len(fields)} strings {_shape(subtask)} in every tuple, got {short(item)}; correct the row",
        )
    if not all(isinstance(value, str) and value.strip() for value in item):
        raise RowError(
            "broken tuples", f"{_shape(subtask)} takes non-empty strings only, got {short(item)}; correct the row"
        )
    values = dict(zip(fields, item, strict=True))
    if "polarity" in values:
        values["polarity"] = shape.labels.get(values["polarity"], values["polarity"])
        if values["polarity"] not in POLARITIES:
            raise RowError(
                "unknown polarity",
                f"unknown polarity {short(values['polarity'])}; "
                f"expected exactly one of {', '.join(POLARITIES)}: correct the row",
            )
    return tuple(storable(value, name) for name, value in values.items())


def _shape(subtask: Subtask) -> str:
    return f"({', '.join(subtask.tuple_fields)})"
