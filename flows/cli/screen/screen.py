"""The terminal while a run is at work: a live picture, or about thirty lines where there is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.cli.screen.forecast import Forecast
from flows.cli.screen.log_file import log_output
from flows.cli.screen.picture import Picture
from flows.cli.screen.state import RunState, clock, name_of, said
from flows.terminal import Terminal, notes, output, warn
from memmcl.config import RunConfig
from memmcl.text import span
from tasks.ui.updates import STAGES, Update, watched_by

EVERY = 30.0
"""Seconds between two lines about progress, at first."""
SHARE = 6
"""Later, a line comes each time that the run took one part in so many longer: a run of hours says little more."""
WORKS = 3
"""Pieces of work that a line speaks of."""


class Screen:
    """Says what a run does, by default nothing (--quiet); a command tells it facts, the work itself sends updates.

    log: the file that libraries and children print to, None with --verbose.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.log: Path | None = None

    def plan(self, config: RunConfig) -> None:
        """Let the time that is left be told: the run has these settings."""
        self._state.forecast = Forecast(config)

    def take(self, update: Update) -> None:
        """Note and show an update of the run."""
        self._state.take(update)
        if update.kind == "stage":
            self.turn(update)

    def doing(self, what: str) -> None:
        """Say what is going on before the first stage."""

    def fact(self, what: str, text: str) -> None:
        """Say something of the run as a whole."""

    def turn(self, update: Update) -> None:
        """Say that a stage begins or has ended."""

    def warn(self, message: str) -> None:
        """Say a warning."""
        warn(message)

    def close(self) -> None:
        """Say no more."""


class Verbose(Screen):
    """Says facts; all else is said by libraries (--verbose)."""

    def __init__(self, terminal: Terminal, state: RunState) -> None:
        super().__init__(state)
        self._terminal = terminal

    def fact(self, what: str, text: str) -> None:
        """Say it in one line."""
        self._terminal.print(f"{what}: {text}", soft_wrap=True)


class Lines(Verbose):
    """Says the begin and the end of each stage, and how far it is: every 30 s, later less often."""

    def __init__(self, terminal: Terminal, state: RunState) -> None:
        super().__init__(terminal, state)
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="progress lines", daemon=True).start()

    def turn(self, update: Update) -> None:
        """Say that a stage begins or has ended."""
        with self._state.lock:
            number, stage = self._state.numbered(update.title)
            facts = stage.facts()
        head = f"stage {number} of {len(self._state.stages)}: {update.title}"
        if update.state == "done":
            head += f", done in {span(update.seconds)}{': ' if facts else ''}{facts}"
        if update.state != "failed":
            self._terminal.print(head, soft_wrap=True)

    def close(self) -> None:
        """Say no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(max(EVERY, (time.monotonic() - self._state.started) / SHARE)):
            line = self._line()
            if line:
                self._terminal.print(line, soft_wrap=True)

    def _line(self) -> str:
        with self._state.lock:
            works = sorted(self._state.works.values(), key=lambda work: work.began)
            words = [f"{name_of(work.update)} {said(work.update)}".strip() for work in works[:WORKS]]
            words += [f"{len(works) - WORKS} more"] if len(works) > WORKS else []
            words += self._state.best
            left = self._state.left()
        if not words:
            return ""
        ahead = "" if left is None else f"; about {span(left)} left"
        return f"  {clock(time.monotonic() - self._state.started)}  {'; '.join(words)}{ahead}"


class Live(Screen):
    """Draws one live picture."""

    def __init__(self, terminal: Terminal, state: RunState) -> None:
        super().__init__(state)
        self._terminal = terminal
        self._picture = Picture(terminal, state)
        self._picture.start()

    def doing(self, what: str) -> None:
        """Show it until the first stage begins."""
        self._picture.doing = what

    def fact(self, what: str, text: str) -> None:
        """Show it at the top."""
        self._picture.facts.append((what, text))

    def warn(self, message: str) -> None:
        """Say a warning above the picture."""
        self._terminal.print(f"warning: {message}")

    def close(self) -> None:
        """Remove the picture."""
        self._picture.stop()


@contextmanager
def run_screen(titles: Sequence[str] = STAGES) -> Iterator[Screen]:
    """Show a run while the block is at work; what libraries and children print goes to a log file, but for --verbose.

    titles: of the run's stages.
    """
    state = RunState(titles)
    seen = Screen(state)
    with log_output(lambda message: seen.warn(message)) as log:
        terminal = notes if not output.json else Terminal(file=output.errors or sys.stderr)
        if output.verbose:
            seen = Verbose(terminal, state)
        elif not output.quiet:
            drawn = terminal.is_terminal and not terminal.is_dumb_terminal
            seen = Live(terminal, state) if drawn else Lines(terminal, state)
        seen.log = log
        output.before_error = seen.close
        try:
            with watched_by(seen.take):
                yield seen
        finally:
            seen.close()
            output.before_error = lambda: None
