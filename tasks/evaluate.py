"""Scores: contexts and their gate on weak rows, every model on test rows."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from memmcl.backbone.forward import Backbone
from memmcl.curriculum.context import Context, build_context
from memmcl.curriculum.gate import Option, choose
from memmcl.evaluate import bootstrap, calibration
from memmcl.evaluate.scoring import Probe
from memmcl.merge.build import Merger
from memmcl.store import ArtifactRef
from memmcl.suite import metrics, parsing
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Demonstration, Prompter
from memmcl.suite.subtasks import Subtask
from tasks.runtime import Run, load_adapter, log, open_store, read_rows, resident, reuse_or_make, worth_retrying

GATE_VERSION = 3
EVALUATION_VERSION = 3


@task(
    name="context gate",
    task_run_name="context gate {subtask}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=worth_retrying,
)
def gate_contexts(
    run: Run,
    subtask: str,
    unified: ArtifactRef,
    weak: ArtifactRef,
    train: Mapping[str, ArtifactRef],
    order: Sequence[str],
) -> State[ArtifactRef]:
    """Choose the subtask's context for the unified model, on weak rows alone."""
    cfg = run.config

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked = run.subtask(subtask)
        rows = read_rows(run, weak)
        options: list[Option] = []
        measured: list[dict[str, Any]] = []
        with adapted_model(run, unified) as (backbone, prompter):
            for context in contexts_of(run, asked, prompter, train, order):
                probe = context_probe(run, backbone, prompter, asked, rows, context)
                for calibrated, answers, offsets in _answers(probe, asked, cfg.evaluation.calibration):
                    counts = metrics.row_counts(asked, rows, answers)
                    score = partial(metrics.score_from_counts, asked, metrics.datasets_of(rows))
                    value = float(score(counts.sum(axis=0)))
                    options.append(
                        Option(context.kind, calibrated, value, bootstrap.row_values(counts, score), context.tokens)
                    )
                    measured.append({
                        "context": context.kind, "calibrated": calibrated, "weak_score": value, "offsets": offsets,
                        "tokens": context.tokens, "demonstrations": len(context.demonstrations),
                    })  # fmt: skip
        calibrated = cfg.evaluation.calibration and not asked.is_tuple
        chosen = choose(options, margin=cfg.curriculum.gate_margin, calibrated=calibrated)
        for entry in measured:
            entry["chosen"] = (entry["context"], entry["calibrated"]) == (chosen.kind, chosen.calibrated)
        log().info("%s: context %s%s", subtask, chosen.kind, ", calibrated" if chosen.calibrated else "")
        return {"gate.json": json.dumps(measured).encode()}, {"context": chosen.kind, "calibrated": chosen.calibrated}

    return reuse_or_make(
        run, "gate", name=f"context gate {subtask}", inputs=[unified, weak, *(train[name] for name in order)],
        config={"subtask": subtask, "order": list(order), **_context_key(run)},
        stage_version=GATE_VERSION, make=make,
    )  # fmt: skip


@task(
    name="evaluate",
    task_run_name="evaluate {subtask}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=worth_retrying,
)
def evaluate_subtask(
    run: Run,
    subtask: str,
    models: Mapping[str, Mapping[str, Sequence[float]]],
    adapters: Mapping[str, ArtifactRef],
    unified: ArtifactRef,
    gate: ArtifactRef,
    weak: ArtifactRef,
    test: ArtifactRef,
    train: Mapping[str, ArtifactRef],
    order: Sequence[str],
) -> State[ArtifactRef]:
    """Put every model, and the unified model in every context, to the subtask's test rows.

    models: coefficients per adapter of `adapters`, by the model's name.
    """

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        asked = run.subtask(subtask)
        rows = read_rows(run, test)
        answers = _model_answers(run, asked, rows, read_rows(run, weak), models, adapters)
        constant, _ = metrics.best_constant(asked, read_rows(run, train[subtask]), rows)
        answers["constant"] = [constant] * len(rows)
        gated = json.loads(open_store(run).read(gate, "gate.json"))
        answers |= _context_answers(run, asked, rows, unified, gated, train, order)
        scores = {name: score_answers(run, asked, rows, given) for name, given in answers.items()}
        for name in models:
            log().info("%s on %s: %.3f", name, subtask, scores[name]["score"])
        return {"scores.json": json.dumps(scores).encode(), "predictions.parquet": _table(rows, answers)}, {}

    return reuse_or_make(
        run, "evaluation", name=f"evaluation {subtask}",
        inputs=[
            *(adapters[name] for name in sorted(adapters)), unified, gate, weak, test, *(train[name] for name in order),
        ],
        config={
            "subtask": subtask,
            "models": {name: {part: list(row) for part, row in parts.items()} for name, parts in models.items()},
            "bootstrap_samples": run.config.evaluation.bootstrap_samples,
            "order": list(order),
            **_context_key(run),
        },
        stage_version=EVALUATION_VERSION, make=make,
    )  # fmt: skip


