"""A search with the phases that follow it, and what all drivers share: handing candidates out, storing results."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from memmcl import seeds
from memmcl.evolve import LookAhead, Proposal, build_strategy
from memmcl.evolve.racing import Race
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import SearchSpec
from memmcl.store import Store

T = TypeVar("T")
WINDOWS = 2
"""Populations that a race's hurdles are taken from."""


@dataclass(frozen=True)
class Phase:
    """One search of a course, and its core."""

    spec: SearchSpec
    core: LookAhead


Next = Callable[[Sequence[Phase]], SearchSpec | None]
"""Returns the search that follows the phases that have ended, None at the end of the course."""

OnResult = Callable[[SearchSpec, Proposal, Mapping[str, Any]], None]
"""Called with every result, once it is in the store."""


@dataclass
class Course:
    """A search and the phases that follow it, over one set of rows and experts.

    follow: returns the next phase. begun: called as a phase begins. phases: those that have ended, and the current one.
    """

    follow: Next
    begun: Callable[[SearchSpec], None] = lambda spec: None
    phases: list[Phase] = field(default_factory=list)

    @property
    def core(self) -> LookAhead:
        """The core of the current phase."""
        return self.phases[-1].core

    def advance(self, problem: SearchProblem, store: Store) -> bool:
        """Start the next phase if the current one has ended; return whether any is left."""
        while not self.phases or self.core.finished:
            spec = self.follow(self.phases)
            if spec is None:
                return False
            self.begun(spec)
            self.phases.append(Phase(spec, core_of(problem, spec, store)))
        return True


class Driver(Protocol):
    """Takes courses to their end. With the same seed, every driver finds the same winner."""

    def session(self, problem: SearchProblem) -> AbstractContextManager[None]:
        """Return the block in which it can work."""

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function where candidates are evaluated; what it leaves in memory is gone afterwards."""

    def run(self, problem: SearchProblem, courses: Sequence[Course], on_result: OnResult) -> None:
        """Evaluate candidates until all courses have ended.

        Raises:
            MemmclError: a candidate cannot be evaluated; results so far are in the store.
        """


class Dispatcher:
    """Hands out the candidates of several courses in turn, and gives results back to them.

    Every result is in the store before a strategy is told of it, so that a search that is killed loses only candidates
    that are being evaluated. The end of the time stops no phase whose candidates are fixed.
    """

    def __init__(self, problem: SearchProblem, courses: Sequence[Course], on_result: OnResult) -> None:
        self._problem, self._on_result = problem, on_result
        self._store = problem.open_store()
        self._handed_out = 0
        self.open: dict[int, tuple[Phase, Proposal]] = {}
        """By number, the candidates that are being evaluated."""
        minutes = problem.search.minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        self.active = list(courses)

    def hand_out(self) -> list[tuple[int, Phase, Proposal]]:
        """Return all that the courses have now, numbered."""
        self._stop_after_the_deadline()
        self.active = [course for course in self.active if course.advance(self._problem, self._store)]
        handed_out: list[tuple[int, Phase, Proposal]] = []
        turns = deque(course.phases[-1] for course in self.active)
        while turns:
            phase = turns.popleft()
            proposal = phase.core.next()
            if proposal is not None:
                turns.append(phase)
                self._handed_out += 1
                self.open[self._handed_out] = phase, proposal
                handed_out.append((self._handed_out, phase, proposal))
        return handed_out

    def keep(self, number: int, record: Mapping[str, Any]) -> None:
        """Store the result of a candidate, and tell its course."""
        self._stop_after_the_deadline()
        phase, proposal = self.open.pop(number)
        stored = self._store.append(f"searches/{phase.spec.key}", proposal.index, record)
        if stored.get("genome") != list(proposal.genome):  # the first record stands, and says nothing of this genome
            stored = dict(record)
        phase.core.done(proposal.index, stored)
        self._on_result(phase.spec, proposal, stored)

    def _stop_after_the_deadline(self) -> None:
        for course in self.active if time.monotonic() > self._deadline else ():
            if course.phases and not course.phases[-1].spec.fixed and not course.core.stopped_early:
                course.core.stop()


def core_of(problem: SearchProblem, spec: SearchSpec, store: Store) -> LookAhead:
    """Return a search's core, with the records of earlier processes."""
    cfg, space = problem.search, spec.space
    options = {} if spec.fixed else {"update": cfg.update, "restarts": cfg.restarts, "objectives": len(spec.objectives)}
    strategy = build_strategy(
        "random" if spec.fixed else spec.strategy,
        genes=space.size,
        bounds=space.bounds,
        seeds=spec.seeds,
        seed=seeds.derive(problem.seed, "search", spec.name),
        population=cfg.population,
        sigma=cfg.sigma,
        binary=space.binary,
        **options,
    )
    race = Race(cfg.rungs, cfg.keep, WINDOWS * cfg.population) if cfg.rungs and not spec.fixed else None
    return LookAhead(
        strategy,
        budget=spec.evaluations,
        lookahead=cfg.lookahead,
        records=store.records(f"searches/{spec.key}"),
        stagnation=None if spec.fixed else cfg.stagnation,
        race=race,
    )
