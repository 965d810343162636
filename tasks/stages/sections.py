"""The sections of a results document, each read from the artifacts that it describes."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import psutil

from memmcl.backbone.resident import resident_prompter
from memmcl.curriculum.difficulty import DifficultyReport
from memmcl.store import ArtifactRef, Manifest
from memmcl.suite.examples import Example
from tasks.run.models import WARM
from tasks.run.runtime import Run, open_store
from tasks.stages.contexts import form_name
from tasks.stages.merge import ARITHMETIC, STAGE_2, read_search, winner_of
from tasks.stages.run_artifacts import RunArtifacts, TrainedArtifacts
from tasks.ui.history import root_flow_run_id

PACKAGES = ("memmcl", "torch", "transformers", "peft", "prefect", "ray", "cmaes", "numpy")
GIB = 2**30


def run_section(run: Run) -> dict[str, Any]:
    """Return the run's id, configuration, base, versions and hardware."""
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


def subtask_section(
    run: Run, name: str, artifacts: RunArtifacts, shown: Example, report: DifficultyReport
) -> dict[str, Any]:
    """Return one subtask with its rows, its difficulty and an example."""
    subtask = run.subtask(name)
    refs = artifacts.splits[name] | {"weak": artifacts.trained.weak[name]}
    return {
        "name": name,
        "group": subtask.group,
        "title": subtask.title,
        "metric": subtask.metric,
        "labels": subtask.labels,
        "rows": {split: open_store(run).load(ref).metrics["rows"] for split, ref in refs.items()},
        "difficulty": report.difficulty,
        "example": {"prompt": resident_prompter(run.model).text(subtask, shown), "answer": shown.answer},
    }


