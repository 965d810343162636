"""What all commands share: the console, common options, the store and the runs in it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flows.terminal import console
from memmcl.config import RunConfig, load_config
from memmcl.errors import ArtifactNotFound, CorruptArtifact, MemmclError, UsageError, shown

if TYPE_CHECKING:
    from prefect.states import State

    from memmcl.store import ArtifactRef, Champions, Manifest, Reign, Store

INTERRUPTED = 130
"""The exit status of a command that was ended from outside."""
CHAMPION = "champion"
"""What `--run` takes in place of an id."""

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


def current_reign(store: Store, champions: Champions) -> Reign:
    """Return the champion of now, or say that there is none."""
    if champions.current is None:
        raise UsageError(f"no champion {shown(champions.name)} in {store.url} yet; the first retrain makes one")
    return champions.current


def find_run(store: Store, run_id: str | None, champion: str) -> Manifest:
    """Return the finished run whose id starts so; that of the champion of this name for "champion"; else the latest."""
    if run_id == CHAMPION:
        from memmcl.store import read_champions

        run_id = current_reign(store, read_champions(store, champion)).run_id
    from memmcl.store import newest

    found = newest(store, "run", run_id or "")
    if found is None:
        for path in store.objects.entries("manifests/run", run_id or ""):
            raise _damaged(store, Path(path).stem, f"its manifest {path} is not valid")
        which = f"whose id starts with {shown(run_id)} " if run_id else ""
        raise UsageError(
            f"no finished run {which}in {store.url}; start one with `memmcl run CONFIG`, or name another --store"
        )
    return found


def print_columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of any length; rich's own takes minutes for thousands of rows."""
    lines = [tuple(header), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    console.print(Text(text[0], style="bold"), soft_wrap=True)
    if text[1:]:
        console.out("\n".join(text[1:]), highlight=False)


@contextmanager
def mendable(store: Store, run_id: str) -> Iterator[None]:
    """Say of a run that is damaged how it becomes whole again."""
    try:
        yield
    except (ArtifactNotFound, CorruptArtifact) as error:
        raise _damaged(store, run_id, str(error).partition("; run the pipeline")[0]) from error


def _damaged(store: Store, run_id: str, what: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"run {run_id[:8]} is damaged: {what}; run its command again, or `memmcl store verify --repair {run_id[:8]} "
        f"--store {shlex.quote(store.url)}`: what is damaged is made again"
    )


def show_run(store: Store, done: Manifest, out: Path | None) -> None:
    """Print the results table and where to look further; copy report and model to `out`.

    Raises:
        CorruptArtifact: something of the run is damaged; the message says how it is made again.
    """
    with mendable(store, done.key):
        _show_run(store, done, out)


def _show_run(store: Store, done: Manifest, out: Path | None) -> None:
    from memmcl.report import parse_results, results_table
    from memmcl.store.objects import write_file

    results = parse_results(json.loads(store.read(done, "results.json")))
    console.print(results_table(results, width=max(80, console.width)))
    if out is None and store.url.startswith("file://"):
        out = Path("memmcl-runs") / done.key[:8]
    if out is not None:
        store.fetch(done, out)
        for kind, name in (("unified", "adapter"), ("model", "model")):
            for ref in _made(done, kind):
                store.fetch(ref, out / name)
                write_file(out / name / "README.md", store.read(done, f"{name}.md"))
        console.print(f"unified model  {out / 'adapter'}")
        console.print(f"report         {out / 'report.html'}", soft_wrap=True)
    else:
        console.print(
            f"report         memmcl report {done.key[:8]} --store {shlex.quote(store.url)} --out DIR", soft_wrap=True
        )
    flow_run = done.metrics.get("flow_run_id")
    console.print(f"run history    memmcl ui  (flow run {flow_run})", soft_wrap=True)


def _made(done: Manifest, kind: str) -> list[ArtifactRef]:
    return [ref for ref in done.inputs if ref.kind == kind]


@contextmanager
def our_options(names: Mapping[str, str]) -> Iterator[None]:
    """Let messages name the options of a command where they name settings or arguments: by their words, the option's.

    Words that end in a colon are replaced at the beginning of a message alone.
    """
    try:
        yield
    except MemmclError as error:
        message = str(error)
        for words, option in names.items():
            if not words.endswith(": ") or message.startswith(words):
                message = message.replace(words, option, 1 if words.endswith(": ") else -1)
        raise type(error)(message) from error


def raise_unless_done(state: State[Any]) -> None:
    """Raise what a flow failed with; one that was cancelled ends the command."""
    if state.is_cancelled():
        console.print("the run was cancelled")
        raise typer.Exit(INTERRUPTED)
    state.result()


def quiet_environment() -> None:
    """Set what keeps libraries from phoning home and from talking over our own output."""
    for name, value in {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
