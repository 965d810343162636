"""The parts of a results document, each from the artifacts that it tells of."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import psutil

from memmcl.backbone.resident import resident_prompter
from memmcl.curriculum.difficulty import DifficultyReport
from memmcl.merge.compare import compare
from memmcl.merge.genome import Recipe
from memmcl.store import ArtifactRef, Manifest
from memmcl.suite.examples import Example
from tasks.run.models import WARM
from tasks.run.runtime import Run, load_adapter, load_manifest
from tasks.stages.evaluate import INTERFERENCE
from tasks.stages.merge import ARITHMETIC, STAGE_2, read_search, winner_of
from tasks.stages.run_artifacts import RunArtifacts
from tasks.ui.history import root_flow_run_id

PACKAGES = ("memmcl", "torch", "transformers", "peft", "prefect", "ray", "cmaes", "numpy")
GIB = 2**30


def run_part(run: Run) -> dict[str, Any]:
    """Return what the run was: its id, configuration, base, versions, hardware."""
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
            "memory_gb": round(psutil.virtual_memory().total / GIB, 1),
            "device": f"{run.base.device}, {run.base.dtype}",
        },
        "flow_run_id": root_flow_run_id(),
        "store_url": run.store["url"],
        "config": run.config.model_dump(mode="json"),
    }


def subtask_part(run: Run, name: str, made: RunArtifacts, shown: Example, report: DifficultyReport) -> dict[str, Any]:
    """Return one subtask with its rows, its difficulty and an example."""
    subtask = run.subtask(name)
    prompter = resident_prompter(run.model)
    refs = made.splits[name] | {"weak": made.trained.weak[name]}
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


def score_part(
    run: Run, model: str, subtask: str, found: Mapping[str, Any], gate: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return one model's score on one subtask."""
    chosen = next(entry for entry in gate if entry["chosen"])
    context = chosen["context"] + (", calibrated" if chosen["calibrated"] else "")
    return {
        "model": model,
        "subtask": subtask,
        "context": context if model == "unified+context" else "none" if model == "constant" else "zero-shot",
        "metric": run.subtask(subtask).metric,
        **{key: found[key] for key in ("score", "se", "n", "balanced_accuracy", "rejected", "strict_score")},
    }


def search_parts(run: Run, name: str, found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one search with all its candidates, and the joint search that followed it, if one did."""
    stage = "stage2" if name == STAGE_2 else "stage1"
    yield _search(run, stage, None if name == STAGE_2 else name, found) | {
        "finalists": [
            {key: one[key] for key in ("title", "fitness", "selection", "wins")} for one in found["finalists"]
        ]
        if len(found["finalists"]) > 1
        else []
    }
    if found["joint"] is not None:
        yield _search(run, "joint", None, found["joint"])


def _search(run: Run, stage: str, group: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
    candidates = [
        {
            key: entry[key]
            for key in ("index", "origin", "parents", "genome", "fitness", "values", "rows", "stopped", "seconds")
        }
        | {"reused": "reused_from" in entry, "objectives": entry.get("objectives") or []}
        for entry in found["candidates"]
    ]
    return {
        "stage": stage,
        "group": group,
        "strategy": "grid" if found["spec"]["fixed"] else run.config.search.strategy,
        "genes": found["genes"],
        "objectives": list(found["spec"]["objectives"]),
        "candidates": candidates,
        "winner": found["winner"],
        "seconds": sum(
            entry["seconds"]["merge"] + entry["seconds"]["evaluate"] for entry in candidates if not entry["reused"]
        ),
        "lookahead": run.config.search.lookahead,
        "workers": run.config.ray.workers,
    }


def merge_part(run: Run, made: RunArtifacts) -> dict[str, Any]:
    """Return the unified model's coefficients over the experts; what they stand on is no gene and not among them."""
    coefficients, recipe = winner_of(read_search(run, made.searches[STAGE_2]))
    return {
        "method": _told(recipe),
        "experts": sorted(made.trained.experts),
        "blocks": _blocks(run),
        "coefficients": [row for _, row in sorted(coefficients.items())],
        "adapted_layers": list(range(run.base.split, run.base.layers)),
        "lambda_task_arithmetic": _arithmetic_lambda(read_search(run, made.searches[ARITHMETIC])),
    }


def _told(recipe: Recipe) -> str:
    given = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in recipe.parameters.items()
    )
    return recipe.method + (f" ({given})" if given else "")


