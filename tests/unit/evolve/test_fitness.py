"""Retention, fitness and NAI against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from memmcl.errors import SearchError
from memmcl.evolve.fitness import fitness, loglik_retention, nai, retention


@pytest.mark.parametrize(
    ("score", "reference", "expected"),
    [(0.6, 0.8, 0.75), (0.8, 0.8, 1.0), (0.9, 0.6, 1.2), (0.01, 0.0, 0.2), (0.04, 0.02, 0.8), (0.0, 0.5, 0.0)],
)
def test_retention(score: float, reference: float, expected: float) -> None:
    assert retention(score, reference) == pytest.approx(expected)


def test_retention_settings_and_nan() -> None:
    assert retention(0.9, 0.3, clip=2.0) == 2.0
    assert retention(0.1, 0.1, floor=0.5) == pytest.approx(0.2)
    assert math.isnan(retention(math.nan, 0.5))


def test_loglik_retention() -> None:
    assert loglik_retention(-1.0, -1.0) == 1.0
    assert loglik_retention(-2.0, -1.0) == pytest.approx(math.exp(-1))
    assert loglik_retention(-0.9, -1.0) == pytest.approx(math.exp(0.1))
    assert loglik_retention(-0.5, -1.0) == 1.2
    assert loglik_retention(0.0, -1e6) == 1.2  # exp would overflow
    assert loglik_retention(-math.inf, -1.0) == 0.0
    assert math.isnan(loglik_retention(math.nan, -1.0))


def test_fitness_is_the_mean_whatever_the_order() -> None:
    assert fitness({"a": 0.1, "b": 0.5}) == pytest.approx(0.3)
    values = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 1e-17}
    assert fitness(values) == fitness(dict(reversed(values.items())))
    assert math.isnan(fitness({"a": math.nan, "b": 1.0}))
    with pytest.raises(SearchError, match="at least one subtask"):
        fitness({})


def test_nai() -> None:
    assert nai(0.6, 0.4, 0.8) == pytest.approx(0.5)
    assert nai(0.4, 0.4, 0.8) == 0.0
    assert nai(0.3, 0.4, 0.2) == pytest.approx(0.5)  # an expert below its base
    assert nai(0.6, 0.5, 0.5) is None
    assert nai(0.6, 0.5, 0.5 + 1e-10) is None
    assert nai(math.nan, 0.5, 0.8) is None
