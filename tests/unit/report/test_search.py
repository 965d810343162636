"""The Pareto front of a report: found by hand, drawn for searches with several objectives alone."""

from __future__ import annotations

from typing import Any

from report_fixture import only, results_document

from memmcl.report import parse_results, render_html
from memmcl.report.plots.search import front, front_plots, measured

POINTS = [(0.2, 0.9), (0.5, 0.5), (0.9, 0.1), (0.4, 0.4), (0.5, 0.4), (0.9, 0.1), (0.95, 0.95), (1.0, 1.0)]
STOPPED, REUSED = 6, 7
"""These would dominate everything."""


def document() -> dict[str, Any]:
    """The fixture, whose first search trades off two objectives."""
    found = results_document()
    search = found["searches"][0]
    search["objectives"] = ["SC", "MAST"]
    search["winner"] = 1
    for index, candidate in enumerate(search["candidates"]):
        candidate["objectives"] = list(POINTS[index]) if index < len(POINTS) else []
    search["candidates"][STOPPED]["stopped"] = True
    search["candidates"][REUSED]["reused"] = True
    return found


def test_the_front_holds_what_nothing_beats() -> None:
    shown = measured(parse_results(document()).searches[0])
    assert [one.index for one in shown] == [index for index in range(len(POINTS)) if index not in (STOPPED, REUSED, 4)]
    assert [one.index for one in front(shown)] == [0, 1, 2, 5]


def test_it_is_drawn_with_what_was_taken() -> None:
    (plot,) = front_plots(parse_results(document()))
    assert "SC against MAST: 4 of 5 candidates on the front, chosen: SC 0.5" in str(plot)
    assert front_plots(parse_results(results_document())) == ()
    page = render_html(only(document(), "searches"))
    assert "the ring is its point with the highest mean" in page
    assert "the ring is its point with the highest mean" not in render_html(only(results_document(), "searches"))


def test_finalists_are_told_with_what_decided() -> None:
    found = document()
    found["searches"][0]["finalists"] = [
        {"title": "SC 3 (cmaes:g1)", "fitness": 0.9, "selection": 0.71, "wins": False},
        {"title": "task arithmetic 2 (seed:arithmetic:0.5)", "fitness": 0.8, "selection": 0.83, "wins": True},
    ]
    page = render_html(only(found, "searches"))
    assert "task arithmetic 2 (seed:arithmetic:0.5) <b>wins</b>" in page
    assert "0.830" in page
