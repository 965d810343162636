"""Random search: the baseline at equal budget of every other strategy."""

from __future__ import annotations

import numpy as np

from memmcl.evolve.strategy import Genome, Proposal, SeededStrategy
from memmcl.seeds import derive


class RandomSearch(SeededStrategy):
    """The seeds, then genomes drawn uniformly from the bounds, each from a seed of its own index.

    A generation is `population` genomes.
    """

    name = "random"

    def _propose(self, index: int, recorded: Genome | None) -> Proposal:
        rng = np.random.default_rng(derive(self._arguments.seed, self.name, index))
        generation = 1 + (index - len(self._arguments.seeds)) // self._arguments.population
        return self._history.ask(self._genome(rng, recorded), f"{self.name}:g{generation}", generation)

    def _genome(self, rng: np.random.Generator, recorded: Genome | None) -> Genome:
        return self._arguments.uniform(rng)
