"""Every error memmcl raises on purpose, in one tree; anything else that is raised is a bug.

    MemmclError
    |-- UsageError: ConfigError, GenomeError
    |-- DataError, ModelError, TrainingError, SearchError
    |-- ServiceError: ServiceDied
    `-- StoreError: ArtifactNotFound, CorruptArtifact, StoreAccessError, StoreFull, Conflict, LeaseHeld

A message says what was expected, what came, and what to do. Whatever a file or a user gives, it stays short: values go
through `shown`, and every message through `bounded`.
"""

from __future__ import annotations

import re
import reprlib

VALUE = 200  # characters of one value that a message shows at most

MESSAGE = 2_000  # characters of a whole message at most

_LONG_WORD = re.compile(rf"\S{{{VALUE + 1},}}")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = VALUE
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = _REPR.maxdeque = 20
_REPR.maxlevel = 4


def shown(value: object, most: int = VALUE) -> str:
    """Return `value` as messages show it: as Python writes it, printable, on one line, of `most` characters at most."""
    if isinstance(value, str):
        text = repr(value[: most + 1]) if value[:most].isprintable() else ascii(value[: most + 1])
    else:
        try:
            text = _REPR.repr(value).encode("ascii", "backslashreplace").decode()
        except ValueError:  # an integer of more digits than Python writes
            text = f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= most else text[: most - 3] + "..."


def short(value: object) -> str:
    """Return `value` as messages about rows show it: printable, on one line, not long."""
    return shown(value, 60)


def bounded(message: str) -> str:
    """Return a message of `MESSAGE` characters at most, its words of `VALUE`: what is longer loses its middle."""
    words = _LONG_WORD.sub(lambda word: _without_middle(word.group(), VALUE), message)
    return _without_middle(words, MESSAGE)


def brief(text: object) -> str:
    """Return a path or a URL as messages show it: without its middle where it is longer than a value."""
    return _without_middle(str(text), VALUE)


def _without_middle(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 3]}...{text[-end:]}"


class MemmclError(Exception):
    """Base of all errors that memmcl raises on purpose: shown as one line, with exit code 1."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(bounded(message))


class UsageError(MemmclError):
    """The request itself is wrong; exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration has an unknown key, a wrong type, or a value out of bounds."""


class GenomeError(UsageError):
    """A genome does not fit the experts, blocks or bounds it is used with."""


class DataError(MemmclError):
    """Rows, labels or splits that cannot be used."""


class ModelError(MemmclError):
    """A base model, tokenizer or adapter that cannot be used."""


class TrainingError(MemmclError):
    """A training that cannot go on: a loss that is not finite, or no rows."""


class SearchError(MemmclError):
    """A merge search that cannot go on."""


class ServiceError(MemmclError):
    """A Prefect server, a Ray cluster or a port that cannot be used."""


class ServiceDied(ServiceError):
    """A Prefect server or a Ray that was there, and is gone."""


class StoreError(MemmclError):
    """Object storage that fails."""


class ArtifactNotFound(StoreError):
    """No manifest, or a blob it names is missing."""


class CorruptArtifact(StoreError):
    """Bytes that do not match their digest."""


class StoreAccessError(StoreError):
    """Wrong credentials, no such bucket, or an endpoint out of reach."""


class StoreFull(StoreError):
    """No space left where the store lies."""


class Conflict(StoreError):
    """A compare-and-swap that lost: the pointer moved since it was read."""


class LeaseHeld(StoreError):
    """Another live process works on the same run."""
