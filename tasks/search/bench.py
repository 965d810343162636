"""What evaluates candidates: the resident model, all experts' factors, and the rows of every subtask."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from memmcl.errors import DataError, SearchError
from memmcl.evaluate.choice import Choices
from memmcl.evaluate.given import GivenAnswers, PartValues
from memmcl.evaluate.scoring import Probe
from memmcl.evolve.fitness import blended, fitness, loglik_retention, retention, shrunk
from memmcl.evolve.racing import Hurdle, Race
from memmcl.merge.build import Merger
from memmcl.store import ArtifactRef
from memmcl.suite import metrics
from tasks.run.models import make_probe, start_of, weak_answers, with_start
from tasks.run.runtime import Run, load_adapter, open_store, read_rows, resident
from tasks.search.spec import SearchSpec
from tasks.stages.references import choices_of, read_reference

Refs = Mapping[str, ArtifactRef]
Kinds = dict[str, float]
"""By kind of fitness, the value of one subtask."""
GOLD, OWN = "gold", "own"
SMOOTH = {"choice": GOLD, "loglik": GOLD, "agree": OWN}
"""Kinds of fitness that a pass over one answer a row gives, and which answer: the gold one, or the expert's own."""


class Bench:
    """Puts merges into the resident model, and the model to rows.

    What the experts stand on is part of every candidate, at the coefficient 1.
    """

    def __init__(self, run: Run, experts: Refs, weak: Refs, references: Refs, selection: Refs) -> None:
        self._run = run
        self._backbone, self._prompter = resident(run)
        self._start = start_of(run, experts)
        loaded = {name: load_adapter(run, ref) for name, ref in {**experts, **self._start}.items()}
        self._merger = Merger(self._backbone, loaded, run.config.search.blocks, pinned=list(self._start))
        self._refs = {"weak": weak, "selection": selection}
        self._references = references
        self._subtasks: dict[tuple[str, str], _Subtask] = {}

    def evaluate(self, spec: SearchSpec, genome: Sequence[float], hurdles: Sequence[Hurdle | None]) -> dict[str, Any]:
        """Return the record of one candidate.

        fitness: of all rows; of a candidate that missed a hurdle, an estimate. rungs: its score at each rung that it
        came to; stopped: whether it missed one, or failed there; values: by subtask, what was measured last; rows: how
        many it was put to; seconds to merge and to evaluate. A number that is not finite is None: the candidate failed.
        """
        started = time.perf_counter()
        coefficients = spec.coefficients(self._run, genome)
        whole = with_start(coefficients, self._start, self._run.config.search.blocks)
        self._merger.apply(whole, spec.recipe(self._run, genome))
        merged = time.perf_counter()
        measured = self._race(spec, hurdles)
        shrink = self._run.config.search.shrink
        measured["fitness"] = shrunk(measured["fitness"], coefficients.values(), shrink)
        if "objectives" in measured:
            measured["objectives"] = [shrunk(one, coefficients.values(), shrink) for one in measured["objectives"]]
        seconds = {"merge": merged - started, "evaluate": time.perf_counter() - merged}
        return {"genome": list(genome), **_plain(measured), "seconds": seconds}

    def close(self) -> None:
        """Put the base back into the resident model: candidates follow one another without."""
        self._merger.reset()

    def _race(self, spec: SearchSpec, hurdles: Sequence[Hurdle | None]) -> dict[str, Any]:
        subtasks = {name: self._subtask(spec.rows, name) for name in spec.subtasks}
        streams = {name: subtask.smooth(bool(hurdles)) for name, subtask in subtasks.items()}
        rungs: list[float] = []
        for hurdle in hurdles:
            values = {name: self._blend(next(stream)) for name, stream in streams.items()}
            rungs.append(fitness(values))
            if not math.isfinite(rungs[-1]):  # it has failed, whatever the other rows would say
                return self._record(spec, subtasks, values, rungs, math.nan)
            if hurdle is not None and rungs[-1] < hurdle.least:
                return self._record(spec, subtasks, values, rungs, hurdle.offset)
        kinds = {name: next(stream) for name, stream in streams.items()}
        if "metric" in self._run.config.search.weights:
            kinds = {name: {**kinds[name], "metric": subtask.metric()} for name, subtask in subtasks.items()}
        return self._record(spec, subtasks, {name: self._blend(found) for name, found in kinds.items()}, rungs, None)

    def _blend(self, kinds: Kinds) -> float:
        return blended(kinds, self._run.config.search.weights)

    def _record(
        self, spec: SearchSpec, subtasks: Mapping[str, _Subtask], values: Mapping[str, float],
        rungs: Sequence[float], offset: float | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return what is known of a candidate; offset: what is added to the values of one that was stopped."""
        more = 0.0 if offset is None else offset
        parts = len(rungs) if offset is not None else 0  # of one that was not stopped, all
        rows = sum(one.ends[parts - 1] for one in subtasks.values())
        found: dict[str, Any] = {
            "fitness": fitness(values) + more, "values": dict(values), "rungs": list(rungs),
            "stopped": offset is not None, "rows": rows,
        }  # fmt: skip
        if spec.objectives:
            found["objectives"] = [
                fitness({one: values[one] for one in members}) + more for members in spec.objectives.values()
            ]
        return found

    def _subtask(self, rows: str, name: str) -> _Subtask:
        if (rows, name) not in self._subtasks:
            ref = self._refs[rows].get(name)
            if ref is None:
                raise SearchError(f"there are no {rows} rows of {name}")
            self._subtasks[rows, name] = _Subtask(self._run, name, rows, ref, self._references[name])
        return self._subtasks[rows, name]


class _Subtask:
    """Rows of one subtask, what they are held to, and how they are put to the weights of now."""

    def __init__(self, run: Run, name: str, rows: str, ref: ArtifactRef, reference: ArtifactRef) -> None:
        self._run, self._asked = run, run.subtask(name)
        self._examples = read_rows(run, ref)
        self._expert, expected = read_reference(open_store(run), reference, rows)
        self._probe: Probe | None = None
        backbone, prompter = self._model = resident(run)
        self._kinds = [kind for kind in run.config.search.weights if kind in SMOOTH] or (
            ["loglik"] if run.config.search.rungs else []
        )
        self.ends = Race(run.config.search.rungs).ends(len(self._examples))
        ends = sorted(set(self.ends))  # of few rows, several rungs end at the same one
        answers = {GOLD: [row.answer for row in self._examples], OWN: self._expert.get("answers")}
        self._given = {
            which: GivenAnswers(
                backbone, prompter, self._asked, self._examples, answers[which], ends=ends,
                expert=expected if which == OWN else None,
            )
            for which in sorted({SMOOTH[kind] for kind in self._kinds})
        }  # fmt: skip
        self._sums = np.cumsum(self._expert["logprobs"])
        self._choices = choices_of(self._expert)

    def smooth(self, raced: bool) -> Iterator[Kinds]:
        """Yield, after each part of the rows (raced) or all of them, the smooth kinds of fitness of the rows so far."""
        streams = {which: given.parts() for which, given in self._given.items()}
        seen: dict[str, list[PartValues]] = {which: [] for which in streams}
        for number, (before, end) in enumerate(pairwise([0, *self.ends]), start=1):
            if end > before:
                for which, stream in streams.items():
                    seen[which].append(next(stream))
            if raced or number == len(self.ends):
                yield {kind: self._value(kind, seen[SMOOTH[kind]]) for kind in self._kinds}

    def _value(self, kind: str, parts: Sequence[PartValues]) -> float:
        if kind == "agree":
            agreement = [part.agreement for part in parts if part.agreement is not None]
            return float(np.concatenate(agreement).mean())
        if kind == "choice" and self._choices is not None:
            return self._choice([part.choices for part in parts if part.choices is not None], self._choices)
        tokens = int(sum(part.tokens.sum() for part in parts))
        rows = sum(len(part.logprobs) for part in parts)
        logprob = float(sum(part.logprobs.sum() for part in parts))
        return loglik_retention(logprob / tokens, float(self._sums[rows - 1]) / tokens)

    def _choice(self, parts: Sequence[Choices], expert: Choices) -> float:
        calibrated = self._run.config.evaluation.calibration
        found = Choices.joined(parts).logshares(calibrated)
        return loglik_retention(found.mean(), expert.head(len(found)).logshares(calibrated).mean())

    def metric(self) -> float:
        """Return the retention of the metric; NaN where label scores are not numbers."""
        if self._probe is None:
            self._probe = make_probe(self._run, *self._model, self._asked, self._examples)
        try:
            answers = weak_answers(self._run, self._probe)
        except DataError:  # label scores are no numbers
            return math.nan
        return retention(metrics.score_subtask(self._asked, self._examples, answers), self._expert["score"])


def _plain(value: Any) -> Any:
    """Return a record, or a part of one, as JSON has it: a number that is not finite is None."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
