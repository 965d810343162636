"""`memmcl store`: look into the artifact store, and clear it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from flows.cli.app import App
from flows.cli.common import ConfigFile, StoreUrl, open_store_of, print_columns, settings_of
from flows.cli.store_gc import store_gc, store_rm
from flows.terminal import console, output
from memmcl.errors import UsageError, shown
from memmcl.urls import clean, redacted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memmcl.config import RunConfig
    from memmcl.store import Manifest, Problem, Store

store_app = App(help="Look into the artifact store: every expert, search, evaluation and report of every run.")

ArtifactKey = Annotated[str, typer.Argument(help="First digits of an artifact's key")]


@store_app.command("ls")
def store_ls(
    kind: Annotated[str | None, typer.Argument(help="Only artifacts of this kind, as expert, search, run")] = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """List artifacts, the newest first.

    For example:

    $ memmcl store ls expert --store my-store
    """
    from memmcl.store import summaries

    opened = open_store_of(settings_of(store, config))
    kinds = opened.objects.folders("manifests")
    if kind is not None and kind not in kinds:
        raise UsageError(
            f"no artifact of kind {shown(kind)} in {opened.url}; kinds there: {', '.join(kinds) or 'none'}"
        )
    listed = list(summaries(opened, kind))
    rows = [
        (one.kind, one.key[:12], one.name, one.created[:19], f"{one.seconds:.1f}", f"{one.size:,}") for one in listed
    ]
    print_columns(("kind", "key", "name", "created", "seconds", "size"), rows)
    output.answer(listed)


@store_app.command("show")
def store_show(key: ArtifactKey, store: StoreUrl = None, config: ConfigFile = None) -> None:
    """Show one artifact's manifest."""
    manifest = _find(open_store_of(settings_of(store, config)), key)
    console.print_json(data=redacted(manifest.model_dump(mode="json")))
    output.answer(manifest)


@store_app.command("fetch")
def store_fetch(
    key: ArtifactKey,
    directory: Annotated[Path, typer.Argument(help="Where its files go")],
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Copy one artifact's files into a directory, every digest checked.

    For example:

    $ memmcl store fetch 3f9a1c ./adapter
    """
    opened = open_store_of(settings_of(store, config))
    manifest = _find(opened, key)
    fetched = opened.fetch(manifest, directory)
    console.print(str(fetched), soft_wrap=True)
    output.answer({"kind": manifest.kind, "key": manifest.key, "directory": fetched})


store_app.command("gc")(store_gc)
store_app.command("rm")(store_rm)


@store_app.command("verify", works=True)
def store_verify(
    repair: Annotated[
        str | None,
        typer.Option("--repair", metavar="RUN", help="First digits of a run's id: make again what is damaged of it"),
    ] = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> None:
    """Read every object and check every digest; exit code 1 if anything is damaged.

    What is damaged counts as absent: the next `memmcl run` of its run makes it again. So does --repair, which needs
    the run's rows and base model, but neither its file nor its options.

    For example:

    $ memmcl store verify --store s3://bucket/folder
    $ memmcl store verify --repair 3f9a
    """
    asked = settings_of(store, config)
    opened = open_store_of(asked)
    if repair is not None:
        _repair(opened, repair, asked)
        return
    checked = opened.verify()
    _show(checked.problems)
    console.print(
        f"{checked.manifests} artifacts, {checked.blobs} blobs, {checked.bytes:,} bytes, {checked.records} records, "
        f"{checked.pointers} pointers, {checked.checkpoints} checkpoints, {len(checked.problems)} problems",
        soft_wrap=True,
    )
    output.answer(checked)
    if checked.unsealed:
        console.print(f"{checked.unsealed} objects of earlier versions hold no digest of their own")
    raise typer.Exit(1 if checked.problems else 0)


def _repair(store: Store, run_id: str, asked: RunConfig) -> None:
    """Make again what is damaged of a run."""
    from flows.cli.run import continue_run
    from tasks.run.journal import read_journal
    from tasks.run.repair import clear_damage, damage_of

    journal = read_journal(store, run_id)
    _show(damage_of(store, journal.run_id))
    for path in clear_damage(store, journal):
        console.print(f"{path}: damaged, removed", soft_wrap=True)
    continue_run(journal, asked)
    console.print(f"run {journal.run_id[:8]} is whole")


def _show(problems: Sequence[Problem]) -> None:
    for problem in problems:
        console.print(Text.assemble((clean(problem.where), "red"), ": ", clean(problem.what)), soft_wrap=True)


def _find(store: Store, key: str) -> Manifest:
    from memmcl.store import ArtifactRef, starting

    fitting = starting(store, key)
    if len(fitting) != 1:
        what = f"{len(fitting)} artifacts have" if fitting else "no artifact has"
        raise UsageError(f"{what} a key that starts with {shown(key)} in {store.url}; `memmcl store ls` lists them")
    ((kind, whole),) = fitting
    return store.load(ArtifactRef(kind=kind, key=whole, name=kind))
