"""Races: where parts end, hurdles by hand, stopped candidates in the look-ahead core."""

from __future__ import annotations

import math
from typing import Any

import pytest
from evolve_fixture import Scripted, distinct

from memmcl.errors import ConfigError, SearchError
from memmcl.evolve import LookAhead
from memmcl.evolve.racing import Hurdle, Race


def told(rungs: list[float], fitness: float, *, stopped: bool = False, **more: Any) -> dict[str, Any]:
    return {"rungs": rungs, "fitness": fitness, "stopped": stopped, **more}


@pytest.mark.parametrize(
    ("rungs", "rows", "ends"),
    [
        ((0.25, 0.5), 48, [12, 24, 48]),
        ((0.1,), 5, [1, 5]),
        ((0.01, 0.02), 48, [1, 2, 48]),
        ((0.3,), 2, [1, 2]),
        ((), 7, [7]),
    ],
)
def test_parts_end_at_shares_of_the_rows(rungs: tuple[float, ...], rows: int, ends: list[int]) -> None:
    assert Race(rungs).ends(rows) == ends


def test_hurdles_are_the_share_that_is_kept_and_what_whole_candidates_gained() -> None:
    race = Race((0.25, 0.5), keep=0.5, window=5)
    records = [
        told([9.0, 9.0], 9.0),  # out of the window of the first rung, and of the gains
        told([0.1], 0.3, stopped=True),
        told([0.5, 0.6], 0.8),
        told([0.4, 0.5], 0.6),
        told([0.3, 0.2], 0.4, stopped=True),
        told([0.6, 0.7], 1.0),
        told([0.9, 0.9], 0.9, reused_from=0),
        told([], -math.inf),
    ]
    first, second = race.hurdles(records)
    # of .1 .5 .4 .3 .6 the upper half begins at the third; three whole ones and the old one gained .3 .2 .4 and 0
    assert first == Hurdle(0.4, pytest.approx((0.0 + 0.3 + 0.2 + 0.4) / 4))
    assert second == Hurdle(0.6, pytest.approx((0.0 + 0.2 + 0.1 + 0.3) / 4))
    assert Race((0.25,), keep=1.0, window=5).hurdles(records)[0] == Hurdle(0.1, pytest.approx(0.225))


def test_few_candidates_make_no_hurdle() -> None:
    race = Race((0.5,))
    assert race.hurdles([told([0.1], 0.2)] * 3) == (None,)
    assert race.hurdles([told([0.1], 0.2)] * 4) != (None,)
    assert race.hurdles([told([0.1], 0.2, stopped=True)] * 9) == (None,), "nobody knows what whole ones gain"


@pytest.mark.parametrize("rungs", [(0.5, 0.2), (0.0,), (1.0,), (0.3, 0.3)])
def test_rungs_must_rise_inside_the_rows(rungs: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="rising shares"):
        Race(rungs)


def test_hurdles_are_those_of_the_results_told_before_the_ask_and_a_stopped_one_never_wins() -> None:
    race = Race((0.5,), keep=0.5)
    search = LookAhead(Scripted(distinct(12)), budget=12, lookahead=2, race=race)
    records = []
    while (proposal := search.next()) is not None:
        assert search.hurdles(proposal.index) == race.hurdles(records[: max(0, proposal.index - 2)])
        score = proposal.index * 7 % 12 / 12
        (hurdle,) = search.hurdles(proposal.index)
        stopped = hurdle is not None and score < hurdle.least
        records.append(told([score], 99.0 if stopped else score + 0.1, stopped=stopped))
        search.done(proposal.index, records[-1])
    assert search.finished
    assert any(record["stopped"] for record in records)
    assert search.best()[0].index == 5
    assert [one.index for one in search.ranked()] == sorted(
        (i for i, record in enumerate(records) if not record["stopped"]), key=lambda i: (-records[i]["fitness"], i)
    )


def ended(search: LookAhead, *, newest_first: bool) -> LookAhead:
    """Run a search to its end, with results that come in the order of asking, or in the worst one."""
    fitness = [0.1, 0.5, 0.4, 0.3, 0.2, 0.45, 0.6, 0.1, 0.1, 0.1]
    running: list[int] = []
    while not search.finished:
        while (proposal := search.next()) is not None:
            running.append(proposal.index)
        index = running.pop(-1 if newest_first else 0)
        search.done(index, {"fitness": fitness[index]})
    return search


@pytest.mark.parametrize("newest_first", [False, True])
def test_seeds_are_all_looked_at(newest_first: bool) -> None:
    search = ended(LookAhead(Scripted(distinct(10)), budget=10, lookahead=2, stagnation=3), newest_first=newest_first)
    assert not search.stopped_early, "all of generation 0, as seeds are"
    assert len(search.proposals) == 10


@pytest.mark.parametrize("newest_first", [False, True])
def test_stagnation_counts_what_is_no_seed(newest_first: bool) -> None:
    strategy = Scripted(distinct(10), generation=1)
    search = ended(LookAhead(strategy, budget=10, lookahead=2, stagnation=3), newest_first=newest_first)
    assert search.stopped_early
    assert len(search.proposals) == 7, "five told, three in a row without a better one, two asked ahead"


def test_a_search_out_of_time_waits_for_what_is_out_and_ends() -> None:
    search = LookAhead(Scripted(distinct(10)), budget=10, lookahead=1)
    first, second = search.next(), search.next()
    assert first is not None
    assert second is not None
    search.stop()
    search.done(second.index, {"fitness": 0.5})
    assert not search.finished
    search.done(first.index, {"fitness": 0.7})
    assert search.finished
    assert search.next() is None
    assert search.best()[0].index == first.index


def test_nothing_whole_is_nobody_to_win() -> None:
    search = LookAhead(Scripted(distinct(1)), budget=1, lookahead=0)
    search.done(0, told([0.2], 0.3, stopped=True))
    with pytest.raises(SearchError, match="none of 1 candidates"):
        search.best()
