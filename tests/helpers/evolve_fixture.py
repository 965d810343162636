"""What the tests of strategies share: a search by look-ahead, small problems, a strategy that follows a script."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from memmcl.evolve import STRATEGIES, LookAhead, Proposal, build_strategy, pareto
from memmcl.evolve.strategy import Genome

Evaluate = Callable[[Genome], Mapping[str, Any]]

SPHERE = np.linspace(0.1, 1.4, 10)
SWITCHES = np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1])


def search(name: str, evaluate: Evaluate, budget: int, lookahead: int = 4, **arguments: Any) -> LookAhead:
    """Run a whole search; each result arrives before the next proposal is taken.

    An update that the strategy has not is left out, so that random search is comparable with both of the others'.
    """
    if arguments.get("update") not in STRATEGIES[name].updates:
        arguments.pop("update", None)
    core = LookAhead(build_strategy(name, **arguments), budget=budget, lookahead=lookahead)
    while (proposal := core.next()) is not None:
        core.done(proposal.index, evaluate(proposal.genome))
    assert core.finished
    return core


def sphere(genome: Genome) -> dict[str, Any]:
    """Ten genes; the optimum is 0 at `SPHERE`."""
    value = -float(((np.array(genome) - SPHERE) ** 2).sum())
    return {"fitness": value, "objectives": [value]}


def switches(genome: Genome) -> dict[str, Any]:
    """Fifteen genes on or off, one point for each that is as in `SWITCHES`, and three others, best at 0.3."""
    right = float((np.array(genome[:15]) == SWITCHES).sum())
    value = right - 10 * sum((gene - 0.3) ** 2 for gene in genome[15:])
    return {"fitness": value, "objectives": [value]}


def zdt1(genome: Genome) -> dict[str, Any]:
    """ZDT1 with three genes, both objectives negated; its front is f2 = 1 - sqrt(f1), at genes 2 and 3 zero."""
    first, slope = genome[0], 1 + 9 * (genome[1] + genome[2]) / 2
    objectives = [-first, -slope * (1 - (first / slope) ** 0.5)]
    return {"fitness": sum(objectives) / 2, "objectives": objectives}


def hypervolume(core: LookAhead, corner: float = -1.1) -> float:
    """Return the area that the front of two objectives dominates above (corner, corner)."""
    points = np.array([record["objectives"] for record in core.records.values()])
    area, floor = 0.0, corner
    for first, second in sorted(points[pareto.front(points)].tolist(), reverse=True):
        if first > corner and second > floor:
            area += (first - corner) * (second - floor)
            floor = second
    return area


class Scripted:
    """A strategy that proposes given genomes and writes down every ask and tell."""

    def __init__(self, genomes: list[Genome], generation: int = 0) -> None:
        self.genomes = genomes
        self.generation = generation
        self.log: list[tuple[str, int]] = []
        self.told: dict[int, float | None] = {}
        self.objectives: dict[int, Any] = {}
        self.recorded: list[Genome | None] = []

    def ask(self, recorded: Genome | None = None) -> Proposal:
        index = sum(1 for what, _ in self.log if what == "ask")
        self.log.append(("ask", index))
        self.recorded.append(recorded)
        return Proposal(index, self.genomes[index], "scripted", self.generation)

    def tell(self, index: int, fitness: float | None, objectives: Any = None) -> None:
        self.log.append(("tell", index))
        self.told[index] = fitness
        self.objectives[index] = objectives

    def state(self) -> dict[str, Any]:
        return {}


def distinct(count: int) -> list[Genome]:
    return [(float(i),) for i in range(count)]
