"""One training as a stage: its key, its checkpoints, its progress, its files and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from prefect import State

from memmcl.adapters import format as adapter
from memmcl.backbone.activations import prune_activations
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.resident import resident, resident_activations
from memmcl.errors import StoreError, TrainingError
from memmcl.experts import checkpoint
from memmcl.experts.settings import (
    Anchoring,
    Checkpointing,
    Init,
    LoraShape,
    Optimisation,
    Stopping,
    Teacher,
    TrainingData,
    TrainingSettings,
)
from memmcl.experts.train import STAGE_VERSION, Moved, TrainedAdapter, train_adapter
from memmcl.merge.build import merged_factors
from memmcl.merge.export import adapter_files
from memmcl.store import ArtifactRef, cache_key
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask
from tasks.run.cluster import place
from tasks.run.models import WARM, folded
from tasks.run.runtime import Run, load_adapter, open_store, release_memory, reuse_or_make
from tasks.ui.logs import log
from tasks.ui.progress import shown

STANDALONE = "standalone"
"""The folder in an expert's artifact that holds it with its warm start, as one adapter on the plain base."""
_ADAPTER = {"target_modules", "rank", "alpha", "rslora", "dropout"}
_OPTIMISER = {"learning_rate", "schedule", "warmup", "weight_decay", "clip"}
_BATCH = {"batch_size", "micro_batch_size", "gradient_checkpointing"}
_ANCHOR = {"anchor_weight", "anchor_every", "anchor_delay", "anchor_batch_size"}
_VALIDATION = {"validate_every", "patience"}


@dataclass(frozen=True)
class TrainingPlan:
    """One training, apart from its rows.

    label: its name in logs and tables; title: of its artifact. seed: the names that its seed is derived from.
    subtasks: those whose rows it mixes, if that decides its key. keeps_rows: whether rows are kept out for validation;
    with gold answers they decide which step is kept. teacher: see `TrainingSettings`.
    """

    label: str
    title: str
    seed: tuple[str, ...]
    steps: int
    kind: str = "expert"
    subtasks: tuple[str, ...] = ()
    init: Init = "kaiming"
    anchored: bool = False
    keeps_rows: bool = True
    teacher: Teacher = "gold"


@dataclass(frozen=True)
class Material(TrainingData):
    """The data of a training. start: the adapter that it starts from, None for a new one."""

    start: adapter.Adapter | None = None


def describe(run: Run, plan: TrainingPlan) -> dict[str, Any]:
    """Return the settings that decide the result of a training; nothing else may change its key."""
    cfg, names = run.config.experts, _ADAPTER | _OPTIMISER | _BATCH
    if plan.anchored:
        names |= _ANCHOR
    if plan.keeps_rows and cfg.validation_rows:
        names |= {"validation_rows"} | (_VALIDATION if plan.teacher == "gold" else set())
    return {
        "training": list(plan.seed),
        "experts": {**cfg.model_dump(mode="json", include=names), "init": plan.init},
        "steps": plan.steps,
        "teacher": plan.teacher,
        **({"subtasks": list(plan.subtasks)} if plan.subtasks else {}),
        "model": run.model.key(),
    }


def train_or_reuse(
    run: Run,
    plan: TrainingPlan,
    *,
    inputs: Sequence[ArtifactRef],
    gather: Callable[[Prompter], Material],
    warm: ArtifactRef | None = None,
) -> State[ArtifactRef]:
    """Return the artifact of a training: from the store if it is there, else trained, from its last checkpoint.

    gather: returns its rows. warm: the warm start that the adapter is a delta on, added to the base meanwhile.
    """
    config = describe(run, plan)
    key = cache_key(plan.kind, inputs=inputs, config=config, stage_version=STAGE_VERSION, seed=run.config.seed)

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        with folded(run, [warm]) if warm else nullcontext(resident(run.model)) as (_, prompter):
            trained = _train(run, plan, gather(prompter), key)
        release_memory()
        prune_activations()
        return _files(run, plan, trained, warm), _metrics(run, trained)

    state = reuse_or_make(
        run, plan.kind, name=plan.title, inputs=inputs, config=config, stage_version=STAGE_VERSION, make=make
    )
    open_store(run).drop_checkpoint(key)
    return state


