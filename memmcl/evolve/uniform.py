"""Random search: the baseline at equal budget of every other strategy."""

from __future__ import annotations

from typing import Any

import numpy as np

from memmcl.evolve.arguments import Arguments
from memmcl.evolve.strategy import History, Objectives, Proposal
from memmcl.seeds import derive


class RandomSearch:
    """The seeds, then genomes drawn uniformly from the bounds, each from a seed of its own index."""

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._history = History()

    def ask(self) -> Proposal:
        """Return the next seed, or a uniform draw; a generation is `population` draws."""
        seeds = self._arguments.seeds
        index = len(self._history.proposals)
        if index < len(seeds):
            return self._history.ask(seeds[index][1], f"seed:{seeds[index][0]}", 0)
        rng = np.random.default_rng(derive(self._arguments.seed, "random", index))
        generation = 1 + (index - len(seeds)) // self._arguments.population
        return self._history.ask(self._arguments.uniform(rng), f"random:g{generation}", generation)

    def tell(self, index: int, fitness: float | None, objectives: Objectives | None = None) -> None:
        """Note the fitness of proposal `index`; it changes nothing that is asked later."""
        self._history.tell(index, fitness, objectives)

    def state(self) -> dict[str, Any]:
        """Return arguments and history, JSON-ready; see `memmcl.evolve.restore`."""
        return self._history.state("random", self._arguments.to_json())
