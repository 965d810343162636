"""Fronts and crowding against their definitions, point by point."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.evolve import pareto

Points = list[list[float]]
VALUES = st.integers(-2, 2).map(float) | st.floats(-1.0, 1.0)  # with ties


def points_of(width: int) -> st.SearchStrategy[Points]:
    return st.lists(st.lists(VALUES, min_size=width, max_size=width), min_size=1, max_size=14)


POINTS = st.integers(1, 4).flatmap(points_of)


def dominates(one: list[float], other: list[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))


def peeled(points: Points) -> list[list[int]]:
    left, found = set(range(len(points))), []
    while left:
        layer = sorted(i for i in left if not any(dominates(points[j], points[i]) for j in left))
        found.append(layer)
        left -= set(layer)
    return found


def neighbours(points: Points) -> list[float]:
    distance = [0.0] * len(points)
    for k in range(len(points[0])):
        order = sorted(range(len(points)), key=lambda i: (points[i][k], i))
        low, high = points[order[0]][k], points[order[-1]][k]
        if low == high:
            continue
        for place, i in enumerate(order):
            if place in (0, len(order) - 1):
                distance[i] = math.inf
            else:
                distance[i] += (points[order[place + 1]][k] - points[order[place - 1]][k]) / (high - low)
    return distance


@settings(max_examples=60, deadline=None)
@given(points=POINTS)
def test_fronts_are_peeled_off_one_by_one(points: Points) -> None:
    assert pareto.fronts(np.array(points)) == peeled(points)
    assert pareto.front(np.array(points)) == peeled(points)[0]


@settings(max_examples=60, deadline=None)
@given(points=POINTS)
def test_crowding_is_the_gap_between_neighbours(points: Points) -> None:
    assert pareto.crowding(np.array(points)).tolist() == pytest.approx(neighbours(points))
