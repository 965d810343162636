"""On a Ray cluster that is only joined: sixteen experts over four GPUs; nodes killed in training and in a search."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster
from e2e_driver import Desk, desk
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from processes import free_ports
from tiny import make_sixteen

from memmcl.store import Manifest, Store
from memmcl.suite.subtasks import SUBTASKS

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]
GPUS = 4
ON_GPU = re.compile(r"^(\w+): training on .*, node (\w+), GPU (\S+)$")
FAN_OUT = """
import sys
from pathlib import Path
from prefect import flow
from flows.pipeline import train_experts
from memmcl.config import load_config
from tasks.run.cluster import check_nodes
from tasks.stages.data import publish_splits
from tasks.run.ray_session import ray_session
from tasks.stages.opening import held, open_run

@flow(flow_run_name="fan out")
def fan_out(config):
    run = open_run(config)
    with held(run), ray_session(config.ray):
        check_nodes(run.config.ray, run.store, run.model)
        splits, anchors, _ = publish_splits(run)
        train_experts(run, splits, anchors)

fan_out(load_config(Path(sys.argv[1])))
"""
ALIVE = "import sys, ray; ray.init(address=sys.argv[1], logging_level='error'); print(ray.cluster_resources()['CPU'])"


@contextmanager
def cluster_of(folder: Path, **options: int) -> Iterator[Cluster]:
    made = Cluster(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", raising=False)
        patch.setenv("MEMMCL_ALLOWED_URLS", "/")  # rows and base model lie in the folders of the test
        try:
            made.up(deploy=False, worker=False, prefect_port=free_ports(1)[0], **options)
            yield made
        finally:
            made.down(purge=True)


@contextmanager
def desk_on(cluster: Cluster, root: Path, base: Path, **changes: dict[str, Any]) -> Iterator[Desk]:
    """Set up a desk whose runs use the cluster's Prefect server, store and nodes."""
    environment = {name: value for name, value in cluster.environment.items() if name != "PREFECT_HOME"}
    with desk(root, base, environment=environment) as place:
        tree = yaml.safe_load(place.config.read_text())
        for section, values in changes.items():
            tree[section] = {**tree.get(section, {}), **values}
        for setting in cluster.settings:
            key, _, value = setting.partition("=")
            section, _, name = key.partition(".")
            tree.setdefault(section, {})[name] = value
        place.config.write_text(yaml.safe_dump(tree))
        yield place


@contextmanager
def opened(cluster: Cluster) -> Iterator[tuple[Store, SyncPrefectClient]]:
    """Open the cluster's store and history from this process."""
    settings = dict(setting.split("=", 1) for setting in cluster.settings)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            if name.startswith(("AWS_", "MEMMCL_")):
                patch.setenv(name, value)
        store = Store.open(
            settings["store.url"], endpoint_url=settings["store.endpoint_url"], region=settings["store.region"]
        )
        known = cluster.environment
        with SyncPrefectClient(known["PREFECT_API_URL"], auth_string=known["PREFECT_API_AUTH_STRING"]) as client:
            yield store, client


def ray_answers(cluster: Cluster) -> float:
    """Return the CPUs of the cluster as a new driver sees them."""
    address = dict(setting.split("=", 1) for setting in cluster.settings)["ray.address"]
    done = subprocess.run(
        [sys.executable, "-c", ALIVE, address],
        env={**os.environ, **cluster.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def artifacts(store: Store, *kinds: str) -> dict[str, Manifest]:
    return {f"{one.kind} {one.name}": one for one in store.list() if one.kind in kinds}


def at_most_at_once(spans: list[tuple[Any, Any]]) -> int:
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


# ------------------------------------------------------------------------------------------ sixteen over four


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Cluster]:
    """The experts' sub-flow for all sixteen subtasks, on one node with four GPUs that exist by name only."""
    root = tmp_path_factory.mktemp("sixteen")
    data = make_sixteen(root / "rows")
    with (
        cluster_of(root / "cluster", nodes=1, cpus_per_node=GPUS, gpus_per_node=GPUS) as cluster,
        desk_on(
            cluster,
            root / "desk",
            tiny_base,
            model={"device": "cpu"},
            data={
                "source": str(data),
                "subtasks": list(SUBTASKS),
                "train_rows": 8,
                "weak_rows": 4,
                "test_rows": 4,
                "max_prompt_tokens": 512,
                "on_overlap": "drop",
            },
            experts={"steps": 10, "anchor_rows": 2, "warm_start": 0},
            search={"lookahead": GPUS},
            evaluation={"joint_lora": False, "weak_lora": False, "max_new_tokens": 1},
            ray={"workers": GPUS, "gpus_per_worker": 1},
        ) as place,
    ):
        ended = place.run("-c", FAN_OUT, place.config, program=Path(sys.executable))
        assert ended.code == 0, ended
        yield cluster


def test_each_expert_is_a_task_run_and_four_work_at_a_time(sixteen: Cluster) -> None:
    with opened(sixteen) as (store, client):
        assert {one.name for one in store.list("expert")} == {f"expert {name}" for name in SUBTASKS}
        runs = {one.name: one for one in client.read_task_runs(limit=200) if one.name.startswith("expert ")}
        assert set(runs) == {f"expert {name}" for name in SUBTASKS}
        assert {one.state_name for one in runs.values()} == {"Completed"}
        spans = [(one.start_time, one.end_time) for one in runs.values()]
        assert 1 < at_most_at_once(spans) <= GPUS


def test_experts_at_the_same_time_have_different_gpus(sixteen: Cluster) -> None:
    with opened(sixteen) as (_, client):
        (flow,) = [one.id for one in client.read_flow_runs() if one.name == "experts"]
        of_flow = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow]))
        lines = [line for page in range(10) for line in client.read_logs(of_flow, limit=200, offset=200 * page)]
        gpus = {found[1]: found[3] for line in lines if (found := ON_GPU.match(line.message))}
        assert set(gpus) == set(SUBTASKS), "every expert's log says where it was trained"
        assert set(gpus.values()) == {str(number) for number in range(GPUS)}
        spans = {
            one.name.removeprefix("expert "): (one.start_time, one.end_time)
            for one in client.read_task_runs(limit=200)
            if one.name.startswith("expert ")
        }
        for one, other in itertools.combinations(gpus, 2):
            together = spans[one][0] < spans[other][1] and spans[other][0] < spans[one][1]
            assert not together or gpus[one] != gpus[other], (one, other)


