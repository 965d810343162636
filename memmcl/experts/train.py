"""Train one LoRA adapter: answers only, anchored, the trunk's activations computed once.

An expert pays, beside its own loss, mu * KL(base || expert) at the answer positions of rows from the other subtasks,
so that its task vector acts on its own prompts and leaves the rest alone (weight disentanglement; in the manner of
Yoshida et al. 2025, "Mastering Task Arithmetic: tau-Jp"; the KL form is our own).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from memmcl import seeds
from memmcl.backbone.forward import Backbone, Batch, Row, pack
from memmcl.errors import TrainingError
from memmcl.experts.adapter import Factors
from memmcl.suite.prompts import shared_prefix

STAGE_VERSION = 2
ADAPTER = "default"


@dataclass(frozen=True)
class Trained:
    """A trained adapter and how the training went.

    loss: mean cross-entropy per answer token, by step; anchor: mean KL per answer position (nats), by step, empty
    without an anchor; tokens: answer and prompt tokens that went through the adapted layers.
    """

    factors: dict[str, Factors]
    loss: tuple[float, ...]
    anchor: tuple[float, ...]
    parameters: int
    tokens: int
    seconds: float


Progress = Callable[[int, int, float], None]
"""Called after each step with (steps done, steps in all, loss)."""


def train_adapter(
    backbone: Backbone,
    rows: Sequence[Row],
    anchors: Mapping[str, Sequence[Row]],
    *,
    target_modules: Sequence[str],
    rank: int,
    alpha: float,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    clip: float,
    steps: int,
    batch_size: int,
    anchor_weight: float,
    anchor_batch_size: int,
    seed: int,
    progress: Progress | None = None,
) -> Trained:
    """Train LoRA on the backbone's top layers, and leave the backbone as it was.

    rows: one continuation each, the answer with its end token. anchors: rows of other subtasks by subtask; each step
    takes one of these subtasks in turn. warmup: share of the steps with a rising rate, then cosine to zero. clip: the
    largest norm of the gradient.

    Raises:
        TrainingError: no rows, a target module that no layer has, or a loss that is not finite.
    """
    if not rows:
        raise TrainingError("expected rows to train on, got none; check data.train_rows and the data source")
    started = time.perf_counter()
    modules = _inject(backbone, target_modules, rank, alpha, seed)
    try:
        parameters = [matrix[ADAPTER].weight for m in modules.values() for matrix in (m.lora_A, m.lora_B)]
        optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(steps, warmup))
        anchored = [name for name in sorted(anchors) if anchors[name]] if anchor_weight > 0 else []
        trunk = _Trunk(backbone, [rows, *(anchors[name] for name in anchored)])
        batches = _stream(rows, batch_size, seeds.derive(seed, "rows"))
        others = {
            name: _stream(anchors[name], anchor_batch_size, seeds.derive(seed, "anchor", name)) for name in anchored
        }
        losses, distances, tokens = [], [], 0
        for step in range(steps):
            optimiser.zero_grad()
            # Each part runs backward by itself: the gradients add up, and half of the activations live at a time.
            hidden, batch = trunk.packed(next(batches))
            loss = _cross_entropy(backbone, hidden, batch)
            tokens += int(batch.lengths)
            losses.append(_checked(loss, step, steps))
            loss.backward()  # type: ignore[no-untyped-call]
            if anchored:
                shown = next(others[anchored[step % len(anchored)]])
                hidden, batch = trunk.packed(shown)
                distance = _kl(backbone, hidden, batch, trunk.base_outputs(shown, modules))
                tokens += int(batch.lengths)
                distances.append(_checked(distance, step, steps))
                (anchor_weight * distance).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimiser.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps, losses[-1])
        factors = {name: _factors(module) for name, module in modules.items()}
    finally:
        _eject(backbone, modules)
    count = sum(parameter.numel() for parameter in parameters)
    return Trained(factors, tuple(losses), tuple(distances), count, tokens, time.perf_counter() - started)


class _Trunk:
    """The trunk's activations of prefixes and row bodies, each computed once and alone."""

    def __init__(self, backbone: Backbone, groups: Sequence[Sequence[Row]]) -> None:
        self._backbone = backbone
        self._prefix: dict[Row, int] = {}
        for group in groups:
            self._prefix |= dict.fromkeys(group, shared_prefix([row.prompt for row in group]))
        self._hidden: dict[tuple[int, ...], Tensor] = {}
        self._bodies: dict[Row, Tensor] = {}
        self._outputs: dict[Row, Tensor] = {}

    def packed(self, rows: Sequence[Row]) -> tuple[Tensor, Batch]:
        """Return the activations (1, length, d) and the batch of `rows` packed into one sequence."""
        prefixes = [self._prefix[row] for row in rows]
        batch = pack(rows, prefixes, self._backbone.pad, self._backbone.device)
        parts: list[Tensor] = []
        seen: set[tuple[int, ...]] = set()
        for row, length in zip(rows, prefixes, strict=True):
            shared = row.prompt[:length]
            if shared not in seen:
                seen.add(shared)
                parts.append(self._prefix_hidden(shared))
            parts.append(self._body(row, length))
        hidden = torch.cat(parts)
        padded = nn.functional.pad(hidden, (0, 0, 0, batch.tokens.shape[1] - len(hidden)))
        return padded[None], batch

    def base_outputs(self, rows: Sequence[Row], modules: Mapping[str, LoraLayer]) -> Tensor:
        """Return the base's outputs (n, d) at the answers of `rows`; computed once a row, the adapter off."""
        missing = [row for row in rows if row not in self._outputs]
        if missing:
            for module in modules.values():
                module.enable_adapters(False)
            with torch.no_grad():
                for row in missing:
                    hidden, batch = self.packed([row])
                    self._outputs[row] = self._backbone.top(hidden, batch)
            for module in modules.values():
                module.enable_adapters(True)
        return torch.cat([self._outputs[row] for row in rows])

    def _prefix_hidden(self, shared: tuple[int, ...]) -> Tensor:
        if not shared:
            width = self._backbone.model.config.hidden_size
            return torch.empty(0, width, dtype=self._backbone.dtype, device=self._backbone.device)
        if shared not in self._hidden:
            self._hidden[shared] = self._backbone.sequence_hidden(shared)
        return self._hidden[shared]

    def _body(self, row: Row, length: int) -> Tensor:
        if row not in self._bodies:
            (answer,) = row.continuations
            self._bodies[row] = self._backbone.sequence_hidden((*row.prompt, *answer[:-1]))[length:]
        return self._bodies[row]


