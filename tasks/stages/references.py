"""Scores of an expert and of the base on a subtask's weak and selection rows: the unit of every retention."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import State

from memmcl.backbone.resident import resident
from memmcl.evaluate.asking import make_probe
from memmcl.search.document import ReferenceValues
from memmcl.search.problem import REFERENCE, SELECTION, WEAK
from memmcl.search.reference import expectations, gold_answers, reference_key, values_of
from memmcl.store import ArtifactRef
from memmcl.suite import metrics
from memmcl.suite.examples import Example
from memmcl.suite.subtasks import Subtask
from tasks.run.models import adapted_model
from tasks.run.runtime import Run, read_rows, reuse_or_make, stage_task

REFERENCE_VERSION = 7


@stage_task("reference", run_name="reference {subtask}", retries=1)
def measure_reference(
    run: Run, subtask: str, expert: ArtifactRef, weak: ArtifactRef, train: ArtifactRef, selection: ArtifactRef | None
) -> State[ArtifactRef]:
    """Measure the expert, the base and the best constant answer on the subtask's weak rows, and on its selection rows.

    The expert is the unit of every retention; the best constant answer shows what its score is worth.
    """

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked, rows = run.subtask(subtask), read_rows(run, weak)
        by_split = {WEAK: rows} | ({SELECTION: read_rows(run, selection)} if selection else {})
        measured, files = measure_rows(run, asked, by_split, expert)
        constant, score = metrics.best_constant(asked, read_rows(run, train), rows)
        document = {**measured, "constant": {"answer": constant, "score": score}}
        brief = {name: ReferenceValues.model_validate(document[name]).brief for name in ("base", "expert")}
        return {REFERENCE: json.dumps(document).encode(), **files}, {**brief, "constant": document["constant"]}

    return reuse_or_make(
        run,
        "reference",
        name=f"reference {subtask}",
        inputs=[expert, weak, train, *([selection] if selection else [])],
        config=reference_key(run.config.search, run.config.evaluation, run.model.key()),
        stage_version=REFERENCE_VERSION,
        make=make,
    )


def measure_rows(
    run: Run, subtask: Subtask, by_split: Mapping[str, Sequence[Example]], expert: ArtifactRef
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a document, "base" and "expert" on weak rows and the same under "selection", and files, if any."""
    search, evaluation, model = run.config.search, run.config.evaluation, resident(run.model)
    probes = {split: make_probe(evaluation, model, subtask, rows) for split, rows in by_split.items()}
    golds = {split: gold_answers(model, subtask, rows) for split, rows in by_split.items()}

    def measured(title: str) -> dict[str, ReferenceValues]:
        return {
            split: values_of(search, evaluation, probes[split], golds[split], rows, title)
            for split, rows in by_split.items()
        }

    with adapted_model(run, expert):
        experts, files = measured(f"expert {subtask.name}"), {}
        if "agree" in search.weights:
            answers = {split: (rows, experts[split].answers or ()) for split, rows in by_split.items()}
            files = expectations(model, subtask, answers)
    both: dict[str, Any] = {}
    for split, base in measured("the base").items():
        both[split] = {"base": base.model_dump(mode="json"), "expert": experts[split].model_dump(mode="json")}
    return both.pop(WEAK) | both, files
