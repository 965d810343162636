"""The curve of a search as a small SVG for notebooks, without matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, EDGE = 360, 120, 8


def curve_svg(fitness: Sequence[float | None]) -> str:
    """Return candidates as dots and the best so far as a line, without those that failed; "" if all did."""
    values = np.array(fitness, dtype=float)  # None becomes NaN
    (scored,) = np.isfinite(values).nonzero()
    if not len(scored):
        return ""
    low, high = values[scored].min(), values[scored].max()
    x = np.interp(scored, (0, max(1, len(values) - 1)), (EDGE, WIDTH - EDGE)).round(1)
    y = np.interp(values[scored], (low, high if high > low else low + 1), (HEIGHT - EDGE, EDGE)).round(1)
    dots = "".join(f'<circle cx="{cx}" cy="{cy}" r="2" fill="#7a8aa0"/>' for cx, cy in zip(x, y, strict=True))
    line = " ".join(f"{cx},{cy}" for cx, cy in zip(x, np.minimum.accumulate(y), strict=True))  # upwards is smaller
    return (
        f'<svg role="img" aria-label="fitness of {len(scored)} candidates, best {high:.4f}" width="{WIDTH}" '
        f'height="{HEIGHT}">{dots}<polyline points="{line}" fill="none" stroke="#2f6fd0"/></svg>'
    )
