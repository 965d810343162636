"""The cluster of plain processes: started, used, one of it killed, and stopped. test_cluster.py uses it too."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import botocore.session
import httpx
import psutil
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from cluster import Cluster
from e2e_driver import LOOPBACK, traces, wait_until
from processes import MARK, free_ports
from seaweed import S3Server

from memmcl.errors import ConfigError, ServiceError, UsageError
from memmcl.files import allowed

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parents[2] / "deployments" / "cluster.py"
MEMBERS = ["prefect", "s3", "ray-head", "ray-node-1", "ray-node-2", "worker"]
ON_EACH_NODE = """
import os, sys, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address=sys.argv[1], logging_level="error")

@ray.remote(num_cpus=1)
def look():
    return ray.get_runtime_context().get_node_id(), os.environ["PREFECT_API_URL"], os.environ["AWS_ACCESS_KEY_ID"]

nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
looks = ray.get([look.options(scheduling_strategy=one).remote() for one in there])
assert [node for node, _, _ in looks] == nodes, looks
print(ray.cluster_resources()["CPU"], len(nodes), *sorted({word for look in looks for word in look[1:]}, key=len))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of one CPU, without deployments."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", raising=False)
        try:
            cluster.up(deploy=False, nodes=2, cpus_per_node=1, prefect_port=free_ports(1)[0])
            yield cluster
        finally:
            cluster.down(purge=True)


def test_every_member_is_alive(cluster: Cluster) -> None:
    assert _states(cluster) == (0, dict.fromkeys(MEMBERS, "alive"))


def test_credentials_are_in_two_files_for_the_owners_eyes_only(cluster: Cluster) -> None:
    """Of all that its processes write and say: data, logs, Prefect's and Ray's folders, and their command lines."""
    state = json.loads((cluster.directory / "processes.json").read_text())
    known = cluster.environment
    secrets = [known[name] for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "PREFECT_API_AUTH_STRING")]
    secrets += S3Server("", "", secrets[0]).keys.values()
    commands = " ".join(" ".join(one.cmdline()) for one in _marked(cluster))
    assert not [secret for secret in secrets if secret in commands]
    found = {line.split(" holds ")[0] for line in traces(secrets, cluster.directory, Path(state["run_folder"]))}
    assert found == {str(cluster.directory / "env"), str(cluster.directory / "s3" / "s3.json")}
    for path in [*map(Path, found), cluster.directory / "processes.json"]:
        assert path.stat().st_mode & 0o777 == 0o600, path
    for folder in (cluster.directory, Path(state["run_folder"])):
        assert folder.stat().st_mode & 0o777 == 0o700, folder


def test_a_shell_that_sources_env_has_the_environment(cluster: Cluster) -> None:
    said = subprocess.run(
        ["bash", "-c", f"source '{cluster.directory}/env'; env"], env={}, capture_output=True, text=True, check=True
    ).stdout
    assert set(cluster.environment.items()) <= {tuple(line.split("=", 1)) for line in said.splitlines()}


