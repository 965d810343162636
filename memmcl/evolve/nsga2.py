"""NSGA-II: the genetic algorithm with a population ranked by Pareto fronts and crowding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memmcl.errors import ConfigError
from memmcl.evolve import pareto
from memmcl.evolve.arguments import Arguments
from memmcl.evolve.genetic import Genetic, Individual


def by_dominance(individuals: Sequence[Individual]) -> list[Individual]:
    """Return `individuals` without failures, by front, falling crowding distance, falling fitness, and index.

    Reference: Deb et al. 2002, section III.C, the crowded-comparison operator; fitness and index are ours.
    """
    able = [each for each in individuals if np.isfinite([each.fitness, *each.objectives]).all()]
    if not able:
        return []
    points = np.array([each.objectives for each in able])
    ranked: list[Individual] = []
    for members in pareto.fronts(points):
        keys = [
            (-distance, -able[i].fitness, able[i].index, i)
            for i, distance in zip(members, pareto.crowding(points[members]), strict=True)
        ]
        ranked += [able[key[-1]] for key in sorted(keys)]
    return ranked


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
