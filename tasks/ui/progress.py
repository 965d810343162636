"""Progress that people see: lines in the log, a progress artifact in the Prefect UI, and updates for a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from memmcl.text import span
from tasks.ui.logs import log
from tasks.ui.updates import Update, announce

EVERY = 1.0
"""Seconds between two updates for a terminal."""


class Move(Protocol):
    """Says how far the work is: (done, in all, a few words); best: a line for the best candidate of each search."""

    def __call__(self, done: int, in_all: int, words: str, best: Sequence[str] = ()) -> None:
        """Say it."""


@contextmanager
def shown(title: str, total: int, *, kind: str, start: int = 0, lines: int = 10) -> Iterator[Move]:
    """Show the progress of work in `total` steps: about `lines` log lines and as many updates of the artifact.

    kind: of the artifact that is made. start: how many steps were done before; the time left is that of the others.
    """
    artifact = create_progress_artifact(
        progress=100.0 * start / total, key=re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-"), description=title
    )
    announce(Update(title, kind, done=start, total=total))
    started = announced = time.monotonic()

    def move(done: int, in_all: int, words: str, best: Sequence[str] = ()) -> None:
        nonlocal announced
        now = time.monotonic()
        if now - announced >= EVERY or done == in_all:
            announce(Update(title, kind, done=done, total=in_all, words=words, lines=tuple(best)))
            announced = now
        if done * lines // in_all == (done - 1) * lines // in_all and done != in_all:
            return
        left = span((now - started) / max(done - start, 1) * (in_all - done))
        update_progress_artifact(
            cast("UUID", artifact), progress=100.0 * done / in_all, description=f"{title}: {words}, about {left} left"
        )
        log().info("%s: %d of %d, %s, about %s left", title, done, in_all, words, left)

    yield move
