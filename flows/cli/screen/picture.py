"""The live picture of a run: stages, workers, best candidates, the time that is left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.cli.screen.state import RunState, Stage, Work, clock, name_of, said
from memmcl.text import span

BAR = 20
"""Columns of a bar."""


class Picture:
    """Draws the state of a run anew twice a second, in the lines that the terminal has."""

    def __init__(self, console: Console, state: RunState) -> None:
        self._console = console
        self._state = state
        self.doing = ""
        """What is going on where no stage is at work."""
        self.facts: list[tuple[str, str]] = []
        """What is said of the run as a whole: (what, text)."""
        self._live = Live(
            get_renderable=self.draw,
            console=console,
            refresh_per_second=2,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self) -> None:
        """Begin to draw; the cursor stays visible, for a process that is killed could not show it again."""
        self._live.start()
        self._console.show_cursor(True)

    def stop(self) -> None:
        """Remove the picture."""
        self._live.stop()

    def draw(self) -> RenderableType:
        """Return the picture as it is now; where lines are few, less of what workers do."""
        fit_to_terminal(self._console)
        with self._state.lock:
            works = sorted(self._state.works.values(), key=lambda work: work.began)
            for shown in range(len(works), 0, -1):
                picture = self._whole(works[:shown], len(works) - shown)
                if len(self._console.render_lines(picture, pad=False)) < self._console.height:
                    return picture
            return self._whole([], len(works))

    def _whole(self, works: Sequence[Work], more: int) -> Group:
        state = self._state
        head = Table.grid(expand=True)
        head.add_column(overflow="fold")
        head.add_column(justify="right", no_wrap=True)
        left = state.left()
        elapsed = f"elapsed {clock(time.monotonic() - state.started)}"
        head.add_row(Text("memmcl", style="bold"), elapsed if left is None else f"{elapsed}, about {span(left)} left")
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        for what, text in self.facts:
            facts.add_row(what, text)
        parts: list[RenderableType] = [head, facts, Text()]
        if not works and not all(stage.ended for stage in state.stages):
            parts.append(Text(f"… {self.doing if state.stage is None else 'waiting for a worker'}", style="cyan"))
        if self.facts:
            parts += [self._stages(), Text()]
        if works:
            parts.append(self._works(works))
        if more:
            parts.append(Text(f"and {more} more"))
        parts += [Text(f"  {line}", overflow="fold") for line in state.best] if state.best else []
        return Group(*parts)

    def _stages(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        table.add_column(justify="right", no_wrap=True)
        count = len(self._state.stages)
        for number, stage in enumerate(self._state.stages, start=1):
            mark, style = ("✓", "green") if stage.ended else ("●", "cyan") if stage.began else ("○", "dim")
            title = Text(f"{mark} stage {number} of {count}: {stage.title}", style=style)
            table.add_row(title, stage.facts(), _time_of(stage))
        return table

    def _works(self, works: Sequence[Work]) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(overflow="fold", max_width=30)
        table.add_column(no_wrap=True, width=BAR)
        table.add_column(overflow="fold")
        now = time.monotonic()
        for work in works:
            update = work.update
            bar = ProgressBar(total=update.total or None, completed=update.done, width=BAR, pulse=not update.total)
            table.add_row(f"  {name_of(update)}", bar, said(update) or clock(now - work.began))
        return table


def fit_to_terminal(console: Console) -> None:
    """Give a console the size of the terminal that it writes to, which may have changed."""
    try:
        size = os.get_terminal_size(console.file.fileno())
    except (OSError, ValueError):
        return
    if size.columns and size.lines:
        console.size = size


def _time_of(stage: Stage) -> str:
    return "" if stage.began is None else clock((stage.ended or time.monotonic()) - stage.began)
