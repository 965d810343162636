"""What is known of a run at work: its stages, what its workers do, what was finished."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.cli.screen.forecast import Forecast
from flows.terminal import Terminal, warn
from memmcl.config import RunConfig
from memmcl.text import span
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
        named = [
            f"{both[kind]} {noun.removesuffix('s') if both[kind] == 1 else noun}"
            for kind, noun in NOUNS.items()
            if both[kind]
        ]
        reused = sum(count for kind, count in self.reused.items() if kind in NOUNS)
        if reused and named:
            named.append("all from the store" if reused == both.total() else f"of them {reused} from the store")
        return ", ".join(named)


class RunState:
    """Takes the updates of a run, from any thread; `lock` is held while it is read."""

    def __init__(self, titles: Sequence[str]) -> None:
        self.lock = threading.RLock()
        self.started = time.monotonic()
        self.stages = [Stage(title) for title in titles]
        self.works: dict[str, Work] = {}
        self.best: tuple[str, ...] = ()
        """Of each search, its best candidate."""
        self.forecast: Forecast | None = None

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
                _, stage = self.numbered(update.title)
                if update.state == "working":
                    stage.began, stage.ended = now, None
                elif update.state == "done":
                    stage.ended = now
                self.works.clear()
                self.best = ()
                return
            if self.forecast is not None:
                self.forecast.take(update, now)
            self.best = update.lines or self.best
            if update.state == "working":
                known = self.works.setdefault(update.title, Work(update, now))
                if update.total or not known.update.total:  # what begins has no numbers yet
                    known.update = update
                return
            work = self.works.pop(update.title, None)
            if self.stage is not None and update.state != "failed":
                count = work.update.total if work is not None and update.kind == "search" else 1
                (self.stage.finished if update.state == "done" else self.stage.reused)[update.kind] += count

    def left(self, before: str) -> str:
        """Return `before` and the time that is left in all; nothing where it is not known."""
        left = None if self.forecast is None else self.forecast.left(time.monotonic())
        return f"{before}about {span(left)} left" if left is not None and left >= 1 else ""


class Screen:
    """Says facts and warnings about a run, and is told of all else: a command calls it, the work sends updates.

    log: the file that libraries and children print to, None with --verbose.
    """

    def __init__(self, terminal: Terminal, state: RunState) -> None:
        self._terminal = terminal
        self._state = state
        self.log: Path | None = None

    def plan(self, config: RunConfig) -> None:
        """Say from now on how much time is left: the run has these settings."""
        self._state.forecast = Forecast(config)

    def take(self, update: Update) -> None:
        """Note an update of the run, and show it."""
        self._state.take(update)

    def doing(self, what: str) -> None:
        """Say what is going on before the first stage."""

    def fact(self, what: str, text: str) -> None:
        """Say something of the run as a whole."""
        self._terminal.print(f"{what}: {text}", soft_wrap=True)

    def warn(self, message: str) -> None:
        """Say a warning."""
        warn(message)

    def close(self) -> None:
        """Say no more."""


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
