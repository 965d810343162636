"""Scores of candidates: the resident model gets a merge's weights, and is scored on the rows of every subtask."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from memmcl.backbone.resident import resident
from memmcl.errors import DataError, SearchError
from memmcl.evaluate.asking import make_probe, weak_answers
from memmcl.evaluate.choice import Choices
from memmcl.evaluate.scoring import Probe
from memmcl.evaluate.teacher_forced import SegmentValues, TeacherForced
from memmcl.evolve.fitness import blended, fitness, loglik_retention, retention, shrunk
from memmcl.evolve.racing import Hurdle, Race
from memmcl.merge.build import Merger
from memmcl.merge.genome import with_base_adapters
from memmcl.search.problem import SearchProblem, read_reference
from memmcl.search.spec import SearchSpec
from memmcl.suite import metrics

Kinds = dict[str, float]
"""By kind of fitness, the value of one subtask."""
GOLD, EXPERT = "gold", "expert"
SMOOTH = {"choice": GOLD, "loglik": GOLD, "agree": EXPERT}
"""Kinds of fitness that need no generated text, and the answers that they score: the gold ones, or the expert's."""


class Scorer:
    """Scores merges on the resident model; base adapters are added to every candidate with the coefficient 1."""

    def __init__(self, problem: SearchProblem) -> None:
        self._problem = problem
        self._search = problem.search
        backbone, _ = resident(problem.model)
        self._merger = Merger(backbone, problem.adapters(), self._search.blocks, pinned=list(problem.base_adapters))
        self._subtasks: dict[tuple[str, str], _Rows] = {}

    def evaluate(self, spec: SearchSpec, genome: Sequence[float], hurdles: Sequence[Hurdle | None]) -> dict[str, Any]:
        """Return the record of one candidate.

        fitness: of all rows; of a candidate that missed a hurdle, an estimate. rungs: its score at each rung that it
        came to; stopped: whether it missed one, or failed there; values: by subtask, what was measured last; rows: how
        many it was scored on; seconds: to merge and to evaluate. A number that is not finite is None: it failed.
        """
        started = time.perf_counter()
        coefficients = spec.coefficients(genome)
        whole = with_base_adapters(coefficients, self._problem.base_adapters, self._search.blocks)
        self._merger.apply(whole, spec.recipe(genome))
        merged = time.perf_counter()
        measured = self._race(spec, hurdles)
        shrink = self._search.shrink
        measured["fitness"] = shrunk(measured["fitness"], coefficients.values(), shrink)
        if "objectives" in measured:
            measured["objectives"] = [shrunk(one, coefficients.values(), shrink) for one in measured["objectives"]]
        seconds = {"merge": merged - started, "evaluate": time.perf_counter() - merged}
        return {"genome": list(genome), **_plain(measured), "seconds": seconds}

    def close(self) -> None:
        """Put the base's weights back into the resident model."""
        self._merger.reset()

    def _race(self, spec: SearchSpec, hurdles: Sequence[Hurdle | None]) -> dict[str, Any]:
        weights = self._search.weights
        subtasks = {name: self._subtask(spec.rows, name) for name in spec.subtasks}
        streams = {name: subtask.smooth(bool(hurdles)) for name, subtask in subtasks.items()}
        rungs: list[float] = []
        for hurdle in hurdles:
            values = {name: blended(next(stream), weights) for name, stream in streams.items()}
            rungs.append(fitness(values))
            if not math.isfinite(rungs[-1]):  # it has failed, whatever the other rows would say
                return self._record(spec, subtasks, values, rungs, math.nan)
            if hurdle is not None and rungs[-1] < hurdle.least:
                return self._record(spec, subtasks, values, rungs, hurdle.offset)
        kinds = {name: next(stream) for name, stream in streams.items()}
        if "metric" in weights:
            kinds = {name: {**kinds[name], "metric": subtask.metric()} for name, subtask in subtasks.items()}
        return self._record(spec, subtasks, {name: blended(one, weights) for name, one in kinds.items()}, rungs, None)

    def _record(
        self,
        spec: SearchSpec,
        subtasks: Mapping[str, _Rows],
        values: Mapping[str, float],
        rungs: Sequence[float],
        offset: float | None,
    ) -> dict[str, Any]:
        """Return what is known of a candidate; offset: what is added to the values of one that was stopped."""
        more = offset or 0.0
        segment = -1 if offset is None else len(rungs) - 1
        several = spec.objectives.values()
        objectives = [fitness({one: values[one] for one in members}) + more for members in several]
        return {
            "fitness": fitness(values) + more,
            "values": dict(values),
            "rungs": list(rungs),
            "stopped": offset is not None,
            "rows": sum(one.ends[segment] for one in subtasks.values()),
            **({"objectives": objectives} if objectives else {}),
        }

    def _subtask(self, rows: str, name: str) -> _Rows:
        if (rows, name) not in self._subtasks:
            self._subtasks[rows, name] = _Rows(self._problem, name, rows)
        return self._subtasks[rows, name]


