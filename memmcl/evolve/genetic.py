"""A genetic algorithm whose asks never wait (tournaments, SBX, polynomial mutation, elitism), and NSGA-II by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from memmcl.errors import ConfigError, SearchError
from memmcl.evolve import pareto
from memmcl.evolve.arguments import Arguments
from memmcl.evolve.operators import cross, mutate, perturb
from memmcl.evolve.strategy import Floats, Genome, Objectives, Proposal, SeededStrategy, maximised
from memmcl.seeds import derive

CROSSOVER = 0.9  # the probability that a child has two parents
REPEATS = 2  # further mutations of a child whose genome was proposed before


@dataclass(frozen=True)
class Individual:
    """A told proposal; a failure has a fitness, or an objective, of -inf."""

    index: int
    genome: Genome
    fitness: float
    objectives: tuple[float, ...]


Ranking = Callable[[Sequence[Individual]], list[Individual]]


def by_fitness(individuals: Sequence[Individual]) -> list[Individual]:
    """Return `individuals` without failures, by falling fitness; of equals, the earlier first."""
    able = (individual for individual in individuals if math.isfinite(individual.fitness))
    return sorted(able, key=lambda individual: (-individual.fitness, individual.index))


def by_dominance(individuals: Sequence[Individual]) -> list[Individual]:
    """Return `individuals` without failures, by front, falling crowding distance, falling fitness, and index.

    Reference: Deb et al. 2002, section III.C, the crowded-comparison operator; fitness and index are ours.
    """
    able = [each for each in individuals if np.isfinite([each.fitness, *each.objectives]).all()]
    points = np.array([each.objectives for each in able])
    ranked: list[Individual] = []
    for members in pareto.fronts(points) if able else []:
        keys = [
            (-distance, -able[i].fitness, able[i].index, i)
            for i, distance in zip(members, pareto.crowding(points[members]), strict=True)
        ]
        ranked += [able[key[-1]] for key in sorted(keys)]
    return ranked


class Genetic(SeededStrategy):
    """A genetic algorithm with (mu + lambda) elitism. ranking: sorts its population, the best first.

    Generation 0 is the seeds, filled up to `population` with seeds that are perturbed (by `sigma` of the range)
    and uniform draws in turn; without seeds, with uniform draws. Every later ask is a child: two parents, each
    the better of two drawn from the population, by SBX with probability 0.9, else one parent; then polynomial
    mutation with probability 1/genes a gene. Genes that are on or off cross uniformly and flip. A child whose
    genome was proposed before is mutated again, twice at most.

    update: "generational": the population changes when as many proposals as it holds were told (generation 0: all
    of it); it becomes the best of the old one and these. "steady-state": every told proposal competes with the
    worst at once. Either way an ask takes the population as it is and never waits; before there is one, asks are
    as in generation 0. A failed proposal is never in the population, and neither is a genome twice.

    Every ask draws from a generator of its own index, so there is no generator state.

    Reference: SBX: Deb and Agrawal 1995; mutation: Deb and Deb 2014; see `memmcl.evolve.operators`.
    """

    def __init__(
        self, arguments: Arguments, name: str = "genetic", ranking: Ranking = by_fitness, objectives: int = 0
    ) -> None:
        super().__init__(arguments)
        self.name = name
        self._ranking = ranking
        self._objectives = objectives  # that every tell must bring
        self._seen: set[Genome] = set()
        self._first = max(len(arguments.seeds), arguments.population)  # the size of generation 0
        self._population: list[Individual] = []  # best first
        self._generation = 0  # updates so far; of the steady state, `population` tells count as one
        self._told: list[Individual] = []  # since the last update

    def ask(self, recorded: Genome | None = None) -> Proposal:
        """Return the next seed, member of generation 0, or child of the population as it is."""
        proposal = super().ask(recorded)
        self._seen.add(proposal.genome)
        return proposal

    def _propose(self, index: int, recorded: Genome | None) -> Proposal:
        rng = np.random.default_rng(derive(self._arguments.seed, self.name, index))
        if index < self._first or not self._population:
            return self._fill(index - len(self._arguments.seeds), rng)
        return self._child(rng)

    def tell(self, index: int, fitness: float | None, objectives: Objectives | None = None) -> None:
        """Tell the fitness (maximised) of proposal `index`; see `Strategy`.

        Raises:
            SearchError: a finite fitness without the objectives that the ranking needs, or a wrong number of them.
        """
        count = self._objectives
        if count and math.isfinite(maximised(fitness)) and (objectives is None or len(objectives) != count):
            got = "none" if objectives is None else f"{len(objectives)}"
            raise SearchError(
                f"proposal {index} was told with {got} of {count} objectives; tell {self.name} all of them"
            )
        value = self._history.tell(index, fitness, objectives)
        proposal = self._history.proposals[index]
        several = self._history.objectives.get(index, ())
        self._told.append(Individual(index, proposal.genome, value, several))
        if self._arguments.update == "steady-state":
            self._survive(self._told[-1:])
        size = self._arguments.population if self._generation else self._first
        if len(self._told) == size:
            if self._arguments.update == "generational":
                self._survive(self._told)
            self._generation += 1
            self._told = []

    def _survive(self, told: Sequence[Individual]) -> None:
        """Keep the best `population` of the population and `told`, each genome once (its earliest proposal)."""
        candidates: dict[Genome, Individual] = {}
        for individual in (*self._population, *told):
            candidates.setdefault(individual.genome, individual)
        self._population = self._ranking(list(candidates.values()))[: self._arguments.population]

    def _fill(self, turn: int, rng: np.random.Generator) -> Proposal:
        arguments = self._arguments
        if not arguments.seeds or turn % 2:
            return self._history.ask(arguments.uniform(rng), "random:g0", 0)
        parent = turn // 2 % len(arguments.seeds)
        unit = perturb(arguments.to_unit(arguments.seeds[parent][1]), arguments.mask, arguments.sigma, rng)
        return self._history.ask(self._fresh(unit, rng), "mutation:g0", 0, (parent,))

    def _child(self, rng: np.random.Generator) -> Proposal:
        arguments, mask = self._arguments, self._arguments.mask
        first = self._tournament(self._population, rng)
        others = [individual for individual in self._population if individual is not first]
        parents, unit = [first], arguments.to_unit(first.genome)
        if others and rng.random() < CROSSOVER:
            second = self._tournament(others, rng)
            parents, unit = [first, second], cross(unit, arguments.to_unit(second.genome), mask, rng)
        genome = self._fresh(mutate(unit, mask, rng), rng)
        generation = max(1, self._generation)  # of a steady state that has children before its first count
        origin = "crossover" if len(parents) == 2 else "mutation"
        indices = tuple(parent.index for parent in parents)
        return self._history.ask(genome, f"{origin}:g{generation}", generation, indices)

    def _fresh(self, unit: Floats, rng: np.random.Generator) -> Genome:
        """Return the genome of `unit`, mutated again while it was proposed before, `REPEATS` times at most."""
        genome = self._arguments.from_unit(unit)
        for _ in range(REPEATS):
            if genome not in self._seen:
                break
            unit = mutate(unit, self._arguments.mask, rng, surely=True)
            genome = self._arguments.from_unit(unit)
        return genome

    @staticmethod
    def _tournament(ranked: Sequence[Individual], rng: np.random.Generator) -> Individual:
        return ranked[int(rng.integers(len(ranked), size=2).min())]  # of two, the better


def nsga2(arguments: Arguments) -> Genetic:
    """Return NSGA-II: `Genetic`, but survivors and tournaments go by Pareto front, then by crowding distance.

    Every tell with a finite fitness brings `objectives` numbers, all maximised; one that is not finite makes the
    proposal a failure. The fitness itself takes no part but in ties.

    Raises:
        ConfigError: no objectives.

    Reference: Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, IEEE TEC 6(2), 2002.
    """
    if arguments.objectives < 1:
        raise ConfigError(f"nsga2 needs objectives, got {arguments.objectives}; say how many a tell brings")
    return Genetic(arguments, "nsga2", by_dominance, arguments.objectives)
