"""The whole DAG: rows -> experts -> stage 1 -> stage 2 -> contexts -> evaluation -> report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

from prefect import State, flow
from prefect.futures import PrefectFuture
from prefect.states import Completed

from memmcl.config import RunConfig
from memmcl.files import allowed
from memmcl.store import ArtifactRef, Lease, Refs
from tasks.run.cluster import check_nodes
from tasks.run.journal import Pinned
from tasks.run.memory import PeakMemory
from tasks.run.ray_session import ray_session
from tasks.run.ray_tasks import RayTaskRunner, remote_options
from tasks.run.runtime import Run, read_rows
from tasks.stages.contexts import ContextualModel, gate_contexts
from tasks.stages.data import SplitRefs, longest_first, measure_difficulty, publish_splits
from tasks.stages.evaluate import evaluate_subtask, models_to_evaluate
from tasks.stages.experts import train_expert, train_joint, train_warm, train_weak
from tasks.stages.merge import STAGE_2, build_unified, read_search, search_groups, search_unified, winner_of
from tasks.stages.opening import check_place, finished, held, open_run
from tasks.stages.references import measure_reference
from tasks.stages.report import export_full, publish_report
from tasks.stages.run_artifacts import RunArtifacts, TrainedArtifacts
from tasks.stages.weak import label_weak
from tasks.ui.artifacts import announce, run_name
from tasks.ui.cancel import CancelRequested, cancellable, cancelled
from tasks.ui.logs import log
from tasks.ui.updates import EVALUATION, EXPERTS, REPORT, SEARCH, stage

DEFAULTS = RunConfig()


@flow(name="pipeline", flow_run_name=run_name)
def pipeline(config: RunConfig = DEFAULTS) -> State[ArtifactRef]:
    """Train experts, search the merge in two stages, gate contexts, evaluate, report.

    A run that is finished in the store is returned at once; one that was killed continues where it was.

    Args:
        config: What to train, search and evaluate, on which rows, where.
    """
    started = time.time()
    check_place(config)
    return complete(open_run(config), started)


@flow(name="resume", flow_run_name=run_name)
def resume(config: RunConfig, pinned: Pinned) -> State[ArtifactRef]:
    """Go on with a run of which the settings were kept, or make again what is damaged of it.

    Args:
        config: What it was started with.
        pinned: What it took over from an earlier run.
    """
    started = time.time()
    return complete(open_run(config, pins=lambda _: pinned), started)


def complete(run: Run, started: float) -> State[ArtifactRef]:
    """Run the stages of a run that is not finished and whole."""
    announce(run)
    done = finished(run)
    if done is not None:
        return Completed(name="Reused", message=f"run {run.id[:8]} was finished before", data=done.ref)
    try:
        with held(run) as lease, ray_session(run.config.ray), cancellable():
            report = make_model(run, lease, started)
    except CancelRequested:
        return cancelled()
    return Completed(message=f"run {run.id[:8]} is finished", data=report)


def make_model(run: Run, lease: Lease, started: float) -> ArtifactRef:
    """Run all stages on the Ray session that is open, and return the run's last artifact."""
    config = run.config
    if config.ray.address:
        check_nodes(config.ray, run.store, run.model)
    log().info("run %s: %d subtasks on %s", run.id[:8], len(config.data.subtasks), run.base.name)
    log().info(allowed.described())
    with PeakMemory() as memory:
        with stage(EXPERTS):
            splits, anchors, read = publish_splits(run)
            trained = train_experts(run, splits, anchors)
        with stage(SEARCH):
            searches, unified = merge_experts(run, trained)
        lease.check()
        with stage(EVALUATION):
            gates, evaluations = evaluate_models(run, splits, trained, searches, unified)
        model = export_full(run, unified, return_state=True).result() if config.export == "full" else None
        lease.check()
    artifacts = RunArtifacts(
        splits=splits,
        anchors=anchors,
        data=read,
        trained=trained,
        searches=searches,
        unified=unified,
        gates=gates,
        evaluations=evaluations,
        model=model,
    )
    with stage(REPORT):
        return publish_report(run, artifacts, started, memory.gib)


