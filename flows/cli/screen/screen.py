"""The terminal while a run is at work: a live picture, or about thirty lines where there is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flows.cli.screen.log_file import log_output
from flows.cli.screen.picture import Picture
from flows.cli.screen.state import RunState, Screen, clock, name_of, said
from flows.terminal import Terminal, notes, output
from memmcl.text import span
from tasks.ui.updates import STAGES, Update, watched_by

EVERY = 30.0
"""Seconds between two lines about progress, at first."""
SHARE = 6
"""Later, it is the time that the run has taken, divided by this: a run of hours says little more."""
WORKS = 3
"""Pieces of work that a line speaks of."""


class Lines(Screen):
    """Says the begin and the end of each stage, and how far it is: every 30 s, later less often."""

    def __init__(self, terminal: Terminal, state: RunState) -> None:
        super().__init__(terminal, state)
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="progress lines", daemon=True).start()

    def take(self, update: Update) -> None:
        """Note an update; say that a stage begins, and what came of one that ended."""
        super().take(update)
        if update.kind != "stage" or update.state == "failed":
            return
        with self._state.lock:
            number, stage = self._state.numbered(update.title)
            facts = stage.facts()
        head = f"stage {number} of {len(self._state.stages)}: {update.title}"
        if update.state == "done":
            head += f", done in {span(update.seconds)}{': ' if facts else ''}{facts}"
        self._terminal.print(head, soft_wrap=True)

    def close(self) -> None:
        """Say no more."""
        self._closed.set()

    def _run(self) -> None:
        state = self._state
        while not self._closed.wait(max(EVERY, (time.monotonic() - state.started) / SHARE)):
            with state.lock:
                works = sorted(state.works.values(), key=lambda work: work.began)
                words = [f"{name_of(work.update)} {said(work.update)}".strip() for work in works[:WORKS]]
                words += [f"{len(works) - WORKS} more"] if len(works) > WORKS else []
                words += state.best
                left = state.left("; ")
            if words:
                passed = clock(time.monotonic() - state.started)
                self._terminal.print(f"  {passed}  {'; '.join(words)}{left}", soft_wrap=True)


@contextmanager
def run_screen(titles: Sequence[str] = STAGES) -> Iterator[Screen]:
    """Show a run while the block is at work; what libraries and children print goes to a log file, but for --verbose.

    titles: of the run's stages.
    """
    state = RunState(titles)
    seen = Screen(notes, state)
    with log_output(lambda message: seen.warn(message)) as log:
        terminal = Terminal(file=output.errors or sys.stderr, quiet=output.quiet) if output.json else notes
        if output.verbose or output.quiet:
            seen = Screen(terminal, state)
        elif terminal.is_terminal and not terminal.is_dumb_terminal:
            seen = Picture(terminal, state).start()
        else:
            seen = Lines(terminal, state)
        seen.log = log
        output.before_error = seen.close
        try:
            with watched_by(seen.take):
                yield seen
        finally:
            seen.close()
            output.before_error = lambda: None
