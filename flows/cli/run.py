"""Running the pipeline from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.cli.common import console, open_store_of, quiet_environment, raise_unless_done, show_run
from memmcl.config import parse_config
from memmcl.errors import CorruptArtifact, DataError

if TYPE_CHECKING:
    from pathlib import Path

    from memmcl.config import RunConfig
    from tasks.run.journal import Journal


def go_on(journal: Journal, asked: RunConfig) -> None:
    """Go on with the run of a journal, in the store that was asked for, or find it finished and whole."""
    settings = {**journal.config, "store": asked.store.model_dump(mode="json")}
    go(parse_config(settings, f"run {journal.run_id[:8]}"), journal=journal)


def go(
    settings: RunConfig, *, out: Path | None = None, port: int | None = None, journal: Journal | None = None
) -> None:
    """Run the pipeline, go on with it, or find it finished and whole; then show what it made.

    journal: of the run that it must be; rows, base or code that changed since make another one.

    Raises:
        MemmclError: whatever is missing or wrong; another id than that of the journal.
    """
    quiet_environment()
    from tasks.run.inputs import find_inputs

    with console.status("reading data and base model"):
        inputs = find_inputs(settings)
        from tasks.run.session import finished, open_run, refuse_second

        opened = open_run(settings, inputs, None if journal is None else lambda _: journal.pinned)
        done = finished(opened)
    if journal is not None and opened.id != journal.run_id:
        raise DataError(
            f"run {journal.run_id[:8]} cannot go on: its rows, its base or memmcl itself changed, so that the same "
            f"settings are now run {opened.id[:8]}; start that by `memmcl run`"
        )
    if done is None:
        from flows.server import check_port, prefect_server

        refuse_second(opened)
        if port is not None:
            check_port(port)
        console.print(f"run {opened.id[:8]}, store {opened.store['url']}", soft_wrap=True)
        with prefect_server(port) as api:
            console.print(f"Prefect UI while it runs: {api.removesuffix('/api')}")
            from flows.pipeline import pipeline, resume

            if journal is None:
                state = pipeline(settings, return_state=True)
            else:
                state = resume(settings, journal.pinned, return_state=True)
        raise_unless_done(state)
        done = finished(opened)
        if done is None:
            raise CorruptArtifact(
                f"run {opened.id[:8]} is not whole in {opened.store['url']} although it has just been finished; "
                "run the same command again, and look at the disk"
            )
    else:
        console.print(f"run {opened.id[:8]} is finished; from the store:")
    show_run(open_store_of(settings), done, out)
