"""Scores: every model on the test rows, and every single expert on the first of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prefect import State
from pydantic import BaseModel

from memmcl.backbone.resident import resident
from memmcl.evaluate import bootstrap
from memmcl.evaluate.asking import make_probe, offsets_of
from memmcl.evaluate.scoring import Probe
from memmcl.merge.build import Merger
from memmcl.merge.genome import LINEAR, Coefficients, Recipe, with_base_adapters
from memmcl.store import ArtifactRef
from memmcl.suite import metrics, parsing
from memmcl.suite.examples import Example
from memmcl.suite.subtasks import Subtask
from tasks.run.runtime import Run, load_adapter, read_rows, reuse_or_make, stage_task
from tasks.stages.contexts import ContextualModel, context_answers, context_key, read_gate
from tasks.stages.merge import ARITHMETIC, STAGE_2, Winner
from tasks.stages.run_artifacts import TrainedArtifacts
from tasks.ui.logs import log

EVALUATION_VERSION = 4
INTERFERENCE = "interference"
Answers = dict[str, list[str]]
"""By model, one answer a row."""
Tables = dict[str, dict[str, tuple[float, ...]]]
"""By model, the coefficients of adapters, one a block."""


class EvaluatedModels(BaseModel, frozen=True):
    """The models that answer a subtask's test rows.

    interference: those that answer the first rows alone: the base, and every expert by itself.
    """

    models: Tables
    interference: Tables
    adapters: dict[str, ArtifactRef]
    recipes: dict[str, Recipe] = {}
    """How models merge that do not merge linearly."""
    base_adapters: tuple[str, ...] = ()
    """Adapters that every merge adds as they are."""


def models_to_evaluate(
    run: Run, trained: TrainedArtifacts, winners: Mapping[str, Winner], subtask: str
) -> EvaluatedModels:
    """Return the models to compare on a subtask, the warm start added to experts and merges; winners: by search."""
    blocks, start = run.config.search.blocks, trained.warm_start
    ones, names = (1.0,) * blocks, sorted(trained.experts)
    rivals: list[str] = list(run.config.search.rivals)
    tuned = {"arithmetic": ARITHMETIC, **dict(zip(rivals, rivals, strict=True)), "unified": STAGE_2}
    merges: Tables = {
        "experts": {subtask: ones},
        "uniform": {name: (1.0 / len(names),) * blocks for name in names},
        "sum": dict.fromkeys(names, ones),
        **{name: winners[search][0] for name, search in tuned.items()},
    }
    models: Tables = {"base": {}}
    models |= {name: with_base_adapters(table, start, blocks) for name, table in merges.items()}
    models |= {name: {name: ones} for name in trained.rivals}
    experts: Tables = {name: with_base_adapters({name: ones}, start, blocks) for name in names}
    recipes = {name: winners[search][1] for name, search in tuned.items()}
    return EvaluatedModels(
        models=models,
        interference={"base": {}} | experts,
        adapters=trained.experts | trained.warm_start | trained.rivals,
        recipes={name: recipe for name, recipe in recipes.items() if recipe.method != "linear"},
        base_adapters=tuple(start),
    )


@stage_task("evaluate", run_name="evaluate {subtask}", retries=1)
def evaluate_subtask(
    run: Run,
    subtask: str,
    evaluated: EvaluatedModels,
    model: ContextualModel,
    gate: ArtifactRef,
    weak: ArtifactRef,
    test: ArtifactRef,
) -> State[ArtifactRef]:
    """Score every model, and the unified model in every context, on the subtask's test rows."""
    adapters, few = evaluated.adapters, run.config.evaluation.interference_rows

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked, rows = run.subtask(subtask), read_rows(run, test)
        answers, by_expert = _model_answers(run, asked, rows, read_rows(run, weak), evaluated)
        constant, _ = metrics.best_constant(asked, read_rows(run, model.train[subtask]), rows)
        answers["constant"] = [constant] * len(rows)
        answers |= context_answers(run, asked, rows, model, read_gate(run, gate))
        scores = {name: score_answers(run, asked, rows, column) for name, column in answers.items()}
        for name in evaluated.models:
            log().info("%s on %s: %.3f", name, subtask, scores[name]["score"])
        alone = {name: score_answers(run, asked, rows[:few], column) for name, column in by_expert.items()}
        kept = {name: {key: score[key] for key in ("score", "se", "n")} for name, score in alone.items()}
        document = json.dumps({**scores, INTERFERENCE: kept}).encode()
        return {"scores.json": document, "predictions.parquet": _table(rows, answers)}, {}

    return reuse_or_make(
        run,
        "evaluation",
        name=f"evaluation {subtask}",
        inputs=[*(adapters[name] for name in sorted(adapters)), model.unified, gate, weak, test, *model.rows],
        config={
            "subtask": subtask,
            "adapters": sorted(adapters),
            "models": evaluated.models,
            "recipes": {name: asdict(recipe) for name, recipe in evaluated.recipes.items()},
            "alone": evaluated.interference if few else {},
            "interference_rows": few,
            "bootstrap_samples": run.config.evaluation.bootstrap_samples,
            "order": list(model.order),
            **context_key(run),
        },
        stage_version=EVALUATION_VERSION,
        make=make,
    )


def _model_answers(
    run: Run, subtask: Subtask, rows: Sequence[Example], weak: Sequence[Example], evaluated: EvaluatedModels
) -> tuple[Answers, Answers]:
    """Return every model's answers to all rows, and those for the table of interference to the first of them.

    Label scores are calibrated on the weak rows if so configured. A model that is in both is asked once.
    """
    model, cfg = resident(run.model), run.config.evaluation
    probe, weak_probe = (make_probe(cfg, model, subtask, examples) for examples in (rows, weak))
    loaded = {name: load_adapter(run, ref) for name, ref in evaluated.adapters.items()}
    merger = Merger(model[0], loaded, blocks=run.config.search.blocks, pinned=evaluated.base_adapters)
    answers: Answers = {}
    by_expert: Answers = {}

    def ask(coefficients: Coefficients, asked: Probe, recipe: Recipe = LINEAR) -> list[str]:
        merger.apply(coefficients, recipe)
        return asked.answers(offsets_of(cfg, weak_probe))

    try:
        for name, table in evaluated.models.items():
            answers[name] = ask(table, probe, evaluated.recipes.get(name, LINEAR))
        linear = {name: table for name, table in evaluated.models.items() if name not in evaluated.recipes}
        if few := rows[: cfg.interference_rows]:
            first = make_probe(cfg, model, subtask, few)
            for name, table in evaluated.interference.items():
                same = next((other for other, theirs in linear.items() if theirs == table), None)
                by_expert[name] = answers[same][: len(few)] if same is not None else ask(table, first)
    finally:
        merger.reset()
    return answers, by_expert


def score_answers(run: Run, subtask: Subtask, rows: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    """Return the score of one model: strict as published, tolerant beside it, counts for paired comparisons."""
    tolerant, rejected = parsing.read_answers(subtask, answers)
    counts = metrics.row_counts(subtask, rows, tolerant)
    score = metrics.score_function(subtask, rows)
    seed, samples = run.seed("bootstrap", subtask.name), run.config.evaluation.bootstrap_samples
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


def _table(rows: Sequence[Example], answers: Mapping[str, Sequence[str]]) -> bytes:
    """Return the predictions as Parquet: id, text, gold, and a column per model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": [row.id for row in rows],
        "text": [row.text for row in rows],
        "gold": [row.answer for row in rows],
        **answers,
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()
