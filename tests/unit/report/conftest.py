"""What the tests of drawings share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure

from memmcl.report.plots import common, experts, merge
from memmcl.report.plots.figure import Plot, draw


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """All figures that are drawn during a test."""
    seen: list[Figure] = []

    def spy(name: str, paint: Callable[[Figure], None], **rest: Any) -> Plot:
        return draw(name, lambda figure: (paint(figure), seen.append(figure))[0], **rest)

    for module in (common, experts, merge):
        monkeypatch.setattr(module, "draw", spy)
    return seen
