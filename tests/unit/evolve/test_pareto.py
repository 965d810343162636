"""Fronts and crowding by hand; tests/property compares them with their definitions."""

from __future__ import annotations

import math

import numpy as np

from memmcl.evolve import pareto


def test_fronts_by_hand() -> None:
    points = np.array([[1.0, 1.0], [2.0, 1.0], [1.0, 3.0], [0.0, 0.0], [2.0, 1.0], [1.5, 2.0]])
    assert pareto.fronts(points) == [[1, 2, 4, 5], [0], [3]]  # equal points share a front
    assert pareto.front(points) == [1, 2, 4, 5]


def test_the_front_of_one_objective_is_the_maximum_and_of_nothing_nothing() -> None:
    assert pareto.fronts(np.array([[1.0], [3.0], [-math.inf], [3.0]])) == [[1, 3], [0], [2]]
    assert pareto.front(np.zeros((0, 2))) == []
    assert pareto.crowding(np.zeros((0, 2))).tolist() == []


def test_crowding_by_hand() -> None:
    points = np.array([[0.0, 4.0], [1.0, 3.0], [3.0, 1.0], [4.0, 0.0]])
    assert pareto.crowding(points).tolist() == [math.inf, 3 / 4 + 3 / 4, 3 / 4 + 3 / 4, math.inf]
    constant = np.array([[0.0, 7.0], [1.0, 7.0], [4.0, 7.0]])
    assert pareto.crowding(constant).tolist() == [math.inf, 1.0, math.inf]
    assert pareto.crowding(np.ones((3, 2))).tolist() == [0.0] * 3
