"""The variants of CMA-ES: margin and separable against the library's own loop, restarts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import cmaes
import numpy as np
import pytest
from evolve_fixture import SWITCHES, search, sphere, switches

from memmcl.evolve import Proposal, Strategy, build_strategy, restore
from memmcl.seeds import derive


def make(**changes: Any) -> Strategy:
    arguments = {"genes": 2, "bounds": (0.0, 1.0), "seeds": [], "seed": 3, "population": 4}
    return build_strategy("cmaes", **{**arguments, **changes})


def drive(
    strategy: Strategy, count: int, value: Callable[[Proposal], float | None] = lambda proposal: 0.0
) -> list[Proposal]:
    proposals = []
    for _ in range(count):
        proposals.append(strategy.ask())
        strategy.tell(proposals[-1].index, value(proposals[-1]))
    return proposals


def test_switches_are_searched_as_by_the_librarys_own_loop_with_margin() -> None:
    binary, genes = [0, 2, 3], 5
    strategy = make(genes=genes, binary=binary, population=6)
    optimizer = cmaes.CMAwM(
        mean=np.full(genes, 0.5),
        sigma=0.3,
        bounds=np.tile([0.0, 1.0], (genes, 1)),
        steps=np.array([1.0, 0.0, 1.0, 1.0, 0.0]),
        seed=derive(3, "cmaes") % 2**32,
        population_size=6,
    )
    for _ in range(12):
        told = []
        for _ in range(6):
            wanted, point = optimizer.ask()
            proposal = strategy.ask()
            assert proposal.genome == tuple(np.round(wanted, 6))
            assert {proposal.genome[gene] for gene in binary} <= {0.0, 1.0}
            value = sum(proposal.genome[:3]) - proposal.genome[3] - (proposal.genome[4] - 0.2) ** 2
            strategy.tell(proposal.index, value)
            told.append((point, -value))
        optimizer.tell(told)


def test_the_margin_finds_switches_that_random_search_does_not() -> None:
    arguments = {"genes": 18, "bounds": (0.0, 1.0), "seeds": [("base", [0.0] * 18)], "binary": range(15)}
    for seed in range(2):
        best = search("cmaes", switches, 400, seed=seed, **arguments).best()
        assert (np.array(best[0].genome[:15]) == SWITCHES).sum() >= 14
        assert best[1]["fitness"] > search("random", switches, 400, seed=seed, **arguments).best()[1]["fitness"] + 1


def test_a_seed_is_a_leaning_of_switches_not_a_certainty() -> None:
    strategy = make(genes=200, seeds=[("on", [1.0] * 100 + [0.0] * 100)], binary=range(200), sigma=0.3)
    _, sample = strategy.ask(), np.array(strategy.ask().genome)
    assert sample[:100].mean() == pytest.approx(0.8, abs=0.12)  # P(N(0.75, 0.3) > 0.5) = 0.798
    assert sample[100:].mean() == pytest.approx(0.2, abs=0.12)


def test_separable_is_the_librarys_and_the_default_above_64_genes() -> None:
    strategy = make(genes=4, separable=True)
    optimizer = cmaes.SepCMA(
        mean=np.full(4, 0.5),
        sigma=0.3,
        bounds=np.tile([0.0, 1.0], (4, 1)),
        seed=derive(3, "cmaes") % 2**32,
        population_size=4,
    )
    for _ in range(10):
        told = []
        for _ in range(4):
            point = np.round(optimizer.ask(), 6)
            proposal = strategy.ask()
            assert proposal.genome == tuple(point)
            strategy.tell(proposal.index, -sum((point - 0.2) ** 2))
            told.append((point, sum((point - 0.2) ** 2)))
        optimizer.tell(told)
    for genes, binary, separable in [(64, [], False), (65, [], True), (65, [3], False)]:
        assert make(genes=genes, binary=binary).state()["arguments"]["separable"] is separable
    assert make(genes=65, separable=False).state()["arguments"]["separable"] is False
    arguments = {"genes": 10, "bounds": (0.0, 1.5), "seeds": [("base", [0.0] * 10)], "seed": 1}
    assert search("cmaes", sphere, 300, separable=True, **arguments).best()[1]["fitness"] > -0.1


def test_a_flat_fitness_restarts_with_twice_the_population() -> None:
    proposals = drive(make(restarts=True), 26 * 4 + 8 * 3)  # stops above 10 + 30 * genes / population generations
    first, second = proposals[: 26 * 4], proposals[26 * 4 :]
    assert [p.origin for p in first[::4]] == [f"cmaes:g{g}" for g in range(1, 27)]
    assert [p.origin for p in second[::8]] == ["cmaes:r1g1", "cmaes:r1g2", "cmaes:r1g3"]
    assert [p.generation for p in second] == [27] * 8 + [28] * 8 + [29] * 8
    spread = np.std([p.genome for p in second[:8]], axis=0)
    assert (spread > 0.05).all()


def test_without_restarts_a_distribution_that_should_stop_stays_as_it_is() -> None:
    proposals = drive(make(), 200)
    assert {p.origin for p in proposals[26 * 4 :]} == {"cmaes:g27"}
    assert len({p.genome for p in proposals}) == 200


def test_a_population_of_one_genome_restarts() -> None:
    proposals = drive(make(restarts=True, sigma=1e-8), 20)
    assert {p.genome for p in proposals[:4]} == {(0.5, 0.5)}
    assert [p.origin for p in proposals[3:5]] == ["cmaes:g1", "cmaes:r1g1"]
    middle = proposals[4].genome
    assert {p.genome for p in proposals[4:12]} == {middle}
    assert middle != (0.5, 0.5)
    assert [p.origin for p in proposals[11:13]] == ["cmaes:r1g1", "cmaes:r2g1"]
    assert proposals[12].genome not in {middle, (0.5, 0.5)}
    assert drive(make(restarts=True, sigma=1e-8, seed=4), 5)[4].genome != middle


def test_what_was_asked_before_a_restart_teaches_the_next_distribution_nothing() -> None:
    def after(late: float | None) -> list[Proposal]:
        strategy = make(restarts=True, sigma=1e-8, population=4)
        proposals = [strategy.ask() for _ in range(12)]
        for proposal in proposals[:4]:
            strategy.tell(proposal.index, 0.0)
        if late is not None:
            for proposal in proposals[4:]:
                strategy.tell(proposal.index, late)
        return [strategy.ask() for _ in range(9)]

    assert after(1.0) == after(-5.0) == after(None)
    assert {p.origin for p in after(1.0)} == {"cmaes:r1g1"}


@pytest.mark.parametrize("killed_at", [3, 104, 105, 121, 150])
def test_a_search_with_restarts_replays(killed_at: int) -> None:
    def coarse(proposal: Proposal) -> float | None:
        return None if proposal.genome[0] > 0.9 else math.floor(proposal.genome[0])

    whole = drive(make(restarts=True), 170, coarse)
    strategy = make(restarts=True)
    before = drive(strategy, killed_at, coarse)
    again = restore(json.loads(json.dumps(strategy.state(), allow_nan=False)))
    assert before + drive(again, 170 - killed_at, coarse) == whole
    assert any(p.origin.startswith("cmaes:r1") for p in whole)