def test_runs_may_open_the_store_of_the_cluster_and_the_hub(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMMCL_ALLOWED_URLS", cluster.environment["MEMMCL_ALLOWED_URLS"])
    settings = dict(setting.split("=", 1) for setting in cluster.settings)
    for place in (settings["store.url"], "s3://memmcl/rows", "hf://org/model"):
        allowed.require(place)
    allowed.require_endpoint(settings["store.endpoint_url"])
    for place in ("/etc/passwd", str(cluster.directory / "env"), "s3://other/store", "https://example.org/a.csv"):
        with pytest.raises(ConfigError, match="may not be opened"):
            allowed.require(place)


def test_every_member_listens_on_this_machine_only(cluster: Cluster) -> None:
    listening = {
        name: {
            connection.laddr.ip
            for process in _marked(cluster)
            if process.environ()[MARK].endswith(f"/{name}")
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        for name in MEMBERS
    }
    assert {name for name, addresses in listening.items() if addresses} >= set(MEMBERS) - {"worker"}
    assert set().union(*listening.values()) <= LOOPBACK, listening


def test_prefect_asks_for_the_login_that_is_in_env(cluster: Cluster) -> None:
    api, login = cluster.environment["PREFECT_API_URL"], cluster.environment["PREFECT_API_AUTH_STRING"]
    for wrong in (None, ("memmcl", "wrong")):
        assert httpx.post(f"{api}/flow_runs/filter", json={}, auth=wrong).status_code == 401
    name, _, password = login.partition(":")
    answer = httpx.post(f"{api}/flow_runs/filter", json={}, auth=(name, password), headers={"Origin": "http://other"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_of_the_s3_server_only_the_s3_port_takes_requests(cluster: Cluster) -> None:
    """Its filer, master and volume server took what had no credentials, a deletion of the whole bucket by GET too."""
    client = _s3(cluster)
    client.put_object(Bucket="memmcl", Key="store/kept", Body=b"kept")
    ports = json.loads((cluster.directory / "processes.json").read_text())["ports"]
    master, volume, filer = (f"http://127.0.0.1:{port}" for port in (ports[2], ports[4], ports[6]))
    for method, url in (
        ("GET", f"{filer}/buckets/memmcl/store/kept"),
        ("GET", f"{filer}/buckets/memmcl/?pretty=y"),
        ("PUT", f"{filer}/buckets/memmcl/store/kept"),
        ("DELETE", f"{filer}/buckets/memmcl/store/kept"),
        ("GET", f"{master}/dir/assign"),
        ("POST", f"{master}/submit"),
        ("GET", f"{master}/vol/grow?count=1"),
        ("GET", f"{master}/col/delete?collection=memmcl"),
        ("GET", f"{volume}/1,0101234567"),
        ("DELETE", f"{volume}/1,0101234567"),
    ):
        answer = httpx.request(method, url)
        assert answer.status_code in {401, 404}, f"{method} {url}: {answer.status_code}"
    assert client.get_object(Bucket="memmcl", Key="store/kept")["Body"].read() == b"kept"


def test_s3_takes_the_right_credentials_and_no_others(cluster: Cluster) -> None:
    _s3(cluster).put_object(Bucket="memmcl", Key="store/greeting", Body=b"hello")
    assert _s3(cluster).get_object(Bucket="memmcl", Key="store/greeting")["Body"].read() == b"hello"
    with pytest.raises(ClientError, match=r"403|SignatureDoesNotMatch"):
        _s3(cluster, AWS_SECRET_ACCESS_KEY="wrong").get_object(Bucket="memmcl", Key="store/greeting")


def test_a_killed_node_shows_and_up_brings_back_it_alone(cluster: Cluster) -> None:
    before = {name: cluster.process(name) for name in MEMBERS}
    environment = (cluster.directory / "env").read_text()
    cluster.kill("ray-node-1")
    assert _states(cluster) == (1, {**dict.fromkeys(MEMBERS, "alive"), "ray-node-1": "dead"})

    cluster.up(deploy=False)
    assert _states(cluster) == (0, dict.fromkeys(MEMBERS, "alive"))
    assert [name for name in MEMBERS if cluster.process(name) != before[name]] == ["ray-node-1"]
    assert (cluster.directory / "env").read_text() == environment


def test_a_killed_head_comes_back_with_its_nodes_at_the_same_address(cluster: Cluster) -> None:
    before = {name: cluster.process(name) for name in MEMBERS}
    settings = cluster.settings
    os.kill(before["ray-head"], signal.SIGKILL)
    wait_until(lambda: not cluster.status()["ray-head"][1], "the head is dead")

    cluster.up(deploy=False)
    assert _states(cluster) == (0, dict.fromkeys(MEMBERS, "alive"))
    changed = [name for name in MEMBERS if cluster.process(name) != before[name]]
    assert changed == ["ray-head", "ray-node-1", "ray-node-2"]
    assert cluster.settings == settings


def test_a_driver_reaches_both_nodes_and_they_reach_prefect_and_s3(cluster: Cluster) -> None:
    (address,) = [one.removeprefix("ray.address=") for one in cluster.settings if one.startswith("ray.address=")]
    environment = os.environ | cluster.environment
    said = subprocess.run(
        [sys.executable, "-c", ON_EACH_NODE, address],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    known = cluster.environment
    assert said.stdout.split() == ["2.0", "2", known["AWS_ACCESS_KEY_ID"], known["PREFECT_API_URL"]], said.stderr


def test_down_leaves_no_process_and_keeps_the_data(cluster: Cluster) -> None:
    running = _marked(cluster)
    assert len(running) > len(MEMBERS)
    assert cluster.down() == MEMBERS[::-1]
    assert _marked(cluster) == []
    assert not any(process.is_running() for process in running)
    assert (cluster.directory / "prefect" / "prefect.db").exists()
    assert _states(cluster) == (1, {})


def test_a_port_in_use_is_said_and_what_was_started_is_stopped(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    with _listening(0) as taken, pytest.raises(ServiceError, match=f"port {taken} of prefect is in use"):
        cluster.up(deploy=False, prefect_port=taken)
    assert cluster.status() == {}

    (endpoint,) = [one for one in cluster.settings if "endpoint_url" in one]
    with (
        _listening(int(endpoint.rpartition(":")[2])) as taken,
        pytest.raises(ServiceError, match=f"port {taken} of s3 is in use"),
    ):
        cluster.up(deploy=False, prefect_port=free_ports(1)[0])
    assert {name: alive for name, (_, alive) in cluster.status().items()} == {"prefect": False}
    assert _marked(cluster) == []
    cluster.down(purge=True)
    assert not cluster.directory.exists()


def test_the_log_of_a_member_that_does_not_come_up_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nowhere" / "prefect.db"
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{nowhere}")
    cluster = Cluster(tmp_path / "cluster")
    with pytest.raises(ServiceError, match=r"(?s)prefect ended while it started.*unable to open database file"):
        cluster.up(deploy=False, prefect_port=free_ports(1)[0])
    cluster.down(purge=True)


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "everywhere"])
def test_where_prefect_listens_is_one_address(tmp_path: Path, listen: str) -> None:
    with pytest.raises(UsageError, match="listen must be one IPv4 address of this machine"):
        Cluster(tmp_path / "cluster").up(listen=listen)


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all my work")
    with pytest.raises(UsageError, match=r"not empty \(thesis.tex\)"):
        Cluster(tmp_path).up()
    assert Cluster(tmp_path).down(purge=True) == []
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.tex", "all my work")]


@contextmanager
def _listening(port: int) -> Iterator[int]:
    """Occupy a port of this machine, a free one for 0, and yield it."""
    with socket.create_server(("127.0.0.1", port)) as server:
        yield server.getsockname()[1]


def _states(cluster: Cluster) -> tuple[int, dict[str, str]]:
    """Return the exit code of `status`, and what its table says: member -> alive or dead."""
    command = [sys.executable, str(SCRIPT), "status", "--dir", str(cluster.directory)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    header, *rows = ended.stdout.splitlines()
    assert header.split() == ["member", "where", "pid", "state", "log"], ended.stderr
    return ended.returncode, {row.split()[0]: row.split()[-2] for row in rows}


def _marked(cluster: Cluster) -> list[psutil.Process]:
    """Return all live processes that carry the mark of this cluster."""
    mark = json.loads((cluster.directory / "processes.json").read_text())["mark"]
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(f"{mark}/"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _s3(cluster: Cluster, **wrong: str) -> BaseClient:
    """Return a client of the cluster's S3 server, with its credentials but for those that are `wrong`."""
    known = cluster.environment | wrong
    (endpoint,) = [one.removeprefix("store.endpoint_url=") for one in cluster.settings if "endpoint_url" in one]
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=known["AWS_DEFAULT_REGION"],
        aws_access_key_id=known["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=known["AWS_SECRET_ACCESS_KEY"],
    )
