"""`memmcl retrain`: retrain on the rows of today, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import Overrides, ServerPort, console, quiet_environment, raise_unless_done
from memmcl.config import load_config


def retrain(
    config: Annotated[Path, typer.Argument(help="YAML file with the run's settings")],
    set_: Overrides = None,
    port: ServerPort = None,
) -> None:
    """Retrain what new rows changed, and make the result champion if it is better; once, as the deployment does weekly.

    Ends as Promoted, NotPromoted or Unchanged, and says why.

    For example:

    $ memmcl retrain my.yaml
    $ memmcl champion show --config my.yaml
    """
    settings = load_config(config, set_ or [])
    quiet_environment()
    from tasks.run.inputs import find_inputs

    with console.status("reading data and base model"):
        find_inputs(settings)  # mistakes show before a server starts
    from flows.server import check_port, prefect_server

    if port is not None:
        check_port(port)
    with prefect_server(port) as api:
        console.print(f"Prefect UI while it runs: {api.removesuffix('/api')}")
        from flows.retrain import retrain as flow

        state = flow(settings, return_state=True)
    raise_unless_done(state)
    console.print(f"{state.name}: {state.message}", soft_wrap=True)
