"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
from typing import Annotated, NoReturn

import typer

from flows.cli.app import App
from flows.cli.champion import champion_app
from flows.cli.common import INTERRUPTED
from flows.cli.data import data_app
from flows.cli.deploy import deploy
from flows.cli.experts import experts_app
from flows.cli.merge import merge_app
from flows.cli.predict import predict
from flows.cli.report import report
from flows.cli.retrain import retrain
from flows.cli.run import run
from flows.cli.search import search_app
from flows.cli.store import store_app
from flows.cli.ui import ui
from flows.terminal import console, fail, output
from memmcl.errors import MemmclError, ServiceError
from memmcl.logs import clean_handler
from memmcl.urls import redact
from memmcl.version import __version__
from tasks.run.leftovers import keep_error
from tasks.run.watch import ends_process

app = App(
    help="One sentiment model out of many LoRA experts: train, merge by evolution, evaluate, report.\n\n"
    "For example:\n\n"
    "$ memmcl run deployments/configs/quickstart.yaml\n"
    '$ memmcl predict "The food was great, the wait was not."\n\n'
    "For completion by the tab key: memmcl --install-completion, then a new shell.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(works=True)(run)
app.command(works=True)(retrain)
app.command()(report)
app.command(json=False)(ui)
app.command(works=True)(predict)
app.command()(deploy)
app.add_typer(data_app, name="data")
app.add_typer(experts_app, name="experts")
app.add_typer(merge_app, name="merge")
app.add_typer(search_app, name="search")
app.add_typer(store_app, name="store")
app.add_typer(champion_app, name="champion")


@app.command()
def version() -> None:
    """Show the version."""
    console.print(__version__)
    output.answer({"version": __version__})


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def memmcl(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version, and end")
    ] = False,
) -> None:
    """Take the options that come before a command."""


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
        try:
            kept = f"with its traceback in {keep_error(redact(''.join(traceback.format_exception(error))))}"
        except (OSError, ServiceError):
            kept = f"(its traceback could not be written to {tempfile.gettempdir()})"
        _fail(f"unexpected {what}; this is a defect of memmcl, please report it {kept}", 1)


def _fail(message: str, code: int) -> NoReturn:
    fail(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