def score_section(
    run: Run, model: str, subtask: str, score: Mapping[str, Any], gate: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return one model's score on one subtask."""
    chosen = next(entry for entry in gate if entry["chosen"])
    gated = chosen["context"] + (", calibrated" if chosen["calibrated"] else "")
    return {
        "model": model,
        "subtask": subtask,
        "context": {"unified+context": gated, "constant": "none"}.get(model, "zero-shot"),
        "metric": run.subtask(subtask).metric,
        **_only(score, "score", "se", "n", "balanced_accuracy", "rejected", "strict_score"),
    }


def search_sections(run: Run, name: str, search: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one search with all its candidates, and the joint search that followed it, if one did."""
    stage, group = ("stage2", None) if name == STAGE_2 else ("stage1", name)
    finalists = [_only(one, "title", "fitness", "selection", "wins") for one in search["finalists"]]
    yield _search(run, stage, group, search) | {"finalists": finalists if len(finalists) > 1 else []}
    if search["joint"] is not None:
        yield _search(run, "joint", None, search["joint"])


def _search(run: Run, stage: str, group: str | None, search: Mapping[str, Any]) -> dict[str, Any]:
    candidates = [
        _only(entry, "index", "origin", "parents", "genome", "fitness", "values", "rows", "stopped", "seconds")
        | {"reused": "reused_from" in entry, "objectives": entry.get("objectives") or []}
        for entry in search["candidates"]
    ]
    times = [entry["seconds"] for entry in candidates if not entry["reused"]]
    return {
        "stage": stage,
        "group": group,
        "strategy": "grid" if search["spec"]["fixed"] else run.config.search.strategy,
        "genes": search["genes"],
        "objectives": list(search["spec"]["objectives"]),
        "candidates": candidates,
        "winner": search["winner"],
        "seconds": sum(seconds["merge"] + seconds["evaluate"] for seconds in times),
        "lookahead": run.config.search.lookahead,
        "workers": run.config.ray.workers,
    }


def merge_section(run: Run, artifacts: RunArtifacts) -> dict[str, Any]:
    """Return the unified model's coefficients over the experts; the warm start has no gene and is not among them."""
    coefficients, recipe = winner_of(read_search(run, artifacts.searches[STAGE_2]))
    arithmetic, _ = winner_of(read_search(run, artifacts.searches[ARITHMETIC]))
    lambdas = {value for row in arithmetic.values() for value in row}
    parameters = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in recipe.parameters.items()
    )
    layers, blocks = run.base.layers - run.base.split, run.config.search.blocks
    edges = [run.base.split + -(-layers * block // blocks) for block in range(blocks + 1)]
    return {
        "method": recipe.method + (f" ({parameters})" if parameters else ""),
        "experts": sorted(artifacts.trained.experts),
        "blocks": [f"layers {low}-{high - 1}" for low, high in itertools.pairwise(edges)],
        "coefficients": [row for _, row in sorted(coefficients.items())],
        "adapted_layers": list(range(run.base.split, run.base.layers)),
        "lambda_task_arithmetic": lambdas.pop() if len(lambdas) == 1 else None,
    }


def training_sections(run: Run, trained: TrainedArtifacts) -> Iterator[dict[str, Any]]:
    """Yield every training: the warm start, the experts, the rivals."""
    for name, ref in [*trained.warm_start.items(), *sorted(trained.experts.items()), *trained.rivals.items()]:
        yield _training(run, name, ref, trained.references.get(name))


def _training(run: Run, name: str, ref: ArtifactRef, reference: ArtifactRef | None) -> dict[str, Any]:
    """Return one training; of an expert that was anchored afterwards, from the first step without an anchor on."""
    manifest = open_store(run).load(ref)
    plain = [open_store(run).load(one) for one in manifest.inputs if one.kind == "expert"]
    sessions, numbers = [*plain, manifest], manifest.metrics
    weak = open_store(run).load(reference).metrics if reference else {}
    validated = sessions[0].metrics
    anchored = any(value is not None for value in numbers["anchor"])
    cfg, gpu = run.config.experts, max(one.metrics["gpu_bytes"] or 0 for one in sessions)
    return {
        "subtask": name,
        "loss": [value for one in sessions for value in one.metrics["loss"]],
        "anchor": [value for one in sessions for value in one.metrics["anchor"]] if anchored else [],
        "anchor_every": cfg.anchor_every if anchored else 1,
        "validation": [{"step": step, "loss": loss} for step, loss in validated["validation"]],
        "steps": sum(one.metrics["steps"] for one in sessions),
        **_only(validated, "best_step", "stopped_early"),
        **_only(numbers, "batch_size", "trainable_parameters", "tokens_per_second"),
        "rows_per_micro_batch": numbers["micro_batch"],
        "rank": cfg.rank,
        "learning_rate": cfg.learning_rate,
        "seconds": sum(one.seconds for one in sessions),
        "weak_score": weak.get("expert", {}).get("score"),
        "base_weak_score": weak.get("base", {}).get("score"),
        "constant_weak_score": weak.get("constant", {}).get("score"),
        "gpu_memory_gb": round(gpu / GIB, 2) if gpu else None,
    }


def context_section(
    subtask: str, kind: str, gate: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]
) -> dict[str, Any]:
    """Return one context: its weak scores, and the test score of the form that the gate would use."""
    forms = {entry["calibrated"]: entry for entry in gate if entry["context"] == kind}
    chosen = next((entry for entry in forms.values() if entry["chosen"]), None)
    shown = chosen or max(forms.values(), key=lambda entry: (entry["weak_score"], not entry["calibrated"]))
    test = scores[form_name(shown)]
    return {
        "subtask": subtask,
        "context": kind,
        **_only(forms[False], "tokens", "demonstrations", "weak_score"),
        "weak_score_calibrated": forms[True]["weak_score"] if True in forms else None,
        "test_score": test["score"],
        "test_se": test["se"],
        "chosen": chosen is not None,
        "calibrated": shown["calibrated"],
    }


def timings_section(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """Return the seconds that each artifact took; searches of one stage ran at once and count once."""
    stages = {
        **dict.fromkeys((WARM, "expert", "reference"), "experts"),
        **dict.fromkeys(("search", "unified"), "search"),
        "gate": "contexts",
        "evaluation": "evaluation",
    }
    timings: dict[tuple[str, str], float] = {}
    for manifest in manifests:
        if stage := stages.get(manifest.kind):
            name = manifest.name
            if manifest.kind == "search":
                name = "stage 2" if name == f"search {STAGE_2}" else "stage 1"
            timings[stage, name] = max(timings.get((stage, name), 0.0), manifest.seconds)
    return [{"stage": stage, "name": name, "seconds": seconds} for (stage, name), seconds in timings.items()]


def _only(entry: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: entry[key] for key in keys}