def make_probe(
    run: Run, backbone: Backbone, prompter: Prompter, subtask: Subtask, rows: Sequence[Example],
    demonstrations: Sequence[Demonstration] = (),
) -> Probe:  # fmt: skip
    """Return the rows as a probe, with the run's batch size and answer length."""
    cfg = run.config.evaluation
    return Probe(
        backbone, prompter, subtask, rows, demonstrations=demonstrations,
        batch_size=cfg.batch_size, max_new_tokens=cfg.max_new_tokens,
    )  # fmt: skip


def weak_values(run: Run, probe: Probe, subtask: Subtask, rows: Sequence[Example]) -> dict[str, float | None]:
    """Return what the weights of now reach on weak rows.

    loglik: mean gold log-probability per answer token; score: the metric, left out (None) for generated answers
    unless the fitness needs it, because decoding is what costs.
    """
    wanted = not subtask.is_tuple or run.config.search.fitness == "metric"
    score = metrics.score_subtask(subtask, rows, probe.answers(offsets_of(run, probe))) if wanted else None
    return {"loglik": probe.gold_logprob(), "score": score}


def offsets_of(run: Run, weak: Probe) -> np.ndarray | None:
    """Return what to take from label scores, found on weak rows; None for tuples and without calibration."""
    if weak.subtask.is_tuple or not run.config.evaluation.calibration:
        return None
    return calibration.fit(weak.label_scores(), "median")


def contexts_of(
    run: Run, subtask: Subtask, prompter: Prompter, train: Mapping[str, ArtifactRef], order: Sequence[str]
) -> list[Context]:
    """Return the run's contexts of one subtask; demonstrations are train rows."""
    cfg = run.config.curriculum
    shown = {name: read_rows(run, train[name]) for name in order}
    return [
        build_context(
            kind,
            subtask.name,
            order=order,
            demonstrations=shown,
            own_shots=cfg.own_shots,
            others_per_subtask=cfg.shots_per_subtask,
            budget_tokens=cfg.budget_tokens,
            count_tokens=lambda name, row: prompter.demonstration_tokens(run.subtask(name), row, subtask),
            seed=run.seed("context", subtask.name),
        )
        for kind in cfg.contexts
    ]


def context_probe(
    run: Run, backbone: Backbone, prompter: Prompter, subtask: Subtask, rows: Sequence[Example], context: Context
) -> Probe:
    """Return the rows behind the demonstrations of a context."""
    shots = [(run.subtask(name), row) for name, row in context.demonstrations]
    return make_probe(run, backbone, prompter, subtask, rows, shots)


@contextmanager
def adapted_model(run: Run, trained: ArtifactRef) -> Iterator[tuple[Backbone, Prompter]]:
    """Put one adapter, an expert or the unified model, into the resident backbone, and the base back at the end."""
    backbone, prompter = resident(run)
    merger = Merger(backbone, {"adapter": load_adapter(run, trained)}, blocks=1)
    try:
        merger.apply({"adapter": (1.0,)})
        yield backbone, prompter
    finally:
        merger.reset()


