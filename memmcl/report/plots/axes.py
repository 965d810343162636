"""What the plots draw on their axes: grids, names of rows, legends, running means, and heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from memmcl.report.plots.figure import COLOURS, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

CHARACTER = 6.4  # CSS pixels of one character in the names of rows and columns, about


def shade(value: float, low: float, high: float) -> tuple[str, str]:
    """Return (cell colour, text colour) of `value` between `low` and `high`, teal above zero and rust below.

    Zero is the pale middle where `low` < 0; both colours are fixed, so a cell reads the same on any paper. The text
    changes colour where its contrast would fall below about 4 : 1.
    """
    reach = max(abs(low), abs(high)) or 1.0
    strength = min(1.0, abs(value) / reach)
    pale, deep = (242, 245, 244), ((9, 92, 83) if value >= 0 else (148, 62, 8))
    mixed = [round(p + (d - p) * strength) for p, d in zip(pale, deep, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed), "#ffffff" if strength > 0.72 else "#1c1f21"


def frame(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    """Give `axes` a quiet grid along `grid` and no frame but the base line."""
    axes.grid(True, axis=grid)
    axes.spines["left" if grid == "y" else "bottom"].set_visible(False)


def framed(figure: Figure, grid: Literal["x", "y", "both"], *, steps: bool = False) -> Axes:
    """Return the only axes of `figure`, with `frame`; steps: the x axis counts something, in whole numbers."""
    axes = figure.add_subplot()
    frame(axes, grid)
    if steps:
        whole_numbers(axes)
    return axes


def legend_above(figure: Figure, *handles_and_labels: Any, **style: Any) -> None:
    """Put a legend above the axes, by default of all that have a label."""
    style = {"handlelength": 0.8, "columnspacing": 1.2} | style
    figure.legend(*handles_and_labels, loc="outside upper left", **style)


def write_beside(axes: Axes, text: str, xy: tuple[float, float], offset: float, **style: Any) -> None:
    """Write `text` at a horizontal offset, in points, from the place `xy`."""
    axes.annotate(text, xy, xytext=(offset, 0), textcoords="offset points", va="center", **style)


def row_names(axes: Axes, names: Sequence[str], limit: int = 26) -> None:
    """Name the rows 0, 1, ... of `axes`, the first on top; names longer than `limit` are cut."""
    axes.set_yticks(range(len(names)), [shorten(name, limit) for name in names])
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)


def whole_numbers(axes: Axes) -> None:
    """Let the x axis tick at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def curve(axes: Axes, values: Sequence[float | None], colour: str, style: str, label: str) -> None:
    """Draw `values` (one a step, from step 1; None leaves a gap) faintly, and their running mean over it."""
    points = [(step, value) for step, value in enumerate(values, 1) if value is not None]
    steps, heights = [step for step, _ in points], [value for _, value in points]
    half = max(1, len(points) // 16)
    windows = [heights[max(0, place - half) : place + half + 1] for place in range(len(points))]
    axes.plot(steps, heights, color=colour, linewidth=0.9, alpha=0.3)
    axes.plot(steps, [sum(window) / len(window) for window in windows], color=colour, linestyle=style, label=label)


def heat_map(
    axes: Axes,
    cells: Sequence[Sequence[tuple[float, str] | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    size: tuple[float, float] = (0.96, 0.92),
) -> None:
    """Draw `cells` with `shade`, each `size` wide and high of its place, and name both sides.

    `cells`: rows x columns of (value, label), None where there is none. Column names that are wider than their place
    stand upright. Beyond 12 columns the labels are smaller; beyond 20 columns cells have no labels.
    """
    many = len(columns) > 12
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell is None:
                axes.text(x, y, "–", ha="center", va="center", color=COLOURS["muted"])
                continue
            fill, ink = shade(cell[0], low, high)
            axes.add_patch(rectangle(x, y, *size, facecolor=fill, edgecolor="none"))
            if len(columns) <= 20:
                axes.text(x, y, cell[1], ha="center", va="center", color=ink, fontsize=7.5 if many else 10)
    axes.set_xlim(-0.55, len(columns) - 0.45)
    row_names(axes, rows)
    names = [shorten(name, 16) for name in columns]
    page = axes.get_figure(root=True)
    room = 72 * (page.get_figwidth() if page else 0) - CHARACTER * max(len(shorten(name)) for name in rows)
    upright = CHARACTER * (1 + max(map(len, names))) > room / len(columns)
    axes.set_xticks(range(len(columns)), names, rotation=90 if upright else 0)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    for spine in axes.spines.values():
        spine.set_visible(False)


def outline(axes: Axes, places: Iterable[tuple[float, float]], size: tuple[float, float], width: float = 1.8) -> None:
    """Draw the outline of a cell of `size` around each of `places` (x, y), in the colour of ink."""
    for x, y in places:
        axes.add_patch(rectangle(x, y, *size, fill=False, edgecolor=COLOURS["ink"], linewidth=width))


def rectangle(x: float, y: float, width: float, height: float, **style: Any) -> Rectangle:
    """Return a rectangle centred on (x, y)."""
    from matplotlib.patches import Rectangle

    return Rectangle((x - width / 2, y - height / 2), width, height, **style)
