"""References for a user's rows: the best of the models that they name, or of base and all experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from memmcl.backbone.resident import resident
from memmcl.errors import MemmclError, ModelError
from memmcl.evaluate.asking import make_probe, weak_answers
from memmcl.merge.build import Merger
from memmcl.search.course import Driver
from memmcl.search.document import ReferenceValues
from memmcl.search.problem import REFERENCE, WEAK, SearchProblem
from memmcl.search.reference import expectations, gold_answers, reference_key, values_of
from memmcl.store import StageSettings

REFERENCE_VERSION = 3
BASE = "base"
"""The plain base among the models that rows may be measured in."""
Rivals = Mapping[str, Sequence[str]]
"""By name of the rows, the models of which the best is the unit of retention."""
Measured = dict[str, tuple[dict[str, Any], dict[str, bytes]]]
"""By name of the rows, the reference document and the files stored with it."""


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
    """Return, by name of the rows, the values of the best of their models; or what is wrong.

    Rows without labels, measured in what their one expert expects, have neither likelihood nor score.
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
