"""The plots of a report: `Results` in, `Plot` out; an empty tuple or None where there is nothing to draw."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from memmcl.report.plots.axes import framed, heat_map, legend_above, outline, row_names, write_beside
from memmcl.report.plots.figure import COLOURS, PANEL, SERIES, WIDE, Plot, draw, shorten
from memmcl.report.results import Results
from memmcl.report.schema import SearchResult
from memmcl.report.verdict import plus_minus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEAN = 450
MAX_BARS = 28
SECONDS = {"merge": SERIES[1], "evaluate": SERIES[0], "wait": COLOURS["baseline"]}
"""the colour of each share of a candidate's seconds"""


def mean_plot(results: Results) -> Plot | None:
    """Return every model's mean with its standard error, in document order; None without means."""
    rows = [(mean.model, mean.mean, mean.se) for mean in results.means]
    what = "Mean score over subtasks"
    return _dot_plot(results, "mean", "Mean over the subtasks", rows, MEAN, what) if rows else None


def subtask_plots(results: Results) -> tuple[Plot, ...]:
    """Return one panel a subtask: every model's test score with its standard error."""
    panels = []
    for subtask in results.subtasks:
        scores = [results.score_of(model.name, subtask.name) for model in results.models]
        rows = [(score.model, score.score, score.se) for score in scores if score]
        if rows:
            title, what = f"{subtask.name} · {subtask.metric}", f"{subtask.metric} on {subtask.title}"
            panels.append(_dot_plot(results, f"score-{subtask.name}", title, rows, PANEL, what))
    return tuple(panels)


def fitness_plots(results: Results) -> tuple[Plot, ...]:
    """Return one panel a search: fitness in ask order, best so far, seeds, failures, the winner."""
    panels = []
    for number, search in enumerate(results.searches):
        best = max((c.fitness for c in search.candidates if c.fitness is not None and not c.stopped), default=None)
        failed = sum(c.fitness is None for c in search.candidates)
        stopped = sum(c.stopped for c in search.candidates)
        counts = f"{len(search.candidates)} evaluations, {stopped} stopped early, {failed} failed"
        alt = f"{search.title}: {counts}, best fitness {plus_minus(best)}"
        paint = partial(_paint_fitness, search)
        panels.append(draw(f"fitness-{number}", paint, width=PANEL, height=230, alt=alt, title=search.title))
    return tuple(panels)


def seconds_plots(results: Results) -> tuple[Plot, ...]:
    """Return one panel a search: seconds of each candidate, stacked as merge, evaluate, wait."""
    panels = []
    for number, search in enumerate(results.searches):
        totals = {name: sum(getattr(c.seconds, name) for c in search.candidates) for name in SECONDS}
        spent = ", ".join(f"{name} {total:.1f} s" for name, total in totals.items())
        alt = f"{search.title}, seconds of all candidates: {spent}"
        paint = partial(_paint_seconds, search)
        panels.append(draw(f"seconds-{number}", paint, width=PANEL, height=210, alt=alt, title=search.title))
    return tuple(panels)


def weights_plot(results: Results) -> Plot | None:
    """Return the merge coefficients as a heat map, experts x layer blocks; None without a merge."""
    merge = results.merge
    if merge is None or not merge.experts or not merge.blocks:
        return None
    cells = [[(value, f"{value:.2f}".replace("-", "−")) for value in row] for row in merge.coefficients]
    flat = [value for row in merge.coefficients for value in row]
    low, high = min(*flat, 0.0), max(*flat, 0.0)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="layer block")
        heat_map(axes, cells, merge.experts, merge.blocks, low, high)

    shape = f"{len(merge.experts)} experts in {len(merge.blocks)} blocks"
    alt = f"Merge coefficients of {shape}, {low:.2f} to {high:.2f}"
    width = max(PANEL, min(WIDE, 120 + 62 * len(merge.blocks)))
    return draw("weights", paint, width=width, height=58 + 30 * len(merge.experts), alt=alt)