def split_rows(run: Run, examples: Sequence[Example], subtask: str) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the rows to train on, and the last ones, kept for validation; TrainingError where all would be kept."""
    kept = run.config.experts.validation_rows
    if kept >= len(examples):
        raise TrainingError(
            f"{subtask} has {len(examples)} training rows, and experts.validation_rows keeps {kept} of them; lower it, "
            "or raise data.train_rows"
        )
    return examples[: len(examples) - kept], examples[len(examples) - kept :]


def token_rows(prompter: Prompter, subtask: Subtask, examples: Sequence[Example]) -> list[TokenizedRow]:
    """Return the examples as token ids: prompt, and the answer with its end token."""
    return [TokenizedRow(prompter.prompt(subtask, row), (prompter.answer(row.answer),)) for row in examples]


def _train(run: Run, plan: TrainingPlan, material: Material, key: str) -> TrainedAdapter:
    """Train from the last checkpoint that can be used; where there is none, from the first step."""
    rows, batch = sum(map(len, material.rows.values())), run.config.experts.batch_size
    log().info("%s: training on %d rows, %d steps of %d; on %s", plan.label, rows, plan.steps, batch, place())
    resume, done = open_store(run).read_checkpoint(key), 0
    if resume is not None:
        try:
            done = checkpoint.decode(resume)[0].step
            log().info("%s: goes on from step %d of %d", plan.label, done, plan.steps)
        except TrainingError as error:
            log().warning("%s: trained anew: %s", plan.label, error)
            resume = None
    return _session(run, plan, material, key, resume, done)


def _session(
    run: Run, plan: TrainingPlan, material: Material, key: str, resume: bytes | None, done: int
) -> TrainedAdapter:
    moved = False

    def save(data: bytes) -> None:
        try:
            open_store(run).save_checkpoint(key, data)
        except StoreError as error:  # it costs time alone, and only if the training is killed
            log().warning("%s: no checkpoint at this step: %s", plan.label, error)

    with shown(plan.title, plan.steps, kind=plan.kind, start=done) as move:

        def progress(now: Moved) -> None:
            nonlocal moved
            moved = True
            move(now.step, now.steps, f"loss {now.loss:.3f}, {now.tokens_per_second:,.0f} tokens/s")

        try:
            return train_adapter(
                resident(run.model)[0],
                material,
                _settings(run, plan, material),
                start=material.start,
                activations=resident_activations(run.model),
                checkpointing=Checkpointing(save, run.config.experts.checkpoint_every, resume),
                progress=progress,
            )
        except TrainingError as error:
            if resume is None or moved:
                raise
            log().warning("%s: trained anew: %s", plan.label, error)
    return _session(run, plan, material, key, None, 0)


def _settings(run: Run, plan: TrainingPlan, material: Material) -> TrainingSettings:
    cfg = run.config.experts
    anchoring = Anchoring(cfg.anchor_weight, cfg.anchor_batch_size, cfg.anchor_every, cfg.anchor_delay)
    return TrainingSettings(
        lora=LoraShape(cfg.target_modules, cfg.rank, cfg.alpha, cfg.rslora, cfg.dropout, plan.init),
        optimisation=Optimisation(
            steps=plan.steps,
            batch_size=cfg.batch_size,
            learning_rate=cfg.learning_rate,
            warmup=cfg.warmup,
            curve=cfg.schedule,
            weight_decay=cfg.weight_decay,
            clip=cfg.clip,
            micro_batch=cfg.micro_batch_size,
            recompute=cfg.gradient_checkpointing,
        ),
        seed=run.seed(*plan.seed),
        anchoring=anchoring if plan.anchored else None,
        stopping=Stopping(cfg.validate_every, cfg.patience) if material.validation else None,
        teacher=plan.teacher,
    )


def _files(run: Run, plan: TrainingPlan, trained: TrainedAdapter, warm: ArtifactRef | None) -> dict[str, bytes]:
    """Return a PEFT adapter; where it is a delta on a warm start, beside it both as one adapter on the plain base."""
    cfg = run.config.experts
    files = adapter.to_files(
        trained.factors, base_name=run.base.name, rank=cfg.rank, alpha=cfg.alpha, rslora=cfg.rslora
    )
    if warm is None:
        return files
    both = {WARM: load_adapter(run, warm), plan.label: trained.factors}
    ones = dict.fromkeys(both, (1.0,))
    whole = merged_factors(both, ones, lowest=run.base.split, layers=run.base.layers)
    standalone = adapter_files(whole, base_name=run.base.name)
    return {**files, **{f"{STANDALONE}/{name}": data for name, data in standalone.items()}}


def _metrics(run: Run, trained: TrainedAdapter) -> dict[str, Any]:
    return {
        "loss": [round(value, 5) for value in trained.loss],
        "anchor": [None if value is None else round(value, 6) for value in trained.anchor],
        "validation": [[step, round(value, 5)] for step, value in trained.validation],
        "best_step": trained.best_step,
        "stopped_early": trained.stopped_early,
        "steps": len(trained.loss),
        "batch_size": run.config.experts.batch_size,
        "micro_batch": trained.micro_batch,
        "trainable_parameters": trained.parameters,
        "tokens_per_second": round(trained.tokens / trained.seconds, 1),
        "gpu_bytes": trained.gpu_bytes,
    }
