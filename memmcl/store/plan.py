"""The request and the result of a garbage collection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """Which finished runs stay, and what else is too young to go.

    keep_runs: so many of the newest stay, None for all. older_than: seconds; nothing younger goes. None: any age for
    finished runs, a week for what belongs to none. only: this run goes, and nothing but what it alone needs.
    """

    keep_runs: int | None = None
    older_than: float | None = None
    only: str | None = None


@dataclass(frozen=True)
class Item:
    """One object that goes: what it is, where it lies, its size in bytes. unfinished: what no writer completed."""

    what: str
    path: str
    size: int
    unfinished: bool = False


@dataclass(frozen=True)
class RemovalPlan:
    """What goes, in the order in which it does, and why the rest stays.

    removed: manifests first, so that none is ever without its files. runs: why each finished run that stays does, by
    its id. kept: lines about what else stays. problems: what could not be decided, and why.
    """

    removed: tuple[Item, ...]
    runs: Mapping[str, str]
    kept: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return by what they are how many objects go, and how many bytes."""
        totals: dict[str, tuple[int, int]] = {}
        for item in self.removed:
            count, size = totals.get(item.what, (0, 0))
            totals[item.what] = (count + 1, size + item.size)
        return totals