def _answers(probe: Probe, subtask: Subtask, calibrate: bool) -> Iterator[tuple[bool, list[str], list[float] | None]]:
    """Yield (calibrated, answers, offsets): plain, and for labels less their median over these rows."""
    if subtask.is_tuple:
        yield False, probe.answers(), None
        return
    scores = probe.label_scores()
    yield False, _best(subtask, scores), None
    if calibrate:
        offsets = calibration.fit(scores, "median")
        yield True, _best(subtask, calibration.apply(scores, offsets)), [float(value) for value in offsets]


def _best(subtask: Subtask, scores: np.ndarray) -> list[str]:
    return [subtask.labels[index] for index in scores.argmax(axis=1)]


def _model_answers(
    run: Run,
    subtask: Subtask,
    rows: Sequence[Example],
    weak: Sequence[Example],
    models: Mapping[str, Mapping[str, Sequence[float]]],
    adapters: Mapping[str, ArtifactRef],
) -> dict[str, list[str]]:
    """Return every model's answers; label scores are calibrated on the weak rows where the run says so."""
    backbone, prompter = resident(run)
    probe = make_probe(run, backbone, prompter, subtask, rows)
    weak_probe = make_probe(run, backbone, prompter, subtask, weak)
    loaded = {name: load_adapter(run, ref) for name, ref in adapters.items()}
    merger = Merger(backbone, loaded, blocks=run.config.search.blocks)
    answers: dict[str, list[str]] = {}
    try:
        for name, coefficients in models.items():
            merger.apply({part: tuple(row) for part, row in coefficients.items()})
            answers[name] = probe.answers(offsets_of(run, weak_probe))
    finally:
        merger.reset()
    return answers


def _context_answers(
    run: Run, subtask: Subtask, rows: Sequence[Example], unified: ArtifactRef, gated: Sequence[Mapping[str, Any]],
    train: Mapping[str, ArtifactRef], order: Sequence[str],
) -> dict[str, list[str]]:  # fmt: skip
    """Return the unified model's answers per context, `context:KIND`, and those of the gate's choice, `gated`.

    A context whose calibrated form did better on weak rows than its plain one is reported calibrated.
    """
    answers: dict[str, list[str]] = {}
    with adapted_model(run, unified) as (backbone, prompter):
        for context in contexts_of(run, subtask, prompter, train, order):
            forms = [entry for entry in gated if entry["context"] == context.kind]
            if not forms:
                continue
            probe = context_probe(run, backbone, prompter, subtask, rows, context)
            for form in forms:
                name = f"context:{context.kind}" + (":calibrated" if form["calibrated"] else "")
                offsets = None if form["offsets"] is None else np.array(form["offsets"])
                answers[name] = probe.answers(offsets)
                if form["chosen"]:
                    answers["gated"] = answers[name]
    return answers


def gated_answers(
    run: Run, subtask: Subtask, rows: Sequence[Example], unified: ArtifactRef, gated: Sequence[Mapping[str, Any]],
    train: Mapping[str, ArtifactRef], order: Sequence[str],
) -> list[str]:  # fmt: skip
    """Return the unified model's answers in the context that the gate chose."""
    chosen = [entry for entry in gated if entry["chosen"]]
    return _context_answers(run, subtask, rows, unified, chosen, train, order)["gated"]


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


def _context_key(run: Run) -> dict[str, Any]:
    return {
        "curriculum": run.config.curriculum.model_dump(mode="json", exclude={"weights"}),
        "evaluation": run.config.evaluation.model_dump(
            mode="json", include={"batch_size", "max_new_tokens", "calibration"}
        ),
        "model": run.model_key(),
    }


def _table(rows: Sequence[Example], answers: Mapping[str, Sequence[str]]) -> bytes:
    """Return the predictions as Parquet: id, text, gold, and a column per model."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[str]] = {
        "id": [row.id for row in rows], "text": [row.text for row in rows], "gold": [row.answer for row in rows],
        **{name: list(given) for name, given in answers.items()},
    }  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()