def difficulty_plot(results: Results) -> Plot | None:
    """Return stacked bars of weight x scaled feature, subtasks in curriculum order; None without features."""
    curriculum = results.curriculum
    if not curriculum.features or not curriculum.order:
        return None
    scaled = {(f.subtask, f.feature): f.scaled for f in curriculum.features}
    features = list(dict.fromkeys(f.feature for f in curriculum.features))

    def paint(figure: Figure) -> None:
        axes = framed(figure, "x")
        left = np.zeros(len(curriculum.order))
        bars = []
        for number, feature in enumerate(features):
            weight = curriculum.weights.get(feature, 0.0)
            width = [weight * scaled.get((name, feature), 0.0) for name in curriculum.order]
            colour = SERIES[number % len(SERIES)]
            bars.append(axes.barh(range(len(left)), width, left=left, height=0.66, color=colour).patches[0])
            left += width
        for row, total in enumerate(left):
            axes.text(total + 0.006 * (max(left) or 1), row, f" {total:.2f}", va="center", fontsize=10)
        row_names(axes, curriculum.order)
        axes.set_xlabel("difficulty (weight × scaled feature, stacked)")
        labels = [shorten(feature.replace("_", " ").strip(), 22) for feature in features]
        legend_above(figure, bars, labels, ncols=4, handleheight=0.8, columnspacing=1.4)

    alt = "Difficulty, ascending: " + ", ".join(curriculum.order)
    height = 74 + 28 * len(curriculum.order) + 18 * (len(features) // 4)
    return draw("difficulty", paint, width=WIDE, height=height, alt=alt)


def context_plot(results: Results) -> Plot | None:
    """Return the context ablation: subtasks x contexts, test scores coloured by the gain over zero-shot.

    The gain is taken to the context without demonstrations, or to the row's mean where there is none.
    Framed: the context that the gate chose. None without test scores.
    """
    measured = [c for c in results.curriculum.contexts if c.test_score is not None]
    if not measured:
        return None
    columns = list(dict.fromkeys(c.context for c in measured))
    rows = [name for name in results.curriculum_names() if any(c.subtask == name for c in measured)]
    cells: list[list[tuple[float, str] | None]] = []
    chosen: list[tuple[int, int]] = []
    for y, name in enumerate(rows):
        contexts = {c.context: c for c in measured if c.subtask == name}
        scores = {context: c.test_score or 0.0 for context, c in contexts.items()}
        zero_shot = [scores[context] for context, c in contexts.items() if c.demonstrations == 0]
        reference = zero_shot[0] if zero_shot else sum(scores.values()) / len(scores)
        cells.append([(scores[c] - reference, f"{scores[c]:.3f}") if c in scores else None for c in columns])
        chosen += [(columns.index(context), y) for context, c in contexts.items() if c.chosen]
    reach = max(abs(cell[0]) for row in cells for cell in row if cell) or 0.05

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        heat_map(axes, cells, rows, columns, -reach, reach, size=(0.88, 0.8))
        outline(axes, chosen, (0.97, 0.95))

    picked = ", ".join(f"{rows[y]}: {columns[x]}" for x, y in chosen) or "none"
    alt = f"Test score of {len(columns)} contexts on {len(rows)} subtasks; chosen by the gate: {picked}"
    return draw("contexts", paint, width=min(WIDE, 110 + 78 * len(columns)), height=40 + 32 * len(rows), alt=alt)


def time_plot(results: Results) -> Plot | None:
    """Return seconds by step of the run, in document order, one colour a stage; None without timings.

    Beyond `MAX_BARS` bars the shortest ones of a stage are summed into one.
    """
    rows = _fold([(t.stage, t.name, t.seconds) for t in results.timings])
    if not rows:
        return None
    stages = list(dict.fromkeys(stage for stage, _, _ in rows))
    longest = max(seconds for _, _, seconds in rows) or 1.0

    def paint(figure: Figure) -> None:
        axes = framed(figure, "x")
        colours = [SERIES[stages.index(stage) % len(SERIES)] for stage, _, _ in rows]
        axes.barh(range(len(rows)), [seconds for _, _, seconds in rows], color=colours, height=0.68)
        for row, (_, _, seconds) in enumerate(rows):
            axes.text(seconds + 0.008 * longest, row, f"{seconds:,.1f}", va="center", fontsize=10)
        row_names(axes, [f"{stage} · {name}" for stage, name, _ in rows], 32)
        axes.set(xlabel="seconds", xlim=(0, longest * 1.1))

    totals = {stage: sum(s for other, _, s in rows if other == stage) for stage in stages}
    alt = "Seconds by stage: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in totals.items())
    return draw("time", paint, width=WIDE, height=44 + 21 * len(rows), alt=alt)


def _dot_plot(
    results: Results, name: str, title: str, rows: list[tuple[str, float, float]], width: int, what: str
) -> Plot:
    kinds = {model.name: model.kind for model in results.models}
    base = next((value for model, value, _ in rows if model == "base"), None)

    def paint(figure: Figure) -> None:
        axes = framed(figure, "x")
        if base is not None:
            axes.axvline(base, color=COLOURS["baseline"], linewidth=1, linestyle=(0, (2, 3)))
        for row, (model, value, se) in enumerate(rows):
            kind = kinds[model]
            fill = COLOURS["paper" if kind == "expert" else kind]
            marker: dict[str, Any] = {"markersize": 7, "markerfacecolor": fill, "markeredgewidth": 1.6}
            axes.errorbar(value, row, xerr=se, fmt="o", color=COLOURS[kind], elinewidth=1.6, **marker)
            if width == MEAN:
                colour = COLOURS["unified" if kind == "unified" else "ink"]
                edge = ("axes fraction", "data")
                write_beside(axes, plus_minus(value, se), (1.0, row), 6, xycoords=edge, fontsize=10, color=colour)
        row_names(axes, [model for model, _, _ in rows], 24)
        low, high = min(v - se for _, v, se in rows), max(v + se for _, v, se in rows)
        axes.set_xlim(min(0.0, low), max(high * 1.06, low + 0.05))
        axes.locator_params(axis="x", nbins=6 if width == PANEL else 10)

    alt = f"{what}: " + ", ".join(f"{model} {plus_minus(value, se)}" for model, value, se in rows)
    return draw(name, paint, width=width, height=46 + 21 * len(rows), alt=alt, title=title)


def _paint_seconds(search: SearchResult, figure: Figure) -> None:
    axes = framed(figure, "y", steps=True)
    bottom = np.zeros(len(search.candidates))
    for name, colour in SECONDS.items():
        height = [getattr(c.seconds, name) for c in search.candidates]
        axes.bar([c.index for c in search.candidates], height, bottom=bottom, color=colour, width=0.82, label=name)
        bottom += height
    axes.set(xlabel="candidate, in ask order", ylabel="seconds")
    legend_above(figure, ncols=3)


def _paint_fitness(search: SearchResult, figure: Figure) -> None:
    axes = framed(figure, "both", steps=True)
    known = sorted((c.index, c.fitness, c.is_seed, c.stopped) for c in search.candidates if c.fitness is not None)
    scored = [(index, fitness, is_seed) for index, fitness, is_seed, stopped in known if not stopped]
    for points, marker, colour, size, alpha in (
        ([point[:2] for point in known if point[3]], ".", "ink", 3.5, 0.35),
        ([point[:2] for point in scored if not point[2]], "o", "merge", 4.6, 0.8),
        ([point[:2] for point in scored if point[2]], "D", "rival", 4.6, 0.8),
    ):
        x, y = ([point[side] for point in points] for side in (0, 1))
        axes.plot(x, y, marker, color=COLOURS[colour], markersize=size, alpha=alpha)
    if scored:
        best = np.maximum.accumulate([fitness for _, fitness, _ in scored])
        axes.step([index for index, _, _ in scored], best, where="post", color=COLOURS["unified"], zorder=1)
    for index, fitness, _ in scored:
        if index == search.winner:
            axes.plot(index, fitness, "o", color=COLOURS["ink"], markersize=10, fillstyle="none")
    failed = [c.index for c in search.candidates if c.fitness is None]
    if failed:
        floor: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(failed, [0.02] * len(failed), "x", color=COLOURS["bad"], markersize=6, **floor)
    axes.margins(y=0.12)
    axes.set(xlabel="evaluation, in ask order", ylabel="fitness")


def _fold(rows: list[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
    if len(rows) <= MAX_BARS:
        return rows
    stages = list(dict.fromkeys(stage for stage, _, _ in rows))
    longest = sorted(rows, key=lambda row: -row[2])[: max(0, MAX_BARS - len(stages))]
    folded = []
    for stage in stages:
        folded += [row for row in rows if row[0] == stage and row in longest]
        if rest := [row[2] for row in rows if row[0] == stage and row not in longest]:
            folded.append((stage, f"{len(rest)} shorter ones", sum(rest)))
    return folded
