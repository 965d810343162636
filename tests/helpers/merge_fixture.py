"""What the tests of merge methods share: a recipe of each method, and inputs' second moments that are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from memmcl.adapters.format import Factors
from memmcl.backbone.forward import Backbone
from memmcl.merge.genome import Recipe

COEFFICIENTS = {"low": (0.7, 0.2), "high": (0.4, 0.9), "top": (1.1, 0.4)}
Adapters = dict[str, dict[str, Factors]]
RECIPES = [
    Recipe("ties", {"density": 0.3, "scale": 1.4}),
    Recipe("dare_linear", {"density": 0.6}, seed=5),
    Recipe("dare_ties", {"density": 0.6, "divide_by": "count"}, seed=5),
    Recipe("della", {"density": 0.5}, seed=5),
    Recipe("breadcrumbs", {"density": 0.8}),
    Recipe("slerp"),
    Recipe("tsv"),
    Recipe("iso_cts"),
    Recipe("regmean"),
]


def weights_of(backbone: Backbone) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in backbone.model.state_dict().items()}


def moments(adapters: Adapters) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)

    def moment(size: int) -> Tensor:
        inputs = torch.randn(2 * size, size, generator=generator)
        return inputs.T @ inputs

    return {
        name: {module: moment(pair.a.shape[1]) for module, pair in adapter.items()}
        for name, adapter in adapters.items()
    }
