"""`memmcl data fetch`: bring a published benchmark to where a run reads it."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.common import ConfigFile, settings_of
from flows.terminal import console, notes, output
from memmcl.errors import UsageError, shown

KNOWN = ("sentieval",)


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which benchmark: sentieval")],
    to: Annotated[
        str, typer.Option(metavar="URL", help="Directory or s3://bucket/folder; what differs there is replaced")
    ],
    from_: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="A mirror of the repository; without it, GitHub")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="How many files at a time")] = 8,
    config: ConfigFile = None,
) -> None:
    """Download a published benchmark, every digest checked; called again, it goes on where it was.

    Of --config the endpoint and the region for s3:// are used; credentials come from the environment.

    For example:

    $ memmcl data fetch sentieval --to sentieval
    $ memmcl data fetch sentieval --to s3://bucket/sentieval --config my.yaml
    """
    if name not in KNOWN:
        raise UsageError(f"no benchmark is called {shown(name)}; there is {', '.join(KNOWN)}")
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from memmcl.suite.configured import reading_of
    from memmcl.suite.fetch import fetch_sentieval, sentieval_listing

    listing = sentieval_listing()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(f"0 of {len(listing.files)} files", total=listing.size)

        def show(files: int, size: int, path: str) -> None:
            bar.update(task, completed=size, description=f"{files} of {len(listing.files)} files")

        storage = reading_of(settings_of(None, config)).storage
        fetched = fetch_sentieval(to, base_url=from_, jobs=jobs, storage=storage, progress=show)
    console.print(
        f"{fetched.files} files, {fetched.size:,} bytes ({fetched.present} files were there already) in "
        f"{fetched.target}",
        soft_wrap=True,
    )
    console.print(fetched.notice, soft_wrap=True)
    console.print(f"use it with    data.source: {fetched.target}", soft_wrap=True)
    output.answer(fetched)
