"""Contexts: the demonstrations a subtask is asked with, and the gate that picks one of them on weak rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from prefect import State
from pydantic import BaseModel

from memmcl.backbone.forward import Backbone
from memmcl.curriculum.context import Context, context_of
from memmcl.curriculum.gate import Option, choose
from memmcl.evaluate import bootstrap, calibration
from memmcl.evaluate.asking import make_probe
from memmcl.evaluate.scoring import Probe
from memmcl.store import ArtifactRef
from memmcl.suite import metrics
from memmcl.suite.configured import catalogue
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask
from tasks.run.models import adapted_model
from tasks.run.runtime import Run, open_store, read_rows, reuse_or_make, stage_task
from tasks.ui.logs import log

GATE_VERSION = 3


class ContextualModel(BaseModel, frozen=True):
    """The unified model, and the rows that its contexts are built from.

    train: the subtasks' training rows, for demonstrations. order: of the curriculum, the easiest subtask first.
    """

    unified: ArtifactRef
    train: dict[str, ArtifactRef]
    order: tuple[str, ...]

    @property
    def rows(self) -> list[ArtifactRef]:
        """The training rows, in the curriculum's order."""
        return [self.train[name] for name in self.order]


@stage_task("context gate", run_name="context gate {subtask}", retries=1)
def gate_contexts(run: Run, subtask: str, model: ContextualModel, weak: ArtifactRef) -> State[ArtifactRef]:
    """Choose the context in which the unified model is asked a subtask, on weak rows alone."""

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        entries, options = _measure(run, run.subtask(subtask), read_rows(run, weak), model)
        calibrated = run.config.evaluation.calibration and not run.subtask(subtask).is_tuple
        chosen = choose(options, margin=run.config.curriculum.gate_margin, calibrated=calibrated)
        for entry in entries:
            entry["chosen"] = (entry["context"], entry["calibrated"]) == (chosen.kind, chosen.calibrated)
        log().info("%s: context %s%s", subtask, chosen.kind, ", calibrated" if chosen.calibrated else "")
        return {"gate.json": json.dumps(entries).encode()}, {"context": chosen.kind, "calibrated": chosen.calibrated}

    return reuse_or_make(
        run,
        "gate",
        name=f"context gate {subtask}",
        inputs=[model.unified, weak, *model.rows],
        config={"subtask": subtask, "order": list(model.order), **context_key(run)},
        stage_version=GATE_VERSION,
        make=make,
    )


def _measure(
    run: Run, subtask: Subtask, rows: Sequence[Example], model: ContextualModel
) -> tuple[list[dict[str, Any]], list[Option]]:
    """Return the entries of every form of every context in the gate's document, and the options to choose from."""
    entries, options = [], []
    score = metrics.score_function(subtask, rows)
    with adapted_model(run, model.unified) as adapted:
        for context, probe in _probes(run, adapted, subtask, rows, model, run.config.curriculum.contexts):
            for calibrated, answers, offsets in _forms(probe, run.config.evaluation.calibration):
                counts = metrics.row_counts(subtask, rows, answers)
                value, per_row = float(score(counts.sum(axis=0))), bootstrap.row_values(counts, score)
                options.append(Option(context.kind, calibrated, value, per_row, context.tokens))
                entry = {"context": context.kind, "calibrated": calibrated, "weak_score": value, "offsets": offsets}
                entries.append({**entry, "tokens": context.tokens, "demonstrations": len(context.demonstrations)})
    return entries, options


def _probes(
    run: Run,
    adapted: tuple[Backbone, Prompter],
    subtask: Subtask,
    rows: Sequence[Example],
    model: ContextualModel,
    kinds: Collection[str],
) -> Iterator[tuple[Context, Probe]]:
    """Yield the run's contexts of these kinds, each with the rows behind its demonstrations: training rows."""
    cfg, order = run.config.curriculum, model.order
    train, known = {name: read_rows(run, model.train[name]) for name in order}, catalogue(run.config)
    for kind in filter(kinds.__contains__, cfg.contexts):
        context = context_of(kind, cfg, known, subtask, adapted[1], train, order, run.config.seed)
        shots = [(known[name], row) for name, row in context.demonstrations]
        yield context, make_probe(run.config.evaluation, adapted, subtask, rows, shots)


def read_gate(run: Run, gate: ArtifactRef) -> list[dict[str, Any]]:
    """Return the gate's document: one entry for every form of every context, one of them `chosen`."""
    entries: list[dict[str, Any]] = json.loads(open_store(run).read(gate, "gate.json"))
    return entries


def form_name(entry: Mapping[str, Any]) -> str:
    """Return what answers and scores of a form of a context are stored under; entry: of the gate's document."""
    return f"context:{entry['context']}" + (":calibrated" if entry["calibrated"] else "")


def context_answers(
    run: Run, subtask: Subtask, rows: Sequence[Example], model: ContextualModel, entries: Sequence[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """Return the unified model's answers by form of context, by `form_name`.

    entries: the forms that are wanted, of the gate's document; the answers of the one it chose are `gated` as well.
    """
    answers: dict[str, list[str]] = {}
    kinds = {entry["context"] for entry in entries}
    with adapted_model(run, model.unified) as adapted:
        for context, probe in _probes(run, adapted, subtask, rows, model, kinds):
            for form in (entry for entry in entries if entry["context"] == context.kind):
                name = form_name(form)
                answers[name] = probe.answers(None if form["offsets"] is None else np.array(form["offsets"]))
                if form["chosen"]:
                    answers["gated"] = answers[name]
    return answers


def context_key(run: Run) -> dict[str, Any]:
    """Return what contexts and their scores read of the configuration."""
    return {
        "curriculum": run.config.curriculum.model_dump(mode="json", exclude={"weights"}),
        "evaluation": run.config.evaluation.key(),
        "model": run.model.key(),
    }


def _forms(probe: Probe, calibrate: bool) -> Iterator[tuple[bool, list[str], list[float] | None]]:
    """Yield (calibrated, answers, offsets): plain, and for labels less their median over these rows."""
    if probe.subtask.is_tuple:
        yield False, probe.answers(), None
        return
    scores = probe.label_scores()
    yield False, probe.best_labels(scores), None
    if calibrate:
        offsets = calibration.fit(scores)
        yield True, probe.best_labels(scores, offsets), offsets.tolist()
