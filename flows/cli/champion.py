"""`memmcl champion`: the run whose model is in use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.app import App
from flows.cli.common import ConfigFile, StoreUrl, open_store_of, print_columns, settings_of
from flows.cli.finished import show_run
from flows.terminal import console, output
from memmcl.api.runs import current_reign, find_run

if TYPE_CHECKING:
    from memmcl.store import Champions, Store

champion_app = App(
    help="The champion: the run whose model is in use. Retrains challenge it; a person may roll it back."
)

ChampionName = Annotated[
    str | None, typer.Option("--name", help="Name of the champion; without it, that of --config, else champion")
]


@champion_app.command("show")
def champion_show(name: ChampionName = None, store: StoreUrl = None, config: ConfigFile = None) -> None:
    """Show the champion: its results table, and the path of its report.

    For example:

    $ memmcl champion show --store s3://bucket/folder
    """
    opened, champions = _champions(name, store, config)
    reign = current_reign(opened, champions)
    console.print(f"champion {champions.name}: run {reign.run_id[:8]}, {reign.name}, since {reign.since}")
    console.print(f"{reign.how}: {reign.why}", soft_wrap=True)
    show_run(opened, find_run(opened, reign.run_id, champions.name), None, champion=champions.name, reign=reign)


@champion_app.command("history")
def champion_history(name: ChampionName = None, store: StoreUrl = None, config: ConfigFile = None) -> None:
    """List every promotion and rollback, the newest first."""
    _, champions = _champions(name, store, config)
    rows = []
    for reign in reversed(champions.history):
        score = "" if reign.unified is None else f"{reign.unified:.3f} ± {reign.unified_se or 0:.3f}"
        rows.append((reign.since[:16], reign.run_id[:8], reign.name, reign.how, score, reign.why))
    print_columns(("since", "run", "name", "how", "test score", "why"), rows)
    output.answer(champions.history[::-1])


@champion_app.command("rollback")
def champion_rollback(
    to: Annotated[str | None, typer.Option("--to", help="First digits of a former champion's run id")] = None,
    name: ChampionName = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Give the place back to the champion before the current one, or to the former champion named by --to.

    A retrain does not promote again what was rolled back, as long as data and settings stay the same.

    For example:

    $ memmcl champion rollback
    $ memmcl champion rollback --to 3f9a1c
    """
    from memmcl.store import rollback

    opened, champions = _champions(name, store, config)
    before = champions.current
    after = rollback(opened, champions, to).current
    assert before is not None
    assert after is not None
    console.print(f"champion {champions.name}: run {after.run_id[:8]}, {after.name} (was run {before.run_id[:8]})")
    output.answer({"champion": champions.name, "before": before, "now": after})


def _champions(name: str | None, store: str | None, config: Path | None) -> tuple[Store, Champions]:
    from memmcl.store import read_champions

    settings = settings_of(store, config)
    opened = open_store_of(settings)
    return opened, read_champions(opened, name or settings.promotion.champion)
