"""From base, experts and coefficients to a running model.

W^m = W_0^m + sum_i lambda_{i, block(m)} * s_i B_i^m A_i^m, rebuilt from the pristine W_0 for every candidate: nothing
is added and subtracted in place, so nothing drifts. The sum is float32 and cast once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memmcl.backbone.forward import Backbone
from memmcl.errors import GenomeError, ModelError
from memmcl.experts.adapter import Adapter, Factors
from memmcl.merge.genome import Coefficients, block_of

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class Merger:
    """Keeps the pristine weights and the stacked factors, and puts any linear merge into the backbone's weights.

    Raises:
        ModelError: an adapter with a module that the backbone has not, below its split, or of another shape.
    """

    def __init__(self, backbone: Backbone, adapters: Mapping[str, Adapter], blocks: int) -> None:
        self.backbone = backbone
        self.blocks = blocks
        self.experts = tuple(adapters)
        self._modules: dict[str, list[tuple[str, Factors]]] = {}
        for expert, adapter in adapters.items():
            for module, factors in adapter.items():
                self._modules.setdefault(module, []).append((expert, factors))
        self._pristine: dict[str, Tensor] = {}
        for module, parts in self._modules.items():
            weight = self._weight(module)
            for expert, factors in parts:
                shape = (len(factors.b), factors.a.shape[1])
                if shape != tuple(weight.shape):
                    raise ModelError(
                        f"expert {expert} was trained on another base: {module} is {tuple(weight.shape)} here, "
                        f"{shape} there; train it on this base"
                    )
            self._pristine[module] = weight.detach().clone()

    @torch.no_grad()
    def apply(self, coefficients: Coefficients) -> None:
        """Set the backbone's weights to the merge. Experts left out of `coefficients` count as zero."""
        unknown = sorted(set(coefficients) - set(self.experts))
        wrong = [expert for expert, values in coefficients.items() if len(values) != self.blocks]
        if unknown or wrong:
            raise GenomeError(
                f"coefficients are for other experts {unknown} or have not {self.blocks} blocks {wrong}; "
                f"this merge holds {list(self.experts)}"
            )
        for module, parts in self._modules.items():
            block = block_of(layer_of(module), self.backbone.split, self.backbone.layers, self.blocks)
            scaled = [
                (coefficients[e][block] * f.scale, f)
                for e, f in parts
                if coefficients.get(e, (0.0,) * self.blocks)[block]
            ]
            pristine = self._pristine[module]
            if not scaled:
                self._weight(module).copy_(pristine)
                continue
            device = pristine.device
            b = torch.cat([value * f.b.to(device) for value, f in scaled], dim=1)
            a = torch.cat([f.a.to(device) for _, f in scaled])
            self._weight(module).copy_(torch.addmm(pristine.float(), b, a))

    def reset(self) -> None:
        """Set the backbone's weights back to the base, bit for bit."""
        self.apply({})

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


def layer_of(module: str) -> int:
    """Return the index of the layer that `module` lies in."""
    match = _LAYER.match(module)
    if match is None:
        raise ModelError(f"expected an adapted module inside model.layers; got {module}")
    return int(match[1])


def lowest_layer(adapters: Sequence[Adapter]) -> int:
    """Return the lowest layer that any of the adapters changes."""
    return min(layer_of(module) for adapter in adapters for module in adapter)


def merged_factors(
    adapters: Mapping[str, Adapter], coefficients: Coefficients, *, lowest: int, layers: int
) -> dict[str, Factors]:
    """Return one adapter that equals the merge exactly: ranks are concatenated, coefficients folded into b.

    Per module: a: (sum of ranks, d_in), b: (d_out, sum of ranks), scale 1. Modules of `lowest` and above only.
    """
    blocks = len(next(iter(coefficients.values())))
    parts: dict[str, list[tuple[float, Factors]]] = {}
    for expert, adapter in adapters.items():
        for module, factors in adapter.items():
            value = coefficients[expert][block_of(layer_of(module), lowest, layers, blocks)]
            parts.setdefault(module, []).append((value * factors.scale, factors))
    return {
        module: Factors(torch.cat([f.a for _, f in pairs]), torch.cat([value * f.b for value, f in pairs], dim=1), 1.0)
        for module, pairs in sorted(parts.items())
    }
