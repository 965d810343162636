"""The rows that are kept of one data set and split: at most so many, the same whatever order they come in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from memmcl.suite.examples import Example, drawing_order
from memmcl.suite.faults import Fault, Faults

BEYOND = "rows beyond data.pool_rows"


@dataclass(slots=True)
class _PooledRow:
    key: tuple[str, str, str]
    example: Example
    place: str
    file: str


class Pool:
    """Keeps the first `limit` rows in drawing order, and no more than a quarter beyond that in memory.

    keep_repeats: whether a row that repeats an earlier one is kept with a warning, instead of being a fault.
    """

    def __init__(self, limit: int, *, keep_repeats: bool, faults: Faults, dropped: Counter[str]) -> None:
        self._limit = limit
        self._keep_repeats = keep_repeats
        self._faults = faults
        self._dropped = dropped
        self._by_id: dict[str, list[_PooledRow]] = {}
        self._size = 0
        self._last: tuple[str, str, str] | None = None

    def add(self, example: Example, place: str, file: str = "") -> None:
        """Take in one row.

        file: a row that was read from another file before is the same row, not a repeated one.
        """
        key = drawing_order(example)
        if self._last is not None and key > self._last:
            self._dropped[BEYOND] += 1
            return
        new = _PooledRow(key, example, place, file)
        earlier = self._by_id.get(example.id)
        if earlier is None:
            self._by_id[example.id] = [new]
        elif self._keep_repeats:
            self._faults.warn(_repeated(new, earlier[0]))
            earlier.append(new)
        else:
            self._merge(earlier, new)
            return
        self._size += 1
        if self._size > self._limit + max(self._limit // 4, 1):
            self._prune()

    def rows(self) -> list[Example]:
        """Return the rows that are kept, in drawing order."""
        self._prune()
        return [row.example for row in self._ordered()]

    def _merge(self, earlier: list[_PooledRow], new: _PooledRow) -> None:
        old = earlier[0]
        if old.example != new.example:
            self._faults.add(_repeated(new, old))
            earlier[0] = min(old, new, key=lambda row: row.key)
        elif old.file == new.file:
            self._faults.add(_repeated(new, old))
        else:
            old.file, old.place = new.file, new.place

    def _ordered(self) -> list[_PooledRow]:
        return sorted((row for same in self._by_id.values() for row in same), key=lambda row: row.key)

    def _prune(self) -> None:
        if self._size <= self._limit:
            return
        ordered = self._ordered()
        self._dropped[BEYOND] += len(ordered) - self._limit
        self._by_id = {}
        for row in ordered[: self._limit]:
            self._by_id.setdefault(row.example.id, []).append(row)
        self._size = min(self._limit, len(ordered))
        self._last = ordered[self._size - 1].key


def _repeated(new: _PooledRow, old: _PooledRow) -> Fault:
    if old.example.gold == new.example.gold:
        return Fault(new.place, "repeated row", f"the same question and answer as {old.place}; remove one of them")
    return Fault(
        new.place, "contradicting row", f"the same question as {old.place} with another answer; keep the right one"
    )
