"""From base, experts, coefficients and a recipe to a running model.

W^m = W_0^m + sum_i lambda_{i, block(m)} * s_i B_i^m A_i^m, or another merge of the same task vectors, computed anew
from the base's W_0 for every candidate, so that rounding errors do not add up. The sum is float32 and cast once. In
memory: the base once, the factors, and what one module's merge needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from memmcl.adapters.format import Adapter, Factors
from memmcl.backbone.forward import Backbone
from memmcl.backbone.recording import Recordings
from memmcl.errors import GenomeError, ModelError
from memmcl.merge.deltas import Deltas, Grams, layer_of
from memmcl.merge.genome import LINEAR, Coefficients, Recipe, block_of
from memmcl.merge.pristine import Pristine
from memmcl.merge.table import check_parameters


class Merger:
    """Keeps the factors and the way back to the pristine weights, and puts any merge into the backbone's weights.

    pinned: adapters that are added as they are, whatever the method, as a warm start is. grams: for regmean,
    by expert and module the second moment (d_in, d_in) of the module's inputs.

    Raises:
        ModelError: an adapter with a module that the backbone has not, below its split, or of another shape.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Mapping[str, Adapter],
        blocks: int,
        *,
        pinned: Sequence[str] = (),
        grams: Grams | None = None,
    ) -> None:
        self.backbone = backbone
        self.blocks = blocks
        self.experts = tuple(adapters)
        self._deltas = Deltas(
            adapters, lowest=backbone.split, layers=backbone.layers, pinned=pinned, grams=grams, device=backbone.device
        )
        weights = {module: self._weight(module) for module in self._deltas.modules}
        for module, by_expert in self._deltas.modules.items():
            for expert, factors in by_expert.items():
                here, there = tuple(weights[module].shape), (len(factors.b), factors.a.shape[1])
                if here != there:
                    raise ModelError(
                        f"expert {expert} was trained on another base: {module} is {here} here, {there} there; train "
                        "it on this base"
                    )
        self._pristine = Pristine(weights, Path(backbone.model.name_or_path))
        largest = max((weight.numel() for weight in weights.values()), default=0)
        self._total = torch.empty(largest, device=backbone.device)
        self._recordings = Recordings(backbone)
        self._values: Tensor | None = None
        """(experts, blocks) float32: on a GPU the coefficients of a linear merge, where what is recorded reads them"""
        if backbone.device.type == "cuda" and adapters and self._deltas.finite():  # zero times infinity is no zero
            self._values = torch.zeros(len(self.experts), blocks, device=backbone.device)

    def apply(self, coefficients: Coefficients, recipe: Recipe = LINEAR) -> None:
        """Set the backbone's weights to the merge. Experts left out of `coefficients`, or at zero, take no part.

        Raises:
            GenomeError: coefficients of other experts, or of another number of blocks.
            ConfigError: a recipe that no method takes.
        """
        unknown = sorted(set(coefficients) - set(self.experts))
        wrong = [expert for expert, values in coefficients.items() if len(values) != self.blocks]
        if unknown or wrong:
            raise GenomeError(
                f"coefficients are for other experts {unknown} or have not {self.blocks} blocks {wrong}; "
                f"this merge holds {list(self.experts)}"
            )
        check_parameters(recipe.method, recipe.parameters)
        if recipe.method != "linear" or self._values is None:
            return self._write(coefficients, recipe)
        self._values.copy_(torch.tensor([coefficients.get(name, (0.0,) * self.blocks) for name in self.experts]))
        self._recordings.run("linear", partial(self._write_linear, self._values))

    def _write_linear(self, values: Tensor) -> None:
        self._write({expert: tuple(row) for expert, row in zip(self.experts, values, strict=True)}, LINEAR)

    @torch.no_grad()
    def _write(self, coefficients: Mapping[str, Sequence[float | Tensor]], recipe: Recipe) -> None:
        for module, pristine in self._pristine:
            # one buffer for all: fresh memory for every module would cost as much as the sum itself
            total = self._total[: pristine.numel()].view(pristine.shape).copy_(pristine)
            self._deltas.add_to(total, module, coefficients, recipe)
            self._weight(module).copy_(total)

    def reset(self) -> None:
        """Set the backbone's weights back to the base, bit for bit."""
        self._write({}, LINEAR)

    def _weight(self, module: str) -> Tensor:
        if layer_of(module) < self.backbone.split:
            raise ModelError(f"an adapter changes {module}, below the split at layer {self.backbone.split}")
        try:
            layer = self.backbone.model.get_submodule(module)
        except AttributeError as error:
            raise ModelError(f"an adapter changes {module}, which the base model has not; wrong base?") from error
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight


@contextmanager
def added(backbone: Backbone, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Add adapters to the backbone's weights, each with the coefficient 1; put the base back at the end."""
    merger = Merger(backbone, adapters, 1)
    try:
        merger.apply(dict.fromkeys(adapters, (1.0,)))
        yield
    finally:
        merger.reset()


def lowest_layer(adapters: Sequence[Adapter]) -> int:
    """Return the lowest layer that any of the adapters changes."""
    return min(layer_of(module) for adapter in adapters for module in adapter)


def merged_factors(
    adapters: Mapping[str, Adapter], coefficients: Coefficients, *, lowest: int, layers: int
) -> dict[str, Factors]:
    """Return one adapter that equals the linear merge exactly: ranks are concatenated, coefficients folded into b.

    Per module: a: (sum of ranks, d_in), b: (d_out, sum of ranks), scale 1. Modules of `lowest` and above only.
    """
    blocks = len(next(iter(coefficients.values())))
    stacked: dict[str, list[tuple[float, Factors]]] = {}
    for expert, adapter in adapters.items():
        for module, factors in adapter.items():
            value = coefficients[expert][block_of(layer_of(module), lowest, layers, blocks)]
            stacked.setdefault(module, []).append((value * factors.scale, factors))
    return {
        module: Factors(torch.cat([f.a for _, f in pairs]), torch.cat([value * f.b for value, f in pairs], dim=1), 1.0)
        for module, pairs in sorted(stacked.items())
    }
