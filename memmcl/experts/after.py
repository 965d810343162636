"""Anchoring a finished adapter: training on unlabelled text that undoes its effect on other subtasks. [ours]

Its outputs stay close to what they were at its own prompts, by KL(adapter before || adapter now), and to the base's at
the prompts of other subtasks, by KL(base || adapter). The training loop is `train_adapter`; here are the rows for it
and the divergences before and after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memmcl.adapters.format import Adapter
from memmcl.backbone.activations import Activations
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.decode import greedy
from memmcl.backbone.forward import Backbone
from memmcl.experts.forced import forced_rows
from memmcl.experts.lora import adapted, check_shape, switched_off
from memmcl.experts.objective import divergence
from memmcl.experts.settings import Anchoring, LoraShape, Optimisation, TrainingData, TrainingSettings
from memmcl.experts.train import StepCallback, TrainedAdapter, train_adapter
from memmcl.experts.trunk import Trunk
from memmcl.suite.prompts import Prompter, shared_prefix
from memmcl.suite.subtasks import Subtask

STAGE_VERSION = 1
ANSWER_TOKENS = 64  # the longest answer that an adapter gives to its own prompts
OWN = "own"
RECORD = "anchoring.json"
"""Beside the adapter: what it was computed from, its divergences, and the digests of its files."""


@dataclass(frozen=True)
class AnchoringRows:
    """Rows with one continuation each. own: answered by the adapter itself; others: forced answers, by subtask."""

    own: tuple[TokenizedRow, ...]
    others: Mapping[str, tuple[TokenizedRow, ...]]


@dataclass(frozen=True)
class Divergences:
    """Mean KL in nats per answer token.

    itself: KL(adapter before || adapter now) at its own prompts. own: KL(adapter now || base) at the same prompts, the
    adapter's effect there. others: KL(base || adapter now) at the prompts of each other subtask.
    """

    itself: float
    own: float
    others: dict[str, float]


@dataclass(frozen=True)
class Anchored:
    """The anchored adapter with its training, and its divergences on held-out texts before and after."""

    trained: TrainedAdapter
    before: Divergences
    after: Divergences


def anchor_adapter(
    backbone: Backbone,
    adapter: Adapter,
    training: AnchoringRows,
    held_out: AnchoringRows,
    *,
    optimisation: Optimisation,
    anchoring: Anchoring,
    seed: int,
    progress: StepCallback | None = None,
) -> Anchored:
    """Anchor a finished adapter, and leave the backbone as it was. The same arguments give the same bits.

    Raises:
        TrainingError: an adapter of another base, no rows, a loss that is not finite, memory that ran out twice.
    """
    check_shape(adapter, backbone)
    activations = Activations(backbone)
    groups = {OWN: held_out.own, **held_out.others}
    trunk = Trunk(backbone, activations, groups.values())
    with adapted(backbone, _shape(adapter), adapter) as layers:
        first = trunk.outputs(groups)
        with switched_off(layers):
            base = trunk.outputs(groups)
    trained = train_adapter(
        backbone,
        TrainingData({OWN: training.own}, training.others),
        TrainingSettings(_shape(adapter), optimisation, seed, anchoring, teacher="self"),
        start=adapter,
        activations=activations,
        progress=progress,
    )
    with adapted(backbone, _shape(trained.factors), trained.factors):
        now = trunk.outputs(groups)
    before, after = (_divergences(backbone, held_out, first, base, outputs) for outputs in (first, now))
    return Anchored(trained, before, after)


def answered_rows(
    backbone: Backbone,
    adapter: Adapter,
    prompts: Sequence[tuple[int, ...]],
    *,
    end: int,
    max_new_tokens: int = ANSWER_TOKENS,
) -> tuple[TokenizedRow, ...]:
    """Return the prompts with the adapter's own greedy answers, up to `end` or `max_new_tokens`.

    Raises:
        TrainingError: an adapter of another base.
    """
    check_shape(adapter, backbone)
    with adapted(backbone, _shape(adapter), adapter):
        rows = [TokenizedRow(prompt) for prompt in prompts]
        prepared = backbone.prepare(rows, batch_size=16, prefix=shared_prefix(prompts))
        decoded = greedy(backbone, prepared, end=end, max_new_tokens=max_new_tokens)
    answers = ((*ids, end) if len(ids) < max_new_tokens else tuple(ids) for ids in decoded)
    return tuple(TokenizedRow(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True))


def anchor_rows(
    prompter: Prompter, subtasks: Sequence[Subtask], texts: Mapping[str, Sequence[str]], seed: int
) -> dict[str, tuple[TokenizedRow, ...]]:
    """Return the texts of each subtask as its rows with forced answers."""
    return {
        subtask.name: tuple(
            TokenizedRow(prompter.prompt(subtask, row), (prompter.answer(row.answer),))
            for row in forced_rows(subtask, texts[subtask.name], seed)
        )
        for subtask in subtasks
    }


Outputs = Mapping[TokenizedRow, Tensor]


@torch.no_grad()
def _divergences(backbone: Backbone, rows: AnchoringRows, first: Outputs, base: Outputs, now: Outputs) -> Divergences:
    """Compare the outputs of the adapter as it is now with those of the first adapter and of the base."""

    def mean(one: Outputs, other: Outputs, group: Sequence[TokenizedRow]) -> float:
        """Return the mean KL(one || other) per answer token."""
        p, q = (torch.cat([outputs[row] for row in group]) for outputs in (one, other))
        return float(divergence(q, p, backbone.logits, backbone.output_weight)) / len(p)

    others = {name: mean(base, now, group) for name, group in rows.others.items()}
    return Divergences(mean(first, now, rows.own), mean(now, base, rows.own), others)


def _shape(adapter: Adapter) -> LoraShape:
    """Return the shape for layers that start from `adapter`: its modules, ranks and scales replace rank and alpha."""
    return LoraShape(tuple(adapter), rank=max(len(pair.a) for pair in adapter.values()), alpha=1.0)
