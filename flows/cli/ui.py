"""`memmcl ui`: the Prefect UI on this machine's run history."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from flows.cli.common import quiet_environment
from flows.terminal import console


def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on")] = 4200) -> None:
    """Open the Prefect UI on this machine's run history (the runs that `memmcl run` made without PREFECT_API_URL)."""
    quiet_environment()
    from flows.own_server import HOST
    from flows.server import check_port, server_command, server_environment

    check_port(port)
    console.print(f"Prefect UI: http://{HOST}:{port}/runs  (Ctrl-C ends it)")
    command = server_command(port)
    os.execvpe(command[0], command, server_environment(port))  # signals reach the server itself
