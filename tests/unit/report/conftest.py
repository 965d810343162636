"""What the tests of drawings share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

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


@pytest.fixture
def check_labels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Figure, int], None]:
    """Check that more than so many labels of a figure lie on its page, none on another; texts of this test are seen."""
    written: dict[Text, Bbox] = {}  # where each stood when it was drawn last
    write = Text.draw

    def spy(text: Text, renderer: Any) -> None:
        write(text, renderer)
        if text.get_text() and text.get_visible():
            written[text] = text.get_window_extent(renderer).padded(-0.5)

    def check(figure: Figure, least: int) -> None:
        boxes = [(text.get_text(), box) for text, box in written.items() if text.get_figure(root=True) is figure]
        assert len(boxes) > least
        page = Bbox.from_bounds(0, 0, *(72 * figure.get_size_inches())).padded(1)
        for number, (name, box) in enumerate(boxes):
            assert page.x0 <= box.x0 <= box.x1 <= page.x1, name
            assert page.y0 <= box.y0 <= box.y1 <= page.y1, name
            for other, beside in boxes[number + 1 :]:
                assert not box.overlaps(beside), (name, other)

    monkeypatch.setattr(Text, "draw", spy)
    return check
