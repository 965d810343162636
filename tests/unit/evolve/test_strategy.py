"""What all strategies share behind ask / tell / state, and CMA-ES."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest

from memmcl.errors import ConfigError, GenomeError, SearchError
from memmcl.evolve import STRATEGIES, Proposal, Strategy, build_strategy, restore
from memmcl.evolve.strategy import expand_bounds, maximised, round_genome

TARGET = (0.2, 0.9, 1.3)


def sphere(genome: tuple[float, ...]) -> float:
    return -sum((gene - best) ** 2 for gene, best in zip(genome, TARGET, strict=True))


def tell(strategy: Strategy, proposal: Proposal, value: float | None) -> None:
    """Tell `value`, and two objectives for the strategy that wants them."""
    first = proposal.genome[0]
    strategy.tell(proposal.index, value, None if value is None else [value + first, value - first])


def drive(
    strategy: Strategy, count: int, lookahead: int = 0, fitness: Callable[[tuple[float, ...]], float | None] = sphere
) -> list[Proposal]:
    """Ask `count` times, each ask after max(0, i - lookahead) tells; return the proposals."""
    proposals: list[Proposal] = []
    for i in range(count):
        if i > lookahead:
            told = proposals[i - lookahead - 1]
            tell(strategy, told, fitness(told.genome))
        proposals.append(strategy.ask())
    return proposals


def make(name: str = "cmaes", **changes: object) -> Strategy:
    arguments = {
        "genes": 3,
        "bounds": (0.0, 1.5),
        "seeds": [("base", (0.0, 0.0, 0.0)), ("uniform", (1 / 3, 1 / 3, 1 / 3))],
        "seed": 7,
        "objectives": 2,
    }
    return build_strategy(name, **{**arguments, **changes})  # type: ignore[arg-type]


def test_cmaes_reaches_the_sphere_optimum_and_random_search_does_not() -> None:
    best = {name: max(sphere(p.genome) for p in drive(make(name, sigma=0.3), 300)) for name in ("cmaes", "random")}
    assert best["cmaes"] > -1e-6
    assert best["random"] < -1e-4


def test_cmaes_reaches_the_optimum_when_asks_run_ahead_of_tells() -> None:
    assert max(sphere(p.genome) for p in drive(make(), 500, lookahead=5)) > -1e-5


def test_cmaes_reaches_an_optimum_on_the_bounds_from_a_corner() -> None:
    best = max(drive(make(seeds=[("base", (0.0, 0.0, 0.0))]), 400, fitness=sum), key=lambda p: sum(p.genome))
    assert best.genome == pytest.approx((1.5, 1.5, 1.5), abs=1e-2)


def test_one_gene_can_be_searched() -> None:
    strategy = build_strategy("cmaes", genes=1, bounds=(0.0, 1.5), seeds=[], seed=1)
    proposals = drive(strategy, 120, fitness=lambda genome: -((genome[0] - 0.6) ** 2))
    assert min(abs(p.genome[0] - 0.6) for p in proposals) < 1e-3


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_seeds_come_first_in_order_then_the_strategys_own(name: str) -> None:
    proposals = drive(make(name, population=4), 11)
    assert [p.index for p in proposals] == list(range(11))
    assert [(p.origin, p.generation) for p in proposals[:2]] == [("seed:base", 0), ("seed:uniform", 0)]
    assert proposals[1].genome == (0.333333, 0.333333, 0.333333)
    if name in ("bayesian", "cmaes", "random"):
        assert [p.origin for p in proposals[2:]] == [f"{name}:g1"] * 4 + [f"{name}:g2"] * 4 + [f"{name}:g3"]
        assert [p.generation for p in proposals[2:]] == [1] * 4 + [2] * 4 + [3]
    else:  # seeds are members of the first population
        assert [p.origin for p in proposals[2:4]] == ["mutation:g0", "random:g0"]
        assert {p.origin.split(":")[0] for p in proposals[4:]} <= {"crossover", "mutation"}
        assert [p.generation for p in proposals[2:]] == [0] * 2 + [1] * 4 + [2] * 3
        assert all(p.origin.endswith(f":g{p.generation}") for p in proposals[2:])


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_genomes_are_rounded_inside_their_own_bounds_and_exact_in_json(name: str) -> None:
    bounds = [(0.0, 1.5), (-1.0, 0.25), (0.2, 0.9)]
    for proposal in drive(make(name, bounds=bounds, seeds=[], sigma=1.0), 60, fitness=lambda genome: genome[0]):
        for gene, (low, high) in zip(proposal.genome, bounds, strict=True):
            assert low <= gene <= high
            assert gene == round(gene, 6)
            assert math.copysign(1.0, gene) > 0 or gene < 0  # no -0.0
        assert tuple(json.loads(json.dumps(proposal.genome))) == proposal.genome


def test_the_distribution_starts_at_the_best_seed_told_by_then() -> None:
    seeds = [("far", (0.1, 0.1, 0.1)), ("near", (1.4, 0.2, 0.6)), ("failed", (0.9, 0.9, 0.9))]
    fitness = {(0.1, 0.1, 0.1): 1.0, (1.4, 0.2, 0.6): 2.0, (0.9, 0.9, 0.9): math.nan}
    strategy = make(seeds=seeds, sigma=1e-6)
    for proposal in [strategy.ask() for _ in seeds]:
        strategy.tell(proposal.index, fitness[proposal.genome])
    assert strategy.ask().genome == pytest.approx((1.4, 0.2, 0.6), abs=1e-4)

    ahead = make(seeds=seeds, sigma=1e-6)
    for _ in seeds:
        ahead.ask()
    ahead.tell(0, 1.0)
    assert ahead.ask().genome == pytest.approx((0.1, 0.1, 0.1), abs=1e-4)


def test_without_a_told_seed_the_distribution_starts_at_their_mean_or_in_the_middle() -> None:
    seeds = [("a", (0.0, 0.0, 0.0)), ("b", (1.0, 0.5, 0.2))]
    untold = make(seeds=seeds, sigma=1e-6)
    assert [untold.ask() for _ in range(3)][2].genome == pytest.approx((0.5, 0.25, 0.1), abs=1e-4)
    assert make(seeds=[], sigma=1e-6).ask().genome == pytest.approx((0.75, 0.75, 0.75), abs=1e-4)


def test_the_distribution_moves_only_when_a_population_is_told() -> None:
    def next_after(tells: int) -> Proposal:
        strategy = make(seeds=[], population=4)
        proposals = [strategy.ask() for _ in range(5)]
        for proposal in proposals[:tells]:
            strategy.tell(proposal.index, sphere(proposal.genome))
        return strategy.ask()

    assert next_after(0) == next_after(3)
    assert next_after(3).generation == 1
    assert next_after(4).generation == 2
    assert next_after(4).genome != next_after(3).genome


def test_a_failed_proposal_ranks_behind_the_worst() -> None:
    def asks_after(last: float | None) -> list[Proposal]:
        strategy = make(seeds=[], population=4)
        for index, value in enumerate([0.3, 0.2, 0.1, last]):
            strategy.ask()
            strategy.tell(index, value)
        return [strategy.ask() for _ in range(4)]

    for failure in (None, math.nan, math.inf, -math.inf):
        assert asks_after(failure) == asks_after(-1.0)
    assert asks_after(None) != asks_after(1.0)


def test_a_population_that_failed_as_a_whole_leaves_the_distribution_as_it_is() -> None:
    proposals = drive(make(seeds=[], population=4), 9, fitness=lambda genome: math.nan)
    assert {p.generation for p in proposals} == {1}
    assert len({p.genome for p in proposals}) == 9


def test_a_failure_is_logged_with_its_genome(caplog: pytest.LogCaptureFixture) -> None:
    strategy = make()
    strategy.ask()
    strategy.ask()
    with caplog.at_level(logging.WARNING):
        strategy.tell(1, math.nan)
    assert "0.333333" in caplog.text
    assert "-inf" in caplog.text


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("killed_at", [1, 2, 9, 25])
def test_replay_gives_identical_asks(name: str, lookahead: int, killed_at: int) -> None:
    def failing(genome: tuple[float, ...]) -> float | None:
        return None if genome[0] > 1.2 else sphere(genome)

    whole = drive(make(name), 50, lookahead, failing)
    first = make(name)
    before = drive(first, killed_at, lookahead, failing)
    strategy = restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    after: list[Proposal] = list(before)
    for i in range(killed_at, 50):
        if i > lookahead:
            told = after[i - lookahead - 1]
            tell(strategy, told, failing(told.genome))
        after.append(strategy.ask())
    assert after == whole


def test_seed_and_arguments_decide_the_asks() -> None:
    assert drive(make(), 20) == drive(make(), 20)
    assert drive(make(), 20) != drive(make(seed=8), 20)
    assert drive(make("random"), 20) != drive(make("random", seed=8), 20)


def test_a_history_that_does_not_replay_is_refused() -> None:
    strategy = make()
    drive(strategy, 5)
    state = strategy.state()
    state["history"][-1][1][0] += 0.5
    with pytest.raises(SearchError, match="replayed proposal 4"):
        restore(state)


def test_telling_what_was_not_asked_or_twice_is_refused() -> None:
    strategy = make()
    with pytest.raises(SearchError, match="only 0 were asked"):
        strategy.tell(0, 1.0)
    strategy.ask()
    strategy.tell(0, 1.0)
    with pytest.raises(SearchError, match="twice"):
        strategy.tell(0, 1.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"population": 3}, ConfigError, "at least 4"),
        ({"sigma": 0.0}, ConfigError, "sigma"),
        ({"binary": [3]}, ConfigError, "indices below 3"),
        ({"binary": [-1]}, ConfigError, "indices below 3"),
        ({"binary": [1]}, ConfigError, "gene 1 is on or off"),
        ({"bounds": (0.0, 1.0), "binary": [1]}, GenomeError, "`uniform` has 0.333"),
        ({"update": "steady-state"}, ConfigError, "updates by populations"),
        ({"update": "whenever"}, ConfigError, "generational, steady-state, got `whenever`"),
        ({"separable": True, "genes": 1, "seeds": []}, ConfigError, "two genes or more"),
        ({"separable": True, "bounds": (0.0, 1.0), "binary": [0], "seeds": []}, ConfigError, "none of them on"),
        ({"objectives": -1}, ConfigError, "counted from 0"),
        ({"genes": 0}, ConfigError, "at least one gene"),
        ({"bounds": (1.0, 1.0)}, ConfigError, "low < high"),
        ({"bounds": (0.0, math.inf)}, ConfigError, "finite"),
        ({"bounds": [(0.0, 1.0)] * 2}, ConfigError, "3 of them"),
        ({"seeds": [("short", (0.0, 0.0))]}, GenomeError, "has 2 genes"),
        ({"seeds": [("far", (0.0, 0.0, 1.6))]}, GenomeError, "leaves the bounds"),
        ({"seeds": [("nan", (0.0, 0.0, math.nan))]}, GenomeError, "leaves the bounds"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**changes)


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="bayesian, cmaes, genetic, nsga2, random"):
        make("annealing")


@pytest.mark.parametrize("name", ["bayesian", "genetic", "nsga2", "random"])
@pytest.mark.parametrize("changes", [{"restarts": True}, {"separable": True}, {"separable": False}])
def test_what_is_of_cmaes_alone_is_refused_elsewhere(name: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"of cmaes, not of {name}"):
        make(name, **changes)


def test_objectives_and_failures_are_kept_exactly_and_states_without_them_are_read() -> None:
    strategy = make("random")
    for _ in range(4):
        strategy.ask()
    strategy.tell(1, 0.5, [0.25, math.nan])
    strategy.tell(0, math.nan, [1.0])
    strategy.tell(3, None)
    state = json.loads(json.dumps(strategy.state(), allow_nan=False))
    tells = [event for event in state["history"] if event[0] == "tell"]
    assert tells == [["tell", 1, 0.5, [0.25, None]], ["tell", 0, None, [1.0]], ["tell", 3, None, None]]
    assert restore(state).state() == strategy.state()
    for key in ("binary", "restarts", "separable", "update", "objectives"):
        del state["arguments"][key]
    state["history"] = [event[:3] for event in state["history"]]
    assert restore(state).ask() == strategy.ask()


def test_default_population_follows_hansen() -> None:
    assert make(seeds=[]).state()["arguments"]["population"] == 7  # 4 + floor(3 ln 3)


def test_helpers() -> None:
    assert expand_bounds((0, 2), 2) == ((0.0, 2.0), (0.0, 2.0))
    assert repr(round_genome(np.array([-1e-9, 2.0]), ((-1.0, 1.0), (0.0, 1 / 3)))) == repr((0.0, 1 / 3))  # no -0.0
    assert [maximised(value) for value in (1, None, math.nan, math.inf)] == [1.0, *[-math.inf] * 3]
