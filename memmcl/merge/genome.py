"""The genome of a merge: one coefficient per (part, layer block), on/off genes, and parameters of its method.

A part is what a stage merges: an expert in stage 1, a group model in stage 2. A group model is a table of coefficients
over experts, and so is a merge of group models: for linear merges exactly. Other methods merge all experts at once with
these coefficients and stage 2's own parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from memmcl.errors import GenomeError

Coefficients = Mapping[str, tuple[float, ...]]
"""By expert, one coefficient per block."""


@dataclass(frozen=True)
class Recipe:
    """How task vectors become one: a merge method, its parameters, and the seed of its random masks."""

    method: str = "linear"
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    seed: int = 0


LINEAR = Recipe()


@dataclass(frozen=True)
class GenomeSpace:
    """What the genes of a genome stand for: parts in order, `blocks` genes each, then parameters of the method.

    low, high: bounds of coefficients; parameters: (name, low, high) of each that is searched. mask: behind the
    coefficients stands a gene for each of them that is 1 or 0; at 0 the coefficient does not count (a part is pruned
    in a block).
    """

    parts: tuple[str, ...]
    blocks: int
    low: float
    high: float
    parameters: tuple[tuple[str, float, float], ...] = ()
    mask: bool = False

    @property
    def coefficients(self) -> int:
        """How many genes are coefficients."""
        return len(self.parts) * self.blocks

    @property
    def size(self) -> int:
        """How many genes a genome has."""
        return self.coefficients * (2 if self.mask else 1) + len(self.parameters)

    @property
    def binary(self) -> tuple[int, ...]:
        """The places of the genes that are 0 or 1."""
        return tuple(range(self.coefficients, 2 * self.coefficients)) if self.mask else ()

    @property
    def genes(self) -> tuple[str, ...]:
        """The name of each gene: `part/block`, with ` on` behind it for on/off, or that of a parameter."""
        coefficients = [f"{part}/{block}" for part in self.parts for block in range(self.blocks)]
        mask = (f"{name} on" for name in coefficients) if self.mask else ()
        return (*coefficients, *mask, *(name for name, _, _ in self.parameters))

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """The lowest and highest value of each gene."""
        coefficients = ((self.low, self.high),) * self.coefficients
        mask = ((0.0, 1.0),) * len(self.binary)
        return (*coefficients, *mask, *((low, high) for _, low, high in self.parameters))

    def decode(self, genome: Sequence[float]) -> dict[str, tuple[float, ...]]:
        """Return the coefficients of each part; those that are off are 0.

        Raises:
            GenomeError: too many or too few genes, one out of bounds, or one in between that is on or off.
        """
        self._check(genome)
        blocks, values = self.blocks, list(genome[: self.coefficients])
        for place, gene in enumerate(self.binary):
            values[place] *= genome[gene]
        return {part: tuple(values[i * blocks : (i + 1) * blocks]) for i, part in enumerate(self.parts)}

    def decode_parameters(self, genome: Sequence[float]) -> dict[str, float]:
        """Return the parameters of the method that are searched.

        Raises:
            GenomeError: too many or too few genes, or one out of bounds.
        """
        self._check(genome)
        values = genome[len(genome) - len(self.parameters) :]
        return {name: value for (name, _, _), value in zip(self.parameters, values, strict=True)}

    def _check(self, genome: Sequence[float]) -> None:
        if len(genome) != self.size:
            more = ", as many on/off genes" if self.mask else ""
            more += f" + {len(self.parameters)} parameters" if self.parameters else ""
            raise GenomeError(
                f"genome has {len(genome)} genes; {len(self.parts)} parts x {self.blocks} blocks{more} needs "
                f"{self.size}; does it belong to other experts or another `blocks`?"
            )
        for name, gene, (low, high) in zip(self.genes, genome, self.bounds, strict=True):
            if not low <= gene <= high:
                raise GenomeError(f"genes must lie in [{low}, {high}]; got {gene} for {name}")
        halves = [self.genes[gene] for gene in self.binary if genome[gene] not in (0.0, 1.0)]
        if halves:
            raise GenomeError(f"a gene that is on or off must be 1 or 0; {halves[0]} is not")

    def encode(self, coefficients: Coefficients, parameters: Mapping[str, float] | None = None) -> tuple[float, ...]:
        """Return the genome of `coefficients` and `parameters`, the inverse of decoding; all that may be off is on.

        Raises:
            GenomeError: other parts or parameters, another number of blocks, or a gene out of bounds.
        """
        parameters = parameters or {}
        if set(coefficients) != set(self.parts):
            raise GenomeError(f"expected coefficients of {list(self.parts)}, got {sorted(coefficients)}")
        searched = [name for name, _, _ in self.parameters]
        if set(parameters) != set(searched):
            raise GenomeError(f"expected the parameters {searched}, got {sorted(parameters)}")
        wrong = [part for part in self.parts if len(coefficients[part]) != self.blocks]
        if wrong:
            got = len(coefficients[wrong[0]])
            raise GenomeError(f"expected {self.blocks} blocks for each part; {wrong[0]} has {got}")
        values = (value for part in self.parts for value in coefficients[part])
        genome = (*values, *[1.0] * len(self.binary), *(parameters[name] for name in searched))
        self._check(genome)
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


def with_base_adapters(coefficients: Coefficients, names: Iterable[str], blocks: int) -> dict[str, tuple[float, ...]]:
    """Return coefficients over experts with those of the named base adapters: 1 in all blocks."""
    return {**coefficients, **dict.fromkeys(names, (1.0,) * blocks)}
