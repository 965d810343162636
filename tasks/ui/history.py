"""The run history: which flow run this is, and telling the truth about runs whose process died."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from uuid import UUID

import httpx
from prefect import State, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Crashed

from memmcl.store import Lease
from memmcl.urls import redact

_LIVE = {StateType.RUNNING, StateType.PENDING, StateType.CANCELLING}


def root_flow_run_id() -> str | None:
    """Return the id of the outermost flow run that is running now."""
    run_id = flow_run.get_root_flow_run_id()
    return str(run_id) if run_id else None


def close_abandoned(lease: Lease) -> None:
    """Mark the flow runs of holders that died as Crashed, so that none stays Running in the history."""
    died: State = Crashed(message="The process died; a later run of the same command took over.")
    for owner in lease.abandoned:
        try:
            flow_run_id = UUID(owner["flow_run_id"])
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # it names no flow run
        if str(flow_run_id) == root_flow_run_id():
            continue
        with get_client(sync_client=True) as client:
            try:
                run = client.read_flow_run(flow_run_id)
            except ObjectNotFound:
                continue  # one of another server
            _close_below(client, flow_run_id, died)
            if run.state is not None and run.state.type in _LIVE:
                client.set_flow_run_state(flow_run_id, died, force=True)
            get_run_logger().info("an earlier process of this run died; its flow run is now marked Crashed")
    if lease.abandoned:
        lease.settle()


def close_interrupted() -> None:
    """Close the task runs and sub-flows that the present flow run leaves behind when it is interrupted.

    Cancelled where the run is being cancelled, else Crashed; a server that is away is left alone.
    """
    run_id = root_flow_run_id()
    if run_id is None:
        return
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(UUID(run_id))
            cancelling = run.state is not None and run.state.type is StateType.CANCELLING
            ended: State = Cancelled() if cancelling else Crashed(message="The run was interrupted.")
            _close_below(client, run.id, ended, cancelling)
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("the history of the interrupted run was not closed: %s", error)


def close_crashed(flow_run_id: UUID) -> None:
    """Close what is live below a flow run that is Crashed; one that is not, or is gone, is left alone."""
    with get_client(sync_client=True) as client:
        try:
            run = client.read_flow_run(flow_run_id)
        except ObjectNotFound:
            return
        if run.state is None or run.state.type is not StateType.CRASHED:
            return
        _close_below(client, run.id, Crashed(message="The process of the flow run died."))


def _close_below(client: SyncPrefectClient, flow_run_id: UUID, state: State, crashed_too: bool = False) -> None:
    """Close what is live below a flow run; crashed_too: also what the interruption itself made Crashed."""
    closed = _LIVE | ({StateType.CRASHED} if crashed_too else set())
    of_flow = filters.TaskRunFilter(flow_run_id=filters.TaskRunFilterFlowRunId(any_=[flow_run_id]))
    for task in client.read_task_runs(task_run_filter=of_flow):
        of_task = filters.FlowRunFilter(parent_task_run_id=filters.FlowRunFilterParentTaskRunId(any_=[task.id]))
        for child in client.read_flow_runs(flow_run_filter=of_task):
            _close_below(client, child.id, state, crashed_too)
            if child.state is not None and child.state.type in closed:
                client.set_flow_run_state(child.id, state, force=True)
        # A server that is killed while it records a task run has written its row, but not its state.
        kind = task.state.type if task.state is not None else task.state_type
        if kind in closed:
            client.set_task_run_state(task.id, state, force=True)


def started_by() -> str:
    """Return the command that starts this run again: that of the command line, or the deployment's."""
    if Path(sys.argv[0]).name == "memmcl":
        return redact(shlex.join(["memmcl", *sys.argv[1:]]))
    name = f"{flow_run.flow_name}/{deployment.name}"
    return shlex.join(["prefect", "deployment", "run", name]) if deployment.name else ""
