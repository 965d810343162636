"""What one training takes beside its rows: small frozen groups of plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """Look at the validation rows every so many steps, keep the best adapter.

    patience: looks without improvement before training stops early; 0: never.
    """

    every: int
    patience: int = 0
