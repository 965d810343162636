"""The merge search without workers: strategies (ask / tell / state), seeds, look-ahead, fitness. numpy only.

The functions of `memmcl.evolve.fitness` are imported from there: one of them has the module's name.
"""

from memmcl.evolve.cmaes import STRATEGIES, CmaEs, RandomSearch, build_strategy, restore
from memmcl.evolve.lookahead import LookAhead
from memmcl.evolve.seeding import seed_genomes
from memmcl.evolve.strategy import Bounds, Genome, Proposal, Strategy

__all__ = [
    "STRATEGIES",
    "Bounds",
    "CmaEs",
    "Genome",
    "LookAhead",
    "Proposal",
    "RandomSearch",
    "Strategy",
    "build_strategy",
    "restore",
    "seed_genomes",
]
