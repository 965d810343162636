"""Garbage collection on a directory, in memory, and on a real S3 server; beside processes at work, and killed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from e2e_driver import wait_until
from gc_fixture import LATER, artifact, crown, finished_run, gone_after, is_whole, journal, key_of, logs, names
from typer.testing import CliRunner

from flows.cli import app
from memmcl.errors import LeaseHeld, UsageError
from memmcl.store import Lease, Policy, Store, collect, read_champions, remove_run, rollback
from memmcl.store.local import LocalBackend
from memmcl.store.manifest import blob_path, manifest_path


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return Store.open(f"memory://{uuid.uuid4().hex}")
    return opened(request, request.param, tmp_path)


@pytest.fixture(params=["file", "s3"])
def shared_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """One that other processes see."""
    return opened(request, request.param, tmp_path)


def opened(request: pytest.FixtureRequest, place: str, tmp_path: Path) -> Store:
    if place == "file":
        return Store.open(str(tmp_path / "store"))
    server = request.getfixturevalue("s3")
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    return Store.open(url, endpoint_url=server.endpoint_url, region="us-east-1")


def test_listings_touching_and_deleting(store: Store) -> None:
    """What a collection asks of a place."""
    objects = store.objects
    for path in ("a/x/1.json", "a/x/2.json", "a/y/10.json", "ab"):
        objects.write(path, path.encode())
    assert list(objects.entries("")) == ["a/x/1.json", "a/x/2.json", "a/y/10.json", "ab"]
    assert list(objects.entries("a/x", "1")) == ["a/x/1.json"]
    assert list(objects.entries("a", "y/1")) == ["a/y/10.json"]
    assert objects.folders("a") == ["x", "y"]
    assert objects.folders("nothing") == []
    before = objects.entries("a/x")
    assert abs(time.time() - before["a/x/1.json"].touched) < 60
    assert not objects.touch("a/x/3.json")

    def moved() -> bool:
        assert objects.touch("a/x/1.json")
        return objects.entries("a/x")["a/x/1.json"].touched > before["a/x/1.json"].touched

    wait_until(moved, "a touch shows in the listing", every=0.2)
    assert objects.read("a/x/1.json") == b"a/x/1.json"
    assert objects.entries("a/x")["a/x/2.json"] == before["a/x/2.json"]
    objects.write("a/x/2.json", b"other")
    assert objects.entries("a/x")["a/x/2.json"].stamp != before["a/x/2.json"].stamp
    objects.delete(["a/x/1.json", "a/x/2.json", "a/x/never.json"])
    assert list(objects.entries("")) == ["a/y/10.json", "ab"]


def test_runs_beyond_the_newest_go_with_all_that_only_they_need(store: Store) -> None:
    common = artifact(store, "expert", "common")
    runs = [finished_run(store, str(number), common) for number in range(4)]
    crown(store, runs[0], runs[1])
    before = store.objects.sizes("")
    planned = collect(store, Policy(keep_runs=1))
    assert store.objects.sizes("") == before, "a dry run changes nothing"
    assert gone_after(store, keep_runs=1) == planned
    assert {item.path for item in planned.removed} == before.keys() - store.objects.sizes("").keys()
    assert names(store, "run") == {"0", "1", "3"}, "the newest, the champion, and the one before it"
    assert names(store, "expert") == {"common", "0", "1", "3"}
    assert logs(store, "runs") == sorted(run.key for run in (runs[0], runs[1], runs[3]))
    assert logs(store, "searches") == sorted(key_of(name) for name in "013")
    assert is_whole(store)
    assert rollback(store, read_champions(store, "champion")).current.run_id == runs[0].key  # type: ignore[union-attr]
    assert planned.runs[runs[1].key] == "champion champion"


def test_a_run_goes_alone(store: Store) -> None:
    common = artifact(store, "expert", "common")
    first, second = (finished_run(store, name, common) for name in ("first", "second"))
    judged = artifact(store, "judgement", "second against first", first, second)
    artifact(store, "expert", "of no run")
    crown(store, first)
    with pytest.raises(UsageError, match="is champion champion; promote another first"):
        remove_run(store, first.key[:8], delete=True)
    with Lease(store, second.key, {}), pytest.raises(LeaseHeld, match="is being worked on"):
        remove_run(store, second.key[:8], delete=True)
    with pytest.raises(UsageError, match="2 runs' id starts with ''"):
        remove_run(store, "", delete=True)
    before = names(store, "expert")
    assert remove_run(store, second.key[:8]).totals()["artifacts: run"][0] == 1
    assert names(store, "expert") == before, "without `delete` nothing goes"
    remove_run(store, second.key[:8], delete=True)
    assert store.find("run", second.key) is store.find("judgement", judged.key) is None
    assert names(store, "expert") == {"common", "first", "of no run"}
    assert logs(store, "runs") == [first.key]
    assert is_whole(store)


def test_an_unfinished_run_goes_by_name(store: Store) -> None:
    journal(store, "ab12", "killed")
    journal(store, "cd34", "other")
    remove_run(store, "ab", delete=True)
    assert logs(store, "runs") == ["cd34"]
    assert logs(store, "searches") == [key_of("other")]


def test_uploads_that_nobody_completed_go(store: Store) -> None:
    backend = store.objects.backend
    store.put_blob(b"something")
    if store.url.startswith("memory"):
        pytest.skip("nothing outlives a writer in memory")
    if isinstance(backend, LocalBackend):
        (backend.root / "tmp" / "killed.part").write_bytes(b"half")
    else:
        place = backend._object("blobs/ab/abcd")  # type: ignore[attr-defined]
        upload = backend.fs.call_s3("create_multipart_upload", **place)["UploadId"]  # type: ignore[attr-defined]
        backend.fs.call_s3("upload_part", **place, UploadId=upload, PartNumber=1, Body=b"half")  # type: ignore[attr-defined]
    (unfinished,) = store.objects.unfinished()
    assert store.objects.unfinished()[unfinished].size == 4
    gone_after(store)
    assert list(store.objects.unfinished()) == [unfinished], "somebody may be writing it"
    plan = gone_after(store, later=LATER)
    assert plan.totals()["uploads and files that were never completed"] == (1, 4)
    assert store.objects.unfinished() == {}


HOLDER = """
import sys, time
from pathlib import Path
from memmcl.store import Lease, Store
import json
store, run_id, ready = Store.from_spec(json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
with Lease(store, run_id, {}):
    assert store.find("expert", sys.argv[4]) is not None
    ready.touch()
    time.sleep(600)
"""


@contextmanager
def process(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-c", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def spec(store: Store) -> str:
    return json.dumps(store.spec)


def test_what_a_process_at_work_has_found_stays_until_it_has_ended(shared_store: Store, tmp_path: Path) -> None:
    store = shared_store
    run = finished_run(store, "old")
    expert = next(ref for ref in run.inputs if ref.kind == "expert")
    other = finished_run(store, "other")
    with process(HOLDER, spec(store), "ab12", tmp_path / "ready", expert.key) as holder:
        wait_until((tmp_path / "ready").exists, "it has found the expert")
        plan = gone_after(store, later=LATER, keep_runs=0)
        assert any("is at work now" in line for line in plan.kept)
        assert store.find("expert", expert.key) is not None
        assert store.find("run", other.key) is not None, "it may have found that, too"
        holder.kill()
        holder.wait()
    gone_after(store, later=LATER, keep_runs=0)
    assert store.list() == []
    assert store.objects.sizes("blobs") == {}


COLLECTOR = """
import json, sys, time
from pathlib import Path
from memmcl.store import Policy, Store, collect, gc
store, ready = Store.from_spec(json.loads(sys.argv[1])), Path(sys.argv[2])
read = gc.read_snapshot
def slow(*arguments):
    found = read(*arguments)
    if len(arguments) > 1:  # the one that counts: it holds the lease
        ready.touch()
        while not ready.with_name("go").exists():
            time.sleep(0.01)
    return found
gc.read_snapshot = slow
collect(store, Policy(keep_runs=0), delete=True, now=time.time() + 1e7)
"""
WRITER = """
import json, sys
from memmcl.store import Store
store = Store.from_spec(json.loads(sys.argv[1]))
print("begins", flush=True)
found = store.find("expert", sys.argv[2])
print("found" if found else "gone", flush=True)
made = store.publish("expert", "ab", name="new", files={"file": sys.argv[3].encode()})
print("published", flush=True)
"""


def test_who_reuses_while_a_collection_is_at_work_waits_for_its_end(shared_store: Store, tmp_path: Path) -> None:
    """The listing is old when the writer looks: without waiting it would find an expert that goes right after."""
    store = shared_store
    expert = artifact(store, "expert", "old")
    with process(COLLECTOR, spec(store), tmp_path / "ready") as collector:
        wait_until((tmp_path / "ready").exists, "it has listed all objects")
        listed = store.objects.entries("manifests/expert")
        with process(WRITER, spec(store), expert.key, "expert old") as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "begins\n"
            wait_until(
                lambda: store.objects.entries("manifests/expert") != listed or writer.poll() is not None,
                "it has touched the manifest",
            )
            (tmp_path / "go").touch()
            assert collector.wait(120) == 0
            assert writer.stdout.read().split() == ["gone", "published"]
            assert writer.wait(120) == 0
    assert names(store, "expert") == {"new"}
    assert is_whole(store)


def test_a_collection_that_was_killed_stops_nobody_and_cannot_wake_up(shared_store: Store, tmp_path: Path) -> None:
    store = shared_store
    expert = artifact(store, "expert", "old")
    with process(COLLECTOR, spec(store), tmp_path / "ready") as collector:
        wait_until((tmp_path / "ready").exists, "it is at work")
        collector.kill()
        collector.wait()
    assert store.read_pointer("leases/gc")[0] is not None
    assert store.find("expert", expert.key) is not None
    assert store.read_pointer("leases/gc") == (None, None)
    gone_after(store, later=LATER)
    assert store.list() == []


STRESS = """
import json, random, sys, time
from memmcl.store import ArtifactRef, Lease, Store
spec, seed, until = json.loads(sys.argv[1]), int(sys.argv[2]), time.time() + float(sys.argv[3])
store, draw = Store.from_spec(spec), random.Random(int(sys.argv[2]))
rounds = made = reused = 0
while time.time() < until:
    with Lease(store, f"{seed:x}{rounds:04x}", {}):
        held = []
        for number in range(3):
            key = f"{draw.randrange(8):02x}"
            found = store.find("expert", key)
            if found is None:
                files = {"a": key.encode(), "b": draw.choice("xyz").encode()}
                found = store.publish("expert", key, name=key, files=files)
                made += 1
            else:
                reused += 1
            held.append(found)
        last = store.publish("run", f"{seed:x}{rounds:04x}", name="run", files={"r": b"%d" % draw.randrange(3)},
                             inputs=[one.ref for one in held])
        for manifest in (*held, last):  # all that it found and made is there and whole
            for file in store.load(manifest.ref).blobs:
                store.read(manifest.ref, file)
    rounds += 1
print(json.dumps([rounds, made, reused]))
"""


def test_nothing_that_processes_hold_is_taken_by_collections_in_a_loop(shared_store: Store) -> None:
    """Writers that find, make and reuse the same few artifacts; two collectors that keep no run and nothing old."""
    store = shared_store
    seconds, ahead = "6", 1e7
    collected = removed = 0
    with process(STRESS, spec(store), "10", seconds) as one, process(STRESS, spec(store), "11", seconds) as two:
        while one.poll() is None or two.poll() is None:
            try:
                removed += len(collect(store, Policy(keep_runs=0), delete=True, now=time.time() + ahead).removed)
                collected += 1
            except LeaseHeld:
                continue
        assert one.wait() == two.wait() == 0
        assert one.stdout is not None
        assert two.stdout is not None
        done = [json.loads(each.stdout.read()) for each in (one, two) if each.stdout]
    print({"writers": done, "collections": collected, "removed": removed})
    assert is_whole(store)
    assert collected > 1
    gone_after(store, later=ahead, keep_runs=0)
    assert list(store.objects.sizes("blobs")) == list(store.objects.sizes("manifests")) == []


def test_the_command_says_first_and_removes_then(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "store"))
    runs = [finished_run(store, name) for name in ("first", "second")]
    blob = blob_path(store.put_blob(b"nobody's").sha256)

    def memmcl(*arguments: str) -> str:
        said = CliRunner().invoke(app, [*arguments, "--store", str(tmp_path / "store")], catch_exceptions=False)
        assert said.exit_code == 0
        return said.stdout

    said = memmcl("store", "gc", "--keep-runs", "1")
    assert f"kept     run {runs[1].key[:8]}: among the 1 newest" in said
    assert "would go; --delete removes them" in said
    assert len(names(store, "run")) == 2
    said = memmcl("store", "gc", "--keep-runs", "1", "--delete")
    assert said.splitlines()[-1].startswith("removed "), said
    assert names(store, "run") == {"second"}
    assert blob in store.objects.sizes("blobs"), "it may be part of a publication"
    assert "artifacts: run" in memmcl("store", "rm", runs[1].key[:8])
    crown(store, runs[1])
    with pytest.raises(UsageError, match="is champion champion"):
        memmcl("store", "rm", runs[1].key[:8], "--delete")
    assert store.objects.read(manifest_path("run", runs[1].key)) is not None
    with pytest.raises(UsageError, match="expected a duration such as 90m, 12h, 7d or 4w, got 'soon'"):
        memmcl("store", "gc", "--older-than", "soon")