def _blocks(run: Run) -> list[str]:
    layers, blocks = run.base.layers - run.base.split, run.config.search.blocks
    edges = [run.base.split + -(-layers * block // blocks) for block in range(blocks + 1)]
    return [f"layers {low}-{high - 1}" for low, high in itertools.pairwise(edges)]


def _arithmetic_lambda(found: Mapping[str, Any]) -> float | None:
    values = {value for row in found["coefficients"].values() for value in row}
    return values.pop() if len(values) == 1 else None


def expert_parts(run: Run, made: RunArtifacts) -> Iterator[dict[str, Any]]:
    """Yield every training: the warm start, the experts, the rivals."""
    trained = made.trained
    rivals = {name: ref for name, ref in trained.special().items() if name != WARM}
    first = {WARM: trained.warm} if trained.warm else {}
    for name, ref in [*first.items(), *sorted(trained.experts.items()), *rivals.items()]:
        yield _expert(run, name, ref, trained.references.get(name))


def _expert(run: Run, name: str, ref: ArtifactRef, reference: ArtifactRef | None) -> dict[str, Any]:
    """Return one training; one that was anchored after the fact is told of from its first, plain step on."""
    manifest = load_manifest(run, ref)
    plain = [load_manifest(run, one) for one in manifest.inputs if one.kind == "expert"]
    sessions, numbers = [*plain, manifest], manifest.metrics
    weak = load_manifest(run, reference).metrics if reference else {}
    looked = (plain or [manifest])[0].metrics
    anchored = any(value is not None for value in numbers["anchor"])
    cfg, gpu = run.config.experts, max(one.metrics["gpu_bytes"] or 0 for one in sessions)
    return {
        "subtask": name,
        "loss": [value for one in sessions for value in one.metrics["loss"]],
        "anchor": [value for one in sessions for value in one.metrics["anchor"]] if anchored else [],
        "anchor_every": cfg.anchor_every if anchored else 1,
        "validation": [{"step": step, "loss": loss} for step, loss in looked["validation"]],
        "steps": sum(one.metrics["steps"] for one in sessions),
        "best_step": looked["best_step"],
        "stopped_early": looked["stopped_early"],
        "batch_size": numbers["batch_size"],
        "rows_per_micro_batch": numbers["micro_batch"],
        "rank": cfg.rank,
        "learning_rate": cfg.learning_rate,
        "seconds": sum(one.seconds for one in sessions),
        "trainable_parameters": numbers["trainable_parameters"],
        "weak_score": weak.get("expert", {}).get("score"),
        "base_weak_score": weak.get("base", {}).get("score"),
        "constant_weak_score": weak.get("constant", {}).get("score"),
        "tokens_per_second": numbers["tokens_per_second"],
        "gpu_memory_gb": round(gpu / GIB, 2) if gpu else None,
    }


def interference_parts(order: Sequence[str], scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the base and every expert alone score on every subtask, where that was measured."""
    return [
        {"expert": expert, "subtask": name, **found}
        for name in order
        for expert, found in scores[name][INTERFERENCE].items()
    ]


def task_vectors_part(run: Run, made: RunArtifacts) -> dict[str, Any]:
    """Return how the experts' task vectors relate; the warm start that they stand on is no expert."""
    return asdict(compare({name: load_adapter(run, ref) for name, ref in sorted(made.trained.experts.items())}))


def context_part(
    subtask: str, kind: str, gate: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]
) -> dict[str, Any]:
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


def timings_part(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return the seconds that each artifact took to make; searches of one stage shared the clock and count once."""
    stages = {
        WARM: "experts",
        "expert": "experts",
        "reference": "experts",
        "search": "search",
        "unified": "search",
        "gate": "contexts",
        "evaluation": "evaluation",
    }
    timings: dict[tuple[str, str], float] = {}
    for manifest in manifests:
        if manifest.kind in stages:
            name = manifest.name
            if manifest.kind == "search":
                name = "stage 2" if name == f"search {STAGE_2}" else "stage 1"
            stage = stages[manifest.kind]
            timings[stage, name] = max(timings.get((stage, name), 0.0), manifest.seconds)
    return [{"stage": stage, "name": name, "seconds": seconds} for (stage, name), seconds in timings.items()]