def test_the_longest_rows_are_trained_first(sixteen: Cluster) -> None:
    with opened(sixteen) as (_, client):
        runs = [one for one in client.read_task_runs(limit=200) if one.name.startswith("expert ")]
        first = [one.name for one in sorted(runs, key=lambda one: one.start_time)][:GPUS]
        assert "expert asqp" in first, "its rows are the longest by far"


def test_the_cluster_that_was_joined_is_still_there(sixteen: Cluster) -> None:
    assert all(alive for _, alive in sixteen.status().values())
    assert ray_answers(sixteen) == GPUS


def test_a_store_that_other_nodes_do_not_see_is_refused(sixteen: Cluster, tmp_path: Path, tiny_base: Path) -> None:
    """A memory store is a store that no other process sees; a directory would be one on another machine."""
    with desk_on(sixteen, tmp_path, tiny_base) as place:
        ended = place.run("run", place.config, "--set", "store.url=memory://unseen")
    assert ended.code == 1, ended
    assert "nodes share no disk: use an s3:// URL as store.url" in ended.err.splitlines()[-1]


# ------------------------------------------------------------------------------------------ nodes that are lost


def test_a_lost_node_costs_only_what_ran_on_it(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> None:
    """One node is killed in training, comes back, and is killed again in the search; the run ends as if nothing was."""
    root = tmp_path_factory.mktemp("lost")
    with (
        cluster_of(root / "cluster", nodes=2, cpus_per_node=1) as cluster,
        desk_on(
            cluster,
            root / "desk",
            tiny_base,
            data={"subtasks": ["sent2", "irony", "emotion", "asc"]},
            experts={"steps": 400, "warm_start": 0.1, "checkpoint_every": 50},
            search={"stage1_evaluations": 60},
            curriculum={"contexts": ["zero-shot"]},
            evaluation={"joint_lora": False, "weak_lora": False},
        ) as place,
        opened(cluster) as (store, client),
    ):
        with place.started("run", place.config) as running:

            def training() -> set[str]:
                live = [one for one in client.read_task_runs(limit=200) if one.state_name == "Running"]
                return {one.name for one in live if one.name.startswith("expert ")}

            running.wait_until(lambda: store.list("expert") and len(training()) == 2, "both nodes train")
            before = artifacts(store, "warm", "expert", "split", "anchors")
            cluster.kill("ray-node-1")
            running.wait_until(lambda: len(store.list("reference")) == 4, "the experts are trained on the other node")
            trained = artifacts(store, "warm", "expert", "split", "anchors", "reference")
            assert {name: trained[name] for name in before} == before
            cluster.up(deploy=False)
            running.wait_until(lambda: told(store) > 3, "candidates are told")
            cluster.kill("ray-node-1")
            at_kill = told(store)
            ended = running.ended()
        assert ended.code == 0, ended
        assert told(store) > at_kill
        whole = artifacts(store, "warm", "expert", "split", "anchors", "reference")
        assert whole == trained, "nothing that was finished was made again"
        assert list(store.verify().problems) == []
        (done,) = store.list("run")
        assert done.name == "tiny"
        states = {one.state_name for one in client.read_task_runs(limit=200)}
        assert states <= {"Completed", "Reused"}, states


def told(store: Store) -> int:
    """Return how many candidates have a record."""
    return len(store.objects.sizes("logs/searches"))
