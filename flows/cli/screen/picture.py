"""The live picture of a run: stages, workers, best candidates, the time that is left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from flows.cli.screen.state import RunState, Screen, Work, clock, name_of, said
from flows.terminal import Terminal

BAR = 20
"""Columns of a bar."""


class Picture(Screen):
    """Draws the state of a run anew twice a second, in the lines that the terminal has."""

    def __init__(self, terminal: Terminal, state: RunState) -> None:
        super().__init__(terminal, state)
        self._doing = ""
        self.facts: list[tuple[str, str]] = []
        """What is said of the run as a whole: (what, text)."""
        self._live = Live(
            get_renderable=self.draw,
            console=terminal,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self) -> Picture:
        """Begin to draw; the cursor stays visible, for a process that is killed could not show it again."""
        self._live.start()
        self._terminal.show_cursor(True)
        return self

    def doing(self, what: str) -> None:
        """Show it until the first stage begins."""
        self._doing = what

    def fact(self, what: str, text: str) -> None:
        """Show it at the top."""
        self.facts.append((what, text))

    def warn(self, message: str) -> None:
        """Say a warning above the picture."""
        self._terminal.print(f"warning: {message}")

    def close(self) -> None:
        """Remove the picture."""
        self._live.stop()

    def draw(self) -> RenderableType:
        """Return the picture as it is now; where lines are few, less of what workers do."""
        with suppress(OSError, ValueError):  # no terminal; else one whose size may have changed
            size = os.get_terminal_size(self._terminal.file.fileno())
            self._terminal.size = size if size.columns and size.lines else self._terminal.size
        with self._state.lock:
            works = sorted(self._state.works.values(), key=lambda work: work.began)
            for shown in range(len(works), 0, -1):
                picture = self._whole(works[:shown], len(works) - shown)
                if len(self._terminal.render_lines(picture, pad=False)) < self._terminal.height:
                    return picture
            return self._whole([], len(works))

    def _whole(self, works: Sequence[Work], more: int) -> Group:
        state = self._state
        head = Table.grid(Column(overflow="fold"), Column(justify="right", no_wrap=True), expand=True)
        elapsed = f"elapsed {clock(time.monotonic() - state.started)}"
        head.add_row(Text("memmcl", style="bold"), elapsed + state.left(", "))
        facts = Table.grid(Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
        for what, text in self.facts:
            facts.add_row(what, text)
        parts: list[RenderableType] = [head, facts, Text()]
        if not works and not all(stage.ended for stage in state.stages):
            parts.append(Text(f"… {self._doing if state.stage is None else 'waiting for a worker'}", style="cyan"))
        if self.facts:
            parts += [self._stages(), Text()]
        if works:
            parts.append(self._works(works))
        if more:
            parts.append(Text(f"and {more} more"))
        return Group(*parts, *(Text(f"  {line}", overflow="fold") for line in state.best))

    def _stages(self) -> Table:
        columns = Column(no_wrap=True), Column(overflow="fold", ratio=1), Column(justify="right", no_wrap=True)
        table = Table.grid(*columns, padding=(0, 2))
        count = len(self._state.stages)
        for number, stage in enumerate(self._state.stages, start=1):
            mark, style = ("✓", "green") if stage.ended else ("●", "cyan") if stage.began else ("○", "dim")
            title = Text(f"{mark} stage {number} of {count}: {stage.title}", style=style)
            took = "" if stage.began is None else clock((stage.ended or time.monotonic()) - stage.began)
            table.add_row(title, stage.facts(), took)
        return table

    def _works(self, works: Sequence[Work]) -> Table:
        columns = Column(overflow="fold", max_width=30), Column(no_wrap=True, width=BAR), Column(overflow="fold")
        table = Table.grid(*columns, padding=(0, 2))
        now = time.monotonic()
        for work in works:
            update = work.update
            bar = ProgressBar(total=update.total or None, completed=update.done, width=BAR, pulse=not update.total)
            table.add_row(f"  {name_of(update)}", bar, said(update) or clock(now - work.began))
        return table
