"""A finished run: how it is found, what it says, where its report and its models are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.terminal import console, output

if TYPE_CHECKING:
    from memmcl.store import Manifest, Store


def show_run(store: Store, done: Manifest, out: Path | None, **more: Any) -> None:
    """Print the results table, which model to ship, and where everything is; copy report and model to `out`.

    more: of the JSON document that takes the place of it.

    Raises:
        CorruptArtifact: something of the run is damaged; the message says how it is made again.
    """
    from memmcl.api.runs import ADAPTER, WHOLE, FinishedRun, repairable

    with repairable(store, done.key):
        from memmcl.report import advice, results_table, verdict

        run = FinishedRun(store, done)
        results = run.results
        if out is None and store.url.startswith("file://"):
            out = Path("memmcl-runs") / done.key[:8]
        files = {}
        if out is not None:
            run.save(out)
            files = {"report": str(out / "report.html"), ADAPTER: str(out / ADAPTER)}
            files |= {WHOLE: str(out / WHOLE)} if any(ref.kind == WHOLE for ref in done.inputs) else {}
    said = advice(results)
    console.print(results_table(results, width=max(80, console.width)))
    console.print(said.text)
    for what, text in _ways_on(store, done, files, said.model):
        console.print(f"{what:<14} {text}", soft_wrap=True)
    facts = {"run": done.key, "name": done.name, **more, "store": store.url, "files": files}
    output.answer({**facts, "ship": said, "verdict": verdict(results), "results": results})


def _ways_on(store: Store, done: Manifest, files: dict[str, str], ship: str) -> Iterator[tuple[str, str]]:
    """Yield what can be done with a run: (what, command or place)."""
    run_id = done.key[:8]
    usual = store.url == Path("memmcl-store").absolute().as_uri()
    where = "" if usual else f" --store {shlex.quote(store.url)}"
    if files:
        yield "unified model", files["adapter"]
    if "model" in files:
        yield "whole model", files["model"]
    for ref in done.inputs:
        if ship == "joint" and (ref.kind, ref.name) == ("expert", "joint LoRA"):
            yield "joint LoRA", f"memmcl store fetch {ref.key[:12]} joint-lora{where}"
    yield "report", files["report"] if files else f"memmcl report {run_id}{where} --out DIR"
    yield "predict", f'memmcl predict "The food was great." --run {run_id}{where}'
    if "model" not in files:
        yield "export", "the same command with --set export=full writes whole weights, too"
    yield "run history", f"memmcl ui  (flow run {done.metrics.get('flow_run_id')})"
