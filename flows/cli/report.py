"""`memmcl report`: what a finished run says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import ConfigFile, StoreUrl, open_store_of, settings_of
from flows.cli.finished import show_run
from memmcl.api.runs import LATEST, find_run


def report(
    run_id: Annotated[str | None, typer.Argument(help="First digits of a run's id; the latest run by default")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to copy the report and the model to")] = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Show a finished run: the results table, and the path of its report.

    For example:

    $ memmcl report
    $ memmcl report 3f9a --store s3://bucket/folder --out report
    """
    settings = settings_of(store, config)
    opened = open_store_of(settings)
    show_run(opened, find_run(opened, run_id or LATEST, settings.promotion.champion), out)
