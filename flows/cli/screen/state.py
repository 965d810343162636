"""What is known of a run at work: its stages, what its workers do, what was finished."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from flows.cli.screen.forecast import Forecast
from tasks.ui.updates import Update

NOUNS = {
    "warm": "warm starts",
    "expert": "adapters",
    "reference": "references",
    "weak": "labelled sets",
    "search": "candidates",
    "unified": "unified models",
    "gate": "context gates",
    "evaluation": "evaluations",
    "model": "whole models",
}
"""Kind of artifact -> what several of them are called."""


@dataclass
class Work:
    """A piece of work at hand: its last update, and when it began (by the monotonic clock)."""

    update: Update
    began: float


@dataclass
class Stage:
    """A stage of the run: when it began and ended, and what was finished or found in the store in it, by kind."""

    title: str
    began: float | None = None
    ended: float | None = None
    finished: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)

    def facts(self) -> str:
        """Return what was finished in it: "8 adapters, 6 references, of them 3 from the store"."""
        both = self.finished + self.reused
        named = [f"{both[kind]} {_noun(kind, both[kind])}" for kind in NOUNS if both[kind]]
        reused = sum(count for kind, count in self.reused.items() if kind in NOUNS)
        if reused and named:
            named.append("all from the store" if reused == both.total() else f"of them {reused} from the store")
        return ", ".join(named)


class RunState:
    """Takes the updates of a run, from any thread; `lock` is held while it is read."""

    def __init__(self, titles: Sequence[str], forecast: Forecast | None = None) -> None:
        self.lock = threading.RLock()
        self.started = time.monotonic()
        self.stages = [Stage(title) for title in titles]
        self.works: dict[str, Work] = {}
        self.best: tuple[str, ...] = ()
        """Of each search, its best candidate."""
        self.forecast = forecast

    @property
    def stage(self) -> Stage | None:
        """The stage at work."""
        return next((one for one in self.stages if one.began is not None and one.ended is None), None)

    def numbered(self, title: str) -> tuple[int, Stage]:
        """Return a stage and its number, from 1."""
        return next((number, one) for number, one in enumerate(self.stages, start=1) if one.title == title)

    def take(self, update: Update) -> None:
        """Note an update."""
        now = time.monotonic()
        with self.lock:
            if update.kind == "stage":
                self._turn(update, now)
                return
            if self.forecast is not None:
                self.forecast.take(update, now)
            self.best = update.lines or self.best
            if update.state == "working":
                self._note(update, now)
                return
            work = self.works.pop(update.title, None)
            stage = self.stage
            if stage is not None and update.state != "failed":
                count = work.update.total if work is not None and update.kind == "search" else 1
                (stage.finished if update.state == "done" else stage.reused)[update.kind] += count

    def _note(self, update: Update, now: float) -> None:
        known = self.works.setdefault(update.title, Work(update, now))
        if update.total or not known.update.total:  # what begins has no numbers yet
            known.update = update

    def _turn(self, update: Update, now: float) -> None:
        _, stage = self.numbered(update.title)
        if update.state == "working":
            stage.began, stage.ended = now, None
        elif update.state == "done":
            stage.ended = now
        self.works.clear()
        self.best = ()

    def left(self) -> float | None:
        """Return the seconds that are left in all, None where they are not known."""
        left = None if self.forecast is None else self.forecast.left(time.monotonic())
        return left if left is not None and left >= 1 else None


def clock(seconds: float) -> str:
    """Return a span as a clock shows it: `4:05`, `1:02:33`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def said(update: Update) -> str:
    """Return how far a piece of work is: "step 40 of 80, loss 0.512"."""
    if not update.total:
        return update.words
    if update.kind == "search":
        return f"candidate {update.done} of {update.total}" if update.done else f"{update.total} candidates, loading"
    words = f", {update.words}" if update.words else ""
    return f"step {update.done} of {update.total}{words}"


def name_of(update: Update) -> str:
    """Return the title of a piece of work; a stage has one search to look at, however many it consists of."""
    return "search" if update.kind == "search" else update.title


def _noun(kind: str, count: int) -> str:
    return NOUNS[kind].removesuffix("s") if count == 1 else NOUNS[kind]
