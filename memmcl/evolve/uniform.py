"""Random search: the baseline at equal budget of every other strategy."""

from __future__ import annotations

from typing import Any

import numpy as np

from memmcl.evolve.arguments import Arguments
from memmcl.evolve.strategy import Genome, History, Objectives, Proposal
from memmcl.seeds import derive


class RandomSearch:
    """The seeds, then genomes drawn uniformly from the bounds, each from a seed of its own index."""

    name = "random"

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._history = History()

    def ask(self, recorded: Genome | None = None) -> Proposal:
        """Return the next seed, or a genome of the strategy's own; a generation is `population` of these."""
        seeds = self._arguments.seeds
        index = len(self._history.proposals)
        if index < len(seeds):
            return self._history.ask(seeds[index][1], f"seed:{seeds[index][0]}", 0)
        rng = np.random.default_rng(derive(self._arguments.seed, self.name, index))
        generation = 1 + (index - len(seeds)) // self._arguments.population
        return self._history.ask(self._genome(rng, recorded), f"{self.name}:g{generation}", generation)

    def tell(self, index: int, fitness: float | None, objectives: Objectives | None = None) -> None:
        """Tell the fitness (maximised) of proposal `index`; see `Strategy`. Random draws learn nothing from it."""
        self._history.tell(index, fitness, objectives)

    def state(self) -> dict[str, Any]:
        """Return arguments and history, JSON-ready; see `memmcl.evolve.restore`."""
        return self._history.state(self.name, self._arguments.to_json())

    def _genome(self, rng: np.random.Generator, recorded: Genome | None) -> Genome:
        return self._arguments.uniform(rng)
