"""Running the pipeline from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.cli_common import console, open_store_of, quiet_environment, raise_unless_done, show_run
from memmcl.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from memmcl.config import RunConfig


def go(settings: RunConfig, *, out: Path | None = None, port: int | None = None, expected: str | None = None) -> None:
    """Run the pipeline, go on with it, or find it finished; then show what it made.

    expected: the run's id; rows, base or code that changed since make another one.

    Raises:
        MemmclError: whatever is missing or wrong; another id than expected.
    """
    quiet_environment()
    from tasks.inputs import find_inputs

    with console.status("reading data and base model"):
        inputs = find_inputs(settings)
        from tasks.session import finished, open_run, refuse_second

        opened = open_run(settings, inputs)
        done = finished(opened)
    if expected is not None and opened.id != expected:
        raise DataError(
            f"run {expected[:8]} cannot go on: its rows, its base or memmcl itself changed, so that the same settings "
            f"are now run {opened.id[:8]}; start that by `memmcl run`"
        )
    if done is None:
        from flows.server import check_port, prefect_server

        refuse_second(opened)
        if port is not None:
            check_port(port)
        console.print(f"run {opened.id[:8]}, store {opened.store['url']}", soft_wrap=True)
        with prefect_server(port) as api:
            console.print(f"Prefect UI while it runs: {api.removesuffix('/api')}")
            from flows.pipeline import pipeline

            state = pipeline(settings, return_state=True)
        raise_unless_done(state)
        done = finished(opened)
        assert done is not None, "the pipeline publishes the run's last artifact before it returns"
    else:
        console.print(f"run {opened.id[:8]} is finished; from the store:")
    show_run(open_store_of(settings), done, out)
