"""JSON and YAML from untrusted sources, read within bounds of size, depth and time.

Both raise a ValueError with a short reason; the caller adds which file it is, and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

JSON_BYTES = 1 << 24  # bytes of a JSON file, unless its reader has another bound

YAML_BYTES = 1 << 20  # bytes of a YAML file, or of a value of --set
YAML_DEPTH = 64  # lists and mappings within each other in YAML
YAML_NODES = 100_000  # values in YAML, those that aliases (`*name`) repeat included
YAML_DIGITS = 1_000
"""Characters of one number in YAML: PyYAML reads 1:30:00 as a number to the base 60, in quadratic time."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER = re.compile(r"[-+.]?[0-9]")


def read_within(path: Path, most: int) -> bytes:
    """Return the content of a file. Raises ValueError if it has more than `most` bytes."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data


def parse_json(data: bytes, most: int = JSON_BYTES, *, infinity: bool = False) -> Any:
    """Return the value that JSON of at most `most` bytes holds. A key twice in one object is refused.

    infinity: whether NaN, Infinity and -Infinity are numbers, as Python writes them, and JSON has not.

    Raises:
        ValueError: it is too long, too deep, or no JSON.
    """
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        return json.loads(
            data, object_pairs_hook=_without_repeats, parse_constant=float if infinity else _refuse_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("its values are nested too deep") from error


def parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML document. Raises ValueError if it is too long, deep or large, or no YAML."""
    if len(text) > YAML_BYTES or len(text.encode(errors="replace")) > YAML_BYTES:
        raise ValueError(f"it has more than {YAML_BYTES:,} bytes")
    try:
        _check_events(yaml.parse(text, Loader=_LOADER))
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"it has the key {key[:60]!r} twice in one object")
        values[key] = value
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check_events(events: Iterable[Any]) -> None:
    """Walk through YAML before anything is built of it: how deep it is, and how many values it would be."""
    sizes: dict[str, int] = {}  # anchor -> values below it, once it is complete
    above: list[tuple[str | None, int]] = []  # of each open list or mapping: its anchor, and the values before it
    nodes = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias *{str(event.anchor)[:60]} names nothing that is complete before it")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            if event.anchor:
                sizes[event.anchor] = 1
            if not event.style and len(event.value) > YAML_DIGITS and _NUMBER.match(event.value):
                raise ValueError(f"it has a number of {len(event.value):,} characters")
        elif isinstance(event, yaml.CollectionStartEvent):
            above.append((event.anchor, nodes))
            nodes += 1
            if len(above) > YAML_DEPTH:
                raise ValueError(f"its values are nested deeper than {YAML_DEPTH}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = above.pop()
            if anchor:
                sizes[anchor] = nodes - before
        if nodes > YAML_NODES:
            raise ValueError(f"it has more than {YAML_NODES:,} values, what its aliases repeat included")
