"""CMA-ES, by the `cmaes` library: plain, with margin for genes that are on or off, separable, with restarts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from memmcl.errors import ConfigError
from memmcl.evolve.arguments import Arguments
from memmcl.evolve.strategy import Floats, Genome, Objectives, Proposal, SeededStrategy
from memmcl.seeds import derive

if TYPE_CHECKING:
    from cmaes import CMA, CMAwM, SepCMA

SEPARABLE_FROM = 65  # genes from which a diagonal covariance is the default: a full one costs genes^3 a sample


class CmaEs(SeededStrategy):
    """CMA-ES in coordinates in which every gene's bounds are 0 and 1.

    Seeds are proposed first. The distribution starts, at the first ask behind them, at the best seed told by
    then; if none was, at the mean of the seeds; without seeds, at the middle of the bounds. Asks between two
    updates sample from the current distribution, so they may run ahead of tells; tells are buffered until a
    population of CMA-ES's own proposals is complete. A failed proposal ranks behind the worst of its
    population; a population that failed as a whole teaches nothing and leaves the distribution as it is.

    Genes that are on or off: CMA-ES with margin, which keeps each from freezing; a seed that starts the
    distribution is a leaning there (mean 1/4 or 3/4), not a certainty. `separable`: a diagonal covariance, by
    default above 64 genes, none of them on or off.

    A distribution whose `should_stop()` holds is updated no more. With `restarts` another starts instead, with
    twice the population, at a mean drawn uniformly (IPOP); also once a whole population is one genome, since a smaller
    step is lost in rounding. Results of earlier distributions are not told to the new one: asks may run ahead over a
    restart. `origin` counts generations per restart ("cmaes:r1g1"), `Proposal.generation` over all of them.

    Raises:
        ConfigError: separable with one gene, or with genes that are on or off.

    Reference: Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772; margin: Hamano et al.,
    arXiv 2205.13482; separable: Ros and Hansen, PPSN 2008; IPOP: Auger and Hansen, CEC 2005.
    """

    name = "cmaes"

    def __init__(self, arguments: Arguments) -> None:
        if arguments.separable and (arguments.binary or arguments.genes < 2):
            raise ConfigError("separable CMA-ES needs two genes or more, none of them on or off; leave it unset")
        separable = arguments.separable
        if separable is None:
            separable = arguments.genes >= SEPARABLE_FROM and not arguments.binary
        super().__init__(replace(arguments, separable=separable))
        self._optimizer: CMA | CMAwM | SepCMA | None = None
        self._restart = 0
        self._past = 0  # generations of the distributions that are gone
        self._sampled: dict[int, tuple[int, Floats]] = {}  # open proposals: their restart, and what to tell
        self._told: list[tuple[Genome, Floats, float]] = []

    def _propose(self, index: int, recorded: Genome | None) -> Proposal:
        if self._optimizer is None:
            self._optimizer = self._build(self._first_mean())
        generation = self._optimizer.generation + 1
        sample = self._optimizer.ask()
        if self._arguments.binary:
            unit, point = sample  # with margin: what to evaluate, and the sample before it was discretised
            genome = self._arguments.from_unit(unit)
        else:
            genome = self._arguments.from_unit(sample)
            point = self._arguments.to_unit(genome)
        self._sampled[index] = self._restart, point
        origin = f"cmaes:r{self._restart}g{generation}" if self._restart else f"cmaes:g{generation}"
        return self._history.ask(genome, origin, self._past + generation)

    def tell(self, index: int, fitness: float | None, objectives: Objectives | None = None) -> None:
        """Tell the fitness (maximised) of proposal `index`; see `Strategy`."""
        value = self._history.tell(index, fitness, objectives)
        restart, point = self._sampled.pop(index, (-1, np.empty(0)))
        if self._optimizer is None or restart != self._restart:
            return
        self._told.append((self._history.proposals[index].genome, point, value))
        if len(self._told) == self._optimizer.population_size:
            self._update(self._optimizer)

    def _first_mean(self) -> Floats:
        arguments = self._arguments
        best = self._history.best_of(len(arguments.seeds))
        if best is not None:
            mean = arguments.to_unit(best.genome)
        elif arguments.seeds:
            mean = np.mean([arguments.to_unit(genome) for _, genome in arguments.seeds], axis=0)
        else:
            mean = np.full(arguments.genes, 0.5)
        return np.where(arguments.mask, np.clip(mean, 0.25, 0.75), mean)

    def _build(self, mean: Floats) -> CMA | CMAwM | SepCMA:
        # here, since it imports scipy.stats: half a second that only a search should pay
        from cmaes import CMA, CMAwM, SepCMA

        arguments = self._arguments
        names = ("restart", self._restart) if self._restart else ()
        options: dict[str, Any] = {
            "mean": np.clip(mean, 0.0, 1.0),
            "sigma": arguments.sigma,
            "bounds": np.tile([0.0, 1.0], (arguments.genes, 1)),
            "seed": derive(arguments.seed, "cmaes", *names) % 2**32,  # numpy's RandomState takes 32 bits
            "population_size": arguments.population * 2**self._restart,  # Auger and Hansen 2005, section II
        }
        if arguments.binary:
            return CMAwM(**options, steps=arguments.mask.astype(np.float64))
        return SepCMA(**options) if arguments.separable else CMA(**options)

    def _update(self, optimizer: CMA | CMAwM | SepCMA) -> None:
        told, self._told = self._told, []
        finite = [fitness for _, _, fitness in told if math.isfinite(fitness)]
        if not finite:
            return
        if not optimizer.should_stop():
            worst = min(finite) - 1.0
            # with the sign turned: cmaes minimises
            optimizer.tell([(point, -(value if math.isfinite(value) else worst)) for _, point, value in told])
        if self._arguments.restarts and (optimizer.should_stop() or len({genome for genome, _, _ in told}) == 1):
            self._restart += 1
            self._past += optimizer.generation
            rng = np.random.default_rng(derive(self._arguments.seed, "cmaes", "restart", self._restart, "mean"))
            self._optimizer = self._build(rng.random(self._arguments.genes))
