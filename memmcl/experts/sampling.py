"""The rows of a training step: shuffled epochs as a function of the step, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from memmcl import seeds
from memmcl.backbone.batches import TokenizedRow


class Sampler:
    """One shuffled epoch after the other over `rows`, in batches of `size`; a batch may span two epochs."""

    def __init__(self, rows: Sequence[TokenizedRow], size: int, seed: int) -> None:
        self._rows = rows
        self._size = size
        self._seed = seed

    def batch(self, step: int) -> list[TokenizedRow]:
        """Return the rows of step 0, 1, ...: a function of the step alone."""
        places = [divmod(place, len(self._rows)) for place in range(step * self._size, (step + 1) * self._size)]
        shuffles = {epoch: np.random.default_rng(seeds.derive(self._seed, "epoch", epoch)) for epoch, _ in places}
        orders = {epoch: shuffle.permutation(len(self._rows)) for epoch, shuffle in shuffles.items()}
        return [self._rows[orders[epoch][at]] for epoch, at in places]


class Turns:
    """Batches of other subtasks: one subtask at a time, in the order of their names."""

    def __init__(self, rows: Mapping[str, Sequence[TokenizedRow]], size: int, seed: int) -> None:
        self._samplers = [Sampler(rows[name], size, seeds.derive(seed, name)) for name in sorted(rows) if rows[name]]

    def __bool__(self) -> bool:
        return bool(self._samplers)

    def batch(self, turn: int) -> list[TokenizedRow]:
        """Return the rows of turn 0, 1, ..."""
        taken, number = divmod(turn, len(self._samplers))
        return self._samplers[number].batch(taken)
