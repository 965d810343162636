"""Contexts: the demonstrations a subtask is asked with, and the gate that picks one of them on weak rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

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
from tasks.run.runtime import Run, log, read_rows, reuse_or_make, worth_retrying

GATE_VERSION = 3


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
                    measured.append(
                        {
                            "context": context.kind,
                            "calibrated": calibrated,
                            "weak_score": value,
                            "offsets": offsets,
                            "tokens": context.tokens,
                            "demonstrations": len(context.demonstrations),
                        }
                    )
        calibrated = cfg.evaluation.calibration and not asked.is_tuple
        chosen = choose(options, margin=cfg.curriculum.gate_margin, calibrated=calibrated)
        for entry in measured:
            entry["chosen"] = (entry["context"], entry["calibrated"]) == (chosen.kind, chosen.calibrated)
        log().info("%s: context %s%s", subtask, chosen.kind, ", calibrated" if chosen.calibrated else "")
        return {"gate.json": json.dumps(measured).encode()}, {"context": chosen.kind, "calibrated": chosen.calibrated}

    return reuse_or_make(
        run,
        "gate",
        name=f"context gate {subtask}",
        inputs=[unified, weak, *(train[name] for name in order)],
        config={"subtask": subtask, "order": list(order), **context_key(run)},
        stage_version=GATE_VERSION,
        make=make,
    )


def contexts_of(
    run: Run, subtask: Subtask, prompter: Prompter, train: Mapping[str, ArtifactRef], order: Sequence[str]
) -> list[Context]:
    """Return the run's contexts of one subtask; demonstrations are train rows."""
    cfg = run.config.curriculum
    shown, known = {name: read_rows(run, train[name]) for name in order}, catalogue(run.config)
    return [context_of(kind, cfg, known, subtask, prompter, shown, order, run.config.seed) for kind in cfg.contexts]


def context_probe(
    run: Run, backbone: Backbone, prompter: Prompter, subtask: Subtask, rows: Sequence[Example], context: Context
) -> Probe:
    """Return the rows behind the demonstrations of a context."""
    shots = [(run.subtask(name), row) for name, row in context.demonstrations]
    return make_probe(run.config.evaluation, (backbone, prompter), subtask, rows, shots)


def context_answers(
    run: Run,
    subtask: Subtask,
    rows: Sequence[Example],
    unified: ArtifactRef,
    gated: Sequence[Mapping[str, Any]],
    train: Mapping[str, ArtifactRef],
    order: Sequence[str],
) -> dict[str, list[str]]:
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
    run: Run,
    subtask: Subtask,
    rows: Sequence[Example],
    unified: ArtifactRef,
    gated: Sequence[Mapping[str, Any]],
    train: Mapping[str, ArtifactRef],
    order: Sequence[str],
) -> list[str]:
    """Return the unified model's answers in the context that the gate chose."""
    chosen = [entry for entry in gated if entry["chosen"]]
    return context_answers(run, subtask, rows, unified, chosen, train, order)["gated"]


def context_key(run: Run) -> dict[str, Any]:
    """Return what contexts and their scores read of the configuration."""
    return {
        "curriculum": run.config.curriculum.model_dump(mode="json", exclude={"weights"}),
        "evaluation": run.config.evaluation.model_dump(
            mode="json", include={"batch_size", "max_new_tokens", "calibration"}
        ),
        "model": run.model.key(),
    }


def _answers(probe: Probe, subtask: Subtask, calibrate: bool) -> Iterator[tuple[bool, list[str], list[float] | None]]:
    """Yield (calibrated, answers, offsets): plain, and for labels less their median over these rows."""
    if subtask.is_tuple:
        yield False, probe.answers(), None
        return
    scores = probe.label_scores()
    yield False, _best(subtask, scores), None
    if calibrate:
        offsets = calibration.fit(scores)
        yield True, _best(subtask, calibration.apply(scores, offsets)), [float(value) for value in offsets]


def _best(subtask: Subtask, scores: np.ndarray) -> list[str]:
    return [subtask.labels[index] for index in scores.argmax(axis=1)]
