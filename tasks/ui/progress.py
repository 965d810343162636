"""Progress that people see: a bar or lines in the terminal, and a progress artifact in the Prefect UI."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.run.runtime import log

_BAR = "MEMMCL_PROGRESS_BAR"
Move = Callable[[int, int, str], None]
"""Called with (done, in all, a few words)."""


def choose_display() -> None:
    """Have the workers that this process starts draw bars where a person watches a terminal, and lines elsewhere."""
    terminal = sys.stderr.isatty()
    os.environ.setdefault(_BAR, "1" if terminal else "0")
    if not terminal:
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")


@contextmanager
def shown(title: str, total: int, *, start: int = 0, lines: int = 10) -> Iterator[Move]:
    """Show the progress of work in `total` steps: about `lines` log lines or a bar, and as many artifact updates.

    start: how many steps were done before; the time left is that of the others.
    """
    artifact = create_progress_artifact(
        progress=100.0 * start / total, key=re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"), description=title
    )
    bar = _bar(title, total) if os.environ.get(_BAR) == "1" else None
    if bar is not None and start:
        bar.update(start)
    started = time.monotonic()

    def move(done: int, in_all: int, words: str) -> None:
        left = span((time.monotonic() - started) / max(done - start, 1) * (in_all - done))
        if bar is not None:
            bar.set_description(f"{title} ({words}, about {left} left)")
            bar.update(1)
        if done * lines // in_all == (done - 1) * lines // in_all and done != in_all:
            return
        update_progress_artifact(
            artifact, progress=100.0 * done / in_all, description=f"{title}: {words}, about {left} left"
        )
        if bar is None:
            log().info("%s: %d of %d, %s, about %s left", title, done, in_all, words, left)

    try:
        yield move
    finally:
        if bar is not None:
            bar.close()


def span(seconds: float) -> str:
    """Return how long something takes, for a person: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _bar(title: str, total: int):  # type: ignore[no-untyped-def]
    from ray.experimental import tqdm_ray

    return tqdm_ray.tqdm(desc=title, total=total)
