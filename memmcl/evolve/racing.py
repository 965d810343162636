"""Racing: a candidate that is clearly worse on the first weak rows is not scored on the others.

Successive halving without a barrier: what a candidate must reach at each rung is fixed when it is asked for, from the
records that are told by then. So one worker takes a candidate through all its rungs, and hurdles, like genomes, are a
function of the order of asks alone. All candidates see the same rows in the same order, the first of them balanced by
label and data set. So the fitness of a stopped candidate is estimated as its score at the rung plus what whole
candidates gained, or lost, from that rung to the end.

Reference: Karnin, Koren, Somekh, Almost Optimal Exploration in Multi-Armed Bandits, ICML 2013 (successive halving);
Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020 (without a barrier).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memmcl.errors import ConfigError

FEWEST = 4
"""Candidates that a hurdle needs behind it."""


@dataclass(frozen=True)
class Hurdle:
    """What a candidate must reach at a rung, and what is added to its score there if it does not."""

    least: float
    offset: float


@dataclass(frozen=True)
class Race:
    """When candidates are stopped.

    rungs: shares of the weak rows after which one may be, rising, each in (0, 1). keep: the share of candidates that go
    on at each. window: how many of the last candidates told a hurdle is taken from.

    Raises:
        ConfigError: rungs, keep or window out of range.
    """

    rungs: tuple[float, ...]
    keep: float = 0.5
    window: int = 12

    def __post_init__(self) -> None:
        if list(self.rungs) != sorted(set(self.rungs)) or not all(0 < rung < 1 for rung in self.rungs):
            raise ConfigError(f"rungs must be rising shares between 0 and 1, got {list(self.rungs)}")
        if not 0 < self.keep <= 1 or self.window < FEWEST:
            raise ConfigError(f"a race needs keep in (0, 1] and a window of {FEWEST} or more, got {self}")

    def ends(self, rows: int) -> list[int]:
        """Return after how many of `rows` rows each segment ends: of one row or more, where there are enough."""
        ends: list[int] = []
        for rung in self.rungs:
            end = max(math.ceil(rung * rows), (ends[-1] if ends else 0) + 1)
            ends.append(min(end, rows))
        return [*ends, rows]

    def hurdles(self, told: Sequence[Mapping[str, Any]]) -> tuple[Hurdle | None, ...]:
        """Return the hurdle of each rung, None where too few candidates were there.

        told: records in ask order. Of each are read: "fitness"; "rungs", its score at each rung it came to; "stopped".
        """
        evaluated = [record for record in told if "reused_from" not in record and math.isfinite(record["fitness"])]
        return tuple(self._hurdle(number, evaluated) for number in range(len(self.rungs)))

    def _hurdle(self, number: int, told: Sequence[Mapping[str, Any]]) -> Hurdle | None:
        here = [record for record in told if len(record.get("rungs", ())) > number][-self.window :]
        whole = [record for record in told if len(record.get("rungs", ())) > number and not record["stopped"]]
        if len(here) < FEWEST or not whole:
            return None
        scores = sorted(record["rungs"][number] for record in here)
        least = scores[math.floor(len(scores) * (1 - self.keep))]
        gained = [record["fitness"] - record["rungs"][number] for record in whole[-self.window :]]
        return Hurdle(least, math.fsum(gained) / len(gained))
