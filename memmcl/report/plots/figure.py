"""One theme for all plots, and the way from matplotlib to markup that lies inside an HTML page.

A plot is drawn with the colours of `COLOURS`; in the SVG each becomes a CSS variable of the page, so that the
same drawing is legible on light and on dark paper. Text stays text. The same drawing gives the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

COLOURS = {
    "ink": "#1b2026",
    "muted": "#687078",
    "line": "#dfe2e6",
    "paper": "#fefefe",
    "unified": "#0e7569",
    "rival": "#b5560b",
    "merge": "#4a6fa5",
    "baseline": "#8a9199",
    "expert": "#7a5ea8",
    "bad": "#b3261f",
}
SERIES = ("#4c78a8", "#e0913a", "#6aa56e", "#b8606a", "#8a77b5", "#4fa3a5", "#9c7a5c", "#c583a5", "#a89a3f", "#7d8791")
"""mid-tone colours that carry on both papers"""

PANEL = 348
WIDE = 560  # CSS pixels: one of several panels side by side, and a plot that stands alone

CHARACTER = 6.4  # CSS pixels of one character in the names of rows and columns, about

_STYLE = Path(__file__).with_name("theme.mplstyle")
_COLOURED = {"text.color": "ink", "axes.edgecolor": "line", "grid.color": "line"}
_COLOURED |= dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), "muted")

BIG = 400_000  # characters of SVG beyond which a plot is embedded as PNG


@dataclass(frozen=True)
class Plot:
    """Markup of one drawing (inline SVG, or an `<img>` with a data URI) and how the page places it."""

    markup: str
    alt: str
    width: int
    title: str = ""


def draw(name: str, paint: Callable[[Figure], None], *, width: int, height: int, alt: str, title: str = "") -> Plot:
    """Return what `paint` draws on a fresh figure of `width` x `height` CSS pixels.

    `name` (unique on the page) prefixes the ids of the SVG, so that no drawing reaches into another.
    Uses no global figure, and leaves matplotlib's settings as they were.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    colours: dict[Any, str] = {setting: COLOURS[name] for setting, name in _COLOURED.items()}
    with matplotlib.rc_context({**colours, "svg.hashsalt": prefix}, fname=str(_STYLE)):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = buffer.getvalue().decode()
        if len(svg) <= BIG:
            return Plot(_inline(svg, prefix, alt), alt, width, title)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144, facecolor=COLOURS["paper"])
    data = base64.b64encode(buffer.getvalue()).decode()
    return Plot(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">', alt, width, title)


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


def shorten(text: str, limit: int = 26) -> str:
    """Return `text` on one line and of at most `limit` characters, the last an ellipsis where it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


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


def _inline(svg: str, prefix: str, alt: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: _adapt(tag.group(0), prefix), svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    label = html.escape(alt, quote=True)
    return f'<svg {box.group(0) if box else ""} role="img" aria-label="{label}">{rest}'


def _adapt(tag: str, prefix: str) -> str:
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{prefix}-', tag).replace("url(#", f"url(#{prefix}-")
    for name, colour in COLOURS.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag
