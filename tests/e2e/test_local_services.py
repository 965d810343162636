"""`kill -9` of what a command started for itself: Ray's two daemons, its Prefect server; and of the command alone.

The command ends with one line within half a minute and leaves no process; the same command again goes on.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from e2e_driver import (
    COMMAND,
    FEW,
    ONE_WORKER,
    Desk,
    Ended,
    Running,
    desk,
    finished_desk,
    manifest,
    runs_of,
    settings,
    states,
    wait_until,
)
from processes import free_ports

pytestmark = pytest.mark.timeout(1800)
SECONDS = 30.0
TREE_SECONDS = 10.0
WORDS = {
    "raylet": "the node (raylet) of the local Ray died",
    "gcs_server": "the control service (gcs_server) of the local Ray died",
    "prefect": "the run's Prefect server died",
}
AGAIN = "run the same command again: nothing that was stored is lost"
SMALLER = (*FEW, *settings("experts.steps=400", "search.stage1_evaluations=60"), *ONE_WORKER)
SESSION = """
import os, sys
from pathlib import Path
import ray
from flows.terminal import fail
from memmcl.errors import ServiceDied
from tasks.run.local_ray import joined_ray, local_ray
from tasks.run.watch import ends_process

@ray.remote
def hold(path):
    Path(path).touch()
    while True:  # a worker at work: it looks at nothing
        sum(range(10**6))

