"""What a search strategy is: ask / tell / state, and the notes every strategy keeps.

A strategy knows no workers and no time. Fitness is maximised everywhere; only the line that talks to a
minimiser flips the sign. A strategy is a function of its arguments and of the order of its asks and tells, so
`state()` holds exactly these and `memmcl.evolve.restore` replays them: no pickle, no generator state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from memmcl.errors import ConfigError, GenomeError, SearchError

log = logging.getLogger(__name__)

Genome = tuple[float, ...]
Bounds = tuple[float, float] | Sequence[tuple[float, float]]
DECIMALS = 6  # genomes are rounded to this, so that their JSON form is exact and equal on every machine


@dataclass(frozen=True)
class Proposal:
    """A genome to evaluate. `index` counts asks from 0; `origin` is e.g. "seed:uniform" or "cmaes:g3"."""

    index: int
    genome: Genome
    origin: str
    generation: int


class Strategy(Protocol):
    """A maximiser over genomes. Asks may run ahead of tells; each ask is told once, or never."""

    def ask(self) -> Proposal:
        """Return the next proposal; its index is the number of asks before it."""
        ...

    def tell(self, index: int, fitness: float | None) -> None:
        """Tell the fitness (higher is better) of proposal `index`; None or a non-finite one is a failure."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the JSON-ready arguments and ordered history from which `restore` rebuilds this strategy."""
        ...


@dataclass(frozen=True)
class Arguments:
    """Checked arguments of a strategy; build them with `check_arguments`.

    genes: length of a genome; bounds: one (low, high) per gene; seeds: (name, genome) proposed first, in
    order; population: proposals per generation; sigma: initial step, as a fraction of each gene's range.
    """

    genes: int
    bounds: tuple[tuple[float, float], ...]
    seeds: tuple[tuple[str, Genome], ...]
    seed: int
    population: int
    sigma: float

    @property
    def low(self) -> npt.NDArray[np.float64]:
        """Lower bounds, (genes,) float64."""
        return np.array([low for low, _ in self.bounds])

    @property
    def high(self) -> npt.NDArray[np.float64]:
        """Upper bounds, (genes,) float64."""
        return np.array([high for _, high in self.bounds])

    def from_unit(self, unit: npt.NDArray[np.float64]) -> Genome:
        """Map `unit`, (genes,) with the bounds at 0 and 1, to a genome: rounded, inside the bounds."""
        return round_genome(self.low + unit * (self.high - self.low), self.bounds)

    def to_unit(self, genome: Genome) -> npt.NDArray[np.float64]:
        """Map a genome to coordinates (genes,) in which the bounds are 0 and 1."""
        return (np.array(genome) - self.low) / (self.high - self.low)

    def to_json(self) -> dict[str, Any]:
        """Return the keyword arguments of `build_strategy` in JSON's types."""
        return {
            "genes": self.genes,
            "bounds": [list(pair) for pair in self.bounds],
            "seeds": [[name, list(genome)] for name, genome in self.seeds],
            "seed": self.seed,
            "population": self.population,
            "sigma": self.sigma,
        }


def check_arguments(
    *,
    genes: int,
    bounds: Bounds,
    seeds: Sequence[tuple[str, Sequence[float]]],
    seed: int,
    population: int | None,
    sigma: float,
) -> Arguments:
    """Return `Arguments`: bounds spread over the genes, seeds rounded, the default population filled in.

    population None means 4 + floor(3 ln genes).

    Raises:
        ConfigError: bounds, population or sigma out of range.
        GenomeError: a seed of the wrong length or out of bounds.
    """
    pairs = expand_bounds(bounds, genes)
    if population is None:
        population = 4 + math.floor(3 * math.log(genes))  # Hansen 2016, eq. 48
    if population < 4:
        raise ConfigError(f"search population must be at least 4, got {population}; raise it or leave it unset")
    if not 0 < sigma <= 1:
        raise ConfigError(f"search sigma is a fraction of the gene range in (0, 1], got {sigma}")
    checked = []
    for name, genome in seeds:
        if len(genome) != genes:
            raise GenomeError(f"seed genome `{name}` has {len(genome)} genes; this search needs {genes}")
        inside = all(low <= gene <= high for gene, (low, high) in zip(genome, pairs, strict=True))
        if not inside:
            raise GenomeError(f"seed genome `{name}` = {list(genome)} leaves the bounds; widen them or drop it")
        checked.append((name, round_genome(genome, pairs)))
    return Arguments(genes, pairs, tuple(checked), seed, population, float(sigma))


