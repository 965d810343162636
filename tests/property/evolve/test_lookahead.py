"""Neither the number of workers, nor the order in which they finish, nor kills change a search."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.evolve import STRATEGIES, LookAhead, Proposal, build_strategy
from memmcl.evolve.bayesian import Process


@dataclass(frozen=True)
class Case:
    variant: tuple[str, str, bool]
    seed: int
    budget: int
    lookahead: int
    coarse: bool

    def search(self, records: dict[int, dict[str, Any]]) -> LookAhead:
        name, update, restarts = self.variant
        strategy = build_strategy(
            name,
            genes=2,
            bounds=(0.0, 1.5),
            seeds=[("base", (0.0, 0.0)), ("a", (1.0, 0.0)), ("again", (0.0, 0.0)), ("uniform", (0.5, 0.5))],
            seed=self.seed,
            population=4,
            update=update,
            restarts=restarts,
            objectives=2,
        )
        return LookAhead(strategy, budget=self.budget, lookahead=self.lookahead, records=records)

    def evaluate(self, proposal: Proposal) -> dict[str, Any]:
        """A fitness with plateaus (ties) when coarse, and with failures; two objectives, of which one fails too."""
        first, second = proposal.genome
        if first > 1.3:
            return {"fitness": math.nan}
        values = [-((first - 0.8) ** 2), -((second - 0.3) ** 2)]
        if self.coarse:
            values = [round(value, 1) for value in values]
        return {"fitness": sum(values), "objectives": [values[0], None if second > 1.4 else values[1]]}


VARIANTS = [
    (name, update, restarts)
    for name in sorted(STRATEGIES)
    for update in STRATEGIES[name].updates
    for restarts in (False, True)
    if STRATEGIES[name].restarts or not restarts
]


def cases(variants: list[tuple[str, str, bool]] = VARIANTS, fewest: int = 1) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        variant=st.sampled_from(variants),
        seed=st.integers(0, 1000),
        budget=st.integers(fewest, 30),
        lookahead=st.integers(0, 6),
        coarse=st.booleans(),
    )


CASES = cases()


def outcome(search: LookAhead) -> tuple[Any, ...]:
    return search.proposals, search.records, search.best()


def serial(case: Case) -> LookAhead:
    search = case.search({})
    while not search.finished:
        proposal = search.next()
        if proposal is not None:
            search.done(proposal.index, case.evaluate(proposal))
    return search


def step(search: LookAhead, case: Case, running: list[Proposal], workers: int, timing: Random) -> list[int]:
    """Fill the workers, then let one of them finish or be lost; return the completed indices."""
    while len(running) < workers and (proposal := search.next()) is not None:
        running.append(proposal)
    assert running  # an unfinished search always has work in flight
    proposal = running.pop(timing.randrange(len(running)))
    if timing.randrange(10) == 0:
        search.retry(proposal.index)
        return []
    return list(search.done(proposal.index, case.evaluate(proposal)))


@settings(max_examples=60, deadline=None)
@given(case=CASES, workers=st.integers(1, 8), timing=st.integers(0, 2**32).map(Random))
def test_workers_and_completion_order_do_not_matter(case: Case, workers: int, timing: Random) -> None:
    search = case.search({})
    running: list[Proposal] = []
    while not search.finished:
        step(search, case, running, workers, timing)
    assert outcome(search) == outcome(serial(case))


@settings(max_examples=60, deadline=None)
@given(case=CASES, timing=st.integers(0, 2**32).map(Random))
def test_kills_and_replay_of_what_was_saved_do_not_matter(case: Case, timing: Random) -> None:
    saved: dict[int, dict[str, Any]] = {}
    finished: LookAhead | None = None
    kills = timing.randint(1, 3)
    for life in range(kills + 1):
        search = case.search(saved)
        running: list[Proposal] = []
        workers = timing.randint(1, 5)
        left = timing.randint(0, 12) if life < kills else None
        while not search.finished and left != 0:
            for index in step(search, case, running, workers, timing):
                record = {**search.records[index]}
                if math.isinf(record["fitness"]):
                    record["fitness"] = None
                saved[index] = json.loads(json.dumps(record, allow_nan=False))
            left = None if left is None else left - 1
        finished = search
    assert finished is not None
    assert outcome(finished) == outcome(serial(case))


def as_stored(record: dict[str, Any]) -> dict[str, Any]:
    finite = record["fitness"] if math.isfinite(record["fitness"]) else None
    found: dict[str, Any] = json.loads(json.dumps({**record, "fitness": finite}, allow_nan=False))
    return found


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_resume_fits_no_process_for_what_is_on_record_and_asks_the_same(name: str, data: st.DataObject) -> None:
    case = data.draw(cases([variant for variant in VARIANTS if variant[0] == name], fewest=12))
    whole = serial(case)
    told = range(data.draw(st.integers(0, case.budget), label="killed at"))
    later = data.draw(st.sets(st.integers(len(told), len(told) + case.lookahead)), label="beyond a gap")
    saved = {  # as the store has it: what was evaluated, in whatever order it came
        index: as_stored(record)
        for index, record in whole.records.items()
        if (index in told or index in later) and "reused_from" not in record
    }
    with patch.object(Process, "fitted", side_effect=Process.fitted) as fits:
        search = case.search(saved)
    assert len(search.proposals) >= len(told)
    assert search.proposals == whole.proposals[: len(search.proposals)]
    assert fits.call_count <= sum(proposal.index not in saved for proposal in search.proposals)
    while not search.finished:
        proposal = search.next()
        assert proposal is not None
        assert proposal.index not in saved
        search.done(proposal.index, case.evaluate(proposal))
    assert outcome(search) == outcome(whole)
