"""A made-up but realistic results document: six subtasks, ten models, four searches."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np

from memmcl.seeds import derive, digest

SUBTASKS: dict[str, tuple[str, str, str, list[str], float]] = {
    "sent2": ("SC", "Sentence polarity, 2 classes", "accuracy", ["positive", "negative"], 0.11),
    "asc": ("SC", "Aspect polarity", "accuracy", ["positive", "negative", "neutral"], 0.31),
    "uabsa": ("ABSA", "Aspects and their polarity", "tuple micro-F1", [], 0.57),
    "aste": ("ABSA", "Aspect, opinion and polarity triplets", "tuple micro-F1", [], 0.72),
    "irony": ("MAST", "Irony", "F1 of irony", ["irony", "non_irony"], 0.38),
    "emotion": ("MAST", "Emotion, 4 classes", "macro-F1", ["anger", "joy", "optimism", "sadness"], 0.49),
}
LAYERS = range(20, 30)
MORE = ("doc2", "doc5", "sent3", "sent5", "asqp", "implicit", "compsent", "hate", "offensive", "stance")
LEVELS: dict[str, list[float]] = {  # one score per subtask, in the order of SUBTASKS
    "base": [0.583, 0.417, 0.021, 0.004, 0.402, 0.291],
    "constant": [0.500, 0.358, 0.0, 0.0, 0.667, 0.121],
    "experts": [0.842, 0.708, 0.487, 0.391, 0.731, 0.645],
    "uniform": [0.717, 0.525, 0.188, 0.121, 0.588, 0.449],
    "sum": [0.700, 0.492, 0.297, 0.214, 0.560, 0.431],
    "task-arithmetic": [0.792, 0.617, 0.352, 0.267, 0.641, 0.552],
    "unified": [0.817, 0.650, 0.401, 0.309, 0.667, 0.583],
    "unified+context": [0.825, 0.650, 0.437, 0.338, 0.667, 0.578],
    "weak": [0.692, 0.475, 0.140, 0.067, 0.521, 0.402],
    "joint": [0.833, 0.692, 0.464, 0.372, 0.702, 0.618],
}
MODELS: list[tuple[str, str, str, str]] = [
    ("base", "Base model", "baseline", "Untouched, zero-shot."),
    ("constant", "Best constant answer", "baseline", "The one answer that scores best on the training rows."),
    ("experts", "Experts, each on its own", "expert", "Each expert on its own subtask: the ceiling of a merge."),
    ("uniform", "Uniform average", "merge", "Every task vector weighted 1/6."),
    ("sum", "Sum of all experts", "merge", "Every task vector weighted 1."),
    ("task-arithmetic", "Task arithmetic", "merge", "One coefficient for all, tuned on the weak rows."),
    ("unified", "Unified model", "unified", "Two-stage merge search, zero-shot."),
    ("unified+context", "Unified model with contexts", "unified", "With the context that the gate chose."),
    ("weak", "LoRA on the weak rows", "rival", "One LoRA trained on the pooled weak rows."),
    ("joint", "Joint LoRA", "rival", "One LoRA trained on all subtasks for as many steps as all experts together."),
]
FEATURES = {
    "classes": 0.2,
    "arity": 0.25,
    "tuples_per_row": 0.15,
    "label_entropy": 0.1,
    "vocabulary_diversity": 0.1,
    "length": 0.05,
    "needs_target": 0.05,
    "figurative": 0.1,
}
MERGED = ("sum", "unified")
"""the models with a retention"""

CONTEXTS = {"zero-shot": 0, "own": 3, "curriculum": 5, "reversed": 5, "random": 5}


def results_document() -> dict[str, Any]:
    """Return a fresh copy of the document, as JSON would give it back."""
    return copy.deepcopy(_DOCUMENT)


def only(document: dict[str, Any], *parts: str) -> dict[str, Any]:
    """Empty whatever takes long to draw but these parts; return the document."""
    for part in {"scores", "means", "searches", "experts", "interference", "retention", "timings"} - set(parts):
        document[part] = []
    document.update(dict.fromkeys({"merge", "task_vectors"} - set(parts)))
    if "curriculum" not in parts:
        document["curriculum"] = {}
    return document


def sixteen_subtasks() -> dict[str, Any]:
    """Return the document with ten more subtasks, each the twin of one of the six."""
    document = results_document()
    twins = dict(zip(MORE, itertools.cycle(SUBTASKS), strict=False))
    curriculum = document["curriculum"]
    named = [
        (document, "subtasks", "name"),
        *((document, key, "subtask") for key in ("scores", "retention", "experts")),
    ]
    for holder, key, field in [*named, *((curriculum, key, "subtask") for key in ("features", "contexts"))]:
        found = holder[key]
        holder[key] = [
            *found,
            *({**part, field: name} for name, twin in twins.items() for part in found if part[field] == twin),
        ]
    merge = document["merge"]
    curriculum["order"] += MORE
    merge["experts"] = [*SUBTASKS, *MORE]
    merge["coefficients"] += [merge["coefficients"][list(SUBTASKS).index(twin)] for twin in twins.values()]
    measured = {(part["expert"], part["subtask"]): part for part in document["interference"]}
    document["task_vectors"] = task_vectors({s["name"]: s["group"] for s in document["subtasks"]})
    document["interference"] = []
    for expert in ("base", *SUBTASKS, *MORE):
        for subtask in (*SUBTASKS, *MORE):
            row, column = twins.get(expert, expert), twins.get(subtask, subtask)
            found = measured["base" if row == column and expert != subtask else row, column]
            document["interference"].append({**found, "expert": expert, "subtask": subtask})
    return document


def task_vectors(groups: dict[str, str]) -> dict[str, Any]:
    """Return how random task vectors relate that share a direction with all others, and one with their group.

    groups: by subtask. Task vectors grow from layer to layer, as those of trained experts do.
    """
    rng = np.random.default_rng(derive(7, "task-vectors"))
    names = sorted(groups)
    shared = {group: rng.normal(size=(len(LAYERS), 400)) for group in sorted({*groups.values(), "all"})}
    vectors = (
        np.stack(
            [
                (2 + number % 4 + number / 12) * rng.normal(size=(len(LAYERS), 400))
                + shared["all"]
                + 1.5 * shared[groups[name]]
                for number, name in enumerate(names)
            ]
        )
        * np.linspace(0.01, 0.03, len(LAYERS))[:, None]
    )  # experts x layers x entries

    def relation(layer: int | None, entries: np.ndarray) -> dict[str, Any]:
        pairs = list(itertools.combinations(entries, 2))
        return {
            "layer": layer,
            "norms": np.linalg.norm(entries, axis=1).round(4).tolist(),
            "cosines": np.atleast_2d(np.corrcoef(entries)).round(4).tolist(),  # of zero mean, about
            "conflict": round(float(np.mean([one * other < 0 for one, other in pairs])), 4) if pairs else None,
            "cancelled": round(float(1 - abs(entries.sum(axis=0)).sum() / abs(entries).sum()), 4),
        }

    layers = [relation(layer, vectors[:, place]) for place, layer in enumerate(LAYERS)]
    return {"experts": names, "overall": relation(None, vectors.reshape(len(names), -1)), "layers": layers}


def _scores(rng: np.random.Generator) -> list[dict[str, Any]]:
    scores = []
    for model, levels in LEVELS.items():
        for (subtask, (_, _, metric, labels, _)), level in zip(SUBTASKS.items(), levels, strict=True):
            tuples = not labels
            scores.append(
                {
                    "model": model,
                    "subtask": subtask,
                    "context": "curriculum" if model == "unified+context" and tuples else "zero-shot",
                    "metric": metric,
                    "score": level,
                    "se": round(float((level * (1 - level) / 120) ** 0.5), 4),
                    "n": 120,
                    "balanced_accuracy": None if tuples else round(level - float(rng.uniform(0, 0.05)), 4),
                    "rejected": int(rng.integers(0, 40)) if tuples else 0,
                    "strict_score": round(level * 0.93, 4) if tuples else None,
                }
            )
    return scores


def _search(rng: np.random.Generator, stage: str, group: str | None, genes: list[str]) -> dict[str, Any]:
    seeds = ["base", "uniform", "task-arithmetic:0.6", "task-arithmetic:1.0", *genes]
    candidates: list[dict[str, Any]] = []
    best = 0.45
    for index in range(20):
        origin = f"seed:{seeds[index]}" if index < len(seeds) else f"cmaes:g{(index - len(seeds)) // 6}"
        fitness = float(rng.uniform(0.35, 0.7)) if index < len(seeds) else best + float(rng.normal(0.0, 0.05))
        failed = stage == "stage1" and group == "ABSA" and index == 13
        best = best if failed else max(best, fitness)
        candidates.append(
            {
                "index": index,
                "origin": origin,
                "genome": [round(float(gene), 4) for gene in rng.uniform(0, 1.2, len(genes))],
                "fitness": None if failed else round(fitness, 4),
                "values": {} if failed else {name: round(fitness + float(rng.normal(0, 0.04)), 4) for name in genes},
                "seconds": {
                    "merge": round(float(rng.uniform(0.12, 0.3)), 3),
                    "evaluate": 0.0 if index == 4 else round(float(rng.uniform(4.5, 7.0)), 3),
                    "wait": round(float(rng.exponential(0.4)), 3),
                },
                "reused": index == 4,
            }
        )
    winner = max((c for c in candidates if c["fitness"] is not None), key=lambda c: float(c["fitness"]))
    return {
        "stage": stage,
        "group": group,
        "strategy": "cma-es",
        "genes": genes,
        "candidates": candidates,
        "winner": winner["index"],
        "seconds": 74.2,
        "lookahead": 2,
        "workers": 2,
    }


def _expert(rng: np.random.Generator, name: str, steps: int) -> dict[str, Any]:
    decay = np.exp(-np.arange(steps) / (steps / 4))
    loss = 0.35 + 2.1 * decay + rng.normal(0, 0.12, steps)
    every = 4
    held = name in SUBTASKS
    drift = 0.18 * (1 - decay) + rng.uniform(0, 0.03, steps)
    checks = range(10, steps + 1, 10) if held else ()
    return {
        "subtask": name,
        "loss": [round(max(0.02, float(value)), 4) for value in loss],
        "anchor": [None if step % every else round(float(a), 4) for step, a in enumerate(drift)] if held else [],
        "anchor_every": every if held else 1,
        "validation": [{"step": step, "loss": round(0.5 + 2.0 * float(decay[step - 1]), 4)} for step in checks],
        "steps": steps,
        "best_step": steps - 10 if name == "irony" else None,
        "stopped_early": name == "irony",
        "batch_size": 8,
        "rows_per_micro_batch": 2 if name == "aste" else 8,
        "rank": 8,
        "learning_rate": 5e-4,
        "seconds": 1.1 * steps,
        "trainable_parameters": 1_628_160,
        "weak_score": round(float(rng.uniform(0.5, 0.9)), 4),
        "base_weak_score": round(float(rng.uniform(0.1, 0.5)), 4),
        "constant_weak_score": round(float(rng.uniform(0.1, 0.45)), 4) if held else None,
        "tokens_per_second": 612.4,
        "gpu_memory_gb": None if name == "joint" else 7.25,
    }


def _interference(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the base, and experts that reach their level on their own subtask and lose a little elsewhere."""
    rows = []
    for expert in ("base", *SUBTASKS):
        for number, subtask in enumerate(SUBTASKS):
            base = LEVELS["base"][number]
            own = LEVELS["experts" if expert == subtask else "base"][number]
            drift = 0.0 if expert in ("base", subtask) else float(rng.normal(-0.04, 0.05))
            score = round(min(1.0, max(0.0, own + drift)), 4)
            rows.append(
                {
                    "expert": expert,
                    "subtask": subtask,
                    "score": score,
                    "se": round(float((base * (1 - base) / 60) ** 0.5), 4),
                    "n": 60,
                }
            )
    return rows


