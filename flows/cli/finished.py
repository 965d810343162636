"""A finished run: how it is found, what it says, where its report and its models are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.terminal import console, output
from memmcl.errors import ArtifactNotFound, CorruptArtifact, UsageError, shown

if TYPE_CHECKING:
    from memmcl.store import ArtifactRef, Champions, Manifest, Reign, Store

CHAMPION = "champion"
"""What `--run` takes in place of an id."""


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


def show_run(store: Store, done: Manifest, out: Path | None, **more: Any) -> None:
    """Print the results table, which model to ship, and where everything is; copy report and model to `out`.

    more: of the JSON document that takes the place of it.

    Raises:
        CorruptArtifact: something of the run is damaged; the message says how it is made again.
    """
    with mendable(store, done.key):
        from memmcl.report import advice, parse_results, results_table, verdict

        results = parse_results(json.loads(store.read(done, "results.json")))
        if out is None and store.url.startswith("file://"):
            out = Path("memmcl-runs") / done.key[:8]
        files = {} if out is None else _copy(store, done, out)
    said = advice(results)
    console.print(results_table(results, width=max(80, console.width)))
    console.print(said.text)
    for what, text in _ways_on(store, done, files, said.model):
        console.print(f"{what:<14} {text}", soft_wrap=True)
    output.answer(
        {
            "run": done.key,
            "name": done.name,
            **more,
            "store": store.url,
            "files": files,
            "ship": said,
            "verdict": verdict(results),
            "results": results,
        }
    )


def _copy(store: Store, done: Manifest, out: Path) -> dict[str, str]:
    """Copy report and models to a folder; return what lies where."""
    from memmcl.store.objects import write_file

    store.fetch(done, out)
    files = {"report": str(out / "report.html")}
    for kind, name in (("unified", "adapter"), ("model", "model")):
        for ref in _refs(done, kind):
            store.fetch(ref, out / name)
            write_file(out / name / "README.md", store.read(done, f"{name}.md"))
            files[name] = str(out / name)
    return files


def _ways_on(store: Store, done: Manifest, files: dict[str, str], ship: str) -> Iterator[tuple[str, str]]:
    """Yield what can be done with a run: (what, command or place)."""
    run_id = done.key[:8]
    usual = store.url == Path("memmcl-store").absolute().as_uri()
    where = "" if usual else f" --store {shlex.quote(store.url)}"
    if files:
        yield "unified model", files["adapter"]
    if "model" in files:
        yield "whole model", files["model"]
    joint = next((ref for ref in _refs(done, "expert") if ref.name == "joint LoRA"), None)
    if ship == "joint" and joint is not None:
        yield "joint LoRA", f"memmcl store fetch {joint.key[:12]} joint-lora{where}"
    yield "report", files["report"] if files else f"memmcl report {run_id}{where} --out DIR"
    yield "predict", f'memmcl predict "The food was great." --run {run_id}{where}'
    if "model" not in files:
        yield "export", "the same command with --set export=full writes whole weights, too"
    yield "run history", f"memmcl ui  (flow run {done.metrics.get('flow_run_id')})"


def _refs(done: Manifest, kind: str) -> list[ArtifactRef]:
    return [ref for ref in done.inputs if ref.kind == kind]
