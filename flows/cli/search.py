"""`memmcl search`: look at the searches of a run while they are at work or afterwards, and resume one by its id."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from flows.cli.app import App
from flows.cli.common import ConfigFile, StoreUrl, open_store_of, settings_of
from flows.terminal import console, output, table

if TYPE_CHECKING:
    from memmcl.store import Store
    from tasks.run.journal import Journal, SearchEntry

search_app = App(help="The merge searches of a run, finished or not.")
RunArgument = Annotated[str, typer.Argument(help="First digits of a run's id, as `memmcl run` prints it")]
EVERY = 3.0
"""Seconds between two looks."""


@search_app.command("show")
def search_show(
    run_id: RunArgument,
    top: Annotated[int, typer.Option(min=0, help="Also show so many of the best candidates of each search")] = 0,
    watch: Annotated[bool, typer.Option("--watch", help="Keep looking until Ctrl-C")] = False,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Show how far the searches of a run are, their best candidates, and what they spent.

    It reads the store alone, so that it works from anywhere, and while the run is at work.

    For example:

    $ memmcl search show 3f9a --watch
    $ memmcl search show 3f9a --top 5 --store s3://bucket/folder
    """
    from memmcl.search.records import progress_of
    from tasks.run.journal import read_journal

    opened = open_store_of(settings_of(store, config))
    journal = read_journal(opened, run_id)
    if output.json:
        searches = [(entry, progress_of(opened.records(f"searches/{entry.key}"))) for entry in journal.searches]
        output.answer([{"search": entry.name, "of": entry.evaluations, **progress} for entry, progress in searches])
        return
    if not watch:
        console.print(_view(opened, journal, top))
        return
    with suppress(KeyboardInterrupt), Live(_view(opened, journal, top), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(EVERY)
            live.update(_view(opened, read_journal(opened, journal.run_id), top), refresh=True)


@search_app.command("resume", works=True)
def search_resume(run_id: RunArgument, store: StoreUrl = None, config: ConfigFile = None) -> None:
    """Go on with a run that was killed, with the settings that it was started with; candidates keep their results.

    The same as `memmcl run` with the same file and the same --set, for when these are no longer at hand.

    For example:

    $ memmcl search resume 3f9a
    """
    from flows.cli.run import continue_run
    from tasks.run.journal import read_journal

    asked = settings_of(store, config)
    continue_run(read_journal(open_store_of(asked), run_id), asked)


def _view(store: Store, journal: Journal, top: int) -> RenderableType:
    from memmcl.search.records import progress_of

    steps = ("merge", "evaluate", "wait")
    columns = ["search", "candidates", "stopped", "failed", "rows", "best", "fitness", *(f"{step} s" for step in steps)]
    view = [table(*columns, title=f"run {journal.run_id[:8]}, started {journal.started}")]
    for entry in journal.searches:
        records = store.records(f"searches/{entry.key}")
        progress = progress_of(records)
        view[0].add_row(
            entry.name,
            f"{progress['candidates']} of {entry.evaluations}",
            str(progress["stopped"]),
            str(progress["failed"]),
            f"{progress['rows']:,}",
            "-" if progress["best"] is None else str(progress["best"]),
            _number(progress["fitness"]),
            *(f"{progress['seconds'][step]:.1f}" for step in steps),
        )
        if top:
            view.append(_best(entry, records, top))
    return Group(*view)


def _best(entry: SearchEntry, records: dict[int, dict[str, Any]], top: int) -> Table:
    best = table("candidate", "fitness", *entry.subtasks, "genome", title=entry.name)
    for index in sorted(records, key=lambda index: (_rank(records[index]), index))[:top]:
        record = records[index]
        values = [_number(record["values"].get(name)) for name in entry.subtasks]
        genome = " ".join(f"{gene:.3g}" for gene in record["genome"])
        mark = f"{index} (stopped)" if record.get("stopped") else str(index)
        best.add_row(mark, _number(record["fitness"]), *values, genome)
    return best


def _rank(record: dict[str, Any]) -> tuple[bool, float]:
    fitness = record["fitness"]
    return bool(record.get("stopped")) or fitness is None, -(fitness or 0.0)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
