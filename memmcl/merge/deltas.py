"""What a merge adds to each module of the base, one module at a time, out of the factors of the experts.

Linear merges are one matrix product of the concatenated factors. Methods of matrices work in the small basis of the
stacked factors, which is computed once for each module. For all others one expert's task vector at a time is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memmcl import seeds
from memmcl.adapters.format import Adapter, Factors
from memmcl.config.methods import METHODS
from memmcl.errors import ConfigError, ModelError
from memmcl.merge.genome import Recipe, block_of
from memmcl.merge.spectral import Core, core_space
from memmcl.merge.table import run_method

Grams = Mapping[str, Mapping[str, Tensor]]
"""By expert and module, the second moment (d_in, d_in) of the module's inputs, float32."""
Values = Mapping[str, Sequence[float | Tensor]]
"""Coefficients by expert and block, as numbers, or as tensors without dimensions of a linear merge."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def layer_of(module: str) -> int:
    """Return the index of the layer that `module` lies in."""
    match = _LAYER.match(module)
    if match is None:
        raise ModelError(f"expected an adapted module inside model.layers; got {module}")
    return int(match[1])


class Deltas:
    """The factors of all experts by module, and what merges of them add to a weight.

    lowest, layers: layers [lowest, layers) are cut into the blocks of the coefficients. pinned: adapters that are added
    linearly, whatever the method. device: where the factors are kept, and merged.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        *,
        lowest: int,
        layers: int,
        pinned: Sequence[str] = (),
        grams: Grams | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.modules: dict[str, dict[str, Factors]] = {}
        for expert, adapter in adapters.items():
            for module, factors in adapter.items():
                self.modules.setdefault(module, {})[expert] = factors.to(device)
        self._device = device
        self._lowest, self._layers = lowest, layers
        self._pinned = frozenset(pinned)
        self._grams = grams
        self._cores: dict[str, Core] = {}

    def finite(self) -> bool:
        """Return whether all factors are numbers."""
        pairs = [pair for by_expert in self.modules.values() for pair in by_expert.values()]
        return all(bool(torch.isfinite(matrix).all()) for pair in pairs for matrix in (pair.a, pair.b))

    def add_to(self, weight: Tensor, module: str, coefficients: Values, recipe: Recipe) -> None:
        """Add the merge to `weight`, (d_out, d_in) float32, in place."""
        factors, dense = self.delta(module, coefficients, recipe)
        if dense is not None:
            weight += dense
        if factors is not None:
            weight.addmm_(factors.b, factors.a)

    def delta(self, module: str, coefficients: Values, recipe: Recipe) -> tuple[Factors | None, Tensor | None]:
        """Return what the merge adds to one module: factors, scale 1, and a dense matrix, (d_out, d_in).

        Float32. Linear merges and those of the small basis are factors, others dense; None: there are none.
        """
        pairs, present = self.modules[module], self._present(module, coefficients)
        linear = [name for name in present if recipe.method == "linear" or name in self._pinned]
        merged = {name: value for name, value in present.items() if name not in linear}
        a = [pairs[name].a for name in linear]
        b = [present[name] * pairs[name].scale * pairs[name].b for name in linear]
        dense = None
        if merged and METHODS[recipe.method].matrices:
            core = self._core(module)
            weights = torch.tensor([merged.get(name, 0.0) for name in pairs if name not in self._pinned])
            a.append(core.right.to(self._device))
            small = run_method(recipe.method, core.matrices, weights, **recipe.parameters)
            b.append((core.left @ small).to(self._device))
        elif merged:
            dense = self._dense(module, merged, recipe)
        return Factors(torch.cat(a), torch.cat(b, dim=1), 1.0) if a else None, dense

    def _present(self, module: str, coefficients: Values) -> dict[str, Any]:
        """Return the coefficients, in this module's block, of the experts that change it; the number 0 is left out."""
        present = {}
        for expert in (name for name in self.modules[module] if name in coefficients):
            values = coefficients[expert]
            value = values[block_of(layer_of(module), self._lowest, self._layers, len(values))]
            if isinstance(value, Tensor) or value:
                present[expert] = value
        return present

    def _dense(self, module: str, coefficients: Mapping[str, float], recipe: Recipe) -> Tensor:
        method, parameters = METHODS[recipe.method], dict[str, Any](recipe.parameters)
        if method.seeded:
            parameters["seeds"] = [seeds.derive(recipe.seed, "mask", module, expert) for expert in coefficients]
        if method.grams:
            if self._grams is None:
                raise ConfigError(f"{recipe.method} needs the second moments of the experts' inputs: give rows of each")
            parameters["grams"] = [self._grams[expert][module].to(self._device) for expert in coefficients]
        vectors = WrittenOut([self.modules[module][expert] for expert in coefficients])
        return run_method(recipe.method, vectors, torch.tensor(list(coefficients.values())), **parameters)

    def _core(self, module: str) -> Core:
        if module not in self._cores:
            # in the experts' small basis a GPU is slower than a CPU
            merged = [pair.to("cpu") for name, pair in self.modules[module].items() if name not in self._pinned]
            self._cores[module] = core_space(merged)
        return self._cores[module]


class WrittenOut:
    """Task vectors of one module, (d_out, d_in) float32: each is written out when it is read, and not kept."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        self._factors = factors

    def __len__(self) -> int:
        return len(self._factors)

    def __getitem__(self, index: int) -> Tensor:
        pair = self._factors[index]
        return torch.mm(pair.b * pair.scale, pair.a)
