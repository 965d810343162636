"""Runs whose process died are closed in a real Prefect server's history."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from e2e_driver import wait_until
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentTaskRunId,
    TaskRunFilter,
    TaskRunFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Crashed

from flows.tidy import tidy
from memmcl.store import Lease, Store
from tasks.ui.history import close_abandoned, root_flow_run_id

pytestmark = pytest.mark.timeout(600)
DYING = """
import sys, time
from pathlib import Path
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from tasks.ui.history import root_flow_run_id

@task(task_run_name="done", cache_policy=NO_CACHE)
def done(): pass

@task(task_run_name="endless", cache_policy=NO_CACHE)
def endless():
    Path(sys.argv[1]).write_text(root_flow_run_id())
    time.sleep(3600)

@flow(flow_run_name="inner")
def inner():
    endless()

@flow(flow_run_name="outer")
def outer():
    done()
    inner()

outer()
"""


@pytest.fixture
def client(prefect_api: str, tmp_path: Path) -> Iterator[SyncPrefectClient]:
    """A client of the session's server, which is also the one that flows in this process report to."""
    with temporary_settings({PREFECT_API_URL: prefect_api, PREFECT_HOME: tmp_path}), get_client(sync_client=True) as it:
        yield it


@pytest.fixture
def killed(client: SyncPrefectClient, prefect_api: str, tmp_path: Path) -> UUID:
    """The id of a flow run whose process was killed inside a task of a sub-flow."""
    said = tmp_path / "flow_run_id"
    environment = {**os.environ, "PREFECT_API_URL": prefect_api, "PREFECT_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", DYING, str(said)], env=environment)
    try:
        wait_until(lambda: (said.exists() and len(said.read_text()) == 36) or process.poll() is not None, "it runs")
        run = UUID(said.read_text())
        # Task runs reach the server as events, a little later than they start.
        live = {"outer": "Running", "inner": "Running", "endless": "Running", "done": "Completed"}
        wait_until(lambda: _states(client, run).items() >= live.items(), "the server knows that it runs")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return run


def test_a_killed_run_is_crashed_with_all_below_it(client: SyncPrefectClient, killed: UUID) -> None:
    _close([{"flow_run_id": str(killed)}])
    expected = {"outer": "Crashed", "inner": "Crashed", "endless": "Crashed", "done": "Completed"}
    wait_until(lambda: _states(client, killed).items() >= expected.items(), "the killed run is closed")
    message = client.read_flow_run(killed).state.message
    assert "took over" in message
    assert "Running" not in _states(client, killed).values()


def test_a_task_run_whose_state_was_not_recorded_any_more_is_crashed_too(
    client: SyncPrefectClient, killed: UUID, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A server that dies while it records a task run leaves its row without its state: here it is taken away."""
    (endless,) = [run.id for run in _below(client, killed) if isinstance(run, TaskRun) and run.name == "endless"]
    for path in tmp_path_factory.getbasetemp().glob("prefect-server*/prefect.db"):
        with closing(sqlite3.connect(path, timeout=30)) as database, database:
            database.execute("delete from task_run_state where task_run_id = ?", (str(endless),))
    assert client.read_task_run(endless).state is None
    _close([{"flow_run_id": str(killed)}])
    wait_until(lambda: client.read_task_run(endless).state is not None, "it has a state again")
    assert client.read_task_run(endless).state.name == "Crashed"


def test_what_a_crashed_run_left_open_is_tidied_up(client: SyncPrefectClient, killed: UUID) -> None:
    """As the automation does once the worker, or a heartbeat that stopped, has marked the flow run itself."""
    tidy(killed)
    assert _states(client, killed)["endless"] == "Running", "a run that is not Crashed is left alone"
    client.set_flow_run_state(killed, Crashed(), force=True)
    assert _states(client, killed)["endless"] == "Running"
    tidy(killed)
    expected = {"outer": "Crashed", "inner": "Crashed", "endless": "Crashed", "done": "Completed"}
    wait_until(lambda: _states(client, killed).items() >= expected.items(), "all below the run is closed")
    tidy(uuid4())  # one that is gone is no error


def test_what_is_unknown_or_ended_stays_as_it_is(client: SyncPrefectClient) -> None:
    @flow(flow_run_name="fine")
    def fine() -> str | None:
        return root_flow_run_id()

    ended = fine()
    unknown = uuid4()
    abandoned = _close([{"flow_run_id": str(unknown)}, {"flow_run_id": None}, {}, {"flow_run_id": ended}])
    assert abandoned == []
    assert client.read_flow_run(UUID(ended)).state.name == "Completed"
    with pytest.raises(ObjectNotFound):
        client.read_flow_run(unknown)


def test_the_present_run_is_not_closed(client: SyncPrefectClient) -> None:
    """A Prefect retry takes the lease again under the same flow run."""

    @flow(flow_run_name="present")
    def present() -> str:
        own = root_flow_run_id()
        assert own is not None
        with Lease(Store.open(f"memory://{uuid4().hex}"), "0f" * 32, {"flow_run_id": own}) as lease:
            lease.abandoned = [{"flow_run_id": own}]
            close_abandoned(lease)
        assert client.read_flow_run(UUID(own)).state.name == "Running"
        return own

    assert client.read_flow_run(UUID(present())).state.name == "Completed"


def _close(abandoned: list[dict[str, str | None]]) -> list[dict[str, str | None]]:
    """Close them from a flow, as a successor does; return what the lease still says is to be closed."""
    store, run_id = Store.open(f"memory://{uuid4().hex}"), "0f" * 32

    @flow(flow_run_name="successor")
    def successor() -> list[dict[str, str | None]]:
        with Lease(store, run_id, {"flow_run_id": root_flow_run_id()}) as lease:
            lease.abandoned = abandoned
            close_abandoned(lease)
            held, _ = store.read_pointer(f"leases/{run_id}")
            assert held is not None
            assert held["abandoned"] == lease.abandoned
            return lease.abandoned

    return successor()


def _below(client: SyncPrefectClient, flow_run: UUID) -> Iterator[FlowRun | TaskRun]:
    """Yield a flow run, its task runs, and everything in its sub-flows."""
    yield client.read_flow_run(flow_run)
    for task in client.read_task_runs(
        task_run_filter=TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[flow_run]))
    ):
        yield task
        parent = FlowRunFilterParentTaskRunId(any_=[task.id])
        for child in client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_task_run_id=parent)):
            yield from _below(client, child.id)


def _states(client: SyncPrefectClient, flow_run: UUID) -> dict[str, str]:
    """Return the state of a flow run, of its task runs, and of everything in its sub-flows, by name."""
    return {run.name: run.state.name for run in _below(client, flow_run)}
