"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.table import Table

from flows.cli.champion import champion_app
from flows.cli.common import (
    INTERRUPTED,
    ConfigFile,
    Overrides,
    StoreUrl,
    console,
    find_run,
    mendable,
    open_store_of,
    quiet_environment,
    raise_unless_done,
    settings_of,
    show_run,
)
from flows.cli.data import data_app
from flows.cli.experts import experts_app
from flows.cli.fetch import fetch
from flows.cli.merge import merge_app
from flows.cli.run import go
from flows.cli.search import search_app
from flows.cli.store import store_app
from flows.terminal import Commands, fail
from memmcl.config import load_config
from memmcl.errors import MemmclError, ServiceError, UsageError
from memmcl.logs import clean_handler
from memmcl.urls import redact
from memmcl.version import __version__

if TYPE_CHECKING:
    from memmcl.api.model import Prediction
from tasks.run.leftovers import keep_error
from tasks.run.watch import ends_process

app = typer.Typer(
    help="One sentiment model out of many LoRA experts: train, merge by evolution, evaluate, report.\n\n"
    "For example:\n\n"
    "$ memmcl run deployments/configs/quickstart.yaml\n"
    '$ memmcl predict "The food was great, the wait was not."',
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

data_app.command("fetch")(fetch)
app.add_typer(data_app, name="data")
app.add_typer(experts_app, name="experts")
app.add_typer(merge_app, name="merge")
app.add_typer(search_app, name="search")
app.add_typer(store_app, name="store")
app.add_typer(champion_app, name="champion")

RunId = Annotated[
    str | None, typer.Option("--run", help="First digits of a run's id, or champion; the latest run by default")
]
Aspects = Annotated[
    list[str] | None,
    typer.Option("--aspect", help="Ask about this aspect; may be repeated. Without it, about those found in the text"),
]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="Target of a stance; twice for the two things that are compared")
]
OutDirectory = Annotated[
    Path | None,
    typer.Option(help="Where report and model are copied to; for a store on this disk, memmcl-runs/ID by default"),
]
ServerPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port of the run's Prefect server; a free one by default")
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file with the run's settings")],
    set_: Overrides = None,
    out: OutDirectory = None,
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
    go(load_config(config, set_ or []), out=out, port=port)


@app.command()
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


@app.command()
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
    show_run(opened, find_run(opened, run_id, settings.promotion.champion), out)


@app.command()
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on")] = 4200) -> None:
    """Open the Prefect UI on this machine's run history (the runs that `memmcl run` made without PREFECT_API_URL)."""
    quiet_environment()
    from flows.server import HOST, check_port, server_command, server_environment

    check_port(port)
    console.print(f"Prefect UI: http://{HOST}:{port}/runs  (Ctrl-C ends it)")
    command = server_command(port)
    os.execvpe(command[0], command, server_environment(port))  # signals reach the server itself


@app.command()
def predict(
    text: Annotated[str, typer.Argument(help="The text to analyse")],
    aspect: Aspects = None,
    target: Targets = None,
    run_id: RunId = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Answer every subtask about one text with a run's unified model, each in the context that its gate chose.

    For example:

    $ memmcl predict "The food was great, the wait was not."
    $ memmcl predict "The screen is sharp." --aspect screen --aspect battery
    """
    if not text.strip():
        raise UsageError("expected a text to analyse, got an empty one; put it in quotes behind `memmcl predict`")
    settings = settings_of(store, config)
    opened = open_store_of(settings)
    manifest = find_run(opened, run_id, settings.promotion.champion)
    from memmcl.api.model import load_model

    with console.status("loading the unified model"), mendable(opened, manifest.key):
        model = load_model(opened, manifest.key)
        found = model.predict(text, aspects=aspect or [], targets=target or [])
    table = Table("subtask", "about", "answer", "confidence", box=None, header_style="bold")
    for one in found:
        table.add_row(model.subtasks[one.subtask].title, *_answer(one))
    console.print(table)


def _answer(found: Prediction) -> tuple[str, str, str]:
    """Return what a prediction is about, the answer, and how sure the model is of it."""
    if found.missing == ("aspect",):
        return "", "(no aspect found; name one with --aspect)", ""
    if found.missing:
        return "", f"(needs {', '.join(found.missing)}; give --target {len(found.missing)} times)", ""
    about = ", ".join(found.about.values()) or "the text"
    if found.label is not None:
        return about, found.label, f"{found.probability:.2f}"
    return about, f"{'' if found.tuples is not None else 'unreadable: '}{found.text}", ""


@app.command()
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

    with console.status("asking the Prefect server"):
        applied = apply(file, settings)
    table = Table("what", "name", "", box=None, header_style="bold")
    for one in applied:
        table.add_row(one.what, one.name, one.done)
    console.print(table)
    for pool in (one.name for one in applied if one.what == "work pool"):
        console.print(f"next           prefect worker start --pool {shlex.quote(pool)} --type process", soft_wrap=True)


@app.command()
def version() -> None:
    """Show the version."""
    console.print(__version__)


def main() -> None:
    """Run the command line; errors are one line, exit code 2 for usage and 1 for failure."""
    if logging.lastResort is not None:  # what shows warnings until Prefect has set up its log
        clean_handler(logging.lastResort)
    try:
        with ends_process(fail):
            app(prog_name="memmcl")
    except MemmclError as error:
        _fail(str(error), error.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer's answer to Ctrl-C, which it keeps silent about
            _fail("interrupted; run the same command again to go on", INTERRUPTED)
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        _fail(f"unexpected {what}; this is a defect of memmcl, please report it {_kept(error)}", 1)


def _fail(message: str, code: int) -> NoReturn:
    fail(message)
    sys.exit(code)


def _kept(error: BaseException) -> str:
    """Write the error's traceback to a file of its own, and say where it is."""
    try:
        return f"with its traceback in {keep_error(redact(''.join(traceback.format_exception(error))))}"
    except (OSError, ServiceError):
        return f"(its traceback could not be written to {tempfile.gettempdir()})"


if __name__ == "__main__":
    main()
