"""Random search, and Bayesian optimisation: a Gaussian process through all results, asked where it expects the most."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from memmcl.evolve.strategy import Floats, Genome, Proposal, SeededStrategy
from memmcl.seeds import derive

LENGTHS = np.geomspace(0.1, 2.5, 10)
"""Length scales that the likelihood chooses from, in units of the diagonal of a unit cube."""
NOISES = (1e-5, 1e-4, 1e-3, 1e-2)
"""Variances of the noise that it chooses from, as shares of the process's own."""
POINTS = 256
"""Results that the process goes through at most: half of them the best, half the latest."""
EXPLORE = 1.0
"""Standard deviations by which a genome may be better than expected."""
DRAWS, LEADERS, NEAR, REFINED = 256, 5, 128, 64
"""Genomes compared at an ask: drawn uniformly; around the best so many, at each of three steps; around the first three
of these."""


class RandomSearch(SeededStrategy):
    """The seeds, then uniform draws from the bounds, each from a seed of its own index; `population` a generation.

    The baseline at equal budget of every other strategy.
    """

    name = "random"

    def _propose(self, index: int, recorded: Genome | None) -> Proposal:
        rng = np.random.default_rng(derive(self._arguments.seed, self.name, index))
        generation = 1 + (index - len(self._arguments.seeds)) // self._arguments.population
        return self._history.ask(self._genome(rng, recorded), f"{self.name}:g{generation}", generation)

    def _genome(self, rng: np.random.Generator, recorded: Genome | None) -> Genome:
        return self._arguments.uniform(rng)


