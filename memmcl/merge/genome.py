"""The genome of a linear merge: one coefficient per (part, layer block).

A part is what a stage merges: an expert in stage 1, a group model in stage 2. A group model is itself a table of
coefficients over experts, so that stage 2 composes into one table over all experts, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memmcl.errors import GenomeError

Coefficients = Mapping[str, tuple[float, ...]]
"""By expert, one coefficient per block."""


@dataclass(frozen=True)
class GenomeSpace:
    """What the genes of a genome stand for: parts in order, `blocks` genes each."""

    parts: tuple[str, ...]
    blocks: int
    low: float
    high: float

    @property
    def size(self) -> int:
        """How many genes a genome has."""
        return len(self.parts) * self.blocks

    @property
    def genes(self) -> tuple[str, ...]:
        """The name of each gene, `part/block`."""
        return tuple(f"{part}/{block}" for part in self.parts for block in range(self.blocks))

    def decode(self, genome: Sequence[float]) -> dict[str, tuple[float, ...]]:
        """Return the coefficients of each part.

        Raises:
            GenomeError: too many or too few genes, or one out of bounds.
        """
        if len(genome) != self.size:
            raise GenomeError(
                f"genome has {len(genome)} genes; {len(self.parts)} parts x {self.blocks} blocks needs {self.size}; "
                "was it made with other experts or another `blocks`?"
            )
        outside = [gene for gene in genome if not self.low <= gene <= self.high]
        if outside:
            raise GenomeError(f"genes must lie in [{self.low}, {self.high}]; got {outside[0]}")
        blocks = self.blocks
        return {part: tuple(genome[i * blocks : (i + 1) * blocks]) for i, part in enumerate(self.parts)}

    def encode(self, coefficients: Coefficients) -> tuple[float, ...]:
        """Return the genome of `coefficients`, the inverse of `decode`.

        Raises:
            GenomeError: other parts, another number of blocks, or a gene out of bounds.
        """
        if set(coefficients) != set(self.parts):
            raise GenomeError(f"expected coefficients of {list(self.parts)}, got {sorted(coefficients)}")
        wrong = [part for part in self.parts if len(coefficients[part]) != self.blocks]
        if wrong:
            got = len(coefficients[wrong[0]])
            raise GenomeError(f"expected {self.blocks} blocks for each part; {wrong[0]} has {got}")
        genome = tuple(value for part in self.parts for value in coefficients[part])
        self.decode(genome)
        return genome


def compose(outer: Coefficients, models: Mapping[str, Coefficients]) -> dict[str, tuple[float, ...]]:
    """Compose stage 2 into coefficients per expert: sum over models of outer x inner, block by block.

    outer: coefficients per group model; models: each group model's coefficients per expert.
    """
    if set(outer) != set(models):
        raise GenomeError(f"expected coefficients of the group models {sorted(models)}, got {sorted(outer)}")
    total: dict[str, list[float]] = {}
    for model, inner in models.items():
        for expert, values in inner.items():
            row = total.setdefault(expert, [0.0] * len(values))
            if len(values) != len(outer[model]) or len(row) != len(values):
                raise GenomeError(f"group model {model} has {len(values)} blocks, stage 2 has {len(outer[model])}")
            for block, value in enumerate(values):
                row[block] += outer[model][block] * value
    return {expert: tuple(row) for expert, row in total.items()}


def block_of(layer: int, lowest: int, layers: int, blocks: int) -> int:
    """Return the block of an adapted layer: layers [lowest, layers) are cut into `blocks` even runs."""
    return (layer - lowest) * blocks // (layers - lowest)
