"""The plots of a search with several objectives: the front, and the point that was taken."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from memmcl.evolve import pareto
from memmcl.report.plots.axes import framed
from memmcl.report.plots.figure import COLOURS, PANEL, Plot, draw
from memmcl.report.results import Results
from memmcl.report.schema import CandidateResult, SearchResult
from memmcl.report.verdict import plus_minus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PAIRS = 3  # pairs of objectives that are drawn of a search


def front_plots(results: Results) -> tuple[Plot, ...]:
    """Return, for each search with several objectives, a panel a pair of them: candidates, the front, the winner.

    The front is that over all objectives, so that in a panel of two of them some of its points look dominated.
    """
    panels = []
    for number, search in enumerate(results.searches):
        shown = measured(search)
        if len(search.objectives) < 2 or not shown:
            continue
        best = front(shown)
        winner = next((one for one in shown if one.index == search.winner), None)
        objectives = zip(search.objectives, winner.objectives if winner else (), strict=False)
        chosen = ", ".join(f"{name} {plus_minus(value)}" for name, value in objectives) or "no point of this search"
        for pair, (i, j) in enumerate(list(combinations(range(len(search.objectives)), 2))[:MAX_PAIRS]):
            axes = f"{search.title}, {search.objectives[i]} against {search.objectives[j]}"
            alt = f"{axes}: {len(best)} of {len(shown)} candidates on the front, chosen: {chosen}"
            title = f"{search.title}: {search.objectives[i]}, {search.objectives[j]}"
            paint = partial(_paint_front, search, (i, j))
            panels.append(draw(f"front-{number}-{pair}", paint, width=PANEL, height=230, alt=alt, title=title))
    return tuple(panels)


def _paint_front(search: SearchResult, pair: tuple[int, int], figure: Figure) -> None:
    axes = framed(figure, "both")
    shown = measured(search)
    winner = [one for one in shown if one.index == search.winner]
    styles: list[dict[str, Any]] = [
        {"color": COLOURS["merge"], "markersize": 3.5, "alpha": 0.8},
        {"color": COLOURS["unified"], "markersize": 5.5, "alpha": 0.8},
        {"color": COLOURS["ink"], "markersize": 10, "fillstyle": "none"},
    ]
    for candidates, style in zip((shown, front(shown), winner), styles, strict=True):
        x, y = ([one.objectives[i] or 0.0 for one in candidates] for i in pair)
        axes.plot(x, y, "o", **style)
    axes.margins(0.12)
    axes.set(xlabel=search.objectives[pair[0]], ylabel=search.objectives[pair[1]])


def measured(search: SearchResult) -> list[CandidateResult]:
    """Return the candidates that were put to all rows and did not fail, one of each genome."""
    whole = (one for one in search.candidates if not one.stopped and not one.reused and one.objectives)
    return [one for one in whole if all(value is not None for value in one.objectives)]


def front(candidates: list[CandidateResult]) -> list[CandidateResult]:
    """Return those that no other beats in one objective without losing in another."""
    return [candidates[place] for place in pareto.front(np.array([one.objectives for one in candidates]))]
