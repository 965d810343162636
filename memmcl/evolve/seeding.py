"""Seed genomes of a linear merge: the merges anyone would try by hand, so that no search ends below them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from memmcl.errors import GenomeError
from memmcl.evolve.strategy import Bounds, Genome, expand_bounds, round_genome

log = logging.getLogger(__name__)

GRID = (0.3, 0.5, 0.7, 1.0)


def seed_genomes(
    experts: Sequence[str], blocks: int, bounds: Bounds, grid: Sequence[float] = GRID
) -> list[tuple[str, Genome]]:
    """Return (name, genome): base, each expert alone, uniform average, task arithmetic over `grid`.

    A genome has len(experts) * blocks genes, expert by expert: gene i * blocks + b is expert i's coefficient
    in layer block b. Names are "base", "expert:NAME", "uniform", "arithmetic:LAMBDA". A genome out of
    `bounds` is left out, and so is one equal to an earlier one (uniform over two experts is arithmetic at
    0.5: it keeps the first name).

    Raises:
        GenomeError: no experts, a name twice, or no blocks.
        ConfigError: bounds that do not fit.
    """
    if not experts or len(set(experts)) != len(experts):
        raise GenomeError(f"a merge needs one or more experts of different names, got {list(experts)}")
    if blocks < 1:
        raise GenomeError(f"a merge needs at least one layer block, got blocks = {blocks}")
    count = len(experts)
    pairs = expand_bounds(bounds, count * blocks)

    merges = [
        ("base", [0.0] * count),
        *((f"expert:{name}", [float(other == name) for other in experts]) for name in experts),
        ("uniform", [1.0 / count] * count),
        *((f"arithmetic:{value:g}", [float(value)] * count) for value in grid),
    ]
    seeds: dict[Genome, str] = {}
    for name, coefficients in merges:
        genes = [coefficient for coefficient in coefficients for _ in range(blocks)]
        if all(low <= gene <= high for gene, (low, high) in zip(genes, pairs, strict=True)):
            seeds.setdefault(round_genome(genes, pairs), name)
        else:
            log.info("seed genome %s leaves the bounds and is left out", name)
    return [(name, genes) for genes, name in seeds.items()]