@flow(name="experts", flow_run_name="experts", task_runner=RayTaskRunner())
def train_experts(run: Run, splits: SplitRefs, anchors: ArtifactRef | None) -> TrainedArtifacts:
    """Train the warm start, one expert per subtask, and the rivals, the longest first; measure each reference.

    Weak rows without labels are labelled by the experts here.
    """
    cfg, pseudo = run.config, run.config.data.weak_source == "pseudo"
    train, rows = split_of(splits, "train"), {"weak": split_of(splits, "weak")}
    rows["selection"] = split_of(splits, "selection") if cfg.data.selection_rows else {}
    with worker(run):
        warm = train_warm.submit(run, train) if cfg.experts.warm_start > 0 else None
        joint = train_joint.submit(run, train) if cfg.evaluation.joint_lora else None
        rival = train_weak.submit(run, rows["weak"]) if cfg.evaluation.weak_lora and not pseudo else None
        order = longest_first(run, train)
        start = resolved(warm) if warm else None
        experts = {name: train_expert.submit(run, name, train[name], anchors, start) for name in order}
        if pseudo:
            rows = {
                kind: {
                    name: resolved(label_weak.submit(run, name, kind, resolved(experts[name]), texts[name]))
                    for name in order
                    if name in texts
                }
                for kind, texts in rows.items()
            }
            rival = train_weak.submit(run, rows["weak"]) if cfg.evaluation.weak_lora else None
        weak, selection = rows["weak"], rows["selection"]
        references = {
            name: measure_reference.submit(
                run, name, resolved(experts[name]), weak[name], train[name], selection.get(name)
            )
            for name in order
        }
        return TrainedArtifacts(
            warm=warm and warm.result(),
            joint=joint and joint.result(),
            weak_lora=rival and rival.result(),
            experts=collect(experts),
            weak=collect(weak),
            selection=collect(selection),
            references=collect(references),
        )


@flow(name="merge", flow_run_name="merge")
def merge_experts(run: Run, trained: TrainedArtifacts) -> tuple[Refs, ArtifactRef]:
    """Search the group models, then the unified model, and write it as an adapter."""
    stage1 = search_groups(run, trained, return_state=True).result()
    stage2 = search_unified(run, stage1, trained, return_state=True).result()
    return stage1 | stage2, build_unified(run, stage2[STAGE_2], trained.experts, return_state=True).result()


@flow(name="evaluation", flow_run_name="evaluation", task_runner=RayTaskRunner())
def evaluate_models(
    run: Run, splits: SplitRefs, trained: TrainedArtifacts, searches: Refs, unified: ArtifactRef
) -> tuple[Refs, Refs]:
    """Choose a context per subtask on weak rows, then score every model on the test rows; the hardest first."""
    _, order = measure_difficulty(run, {name: read_rows(run, refs["train"]) for name, refs in splits.items()})
    weak, test = trained.weak, split_of(splits, "test")
    model = ContextualModel(unified=unified, train=split_of(splits, "train"), order=order)
    winners = {name: winner_of(read_search(run, ref)) for name, ref in searches.items()}
    with worker(run):
        gates = {name: gate_contexts.submit(run, name, model, weak[name]) for name in reversed(order)}
        scores = {}
        for name, gate in gates.items():
            evaluated = models_to_evaluate(run, trained, winners, name)
            scores[name] = evaluate_subtask.submit(run, name, evaluated, model, resolved(gate), weak[name], test[name])
        return collect(gates), collect(scores)


def split_of(splits: SplitRefs, name: str) -> Refs:
    """Return one split of every subtask."""
    return {subtask: refs[name] for subtask, refs in splits.items()}


def worker(run: Run) -> Any:
    """Return the context in which submitted tasks take one worker's share of the cluster."""
    cfg = run.config.ray
    # Ray starts a new process for every task with a GPU: a CUDA context stays on the GPU that it was made on. Models
    # that run on the CPU have none, and their processes may keep them.
    kept = {"max_calls": 0} if cfg.gpus_per_worker > 0 and run.base.device == "cpu" else {}
    return remote_options(num_cpus=cfg.cpus_per_worker, num_gpus=cfg.gpus_per_worker, **kept)


def resolved(future: PrefectFuture[ArtifactRef]) -> ArtifactRef:
    """Return a future as the type that it has as an argument of a task: Prefect hands its result to the task."""
    return cast("ArtifactRef", future)


def collect(futures: Mapping[str, PrefectFuture[ArtifactRef] | ArtifactRef]) -> Refs:
    """Wait for all futures and return the artifacts; the first failure is raised once all have ended."""
    for future in futures.values():
        if isinstance(future, PrefectFuture):
            future.wait()
    return {
        name: future.result() if isinstance(future, PrefectFuture) else future
        for name, future in sorted(futures.items())
    }