head = os.environ.get("RAY_HEAD")
options = dict(num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
with ends_process(fail):
    try:
        with joined_ray(address=head) if head else local_ray(**options):
            ray.get(hold.remote(sys.argv[1]))
    except ServiceDied as died:
        fail(str(died))
        sys.exit(1)
"""


def find(running: Running, what: str) -> psutil.Process:
    """Return the process of a command that is called so."""
    for process in running.members():
        try:
            name, line = process.name(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if name == what or (what == "prefect" and "flows.own_server" in line):
            return process
    raise AssertionError(f"no {what} among {[process.name() for process in running.members()]}")


def kill(running: Running, what: str) -> Ended:
    """Kill one service; return what the command said, which ended in time and left no process."""
    find(running, what).kill()
    killed = time.monotonic()
    ended = running.ended()
    assert time.monotonic() - killed < SECONDS, ended
    wait_until(lambda: not running.members(), "its processes have ended")
    assert time.monotonic() - killed < SECONDS + TREE_SECONDS
    return ended


def check_line(ended: Ended, what: str) -> Path:
    """Check that the command ended with one line that says what died; return the log that it names."""
    assert ended.code == 1, ended
    assert "Traceback" not in ended.out + ended.err, ended
    assert "state-dump" not in ended.out + ended.err, ended
    last = ended.err.splitlines()[-1]
    assert last.startswith(f"error: {WORDS[what]}; "), ended
    assert last.endswith(AGAIN), ended
    assert sum(line.startswith("error:") for line in ended.err.splitlines()) == 1, ended
    log = Path(last.partition(" in " if what != "prefect" else "log is ")[2].partition(";")[0])
    assert log.exists(), ended
    return log


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path) -> Iterator[Desk]:
    with desk(tmp_path, tiny_base, environment={"TMPDIR": str(tmp_path)}) as found:
        yield found


@pytest.mark.campaign
@pytest.mark.parametrize("what", ["raylet", "gcs_server"])
def test_the_death_of_a_daemon_of_ray_is_one_line(what: str, place: Desk) -> None:
    with place.started("-c", SESSION, "held", program=Path(sys.executable)) as running:
        running.wait_until((place.cwd / "held").exists, "a worker is at work")
        logs = check_line(kill(running, what), what)
    assert (logs / "raylet.out").is_file()


def test_a_killed_driver_s_ray_ends_at_once_and_the_next_start_removes_its_folder(place: Desk) -> None:
    folders = place.ray_folder
    with place.started("-c", SESSION, "held", program=Path(sys.executable)) as running:
        running.wait_until((place.cwd / "held").exists, "a worker is at work")
        names = {process.name() for process in running.members()}
        assert {"raylet", "gcs_server"} <= names
        assert any(name.startswith("ray::hold") for name in names), "it holds the model"
        assert any(name.startswith("ray::Dashboard") for name in names), "those stayed for a minute"
        (left,) = folders.iterdir()
        os.kill(running.process.pid, 9)
        killed = time.monotonic()
        wait_until(lambda: not running.members(), "the whole tree is gone")
        assert time.monotonic() - killed < TREE_SECONDS
    assert (left / "session_latest").exists()
    with place.started("-c", SESSION, "again", program=Path(sys.executable)) as running:
        running.wait_until((place.cwd / "again").exists, "a worker is at work again")
        assert left not in folders.iterdir()
        assert len(list(folders.iterdir())) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Desk]:
    """A desk at which the run of the campaign went through once; to read, not to change."""
    with finished_desk(tmp_path_factory.mktemp("undisturbed"), tiny_base, *SMALLER) as found:
        yield found


def at_work(place: Desk, stage: str) -> Callable[[], bool]:
    """Return what tells whether a stage is at work in a command that is started now."""
    root = place.cwd / "memmcl-store"

    def checkpoints() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in (root / "checkpoints").glob("*.bin")}

    def told() -> int:
        return len(list((root / "logs/searches").glob("*/*.json")))

    def evaluations() -> int:
        rows = runs_of(place.history) if place.history.exists() else []
        return sum(name == "evaluation" for name, _ in rows)

    if stage == "training":
        before = checkpoints()
        return lambda: bool(checkpoints() - before)
    count = told if stage == "search" else evaluations
    so_far = count()
    return lambda: count() > so_far


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["training", "search", "evaluation"])
def test_each_death_in_each_stage_of_a_run_is_one_line_and_the_run_ends_as_an_undisturbed_one(
    stage: str, place: Desk, undisturbed: Desk
) -> None:
    for what in WORDS:
        begun = at_work(place, stage)
        with place.started("run", place.config, *SMALLER) as running:
            running.wait_until(begun, f"{stage} is at work")
            check_line(kill(running, what), what)
        print(stage, what, runs_of(place.history))
    ended = place.run("run", place.config, *SMALLER)
    assert ended.code == 0, ended
    assert list(place.store.verify().problems) == []
    found, expected = (manifest(one.store, "unified", "unified model") for one in (place, undisturbed))
    assert found.blobs["adapter_model.safetensors"].sha256 == expected.blobs["adapter_model.safetensors"].sha256
    for table in ("flow_run", "task_run"):
        live = [row for row in states(place.history, table) if row[1] in {"Running", "Pending"}]
        assert not live, "nothing in the history is said to be alive"


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raylet", "this machine's node of the Ray cluster at {} (raylet) died; start it again, then "),
        ("gcs_server", "the Ray cluster at {} has not answered for 30 s; start it again, then "),
    ],
)
def test_the_death_of_a_cluster_that_was_joined_is_one_line(
    what: str, said: str, tmp_path: Path, tiny_base: Path
) -> None:
    (port,) = free_ports(1)
    head = f"127.0.0.1:{port}"
    started = ("start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false")
    environment = {"RAY_HEAD": head, "RAY_AUTH_MODE": "disabled"}
    with (
        desk(tmp_path, tiny_base, environment=environment) as place,
        place.started(*started, program=COMMAND.with_name("ray")) as cluster,
    ):
        wait_until(lambda: answers_at(port), "the cluster is up")
        cluster.ended()
        with place.started("-c", SESSION, "held", program=Path(sys.executable)) as running:
            running.wait_until((place.cwd / "held").exists, "a worker is at work")
            find(cluster, what).kill()
            ended = running.ended()
    assert ended.code == 1, ended
    assert ended.err.splitlines()[-1] == f"error: {said.format(head)}{AGAIN}", ended
    assert "Traceback" not in ended.err


def answers_at(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
