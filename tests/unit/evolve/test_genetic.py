"""The genetic algorithm and NSGA-II: what they reach, where children come from, what survives."""

from __future__ import annotations

import math
from typing import Any

import pytest
from evolve_fixture import hypervolume, search, sphere, switches, zdt1

from memmcl.errors import ConfigError, SearchError
from memmcl.evolve import UPDATES, Proposal, Strategy, build_strategy

BOTH = pytest.mark.parametrize("name", ["genetic", "nsga2"])
EITHER = pytest.mark.parametrize("update", UPDATES)


def make(name: str = "genetic", **changes: Any) -> Strategy:
    arguments = {"genes": 3, "bounds": (0.0, 1.0), "seeds": [], "seed": 3, "population": 4, "objectives": 1}
    return build_strategy(name, **{**arguments, **changes})


def tell(strategy: Strategy, proposal: Proposal, value: float | None) -> None:
    strategy.tell(proposal.index, value, None if value is None else [value])


@BOTH
@EITHER
def test_it_beats_random_search_on_a_sphere_and_on_switches(name: str, update: str) -> None:
    for evaluate, arguments in (
        (sphere, {"genes": 10, "bounds": (0.0, 1.5), "seeds": [("base", [0.0] * 10)]}),
        (switches, {"genes": 18, "bounds": (0.0, 1.0), "seeds": [("base", [0.0] * 18)], "binary": range(15)}),
    ):
        for seed in range(2):
            best = {
                each: search(each, evaluate, 300, seed=seed, objectives=1, update=update, **arguments).best()[1]
                for each in (name, "random")
            }
            assert best[name]["fitness"] > best["random"]["fitness"] + 0.2


@EITHER
def test_nsga2_covers_the_front_better_than_random_search_and_than_one_objective(update: str) -> None:
    arguments = {"genes": 3, "bounds": (0.0, 1.0), "seeds": [], "population": 12, "update": update, "objectives": 2}
    area = {
        name: sum(hypervolume(search(name, zdt1, 300, seed=seed, **arguments)) for seed in range(3)) / 3
        for name in ("nsga2", "genetic", "random")
    }
    whole = 1.1**2 - 1 / 3  # what the true front leaves of the square: below it lies the integral of 1 - sqrt(f1)
    assert area["nsga2"] > area["genetic"] + 0.03
    assert area["nsga2"] > area["random"] + 0.2
    assert 0.85 * whole < area["nsga2"] < whole


def test_generation_0_is_the_seeds_then_perturbed_seeds_and_uniform_draws_in_turn() -> None:
    seeds = [("a", [0.5, 0.5, 0.0]), ("b", [0.1, 0.1, 1.0])]
    strategy = make(seeds=seeds, population=8, sigma=0.01, binary=[2])
    proposals = [strategy.ask() for _ in range(8)]
    assert [(p.origin, p.parents) for p in proposals] == [
        ("seed:a", ()),
        ("seed:b", ()),
        ("mutation:g0", (0,)),
        ("random:g0", ()),
        ("mutation:g0", (1,)),
        ("random:g0", ()),
        ("mutation:g0", (0,)),
        ("random:g0", ()),
    ]
    assert proposals[2].genome[:2] == pytest.approx((0.5, 0.5), abs=0.05)
    assert proposals[4].genome[:2] == pytest.approx((0.1, 0.1), abs=0.05)
    bare = make()
    assert {bare.ask().origin for _ in range(4)} == {"random:g0"}


@BOTH
def test_children_descend_from_the_last_complete_generation(name: str) -> None:
    strategy = make(name)
    asked = [strategy.ask() for _ in range(6)]
    assert {p.origin for p in asked} == {"random:g0"}  # asks run ahead of the first generation
    for proposal, value in zip(asked[:4], (0.1, 0.9, None, 0.5), strict=True):
        assert strategy.ask().generation == 0
        tell(strategy, proposal, value)
    children = [strategy.ask() for _ in range(12)]
    assert {p.generation for p in children} == {1}
    assert all(p.origin == f"{'crossover' if len(p.parents) == 2 else 'mutation'}:g1" for p in children)
    assert {parent for p in children for parent in p.parents} == {0, 1, 3}  # 2 failed, 4 and 5 are not told
    for child in children[:4]:
        tell(strategy, child, 1.0)
    later = [strategy.ask() for _ in range(12)]
    assert {p.generation for p in later} == {2}
    assert {parent for p in later for parent in p.parents} == {child.index for child in children[:4]}


