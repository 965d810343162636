"""What one training takes: small frozen groups of plain values, and its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # settings alone load no torch
    from memmcl.backbone.batches import TokenizedRow

Init = Literal["kaiming", "osrm"]
Curve = Literal["cosine", "linear", "constant"]
Teacher = Literal["gold", "self"]


@dataclass(frozen=True)
class LoraShape:
    """The adapter: T = scale * B A with scale = alpha / rank (alpha / sqrt(rank) for rsLoRA, arXiv 2312.03732).

    init: where A starts. "kaiming": PEFT's uniform numbers; "osrm": the directions that other subtasks' features use
    least (Zhang and Zhou 2025, "Unraveling LoRA Interference", the closed form of their section 3). B starts at zero.
    """

    target_modules: tuple[str, ...]
    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    init: Init = "kaiming"


@dataclass(frozen=True)
class Optimisation:
    """AdamW for `steps` steps of `batch_size` rows.

    warmup: share of the steps in which the rate rises, before it follows `curve` (to zero, unless constant).
    clip: the largest norm of the gradient. micro_batch: rows run at once, whose gradients are added up, weighted by
    answer tokens; None: all of a batch. recompute: keep no activations for backward, run the layers again.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    curve: Curve = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    micro_batch: int | None = None
    recompute: bool = False

    def rate(self, step: int) -> float:
        """Return the share of the peak rate at a step (0, 1, ...): a linear rise, then the curve."""
        rising = max(1, round(self.steps * self.warmup))
        if step < rising:
            return (step + 1) / rising
        left = 1 - (step - rising) / max(1, self.steps - rising)
        return {"cosine": 0.5 * (1 - math.cos(math.pi * left)), "linear": left, "constant": 1.0}[self.curve]


@dataclass(frozen=True)
class Anchoring:
    """weight * KL(base || expert) at answer positions of other subtasks' rows, one other subtask a turn.

    every: an anchor on every so many steps, weighted by `every`, so that its mean pull stays the same.
    delay: share of the steps before the first anchor.
    """

    weight: float
    batch_size: int
    every: int = 1
    delay: float = 0.0

    def turn(self, step: int, steps: int) -> int | None:
        """Return the number of the anchor of a step (0, 1, ...), or None where it has none."""
        since = step - round(self.delay * steps)
        return since // self.every if since >= 0 and since % self.every == 0 else None


@dataclass(frozen=True)
class Stopping:
    """Validate every so many steps, and keep the best adapter.

    patience: validations without improvement before training stops early; 0: never.
    """

    every: int
    patience: int = 0


@dataclass(frozen=True)
class TrainingSettings:
    """All that decides the outcome of a training beside its data and the adapter that it starts from.

    teacher: "gold" learns the answers of the rows; "self" stays close to the starting adapter's outputs at them.
    """

    lora: LoraShape
    optimisation: Optimisation
    seed: int
    anchoring: Anchoring | None = None
    stopping: Stopping | None = None
    teacher: Teacher = "gold"


RowsBySubtask = Mapping[str, "Sequence[TokenizedRow]"]  # rows by subtask: those of a subtask share their instruction


@dataclass(frozen=True)
class TrainingData:
    """Rows with one continuation each: the answer with its end token.

    rows: to train on. anchors: rows of other subtasks; their answers are forced text only, never in the loss.
    validation: to choose the best step by.
    """

    rows: RowsBySubtask
    anchors: RowsBySubtask = field(default_factory=dict)
    validation: RowsBySubtask = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpointing:
    """save: called with a checkpoint after every `every` steps, 0: never. resume: a checkpoint to go on from."""

    save: Callable[[bytes], None] = lambda data: None
    every: int = 0
    resume: bytes | None = None
