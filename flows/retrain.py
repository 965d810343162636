"""Retraining: what new data changes is trained again, and the result takes the champion's place if it is better."""

from __future__ import annotations

import time

from prefect import State, flow
from prefect.states import Completed

from flows.pipeline import DEFAULTS, collect, make_model, worker
from memmcl.config import RunConfig
from memmcl.errors import Conflict
from memmcl.evaluate.promotion import Judgement
from memmcl.store import ArtifactRef, Manifest
from tasks.run.inputs import find_inputs
from tasks.run.ray_session import ray_session
from tasks.run.ray_tasks import RayTaskRunner
from tasks.run.runtime import Run, open_store
from tasks.stages import promotion
from tasks.stages.opening import check_place, finished, held, open_run
from tasks.stages.pins import pins_of
from tasks.stages.promotion import Champion
from tasks.ui.artifacts import announce, run_name, show_changes, show_judgement
from tasks.ui.cancel import CancelRequested, cancellable, cancelled
from tasks.ui.logs import log
from tasks.ui.updates import GATE, stage


@flow(name="retrain", flow_run_name=run_name)
def retrain(config: RunConfig = DEFAULTS) -> State[ArtifactRef]:
    """Retrain on the rows of today, compare with the champion on the same test rows, promote what is better.

    Ends as Unchanged when these rows and settings gave the champion, or a challenger that was turned down; as
    NotPromoted when the challenger is not better beyond noise; as Promoted when it took the champion's place.
    Only experts whose rows changed are trained; all else comes from the store.

    Args:
        config: What to train, search and evaluate, on which rows, where; and which champion to challenge.
    """
    started = time.time()
    check_place(config)
    inputs = find_inputs(config)
    champion = promotion.find_champion(inputs.store, config.promotion.champion)
    run = open_run(config, inputs, lambda run: pins_of(run, champion, inputs.splits))
    announce(run)
    if champion:
        changes = promotion.changed_rows(inputs.store, champion, inputs.splits)
        show_changes(changes, champion.id)
        altered = [row["subtask"] for row in changes if set(row.values()) - {row["subtask"], "same"}]
        log().info("rows that differ from the champion's: %s", ", ".join(altered) or "none")
    reason = promotion.nothing_to_do(inputs.store, run, champion, inputs.splits)
    if reason is not None:
        log().info("unchanged: %s", reason)
        return Completed(name="Unchanged", message=reason)
    if champion and champion.run.id != run.id:
        promotion.check_whole(inputs.store, champion)
    try:
        with held(run) as lease, ray_session(config.ray), cancellable():
            challenger = finished(run) or open_store(run).load(make_model(run, lease, started))
            lease.check()
            return decide(run, challenger)
    except CancelRequested:
        return cancelled()


def decide(run: Run, challenger: Manifest) -> State[ArtifactRef]:
    """Compare the challenger with the champion; one that loses a race between two promotions is compared again."""
    while True:
        champion = promotion.find_champion(open_store(run), run.config.promotion.champion)
        if champion is None:
            why = "the first of its name"
        elif champion.run.id == run.id:  # by another process meanwhile, or it was damaged and is whole again
            message = f"run {champion.id} is the champion"
            return Completed(name="Unchanged", message=message, data=challenger.ref)
        else:
            judged = promotion.read_judgement(open_store(run), run, champion) or challenge(run, challenger, champion)
            show_judgement(judged, run.id[:8], champion.id)
            why = judged.reason
            if not judged.promoted:
                log().info("not promoted: %s", why)
                return Completed(name="NotPromoted", message=f"run {run.id[:8]} is {why}", data=challenger.ref)
        try:
            promotion.take_place(run, challenger, champion, why)
        except Conflict:
            log().info("another run became champion meanwhile; comparing with that one")
            continue
        log().info("run %s is champion: %s", run.id[:8], why)
        return Completed(name="Promoted", message=f"run {run.id[:8]} is champion: {why}", data=challenger.ref)


@flow(name="champion gate", flow_run_name="champion gate", task_runner=RayTaskRunner())
def challenge(run: Run, challenger: Manifest, champion: Champion) -> Judgement:
    """Score the champion on the challenger's test rows, subtask by subtask, and judge."""
    tests = {ref.name.removesuffix(" test"): ref for ref in challenger.inputs if ref.name.endswith(" test")}
    both = [name for name in champion.order if name in run.config.data.subtasks]
    theirs, model = champion.on_hardware_of(run), champion.model
    with stage(GATE), worker(run):
        scored = {}
        for name in both:
            gate = champion.refs[f"gate:context gate {name}"]
            scored[name] = promotion.score_champion.submit(theirs, name, model, gate, tests[name])
        return promotion.judge_challenger(run, challenger, champion, collect(scored))
