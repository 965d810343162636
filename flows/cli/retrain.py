"""`memmcl retrain`: retrain on the rows of today, once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import Overrides, ServerPort, quiet_environment, raise_unless_done, served
from flows.cli.screen import run_screen, say_warnings
from flows.terminal import console, output
from memmcl.config import load_config
from tasks.ui.updates import GATE, STAGES


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
    with run_screen((*STAGES, GATE)) as seen:
        seen.doing("reading rows and base model")
        from tasks.run.inputs import find_inputs

        find_inputs(settings)  # mistakes show before a server starts
        with served(seen, settings, {"store": settings.store.url}, port):
            seen.doing("comparing rows with those of the champion")
            from flows.retrain import retrain as flow

            say_warnings()
            state = flow(settings, return_state=True)
        raise_unless_done(state)
    console.print(f"{state.name}: {state.message}", soft_wrap=True)
    output.answer({"state": state.name, "message": state.message})