def _contexts(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for number, subtask in enumerate(SUBTASKS):
        zero_shot = LEVELS["unified"][number]
        chosen = "curriculum" if subtask in ("uabsa", "aste") else "zero-shot"
        for context, demonstrations in CONTEXTS.items():
            score = zero_shot if not demonstrations else min(1.0, max(0.0, zero_shot + float(rng.normal(-0.01, 0.06))))
            rows.append(
                {
                    "subtask": subtask,
                    "context": context,
                    "tokens": 48 * demonstrations,
                    "demonstrations": demonstrations,
                    "weak_score": round(score + 0.011, 4),
                    "weak_score_calibrated": None if subtask in ("uabsa", "aste") else round(score + 0.023, 4),
                    "test_score": round(score, 4),
                    "test_se": 0.0412,
                    "chosen": context == chosen,
                    "calibrated": demonstrations > 0 and subtask not in ("uabsa", "aste"),
                }
            )
    return rows


def _build() -> dict[str, Any]:
    rng = np.random.default_rng(derive(7, "report-fixture"))
    names = list(SUBTASKS)
    groups = {"SC": ["sent2", "asc"], "ABSA": ["uabsa", "aste"], "MAST": ["irony", "emotion"]}
    means = []
    for model, levels in LEVELS.items():
        means.append({"model": model, "mean": round(sum(levels) / len(levels), 4), "se": 0.0163})
    mean = {row["model"]: float(row["mean"]) for row in means}
    pairs = [
        ("unified", "base", 0.0191, 0.0001),
        ("unified", "task-arithmetic", 0.0124, 0.008),
        ("unified", "joint", 0.0148, 0.004),
        ("unified+context", "unified", 0.0089, 0.19),
    ]
    timings = [("setup", "child Prefect server", 14.2), ("data", "splits", 1.3), ("data", "base model", 17.8)]
    timings += [("experts", name, 44.0 + number) for number, name in enumerate([*names, "joint"])]
    timings += [("stage 1", group, 74.2) for group in groups] + [("stage 2", "unified", 131.7)]
    timings += [("curriculum", "contexts and gate", 58.3), ("evaluation", "test rows", 96.1), ("report", "report", 4.4)]
    features = [
        {
            "subtask": name,
            "feature": feature,
            "raw": round(float(rng.uniform(0, 4)), 3),
            "scaled": round(min(1.0, float(rng.uniform(0.3, 1.7)) * SUBTASKS[name][4]), 4),
        }
        for name in names
        for feature in FEATURES
    ]
    difficulty = {
        name: round(sum(FEATURES[str(f["feature"])] * float(f["scaled"]) for f in features if f["subtask"] == name), 4)
        for name in names
    }
    return {
        "run": {
            "run_id": digest("report-fixture")[:16],
            "name": "quickstart",
            "created": "2026-01-05T09:30:00Z",
            "command": "memmcl run deployments/configs/quickstart.yaml",
            "seed": 7,
            "base": {"name": "SmolLM2-135M-Instruct", "digest": digest("base"), "licence": "apache-2.0"},
            "versions": {"memmcl": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            "hardware": {"cpus": 2, "memory_gb": 23.4, "device": "cpu"},
            "flow_run_id": "3f0b8c1e-1111-4222-8333-444455556666",
            "store_url": "file:///data/memmcl",
            "config": {"seed": 7, "model": {"name_or_path": "smollm2"}, "experts": {"steps": 40, "rank": 8}},
        },
        "subtasks": [
            {
                "name": name,
                "group": group,
                "title": title,
                "metric": metric,
                "labels": labels,
                "rows": {"train": 320, "weak": 24, "selection": 0, "test": 120},
                "difficulty": difficulty[name],
                "example": {"prompt": f"Text: The soup was great.\n{title}:", "answer": (labels or ["[]"])[0]},
            }
            for name, (group, title, metric, labels, _) in SUBTASKS.items()
        ],
        "models": [{"name": n, "title": t, "kind": k, "description": d} for n, t, k, d in MODELS],
        "scores": _scores(rng),
        "means": means,
        "comparisons": [
            {"a": a, "b": b, "difference": round(mean[a] - mean[b], 4), "se": se, "p": p, "n": 720}
            for a, b, se, p in pairs
        ],
        "retention": [
            {
                "model": model,
                "subtask": name,
                "retention": round(LEVELS[model][i] / LEVELS["experts"][i], 4),
                "nai": round((LEVELS[model][i] - LEVELS["base"][i]) / (LEVELS["experts"][i] - LEVELS["base"][i]), 4),
            }
            for model in MERGED
            for i, name in enumerate(names)
        ],
        "interference": _interference(rng),
        "task_vectors": task_vectors({name: group for name, (group, *_) in SUBTASKS.items()}),
        "searches": [
            *(_search(rng, "stage1", group, genes) for group, genes in groups.items()),
            _search(rng, "stage2", None, list(groups)),
        ],
        "merge": {
            "method": "linear",
            "experts": names,
            "blocks": ["20-24", "25-29"],
            "coefficients": [[round(float(v), 4) for v in rng.uniform(0, 1.3, 2)] for _ in names],
            "adapted_layers": list(LAYERS),
            "lambda_task_arithmetic": 0.6,
        },
        "experts": [
            _expert(rng, "warm", 60),
            *(_expert(rng, name, 40) for name in names),
            *(_expert(rng, name, 240) for name in ("weak", "joint")),
        ],
        "curriculum": {
            "weights": FEATURES,
            "order": sorted(names, key=lambda name: difficulty[name]),
            "features": features,
            "contexts": _contexts(rng),
        },
        "timings": [{"stage": stage, "name": name, "seconds": seconds} for stage, name, seconds in timings],
        "wall_seconds": 764.9,
        "peak_memory_gb": 3.41,
        "data": {
            "source": "embedded corpus",
            "dropped": {"duplicate text": 3, "overlap with test": 1},
            "digests": {name: {part: digest([name, part]) for part in ("train", "weak", "test")} for name in names},
        },
        "notes": ["One seed: the standard errors hold the test rows' share of the variance, not that of training."],
    }


_DOCUMENT = _build()