@BOTH
def test_the_steady_state_learns_from_every_tell(name: str) -> None:
    strategy = make(name, update="steady-state")
    first = [strategy.ask() for _ in range(4)]
    for proposal, value in zip(first, (0.4, 0.3, 0.2, 0.1), strict=True):
        tell(strategy, proposal, value)
    child, worse = strategy.ask(), strategy.ask()
    tell(strategy, child, 0.25)  # better than the two worst: one of them goes
    tell(strategy, worse, 0.05)
    parents = {parent for _ in range(40) for parent in strategy.ask().parents}
    assert parents == {0, 1, 2, child.index}
    alone = make(name, update="steady-state")
    tell(alone, [alone.ask() for _ in range(4)][3], 1.0)
    assert (alone.ask().origin, alone.ask().parents) == ("mutation:g1", (3,))


@BOTH
@EITHER
def test_the_best_is_never_lost_and_favoured(name: str, update: str) -> None:
    strategy = make(name, update=update, seeds=[("best", [0.5, 0.5, 0.5])])
    proposals = [strategy.ask() for _ in range(4)]
    for proposal in proposals:
        tell(strategy, proposal, 1.0 if proposal.index == 0 else -float(proposal.index))
    counts: dict[int, int] = {}
    for _ in range(200):
        child = strategy.ask()
        for parent in child.parents:
            counts[parent] = counts.get(parent, 0) + 1
        tell(strategy, child, -1000.0)
    assert max(counts, key=lambda index: counts[index]) == 0
    assert sorted(counts) == [0, 1, 2, 3]


@BOTH
@EITHER
def test_everything_failing_goes_on_drawing(name: str, update: str) -> None:
    strategy = make(name, update=update)
    for _ in range(30):
        proposal = strategy.ask()
        assert proposal.origin == "random:g0"
        tell(strategy, proposal, math.nan)


def test_children_are_rarely_copies_of_what_was_proposed() -> None:
    core = search("genetic", switches, 200, genes=18, bounds=(0.0, 1.0), seeds=[], seed=1, binary=range(18))
    assert len({p.genome for p in core.proposals}) > 190


def test_a_genome_is_in_the_population_once() -> None:
    strategy = make(seeds=[("a", [0.5] * 3), ("twin", [0.5] * 3), ("b", [0.4] * 3), ("c", [0.3] * 3)])
    for proposal in [strategy.ask() for _ in range(4)]:
        tell(strategy, proposal, sum(proposal.genome))
    assert {parent for _ in range(40) for parent in strategy.ask().parents} == {0, 2, 3}


def test_nsga2_keeps_what_is_best_in_either_objective() -> None:
    strategy = make("nsga2", objectives=2, seeds=[(str(i), [i / 10] * 3) for i in range(6)])
    values = [(0.0, 9.0), (9.0, 0.0), (5.0, 5.0), (5.1, 4.9), (1.0, 1.0), (5.2, 4.8)]
    for proposal, (one, other) in zip([strategy.ask() for _ in values], values, strict=True):
        strategy.tell(proposal.index, (one + other) / 2, [one, other])
    parents = {parent for _ in range(60) for parent in strategy.ask().parents}
    # 4 is dominated; 0 and 1 are ends; by hand, crowding is 10.2 / 9 of 2, 7.8 / 9 of 5 and 0.4 / 9 of 3
    assert parents == {0, 1, 2, 5}


def test_nsga2_wants_its_objectives() -> None:
    with pytest.raises(ConfigError, match="needs objectives, got 0"):
        make("nsga2", objectives=0)
    strategy = make("nsga2", objectives=2)
    for _ in range(4):
        strategy.ask()
    before = strategy.state()
    with pytest.raises(SearchError, match="with none of 2 objectives"):
        strategy.tell(0, 1.0)
    with pytest.raises(SearchError, match="with 1 of 2 objectives"):
        strategy.tell(0, 1.0, [1.0])
    assert strategy.state() == before
    strategy.tell(0, None)
    strategy.tell(1, 1.0, [1.0, math.nan])  # a failure
    strategy.tell(2, 0.0, [0.0, 0.0])
    strategy.tell(3, math.nan, [0.0])
    assert strategy.ask().parents == (2,)
