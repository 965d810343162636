"""The driver in this process: one candidate after the other, no Ray, no Prefect."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from memmcl.search.course import Course, Dispatcher, OnResult
from memmcl.search.problem import SearchProblem
from memmcl.search.scorer import Scorer

T = TypeVar("T")


class LocalDriver:
    """Evaluates every candidate here, on the model that is resident in this process."""

    def session(self, problem: SearchProblem) -> AbstractContextManager[None]:
        """Return a block that needs nothing."""
        return nullcontext()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call it here."""
        return function(*arguments)

    def run(self, problem: SearchProblem, courses: Sequence[Course], on_result: OnResult) -> None:
        """Evaluate candidates until all courses have ended; see `Driver`."""
        dispatcher = Dispatcher(problem, courses, on_result)
        waiting = deque(dispatcher.hand_out())
        if not waiting:
            return
        scorer = Scorer(problem)
        try:
            while waiting:
                number, phase, proposal = waiting.popleft()
                hurdles = phase.core.hurdles(proposal.index)
                dispatcher.keep(number, scorer.evaluate(phase.spec, proposal.genome, hurdles))
                waiting.extend(dispatcher.hand_out())
        finally:
            scorer.close()