def expand_bounds(bounds: Bounds, genes: int) -> tuple[tuple[float, float], ...]:
    """Return one (low, high) per gene from one pair for all genes, or one pair per gene.

    Raises:
        ConfigError: no genes, a wrong number of pairs, or a pair without low < high (both finite).
    """
    if genes < 1:
        raise ConfigError(f"a search needs at least one gene, got {genes}; are there experts to merge?")
    array = np.asarray(bounds, dtype=np.float64)
    if array.shape == (2,):
        array = np.tile(array, (genes, 1))
    if array.shape != (genes, 2):
        raise ConfigError(f"bounds must be one (low, high) or {genes} of them, got shape {array.shape}")
    if not (np.isfinite(array).all() and (array[:, 0] < array[:, 1]).all()):
        raise ConfigError(f"bounds must be finite with low < high, got {array.tolist()}")
    return tuple((float(low), float(high)) for low, high in array)


def round_genome(genome: Sequence[float] | npt.NDArray[np.float64], bounds: Sequence[tuple[float, float]]) -> Genome:
    """Return `genome` rounded to `DECIMALS`, clipped to `bounds` (one pair per gene), without -0.0."""
    limits = np.array(bounds)
    rounded = np.clip(np.round(np.asarray(genome, dtype=np.float64), DECIMALS), limits[:, 0], limits[:, 1])
    return tuple(float(gene) + 0.0 for gene in rounded)  # -0.0 + 0.0 is 0.0


def maximised(fitness: float | None) -> float:
    """Return `fitness`, or -inf where it is None, NaN or infinite: a failure, below everything."""
    return float(fitness) if fitness is not None and math.isfinite(fitness) else -math.inf


@dataclass
class History:
    """The asks and tells of one strategy in their order: all of its state beside the arguments."""

    proposals: list[Proposal] = field(default_factory=list)
    fitness: dict[int, float] = field(default_factory=dict)
    events: list[list[Any]] = field(default_factory=list)

    def ask(self, genome: Genome, origin: str, generation: int) -> Proposal:
        """Note an ask and return its proposal."""
        proposal = Proposal(len(self.proposals), genome, origin, generation)
        self.proposals.append(proposal)
        self.events.append(["ask", list(genome)])
        return proposal

    def tell(self, index: int, fitness: float | None) -> float:
        """Note a tell and return the fitness with failures as -inf.

        Raises:
            SearchError: the index was never asked, or was told before.
        """
        if not 0 <= index < len(self.proposals):
            raise SearchError(f"told proposal {index}; only {len(self.proposals)} were asked; tell what was asked")
        if index in self.fitness:
            raise SearchError(f"proposal {index} was told twice; tell each proposal once")
        value = maximised(fitness)
        if value == -math.inf:
            genome = list(self.proposals[index].genome)
            log.warning("proposal %d failed (fitness %s counts as -inf), genome %s", index, fitness, genome)
        self.fitness[index] = value
        self.events.append(["tell", index, value if math.isfinite(value) else None])
        return value

    def best_of(self, first: int) -> Proposal | None:
        """Return the best told proposal with a finite fitness among the `first` ones (ties: the earlier)."""
        told = [(-value, index) for index, value in self.fitness.items() if index < first and value > -math.inf]
        return self.proposals[min(told)[1]] if told else None
