"""The results document of a run, gathered from the artifacts it made."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from memmcl.curriculum.difficulty import DEFAULT_WEIGHTS, DifficultyReport, difficulties
from memmcl.curriculum.order import order_subtasks
from memmcl.evaluate import bootstrap
from memmcl.evolve.fitness import nai
from memmcl.report import Results
from memmcl.store import ArtifactRef, Manifest
from memmcl.suite import metrics
from memmcl.suite.examples import Example
from tasks.data import SplitRefs
from tasks.experts import JOINT
from tasks.history import root_flow_run_id
from tasks.merge import ARITHMETIC, STAGE_2, coefficients_of, read_search
from tasks.runtime import Run, load_manifest, open_store, read_rows, resident_prompter

PACKAGES = ("memmcl", "torch", "transformers", "peft", "prefect", "ray", "cmaes", "numpy")
MODELS = {
    "base": ("Base, zero-shot", "baseline", "The untouched base model."),
    "constant": ("Best constant answer", "baseline", "The one answer that scores best on the training rows."),
    "experts": ("Each expert on its own subtask", "expert", "One model a subtask: the ceiling of a merge."),
    "uniform": ("Uniform average", "merge", "All experts with the coefficient 1 / n."),
    "arithmetic": ("Task arithmetic", "merge", "All experts with one coefficient, tuned on the weak rows."),
    "unified": ("Unified model", "unified", "The two-stage evolutionary merge, zero-shot."),
    "unified+context": (
        "Unified model, gated context", "unified", "The same model, each subtask in the context that its gate chose.",
    ),
    JOINT: ("Joint LoRA", "rival", "One LoRA on all subtasks' rows, with as many steps as all experts together."),
}  # fmt: skip


class Made(BaseModel):
    """References to everything a run made."""

    model_config = ConfigDict(frozen=True)

    splits: SplitRefs
    data: ArtifactRef
    """What was read: digests of all rows, and how many were left out why."""
    anchors: ArtifactRef
    experts: dict[str, ArtifactRef]
    joint: ArtifactRef | None
    weak: dict[str, ArtifactRef]
    """The rows that searches and gates saw: the weak splits, or those that the experts labelled."""
    references: dict[str, ArtifactRef]
    searches: dict[str, ArtifactRef]
    unified: ArtifactRef
    gates: dict[str, ArtifactRef]
    evaluations: dict[str, ArtifactRef]
    model: ArtifactRef | None

    def refs(self) -> list[ArtifactRef]:
        """Return all references, the run's lineage."""
        groups = (self.experts, self._labelled(), self.references, self.searches, self.gates, self.evaluations)
        found = [ref for group in groups for _, ref in sorted(group.items())]
        rows = [ref for _, parts in sorted(self.splits.items()) for _, ref in sorted(parts.items())]
        return [*rows, self.data, self.anchors, *found, self.unified, *(ref for ref in (self.joint, self.model) if ref)]

    def _labelled(self) -> dict[str, ArtifactRef]:
        return {name: ref for name, ref in self.weak.items() if ref != self.splits[name]["weak"]}


def candidate_models(
    run: Run, experts: Sequence[str], searches: Mapping[str, ArtifactRef], joint: bool, subtask: str
) -> dict[str, dict[str, list[float]]]:
    """Return the coefficients per adapter of every model that a subtask's test rows are put to."""
    ones = [1.0] * run.config.search.blocks
    models: dict[str, dict[str, list[float]]] = {
        "base": {},
        "experts": {subtask: ones},
        "uniform": {name: [1.0 / len(experts)] * len(ones) for name in experts},
        "arithmetic": {name: list(row) for name, row in coefficients_of(run, searches[ARITHMETIC]).items()},
        "unified": {name: list(row) for name, row in coefficients_of(run, searches[STAGE_2]).items()},
    }
    return models | ({JOINT: {JOINT: ones}} if joint else {})


def measure_difficulty(run: Run, splits: SplitRefs) -> tuple[dict[str, DifficultyReport], tuple[str, ...]]:
    """Return the difficulty of every subtask and the curriculum's ascending order, from training rows."""
    subtasks = [run.subtask(name) for name in splits]
    rows = {name: read_rows(run, parts["train"]) for name, parts in splits.items()}
    reports = difficulties(subtasks, rows, run.config.curriculum.weights)
    return reports, order_subtasks({name: report.difficulty for name, report in reports.items()})


