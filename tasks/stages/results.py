"""The results document of a run, gathered from its artifacts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from memmcl.curriculum.difficulty import DEFAULT_WEIGHTS
from memmcl.evaluate import bootstrap
from memmcl.evolve.fitness import nai
from memmcl.merge.compare import compare
from memmcl.report import Results
from memmcl.suite import metrics
from memmcl.suite.examples import Example
from tasks.run.models import JOINT, WEAK_LORA
from tasks.run.runtime import Run, load_adapter, open_store, read_rows
from tasks.stages import sections
from tasks.stages.contexts import read_gate
from tasks.stages.data import measure_difficulty
from tasks.stages.evaluate import INTERFERENCE
from tasks.stages.merge import read_search
from tasks.stages.run_artifacts import RunArtifacts

MODELS = {
    "base": ("Base, zero-shot", "baseline", "The untouched base model."),
    "constant": ("Best constant answer", "baseline", "The one answer that scores best on the training rows."),
    "experts": ("Each expert on its own subtask", "expert", "One model a subtask: the ceiling of a merge."),
    "uniform": ("Uniform average", "merge", "All experts with the coefficient 1 / n."),
    "sum": ("Plain sum", "merge", "All experts with the coefficient 1: nothing is searched or tuned."),
    "arithmetic": ("Task arithmetic", "merge", "All experts with one coefficient, tuned on the weak rows."),
    "ties": ("TIES", "merge", "All experts merged by TIES, its scale tuned on the weak rows."),
    "tsv": ("TSV", "merge", "All experts merged by task singular vectors, one coefficient tuned on the weak rows."),
    "unified": ("Unified model", "unified", "The two-stage merge search, zero-shot."),
    "unified+context": (
        "Unified model, gated context",
        "unified",
        "The same model, each subtask in the context that its gate chose.",
    ),
    WEAK_LORA: ("LoRA on the weak rows", "rival", "One LoRA on all weak rows, with as many steps as the joint LoRA."),
    JOINT: ("Joint LoRA", "rival", "One LoRA on all subtasks' rows, with as many steps as all experts together."),
}
ANSWERS = {"unified+context": "gated"}
"""Models whose answers and scores are stored under another name."""
RETAINING = ("sum", "unified")
"""Merges of which the report says how much of each expert they keep."""
COMPARED = (
    *(("unified", other) for other in ("base", "uniform", "sum", "arithmetic", "ties", "tsv", WEAK_LORA, JOINT)),
    ("unified+context", "unified"),
)


def gather(run: Run, artifacts: RunArtifacts, started: float, peak_memory_gb: float) -> Results:
    """Return the results document of a run, all read from the store."""
    store, experts = open_store(run), artifacts.trained.experts
    scores = {name: json.loads(store.read(ref, "scores.json")) for name, ref in artifacts.evaluations.items()}
    gates = {name: read_gate(run, ref) for name, ref in artifacts.gates.items()}
    present = [name for name in MODELS if all(_answers(name) in by for by in scores.values())]
    train, test = (
        {name: read_rows(run, refs[split]) for name, refs in artifacts.splits.items()} for split in ("train", "test")
    )
    reports, order = measure_difficulty(run, train)
    document = {
        "run": sections.run_section(run),
        "subtasks": [sections.subtask_section(run, name, artifacts, train[name][0], reports[name]) for name in order],
        "models": [
            dict(zip(("name", "title", "kind", "description"), (name, *MODELS[name]), strict=True)) for name in present
        ],
        "scores": [
            sections.score_section(run, model, name, scores[name][_answers(model)], gates[name])
            for model in present
            for name in order
        ],
        "means": [_mean(model, [scores[name][_answers(model)] for name in order]) for model in present],
        "comparisons": _comparisons(run, present, scores, test),
        "retention": [_retention(model, name, scores[name]) for model in RETAINING for name in order],
        "interference": [
            {"expert": expert, "subtask": name, **score}
            for name in order
            for expert, score in scores[name][INTERFERENCE].items()
        ],
        "task_vectors": asdict(compare({name: load_adapter(run, ref) for name, ref in sorted(experts.items())})),
        "searches": [
            section
            for name, ref in artifacts.searches.items()
            for section in sections.search_sections(run, name, read_search(run, ref))
        ],
        "merge": sections.merge_section(run, artifacts),
        "experts": list(sections.training_sections(run, artifacts.trained)),
        "curriculum": {
            "weights": {**DEFAULT_WEIGHTS, **(run.config.curriculum.weights or {})},
            "order": order,
            "features": [
                {"subtask": name, "feature": feature, "raw": report.raw[feature], "scaled": report.scaled[feature]}
                for name, report in reports.items()
                for feature in report.raw
            ],
            "contexts": [
                sections.context_section(name, kind, gates[name], scores[name])
                for name in order
                for kind in run.config.curriculum.contexts
            ],
        },
        "timings": sections.timings_section([store.load(ref) for ref in artifacts.refs()]),
        "wall_seconds": time.time() - started,
        "peak_memory_gb": round(peak_memory_gb, 2),
        "data": {"source": run.config.data.source, **json.loads(store.read(artifacts.data, "data.json"))},
        "notes": _notes(run, artifacts),
    }
    return Results.model_validate(document)


def _answers(model: str) -> str:
    return ANSWERS.get(model, model)


def _mean(model: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mean, error = bootstrap.mean_with_error([(score["score"], score["se"]) for score in scores])
    return {"model": model, "mean": mean, "se": error}


def _comparisons(
    run: Run, present: Sequence[str], scores: Mapping[str, Mapping[str, Any]], tests: Mapping[str, Sequence[Example]]
) -> list[dict[str, Any]]:
    """Return paired differences of the means, over the same test rows."""
    compared = []
    for a, b in COMPARED:
        if a not in present or b not in present:
            continue
        pairs = [
            (
                by_model[_answers(a)]["counts"],
                by_model[_answers(b)]["counts"],
                metrics.score_function(run.subtask(name), tests[name]),
            )
            for name, by_model in scores.items()
        ]
        samples = run.config.evaluation.bootstrap_samples
        paired = bootstrap.paired_mean_difference(pairs, samples=samples, seed=run.seed("compare", a, b))
        rows = sum(by_model["base"]["n"] for by_model in scores.values())
        result = {"difference": paired.difference, "se": paired.standard_error, "p": paired.p_value}
        compared.append({"a": a, "b": b, **result, "n": rows})
    return compared


def _retention(model: str, name: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    merged, base, expert = (scores[one]["score"] for one in (model, "base", "experts"))
    kept = merged / expert if expert > 0 else None
    return {"model": model, "subtask": name, "retention": kept, "nai": nai(merged, base, expert)}


def _notes(run: Run, artifacts: RunArtifacts) -> list[str]:
    notes = [
        "Scores of several subtasks may rest on the same sentences; the error of their mean takes them as independent.",
        "Seconds of experts, contexts and evaluation are those of one worker; several worked at once.",
    ]
    warm = artifacts.trained.warm
    if warm is not None:
        notes.append(
            f"Experts start from a warm start ({warm.key[:12]}): one adapter trained on all subtasks first, "
            "part of every expert and every merge at the coefficient 1. The base is the plain base everywhere."
        )
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
