"""What tests of hostile input hold every reader to: one short line that shows little of the input, in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import TypeVar

import pytest

from memmcl.errors import MESSAGE, VALUE, MemmclError

PLANTED = "planted value " * 20_000
"""A value that a message may show the beginning of."""
MIB = 1 << 20
T = TypeVar("T")


def peak(read: Callable[[], T]) -> tuple[T, int]:
    """Return what `read` returns, and the bytes that it held at most."""
    tracemalloc.start()
    try:
        return read(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check_line(line: str) -> None:
    """Hold a message to one line, its length, and how much of a value it shows."""
    assert "\n" not in line
    assert len(line) <= MESSAGE
    assert PLANTED[: VALUE + 1] not in line


def refused(error: type[MemmclError], read: Callable[[], object], expected: str, most: int = 200 * MIB) -> None:
    """Hold a reader to an error whose line holds `expected`, and to `most` bytes of memory."""

    def read_to_its_end() -> str:
        with pytest.raises(error) as raised:
            read()
        return str(raised.value)

    line, used = peak(read_to_its_end)
    assert expected in line
    check_line(line)
    assert used < most, f"{used / MIB:.0f} MiB"
