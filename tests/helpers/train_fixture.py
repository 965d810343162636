"""What the tests of training share: small settings, plain passes that compute everything, and what must not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import answer_logits, backbone_of, plain_model, prompter_of, training_rows
from torch import Tensor, nn

from memmcl.adapters.format import Adapter, Factors, to_files
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.experts.settings import Anchoring, Checkpointing, LoraShape, Optimisation, TrainingData, TrainingSettings
from memmcl.experts.train import TrainedAdapter, train_adapter
from memmcl.merge.build import Merger

Rows = Mapping[str, Sequence[TokenizedRow]]
ADAPTER = "default"

LORA = LoraShape(("q_proj", "v_proj", "down_proj"), rank=4, alpha=8.0)
PLAN = Optimisation(steps=5, batch_size=4, learning_rate=5e-3)
ANCHORING = Anchoring(weight=0.5, batch_size=2)


@cache
def own_rows(directory: Path) -> dict[str, list[TokenizedRow]]:
    """Return six rows of one subtask."""
    return {"sent2": training_rows(prompter_of(directory), "sent2", 6)}


@cache
def other_rows(directory: Path) -> dict[str, list[TokenizedRow]]:
    """Return three rows each of two other subtasks."""
    return {name: training_rows(prompter_of(directory), name, 3) for name in ("irony", "uabsa")}


@cache
def held_out_rows(directory: Path) -> dict[str, list[TokenizedRow]]:
    """Return three rows of the first subtask that are not among its six."""
    return {"sent2": training_rows(prompter_of(directory), "sent2", 9)[6:]}


def train(
    backbone: Backbone, rows: Rows, anchors: Rows | None = None, *, seed: int = 7, **changed: Any
) -> TrainedAdapter:
    """Train by LORA, PLAN and ANCHORING; `changed` are fields of all groups of settings, and other arguments."""
    if "save_every" in changed:
        changed["every"] = changed.pop("save_every")

    def regroup(group: Any) -> Any:
        names = {field.name for field in fields(group)}
        return replace(group, **{key: changed.pop(key) for key in names & set(changed)})

    data = regroup(TrainingData(rows, anchors or {}))
    settings = regroup(TrainingSettings(regroup(LORA), regroup(PLAN), seed, ANCHORING))
    return train_adapter(backbone, data, settings, checkpointing=regroup(Checkpointing()), **changed)


def assert_same_factors(one: Adapter, two: Adapter) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name].a, two[name].a), name
        assert torch.equal(one[name].b, two[name].b), name
        assert one[name].scale == two[name].scale


def assert_same_training(one: TrainedAdapter, two: TrainedAdapter) -> None:
    """Compare all bits but the clock's."""
    assert_same_factors(one.factors, two.factors)
    timeless = {"factors": {}, "seconds": 0.0}
    assert replace(one, **timeless) == replace(two, **timeless)


def distance(one: Adapter, two: Adapter) -> float:
    """Return the largest relative distance between two factors."""
    return max(
        float((getattr(one[name], factor) - getattr(two[name], factor)).norm() / getattr(two[name], factor).norm())
        for name in two
        for factor in "ab"
    )


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a training could leave behind: weights, buffers, types, flags, hooks, attributes."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "flags": {name: (p.requires_grad, p.grad is None, p.dtype) for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "types": {name: type(m) for name, m in model.named_modules()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
    }


def assert_same_state(one: dict[str, Any], two: dict[str, Any]) -> None:
    for kind in ("flags", "types", "modes", "hooks", "attributes"):
        assert one[kind] == two[kind], kind
    for kind in ("parameters", "buffers"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind]), kind


def current_factors(backbone: Backbone) -> dict[str, Factors]:
    """Return the factors that are in training in this moment."""
    return {name: factors_in(layer) for name, layer in backbone.model.named_modules() if isinstance(layer, LoraLayer)}


def factors_in(layer: LoraLayer) -> Factors:
    a, b = (matrix[ADAPTER].weight.detach().clone() for matrix in (layer.lora_A, layer.lora_B))
    return Factors(a, b, layer.scaling[ADAPTER])


