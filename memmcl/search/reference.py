"""References: what one model reaches on the rows of a subtask, as the unit that candidates are measured in.

For a user's rows: the best of the models that they name, or of base and all experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.torch import save as save_tensors

from memmcl.backbone.forward import Backbone
from memmcl.backbone.resident import resident
from memmcl.config import EvaluationConfig, SearchConfig
from memmcl.errors import MemmclError, ModelError
from memmcl.evaluate.asking import make_probe, weak_answers
from memmcl.evaluate.scoring import Probe
from memmcl.evaluate.teacher_forced import TeacherForced
from memmcl.merge.build import Merger
from memmcl.search.course import Driver
from memmcl.search.document import ReferenceValues
from memmcl.search.problem import DISTRIBUTIONS, REFERENCE, WEAK, SearchProblem
from memmcl.store import StageSettings
from memmcl.suite import metrics
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask

REFERENCE_VERSION = 3
BASE = "base"
"""The plain base among the models that rows may be measured in."""
Rivals = Mapping[str, Sequence[str]]
"""By name of the rows, the models of which the best is the reference: its score counts as 1."""
Measured = dict[str, tuple[dict[str, Any], dict[str, bytes]]]
"""By name of the rows, the reference document and the files stored with it."""


def reference_key(search: SearchConfig, evaluation: EvaluationConfig, model: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings that decide a reference; `model` is `ModelSpec.key()`."""
    return {"evaluation": evaluation.key(), "fitness": sorted(search.weights), "model": model}


def gold_answers(model: tuple[Backbone, Prompter], subtask: Subtask, rows: Sequence[Example]) -> TeacherForced:
    """Return the rows' teacher-forced gold answers, batched as for candidates, since other batches round otherwise."""
    return TeacherForced(*model, subtask, rows, [row.answer for row in rows])


def values_of(
    search: SearchConfig,
    evaluation: EvaluationConfig,
    probe: Probe,
    golds: TeacherForced,
    rows: Sequence[Example],
    model: str,
) -> ReferenceValues:
    """Return what the current weights, those of `model`, reach on rows.

    The metric of generated answers is computed only where the fitness needs it, since decoding is slow.

    Raises:
        ModelError: a likelihood that is not finite.
    """
    kinds = search.weights
    (forced,) = golds.segments()
    bad = int((~np.isfinite(forced.logprobs)).sum())
    if bad:
        raise ModelError(
            f"{model}: the likelihoods of {bad} of {len(rows)} rows of {probe.subtask.name} are not finite; look "
            "whether its weights are, or take a model.dtype of a larger range (bfloat16, float32)"
        )
    wanted = not probe.subtask.is_tuple or "metric" in kinds or "agree" in kinds
    answers = weak_answers(evaluation, probe) if wanted else []
    loglik = float(forced.logprobs.sum() / forced.tokens.sum())
    shares = forced.choices.logshares(evaluation.calibration) if forced.choices else None
    return ReferenceValues(
        loglik=loglik,
        choice=loglik if shares is None else float(shares.mean()),
        score=metrics.score_subtask(probe.subtask, rows, answers) if wanted else None,
        logprobs=forced.logprobs.tolist(),
        choices={name: value.tolist() for name, value in vars(forced.choices).items()} if forced.choices else None,
        answers=answers if "agree" in kinds else None,
    )


def expectations(
    model: tuple[Backbone, Prompter], subtask: Subtask, answered: Mapping[str, tuple[Sequence[Example], Sequence[str]]]
) -> dict[str, bytes]:
    """Return the file of the current weights' next-token distributions at the answers of weak and selection rows."""
    tensors = {}
    for which, (rows, answers) in answered.items():
        expected = TeacherForced(*model, subtask, rows, answers).distributions()
        tensors[f"{which}.ids"] = expected.ids.int().contiguous()
        tensors[f"{which}.logprobs"] = expected.logprobs.contiguous()
    return {DISTRIBUTIONS: save_tensors(tensors)}


def measure_references(problem: SearchProblem, rivals: Rivals, driver: Driver) -> None:
    """Measure and publish those references that are not in the store, where the driver evaluates candidates.

    Raises:
        ModelError, SearchError: the base or an adapter cannot be used; the worker was lost again and again.
    """
    store = problem.open_store()
    missing = {name: rivals[name] for name, ref in problem.references.items() if store.find(ref.kind, ref.key) is None}
    if not missing:
        return
    measured: Measured | str = driver.call(measure, problem, missing)
    if isinstance(measured, str):
        raise ModelError(measured)
    settings = reference_key(problem.search, problem.evaluation, problem.model.key())
    for name, (values, files) in measured.items():
        ref, models = problem.references[name], list(rivals[name])
        store.publish(
            ref.kind,
            ref.key,
            name=ref.name,
            files={REFERENCE: json.dumps(values).encode(), **files},
            inputs=[*(problem.experts[model] for model in models if model != BASE), problem.weak[name]],
            settings=StageSettings({"brought": models, **settings}, stage_version=REFERENCE_VERSION),
            metrics={"held_to": values["held_to"], "measured": values["measured"]},
        )


def measure(problem: SearchProblem, rivals: Rivals) -> Measured | str:
    """Return the values of the best model for the rows of each name, or the message of an error.

    Without labels there is neither likelihood nor score, only the answers of the rows' one expert.
    """
    search, evaluation = problem.search, problem.evaluation
    try:
        model = resident(problem.model)
        merger = Merger(model[0], problem.adapters(), 1)
        rows = {name: problem.read_rows(WEAK, name) or [] for name in rivals}
        asked = {name: problem.subtasks[name] for name in rivals}
        probes = {name: make_probe(evaluation, model, asked[name], rows[name]) for name in rivals}
        golds = {name: gold_answers(model, asked[name], rows[name]) for name in (rivals if search.labelled else ())}
        values: dict[str, dict[str, ReferenceValues]] = {name: {} for name in rivals}
        files: dict[str, dict[str, bytes]] = {name: {} for name in rivals}
        for rival in sorted({BASE, *(one for models in rivals.values() for one in models)}):
            merger.apply({} if rival == BASE else {rival: (1.0,)})
            for name in [name for name, models in rivals.items() if rival in (BASE, *models)]:
                if search.labelled:
                    who = "the base" if rival == BASE else f"expert {rival}"
                    reached = values_of(search, evaluation, probes[name], golds[name], rows[name], who)
                else:
                    reached = ReferenceValues(answers=weak_answers(evaluation, probes[name]))
                values[name][rival] = reached
                if "agree" in search.weights and rival != BASE:
                    files[name] = expectations(model, asked[name], {WEAK: (rows[name], reached.answers or ())})
        merger.reset()
    except MemmclError as error:
        return str(error)
    unit = "score" if search.fitness == "metric" else search.fitness
    return {name: (_document(values[name], rivals[name], unit), files[name]) for name in rivals}


def _document(values: Mapping[str, ReferenceValues], models: Sequence[str], unit: str) -> dict[str, Any]:
    best = models[0] if len(models) == 1 else max(models, key=lambda model: (getattr(values[model], unit), model))
    return {
        "base": values[BASE].model_dump(mode="json"),
        "expert": values[best].model_dump(mode="json"),
        "held_to": best,
        "measured": {model: values[model].brief for model in models},
    }
