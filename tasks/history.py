"""The run history: which flow run this is, and telling the truth about runs whose process died."""

from __future__ import annotations

from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentTaskRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Crashed

from memmcl.store import Lease
from tasks.runtime import log

_LIVE = {StateType.RUNNING, StateType.PENDING, StateType.CANCELLING}


def root_flow_run_id() -> str | None:
    """Return the id of the outermost flow run that is running now."""
    found = flow_run.get_root_flow_run_id()
    return str(found) if found else None


def close_abandoned(lease: Lease) -> None:
    """Mark the flow runs of holders that died as Crashed, so that none stays Running in the history."""
    for owner in lease.abandoned:
        if owner.get("flow_run_id") and owner["flow_run_id"] != root_flow_run_id():
            with get_client(sync_client=True) as client:
                if _close(client, UUID(owner["flow_run_id"])):
                    log().info("an earlier process of this run died; its flow run is now marked Crashed")
    if lease.abandoned:
        lease.settle()


def _close(client: SyncPrefectClient, flow_run_id: UUID) -> bool:
    """Close a flow run, its task runs and the sub-flows below; a run that this server does not know is skipped."""
    try:
        run = client.read_flow_run(flow_run_id)
    except ObjectNotFound:
        return False
    state = Crashed(message="The process died; a later run of the same command took over.")
    tasks = client.read_task_runs(task_run_filter=TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[flow_run_id])))
    for task in tasks:
        children = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_task_run_id=FlowRunFilterParentTaskRunId(any_=[task.id]))
        )
        for child in children:
            _close(client, child.id)
        if task.state is not None and task.state.type in _LIVE:
            client.set_task_run_state(task.id, state, force=True)
    if run.state is not None and run.state.type in _LIVE:
        client.set_flow_run_state(flow_run_id, state, force=True)
    return True