def merged(directory: Path, adapter: Adapter) -> nn.Module:
    """Return the tiny base with an adapter merged into its weights."""
    backbone = backbone_of(directory, 0)
    Merger(backbone, {"one": adapter}, blocks=1).apply({"one": (1.0,)})
    return backbone.model


def loaded(directory: Path, folder: Path, adapter: Adapter, **written: Any) -> PeftModel:
    """Return the tiny base with an adapter that went through `to_files` and that PEFT loaded."""
    folder.mkdir(exist_ok=True)
    for name, data in to_files(adapter, base_name="org/tiny", **written).items():
        (folder / name).write_bytes(data)
    return PeftModel.from_pretrained(plain_model(directory), folder).eval()


def naive_kl(base: nn.Module, adapted: nn.Module, rows: Sequence[TokenizedRow]) -> Tensor:
    """Mean KL(base || adapted) over the answer positions, one plain pass per row."""
    found = []
    for row in rows:
        with torch.no_grad():
            reference = answer_logits(base, row.prompt, row.continuations[0]).softmax(-1)
        logprobs = answer_logits(adapted, row.prompt, row.continuations[0]).log_softmax(-1)
        found.append((reference * (reference.log() - logprobs)).sum(-1))
    return torch.cat(found).mean()


def naive_loss(model: nn.Module, rows: Sequence[TokenizedRow]) -> Tensor:
    """Mean cross-entropy over the answer tokens, one plain pass per row."""
    logits = torch.cat([answer_logits(model, row.prompt, row.continuations[0]) for row in rows])
    return nn.functional.cross_entropy(logits, torch.tensor([token for row in rows for token in row.continuations[0]]))


Loss = Callable[[nn.Module, Sequence[TokenizedRow]], Tensor]


@dataclass(frozen=True)
class Plain:
    """A training in the open: whole rows through a whole PEFT model, all rows in every step, the loop in one place.

    rising: steps in which the rate rises. pulls: by step, the subtask whose rows anchor it and the pull's weight.
    """

    directory: Path
    optimisation: Optimisation
    rising: int
    pulls: Mapping[int, tuple[str, float]]
    loss: Loss = naive_loss

    def train(
        self, start: Adapter, rows: Sequence[TokenizedRow], anchors: Rows
    ) -> tuple[Adapter, list[float], list[float | None]]:
        """Return factors, own losses and anchors."""
        plan = self.optimisation
        base = plain_model(self.directory)
        rank = len(next(iter(start.values())).a)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=sorted(start))
        model = get_peft_model(plain_model(self.directory), config).eval()
        layers = {name: model.base_model.model.get_submodule(name) for name in start}
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_A[ADAPTER].weight.copy_(start[name].a)
                layer.lora_B[ADAPTER].weight.copy_(start[name].b)
                layer.scaling[ADAPTER] = start[name].scale
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(parameters) == 2 * len(start)
        optimiser = torch.optim.AdamW(parameters, weight_decay=plan.weight_decay)
        losses: list[float] = []
        distances: list[float | None] = []
        for step in range(plan.steps):
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * self._rate(step)
            loss = total = self.loss(model, rows)
            losses.append(float(loss.detach()))
            distances.append(None)
            if step in self.pulls:
                name, weight = self.pulls[step]
                kl = naive_kl(base, model, anchors[name])
                distances[-1] = float(kl.detach())
                total = loss + weight * kl
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(parameters, plan.clip)
            optimiser.step()
        return {name: factors_in(layer) for name, layer in layers.items()}, losses, distances

    def _rate(self, step: int) -> float:
        if step < self.rising:
            return (step + 1) / self.rising
        return 0.5 * (1 + math.cos(math.pi * (step - self.rising) / (self.optimisation.steps - self.rising)))


def initial_factors(backbone: Backbone, rows: Rows, **changed: Any) -> Adapter:
    """Return the factors that a training starts from: those after one step of next to no length."""
    return train(backbone, rows, **changed | {"steps": 1, "learning_rate": 1e-30}).factors