def gather(run: Run, made: Made, started: float, peak_memory_gb: float) -> Results:
    """Return the results document of a run, all read from the store."""
    store = open_store(run)
    reports, order = measure_difficulty(run, made.splits)
    scores = {name: json.loads(store.read(ref, "scores.json")) for name, ref in made.evaluations.items()}
    gates = {name: json.loads(store.read(ref, "gate.json")) for name, ref in made.gates.items()}
    manifests = [load_manifest(run, ref) for ref in made.refs()]
    named = {"unified+context": "gated"}
    present = [name for name in MODELS if all(named.get(name, name) in by for by in scores.values())]
    rows = {
        part: {name: read_rows(run, refs[part]) for name, refs in made.splits.items()} for part in ("train", "test")
    }
    arithmetic = read_search(run, made.searches[ARITHMETIC])
    document = {
        "run": _run(run),
        "subtasks": [_subtask(run, name, made, rows["train"][name][0], reports[name]) for name in order],
        "models": [
            dict(zip(("name", "title", "kind", "description"), (name, *MODELS[name]), strict=True)) for name in present
        ],
        "scores": [
            _score(run, model, name, scores[name][named.get(model, model)], gates[name])
            for model in present for name in order
        ],
        "means": [_mean(model, [scores[name][named.get(model, model)] for name in order]) for model in present],
        "comparisons": _comparisons(run, present, named, scores, rows["test"]),
        "retention": [_retention(name, scores[name]) for name in order],
        "searches": [_search(run, name, read_search(run, ref)) for name, ref in made.searches.items()],
        "merge": {
            "method": "linear",
            "experts": sorted(made.experts),
            "blocks": _blocks(run),
            "coefficients": [
                row for _, row in sorted(coefficients_of(run, made.searches[STAGE_2]).items())
            ],
            "adapted_layers": list(range(run.base.split, run.base.layers)),
            "lambda_task_arithmetic": _arithmetic_lambda(arithmetic),
        },
        "experts": [_expert(run, name, ref, made.references.get(name)) for name, ref in _trained(made)],
        "curriculum": {
            "weights": {**DEFAULT_WEIGHTS, **(run.config.curriculum.weights or {})},
            "order": order,
            "features": [
                {"subtask": name, "feature": feature, "raw": report.raw[feature], "scaled": report.scaled[feature]}
                for name, report in reports.items() for feature in report.raw
            ],
            "contexts": [
                _context(name, kind, gates[name], scores[name])
                for name in order for kind in run.config.curriculum.contexts
            ],
        },
        "timings": _timings(manifests),
        "wall_seconds": time.time() - started,
        "peak_memory_gb": round(peak_memory_gb, 2),
        "data": {"source": run.config.data.source, **json.loads(store.read(made.data, "data.json"))},
        "notes": _notes(run),
    }  # fmt: skip
    return Results.model_validate(document)


def _run(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.id,
        "name": run.config.name,
        "created": datetime.now(UTC),
        "command": run.command,
        "seed": run.config.seed,
        "base": {"name": run.base.name, "digest": run.base.digest, "licence": run.base.licence or "unknown"},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "hardware": {
            "cpus": os.cpu_count() or 1,
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "device": f"{run.base.device}, {run.base.dtype}",
        },
        "flow_run_id": root_flow_run_id(),
        "store_url": run.store["url"],
        "config": run.config.model_dump(mode="json"),
    }


def _subtask(run: Run, name: str, made: Made, shown: Example, report: DifficultyReport) -> dict[str, Any]:
    subtask = run.subtask(name)
    prompter = resident_prompter(run)
    refs = made.splits[name] | {"weak": made.weak[name]}
    return {
        "name": name,
        "group": subtask.group,
        "title": subtask.title,
        "metric": subtask.metric,
        "labels": subtask.labels,
        "rows": {part: load_manifest(run, ref).metrics["rows"] for part, ref in refs.items()},
        "difficulty": report.difficulty,
        "example": {"prompt": prompter.text(subtask, shown), "answer": shown.answer},
    }


