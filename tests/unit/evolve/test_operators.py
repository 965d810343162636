"""Crossover and mutation against the distributions that their papers give."""

from __future__ import annotations

import numpy as np
import pytest

from memmcl.evolve.operators import cross, mutate, perturb, polynomial, sbx

COUNT = 40_000


def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_sbx_keeps_the_sum_of_the_parents_and_spreads_as_its_density_says() -> None:
    first, second = np.full(COUNT, 0.2), np.full(COUNT, 0.6)
    one, other = sbx(first, second, rng(), eta=1.0)
    assert one + other == pytest.approx(first + second, abs=1e-12)
    beta = np.abs(one - other) / 0.4
    crossed = beta[np.abs(beta - 1.0) > 1e-9]
    assert len(crossed) / COUNT == pytest.approx(0.5, abs=0.01)
    for value, probability in [(0.5, 0.5 * 0.5**2), (1.0, 0.5), (2.0, 1 - 0.5 / 2.0**2)]:  # of P(beta), eta = 1
        assert (crossed <= value).mean() == pytest.approx(probability, abs=0.01)
    assert (one > 0.4).mean() == pytest.approx(0.25, abs=0.01)  # half of the crossed genes change sides


def test_sbx_of_equal_parents_is_the_parent() -> None:
    parent = np.linspace(0.0, 1.0, 7)
    for child in sbx(parent, parent, rng()):
        assert child == pytest.approx(parent)


@pytest.mark.parametrize("point", [0.0, 0.03, 0.5, 0.9, 1.0])
def test_polynomial_mutation_stays_inside_and_goes_either_way_by_half(point: float) -> None:
    moved = polynomial(np.full(COUNT, point), rng()) - point
    assert (moved >= -point).all()
    assert (moved <= 1.0 - point).all()
    if 0.0 < point < 1.0:
        assert (moved < 0).mean() == pytest.approx(0.5, abs=0.01)
    if point == 0.5:
        for step in (0.02, 0.1):  # far from both bounds: P(delta < -step) = (1 - step)^(eta + 1) / 2
            assert (moved < -step).mean() == pytest.approx(0.5 * (1 - step) ** 21, abs=0.01)
            assert (moved > step).mean() == pytest.approx(0.5 * (1 - step) ** 21, abs=0.01)


def test_mutation_touches_one_gene_in_as_many_as_there_are_and_surely_one_if_asked() -> None:
    generator, mask = rng(), np.arange(20) < 10
    point = np.where(mask, 1.0, 0.4)
    changes = [(mutate(point, mask, generator) != point) for _ in range(2000)]
    assert np.sum(changes, axis=1).mean() == pytest.approx(1.0, abs=0.1)
    assert np.mean(changes, axis=0) == pytest.approx(np.full(20, 0.05), abs=0.025)
    assert not all(each.any() for each in changes)
    assert all((mutate(point, mask, generator, surely=True) != point).any() for _ in range(200))
    flipped = mutate(np.array([1.0]), np.array([True]), generator)
    assert flipped.tolist() == [0.0]


def test_crossover_takes_switches_from_either_parent_and_clips_the_rest() -> None:
    mask = np.arange(1000) < 500
    child = cross(np.where(mask, 1.0, 0.0), np.where(mask, 0.0, 1.0), mask, rng())
    assert set(child[mask]) == {0.0, 1.0}
    assert child[mask].mean() == pytest.approx(0.5, abs=0.1)
    assert child[~mask].min() == 0.0
    assert child[~mask].max() == 1.0
    assert ((child[~mask] > 0.0) & (child[~mask] < 1.0)).any()
    both = np.where(mask, 1.0, 0.5)
    assert (cross(both, both, mask, rng())[mask] == 1.0).all()


def test_perturbing_moves_by_sigma_and_flips_one_switch_in_as_many_as_there_are() -> None:
    mask = np.arange(COUNT) < COUNT // 2
    moved = perturb(np.where(mask, 1.0, 0.5), mask, 0.05, rng())
    assert moved[~mask].std() == pytest.approx(0.05, rel=0.05)
    assert set(moved[mask]) <= {0.0, 1.0}
    few = [perturb(np.ones(4), np.ones(4, dtype=bool), 0.3, generator) for generator in [rng()] for _ in range(2000)]
    assert np.mean(few) == pytest.approx(0.75, abs=0.03)
    assert perturb(np.array([0.0, 1.0] * 50), np.zeros(100, dtype=bool), 1.0, rng()).min() == 0.0
