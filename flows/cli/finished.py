"""A finished run: how it is found, what it says, where its report and its models are."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.terminal import console, output

if TYPE_CHECKING:
    from memmcl.store import ArtifactRef, Manifest, Store


def show_run(store: Store, done: Manifest, out: Path | None, **more: Any) -> None:
    """Print the results table, which model to ship, and where everything is; copy report and model to `out`.

    more: of the JSON document that takes the place of it.

    Raises:
        CorruptArtifact: something of the run is damaged; the message says how it is made again.
    """
    from memmcl.api.runs import repairable

    with repairable(store, done.key):
        from memmcl.report import advice, parse_results, results_table, verdict

        results = parse_results(json.loads(store.read(done, "results.json")))
        if out is None and store.url.startswith("file://"):
            out = Path("memmcl-runs") / done.key[:8]
        files = {} if out is None else _save(store, done, out)
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


def _save(store: Store, done: Manifest, folder: Path) -> dict[str, str]:
    """Write report and models into a folder; return what is where."""
    from memmcl.api.runs import ADAPTER, WHOLE, FinishedRun

    FinishedRun(store, done).save(folder)
    places = {"report": folder / "report.html", ADAPTER: folder / ADAPTER, WHOLE: folder / WHOLE}
    return {name: str(place) for name, place in places.items() if name != WHOLE or _refs(done, WHOLE)}


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
