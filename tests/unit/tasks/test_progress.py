"""What people see of work in progress: how far it is, and how long it still takes."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import Any

import pytest
from ray.experimental.tqdm_ray import RAY_TQDM_MAGIC

from memmcl.text import span
from tasks.ui import progress
from tasks.ui.progress import shown
from tasks.ui.updates import Update, announce, receive_updates, watched_by, working


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
    with caplog.at_level(logging.INFO), shown("warm start", 50, kind="warm", start=40) as move:
        for step in range(41, 51):
            clock.now += 1.0
            move(step, 50, "loss 0.500, 900 tokens/s")
    assert seen[0] == (80.0, "warm-start: warm start")
    assert seen[1:] == [
        (90.0, "warm start: loss 0.500, 900 tokens/s, about 5 s left"),
        (100.0, "warm start: loss 0.500, 900 tokens/s, about 0 s left"),
    ]
    assert "warm start: 45 of 50, loss 0.500, 900 tokens/s, about 5 s left" in caplog.text


def test_whoever_watches_hears_the_begin_and_the_end_and_at_most_one_step_a_second(
    seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, heard = Clock(), []
    monkeypatch.setattr(progress, "time", clock)
    with watched_by(heard.append), shown("joint LoRA", 40, kind="expert", start=10) as move:
        for step in range(11, 41):
            clock.now += 0.125
            move(step, 40, f"loss {step}", ["SC: best"])
    assert [(update.done, update.words) for update in heard] == [
        (10, ""),
        (18, "loss 18"),
        (26, "loss 26"),
        (34, "loss 34"),
        (40, "loss 40"),
    ]
    assert {(update.title, update.kind, update.total) for update in heard} == {("joint LoRA", "expert", 40)}
    assert heard[-1].lines == ("SC: best",)


def test_work_that_fails_is_announced_as_failed() -> None:
    heard: list[Update] = []
    with watched_by(heard.append), pytest.raises(KeyError), working("reference asc", "reference"):
        raise KeyError
    assert [update.state for update in heard] == ["working", "failed"]


def test_updates_of_workers_come_as_lines_that_ray_brings(capsys: pytest.CaptureFixture[str]) -> None:
    """A worker prints a line, Ray gives it to the receiver as it gives it to its own progress bars."""
    import ray
    from ray._private.worker import process_tqdm

    update = Update("expert asc", "expert", done=3, total=8, words="loss 0.5", lines=("a", "b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray._private.worker.global_worker, "mode", ray.WORKER_MODE, raising=False)
        announce(update)
    line = capsys.readouterr().out
    assert RAY_TQDM_MAGIC in line
    heard: list[Update] = []
    with receive_updates():
        process_tqdm(line)  # nobody watches
        with watched_by(heard.append):
            process_tqdm(line)
            process_tqdm(json.dumps({"desc": "some bar", "x": 1}))
    assert heard == [update]
    announce(update)
    assert capsys.readouterr().out == "", "outside of a worker there is nobody to tell"
