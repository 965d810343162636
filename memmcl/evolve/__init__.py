"""The merge search without workers: strategies (ask / tell / state), seeds, look-ahead, fitness. numpy only.

The functions of `memmcl.evolve.fitness` are imported from there, since one of them has the module's name; those of
`memmcl.evolve.pareto` are called as `pareto.fronts`, `pareto.front`, `pareto.crowding`.
"""

from memmcl.config.strategies import STRATEGIES, UPDATES
from memmcl.evolve import pareto
from memmcl.evolve.bayesian import Bayesian
from memmcl.evolve.cmaes import CmaEs
from memmcl.evolve.genetic import Genetic
from memmcl.evolve.lookahead import LookAhead
from memmcl.evolve.seeding import seed_genomes
from memmcl.evolve.strategy import Bounds, Genome, Objectives, Proposal, Strategy
from memmcl.evolve.table import build_strategy, restore
from memmcl.evolve.uniform import RandomSearch

__all__ = [
    "STRATEGIES",
    "UPDATES",
    "Bayesian",
    "Bounds",
    "CmaEs",
    "Genetic",
    "Genome",
    "LookAhead",
    "Objectives",
    "Proposal",
    "RandomSearch",
    "Strategy",
    "build_strategy",
    "pareto",
    "restore",
    "seed_genomes",
]