def _score(
    run: Run, model: str, subtask: str, found: Mapping[str, Any], gate: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    chosen = next(entry for entry in gate if entry["chosen"])
    context = chosen["context"] + (", calibrated" if chosen["calibrated"] else "")
    return {
        "model": model,
        "subtask": subtask,
        "context": context if model == "unified+context" else "none" if model == "constant" else "zero-shot",
        "metric": run.subtask(subtask).metric,
        **{key: found[key] for key in ("score", "se", "n", "balanced_accuracy", "rejected", "strict_score")},
    }


def _mean(model: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean, error = bootstrap.mean_with_error([(entry["score"], entry["se"]) for entry in found])
    return {"model": model, "mean": mean, "se": error}


def _comparisons(
    run: Run,
    present: Sequence[str],
    named: Mapping[str, str],
    scores: Mapping[str, Mapping[str, Any]],
    tests: Mapping[str, Sequence[Example]],
) -> list[dict[str, Any]]:
    """Return paired differences of the means, over the same test rows."""
    compared = []
    for a, b in [("unified", other) for other in ("base", "uniform", "arithmetic", JOINT)] + [
        ("unified+context", "unified")
    ]:
        if a not in present or b not in present:
            continue
        pairs = [
            (
                found[named.get(a, a)]["counts"],
                found[named.get(b, b)]["counts"],
                partial(metrics.score_from_counts, run.subtask(name), metrics.datasets_of(tests[name])),
            )
            for name, found in scores.items()
        ]
        samples = run.config.evaluation.bootstrap_samples
        paired = bootstrap.paired_mean_difference(pairs, samples=samples, seed=run.seed("compare", a, b))
        rows = sum(found["base"]["n"] for found in scores.values())
        compared.append(
            {
                "a": a,
                "b": b,
                "difference": paired.difference,
                "se": paired.standard_error,
                "p": paired.p_value,
                "n": rows,
            }
        )
    return compared


def _retention(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    merged, base, expert = (found[model]["score"] for model in ("unified", "base", "experts"))
    return {"subtask": name, "retention": merged / expert if expert > 0 else None, "nai": nai(merged, base, expert)}


def _search(run: Run, name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    candidates = [
        {
            "index": entry["index"],
            "origin": entry["origin"],
            "genome": entry["genome"],
            "fitness": entry["fitness"],
            "values": entry["values"],
            "seconds": entry["seconds"],
            "reused": "reused_from" in entry,
        }
        for entry in found["candidates"]
    ]
    return {
        "stage": "stage2" if name == STAGE_2 else "stage1",
        "group": None if name == STAGE_2 else name,
        "strategy": "grid" if name == ARITHMETIC else run.config.search.strategy,
        "genes": found["genes"],
        "candidates": candidates,
        "winner": found["winner"],
        "seconds": sum(
            entry["seconds"]["merge"] + entry["seconds"]["evaluate"] for entry in candidates if not entry["reused"]
        ),
        "lookahead": run.config.search.lookahead,
        "workers": run.config.ray.workers,
    }  # fmt: skip


def _blocks(run: Run) -> list[str]:
    layers, blocks = run.base.layers - run.base.split, run.config.search.blocks
    edges = [run.base.split + -(-layers * block // blocks) for block in range(blocks + 1)]
    return [f"layers {low}-{high - 1}" for low, high in itertools.pairwise(edges)]


def _arithmetic_lambda(found: Mapping[str, Any]) -> float | None:
    values = {value for row in found["coefficients"].values() for value in row}
    return values.pop() if len(values) == 1 else None


def _trained(made: Made) -> list[tuple[str, ArtifactRef]]:
    return [*sorted(made.experts.items()), *([(JOINT, made.joint)] if made.joint else [])]


def _expert(run: Run, name: str, ref: ArtifactRef, reference: ArtifactRef | None) -> dict[str, Any]:
    manifest = load_manifest(run, ref)
    measured = load_manifest(run, reference).metrics if reference else {}
    cfg = run.config.experts
    return {
        "subtask": name,
        "batch_size": cfg.batch_size,
        "rank": cfg.rank,
        "learning_rate": cfg.learning_rate,
        "seconds": manifest.seconds,
        "weak_score": measured.get("expert", {}).get("score"),
        "base_weak_score": measured.get("base", {}).get("score"),
        **{
            key: manifest.metrics[key]
            for key in ("loss", "anchor", "steps", "trainable_parameters", "tokens_per_second")
        },
    }


def _context(subtask: str, kind: str, gate: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return one context's line: its weak scores, and the test score of the form that the gate would use."""
    forms = [entry for entry in gate if entry["context"] == kind]
    plain = next(entry for entry in forms if not entry["calibrated"])
    calibrated = next((entry for entry in forms if entry["calibrated"]), None)
    chosen = next((entry for entry in forms if entry["chosen"]), None)
    shown = chosen or max(forms, key=lambda entry: (entry["weak_score"], not entry["calibrated"]))
    test = scores[f"context:{kind}" + (":calibrated" if shown["calibrated"] else "")]
    return {
        "subtask": subtask,
        "context": kind,
        "tokens": plain["tokens"],
        "demonstrations": plain["demonstrations"],
        "weak_score": plain["weak_score"],
        "weak_score_calibrated": calibrated["weak_score"] if calibrated else None,
        "test_score": test["score"],
        "test_se": test["se"],
        "chosen": chosen is not None,
        "calibrated": shown["calibrated"],
    }


def _timings(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return the seconds that each artifact took to make; searches of one stage shared the clock and count once."""
    stages = {"expert": "experts", "reference": "experts", "search": "search", "unified": "search", "gate": "contexts",
              "evaluation": "evaluation"}  # fmt: skip
    timings: dict[tuple[str, str], float] = {}
    for manifest in manifests:
        if manifest.kind in stages:
            name = manifest.name
            if manifest.kind == "search":
                name = "stage 2" if name == f"search {STAGE_2}" else "stage 1"
            stage = stages[manifest.kind]
            timings[stage, name] = max(timings.get((stage, name), 0.0), manifest.seconds)
    return [{"stage": stage, "name": name, "seconds": seconds} for (stage, name), seconds in timings.items()]


def _notes(run: Run) -> list[str]:
    notes = [
        "Scores of several subtasks may rest on the same sentences; the error of their mean takes them as independent.",
        "Seconds of experts, contexts and evaluation are those of one worker; several worked at once.",
    ]
    if run.config.data.weak_source == "pseudo":
        notes.append(
            "Weak rows had no labels: each expert labelled texts of its own subtask, and the most confident were kept. "
            "Searches, gates and calibration saw no gold label; train and test rows have theirs."
        )
    if run.config.data.source == "embedded":
        notes.append(
            "The embedded corpus was written for this project: these figures compare models, they are no benchmark."
        )
    return notes
