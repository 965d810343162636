"""LoRA layers in the resident backbone: put in, given a start, read out, taken out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:  # with peft come transformers' models, for seconds: whoever only merges needs neither
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
Layers = dict[str, "LoraLayer"]
"""LoRA layers by module name as in the base model."""


@contextmanager
def adapted(backbone: Backbone, shape: LoraShape, initial: Mapping[str, Factors]) -> Iterator[Layers]:
    """Hold LoRA layers that start at `initial` over its modules; the backbone is as it was when the block ends."""
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
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator what is replaced below
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
    """Within the block the model is the base."""
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
    found = {}
    for name, layer in layers.items():
        a, b = (matrix[ADAPTER].weight.detach().float().cpu().clone() for matrix in (layer.lora_A, layer.lora_B))
        found[name] = Factors(a, b, float(layer.scaling[ADAPTER]))
    return found


def initial_factors(
    backbone: Backbone, shape: LoraShape, seed: int, trunk: Trunk, others: Mapping[str, Sequence[TokenizedRow]]
) -> dict[str, Factors]:
    """Return where a training starts: A as `shape.init` says, B zero.

    Raises:
        TrainingError: a target module that no adapted layer has; or "osrm" without rows of other subtasks.
    """
    names = _target_names(backbone, shape.target_modules)
    generator = torch.Generator().manual_seed(seeds.derive(seed, "init"))
    scale = shape.alpha / (math.sqrt(shape.rank) if shape.rslora else shape.rank)
    linear = {name: backbone.model.get_submodule(name) for name in names}
    moments = _input_moments(backbone, linear, trunk, others) if shape.init == "osrm" else {}
    found = {}
    for name, module in linear.items():
        assert isinstance(module, nn.Linear)
        bound = 1 / math.sqrt(module.in_features)  # PEFT's Kaiming uniform with a = sqrt(5), but from our seed
        a = torch.empty(shape.rank, module.in_features).uniform_(-bound, bound, generator=generator)
        if moments:
            # eigenvalues ascend: the first eigenvectors are the directions least used; as long as Kaiming's rows
            least = torch.linalg.eigh(moments[name])[1][:, : shape.rank].T
            a = (least * float(a.norm() / math.sqrt(shape.rank))).contiguous()
        found[name] = Factors(a, torch.zeros(module.out_features, shape.rank), scale)
    return found


@torch.no_grad()
def _input_moments(
    backbone: Backbone, linear: Mapping[str, nn.Module], trunk: Trunk, others: Mapping[str, Sequence[TokenizedRow]]
) -> dict[str, Tensor]:
    """Return, by module, the second moment (d_in, d_in) of its inputs over the tokens of the other subtasks' rows.

    Tokens that the rows of a pack begin with in common are run once, and count once.
    """
    if not any(others.values()):
        raise TrainingError("experts.init: osrm needs rows of other subtasks; give anchor rows, or use kaiming")
    moments: dict[str, Tensor] = {}
    used = 0

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features = inputs[0][0, :used].float()
            moments[name] = moments.get(name, torch.zeros((), device=features.device)) + features.T @ features

        return hook

    with ExitStack() as stack:
        for name, module in linear.items():
            stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        for rows in others.values():
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
    for name, pair in start.items():
        if name.startswith(trunk):
            raise TrainingError(
                f"the adapter changes {name}, below layer {backbone.split}, the lowest that training adapts; "
                "set experts.adapt_layers so that it covers all layers of the adapter"
            )
        try:
            module = backbone.model.get_submodule(name)
        except AttributeError:
            module = None
        wanted = (len(pair.b), pair.a.shape[1])
        found = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None
        if found != wanted:
            raise TrainingError(
                f"the adapter changes {name} of {wanted[0]} x {wanted[1]}, this base has "
                f"{f'{found[0]} x {found[1]}' if found else 'no such linear layer'}; was it trained on another base?"
            )


def _target_names(backbone: Backbone, target_modules: Sequence[str]) -> list[str]:
    layers = tuple(f"model.layers.{index}." for index in range(backbone.split, backbone.layers))
    linear = [
        name
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(layers)
    ]
    present = {name.rpartition(".")[2] for name in linear}
    missing = sorted(set(target_modules) - present)
    if missing:
        raise TrainingError(
            f"experts.target_modules: no linear layer named {missing}; this model has {sorted(present)}"
        )
    return [name for name in linear if name.rpartition(".")[2] in target_modules]
