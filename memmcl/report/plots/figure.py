"""One theme for all plots, and the way from matplotlib to markup that lies inside an HTML page.

A plot is drawn with the colours of `COLOURS`; in the SVG each becomes a CSS variable of the page, so that the
same drawing is legible on light and on dark paper. Text stays text. The same drawing gives the same bytes.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

PANEL, WIDE = 348, 560  # CSS pixels: one of several panels side by side, and a plot that stands alone

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


def shorten(text: str, limit: int = 26) -> str:
    """Return `text` on one line and of at most `limit` characters, the last an ellipsis where it was cut."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


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