class Bayesian(RandomSearch):
    """The seeds, then the genomes of which a Gaussian process expects the most, in bounds scaled to 0 and 1.

    The process has a constant mean and a Matérn 5/2 kernel with one length for all genes, which is chosen, with the
    noise, by marginal likelihood at every ask. It is asked for mean plus `EXPLORE` standard deviations, over uniform
    draws and steps around the best results. The widest of these steps is `sigma`. Open proposals count as told, with
    what is expected of them, so that asks that run ahead of tells do not repeat each other. Failures count as the worst
    result, and results far below the median as less far. Fewer results than `population`: a uniform draw.

    A genome that was proposed before is proposed again only if everything compared was.

    An ask depends only on the results told, the genomes asked before it, and its index. So one whose genome is on
    record takes it from there, and no process is fitted.

    Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, chapters 2, 4 and 5; mean plus
    standard deviations: Srinivas et al., arXiv 0912.3995; open proposals: Ginsbourger et al., Kriging is well-suited to
    parallelize optimization, 2010.
    """

    name = "bayesian"

    def _genome(self, rng: np.random.Generator, recorded: Genome | None) -> Genome:
        told = {at: value for at, value in self._history.fitness.items() if value > -math.inf}
        if len(told) < self._arguments.population:
            return super()._genome(rng, recorded)
        if recorded is not None and self._arguments.is_genome(recorded):
            return recorded
        return self._best(rng, told)

    def _best(self, rng: np.random.Generator, told: dict[int, float]) -> Genome:
        arguments, proposals = self._arguments, self._history.proposals
        worst = min(told.values())
        known = {at: told.get(at, worst) for at in self._history.fitness}
        ranked = sorted(known, key=lambda at: (-known[at], at))
        kept = sorted({*ranked[: POINTS // 2], *list(known)[-POINTS // 2 :]})
        points = np.stack([arguments.to_unit(proposals[at].genome) for at in kept])
        process = Process.fitted(points, _without_outliers(np.array([known[at] for at in kept])))
        pending = [arguments.to_unit(one.genome) for one in proposals if one.index not in self._history.fitness]
        if pending:
            process = process.believing(np.stack(pending))

        best = [at for at in ranked if at in told][:LEADERS]
        leaders = np.stack([arguments.to_unit(proposals[at].genome) for at in best])
        steps = np.repeat(arguments.sigma * np.array([1.0, 1 / 3, 1 / 9]), NEAR)
        uniform = np.stack([arguments.to_unit(arguments.uniform(rng)) for _ in range(DRAWS)])
        drawn = np.concatenate([uniform, self._near(rng, leaders[rng.integers(len(leaders), size=len(steps))], steps)])
        hopes = process.hope(drawn)
        first = drawn[np.argsort(-hopes, kind="stable")[:3]]
        steps = np.tile(arguments.sigma * np.geomspace(1 / 3, 1 / 50, REFINED), len(first))
        refined = self._near(rng, np.repeat(first, REFINED, axis=0), steps)
        compared, hopes = np.concatenate([drawn, refined]), np.concatenate([hopes, process.hope(refined)])
        order = np.argsort(-hopes, kind="stable")
        proposed = {one.genome for one in proposals}
        genomes = (arguments.from_unit(compared[at]) for at in order)
        return next((genome for genome in genomes if genome not in proposed), arguments.from_unit(compared[order[0]]))

    def _near(self, rng: np.random.Generator, centres: Floats, steps: Floats) -> Floats:
        """Return a point near each centre; of genes that are on or off, one on average is switched."""
        mask = self._arguments.mask
        moved = centres + steps[:, None] * rng.normal(size=centres.shape)
        switched = np.where(rng.random(centres.shape) * mask.sum() < 1, 1 - centres, centres)
        return np.clip(np.where(mask, switched, moved), 0.0, 1.0)


@dataclass(frozen=True)
class Process:
    """A Gaussian process through values at points.

    points: (n, genes); values: (n,); length: of the kernel; noise: share of the variance; mean: of the process;
    variance: of the process, without noise.
    """

    points: Floats
    values: Floats
    length: float
    noise: float
    mean: float
    variance: float

    @classmethod
    def fitted(cls, points: Floats, values: Floats) -> Process:
        """Return the process of the greatest marginal likelihood (Rasmussen and Williams 2006, eq. 5.8)."""
        distances = _distances(points, points)
        best, process = -math.inf, None
        for length in LENGTHS * math.sqrt(points.shape[1]):
            spectrum, axes = np.linalg.eigh(_matern(distances / length))
            across, ones = axes.T @ values, axes.sum(0)
            for noise in NOISES:
                weights = 1 / (spectrum.clip(0) + noise)
                mean = float((weights * ones * across).sum() / (weights * ones * ones).sum())
                variance = float((weights * (across - mean * ones) ** 2).mean())
                likelihood = float(np.log(weights).sum()) - len(values) * math.log(max(variance, 1e-300))
                if likelihood > best:
                    best, process = likelihood, cls(points, values, float(length), noise, mean, variance)
        assert process is not None, "a likelihood of finite values is finite"
        return process

    def expect(self, points: Floats) -> tuple[Floats, Floats]:
        """Return mean and standard deviation at points (k, genes), each (k,), without noise."""
        covariance = _matern(_distances(self.points, self.points) / self.length)
        covariance[np.diag_indices(len(covariance))] += self.noise
        across = _matern(_distances(self.points, points) / self.length)
        solved = np.linalg.solve(covariance, np.column_stack([self.values - self.mean, across]))
        left = 1 - (across * solved[:, 1:]).sum(0)
        return self.mean + across.T @ solved[:, 0], np.sqrt(self.variance * left.clip(0))

    def hope(self, points: Floats) -> Floats:
        """Return mean plus `EXPLORE` standard deviations at points (k, genes), (k,)."""
        mean, deviation = self.expect(points)
        return mean + EXPLORE * deviation

    def believing(self, points: Floats) -> Process:
        """Return the process to which the points were told, with what is expected of them."""
        points, values = np.concatenate([self.points, points]), np.concatenate([self.values, self.expect(points)[0]])
        return replace(self, points=points, values=values)


def _without_outliers(values: Floats) -> Floats:
    """Return values; those more than three times as far below the median as the best is above, as just so far."""
    middle, best = np.median(values), values.max()
    return np.maximum(values, middle - 3 * (best - middle)) if best > middle else values


def _distances(left: Floats, right: Floats) -> Floats:
    """Return the distance of each left from each right point, (n, k)."""
    squares: Floats = (left**2).sum(1)[:, None] + (right**2).sum(1)[None] - 2 * left @ right.T
    distances: Floats = np.sqrt(squares.clip(0))
    return distances


def _matern(distances: Floats) -> Floats:
    """Return the Matérn 5/2 correlation of points so many lengths apart (Rasmussen and Williams 2006, eq. 4.17)."""
    scaled = math.sqrt(5) * distances
    return (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
