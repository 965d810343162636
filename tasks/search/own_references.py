"""What weak rows that a user brings are held to: measured once, in a process of its own, and kept in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from memmcl.errors import MemmclError, ModelError, SearchError
from memmcl.merge.build import Merger
from memmcl.store import ArtifactRef, cache_key
from memmcl.suite.subtasks import Subtask
from tasks.run.models import make_probe, weak_answers
from tasks.run.runtime import Run, load_adapter, open_store, read_rows, resident
from tasks.stages.references import (
    DOCUMENT,
    WEAK,
    Values,
    brief_of,
    expectations,
    gold_answers,
    reference_config,
    values_of,
)

REFERENCE_VERSION = 3
BASE = "base"
"""The plain base among the models that rows may be held to."""
NO_LABELS: Values = {"loglik": None, "choice": None, "score": None, "logprobs": [], "choices": None}
Refs = Mapping[str, ArtifactRef]
HeldTo = Mapping[str, Sequence[str]]
"""By name of the rows, the models of which the best is the unit of retention."""
Measured = dict[str, tuple[dict[str, Any], dict[str, bytes]]]
"""By name of the rows, the document and the files beside it."""


class OwnRun(Run):
    """What workers need to know of a search that belongs to no pipeline. asked: by name of the rows, the subtask."""

    asked: dict[str, Subtask]

    def subtask(self, name: str) -> Subtask:
        """Return what the rows of this name are asked."""
        return self.asked[name]


def reference_ref(run: OwnRun, name: str, models: Sequence[str], experts: Refs, weak: ArtifactRef) -> ArtifactRef:
    """Return the reference under which what these models reach on the rows is published, whether it is or not."""
    inputs = _inputs(models, experts, weak)
    key = cache_key("reference", inputs=inputs, config=_config(run, models), stage_version=REFERENCE_VERSION, seed=0)
    return ArtifactRef(kind="reference", key=key, name=f"reference {name}")


def _config(run: OwnRun, models: Sequence[str]) -> dict[str, Any]:
    return {"brought": list(models), **reference_config(run)}


def measure_references(run: OwnRun, held_to: HeldTo, references: Refs, experts: Refs, weak: Refs) -> None:
    """Measure and publish those that are not in the store.

    Raises:
        ModelError, SearchError: the base or an adapter cannot be used; the worker was lost again and again.
    """
    store = open_store(run)
    missing = {name: held_to[name] for name, ref in references.items() if store.find(ref.kind, ref.key) is None}
    if not missing:
        return
    found = _measured_elsewhere(run, missing, experts, weak)
    if isinstance(found, str):
        raise ModelError(found)
    for name, (values, files) in found.items():
        ref = references[name]
        store.publish(
            ref.kind, ref.key, name=ref.name, files={DOCUMENT: json.dumps(values).encode(), **files},
            inputs=_inputs(held_to[name], experts, weak[name]), config=_config(run, held_to[name]),
            stage_version=REFERENCE_VERSION, metrics={"held_to": values["held_to"], "measured": values["measured"]},
        )  # fmt: skip


def _inputs(models: Sequence[str], experts: Refs, weak: ArtifactRef) -> list[ArtifactRef]:
    return [*(experts[model] for model in models if model != BASE), weak]


def _measured_elsewhere(run: OwnRun, held_to: HeldTo, experts: Refs, weak: Refs) -> Measured | str:
    cfg = run.config.ray
    worker = _Worker.options(num_cpus=cfg.cpus_per_worker, num_gpus=cfg.gpus_per_worker).remote()
    try:
        found: Measured | str = ray.get(worker.measure.remote(run, held_to, experts, weak))
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        first = str(error).strip().splitlines()[0]
        raise SearchError(
            f"the worker that measures what rows are held to was lost ({first}); look for memory limits in the Ray "
            "log, then run the same command again"
        ) from error
    finally:
        ray.kill(worker)
    return found


@ray.remote(max_restarts=2, max_task_retries=2)
class _Worker:
    """A process that is ended by force: the model that it holds leaves with it."""

    def measure(self, *given: Any) -> Measured | str:
        return _measure(*given)


def _measure(run: OwnRun, held_to: HeldTo, experts: Refs, weak: Refs) -> Measured | str:
    """Return, by name of the rows, the values of the best of the models that they are held to; or what is wrong.

    Rows without labels, held to what their one expert expects, have neither likelihood nor score.
    """
    kinds = run.config.search.weights
    try:
        backbone, prompter = resident(run)
        merger = Merger(backbone, {name: load_adapter(run, ref) for name, ref in experts.items()}, 1)
        rows = {name: read_rows(run, weak[name]) for name in held_to}
        probes = {name: make_probe(run, backbone, prompter, run.subtask(name), rows[name]) for name in held_to}
        labelled = held_to if run.config.search.labelled else ()
        golds = {name: gold_answers(backbone, prompter, run.subtask(name), rows[name]) for name in labelled}
        values: dict[str, dict[str, Any]] = {name: {} for name in held_to}
        files: dict[str, dict[str, bytes]] = {name: {} for name in held_to}
        for model in sorted({BASE, *(model for models in held_to.values() for model in models)}):
            merger.apply({} if model == BASE else {model: (1.0,)})
            for name, models in held_to.items():
                if model in (BASE, *models):
                    who = "the base" if model == BASE else f"expert {model}"
                    if labelled:
                        values[name][model] = values_of(run, probes[name], golds[name], rows[name], who)
                    else:
                        values[name][model] = {**NO_LABELS, "answers": weak_answers(run, probes[name])}
                    if "agree" in kinds and model != BASE:
                        answers = {WEAK: (rows[name], values[name][model]["answers"])}
                        files[name] = expectations(backbone, prompter, run.subtask(name), answers)
        merger.reset()
    except MemmclError as error:
        return str(error)
    unit = "score" if run.config.search.fitness == "metric" else run.config.search.fitness
    found: Measured = {}
    for name, measured in values.items():
        models = held_to[name]
        best = models[0] if len(models) == 1 else max(models, key=lambda model: (measured[model][unit], model))
        document = {
            "base": measured[BASE], "expert": measured[best], "held_to": best,
            "measured": {model: brief_of(measured[model]) for model in models},
        }  # fmt: skip
        found[name] = document, files[name]
    return found
