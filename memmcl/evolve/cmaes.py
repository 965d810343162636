"""The strategies: CMA-ES (by the `cmaes` library) and random search, its baseline at equal budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memmcl.errors import ConfigError, SearchError
from memmcl.evolve.strategy import Arguments, Bounds, Genome, History, Proposal, Strategy, check_arguments
from memmcl.seeds import derive

if TYPE_CHECKING:
    from cmaes import CMA


class CmaEs:
    """CMA-ES in coordinates in which every gene's bounds are 0 and 1.

    Seeds are proposed first. The distribution starts, at the first ask behind them, at the best seed told by
    then; if none was, at the mean of the seeds; without seeds, at the middle of the bounds. Asks between two
    updates sample from the current distribution, so they may run ahead of tells; tells are buffered until a
    population of CMA-ES's own proposals is complete. A failed proposal ranks behind the worst of its
    population; a population that failed as a whole teaches nothing and leaves the distribution as it is.

        strategy = build_strategy("cmaes", genes=2, bounds=(0.0, 1.5), seeds=[], seed=1)
        for _ in range(60):
            proposal = strategy.ask()
            strategy.tell(proposal.index, -sum((gene - 0.5) ** 2 for gene in proposal.genome))

    Reference: Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772.
    """

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._history = History()
        self._optimizer: CMA | None = None
        self._told: list[tuple[Genome, float]] = []

    def ask(self) -> Proposal:
        """Return the next seed, or a sample of the current distribution."""
        seeds = self._arguments.seeds
        index = len(self._history.proposals)
        if index < len(seeds):
            return self._history.ask(seeds[index][1], f"seed:{seeds[index][0]}", 0)
        if self._optimizer is None:
            self._optimizer = self._start()
        unit = self._optimizer.ask()
        generation = self._optimizer.generation + 1
        return self._history.ask(self._arguments.from_unit(unit), f"cmaes:g{generation}", generation)

    def tell(self, index: int, fitness: float | None) -> None:
        """Tell the fitness (maximised) of proposal `index`; see `Strategy`."""
        value = self._history.tell(index, fitness)
        if index < len(self._arguments.seeds) or self._optimizer is None:
            return
        self._told.append((self._history.proposals[index].genome, value))
        if len(self._told) == self._arguments.population:
            self._update(self._optimizer)

    def state(self) -> dict[str, Any]:
        """Return arguments and history, JSON-ready; see `restore`."""
        return _state("cmaes", self._arguments, self._history)

    def _start(self) -> CMA:
        from cmaes import (
            CMA,
        )  # here, since it imports scipy.stats: half a second that only a search should pay

        arguments = self._arguments
        best = self._history.best_of(len(arguments.seeds))
        if best is not None:
            mean = arguments.to_unit(best.genome)
        elif arguments.seeds:
            mean = np.mean([arguments.to_unit(genome) for _, genome in arguments.seeds], axis=0)
        else:
            mean = np.full(arguments.genes, 0.5)
        return CMA(
            mean=np.clip(mean, 0.0, 1.0),
            sigma=arguments.sigma,
            bounds=np.tile([0.0, 1.0], (arguments.genes, 1)),
            seed=derive(arguments.seed, "cmaes") % 2**32,  # numpy's RandomState takes 32 bits
            population_size=arguments.population,
        )

    def _update(self, optimizer: CMA) -> None:
        told, self._told = self._told, []
        finite = [fitness for _, fitness in told if math.isfinite(fitness)]
        if not finite:
            return
        worst = min(finite) - 1.0
        optimizer.tell(
            [
                (
                    self._arguments.to_unit(genome),
                    -(fitness if math.isfinite(fitness) else worst),
                )  # cmaes minimises
                for genome, fitness in told
            ]
        )


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
        genome = self._arguments.from_unit(rng.random(self._arguments.genes))
        return self._history.ask(genome, f"random:g{generation}", generation)

    def tell(self, index: int, fitness: float | None) -> None:
        """Note the fitness of proposal `index`; it changes nothing that is asked later."""
        self._history.tell(index, fitness)

    def state(self) -> dict[str, Any]:
        """Return arguments and history, JSON-ready; see `restore`."""
        return _state("random", self._arguments, self._history)


STRATEGIES: dict[str, Callable[[Arguments], Strategy]] = {"cmaes": CmaEs, "random": RandomSearch}


def build_strategy(
    name: str,
    *,
    genes: int,
    bounds: Bounds,
    seeds: Sequence[tuple[str, Sequence[float]]],
    seed: int,
    population: int | None = None,
    sigma: float = 0.3,
) -> Strategy:
    """Return the strategy `name` of `STRATEGIES`.

    genes: length of a genome; bounds: one (low, high) for all genes or one per gene; seeds: (name, genome)
    proposed first, in order; population: None means 4 + floor(3 ln genes); sigma: CMA-ES's initial step as a
    fraction of the gene ranges (a uniform draw has no step).

    Raises:
        ConfigError: an unknown name, or bounds, population or sigma out of range.
        GenomeError: a seed of the wrong length or out of bounds.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown search strategy `{name}`; choose one of {', '.join(sorted(STRATEGIES))}")
    return STRATEGIES[name](
        check_arguments(genes=genes, bounds=bounds, seeds=seeds, seed=seed, population=population, sigma=sigma)
    )


def restore(state: Mapping[str, Any]) -> Strategy:
    """Return the strategy whose `state()` this is, by replaying its asks and tells.

    Raises:
        SearchError: the replay proposes another genome than the history holds (other code or library
        version).
    """
    arguments = dict(state["arguments"])
    arguments["seeds"] = [(name, tuple(genome)) for name, genome in arguments["seeds"]]
    strategy = build_strategy(state["strategy"], **arguments)
    for event in state["history"]:
        if event[0] == "tell":
            strategy.tell(event[1], event[2])
            continue
        proposal = strategy.ask()
        if list(proposal.genome) != list(event[1]):
            raise SearchError(
                f"replayed proposal {proposal.index} is {list(proposal.genome)}, the saved search had "
                f"{event[1]}; was it written by another version? start the search anew"
            )
    return strategy


def _state(name: str, arguments: Arguments, history: History) -> dict[str, Any]:
    return {
        "strategy": name,
        "arguments": arguments.to_json(),
        "history": [list(event) for event in history.events],
    }
