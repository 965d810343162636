"""What one search is, as small JSON that workers get with every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from memmcl.config.methods import METHODS
from memmcl.merge.genome import GenomeSpace, Recipe, compose

Parts = dict[str, dict[str, tuple[float, ...]]]
"""By part of the genome, its coefficients over experts, one per layer block."""


class SearchSpec(BaseModel):
    """One search: what its genes stand for, what it is scored on, what is tried first.

    key: of the log in the store that its records lie in. seeds: (origin, genome) of the candidates that come first.
    blocks: of layers, each with coefficients of its own. bounds: of coefficients. mask_seed: of the merge method's
    random masks. varied: (name, low, high) of the method's parameters that are genes. mask: whether every coefficient
    has a gene that switches it on and off. recipes: by part, where each merges in a way of its own: then a genome is
    one part at 1, and the others at 0. objectives: by name, the subtasks whose mean is one objective; empty: fitness
    alone counts. fixed: only the seeds are evaluated, all of them on all rows: no race, no stagnation.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    key: str
    strategy: str
    parts: Parts
    subtasks: tuple[str, ...]
    seeds: tuple[tuple[str, tuple[float, ...]], ...]
    evaluations: int
    blocks: int
    bounds: tuple[float, float]
    mask_seed: int
    method: str = "linear"
    parameters: dict[str, float | str] = {}
    varied: tuple[tuple[str, float, float], ...] = ()
    mask: bool = False
    recipes: dict[str, Recipe] = {}
    objectives: dict[str, tuple[str, ...]] = {}
    rows: Literal["weak", "selection"] = "weak"
    fixed: bool = False

    @property
    def space(self) -> GenomeSpace:
        """The genome's layout."""
        return GenomeSpace(tuple(self.parts), self.blocks, *self.bounds, self.varied, self.mask)

    def recipe(self, genome: Sequence[float]) -> Recipe:
        """Return how a genome merges: its method, with the parameters that are fixed and those that are genes."""
        if self.recipes:
            chosen = self.space.decode(genome)
            return next(self.recipes[part] for part, values in chosen.items() if any(values))
        return Recipe(self.method, {**self.parameters, **self.space.decode_parameters(genome)}, self.mask_seed)

    def coefficients(self, genome: Sequence[float]) -> dict[str, tuple[float, ...]]:
        """Return the coefficients over experts that a genome stands for."""
        return compose(self.space.decode(genome), self.parts)

    def genome(self, coefficients: Sequence[float]) -> tuple[float, ...]:
        """Return a seed with these coefficients: all of them on, parameters at their defaults within their bounds."""
        defaults = (min(max(METHODS[self.method].genes[gene].default, low), high) for gene, low, high in self.varied)
        return (*coefficients, *(1.0 for _ in self.space.binary), *defaults)
