"""The plots of the experts: their training, their effect on other subtasks, and what merged models retain of them."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

from memmcl.report.plots.axes import curve, frame, framed, heat_map, legend_above, outline, row_names, write_beside
from memmcl.report.plots.figure import COLOURS, PANEL, WIDE, Plot, draw, shorten
from memmcl.report.results import Results
from memmcl.report.schema import RIVALS, ExpertResult
from memmcl.report.transfer import RetentionRow, interference, retention_rows
from memmcl.report.verdict import plus_minus, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP"
DEEP = 0.2
"""the smallest difference in score that gets the deepest colour: interference is small beside an expert's own gain"""
REACH = (-1.0, 2.0)  # the range of the axes; retention and NAI outside it are drawn at the edge, with their value
ALL = "all subtasks"


def loss_plots(results: Results) -> tuple[Plot, ...]:
    """Return one panel a training: loss (faint) and its running mean, anchor, validation, kept step; one scale."""
    panels = []
    measured = chain.from_iterable((*e.loss, *(point.loss for point in e.validation)) for e in results.experts)
    top = max((value for value in measured if value is not None), default=1.0)
    for number, expert in enumerate(results.experts):
        if any(value is not None for value in expert.loss):
            paint, alt = partial(_paint_loss, expert, top), _loss_in_words(expert)
            title = shorten(expert.subtask, 40)
            panels.append(draw(f"loss-{number}", paint, width=PANEL, height=212, alt=alt, title=title))
    return tuple(panels)


def interference_plot(results: Results) -> Plot | None:
    """Return the scores of the base and of every expert on every subtask, coloured by the gain over the base.

    The colour scale spans the gains on other subtasks; larger gains on the own subtask get its deepest colour.
    Framed: an expert on its own subtask. None without interference.
    """
    matrix = interference(results)
    if matrix is None:
        return None
    cells = [
        [
            (matrix.gains.get((row, column), 0.0), plus_minus(part.score))
            if (part := matrix.cells.get((row, column)))
            else None
            for column in matrix.columns
        ]
        for row in matrix.rows
    ]
    reach = max([DEEP, *(abs(gain) for place, gain in matrix.gains.items() if place not in matrix.own)])

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot(xlabel="test rows of")
        heat_map(axes, cells, matrix.rows, matrix.columns, -reach, reach, size=(0.94, 0.88))
        diagonal = [(matrix.columns.index(column), matrix.rows.index(row)) for row, column in matrix.own]
        outline(axes, diagonal, (0.97, 0.94))

    alt = f"Scores of the base and of {len(matrix.own)} experts on {len(matrix.columns)} subtasks"
    for where, own in (("experts on their own subtask", True), ("on other subtasks", False)):
        if (gain := matrix.gain(own=own)) is not None:
            alt += f"; {where}, less the base: mean {signed(gain)}"
    count = len(matrix.columns)
    width, height = max(PANEL, min(740, 120 + 62 * count)), 78 + (30 if count <= 12 else 26) * len(matrix.rows)
    return draw("interference", paint, width=width, height=height, alt=alt)


def nai_plot(results: Results) -> Plot | None:
    """Return retention and NAI of every merged model, a row a subtask, the last over all; None without retention."""
    models = retention_rows(results)
    names = [name for name in results.curriculum_names() if any(name in model.by_subtask for model in models)]
    if not names:
        return None

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _paint_retention(left, models, names, "retention")
        _paint_retention(right, models, names, "nai")
        left.set_xlabel("retention: 1 is the expert")
        right.set_xlabel("NAI: 0 is the base, 1 the expert")
        right.tick_params(labelleft=False)
        handles, _ = left.get_legend_handles_labels()
        titles = [shorten(model.model.title, 30) for model in models]
        legend_above(figure, handles, titles, ncols=3, columnspacing=1.4)

    over_all = (f"{m.model.title} retention {plus_minus(m.retention)}, NAI {plus_minus(m.nai)}" for m in models)
    alt = f"Retention and NAI on {len(names)} subtasks; over all of them: {'; '.join(over_all)}"
    height = 76 + 18 * (len(models) // 4) + max(24, 13 * len(models)) * (len(names) + 1)
    return draw("nai", paint, width=WIDE, height=height, alt=alt)


def _paint_loss(expert: ExpertResult, top: float, figure: Figure) -> None:
    axes = framed(figure, "y", steps=True)
    curve(axes, expert.loss, COLOURS["rival" if expert.subtask in RIVALS else "expert"], "-", "loss")
    if any(value is not None for value in expert.anchor):
        curve(axes, expert.anchor, COLOURS["muted"], "--", "anchor KL")
    points = [(point.step, point.loss) for point in expert.validation if point.loss is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=COLOURS["ink"], markersize=4, label="validation")
    if expert.best_step is not None:
        axes.axvline(expert.best_step, color=COLOURS["unified"], linewidth=1.3, linestyle=(0, (2, 2)), label="kept")
    axes.set(xlabel="step", ylim=(0, top * 1.05))
    legend_above(figure, ncols=4, handlelength=1.4, columnspacing=1.1)


def _loss_in_words(expert: ExpertResult) -> str:
    losses = [value for value in expert.loss if value is not None]
    text = f"Training loss of {expert.subtask}: first {losses[0]:.3f}, last {losses[-1]:.3f}"
    points = [point for point in expert.validation if point.loss is not None]
    if points:
        text += f"; validation loss: first {plus_minus(points[0].loss)}, last {plus_minus(points[-1].loss)}"
    if expert.best_step is not None:
        text += f"; kept: step {expert.best_step} of {expert.steps}"
    return text + ("; stopped early" if expert.stopped_early else "")


def _paint_retention(
    axes: Axes, models: tuple[RetentionRow, ...], names: list[str], measure: Literal["retention", "nai"]
) -> None:
    frame(axes, "both")
    low, high = REACH
    shown = [0.0, 1.0]
    axes.axvline(1, color=COLOURS["expert"], linewidth=1, linestyle=(0, (2, 3)))
    axes.axhline(len(names) - 0.5, color=COLOURS["muted"], linewidth=1)
    for number, model in enumerate(models):
        colour, marker = COLOURS[model.model.kind], MARKERS[number % len(MARKERS)]
        axes.plot([], [], marker, color=colour, markersize=6.5, label=model.model.name)
        for row, scores in enumerate([*(model.by_subtask.get(name) for name in names), model]):
            value = getattr(scores, measure, None)
            if value is None:
                continue
            y = row + 0.7 * ((number + 0.5) / len(models) - 0.5)
            clipped = min(max(value, low), high)
            shown.append(clipped)
            side = 1 if value < low else -1
            form = marker if clipped == value else "<" if side > 0 else ">"
            axes.plot(clipped, y, form, color=colour, markersize=6.5, clip_on=False)
            if clipped != value:
                align = "left" if side > 0 else "right"
                write_beside(axes, plus_minus(value), (clipped, y), 7 * side, ha=align, fontsize=8.5, color=colour)
    row_names(axes, [*names, ALL], 24)
    margin = 0.05 * (max(shown) - min(shown))
    axes.set_xlim(min(shown) - margin, max(shown) + margin)
    axes.locator_params(axis="x", nbins=5)
