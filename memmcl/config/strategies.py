"""The search strategies by name: what each is, and which options it takes. The classes: `memmcl.evolve.table`."""

from collections.abc import Mapping
from dataclasses import dataclass

GENERATIONAL = "generational"
UPDATES = (GENERATIONAL, "steady-state")


@dataclass(frozen=True)
class StrategyRow:
    """A search strategy.

    about: what proposes genomes. learns: how it learns from results, said where an update is not for it. updates: how
    its population may be replaced. restarts: whether it may start anew once it has converged. objectives: whether it
    trades off several objectives.
    """

    about: str
    learns: str
    updates: tuple[str, ...] = (GENERATIONAL,)
    restarts: bool = False
    objectives: bool = False


STRATEGIES: Mapping[str, StrategyRow] = {
    "bayesian": StrategyRow("a Gaussian process through all results", "learns from every result anyway"),
    "cmaes": StrategyRow("CMA-ES", "updates by populations", restarts=True),
    "genetic": StrategyRow("a genetic algorithm", "replaces its population", UPDATES),
    "nsga2": StrategyRow("NSGA-II, for several objectives", "replaces its population", UPDATES, objectives=True),
    "random": StrategyRow("uniform draws", "learns nothing"),
}
