"""How long a run still takes, from what its own work took so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from memmcl.config import RunConfig
from memmcl.suite.configured import catalogue
from tasks.ui.updates import Update

LEAST = 0.005
"""The share of training, and of scoring, that has to be done before its speed is taken for known."""
MODELS = 10
"""How many models, about, are put to the test rows."""
CONTEXTS = 3
"""How many contexts, about, are put to the weak rows of a subtask."""


@dataclass
class Piece:
    """A piece of work.

    unit: "step" of training, or "row" that a model is asked about; size: how many. workers: that are at it.
    begun, done: the shares that were done at first, and that are done. began: when it did; seconds: that it took, once
    it is done.
    """

    unit: str
    size: float
    workers: int = 1
    begun: float | None = None
    done: float = 0.0
    began: float | None = None
    seconds: float = 0.0


class Forecast:
    """Knows what a run of these settings consists of, measures how fast workers train and score, and multiplies."""

    def __init__(self, config: RunConfig) -> None:
        self._workers = config.ray.workers
        self._pieces = dict(pieces_of(config))

    def take(self, update: Update, now: float) -> None:
        """Note an update; `now` is a time of the monotonic clock."""
        piece = self._pieces.get(_key(update))
        if piece is None:
            return
        if update.state == "working":
            piece.began = now if piece.began is None else piece.began
            if update.total:
                piece.done = update.done / update.total
                piece.begun = piece.done if piece.begun is None else piece.begun
            return
        piece.done = 0.0 if update.state == "failed" else 1.0
        piece.begun = 1.0 if update.state == "reused" else piece.begun or 0.0
        piece.seconds, piece.began = update.seconds, None

    def left(self, now: float) -> float | None:
        """Return the seconds that are left, None as long as the speed of anything ahead is not known."""
        seconds = 0.0
        for unit in ("step", "row"):
            pieces = [piece for piece in self._pieces.values() if piece.unit == unit]
            ahead = sum(piece.size * (1 - piece.done) for piece in pieces)
            measured = {id(piece): piece.size * (piece.done - (piece.begun or 0.0)) for piece in pieces}
            done = sum(measured.values())
            if not ahead:
                continue
            if done < LEAST * (done + ahead):
                return None
            spent = sum(
                piece.workers * (piece.seconds if piece.began is None else now - piece.began)
                for piece in pieces
                if measured[id(piece)]
            )
            seconds += ahead * spent / done
        return seconds / self._workers


def pieces_of(config: RunConfig) -> Iterator[tuple[str, Piece]]:
    """Yield the pieces of work of a run, by what `Update`s call them."""
    experts, search, names = config.experts, config.search, config.data.subtasks
    count, weak = len(names), config.data.weak_rows
    own = max(1, round((1 - experts.warm_start) * experts.steps))
    plain = max(1, round((1 - experts.anchor_after) * own)) if experts.anchor_after else 0
    if experts.warm_start:
        yield "warm start", Piece("step", max(1, round(experts.warm_start * experts.steps * count)))
    for rival, wanted in (("joint", config.evaluation.joint_lora), ("weak", config.evaluation.weak_lora)):
        if wanted:
            yield f"{rival} LoRA", Piece("step", experts.steps * count)
    for name in names:
        if plain:
            yield f"plain expert {name}", Piece("step", plain)
        yield f"expert {name}", Piece("step", max(1, own - plain))
        yield f"reference {name}", Piece("row", 2 * weak)
        yield f"context gate {name}", Piece("row", CONTEXTS * weak)
        yield f"evaluation {name}", Piece("row", (MODELS + CONTEXTS) * config.data.test_rows)
    groups = Counter(subtask.group for subtask in catalogue(config).values())
    fixed = len(search.lambdas) + 1 + len(search.rivals) * len(search.lambdas)
    asked = sum(search.stage1_evaluations * members for members in groups.values()) + fixed * count
    yield "search 1", Piece("row", asked * weak, config.ray.workers)
    asked = (search.stage2_evaluations + search.joint_evaluations) * count
    yield "search 2", Piece("row", asked * weak, config.ray.workers)


def _key(update: Update) -> str:
    if update.kind != "search":
        return update.title
    return "search 2" if update.title == "search unified" else "search 1"
