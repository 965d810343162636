"""What people see of work in progress: how far it is, and how long it still takes."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest

from memmcl.text import span
from tasks.ui import progress
from tasks.ui.progress import shown


class Clock:
    """Stands for the clock: a second a step."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """The progress and the description of the artifact, each time that it was changed."""
    found: list[tuple[float, str]] = []

    def create(progress: float, key: str, description: str) -> str:
        found.append((progress, f"{key}: {description}"))
        return "id"

    def update(artifact: str, progress: float, description: str) -> None:
        found.append((progress, description))

    monkeypatch.delenv("MEMMCL_PROGRESS_BAR", raising=False)
    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", update)
    monkeypatch.setattr(progress, "log", partial(logging.getLogger, "memmcl.test"))
    return found


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5999, "100 min"), (6000, "1.7 h"), (36_000, "10.0 h")],
)
def test_a_span_of_time_for_a_person(seconds: float, said: str) -> None:
    assert span(seconds) == said


def test_the_time_left_is_that_of_the_steps_that_are_taken_now(
    seen: list[tuple[float, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A training that goes on from step 40 of 50, a second a step: what was done before took no time now."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with caplog.at_level(logging.INFO), shown("warm start", 50, start=40) as move:
        for step in range(41, 51):
            clock.now += 1.0
            move(step, 50, "loss 0.500, 900 tokens/s")
    assert seen[0] == (80.0, "warm-start: warm start")
    assert seen[1:] == [
        (90.0, "warm start: loss 0.500, 900 tokens/s, about 5 s left"),
        (100.0, "warm start: loss 0.500, 900 tokens/s, about 0 s left"),
    ]
    assert "warm start: 45 of 50, loss 0.500, 900 tokens/s, about 5 s left" in caplog.text


def test_a_bar_starts_where_the_work_does(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Bar:
        def __getattr__(self, name: str) -> Any:
            return lambda *given: calls.append((name, *given))

    monkeypatch.setenv("MEMMCL_PROGRESS_BAR", "1")
    monkeypatch.setattr(progress, "_bar", lambda title, total: Bar())
    with shown("joint LoRA", 4, start=2) as move:
        move(3, 4, "loss 1.000")
    names = [name for name, *_ in calls]
    assert names == ["update", "set_description", "update", "close"]
    assert calls[0] == ("update", 2)
    assert calls[1][1].startswith("joint LoRA (loss 1.000, about ")
