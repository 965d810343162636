"""What a search strategy is: ask / tell / state, and the notes every strategy keeps.

A strategy knows no workers and no time. Fitness is maximised everywhere. A strategy is a function of its arguments and
of the order of its asks and tells, so `state()` holds exactly these, and `restore` repeats them: no pickle, no state of
a random generator. Costly asks are not computed again: `ask` can be passed the genome that it returned then.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from memmcl.errors import ConfigError, SearchError

if TYPE_CHECKING:
    from memmcl.evolve.arguments import Arguments

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Genome = tuple[float, ...]
Bounds = tuple[float, float] | Sequence[tuple[float, float]]
Objectives = Sequence[float | None]
DECIMALS = 6  # genomes are rounded to this, so that their JSON form is exact and equal on every machine


@dataclass(frozen=True)
class Proposal:
    """A genome to evaluate.

    index: counts asks from 0; origin: operator and generation, as "seed:uniform", "cmaes:g3", "cmaes:r1g1" (after
    a restart), "crossover:g4", "mutation:g4", "random:g1"; parents: indices of the proposals that it was bred
    from.
    """

    index: int
    genome: Genome
    origin: str
    generation: int
    parents: tuple[int, ...] = ()


class Strategy(Protocol):
    """A maximiser over genomes. Asks may run ahead of tells; each ask is told once, or never."""

    def ask(self, recorded: Genome | None = None) -> Proposal:
        """Return the next proposal; its index is the number of asks before it.

        recorded: what an earlier process was given at this ask, after the same asks and tells. A strategy whose asks
        are costly takes it, if it can be one of its genomes, instead of computing it again; others may pass over it.
        """

    def tell(self, index: int, fitness: float | None, objectives: Objectives | None = None) -> None:
        """Tell the fitness (higher is better) of proposal `index`; None or a non-finite one is a failure.

        objectives: higher is better too; strategies of one objective note them and learn from `fitness` alone.
        """

    def state(self) -> dict[str, Any]:
        """Return the JSON-ready arguments and ordered history from which `restore` rebuilds this strategy."""


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


def round_genome(genome: Sequence[float] | Floats, bounds: Sequence[tuple[float, float]]) -> Genome:
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
    objectives: dict[int, tuple[float, ...]] = field(default_factory=dict)
    events: list[list[Any]] = field(default_factory=list)

    def ask(self, genome: Genome, origin: str, generation: int, parents: tuple[int, ...] = ()) -> Proposal:
        """Note an ask and return its proposal."""
        proposal = Proposal(len(self.proposals), genome, origin, generation, parents)
        self.proposals.append(proposal)
        self.events.append(["ask", list(genome)])
        return proposal

    def tell(self, index: int, fitness: float | None, objectives: Objectives | None = None) -> float:
        """Note a tell and return the fitness with failures as -inf; failed objectives are noted as -inf too.

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
        event: list[Any] = ["tell", index, _plain(value), None]
        if objectives is not None:
            self.objectives[index] = tuple(maximised(objective) for objective in objectives)
            event[3] = [_plain(objective) for objective in self.objectives[index]]
        self.events.append(event)
        return value

    def best_of(self, first: int) -> Proposal | None:
        """Return the best told proposal with a finite fitness among the `first` ones (ties: the earlier)."""
        told = [(-value, index) for index, value in self.fitness.items() if index < first and value > -math.inf]
        return self.proposals[min(told)[1]] if told else None


class SeededStrategy(ABC):
    """What all strategies share: the seeds are proposed first, and asks and tells are noted."""

    name: str

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self._history = History()

    def ask(self, recorded: Genome | None = None) -> Proposal:
        """Return the next seed, or a genome of the strategy's own; see `Strategy`."""
        seeds, index = self._arguments.seeds, len(self._history.proposals)
        if index < len(seeds):
            return self._history.ask(seeds[index][1], f"seed:{seeds[index][0]}", 0)
        return self._propose(index, recorded)

    @abstractmethod
    def _propose(self, index: int, recorded: Genome | None) -> Proposal:
        """Return proposal `index`, the seeds behind it."""

    def tell(self, index: int, fitness: float | None, objectives: Objectives | None = None) -> None:
        """Tell the fitness (maximised) of proposal `index`; see `Strategy`."""
        self._history.tell(index, fitness, objectives)

    def state(self) -> dict[str, Any]:
        """Return arguments and history, JSON-ready; see `memmcl.evolve.restore`."""
        events = [list(event) for event in self._history.events]
        return {"strategy": self.name, "arguments": self._arguments.to_json(), "history": events}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
