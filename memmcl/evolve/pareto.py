"""Pareto fronts and crowding of points with several objectives, all maximised. Pure functions of arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memmcl.evolve.strategy import Floats


def fronts(objectives: Floats) -> list[list[int]]:
    """Return the indices of `objectives`, (points, k) float64, by front: the best first, each in rising order.

    A point dominates another that it is nowhere below and somewhere above; -inf is below all numbers. The
    first front is dominated by nobody, the next one by nobody but the first, and so on.

    Reference: Deb et al., A fast and elitist multiobjective genetic algorithm: NSGA-II, 2002, section III.A.
    """
    points = np.asarray(objectives, dtype=np.float64)
    above: npt.NDArray[np.bool_] = np.all(points[:, None, :] >= points[None, :, :], axis=2)
    dominates = above & ~above.T  # nowhere below, and not equal
    dominators = dominates.sum(axis=0)
    left = np.ones(len(points), dtype=bool)
    ranked: list[list[int]] = []
    while left.any():
        members = np.flatnonzero(left & (dominators == 0))
        ranked.append(members.tolist())
        left[members] = False
        dominators = dominators - dominates[members].sum(axis=0)
    return ranked


def front(objectives: Floats) -> list[int]:
    """Return the indices of the points, (points, k), that no other dominates, in rising order."""
    return next(iter(fronts(objectives)), [])


def crowding(objectives: Floats) -> Floats:
    """Return the crowding distance, (points,) float64, of `objectives`, (points, k), finite, of one front.

    Per objective, the gap between a point's two neighbours over the range of all; infinite at both ends. Equal
    values stand in order of their indices. An objective in which all points are equal adds nothing.

    Reference: Deb et al. 2002, section III.B.
    """
    points = np.asarray(objectives, dtype=np.float64)
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        ranked = values[order]
        if len(points) == 0 or ranked[-1] == ranked[0]:
            continue
        gaps = (ranked[2:] - ranked[:-2]) / (ranked[-1] - ranked[0])  # Deb et al. 2002, crowding-distance-assignment
        distance[order[1:-1]] += gaps
        distance[order[[0, -1]]] = np.inf
    return distance
