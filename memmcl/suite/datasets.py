"""Reads a directory in SentiEval's layout: GROUP/DATASET/{train,dev,test}.jsonl, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memmcl.errors import DataError
from memmcl.suite.examples import Example
from memmcl.suite.subtasks import POLARITIES, Subtask

_FILES = {"train": "train.jsonl", "weak": "dev.jsonl", "test": "test.jsonl"}
"""Part -> file. SentiEval's dev rows are the pool that weak sets are drawn from."""


@dataclass(frozen=True)
class Row:
    """One JSON object of a JSONL file, with the place it was read from (`source`, as "file, line 3")."""

    source: str
    values: Mapping[str, Any]

    def string(self, name: str) -> str:
        """Return the non-empty string under `name`.

        Raises:
            DataError: it is missing, blank, no string, or not encodable as UTF-8.
        """
        if name not in self.values:
            raise DataError(f"{self.source}: no field {name!r}; every row needs it: add it or remove the row")
        value = self.values[name]
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.source}: {name!r} must be a non-empty string, got {_short(value)}; correct the row")
        return encodable(value, self.source)


def read_directory(root: str | Path, subtasks: Sequence[Subtask]) -> dict[str, dict[str, list[Example]]]:
    """Return subtask name -> part ("train", "weak", "test") -> examples, rows in file order.

    A data set whose folder is missing is left out as long as its subtask has another one.

    Raises:
        DataError: no such directory, a subtask without any data set, a missing file, or a row that cannot be
            used: unknown label (matched exactly), empty text, broken JSON, wrong arity, missing field.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"data.source {str(root)!r} is not a directory; give one in SentiEval's layout, or 'embedded'")
    return {subtask.name: _read_subtask(root, subtask) for subtask in subtasks}


def _read_subtask(root: Path, subtask: Subtask) -> dict[str, list[Example]]:
    folders = [root / subtask.group.lower() / name for name in subtask.datasets]
    present = [folder for folder in folders if folder.is_dir()]
    if not present:
        expected = ", ".join(folder.relative_to(root).as_posix() for folder in folders)
        raise DataError(
            f"no data set for subtask {subtask.name!r} under {root}: expected at least one of {expected}; "
            f"add one, or leave the subtask out"
        )
    parts: dict[str, list[Example]] = {}
    for part, file_name in _FILES.items():
        parts[part] = [
            example_of(row, subtask, folder.name) for folder in present for row in _read_file(folder / file_name)
        ]
    return parts


def _read_file(path: Path) -> list[Row]:
    try:
        data = path.read_bytes()
    except OSError as error:
        names = ", ".join(_FILES.values())
        raise DataError(
            f"cannot read {path} ({error.strerror}); every data set folder needs {names}: add the file"
        ) from error
    return read_rows(data, str(path))


def read_rows(data: bytes, name: str) -> list[Row]:
    """Return the rows of a JSONL file; blank lines are skipped, `name` is what messages call the file.

    Raises:
        DataError: a line is not UTF-8, not JSON, or not an object.
    """
    rows = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        source = f"{name}, line {number}"
        try:
            values = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "broken JSON"
            raise DataError(f"{source}: {reason}; expected one JSON object a line: correct or remove it") from error
        if not isinstance(values, dict):
            raise DataError(f"{source}: expected a JSON object, got {_short(values)}; correct or remove the line")
        rows.append(Row(source, values))
    return rows


def example_of(row: Row, subtask: Subtask, dataset: str) -> Example:
    """Return the example that `row` (text, label, and the fields the subtask needs) holds.

    Raises:
        DataError: the row does not fit the subtask.
    """
    text = row.string("text")
    fields = {name: row.string(name) for name in subtask.needs}
    if "label" not in row.values:
        raise DataError(f"{row.source}: no field 'label'; every row needs it: add it or remove the row")
    label = row.values["label"]
    if subtask.is_tuple:
        return Example.create(dataset, text, _tuples(label, subtask.tuple_fields, row.source), fields)
    if not isinstance(label, str) or label not in subtask.labels:
        raise DataError(
            f"{row.source}: unknown label {_short(label)} for subtask {subtask.name!r}; "
            f"expected exactly one of {', '.join(subtask.labels)}: correct the row"
        )
    return Example.create(dataset, text, label, fields)


def _tuples(label: object, fields: tuple[str, ...], source: str) -> list[tuple[str, ...]]:
    shape = f"({', '.join(fields)})"
    if not isinstance(label, list):
        raise DataError(f"{source}: expected a list of {shape} as label, got {_short(label)}; correct the row")
    tuples = []
    for item in label:
        if not isinstance(item, list) or len(item) != len(fields):
            raise DataError(
                f"{source}: expected {len(fields)} strings {shape} in every tuple, got {_short(item)}; correct the row"
            )
        if not all(isinstance(value, str) and value.strip() for value in item):
            raise DataError(f"{source}: {shape} takes non-empty strings only, got {_short(item)}; correct the row")
        polarity = dict(zip(fields, item, strict=True)).get("polarity")
        if polarity is not None and polarity not in POLARITIES:
            raise DataError(
                f"{source}: unknown polarity {_short(polarity)}; "
                f"expected exactly one of {', '.join(POLARITIES)}: correct the row"
            )
        tuples.append(tuple(encodable(value, source) for value in item))
    return tuples


def encodable(value: str, source: str) -> str:
    """Return `value` if it can be stored as UTF-8.

    Raises:
        DataError: it holds half of a surrogate pair, as the JSON text "\\ud83d" alone does.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: {_short(value)} holds half a surrogate pair; replace the character") from error
    return value


def _short(value: object) -> str:
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
