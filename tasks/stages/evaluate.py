"""Scores: every model on test rows, and every expert alone on the first of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from prefect import State
from pydantic import BaseModel, ConfigDict

from memmcl.backbone.resident import resident
from memmcl.evaluate import bootstrap
from memmcl.evaluate.asking import make_probe, offsets_of
from memmcl.evaluate.scoring import Probe
from memmcl.merge.build import Merger
from memmcl.merge.genome import LINEAR, Coefficients, Recipe
from memmcl.store import ArtifactRef
from memmcl.suite import metrics, parsing
from memmcl.suite.examples import Example
from memmcl.suite.subtasks import Subtask
from tasks.run.runtime import Run, load_adapter, log, open_store, read_rows, reuse_or_make, stage_task
from tasks.stages.contexts import context_answers, context_key

EVALUATION_VERSION = 4
INTERFERENCE = "interference"
Answers = dict[str, list[str]]
"""By model, one answer a row."""
Tables = dict[str, dict[str, tuple[float, ...]]]
"""By model, the coefficients of adapters, one a block."""


class Contestants(BaseModel):
    """Who is put to a subtask's rows: models to all test rows, the base and every expert alone to the first of them."""

    model_config = ConfigDict(frozen=True)

    models: Tables
    alone: Tables
    adapters: dict[str, ArtifactRef]
    recipes: dict[str, Recipe] = {}
    """How models merge that do not merge linearly."""
    pinned: tuple[str, ...] = ()
    """Adapters that every merge adds as they are."""


@stage_task("evaluate", run_name="evaluate {subtask}", retries=1)
def evaluate_subtask(
    run: Run,
    subtask: str,
    contestants: Contestants,
    unified: ArtifactRef,
    gate: ArtifactRef,
    weak: ArtifactRef,
    test: ArtifactRef,
    train: Mapping[str, ArtifactRef],
    order: Sequence[str],
) -> State[ArtifactRef]:
    """Put every model, and the unified model in every context, to the subtask's test rows."""
    models, alone, adapters = contestants.models, contestants.alone, contestants.adapters
    few = run.config.evaluation.interference_rows

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked = run.subtask(subtask)
        rows = read_rows(run, test)
        answers, by_expert = _model_answers(run, asked, rows, read_rows(run, weak), contestants, rows[:few])
        constant, _ = metrics.best_constant(asked, read_rows(run, train[subtask]), rows)
        answers["constant"] = [constant] * len(rows)
        gated = json.loads(open_store(run).read(gate, "gate.json"))
        answers |= context_answers(run, asked, rows, unified, gated, train, order)
        scores = {name: score_answers(run, asked, rows, given) for name, given in answers.items()}
        for name in models:
            log().info("%s on %s: %.3f", name, subtask, scores[name]["score"])
        by_score = {name: score_answers(run, asked, rows[:few], given) for name, given in by_expert.items()}
        kept = {name: {key: found[key] for key in ("score", "se", "n")} for name, found in by_score.items()}
        document = json.dumps({**scores, INTERFERENCE: kept}).encode()
        return {"scores.json": document, "predictions.parquet": _table(rows, answers)}, {}

    return reuse_or_make(
        run,
        "evaluation",
        name=f"evaluation {subtask}",
        inputs=[
            *(adapters[name] for name in sorted(adapters)),
            unified,
            gate,
            weak,
            test,
            *(train[name] for name in order),
        ],
        config={
            "subtask": subtask,
            "adapters": sorted(adapters),
            "models": _plain(models),
            "recipes": {name: asdict(recipe) for name, recipe in contestants.recipes.items()},
            "alone": _plain(alone) if few else {},
            "interference_rows": few,
            "bootstrap_samples": run.config.evaluation.bootstrap_samples,
            "order": list(order),
            **context_key(run),
        },
        stage_version=EVALUATION_VERSION,
        make=make,
    )


def _model_answers(
    run: Run,
    subtask: Subtask,
    rows: Sequence[Example],
    weak: Sequence[Example],
    contestants: Contestants,
    first: Sequence[Example],
) -> tuple[Answers, Answers]:
    """Return every model's answers to all rows, and those of who is alone to the first rows, where there are any.

    Label scores are calibrated on the weak rows where the run says so. Who is both is asked once.
    """
    backbone, prompter = resident(run.model)
    model, cfg = (backbone, prompter), run.config.evaluation
    probe, weak_probe = (make_probe(cfg, model, subtask, part) for part in (rows, weak))
    loaded = {name: load_adapter(run, ref) for name, ref in contestants.adapters.items()}
    merger = Merger(backbone, loaded, blocks=run.config.search.blocks, pinned=contestants.pinned)
    answers: Answers = {}
    alone: Answers = {}

    def ask(coefficients: Coefficients, asked: Probe, recipe: Recipe = LINEAR) -> list[str]:
        merger.apply(coefficients, recipe)
        return asked.answers(offsets_of(run.config.evaluation, weak_probe))

    try:
        for name, table in contestants.models.items():
            answers[name] = ask(table, probe, contestants.recipes.get(name, LINEAR))
        if first:
            few = make_probe(cfg, model, subtask, first)
            for name, table in contestants.alone.items():
                linear = {other: it for other, it in contestants.models.items() if other not in contestants.recipes}
                same = next((other for other, theirs in linear.items() if theirs == table), None)
                alone[name] = answers[same][: len(first)] if same is not None else ask(table, few)
    finally:
        merger.reset()
    return answers, alone


def score_answers(run: Run, subtask: Subtask, rows: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    """Return the score of one model: strict as published, tolerant beside it, counts for paired comparisons."""
    tolerant, rejected = parsing.read_answers(subtask, answers)
    counts = metrics.row_counts(subtask, rows, tolerant)
    score = partial(metrics.score_from_counts, subtask, metrics.datasets_of(rows))
    seed = run.seed("bootstrap", subtask.name)
    samples = run.config.evaluation.bootstrap_samples
    labels = [] if subtask.is_tuple else [str(row.gold) for row in rows]
    return {
        "score": float(score(counts.sum(axis=0))),
        "se": bootstrap.standard_error(counts, score, samples=samples, seed=seed),
        "n": len(rows),
        "strict_score": metrics.score_subtask(subtask, rows, answers) if subtask.is_tuple else None,
        "balanced_accuracy": metrics.balanced_accuracy(labels, tolerant) if labels else None,
        "rejected": rejected,
        "counts": counts.tolist(),
    }


def _plain(tables: Tables) -> dict[str, dict[str, list[float]]]:
    return {name: {part: list(row) for part, row in table.items()} for name, table in tables.items()}


def _table(rows: Sequence[Example], answers: Mapping[str, Sequence[str]]) -> bytes:
    """Return the predictions as Parquet: id, text, gold, and a column per model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[str]] = {
        "id": [row.id for row in rows],
        "text": [row.text for row in rows],
        "gold": [row.answer for row in rows],
        **{name: list(given) for name, given in answers.items()},
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()
