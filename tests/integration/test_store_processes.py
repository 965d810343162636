"""The store and its leases among real processes, some of which are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from memmcl.errors import LeaseHeld
from memmcl.store import Lease, Store
from memmcl.store.manifest import manifest_path
from memmcl.store.sealed import seal

ROOT = Path(__file__).parents[2]
KEY = "0f" * 32


@contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code`; killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


RACE = """
import sys
from memmcl.errors import Conflict
from memmcl.store import Store
store, number = Store.open(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    manifest = store.publish("race", f"{turn:02x}", name=number, files={"f": f"{number} {turn}".encode()})
    try:
        store.swap_pointer(f"turn{turn}", {"by": number}, None)
        swapped = number
    except Conflict:
        swapped = "-"
    print(turn, manifest.name, swapped, flush=True)
"""


def test_of_four_processes_one_wins_each_turn(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with child(RACE, url, "0") as a, child(RACE, url, "1") as b, child(RACE, url, "2") as c, child(RACE, url, "3") as d:
        processes = (a, b, c, d)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        lines = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            output, _ = process.communicate(timeout=30)
            assert process.returncode == 0
            lines += [line.split() for line in output.splitlines()]
    assert len(lines) == 4 * 20
    store = Store.open(url)
    for turn in range(20):
        of_turn = [line for line in lines if line[0] == str(turn)]
        manifest = store.find("race", f"{turn:02x}")
        assert manifest is not None
        assert {line[1] for line in of_turn} == {manifest.name}
        winners = [line[2] for line in of_turn if line[2] != "-"]
        value, _ = store.read_pointer(f"turn{turn}")
        assert winners == [value and value["by"]]
    assert list((tmp_path / "store" / "tmp").glob("*.part")) == []


KILL = """
import os, signal, sys
from memmcl.store import Store
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
store = Store.open(sys.argv[1], endpoint_url=sys.argv[2] or None, region="us-east-1")
if sys.argv[3] == "between":      # blobs are there, the manifest is not
    store.objects.backend.create = die
else:                             # inside the first write
    os.fsync = die
store.publish("expert", "0f" * 32, name="irony", files={"a": b"weights", "b": b"more"})
"""


@pytest.mark.parametrize(("place", "moment"), [("file", "between"), ("file", "inside"), ("s3", "between")])
def test_a_writer_that_is_killed_has_published_nothing(
    place: str, moment: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url, endpoint = f"file://{tmp_path}/store", ""
    if place == "s3":
        server = request.getfixturevalue("s3")
        url, endpoint = f"s3://{server.bucket}/killed", server.endpoint_url
    with child(KILL, url, endpoint, moment) as process:
        assert process.wait(30) == -signal.SIGKILL
    store = Store.open(url, endpoint_url=endpoint or None, region="us-east-1")
    assert store.find("expert", KEY) is None
    assert store.list() == []
    left = store.verify()
    assert left.problems == ()
    assert left.blobs == left.unreferenced == (2 if moment == "between" else 0)
    if moment == "inside":
        assert len(list((tmp_path / "store" / "tmp").glob("*.part"))) == 1
    manifest = store.publish("expert", KEY, name="irony", files={"a": b"weights", "b": b"more"})
    assert store.find("expert", KEY) == manifest
    assert store.verify().problems == ()


HOLD = """
import sys, time
from memmcl.store import Lease, Store
with Lease(Store.open(sys.argv[1]), sys.argv[2], {"flow_run_id": "first"}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_live_holder_is_respected_and_a_killed_one_succeeded_at_once(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    with child(HOLD, store.url, "3f2a") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LeaseHeld, match=f"run 3f2a is being worked on by pid {process.pid} on host"):
            Lease(store, "3f2a", {}).__enter__()
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped: a zombie
        with Lease(store, "3f2a", {"flow_run_id": "second"}) as lease:
            assert lease.previous == {"flow_run_id": "first"}
    assert store.read_pointer("leases/3f2a") == (None, None)


def test_thousands_of_manifests_are_listed_and_verified_in_seconds(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    first = store.publish("expert", "00", name="e", files={"f": b"shared"})
    for number in range(3000):
        key = f"{number:06x}"
        path = manifest_path("expert", key)
        (tmp_path / path).write_bytes(seal(path, {**first.model_dump(), "key": key}))
    begin = time.perf_counter()
    assert len(store.list("expert")) == 3001
    assert store.verify().manifests == 3001
    assert time.perf_counter() - begin < 10.0  # takes about half a second on an idle machine
