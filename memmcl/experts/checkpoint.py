"""The state of a training as bytes, enough to resume to bit-identical weights.

Rate, rows and dropout follow from the step's number and the seed, so the state is: adapter, AdamW's moments, the best
adapter so far, and the curves. Tensors are safetensors, all else is JSON in their header; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from memmcl.errors import TrainingError

VERSION = 1


@dataclass
class Progressed:
    """The progress of a training, in plain values.

    step: steps done. loss, anchor: one entry a step; anchor None where a step had none. validation: (step, loss).
    micro_batch: rows run at once; smaller than set where memory ran out. seconds, tokens: of all sessions together.
    """

    step: int = 0
    loss: list[float] = field(default_factory=list)
    anchor: list[float | None] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    micro_batch: int | None = None
    tokens: int = 0
    seconds: float = 0.0

    @property
    def best_step(self) -> int | None:
        """The step with the smallest validation loss, the earliest of equals; None without validation."""
        return min(self.validation, key=lambda point: point[1])[0] if self.validation else None

    @property
    def validations_since_best(self) -> int:
        """How many validations there were since the best one."""
        return sum(step > (self.best_step or 0) for step, _ in self.validation)


def encode(progressed: Progressed, tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a checkpoint."""
    header = {"memmcl": json.dumps({"version": VERSION, **asdict(progressed)})}
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=header)


def decode(data: bytes) -> tuple[Progressed, dict[str, Tensor]]:
    """Return the state that `encode` wrote.

    Raises:
        TrainingError: not a checkpoint, or one of another version.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        values = dict(json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["memmcl"]))
        if values.pop("version") != VERSION:
            raise ValueError("another version")
        values["validation"] = [(int(step), float(loss)) for step, loss in values["validation"]]
        return Progressed(**values), tensors
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"not a checkpoint of a training ({error}); remove it and train anew") from error


def restore(tensors: Mapping[str, Tensor], prefix: str, into: Mapping[str, Tensor]) -> None:
    """Copy `prefix.NAME` over every tensor NAME of `into`.

    Raises:
        TrainingError: the checkpoint lacks one, or it has another shape.
    """
    with torch.no_grad():
        for name, target in into.items():
            saved = tensors.get(f"{prefix}.{name}")
            if saved is None or saved.shape != target.shape:
                problem = "missing" if saved is None else f"{tuple(saved.shape)} instead of {tuple(target.shape)}"
                raise TrainingError(
                    f"the checkpoint does not fit this training: {prefix}.{name} is {problem}; remove it and train anew"
                )
            target.copy_(saved)
