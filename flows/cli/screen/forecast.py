"""How long a run still takes, from what its own work took so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from memmcl.config import RunConfig
from tasks.ui.updates import Update

LEAST = 0.01
"""The share of training, searching and scoring that has to be done before its speed counts as known."""
MODELS = 10
"""How many models, about, are scored on the test rows."""
CONTEXTS = 3
"""How many contexts, about, are tried on the weak rows of a subtask."""


@dataclass
class Piece:
    """A piece of work.

    kind: pieces of one kind have one speed; a candidate of a search is merged first, so scoring says nothing of it.
    size: in optimiser steps, or in rows that a model answers. started: when this process began it (None: not yet, or
    no longer at work); seconds: what it took, once done. done: the share that is done; restored: the share that an
    earlier process did, None until the first number comes.
    """

    kind: Literal["training", "search", "scoring"]
    size: float
    started: float | None = None
    seconds: float = 0.0
    done: float = 0.0
    restored: float | None = None

    @property
    def measured(self) -> float:
        """How much of it this process did, in units of its size."""
        return self.size * (self.done - (self.restored or 0.0))


class Forecast:
    """Knows the pieces of work of a run, measures the speed of each kind, and adds up what is ahead."""

    def __init__(self, config: RunConfig) -> None:
        self._workers = config.ray.workers
        self._pieces = dict(pieces_of(config))

    def take(self, update: Update, now: float) -> None:
        """Note an update; `now` is a time of the monotonic clock."""
        searches = "search 2" if update.title == "search unified" else "search 1"
        piece = self._pieces.get(searches if update.kind == "search" else update.title)
        if piece is None:
            return
        if update.state == "working":
            piece.started = now if piece.started is None else piece.started
            if update.total:
                piece.done = update.done / update.total
                piece.restored = piece.done if piece.restored is None else piece.restored
            return
        piece.done = 0.0 if update.state == "failed" else 1.0
        piece.restored = 1.0 if update.state == "reused" else piece.restored or 0.0
        piece.seconds, piece.started = update.seconds, None

    def left(self, now: float) -> float | None:
        """Return the seconds that are left, None as long as the speed of anything ahead is not known."""
        seconds = 0.0
        for kind in ("training", "search", "scoring"):
            pieces = [piece for piece in self._pieces.values() if piece.kind == kind]
            ahead = sum(piece.size * (1 - piece.done) for piece in pieces)
            done = sum(piece.measured for piece in pieces)
            if not ahead:
                continue
            if done < LEAST * (done + ahead):
                return None
            spent = sum(
                piece.seconds if piece.started is None else now - piece.started for piece in pieces if piece.measured
            )
            at_once = 1 if kind == "search" else self._workers  # a search is one piece on all workers
            seconds += ahead * spent / done / at_once
        return seconds


def pieces_of(config: RunConfig) -> Iterator[tuple[str, Piece]]:
    """Yield the pieces of work of a run, by what `Update`s call them."""
    experts, search, names = config.experts, config.search, config.data.subtasks
    count, weak = len(names), config.data.weak_rows
    own = max(1, round((1 - experts.warm_start) * experts.steps))
    plain = max(1, round((1 - experts.anchor_after) * own)) if experts.anchor_after else 0
    if experts.warm_start:
        yield "warm start", Piece("training", max(1, round(experts.warm_start * experts.steps * count)))
    for rival, wanted in (("joint", config.evaluation.joint_lora), ("weak", config.evaluation.weak_lora)):
        if wanted:
            yield f"{rival} LoRA", Piece("training", experts.steps * count)
    for name in names:
        if plain:
            yield f"plain expert {name}", Piece("training", plain)
        yield f"expert {name}", Piece("training", max(1, own - plain))
        yield f"reference {name}", Piece("scoring", 2 * weak)
        yield f"context gate {name}", Piece("scoring", CONTEXTS * weak)
        yield f"evaluation {name}", Piece("scoring", (MODELS + CONTEXTS) * config.data.test_rows)
    fixed = 1 + (1 + len(search.rivals)) * len(search.lambdas)  # candidates that nothing has to propose
    yield "search 1", Piece("search", (search.stage1_evaluations + fixed) * count * weak)
    yield "search 2", Piece("search", (search.stage2_evaluations + search.joint_evaluations) * count * weak)
