"""The merge search without workers: strategies (ask / tell / state), seeds, look-ahead, fitness. numpy only."""

from memmcl.config.strategies import STRATEGIES, UPDATES
from memmcl.evolve import pareto
from memmcl.evolve.lookahead import LookAhead
from memmcl.evolve.seeding import seed_genomes
from memmcl.evolve.strategy import Proposal, Strategy
from memmcl.evolve.table import build_strategy, restore

__all__ = [
    "STRATEGIES",
    "UPDATES",
    "LookAhead",
    "Proposal",
    "Strategy",
    "build_strategy",
    "pareto",
    "restore",
    "seed_genomes",
]
