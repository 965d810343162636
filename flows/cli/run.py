"""`memmcl run`: the whole pipeline; also what goes on with a run that was started before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import Overrides, ServerPort, open_store_of, quiet_environment, raise_unless_done, served
from flows.cli.finished import show_run
from flows.cli.screen import Screen, run_screen, say_warnings
from flows.terminal import notes
from memmcl.config import RunConfig, load_config, parse_config
from memmcl.errors import CorruptArtifact, DataError

if TYPE_CHECKING:
    from memmcl.store import Manifest
    from tasks.run.journal import Journal
    from tasks.run.runtime import Run


def run(
    config: Annotated[Path, typer.Argument(help="YAML file with the run's settings")],
    set_: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where report and model are copied to; for a store on this disk, memmcl-runs/ID by default"),
    ] = None,
    port: ServerPort = None,
) -> None:
    """Run the whole pipeline: rows, experts, merge search, contexts, evaluation, report.

    Run it again after a crash and it goes on where it was; run it again when finished and it returns at once.
    Uses the Prefect server named by PREFECT_API_URL, or starts one for the length of the run.

    For example:

    $ memmcl run deployments/configs/quickstart.yaml
    $ memmcl run my.yaml --set experts.steps=80 --set "data.subtasks=\\[sent2, irony]"
    $ memmcl run my.yaml --set store.url=s3://bucket/folder
    """
    run_pipeline(load_config(config, set_ or []), out=out, port=port)


def continue_run(journal: Journal, asked: RunConfig) -> None:
    """Go on with the run of a journal, in the store that was asked for, or find it finished and whole."""
    settings = {**journal.config, "store": asked.store.model_dump(mode="json")}
    run_pipeline(parse_config(settings, f"run {journal.run_id[:8]}"), journal=journal)


def run_pipeline(
    settings: RunConfig, *, out: Path | None = None, port: int | None = None, journal: Journal | None = None
) -> None:
    """Run the pipeline, go on with it, or find it finished and whole; then show what came out.

    journal: of the run to go on with, which is refused where rows, base or code have changed since: its id is another.

    Raises:
        MemmclError: whatever is missing or wrong; another id than that of the journal.
    """
    quiet_environment()
    with run_screen() as seen:
        seen.doing("reading rows and base model")
        from tasks.run.inputs import find_inputs

        inputs = find_inputs(settings)
        seen.doing("opening the run")
        from tasks.stages.opening import finished, open_run, refuse_second

        say_warnings()
        opened = open_run(settings, inputs, None if journal is None else lambda _: journal.pinned)
        done = finished(opened)
        if journal is not None and opened.id != journal.run_id:
            raise DataError(
                f"run {journal.run_id[:8]} cannot go on: its rows, its base or memmcl itself changed, so that the same "
                f"settings are now run {opened.id[:8]}; start that by `memmcl run`"
            )
        reused = done is not None
        if done is None:
            refuse_second(opened)
            done = _work(seen, opened, port, journal)
    if reused:
        notes.print(f"run {opened.id[:8]} is finished; from the store:")
    show_run(open_store_of(settings), done, out, reused=reused)


def _work(seen: Screen, opened: Run, port: int | None, journal: Journal | None) -> Manifest:
    """Run the flow, and return the run's last artifact."""
    from tasks.stages.opening import finished

    config, url = opened.config, str(opened.store["url"])
    work = f"{len(config.data.subtasks)} subtasks on {opened.base.name}, {config.ray.workers} workers"
    with served(seen, config, {f"run {opened.id[:8]}": f"{config.name}: {work}", "store": url}, port):
        seen.doing("starting Ray")
        from flows.pipeline import pipeline, resume

        if journal is None:
            state = pipeline(config, return_state=True)
        else:
            state = resume(config, journal.pinned, return_state=True)
    raise_unless_done(state)
    done = finished(opened)
    if done is None:
        raise CorruptArtifact(
            f"run {opened.id[:8]} is not whole in {url} although it has just been finished; "
            "run the same command again, and look at the disk"
        )
    return done
