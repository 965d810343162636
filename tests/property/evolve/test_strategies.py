"""Every strategy, with every update and variant: inside the bounds, exact in its state, sure against failures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.evolve import STRATEGIES, Proposal, Strategy, build_strategy, restore
from memmcl.evolve.bayesian import Process

VARIANTS: list[dict[str, Any]] = [
    {"name": name, "update": update}
    for name in sorted(STRATEGIES)
    for update in STRATEGIES[name].updates
    if name != "cmaes"
]
VARIANTS += [{"name": "cmaes", "restarts": restarts} for restarts in (False, True)]
VARIANTS += [{"name": "cmaes", "restarts": restarts, "separable": True} for restarts in (False, True)]


@dataclass(frozen=True)
class Case:
    variant: dict[str, Any]
    genes: int
    binary: tuple[int, ...]
    seeds: int
    seed: int
    sigma: float
    flat: bool

    def build(self) -> Strategy:
        chooser, binary = Random(self.seed), () if self.variant.get("separable") else self.binary
        bounds = [(0.0, 1.0) if gene in self.binary else (-0.5, 1.25) for gene in range(self.genes)]
        seeds = [
            (str(i), [chooser.choice(pair) if gene in self.binary else 0.3 for gene, pair in enumerate(bounds)])
            for i in range(self.seeds)
        ]
        return build_strategy(
            **self.variant,
            genes=self.genes,
            bounds=bounds,
            seeds=seeds,
            seed=self.seed,
            population=4,
            sigma=self.sigma,
            binary=binary,
            objectives=2,
        )

    def check(self, proposal: Proposal) -> None:
        for gene, value in enumerate(proposal.genome):
            if gene not in self.binary:
                assert -0.5 <= value <= 1.25
            elif not self.variant.get("separable"):
                assert value in (0.0, 1.0)
        assert all(parent < proposal.index for parent in proposal.parents)

    def tell(self, strategy: Strategy, proposal: Proposal, timing: Random) -> None:
        failure = timing.randrange(8)
        value = 0.5 if self.flat else -abs(sum(proposal.genome) - 0.7)
        if failure == 0:
            strategy.tell(proposal.index, timing.choice([None, math.nan, math.inf, -math.inf]))
        elif failure == 1:
            strategy.tell(proposal.index, value, [timing.choice([None, math.nan, math.inf]), value])
        else:
            strategy.tell(proposal.index, value, [proposal.genome[0], value])


CASES = st.integers(2, 5).flatmap(
    lambda genes: st.builds(
        Case,
        variant=st.sampled_from(VARIANTS),
        genes=st.just(genes),
        binary=st.sets(st.integers(0, genes - 1)).map(lambda chosen: tuple(sorted(chosen))),
        seeds=st.integers(0, 6),
        seed=st.integers(0, 2**32),
        sigma=st.sampled_from([1e-7, 0.05, 0.3, 1.0]),
        flat=st.booleans(),
    )
)


def steps(case: Case, strategy: Strategy, count: int, open_: list[Proposal], timing: Random) -> list[Proposal]:
    """Ask and tell `count` times in a mixed order; a few proposals are never told. Return what was asked."""
    asked = []
    for _ in range(count):
        if open_ and timing.random() < 0.5:
            proposal = open_.pop(timing.randrange(len(open_)))
            if timing.randrange(10):
                case.tell(strategy, proposal, timing)
        else:
            asked.append(strategy.ask())
            case.check(asked[-1])
            open_.append(asked[-1])
    return asked


@settings(max_examples=25, deadline=None)
@given(case=CASES, before=st.integers(0, 150), timing=st.integers(0, 2**32))
def test_genomes_fit_failures_pass_and_the_state_is_restored_without_a_fit(
    case: Case, before: int, timing: int
) -> None:
    strategy, open_ = case.build(), []
    steps(case, strategy, before, open_, Random(timing))
    with patch.object(Process, "fitted", side_effect=AssertionError):
        again = restore(json.loads(json.dumps(strategy.state(), allow_nan=False)))
    assert again.state() == strategy.state()
    still = list(open_)
    after = steps(case, strategy, 60, open_, Random(timing + 1))
    assert steps(case, again, 60, still, Random(timing + 1)) == after
    assert again.state() == strategy.state()
