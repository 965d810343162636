"""`memmcl deploy`: work pool, deployments and automations on a Prefect server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import Overrides, quiet_environment
from flows.terminal import console, notes, output, table
from memmcl.config import load_config


def deploy(
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of a run: the default parameters of the deployments")
    ] = None,
    set_: Overrides = None,
    file: Annotated[Path, typer.Option("--file", help="The deployments, in Prefect's format")] = Path(
        "deployments/prefect.yaml"
    ),
) -> None:
    """Create work pool, deployments and automations on the Prefect server that PREFECT_API_URL names.

    Called again it changes nothing, until the file, the configuration or memmcl itself changes.

    For example:

    $ memmcl deploy --config my.yaml --set store.url=s3://bucket/folder
    """
    settings = load_config(config, set_ or [])
    quiet_environment()
    from flows.deploy import deploy as apply

    with notes.status("asking the Prefect server"):
        applied = apply(file, settings)
    console.print(table("what", "name", "", rows=((one.what, one.name, one.done) for one in applied)))
    output.answer(applied)
    for pool in (one.name for one in applied if one.what == "work pool"):
        console.print(f"next           prefect worker start --pool {shlex.quote(pool)} --type process", soft_wrap=True)
