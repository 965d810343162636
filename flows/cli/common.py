"""What all commands share: the console, common options, the store and the runs in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flows.terminal import console, notes, output
from memmcl.config import RunConfig, load_config
from memmcl.errors import MemmclError

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from flows.cli.screen import Screen
    from memmcl.store import Store

INTERRUPTED = 130
"""The exit status of a command that was ended from outside."""

StoreUrl = Annotated[
    str | None,
    typer.Option("--store", help="Directory or s3://bucket/folder; without it, that of --config, else memmcl-store"),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of a run; its store section is used")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, as in experts.steps=80; may be repeated"),
]
ServerPort = Annotated[
    int | None, typer.Option(min=1, max=65535, help="Port of the run's Prefect server; a free one by default")
]


def settings_of(store: str | None, config: Path | None) -> RunConfig:
    """Return the settings of a file, or the defaults; `store` replaces the URL of its store."""
    return load_config(config, [f"store.url={store}"] if store else [])


def open_store_of(settings: RunConfig) -> Store:
    """Open the store that the settings name."""
    from memmcl.store import Store

    cfg = settings.store
    return Store.open(cfg.url, endpoint_url=cfg.endpoint_url, region=cfg.region)


def print_columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of any length; rich's own takes minutes for thousands of rows."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    console.print(Text(head, style="bold"), soft_wrap=True)
    if body:
        console.out("\n".join(body), highlight=False)


@contextmanager
def our_options(names: Mapping[str, str]) -> Iterator[None]:
    """Put a command's options into error messages of the block, in place of settings or arguments: words -> option.

    Words that end in a colon and a space are replaced at the beginning of a message only.
    """
    try:
        yield
    except MemmclError as error:
        message = str(error)
        for words, option in names.items():
            if not words.endswith(": ") or message.startswith(words):
                message = message.replace(words, option, 1 if words.endswith(": ") else -1)
        raise type(error)(message) from error


@contextmanager
def progress_bar(total: int, first: str) -> Iterator[Callable[[int, str, str], None]]:
    """Draw a bar in a terminal; yield what moves it: called with (done, what is going on, a few words).

    first: what is going on before the first step.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    what, words = TextColumn("{task.description}"), TextColumn("{task.fields[words]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), words, TimeRemainingColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(first, total=total, words="")
        yield lambda done, going, said: bar.update(task, completed=done, description=going, words=said)


@contextmanager
def served(seen: Screen, config: RunConfig, facts: Mapping[str, str], port: int | None) -> Iterator[None]:
    """Say facts about a run that begins; while the block runs there is a Prefect server, see `prefect_server`."""
    from flows.server import check_port, prefect_server

    if port is not None:
        check_port(port)
    seen.plan(config)
    for what, text in (facts if seen.log is None else {**facts, "log": str(seen.log)}).items():
        seen.fact(what, text)
    with prefect_server(port) as api:
        seen.fact("Prefect UI", api.removesuffix("/api"))
        yield


def read_texts(place: str, whose: str) -> list[str]:
    """Return the texts of a file; those that cannot be used are left out and counted."""
    from memmcl.experts import forced
    from memmcl.suite.faults import Faults

    faults = Faults()
    texts = forced.read_texts(place, faults=faults)
    if len(faults):
        notes.print(f"left out: {len(faults)} {whose}, first {faults.first[0]}", soft_wrap=True)
    return texts


def raise_unless_done(state: State[Any]) -> None:
    """Raise what a flow failed with; one that was cancelled ends the command."""
    if state.is_cancelled():
        output.before_error()
        console.print("the run was cancelled")
        raise typer.Exit(INTERRUPTED)
    state.result()


def quiet_environment() -> None:
    """Set what keeps libraries from phoning home and from talking over our own output."""
    phoning = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    talking = {"RAY_AIR_NEW_OUTPUT": "0", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.update({**phoning, **talking, **os.environ})