class _Rows:
    """Rows of one subtask, their reference, and the current weights' score on them."""

    def __init__(self, problem: SearchProblem, name: str, which: str) -> None:
        examples = problem.read_rows(which, name)
        if examples is None:
            raise SearchError(f"there are no {which} rows of {name}")
        self._examples, self._asked = examples, problem.subtasks[name]
        self._evaluation = problem.evaluation
        self._expert, expected = read_reference(problem.open_store(), problem.references[name], which)
        self._probe: Probe | None = None
        self._model = resident(problem.model)
        search = problem.search
        self._kinds = [kind for kind in search.weights if kind in SMOOTH] or (["loglik"] if search.rungs else [])
        self.ends = Race(search.rungs).ends(len(self._examples))
        ends = sorted(set(self.ends))  # of few rows, several rungs end at the same one
        answers: dict[str, Any] = {GOLD: [row.answer for row in self._examples], EXPERT: self._expert.answers}
        self._forced = {
            which: TeacherForced(
                *self._model,
                self._asked,
                self._examples,
                answers[which],
                ends=ends,
                expert=expected if which == EXPERT else None,
            )
            for which in sorted({SMOOTH[kind] for kind in self._kinds})
        }
        self._sums = np.cumsum(self._expert.logprobs)
        self._choices = self._expert.label_choices()

    def smooth(self, raced: bool) -> Iterator[Kinds]:
        """Yield the smooth kinds of fitness on the rows so far: after each segment (raced), or after all rows."""
        streams = {which: forced.segments() for which, forced in self._forced.items()}
        seen: dict[str, list[SegmentValues]] = {which: [] for which in streams}
        for number, (before, end) in enumerate(pairwise([0, *self.ends]), start=1):
            if end > before:
                for which, stream in streams.items():
                    seen[which].append(next(stream))
            if raced or number == len(self.ends):
                yield {kind: self._value(kind, seen[SMOOTH[kind]]) for kind in self._kinds}

    def _value(self, kind: str, segments: Sequence[SegmentValues]) -> float:
        if kind == "agree":
            agreement = [segment.agreement for segment in segments if segment.agreement is not None]
            return float(np.concatenate(agreement).mean())
        if kind == "choice" and self._choices is not None:
            calibrated = self._evaluation.calibration
            choices = [segment.choices for segment in segments if segment.choices is not None]
            logshares = Choices.joined(choices).logshares(calibrated)
            expected = self._choices.head(len(logshares)).logshares(calibrated)
            return loglik_retention(logshares.mean(), expected.mean())
        tokens = int(sum(segment.tokens.sum() for segment in segments))
        rows = sum(len(segment.logprobs) for segment in segments)
        logprob = float(sum(segment.logprobs.sum() for segment in segments))
        return loglik_retention(logprob / tokens, float(self._sums[rows - 1]) / tokens)

    def metric(self) -> float:
        """Return the retention of the metric; NaN where label scores are not numbers."""
        if self._probe is None:
            self._probe = make_probe(self._evaluation, self._model, self._asked, self._examples)
        try:
            answers = weak_answers(self._evaluation, self._probe)
        except DataError:  # label scores are no numbers
            return math.nan
        return retention(metrics.score_subtask(self._asked, self._examples, answers), self._expert.score or 0.0)


def _plain(value: Any) -> Any:
    """Return a record as JSON has it: a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
