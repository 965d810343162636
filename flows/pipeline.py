"""The whole DAG: rows -> experts -> stage 1 -> stage 2 -> contexts -> evaluation -> report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from prefect import flow
from prefect.states import Completed, State

from memmcl.config import RunConfig
from memmcl.files import allowed
from memmcl.store import ArtifactRef, Lease, Refs
from tasks.run.cluster import check_nodes
from tasks.run.journal import Pinned
from tasks.run.memory import PeakMemory
from tasks.run.ray_session import ray_session
from tasks.run.ray_tasks import RayTaskRunner, remote_options
from tasks.run.runtime import Run, log
from tasks.run.session import check_place, finished, held, open_run
from tasks.stages.contexts import gate_contexts
from tasks.stages.data import SplitRefs, longest_first, publish_splits
from tasks.stages.evaluate import evaluate_subtask
from tasks.stages.experts import train_expert, train_joint, train_warm, train_weak
from tasks.stages.merge import STAGE_2, build_unified, read_search, search_groups, search_unified, winner_of
from tasks.stages.references import measure_reference
from tasks.stages.report import export_full, publish_report
from tasks.stages.run_artifacts import RunArtifacts, TrainedArtifacts, contestants, measure_difficulty
from tasks.stages.weak import label_weak
from tasks.ui.artifacts import announce, run_name
from tasks.ui.cancel import CancelRequested, cancellable, cancelled
from tasks.ui.updates import EVALUATION, EXPERTS, REPORT, SEARCH, stage

DEFAULTS = RunConfig()


@flow(name="pipeline", flow_run_name=run_name)
def pipeline(config: RunConfig = DEFAULTS) -> State[ArtifactRef]:
    """Train experts, search the merge in two stages, gate contexts, evaluate, report.

    A run that is finished in the store is returned at once; one that was killed goes on where it was.

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
            _, order = measure_difficulty(run, splits)
            gates, evaluations = evaluate_models(run, splits, trained, searches, unified, order)
        model = export_full(run, unified, return_state=True).result() if config.export == "full" else None
        lease.check()
    made = RunArtifacts(
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
        return publish_report(run, made, started, memory.gib)


@flow(name="experts", flow_run_name="experts", task_runner=RayTaskRunner())
def train_experts(run: Run, splits: SplitRefs, anchors: ArtifactRef | None) -> TrainedArtifacts:
    """Train what experts stand on, one expert per subtask, and the rivals, the longest first; measure each reference.

    Weak rows without labels are labelled by the experts here.
    """
    cfg, pseudo = run.config, run.config.data.weak_source == "pseudo"
    train, weak = part(splits, "train"), part(splits, "weak")
    with worker(run):
        warm = train_warm.submit(run, train) if cfg.experts.warm_start > 0 else None
        joint = train_joint.submit(run, train) if cfg.evaluation.joint_lora else None
        rival = train_weak.submit(run, weak) if cfg.evaluation.weak_lora and not pseudo else None
        order = longest_first(run, train)
        trained = {name: train_expert.submit(run, name, train[name], anchors, warm) for name in order}
        selection = part(splits, "selection") if cfg.data.selection_rows else {}
        labelled, chosen = weak, selection
        if pseudo:
            labelled, chosen = (
                {
                    name: label_weak.submit(run, name, kind, trained[name], texts[name])
                    for name in order
                    if name in texts
                }
                for kind, texts in (("weak", weak), ("selection", selection))
            )
        measured = {
            name: measure_reference.submit(run, name, trained[name], labelled[name], train[name], chosen.get(name))
            for name in order
        }
        rival = train_weak.submit(run, labelled) if cfg.evaluation.weak_lora and pseudo else rival
        return TrainedArtifacts(
            warm=result(warm),
            joint=result(joint),
            weak_lora=result(rival),
            experts=collect(trained),
            weak=collect(labelled) if pseudo else weak,
            selection=collect(chosen) if pseudo else selection,
            references=collect(measured),
        )


@flow(name="merge", flow_run_name="merge")
def merge_experts(run: Run, trained: TrainedArtifacts) -> tuple[Refs, ArtifactRef]:
    """Search the group models, then the unified model, and write it as an adapter."""
    stage1 = search_groups(run, trained.grounds, return_state=True).result()
    stage2 = search_unified(run, stage1, trained.grounds, return_state=True).result()
    return stage1 | stage2, build_unified(run, stage2[STAGE_2], trained.experts, return_state=True).result()


@flow(name="evaluation", flow_run_name="evaluation", task_runner=RayTaskRunner())
def evaluate_models(
    run: Run, splits: SplitRefs, trained: TrainedArtifacts, searches: Refs, unified: ArtifactRef, order: Sequence[str]
) -> tuple[Refs, Refs]:
    """Choose a context per subtask on weak rows, then put every model to the test rows; the longest first."""
    train, test, weak = part(splits, "train"), part(splits, "test"), trained.weak
    hardest_first = list(reversed(order))
    winners = {name: winner_of(read_search(run, ref)) for name, ref in searches.items()}
    with worker(run):
        gated = {name: gate_contexts.submit(run, name, unified, weak[name], train, order) for name in hardest_first}
        scored = {
            name: evaluate_subtask.submit(
                run,
                name,
                contestants(run, trained, winners, name),
                unified,
                gated[name],
                weak[name],
                test[name],
                train,
                order,
            )
            for name in hardest_first
        }
        return collect(gated), collect(scored)


def part(splits: SplitRefs, name: str) -> Refs:
    """Return one part of every subtask's rows."""
    return {subtask: parts[name] for subtask, parts in splits.items()}


def worker(run: Run) -> Any:
    """Return the context in which submitted tasks take one worker's share of the cluster."""
    cfg = run.config.ray
    # Ray starts a new process for every task with a GPU: a CUDA context stays on the GPU that it was made on. Models
    # that run on the CPU have none, and their processes may keep them.
    kept = {"max_calls": 0} if cfg.gpus_per_worker > 0 and run.base.device == "cpu" else {}
    return remote_options(num_cpus=cfg.cpus_per_worker, num_gpus=cfg.gpus_per_worker, **kept)


def collect(futures: Mapping[str, Any]) -> Refs:
    """Wait for all futures and return their artifacts; the first failure is raised once all have ended."""
    for future in futures.values():
        future.wait()
    return {name: future.result() for name, future in sorted(futures.items())}


def result(future: Any | None) -> ArtifactRef | None:
    """Wait for one future and return its artifact; None where there is none."""
    ref: ArtifactRef | None = future.result() if future is not None else None
    return ref
