"""Experts, the warm start that they are trained on, and the rivals of merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from prefect import State
from prefect.states import Completed

from memmcl.backbone.batches import TokenizedRow
from memmcl.experts.train import STAGE_VERSION
from memmcl.store import ArtifactRef, Refs, cache_key
from memmcl.suite.configured import lenders
from memmcl.suite.prompts import Prompter
from memmcl.suite.splits import Splits
from tasks.run.models import JOINT, WARM, WEAK_LORA
from tasks.run.runtime import Run, cannot_remake, load_adapter, open_store, read_rows, stage_task
from tasks.stages.anchors import read_anchors
from tasks.stages.data import split_ref
from tasks.stages.training import Material, TrainingPlan, describe, split_rows, token_rows, train_or_reuse
from tasks.ui.logs import log
from tasks.ui.updates import Update, announce


@stage_task("warm start", retries=1)
def train_warm(run: Run, train: Refs) -> State[ArtifactRef]:
    """Train the adapter that all experts start from, on all subtasks' rows, with its share of all their steps.

    A pinned one is used as it is; CorruptArtifact if it is damaged and this run's rows would give another.
    """
    pinned, rows = run.pinned.warm, [train[name] for name in sorted(train)]
    if pinned is not None:
        if open_store(run).find(pinned.kind, pinned.key) is not None:
            log().info("warm start: pinned, reused")
            announce(Update("warm start", WARM, "reused"))
            return Completed(name="Reused", message=f"{pinned} is pinned", data=pinned)
        if _warm_key(run, rows) != pinned.key:
            raise cannot_remake(run, pinned)
    return _train_on_all(run, _warm_plan(run), train)


@stage_task("expert", run_name="expert {subtask}", retries=1)
def train_expert(
    run: Run, subtask: str, train: ArtifactRef, anchors: ArtifactRef | None, warm: ArtifactRef | None
) -> State[ArtifactRef]:
    """Train the expert of one subtask: a delta on the warm start, if there is one.

    It is anchored while it trains, or afterwards: then it first trains without an anchor, as a separate artifact.
    """
    cfg = run.config.experts
    steps = max(1, round((1 - cfg.warm_start) * cfg.steps))
    afterwards = cfg.anchor_after > 0
    before = max(1, round((1 - cfg.anchor_after) * steps))
    first = TrainingPlan(
        label=subtask,
        title=f"plain expert {subtask}" if afterwards else f"expert {subtask}",
        seed=("expert", subtask),
        steps=before,
        init=cfg.init,
        anchored=cfg.anchor_weight > 0 and not afterwards,
    )
    first_anchors = anchors if first.anchored or cfg.init == "osrm" else None
    state = train_or_reuse(
        run,
        first,
        inputs=[ref for ref in (train, first_anchors, warm) if ref is not None],
        gather=lambda prompter: _expert_material(run, prompter, subtask, train, first_anchors),
        warm=warm,
    )
    if not afterwards:
        return state
    assert anchors is not None, "the configuration refuses anchor_after without an anchor"
    plain = cast("ArtifactRef", state.data)
    second = TrainingPlan(
        label=f"{subtask}, after the fact",
        title=f"expert {subtask}",
        seed=("expert", subtask, "after"),
        steps=max(1, steps - before),
        anchored=True,
        teacher="self",
    )
    return train_or_reuse(
        run,
        second,
        inputs=[train, plain, anchors, *([warm] if warm else [])],
        gather=lambda prompter: _expert_material(run, prompter, subtask, train, anchors, plain),
        warm=warm,
    )


@stage_task("joint LoRA", retries=1)
def train_joint(run: Run, train: Refs) -> State[ArtifactRef]:
    """Train the rival of merging: one LoRA on all subtasks' rows, with as many steps as all experts together."""
    steps = run.config.experts.steps * len(train)
    return _train_on_all(run, TrainingPlan(JOINT, "joint LoRA", seed=("expert", JOINT), steps=steps), train)


@stage_task("weak LoRA", retries=1)
def train_weak(run: Run, weak: Refs) -> State[ArtifactRef]:
    """Train a rival of merging on all the rows that searches see: one LoRA with as many steps as the joint one."""
    steps = run.config.experts.steps * len(weak)
    plan = TrainingPlan(WEAK_LORA, "weak LoRA", seed=("expert", WEAK_LORA), steps=steps, keeps_rows=False)
    return _train_on_all(run, plan, weak)


def warm_config(run: Run) -> dict[str, Any]:
    """Return all that decides the run's warm start but its rows; a pinned one must have the same."""
    return describe(run, _warm_plan(run))


def warm_key(run: Run, splits: Splits) -> str | None:
    """Return the key of the warm start that the run uses: the pinned one, or a new one; None without one."""
    if run.config.experts.warm_start == 0:
        return None
    if run.pinned.warm is not None:
        return run.pinned.warm.key
    return _warm_key(run, [split_ref(splits, name, "train") for name in sorted(splits.parts)])


def _warm_key(run: Run, rows: Sequence[ArtifactRef]) -> str:
    return cache_key(WARM, inputs=rows, config=warm_config(run), stage_version=STAGE_VERSION, seed=run.config.seed)


def _warm_plan(run: Run) -> TrainingPlan:
    cfg, names = run.config.experts, tuple(sorted(run.config.data.subtasks))
    steps = max(1, round(cfg.warm_start * cfg.steps * len(names)))
    return TrainingPlan(WARM, "warm start", seed=("expert", WARM), steps=steps, kind=WARM, subtasks=names)


def _train_on_all(run: Run, plan: TrainingPlan, refs: Refs) -> State[ArtifactRef]:
    """Train one adapter on the rows of all subtasks, less those that the plan keeps for validation."""

    def gather(prompter: Prompter) -> Material:
        rows: dict[str, list[TokenizedRow]] = {}
        validation: dict[str, list[TokenizedRow]] = {}
        for name, ref in sorted(refs.items()):
            examples = read_rows(run, ref)
            used, kept = split_rows(run, examples, name) if plan.keeps_rows else (examples, [])
            rows[name] = token_rows(prompter, run.subtask(name), used)
            if kept:
                validation[name] = token_rows(prompter, run.subtask(name), kept)
        return Material(rows, validation=validation)

    return train_or_reuse(run, plan, inputs=[ref for _, ref in sorted(refs.items())], gather=gather)


def _expert_material(
    run: Run,
    prompter: Prompter,
    subtask: str,
    train: ArtifactRef,
    anchors: ArtifactRef | None,
    plain: ArtifactRef | None = None,
) -> Material:
    """Return the training rows of one subtask, and the anchor rows of all others."""
    used, kept = split_rows(run, read_rows(run, train), subtask)
    known, others = lenders(run.config), read_anchors(run, anchors) if anchors else {}
    asked = run.subtask(subtask)
    return Material(
        rows={subtask: token_rows(prompter, asked, used)},
        anchors={name: token_rows(prompter, known[name], rows) for name, rows in others.items() if name != subtask},
        validation={subtask: token_rows(prompter, asked, kept)} if kept and plain is None else {},
        start=load_adapter(run, plain) if plain else None,
    )