def _checked(loss: Tensor, step: int, steps: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss became {value} at step {step + 1} of {steps}; "
            "lower experts.learning_rate, or look for broken rows"
        )
    return value


def _cross_entropy(backbone: Backbone, hidden: Tensor, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(backbone.logits(backbone.top(hidden, batch)), batch.targets)


def _kl(backbone: Backbone, hidden: Tensor, batch: Batch, base: Tensor) -> Tensor:
    """Return the mean over positions of KL(base || adapted), in nats."""
    adapted = backbone.logits(backbone.top(hidden, batch)).log_softmax(-1)
    with torch.no_grad():
        reference = backbone.logits(base).log_softmax(-1)
    return nn.functional.kl_div(adapted, reference, reduction="sum", log_target=True) / len(base)


def _factors(module: LoraLayer) -> Factors:
    a, b = (matrix[ADAPTER].weight.detach().float().cpu().clone() for matrix in (module.lora_A, module.lora_B))
    return Factors(a, b, float(module.scaling[ADAPTER]))


def _cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _stream(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Yield batches without end: one shuffled epoch after the other, a batch may span two."""
    rng = np.random.default_rng(seed)
    queue: list[Row] = []
    while True:
        while len(queue) < size:
            queue += [rows[i] for i in rng.permutation(len(rows))]
        yield queue[:size]
        queue = queue[size:]


def _inject(
    backbone: Backbone, target_modules: Sequence[str], rank: int, alpha: float, seed: int
) -> dict[str, LoraLayer]:
    """Put a PEFT LoRA layer over every target module of the top layers; names as in the base model."""
    names = _target_names(backbone, target_modules)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator what is replaced below
        inject_adapter_in_model(config, backbone.model)
    generator = torch.Generator().manual_seed(seeds.derive(seed, "init"))
    modules: dict[str, LoraLayer] = {}
    for name in names:
        layer = backbone.model.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        bound = 1 / math.sqrt(layer.in_features)  # PEFT's Kaiming uniform with a = sqrt(5), but from our seed
        start = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        layer.lora_A[ADAPTER].weight.data = start.to(backbone.device)
        layer.lora_B[ADAPTER].weight.data = torch.zeros(layer.out_features, rank, device=backbone.device)
        modules[name] = layer
    return modules


def _target_names(backbone: Backbone, target_modules: Sequence[str]) -> list[str]:
    layers = [f"model.layers.{index}." for index in range(backbone.split, backbone.layers)]
    linear = [
        name for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(tuple(layers))
    ]  # fmt: skip
    present = {name.rpartition(".")[2] for name in linear}
    missing = sorted(set(target_modules) - present)
    if missing:
        raise TrainingError(
            f"experts.target_modules: no linear layer named {missing}; this model has {sorted(present)}"
        )
    return [name for name in linear if name.rpartition(".")[2] in target_modules]


def _eject(backbone: Backbone, modules: Mapping[str, LoraLayer]) -> None:
    for name, layer in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(backbone.model.get_submodule(parent), child, layer.get_base_layer())
    del backbone.model.peft_config
    backbone.model.requires_grad_(False)
