"""`memmcl predict`: one text, answered in every subtask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import ConfigFile, StoreUrl, open_store_of, quiet_environment, settings_of
from flows.cli.screen import log_output
from flows.terminal import console, notes, output, table
from memmcl.api.runs import LATEST, FinishedRun, find_run
from memmcl.errors import UsageError

if TYPE_CHECKING:
    from memmcl.api.model import Prediction


def predict(
    text: Annotated[str, typer.Argument(help="The text to analyse")],
    aspect: Annotated[
        list[str] | None,
        typer.Option(help="Ask about this aspect; may be repeated. Without it, about those found in the text"),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Target of a stance; twice for the two things that are compared")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run", help="First digits of a run's id, or champion; the latest run by default")
    ] = None,
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
    quiet_environment()
    with log_output(), notes.status("loading the unified model"):
        run = FinishedRun(opened, find_run(opened, run_id or LATEST, settings.promotion.champion))
        from memmcl.api.model import model_of

        model = model_of(run)
        predictions = model.predict(text, aspects=aspect or [], targets=target or [])
    rows = [(model.subtasks[one.subtask].title, *_answer(one)) for one in predictions]
    console.print(table("subtask", "about", "answer", "confidence", rows=rows))
    output.answer({"run": run.id, "predictions": predictions})


def _answer(one: Prediction) -> tuple[str, str, str]:
    """Return what a prediction is about, the answer, and how sure the model is of it."""
    if one.missing == ("aspect",):
        return "", "(no aspect found; name one with --aspect)", ""
    if one.missing:
        return "", f"(needs {', '.join(one.missing)}; give --target {len(one.missing)} times)", ""
    about = ", ".join(one.about.values()) or "the text"
    if one.label is not None:
        return about, one.label, f"{one.probability:.2f}"
    return about, f"{'' if one.tuples is not None else 'unreadable: '}{one.text}", ""
