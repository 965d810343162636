"""The look-ahead core: its rule, duplicates, retries, replay of records."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from evolve_fixture import Scripted, distinct

from memmcl.errors import ConfigError, SearchError
from memmcl.evolve import LookAhead, Proposal, build_strategy


def handed(search: LookAhead) -> list[int]:
    """All that `next` gives until it says wait."""
    indices = []
    while (proposal := search.next()) is not None:
        indices.append(proposal.index)
    return indices


@pytest.mark.parametrize("lookahead", [0, 1, 2, 5, 20])
def test_ask_i_happens_after_exactly_i_minus_lookahead_tells_in_ask_order(lookahead: int) -> None:
    budget = 10
    strategy = Scripted(distinct(budget))
    search = LookAhead(strategy, budget=budget, lookahead=lookahead)
    running: list[int] = []
    while not search.finished:
        running += handed(search)
        assert len(running) <= lookahead + 1
        search.done(running.pop(), {"fitness": 1.0})  # the newest first: the worst order
    tells = 0
    for what, index in strategy.log:
        if what == "ask":
            assert tells == max(0, index - lookahead)
        else:
            assert index == tells
            tells += 1
    assert tells == budget == search.told


def test_next_waits_and_the_end_is_the_end() -> None:
    search = LookAhead(Scripted(distinct(3)), budget=3, lookahead=1)
    assert handed(search) == [0, 1]
    assert search.next() is None
    assert search.done(1, {"fitness": 0.5}) == (1,)
    assert (search.next(), search.told, search.finished) == (None, 0, False)
    search.done(0, {"fitness": 0.1})
    assert handed(search) == [2]
    assert not search.finished
    search.done(2, {"fitness": 0.2})
    assert (search.told, search.finished, search.next()) == (3, True, None)
    assert [p.index for p in search.proposals] == [0, 1, 2]


def test_best_is_the_highest_and_of_equals_the_earlier() -> None:
    search = LookAhead(Scripted(distinct(4)), budget=4, lookahead=3)
    handed(search)
    with pytest.raises(SearchError, match="none of 0"):
        search.best()
    for index, fitness in [(3, 0.9), (2, 0.1), (1, 0.9), (0, math.nan)]:
        search.done(index, {"fitness": fitness, "seconds": index})
    proposal, record = search.best()
    assert proposal.index == 1
    assert record == {"fitness": 0.9, "seconds": 1, "genome": [1.0]}


def test_a_search_where_all_failed_has_no_best() -> None:
    strategy = Scripted(distinct(2))
    search = LookAhead(strategy, budget=2, lookahead=1)
    for index, fitness in zip(handed(search), (None, math.inf), strict=True):
        search.done(index, {"fitness": fitness})
    assert search.finished
    assert strategy.told == {0: -math.inf, 1: -math.inf}
    with pytest.raises(SearchError, match="none of 2"):
        search.best()


def test_a_duplicate_costs_nothing_and_completes_with_its_original() -> None:
    strategy = Scripted([(0.0,), (1.0,), (0.0,), (0.0,), (1.0,), (2.0,)])
    search = LookAhead(strategy, budget=6, lookahead=2)
    assert handed(search) == [0, 1]  # 2 is a duplicate in flight
    assert search.done(0, {"fitness": 0.4, "rows": 8}) == (0, 2)
    assert handed(search) == []  # 3 is known already; 4 waits for the tell of 1
    assert search.records[2] == {"fitness": 0.4, "rows": 8, "genome": [0.0], "reused_from": 0}
    assert search.records[3] == search.records[2]
    assert search.done(1, {"fitness": 0.3}) == (1,)
    assert handed(search) == [5]
    search.done(5, {"fitness": 0.1})
    assert search.finished
    assert strategy.told == {0: 0.4, 1: 0.3, 2: 0.4, 3: 0.4, 4: 0.3, 5: 0.1}
    assert search.best()[0].index == 0


def test_objectives_are_told_and_reused_by_twins() -> None:
    strategy = Scripted([(0.0,), (1.0,), (0.0,)])
    search = LookAhead(
        strategy, budget=3, lookahead=1, records={1: {"genome": [1.0], "fitness": 1.0, "objectives": [2]}}
    )
    assert handed(search) == [0]
    search.done(0, {"fitness": 0.4, "objectives": [0.3, 0.5]})
    assert search.finished
    assert strategy.objectives == {0: [0.3, 0.5], 1: [2], 2: [0.3, 0.5]}


def test_a_lost_proposal_is_handed_out_again_before_any_other() -> None:
    search = LookAhead(Scripted(distinct(5)), budget=5, lookahead=3)
    assert search.next() == Proposal(0, (0.0,), "scripted", 0)
    search.retry(0)
    search.retry(0)
    assert handed(search) == [0, 1, 2, 3]
    search.retry(2)
    search.done(2, {"fitness": 0.5})  # the lost worker answers after all
    assert handed(search) == []
    assert search.done(2, {"fitness": 0.7}) == ()
    search.retry(2)
    assert handed(search) == []
    assert search.records[2]["fitness"] == 0.5


def test_wrong_indices_and_results_are_refused() -> None:
    search = LookAhead(Scripted([(0.0,), (0.0,), (1.0,)]), budget=3, lookahead=1)
    for index in (-1, 1, 2):  # 1 is a duplicate, 2 not asked yet
        with pytest.raises(SearchError, match="never handed out"):
            search.done(index, {"fitness": 1.0})
        with pytest.raises(SearchError, match="never handed out"):
            search.retry(index)
    with pytest.raises(SearchError, match="no `fitness`"):
        search.done(0, {"score": 1.0})
    with pytest.raises(SearchError, match=r"of genome \[2.0\], expected \[0.0\]"):
        search.done(0, {"genome": [2.0], "fitness": 1.0})


@pytest.mark.parametrize(("budget", "lookahead"), [(0, 1), (3, -1)])
def test_bad_budgets_are_refused(budget: int, lookahead: int) -> None:
    with pytest.raises(ConfigError, match="budget >= 1"):
        LookAhead(Scripted(distinct(3)), budget=budget, lookahead=lookahead)


def test_a_strategy_that_was_asked_before_is_refused() -> None:
    strategy = Scripted(distinct(3))
    strategy.ask()
    with pytest.raises(SearchError, match="fresh strategy"):
        LookAhead(strategy, budget=2, lookahead=1)


def test_saved_records_are_used_and_those_of_other_genomes_are_not(caplog: pytest.LogCaptureFixture) -> None:
    saved = {
        0: {"genome": [0.0], "fitness": 0.3, "seconds": 2.0},
        1: {"genome": [9.0], "fitness": 0.9},
        2: {"fitness": 0.9},
        3: {"genome": [3.0], "fitness": None},
    }
    with caplog.at_level(logging.WARNING):
        search = LookAhead(Scripted(distinct(4)), budget=4, lookahead=3, records=saved)
        assert handed(search) == [1, 2]
    assert [record.message.split(" is ")[0] for record in caplog.records] == [
        "saved record of proposal 1",
        "saved record of proposal 2",
    ]
    assert search.records == {
        0: {"genome": [0.0], "fitness": 0.3, "seconds": 2.0},
        3: {"genome": [3.0], "fitness": -math.inf},
    }


def test_a_strategy_is_told_what_was_recorded_until_a_record_does_not_fit() -> None:
    saved = {index: {"genome": [float(index)], "fitness": 0.5} for index in (0, 1, 3, 5)}
    saved[2] = {"genome": [9.0], "fitness": 0.9}
    strategy = Scripted(distinct(6))
    search = LookAhead(strategy, budget=6, lookahead=5, records=saved)
    assert strategy.recorded == [(0.0,), (1.0,), (9.0,), None, None, None]
    assert handed(search) == [2, 4]


def test_a_record_of_another_genome_is_no_sign_of_trust_where_the_proposal_is_a_duplicate() -> None:
    saved: dict[int, Any] = {index: {"genome": [float(index)], "fitness": 0.5} for index in range(3)}
    strategy = Scripted([(0.0,), (0.0,), (2.0,)])
    search = LookAhead(strategy, budget=3, lookahead=2, records=saved)
    assert search.finished
    assert strategy.recorded == [(0.0,), (1.0,), None]
    assert search.records[1]["reused_from"] == 0


def test_a_finished_search_replays_without_any_evaluation() -> None:
    def strategy() -> Any:
        return build_strategy("cmaes", genes=2, bounds=(0.0, 1.0), seeds=[("base", (0.0, 0.0))], seed=3)

    first = LookAhead(strategy(), budget=20, lookahead=2)
    while not first.finished:
        proposal = first.next()
        assert proposal is not None
        first.done(proposal.index, {"fitness": -sum((gene - 0.4) ** 2 for gene in proposal.genome)})
    again = LookAhead(strategy(), budget=20, lookahead=2, records=first.records)
    assert again.finished
    assert again.next() is None
    assert again.proposals == first.proposals
    assert again.records == first.records
    assert again.best() == first.best()
