"""The arguments of a strategy, checked: what a search is a function of, beside its asks and tells."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from memmcl.config.strategies import GENERATIONAL, UPDATES
from memmcl.errors import ConfigError, GenomeError
from memmcl.evolve.strategy import Floats, Genome, expand_bounds, round_genome


@dataclass(frozen=True)
class Arguments:
    """The arguments of a strategy, checked and normalised as they are given.

    genes: length of a genome. bounds: one (low, high) for all genes or one per gene. seeds: (name, genome) proposed
    first, in order. population: proposals per generation; 0 means 4 + floor(3 ln genes). sigma: the first step as a
    fraction of each gene's range (of CMA-ES, and of the seeds that "genetic" and "nsga2" perturb). binary: genes that
    are exactly 0.0 or 1.0, their bounds (0, 1). restarts, separable: of CMA-ES, see `CmaEs`. update: "generational" or
    "steady-state", see `Genetic`. objectives: how many a tell brings, for "nsga2"; the others learn from the fitness
    alone.

    Raises:
        ConfigError: bounds, population, sigma, binary, update or objectives out of range.
        GenomeError: a seed of the wrong length, out of bounds, or between on and off.
    """

    genes: int
    bounds: tuple[tuple[float, float], ...]
    seeds: tuple[tuple[str, Genome], ...]
    seed: int
    population: int = 0
    sigma: float = 0.3
    binary: tuple[int, ...] = ()
    restarts: bool = False
    separable: bool | None = None
    update: str = GENERATIONAL
    objectives: int = 0

    def __post_init__(self) -> None:
        pairs, population = expand_bounds(self.bounds, self.genes), self.population
        if population == 0:
            population = 4 + math.floor(3 * math.log(self.genes))  # Hansen 2016, eq. 48
        if population < 4:
            raise ConfigError(f"search population must be at least 4, got {population}; raise it or leave it unset")
        if not 0 < self.sigma <= 1:
            raise ConfigError(f"search sigma is a fraction of the gene range in (0, 1], got {self.sigma}")
        if self.update not in UPDATES:
            raise ConfigError(f"search update must be one of {', '.join(UPDATES)}, got `{self.update}`")
        if self.objectives < 0:
            raise ConfigError(f"search objectives are counted from 0, got {self.objectives}")
        binary = _binary(self.binary, pairs)
        seeds = tuple((name, _seed(name, genome, pairs, binary)) for name, genome in self.seeds)
        normal = {"bounds": pairs, "population": population, "sigma": float(self.sigma), "binary": binary}
        vars(self).update(normal, seeds=seeds)  # frozen for all others

    @cached_property
    def low(self) -> Floats:
        """Lower bounds, (genes,) float64."""
        return np.array([low for low, _ in self.bounds])

    @cached_property
    def high(self) -> Floats:
        """Upper bounds, (genes,) float64."""
        return np.array([high for _, high in self.bounds])

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Which genes are on or off, (genes,) bool."""
        return np.isin(np.arange(self.genes), self.binary)

    def from_unit(self, unit: Floats) -> Genome:
        """Map `unit`, (genes,) with the bounds at 0 and 1, to a genome: rounded, inside the bounds."""
        return round_genome(self.low + unit * (self.high - self.low), self.bounds)

    def to_unit(self, genome: Genome) -> Floats:
        """Map a genome to coordinates (genes,) in which the bounds are 0 and 1."""
        return (np.array(genome) - self.low) / (self.high - self.low)

    def is_genome(self, genome: Genome) -> bool:
        """Return whether `from_unit` could return `genome`: as many genes, inside the bounds, rounded, on or off."""
        if len(genome) != self.genes or round_genome(genome, self.bounds) != genome:
            return False
        return all(genome[gene] in (0.0, 1.0) for gene in self.binary)

    def uniform(self, rng: np.random.Generator) -> Genome:
        """Return a genome drawn uniformly from the bounds; a fair coin per gene that is on or off."""
        unit = rng.random(self.genes)
        return self.from_unit(np.where(self.mask, unit < 0.5, unit))

    def to_json(self) -> dict[str, Any]:
        """Return the keyword arguments of `build_strategy` in JSON's types."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def _binary(binary: Sequence[int], pairs: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    switches = tuple(sorted(set(binary)))
    if switches and not 0 <= switches[0] <= switches[-1] < len(pairs):
        raise ConfigError(f"binary genes must be indices below {len(pairs)}, got {list(binary)}")
    for gene in switches:
        if pairs[gene] != (0.0, 1.0):
            raise ConfigError(f"gene {gene} is on or off: its bounds must be (0, 1), got {pairs[gene]}")
    return switches


def _seed(name: str, genome: Sequence[float], pairs: Sequence[tuple[float, float]], switches: Sequence[int]) -> Genome:
    if len(genome) != len(pairs):
        raise GenomeError(f"seed genome `{name}` has {len(genome)} genes; this search needs {len(pairs)}")
    if not all(low <= gene <= high for gene, (low, high) in zip(genome, pairs, strict=True)):
        raise GenomeError(f"seed genome `{name}` = {list(genome)} leaves the bounds; widen them or drop it")
    for gene in switches:
        if genome[gene] not in (0.0, 1.0):
            raise GenomeError(f"seed genome `{name}` has {genome[gene]} at gene {gene}, which is on (1) or off (0)")
    return round_genome(genome, pairs)
