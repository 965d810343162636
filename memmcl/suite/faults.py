"""What is wrong with a row: where it stands, of what kind it is, and what to do about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from memmcl.errors import bounded

KINDS = (
    "broken line",
    "encoding",
    "missing column",
    "empty text",
    "missing value",
    "unknown label",
    "broken tuples",
    "tuple arity",
    "unknown polarity",
    "long text",
    "repeated row",
    "contradicting row",
)
"""Every kind of fault, roughly in the order in which a row is read."""

KEPT = 1000  # so many faults are kept with their places; all are counted


@dataclass(frozen=True)
class Fault:
    """One row that cannot be used.

    place: file and line, as "data/train.jsonl, line 3".
    kind: one of `KINDS`.
    message: what was expected, what came, and what to do, in one line.
    """

    place: str
    kind: str
    message: str

    def __str__(self) -> str:
        return bounded(f"{self.place}: {self.message}")


@dataclass
class Faults:
    """Faults and warnings of one reading. All are counted by kind; the first `KEPT` of each are kept."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[Fault] = field(default_factory=list)
    warning_counts: Counter[str] = field(default_factory=Counter)
    warnings: list[Fault] = field(default_factory=list)

    def add(self, fault: Fault) -> None:
        """Count a row that cannot be used."""
        self.counts[fault.kind] += 1
        if len(self.first) < KEPT:
            self.first.append(fault)

    def warn(self, fault: Fault) -> None:
        """Count a row that is used although something about it is odd."""
        self.warning_counts[fault.kind] += 1
        if len(self.warnings) < KEPT:
            self.warnings.append(fault)

    def __len__(self) -> int:
        return self.counts.total()
