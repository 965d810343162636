"""`kill -9` of a flow's process, of the Prefect worker and of the Prefect server, while a worker executes a deployment.

Within three minutes the history says what is true, and the same parameters again finish the run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
import yaml
from cluster import Cluster
from e2e_driver import tiny_config, wait_until
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentTaskRunId, TaskRunFilter
from prefect.client.schemas.filters import TaskRunFilterFlowRunId as InFlowRun
from processes import free_ports

from memmcl.store import Store

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]
TRUTH = 180.0
"""Seconds within which the history must tell the truth; the automation alone waits for 90."""
STEPS = 400
LIVE = {"RUNNING", "PENDING", "CANCELLING"}


@dataclass
class Place:
    """A cluster with a worker and deployments, its configuration, its API."""

    cluster: Cluster
    config: dict[str, Any]
    client: SyncPrefectClient
    store: Store

    def start(self, name: str) -> UUID:
        """Start the pipeline deployment under a name, and wait until it trains."""
        parameters = {"config": {**self.config, "name": name}}
        deployment = self.client.read_deployment_by_name("pipeline/pipeline")
        run = self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        wait_until(lambda: any(label.startswith("expert ") for label, _ in self.live(run.id)), "an expert is trained")
        return run.id

    def state(self, run_id: UUID) -> str:
        state = self.client.read_flow_run(run_id).state
        assert state is not None
        return state.type.value

    def live(self, run_id: UUID) -> list[tuple[str, str]]:
        """Return (name, state) of every flow and task run in the tree that the history says is alive."""
        run = self.client.read_flow_run(run_id)
        found = [(run.name, run.state.type.value)] if run.state and run.state.type.value in LIVE else []
        below = TaskRunFilter(flow_run_id=InFlowRun(any_=[run_id]))
        for task in self.client.read_task_runs(task_run_filter=below):
            children = FlowRunFilter(parent_task_run_id=FlowRunFilterParentTaskRunId(any_=[task.id]))
            if task.state and task.state.type.value in LIVE:
                found.append((task.name, task.state.type.value))
            for child in self.client.read_flow_runs(flow_run_filter=children):
                found += self.live(child.id)
        return found

    def finish(self, name: str) -> None:
        """Run the same parameters to their end; what was finished is not made again."""
        before = {one.key: one.created for one in self.store.list("expert")}
        run_id = self.start_quietly(name)
        wait_until(lambda: self.state(run_id) not in {*LIVE, "SCHEDULED"}, "the rerun ends")
        assert self.state(run_id) == "COMPLETED"
        after = {one.key: one.created for one in self.store.list("expert")}
        assert {key: after[key] for key in before} == before

    def start_quietly(self, name: str) -> UUID:
        deployment = self.client.read_deployment_by_name("pipeline/pipeline")
        parameters = {"config": {**self.config, "name": name}}
        return self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path) -> Iterator[Place]:
    cluster = Cluster(tmp_path / "cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", raising=False)
        patch.setenv("MEMMCL_ALLOWED_URLS", str(tiny_base))
        try:
            cluster.up(nodes=2, cpus_per_node=1, prefect_port=free_ports(1)[0])
            for name, value in cluster.environment.items():
                if name.startswith(("AWS_", "MEMMCL_")):
                    patch.setenv(name, value)
            config = tiny_config(tiny_base)
            config["data"]["subtasks"] = ["sent2", "irony", "emotion"]
            config["experts"] |= {"steps": STEPS, "checkpoint_every": 50}
            config["evaluation"] |= {"joint_lora": False, "weak_lora": False}
            for setting in cluster.settings:
                key, _, value = setting.partition("=")
                section, _, name = key.partition(".")
                config.setdefault(section, {})[name] = value
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
            stored = config["store"]
            store = Store.open(stored["url"], endpoint_url=stored["endpoint_url"], region=stored["region"])
            known = cluster.environment
            with SyncPrefectClient(known["PREFECT_API_URL"], auth_string=known["PREFECT_API_AUTH_STRING"]) as client:
                yield Place(cluster, config, client, store)
        finally:
            cluster.down(purge=True)


def flow_process(run_id: UUID) -> psutil.Process:
    """Return the process that executes a flow run for the worker."""
    (found,) = [
        process
        for process in psutil.process_iter(["cmdline", "environ"])
        if (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == str(run_id)
        and "prefect.engine" in (process.info["cmdline"] or [])
    ]
    return found


def within(seconds: float, condition: Callable[[], bool], what: str) -> None:
    """Poll; a server that is away counts as no."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (httpx.HTTPError, OSError):
            pass
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(1)


def test_a_killed_flow_process_is_crashed_with_all_below_it_and_its_rerun_finishes(place: Place) -> None:
    run_id = place.start("flow")
    os.kill(flow_process(run_id).pid, signal.SIGKILL)
    within(TRUTH, lambda: place.state(run_id) == "CRASHED", "the run is Crashed")
    within(TRUTH, lambda: not place.live(run_id), "nothing below it is said to be alive")
    assert all(alive for _, alive in place.cluster.status().values()), "the cluster it had joined is as it was"
    place.finish("flow")


def test_a_killed_worker_leaves_a_history_that_is_true(place: Place) -> None:
    """Alone, or with the flow's process: what still works says so, what does not is Crashed by the automation."""
    run_id = place.start("worker")
    flow = flow_process(run_id)
    os.kill(place.cluster.process("worker"), signal.SIGKILL)
    time.sleep(5)
    if flow.is_running() and flow.status() != psutil.STATUS_ZOMBIE:
        assert place.state(run_id) == "RUNNING"
        flow.kill()
    within(TRUTH, lambda: place.state(run_id) == "CRASHED", "the automation marks the run Crashed")
    place.cluster.up()
    within(TRUTH, lambda: not place.live(run_id), "the new worker closes what was below it")
    place.finish("worker")


def test_a_killed_server_comes_back_to_a_true_history(place: Place) -> None:
    run_id = place.start("server")
    place.cluster.kill("prefect")
    place.cluster.up()
    flow = [
        one
        for one in psutil.process_iter(["environ"])
        if (one.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == str(run_id)
    ]
    assert flow or place.state(run_id) not in LIVE, "a run without a process is not alive"

    def true() -> bool:
        alive = any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in flow)
        return alive or not place.live(run_id)

    within(TRUTH + 120, lambda: true() and place.state(run_id) not in LIVE, "the run ends, or is marked Crashed")
    print("after the server came back the run ended as", place.client.read_flow_run(run_id).state)
    place.finish("server")
