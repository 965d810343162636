"""`memmcl store gc` and `memmcl store rm`: what nobody needs any more, removed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import ConfigFile, StoreUrl, open_store_of, print_columns, settings_of
from flows.terminal import console, output
from memmcl.errors import UsageError

if TYPE_CHECKING:
    from memmcl.store import RemovalPlan

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
SHOWN = 20  # runs that are listed one by one

Delete = Annotated[bool, typer.Option("--delete", help="Remove it; without this it is only said what would go")]


def store_gc(
    keep_runs: Annotated[
        int | None, typer.Option(min=0, help="Keep the newest so many finished runs; all of them by default")
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Keep whatever is younger, as 12h, 7d or 4w; by default, a week for what belongs to no finished run",
        ),
    ] = None,
    delete: Delete = False,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Remove what no run that is kept needs: older runs, what unfinished ones left, files that nobody names.

    Champions, the runs that they would be rolled back to, and whatever runs at work use are always kept. Exit
    code 1 where damage keeps something from being judged.

    For example:

    $ memmcl store gc --keep-runs 10
    $ memmcl store gc --keep-runs 10 --older-than 30d --delete
    """
    from memmcl.store import Policy, collect

    seconds = None
    if older_than is not None:
        match = re.fullmatch(r"(\d{1,9})([smhdw])", older_than)
        if match is None:
            raise UsageError(f"expected a duration such as 90m, 12h, 7d or 4w, got {older_than[:40]!r}")
        seconds = int(match[1]) * UNITS[match[2]]
    _show(collect(open_store_of(settings_of(store, config)), Policy(keep_runs, seconds), delete=delete), delete)


def store_rm(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="First digits of a run's id, finished or not")],
    delete: Delete = False,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Remove one run: its report and journal, and what no other run needs. Never a champion, or a run at work.

    For example:

    $ memmcl store rm 3f9a1c
    $ memmcl store rm 3f9a1c --delete
    """
    from memmcl.store import remove_run

    _show(remove_run(open_store_of(settings_of(store, config)), run_id, delete=delete), delete, kept=False)


def _show(plan: RemovalPlan, delete: bool, kept: bool = True) -> None:
    runs = [f"run {run_id[:8]}: {why}" for run_id, why in plan.runs.items()]
    more = [f"{len(runs) - SHOWN} more runs"] if len(runs) > SHOWN else []
    lines = [f"kept     {line}" for line in (*runs[:SHOWN], *more, *plan.kept)] if kept else []
    for line in [*lines, *(f"problem  {problem}" for problem in plan.problems)]:
        console.print(line, soft_wrap=True)
    totals = plan.totals()
    if totals:
        rows = [(what, f"{objects:,}", f"{size:,}") for what, (objects, size) in totals.items()]
        print_columns(("what goes", "objects", "bytes"), rows)
        objects, size = (sum(column) for column in zip(*totals.values(), strict=True))
        what = f"{objects:,} objects, {size:,} bytes"
        console.print(f"removed {what}" if delete else f"{what} would go; --delete removes them")
    else:
        console.print("nothing goes")
    output.answer({"deleted": delete, "totals": totals, "plan": plan})
    if plan.problems:
        raise typer.Exit(1)
