"""Experts: one LoRA training each, the joint rival, and what each expert reaches on its own weak rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import State

from memmcl.backbone.forward import Row
from memmcl.experts import adapter
from memmcl.experts.train import STAGE_VERSION, train_adapter
from memmcl.store import ArtifactRef
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask
from tasks.cluster import place
from tasks.evaluate import adapted_model, make_probe, weak_values
from tasks.progress import shown
from tasks.runtime import (
    Run,
    load_manifest,
    log,
    read_rows,
    release_memory,
    resident,
    reuse_or_make,
    worth_retrying,
)

JOINT = "joint"


@task(
    name="expert", task_run_name="expert {subtask}", cache_policy=NO_CACHE, retries=1, retry_condition_fn=worth_retrying
)
def train_expert(run: Run, subtask: str, train: ArtifactRef, anchors: ArtifactRef) -> State[ArtifactRef]:
    """Train the expert of one subtask."""

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        _, prompter = resident(run)
        others = {name: rows for name, rows in _anchor_rows(run, anchors, prompter).items() if name != subtask}
        return _train(run, subtask, training_rows(prompter, run.subtask(subtask), read_rows(run, train)), others)

    settings = run.config.experts.model_dump(mode="json")
    return reuse_or_make(
        run, "expert", name=f"expert {subtask}", inputs=[train, anchors],
        config={"subtask": subtask, "experts": settings, "model": run.model_key()},
        stage_version=STAGE_VERSION, make=make,
    )  # fmt: skip


@task(
    name="joint LoRA", task_run_name="joint LoRA", cache_policy=NO_CACHE, retries=1, retry_condition_fn=worth_retrying
)
def train_joint(run: Run, train: Mapping[str, ArtifactRef]) -> State[ArtifactRef]:
    """Train the rival of merging: one LoRA on all subtasks' rows, with as many steps as all experts together."""

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        _, prompter = resident(run)
        rows = [
            row for name, ref in sorted(train.items())
            for row in training_rows(prompter, run.subtask(name), read_rows(run, ref))
        ]  # fmt: skip
        return _train(run, JOINT, rows, {}, times=len(train))

    settings = run.config.experts.model_dump(mode="json", exclude={"anchor_weight", "anchor_batch_size", "anchor_rows"})
    return reuse_or_make(
        run, "expert", name="joint LoRA", inputs=[train[name] for name in sorted(train)],
        config={"subtask": JOINT, "experts": settings, "model": run.model_key()},
        stage_version=STAGE_VERSION, make=make,
    )  # fmt: skip


@task(
    name="reference",
    task_run_name="reference {subtask}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=worth_retrying,
)
def measure_reference(run: Run, subtask: str, expert: ArtifactRef, weak: ArtifactRef) -> State[ArtifactRef]:
    """Measure what the expert and the base reach on the subtask's weak rows: the unit of every retention."""

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        backbone, prompter = resident(run)
        rows = read_rows(run, weak)
        probe = make_probe(run, backbone, prompter, run.subtask(subtask), rows)
        measured = {"base": weak_values(run, probe, run.subtask(subtask), rows)}
        with adapted_model(run, expert):
            measured["expert"] = weak_values(run, probe, run.subtask(subtask), rows)
        return {"reference.json": json.dumps(measured).encode()}, measured

    evaluation = run.config.evaluation.model_dump(mode="json", include={"batch_size", "max_new_tokens", "calibration"})
    return reuse_or_make(
        run, "reference", name=f"reference {subtask}", inputs=[expert, weak],
        config={"evaluation": evaluation, "fitness": run.config.search.fitness, "model": run.model_key()},
        stage_version=STAGE_VERSION, make=make,
    )  # fmt: skip


def training_rows(prompter: Prompter, subtask: Subtask, examples: Sequence[Example]) -> list[Row]:
    """Return the examples as token ids: prompt, and the answer with its end token."""
    return [Row(prompter.prompt(subtask, row), (prompter.answer(row.answer),)) for row in examples]


def _train(
    run: Run, name: str, rows: Sequence[Row], anchors: Mapping[str, Sequence[Row]], times: int = 1
) -> tuple[dict[str, bytes], dict[str, Any]]:
    backbone, _ = resident(run)
    cfg = run.config.experts
    steps, size = cfg.steps * times, cfg.batch_size
    log().info("%s: training on %d rows, %d steps of %d; on %s", name, len(rows), steps, size, place())
    with shown(f"expert {name}" if name != JOINT else "joint LoRA", cfg.steps * times) as move:
        trained = train_adapter(
            backbone,
            rows,
            anchors,
            target_modules=cfg.target_modules,
            rank=cfg.rank,
            alpha=cfg.alpha,
            learning_rate=cfg.learning_rate,
            warmup=cfg.warmup,
            weight_decay=cfg.weight_decay,
            clip=cfg.clip,
            steps=cfg.steps * times,
            batch_size=cfg.batch_size,
            anchor_weight=cfg.anchor_weight if anchors else 0.0,
            anchor_batch_size=cfg.anchor_batch_size,
            seed=run.seed("expert", name),
            progress=lambda done, steps, loss: move(done, steps, f"loss {loss:.3f}"),
        )
    release_memory()
    files = adapter.to_files(trained.factors, base_name=run.base.name, rank=cfg.rank, alpha=cfg.alpha)
    metrics = {
        "loss": [round(value, 5) for value in trained.loss],
        "anchor": [round(value, 6) for value in trained.anchor],
        "steps": cfg.steps * times,
        "trainable_parameters": trained.parameters,
        "tokens_per_second": round(trained.tokens / trained.seconds, 1),
    }
    return files, metrics


def _anchor_rows(run: Run, anchors: ArtifactRef, prompter: Prompter) -> dict[str, list[Row]]:
    """Return the anchor rows of every subtask, as token ids."""
    rows = iter(read_rows(run, anchors))
    counts: dict[str, int] = load_manifest(run, anchors).metrics["by_subtask"]
    return {
        name: training_rows(prompter, run.subtask(name), list(islice(rows, count))) for name, count in counts.items()
    }
