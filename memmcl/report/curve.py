"""The curve of a search as a small SVG, without matplotlib: for notebooks."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT, EDGE = 360, 120, 8


def curve_svg(fitness: Sequence[float | None]) -> str:
    """Return candidates as dots, and the best so far as a line; those that failed are left out. Empty: nothing."""
    found = [(number, value) for number, value in enumerate(fitness) if value is not None and math.isfinite(value)]
    if not found:
        return ""
    low, high = min(value for _, value in found), max(value for _, value in found)
    across, up = max(1, len(fitness) - 1), (high - low) or 1.0

    def place(number: int, value: float) -> tuple[float, float]:
        x = EDGE + (WIDTH - 2 * EDGE) * number / across
        return round(x, 1), round(HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (value - low) / up, 1)

    dots = "".join('<circle cx="{}" cy="{}" r="2" fill="#7a8aa0"/>'.format(*place(*one)) for one in found)
    best, line = -math.inf, []
    for number, value in found:
        best = max(best, value)
        line.append("{},{}".format(*place(number, best)))
    return (
        f'<svg role="img" aria-label="fitness of {len(found)} candidates, best {high:.4f}" width="{WIDTH}" '
        f'height="{HEIGHT}">{dots}<polyline points="{" ".join(line)}" fill="none" stroke="#2f6fd0"/></svg>'
    )
