"""LoRA layers in the resident backbone: injected, initialised, read and removed again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memmcl import seeds
from memmcl.adapters.format import Adapter, Factors
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.errors import TrainingError
from memmcl.experts.fused import fuse
from memmcl.experts.settings import LoraShape
from memmcl.experts.trunk import PACKED, Trunk

if TYPE_CHECKING:  # importing peft takes seconds, and merging does not need it
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
Layers = dict[str, "LoraLayer"]  # LoRA layers by module name as in the base model


@contextmanager
def adapted(backbone: Backbone, shape: LoraShape, initial: Mapping[str, Factors]) -> Iterator[Layers]:
    """Within the block, LoRA layers that start at `initial` lie over its modules; then the backbone is as before."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        use_rslora=shape.rslora,
        target_modules=list(initial),
        rank_pattern={name: len(pair.a) for name, pair in initial.items()},
    )
    with torch.random.fork_rng(devices=[]):  # PEFT initialises from the global generator; replaced below
        inject_adapter_in_model(config, backbone.model)
    layers: Layers = {}
    try:
        for name, pair in initial.items():
            layer = backbone.model.get_submodule(name)
            assert isinstance(layer, LoraLayer)
            layer.lora_A[ADAPTER].weight.data = pair.a.to(backbone.device, copy=True)
            layer.lora_B[ADAPTER].weight.data = pair.b.to(backbone.device, copy=True)
            layer.scaling[ADAPTER] = pair.scale
            layers[name] = layer
        if not shape.dropout:
            fuse(layers.values(), ADAPTER)
        yield layers
    finally:
        for name in initial:
            parent, _, child = name.rpartition(".")
            layer = backbone.model.get_submodule(name)
            if isinstance(layer, LoraLayer):
                setattr(backbone.model.get_submodule(parent), child, layer.get_base_layer())
        del backbone.model.peft_config
        backbone.model.requires_grad_(False)


@contextmanager
def switched_off(layers: Layers) -> Iterator[None]:
    """Within the block, the LoRA layers change nothing: the model is the base."""
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def parameters_of(layers: Layers) -> dict[str, nn.Parameter]:
    """Return the trained matrices by name, `MODULE.A` and `MODULE.B`."""
    return {
        f"{name}.{letter}": matrix[ADAPTER].weight
        for name, layer in layers.items()
        for letter, matrix in (("A", layer.lora_A), ("B", layer.lora_B))
    }


def factors_of(layers: Layers) -> dict[str, Factors]:
    """Return a copy of the factors, float32 on the CPU."""
    values = {name: value.detach().float().cpu().clone() for name, value in parameters_of(layers).items()}
    return {
        name: Factors(values[f"{name}.A"], values[f"{name}.B"], float(layer.scaling[ADAPTER]))
        for name, layer in layers.items()
    }


def initial_factors(
    backbone: Backbone, shape: LoraShape, seed: int, trunk: Trunk, anchors: Mapping[str, Sequence[TokenizedRow]]
) -> dict[str, Factors]:
    """Return the factors that a training starts from: A by `shape.init`, B zero.

    Raises:
        TrainingError: a target module that no adapted layer has; or "osrm" without rows of other subtasks.
    """
    generator = torch.Generator().manual_seed(seeds.derive(seed, "init"))
    scale = shape.alpha / (math.sqrt(shape.rank) if shape.rslora else shape.rank)
    linear = {name: backbone.model.get_submodule(name) for name in _target_names(backbone, shape.target_modules)}
    moments = _input_moments(backbone, linear, trunk, anchors) if shape.init == "osrm" else {}
    factors = {}
    for name, module in linear.items():
        assert isinstance(module, nn.Linear)
        bound = 1 / math.sqrt(module.in_features)  # PEFT's Kaiming uniform with a = sqrt(5), but from our seed
        a = torch.empty(shape.rank, module.in_features).uniform_(-bound, bound, generator=generator)
        if moments:
            # eigenvalues ascend: the first eigenvectors are the directions least used; as long as Kaiming's rows
            least = torch.linalg.eigh(moments[name])[1][:, : shape.rank].T
            a = (least * float(a.norm() / math.sqrt(shape.rank))).contiguous()
        factors[name] = Factors(a, torch.zeros(module.out_features, shape.rank), scale)
    return factors


@torch.no_grad()
def _input_moments(
    backbone: Backbone, linear: Mapping[str, nn.Module], trunk: Trunk, anchors: Mapping[str, Sequence[TokenizedRow]]
) -> dict[str, Tensor]:
    """Return, by module, the second moment (d_in, d_in) of its inputs over the tokens of the other subtasks' rows.

    Tokens of a prefix that packed rows share are run once, and count once.
    """
    if not any(anchors.values()):
        raise TrainingError("experts.init: osrm needs rows of other subtasks; give anchor rows, or use kaiming")
    moments: dict[str, Tensor] = {}
    used = 0

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features = inputs[0][0, :used].float()
        moments[name] = moments.get(name, torch.zeros((), device=features.device)) + features.T @ features

    with ExitStack() as stack:
        for name, module in linear.items():
            stack.enter_context(module.register_forward_pre_hook(partial(add, name)))
        for rows in anchors.values():
            for start in range(0, len(rows), PACKED):
                hidden, batch = trunk.packed(rows[start : start + PACKED])
                used = int(batch.lengths)
                backbone.top(hidden, batch, every_token=True)
    return {name: moment.cpu() for name, moment in moments.items()}


def check_shape(start: Adapter, backbone: Backbone) -> None:
    """Refuse an adapter of another base, or of other layers.

    Raises:
        TrainingError: a module that the backbone has not, of another shape, or below the backbone's split.
    """
    trunk = tuple(f"model.layers.{index}." for index in range(backbone.split))
    modules = dict(backbone.model.named_modules())
    for name, pair in start.items():
        if name.startswith(trunk):
            raise TrainingError(
                f"the adapter changes {name}, below layer {backbone.split}, the lowest that training adapts; "
                "set experts.adapt_layers so that it covers all layers of the adapter"
            )
        module = modules.get(name)
        expected = f"{len(pair.b)} x {pair.a.shape[1]}"
        actual = "no such linear layer"
        if isinstance(module, nn.Linear):
            actual = f"{module.out_features} x {module.in_features}"
        if actual != expected:
            raise TrainingError(
                f"the adapter changes {name} of {expected}, this base has {actual}; was it trained on another base?"
            )


def _target_names(backbone: Backbone, target_modules: Sequence[str]) -> list[str]:
    layers = tuple(f"model.layers.{index}." for index in range(backbone.split, backbone.layers))
    kinds = {
        name: name.rpartition(".")[2]
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(layers)
    }
    missing, present = sorted(set(target_modules) - set(kinds.values())), sorted(set(kinds.values()))
    if missing:
        raise TrainingError(f"experts.target_modules: no linear layer named {missing}; this model has {present}")
    return [name for name, kind in kinds.items() if kind in target_modules]
