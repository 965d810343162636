"""The plot of the experts' task vectors: how alike they are, how long, and where a merge makes them clash."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from memmcl.report.plots.axes import CHARACTER, frame, heat_map, outline, whole_numbers
from memmcl.report.plots.experts import MARKERS
from memmcl.report.plots.figure import COLOURS, SERIES, WIDE, Plot, draw, shorten
from memmcl.report.results import Results
from memmcl.report.schema import TaskVectors, VectorPair
from memmcl.report.verdict import plus_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALE = 0.2  # the colours reach at least to this cosine, so that similarity by chance stays pale
CHANCE = 0.5  # the share of pairs that differ in sign if signs are independent
DASHES = ("-", "--", ":")
DOTS = (0, (2, 3))


def task_vectors_plot(results: Results) -> Plot | None:
    """Return cosines of all pairs of experts over all layers, and by layer their mean, clashes of signs, and norms.

    Experts stand by group, framed where there are several. None with fewer than two experts.
    """
    vectors = results.task_vectors
    if vectors is None or len(vectors.experts) < 2:
        return None
    grouped = ([name for name in names if name in vectors.experts] for names in results.names_by_group().values())
    groups = list(filter(None, grouped))
    count = len(vectors.experts)
    width = max(WIDE, min(740, 130 + 40 * count))
    heights = [44 + (30 if count <= 12 else 24) * count, 150, 190 if count <= len(SERIES) else 240]
    room = int(width / (56 + CHARACTER * max(len(shorten(name, 16)) for name in vectors.experts)))
    lines = -(-count // room)  # of the legend

    def paint(figure: Figure) -> None:
        axes = figure.subplot_mosaic([["pairs"] * 2, ["mean", "signs"], ["norms"] * 2], height_ratios=heights)
        _paint_pairs(axes["pairs"], vectors, groups)
        _by_layer(axes["mean"], 0)
        _line(axes["mean"], vectors, [layer.mean_cosine for layer in vectors.layers], COLOURS["merge"], "o-", "mean")
        axes["mean"].locator_params(axis="y", nbins=5)
        axes["mean"].set_title("mean cosine of all pairs", loc="left")
        _paint_signs(axes["signs"], vectors)
        _paint_norms(axes["norms"], vectors, groups)
        handles, labels = axes["norms"].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=-(-count // lines), columnspacing=1.4)

    height = sum(heights) + 74 + 18 * lines
    return draw("task-vectors", paint, width=width, height=height, alt=_in_words(vectors))


def _paint_pairs(axes: Axes, vectors: TaskVectors, groups: Sequence[Sequence[str]]) -> None:
    names = [name for group in groups for name in group]
    places = [vectors.experts.index(name) for name in names]
    cells: list[list[tuple[float, str] | None]] = []
    for row in places:
        values = [vectors.overall.cosines[row][column] for column in places]
        labels = ["1" if row == column else _short(value) for column, value in zip(places, values, strict=True)]
        cells.append([None if v is None else (v, label) for v, label in zip(values, labels, strict=True)])
    reach = max([PALE, *(abs(value) for _, _, value in _pairs(vectors.overall))])
    heat_map(axes, cells, names, names, -reach, reach)
    start = 0
    for group in groups:
        if 1 < len(group) < len(names):
            centre, size = start + (len(group) - 1) / 2, len(group) - 0.02
            outline(axes, [(centre, centre)], (size, size), 1.6)
        start += len(group)
    axes.set_title("cosine similarity, over all layers", loc="left", pad=12)


def _paint_signs(axes: Axes, vectors: TaskVectors) -> None:
    _by_layer(axes, CHANCE)
    conflicts, cancelled = ([getattr(layer, name) for layer in vectors.layers] for name in ("conflict", "cancelled"))
    _line(axes, vectors, conflicts, COLOURS["rival"], "s-", "pairs that differ in sign")
    _line(axes, vectors, cancelled, COLOURS["ink"], "^--", "cancelled in the sum")
    axes.margins(y=0.12)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderpad=0.2, labelspacing=0.3)


def _paint_norms(axes: Axes, vectors: TaskVectors, groups: Sequence[Sequence[str]]) -> None:
    """Draw one line an expert; beyond ten experts one colour a group, and markers tell its experts apart."""
    _by_layer(axes)
    members = [(which, member, name) for which, group in enumerate(groups) for member, name in enumerate(group)]
    for number, (which, member, name) in enumerate(members):
        colour, form = (which, member) if len(vectors.experts) > len(SERIES) else (number, number)
        norms = [layer.norms[vectors.experts.index(name)] for layer in vectors.layers]
        style = MARKERS[form % len(MARKERS)] + DASHES[form // len(MARKERS) % len(DASHES)]
        _line(axes, vectors, norms, SERIES[colour % len(SERIES)], style, shorten(name, 16))
    axes.set_ylim(bottom=0)
    axes.set_title("norm of each expert’s task vector", loc="left")


def _by_layer(axes: Axes, level: float | None = None) -> None:
    """Prepare axes over layers, with a dotted line at `level`."""
    frame(axes, "y")
    whole_numbers(axes)
    axes.set_xlabel("layer")
    if level is not None:
        axes.axhline(level, color=COLOURS["baseline"], linewidth=1, linestyle=DOTS)


def _line(
    axes: Axes, vectors: TaskVectors, values: Sequence[float | None], colour: str, style: str, label: str
) -> None:
    layers = [layer.layer for layer in vectors.layers]
    points = [(x, y) for x, y in zip(layers, values, strict=True) if x is not None and y is not None]
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.plot(x, y, style, color=colour, markersize=4.5, linewidth=1.4, label=label)


def _pairs(relation: VectorPair) -> list[tuple[int, int, float]]:
    both = combinations(range(len(relation.norms)), 2)
    return [(one, other, value) for one, other in both if (value := relation.cosines[one][other]) is not None]


def _short(value: float | None) -> str:
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def _in_words(vectors: TaskVectors) -> str:
    """Return what the plot shows: over all layers with names, by layer as ranges."""
    experts, overall = vectors.experts, vectors.overall
    text = [f"Task vectors of {len(experts)} experts"]
    pairs = sorted(_pairs(overall), key=lambda pair: pair[2])
    if pairs:
        named = [f"{_short(value)} ({experts[a]} and {experts[b]})" for a, b, value in pairs]
        mean = "" if len(named) == 1 else f"from {named[0]} to {named[-1]}, mean {_short(overall.mean_cosine or 0.0)}"
        text.append(f"cosine similarity over all layers {mean or named[0]}")
    norms = sorted((norm, name) for norm, name in zip(overall.norms, experts, strict=True) if norm is not None)
    if norms:
        short, long = (f"{plus_minus(norm)} ({name})" for norm, name in (norms[0], norms[-1]))
        text.append(f"norm from {short} to {long}")
    spans = []
    for title, name in (
        ("mean cosine", "mean_cosine"),
        ("pairs that differ in sign", "conflict"),
        ("cancelled in the plain sum", "cancelled"),
    ):
        values = [value for layer in vectors.layers if (value := getattr(layer, name)) is not None]
        if values:
            spans.append(f"{title} {_short(min(values))} to {_short(max(values))}")
    layers = [layer.layer for layer in vectors.layers if layer.layer is not None]
    if spans and layers:
        text.append(f"by layer, {layers[0]} to {layers[-1]}: {', '.join(spans)}")
    return "; ".join(text)
