"""Bayesian optimisation: its process against scikit-learn's, and what it proposes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from memmcl.errors import ConfigError
from memmcl.evolve import Proposal, Strategy, build_strategy
from memmcl.evolve.bayesian import LENGTHS, NOISES, POINTS, Process, _without_outliers

TARGET = np.array([0.2, 0.9, 1.3])


def sphere(genome: tuple[float, ...]) -> float:
    return -float(((np.array(genome) - TARGET) ** 2).sum())


def drive(
    strategy: Strategy, count: int, lookahead: int = 0, fitness: Callable[[tuple[float, ...]], float | None] = sphere
) -> list[Proposal]:
    proposals: list[Proposal] = []
    for index in range(count):
        if index > lookahead:
            told = proposals[index - lookahead - 1]
            strategy.tell(told.index, fitness(told.genome))
        proposals.append(strategy.ask())
    return proposals


def make(**changes: Any) -> Strategy:
    arguments: dict[str, Any] = {
        "genes": 3,
        "bounds": (0.0, 1.5),
        "seeds": [],
        "seed": 5,
        "population": 4,
        "sigma": 0.15,
    }
    return build_strategy("bayesian", **{**arguments, **changes})


def data(count: int = 24, noise: float = 0.05) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    points = rng.random((count, 3))
    return points, np.sin(3 * points).sum(1) + noise * rng.normal(size=count)


def peer(process: Process) -> GaussianProcessRegressor:
    """Return scikit-learn's process with the same settings."""
    kernel = ConstantKernel(process.variance) * Matern(process.length, nu=2.5)
    kernel += WhiteKernel(process.variance * process.noise)
    return GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None).fit(
        process.points, process.values - process.mean
    )


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many results each process is fitted to."""
    sizes: list[int] = []
    fitted = Process.fitted
    monkeypatch.setattr(
        "memmcl.evolve.bayesian.Process.fitted",
        lambda points, values: sizes.append(len(points)) or fitted(points, values),
    )
    return sizes


def test_the_process_expects_what_scikit_learns_expects() -> None:
    process = Process.fitted(*data())
    points = np.random.default_rng(1).random((40, 3))
    mean, deviation = process.expect(points)
    theirs, spread = peer(process).predict(points, return_std=True)
    np.testing.assert_allclose(mean, theirs + process.mean, atol=1e-7)
    noisy = np.sqrt(deviation**2 + process.variance * process.noise)  # theirs is of a noisy value
    np.testing.assert_allclose(noisy, spread, atol=1e-7)
    assert (process.hope(points) > mean).all()


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_length_and_noise_are_the_likeliest_of_the_grid(noise: float) -> None:
    points, values = data(noise=noise)
    process = Process.fitted(points, values)
    ours = peer(process).log_marginal_likelihood_value_
    for length, share in product(LENGTHS * np.sqrt(3), NOISES):
        other = Process(points, values, float(length), share, process.mean, process.variance)
        assert peer(other).log_marginal_likelihood_value_ <= ours + 1e-6
    for factor in (0.9, 1.1):
        wider = Process(points, values, process.length, process.noise, process.mean, process.variance * factor)
        moved = Process(points, values, process.length, process.noise, process.mean + factor - 1, process.variance)
        for other in (wider, moved):
            assert peer(other).log_marginal_likelihood_value_ < ours


def test_what_is_believed_of_open_points_changes_no_expectation_and_ends_doubt_there() -> None:
    process = Process.fitted(*data(noise=0.0))
    open_points, points = np.random.default_rng(2).random((3, 3)), np.random.default_rng(3).random((20, 3))
    believing = process.believing(open_points)
    np.testing.assert_allclose(believing.expect(points)[0], process.expect(points)[0], atol=1e-3)
    assert (believing.expect(points)[1] <= process.expect(points)[1] + 1e-9).all()
    doubt = np.sqrt(process.variance * process.noise)
    assert (believing.expect(open_points)[1] <= doubt + 1e-9).all()


def test_results_far_below_the_median_are_drawn_near() -> None:
    values = np.array([1.0, 2.0, 3.0, -100.0, 2.0])
    assert _without_outliers(values).tolist() == [1.0, 2.0, 3.0, -1.0, 2.0]
    assert _without_outliers(np.full(3, 0.5)).tolist() == [0.5] * 3


@pytest.mark.parametrize("lookahead", [0, 4])
def test_the_optimum_is_found_in_a_fraction_of_what_cmaes_needs(lookahead: int) -> None:
    assert max(sphere(one.genome) for one in drive(make(), 30, lookahead)) > -1e-4
    cmaes = build_strategy("cmaes", genes=3, bounds=(0.0, 1.5), seeds=[], seed=5, population=4, sigma=0.15)
    assert max(sphere(one.genome) for one in drive(cmaes, 30, lookahead)) < -1e-3


def test_an_optimum_in_a_corner_is_found() -> None:
    best = max(drive(make(), 30, fitness=sum), key=lambda one: sum(one.genome))
    assert best.genome == pytest.approx((1.5, 1.5, 1.5), abs=1e-3)


def test_open_proposals_keep_their_distance_while_there_is_doubt() -> None:
    strategy = make()
    for _ in range(8):
        proposal = strategy.ask()
        strategy.tell(proposal.index, sphere(proposal.genome))
    points = np.array([strategy.ask().genome for _ in range(5)])
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(5, 1)]
    assert distances.min() > 0.02


def test_genes_that_are_on_or_off_are_tried_in_every_combination_before_one_twice() -> None:
    strategy = make(bounds=(0.0, 1.0), binary=[0, 1, 2])
    proposals = drive(strategy, 9, fitness=lambda genome: genome[0] - genome[1])
    rest = drive(make(bounds=(0.0, 1.0), binary=[0, 1, 2], population=4), 40, fitness=lambda genome: genome[0])
    assert {value for one in rest for value in one.genome} == {0.0, 1.0}
    assert len({one.genome for one in rest}) == 8
    assert len({one.genome for one in proposals[4:8]} - {one.genome for one in proposals[:4]}) == 4
    assert rest[-1].genome[0] == 1.0


def test_switches_and_coefficients_are_searched_together() -> None:
    def fitness(genome: tuple[float, ...]) -> float:
        return -((genome[0] - 0.4) ** 2) - (genome[1] - 1) ** 2 - (genome[2] - 0.3) ** 2 * genome[1]

    bounds = [(0.0, 1.0), (0.0, 1.0), (0.0, 1.5)]
    assert max(fitness(one.genome) for one in drive(make(bounds=bounds, binary=[1]), 40, fitness=fitness)) > -1e-3


def test_failures_are_kept_away_from() -> None:
    def fitness(genome: tuple[float, ...]) -> float | None:
        return None if genome[0] > 0.75 else sum(genome)

    proposals = drive(make(), 60, fitness=fitness)
    failed = [one.index for one in proposals if fitness(one.genome) is None]
    assert failed, "draws that came first"
    assert len([index for index in failed if index >= 40]) < 15
    best = max((one.genome for one in proposals if fitness(one.genome) is not None), key=sum)
    assert sum(best) > 0.75 + 3.0 - 0.15


def test_results_that_are_all_alike_or_all_failures_still_let_it_propose() -> None:
    for value in (1.0, None):
        proposals = drive(make(), 20, fitness=lambda _, value=value: value)
        assert len({one.genome for one in proposals}) == 20


def test_more_results_than_the_process_takes_keep_it_at_its_size(
    fits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memmcl.evolve.bayesian.POINTS", 16)
    assert max(sphere(one.genome) for one in drive(make(), 50)) > -1e-4
    assert max(fits) <= 16 < POINTS
    assert fits[:4] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "recorded",
    [(), (0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 1.6), (0.5, 0.5, float("nan")), (0.5, 0.5, 1 / 3)],
    ids=["empty", "short", "long", "out of bounds", "no number", "not rounded"],
)
def test_a_record_that_can_be_no_genome_of_the_search_is_passed_over(
    recorded: tuple[float, ...], fits: list[int]
) -> None:
    strategy, undisturbed = make(), make()
    for each in (strategy, undisturbed):
        drive(each, 8)
        each.tell(7, 0.0)
    fits.clear()
    assert strategy.ask(recorded) == undisturbed.ask()
    assert fits == [8, 8]


def test_a_recorded_genome_is_taken_unless_it_is_between_on_and_off(fits: list[int]) -> None:
    bounds = [(0.0, 1.0), (0.0, 1.0), (0.0, 1.5)]
    strategy = make(bounds=bounds, binary=[1])
    drive(strategy, 8)
    strategy.tell(7, 0.0)
    fits.clear()
    assert strategy.ask((0.25, 1.0, 1.5)).genome == (0.25, 1.0, 1.5)
    assert fits == []
    assert strategy.ask((0.25, 0.5, 1.5)).genome[1] in (0.0, 1.0)
    assert fits == [8]


def test_a_steady_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="learns from every result anyway"):
        make(update="steady-state")
