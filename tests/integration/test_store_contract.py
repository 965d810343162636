"""What every store does, whatever lies below: a directory, memory, or a real S3 server."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import sys
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from memmcl.errors import ArtifactNotFound, Conflict, CorruptArtifact, StoreAccessError, StoreFull
from memmcl.store import ArtifactRef, Manifest, StageSettings, Store, objects
from memmcl.store.manifest import blob_path, manifest_path
from memmcl.store.objects import Objects

T = TypeVar("T")
KEY = "0f" * 32
PATH = manifest_path("expert", KEY)


@pytest.fixture(params=["file", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store on each kind of place."""
    if request.param == "file":
        return Store.open(str(tmp_path / "store"))
    if request.param == "memory":
        return Store.open(f"memory://{uuid.uuid4().hex}")
    server = request.getfixturevalue("s3")
    url = f"s3://{server.bucket}/{uuid.uuid4().hex}"
    return Store.open(url, endpoint_url=server.endpoint_url, region="us-east-1")


class Faulty:
    """A backend that calls `fault` before (or after) the n-th call, counted from 0, and then works on."""

    def __init__(self, backend: Any, nth: int, error: Exception, after: bool = False) -> None:
        self.backend, self.nth, self.error, self.after = backend, nth, error, after
        self.parallel = backend.parallel
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.backend, name)

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            fails = len(self.calls) - 1 == self.nth
            if fails and not self.after:
                raise self.error
            result = method(*arguments)
            if fails:
                raise self.error
            return result

        return call


def faulty(store: Store, nth: int, error: Exception, after: bool = False) -> Store:
    backend = Faulty(store.objects.backend, nth, error, after)
    return Store(Objects(backend, store.url, store.objects.endpoint_url), store.spec)


def together(calls: list[Callable[[], T]]) -> list[T | Exception]:
    """Run the calls in as many threads, started at once; return their results or exceptions."""
    barrier = threading.Barrier(len(calls))
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # let the threads interleave inside short calls too
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return results


def rounds(store: Store) -> int:
    """How often a race is run: the S3 server takes a second for each."""
    return 2 if store.url.startswith("s3") else 10


def publish(store: Store, content: bytes = b"weights", key: str = KEY, kind: str = "expert") -> Manifest:
    return store.publish(kind, key, name="irony", files={"adapter/a.bin": content, "b.json": b"{}"})


def blob_of(manifest: Manifest, file: str = "adapter/a.bin") -> str:
    return blob_path(manifest.blobs[file].sha256)


def remove(store: Store, path: str) -> None:
    found = store.objects.versioned(path)
    assert found is not None
    assert store.objects.remove(path, found[1])


def test_what_is_published_can_be_found_read_and_fetched(store: Store, tmp_path: Path) -> None:
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(range(256)) * 8192)  # 2 MiB
    source = ArtifactRef(kind="splits", key="ab", name="irony train")
    manifest = store.publish(
        "expert",
        KEY,
        name="expert irony",
        files={"adapter/a.bin": big, "empty": b"", "b.json": b"{}"},
        inputs=[source],
        settings=StageSettings({"rank": 8}, seed=7, stage_version=3),
        seconds=1.5,
        metrics={"loss": 0.5, "steps": (1, 2)},
    )
    assert manifest.inputs == (source,)
    assert (manifest.seed, manifest.stage_version, manifest.seconds) == (7, 3, 1.5)
    assert manifest.metrics == {"loss": 0.5, "steps": [1, 2]}
    again = Store.from_spec(json.loads(json.dumps(store.spec)))
    assert again.find("expert", KEY) == manifest
    assert again.load(manifest.ref) == manifest
    assert again.read(manifest.ref, "adapter/a.bin") == big.read_bytes()
    directory = again.fetch(manifest, tmp_path / "fetched")
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert files == {"adapter/a.bin", "empty", "b.json"}
    assert (directory / "adapter/a.bin").read_bytes() == big.read_bytes()
    assert (directory / "empty").read_bytes() == b""


def test_a_full_disk_under_the_fetched_files(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = publish(store)
    (tmp_path / "out").mkdir()

    def full(path: Path, *_: object) -> None:
        assert path.is_relative_to(tmp_path / "out")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)  # what was written last did not fit
        with pytest.raises(StoreFull, match=f"no space left in {tmp_path}/out"):
            store.fetch(manifest, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("damage", [b"WEIGHTS", b"", None])
def test_no_damaged_file_is_fetched(store: Store, tmp_path: Path, damage: bytes | None) -> None:
    manifest = publish(store)
    if damage is None:
        remove(store, blob_of(manifest))
    else:
        store.objects.write(blob_of(manifest), damage)
    with pytest.raises(ArtifactNotFound if damage is None else CorruptArtifact, match=r"'adapter/a.bin' of"):
        store.fetch(manifest, tmp_path / "out")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_what_is_not_there_is_said_to_be_missing(store: Store) -> None:
    assert store.find("expert", KEY) is None
    assert store.list() == []
    assert store.records("search/x") == {}
    assert store.read_pointer("champion") == (None, None)
    with pytest.raises(ArtifactNotFound, match="run the pipeline that makes it"):
        store.load(ArtifactRef(kind="expert", key=KEY, name="irony"))
    with pytest.raises(ArtifactNotFound, match=r"no file 'c'; it has adapter/a.bin, b.json"):
        store.read(publish(store), "c")


def test_publishing_again_keeps_the_first(store: Store) -> None:
    first = publish(store)
    assert publish(store) == first
    assert publish(store, b"others") == first
    assert store.read(first, "adapter/a.bin") == b"weights"


@pytest.mark.parametrize("damage", [b"weigh", b"WEIGHTS", b"", None])
def test_a_damaged_blob_means_make_it_again_and_publishing_repairs(
    store: Store, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = publish(store)
    path = blob_of(manifest)
    if damage is None:
        remove(store, path)
    else:
        store.objects.write(path, damage)
    with caplog.at_level(logging.WARNING):
        assert store.find("expert", KEY) is None
    (record,) = caplog.records
    assert "'irony'" in record.getMessage()
    assert path in record.getMessage()
    with pytest.raises(ArtifactNotFound if damage is None else CorruptArtifact, match=r"'adapter/a.bin' of"):
        store.read(manifest, "adapter/a.bin")
    assert [problem.where for problem in store.verify().problems] == [path]
    assert publish(store) == manifest
    assert store.find("expert", KEY) == manifest
    assert store.verify().problems == ()


def test_a_damaged_winner_is_replaced_by_other_content(store: Store) -> None:
    first = publish(store)
    store.objects.write(blob_of(first), b"torn")
    second = publish(store, b"made again, differently")
    assert second != first
    assert store.find("expert", KEY) == second


def test_a_torn_manifest_counts_as_none_and_is_replaced(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    first = publish(store)
    data = store.objects.read(PATH)
    assert data is not None
    store.objects.write(PATH, data[: len(data) // 2])
    with caplog.at_level(logging.WARNING):
        assert store.find("expert", KEY) is None
        assert store.list() == []
    assert len(caplog.records) == 2
    assert [problem.where for problem in store.verify().problems] == [PATH]
    second = publish(store)
    assert second.blobs == first.blobs
    assert store.find("expert", KEY) == second


def test_lists_are_by_kind_and_newest_first(store: Store) -> None:
    manifests = [publish(store, key=key) for key in ("aa", "bb", "cc")]
    other = publish(store, kind="expert2")
    assert store.list("expert") == manifests[::-1]
    assert store.list() == [other, *manifests[::-1]]
    assert store.list("exp") == []


def test_verify_counts_and_names_problems(store: Store) -> None:
    manifest = publish(store)
    store.put_blob(b"left over")
    clean = store.verify()
    assert (clean.manifests, clean.blobs, clean.unreferenced, clean.problems) == (1, 3, 1, ())
    assert clean.bytes == len(b"weights") + len(b"{}") + len(b"left over")
    remove(store, blob_of(manifest, "b.json"))
    store.objects.write(blob_of(manifest), b"torn")
    problems = {problem.where: problem.what for problem in store.verify().problems}
    assert problems.keys() == {blob_of(manifest), blob_of(manifest, "b.json")}
    assert problems[blob_of(manifest)].startswith("does not match its digest; belongs to 'adapter/a.bin' of expert")
    assert problems[blob_of(manifest, "b.json")].startswith("missing; belongs to 'b.json' of expert")


def test_a_healthy_blob_is_not_written_again(store: Store) -> None:
    info = store.put_blob(b"weights")
    watched = faulty(store, -1, AssertionError())
    assert watched.put_blob(b"weights") == info
    assert watched.objects.backend.calls == ["touch", "read", "stream"], "reused, no collection at work, whole"


def test_of_eight_publishers_one_wins_and_all_return_it(store: Store) -> None:
    for key in [f"{number:02x}" for number in range(rounds(store))]:
        results = together([lambda n=n, key=key: publish(store, b"%d" % n, key) for n in range(8)])
        assert all(result == store.find("expert", key) for result in results)


def test_of_eight_repairers_of_a_torn_manifest_one_wins(store: Store) -> None:
    store.objects.write(PATH, b"{")
    results = together([lambda n=n: publish(store, b"%d" % n) for n in range(8)])
    assert all(result == store.find("expert", KEY) for result in results)


def test_of_eight_swaps_exactly_one_succeeds(store: Store) -> None:
    token: str | None = None
    for round_ in range(rounds(store)):  # the first round creates the pointer
        results = together([partial(store.swap_pointer, "champion", {"same": round_}, token)] * 8)
        winners = [result for result in results if isinstance(result, str)]
        losers = [result for result in results if isinstance(result, Conflict)]
        assert (len(winners), len(losers)) == (1, 7)
        assert store.read_pointer("champion") == ({"same": round_}, winners[0])
        token = winners[0]


def test_swaps_in_a_loop_lose_no_increment(store: Store) -> None:
    store.swap_pointer("count", {"n": 0}, None)

    def increment() -> None:
        for _ in range(5):
            while True:
                value, token = store.read_pointer("count")
                assert value is not None
                try:
                    store.swap_pointer("count", {"n": value["n"] + 1}, token)
                    break
                except Conflict:
                    continue

    assert together([increment] * 4) == [None] * 4
    assert store.read_pointer("count")[0] == {"n": 20}


def test_an_old_token_never_becomes_valid_again(store: Store) -> None:
    first = store.swap_pointer("champion", {"model": "a"}, None)
    second = store.swap_pointer("champion", {"model": "b"}, first)
    third = store.swap_pointer("champion", {"model": "a"}, second)
    assert len({first, second, third}) == 3
    with pytest.raises(Conflict, match="read it again"):
        store.swap_pointer("champion", {"model": "c"}, first)
    with pytest.raises(Conflict):
        store.delete_pointer("champion", first)
    assert store.read_pointer("champion") == ({"model": "a"}, third)


def test_a_deleted_pointer_is_gone_and_can_be_made_again(store: Store) -> None:
    token = store.swap_pointer("leases/x", {"a": 1}, None)
    with pytest.raises(Conflict):
        store.swap_pointer("leases/x", {"a": 2}, None)
    store.delete_pointer("leases/x", token)
    assert store.read_pointer("leases/x") == (None, None)
    with pytest.raises(Conflict):
        store.swap_pointer("leases/x", {"a": 2}, token)
    with pytest.raises(Conflict):
        store.delete_pointer("leases/x", token)
    store.swap_pointer("leases/x", {"a": 3}, None)
    assert store.read_pointer("leases/x")[0] == {"a": 3}


def test_a_pointer_that_is_not_ours_is_reported(store: Store) -> None:
    store.objects.write("pointers/champion.json", b"garbage")
    with pytest.raises(CorruptArtifact, match=r"pointers/champion\.json"):
        store.read_pointer("champion")


def test_a_record_is_written_once(store: Store) -> None:
    assert store.append("search/x", 3, {"score": 0.5, "genome": (1.0, 2.0)}) == {"score": 0.5, "genome": [1.0, 2.0]}
    assert store.append("search/x", 3, {"score": 0.7}) == {"score": 0.5, "genome": [1.0, 2.0]}
    assert store.append("search/x", 0, {"score": 0.1}) == {"score": 0.1}
    store.append("search/x/deeper", 1, {"score": 9})
    store.append("search/xy", 1, {"score": 9})
    records = store.records("search/x")
    assert records == {0: {"score": 0.1}, 3: {"score": 0.5, "genome": [1.0, 2.0]}}
    assert list(records) == [0, 3]
    for log, index in (("../x", 0), ("x", -1)):
        with pytest.raises(ValueError, match=r"cannot name|0 or more"):
            store.append(log, index, {})


def test_a_torn_record_is_skipped_and_replaced(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.append("search/x", 0, {"score": 0.1})
    store.objects.write("logs/search/x/000001.json", b'{"score": 0.')
    with caplog.at_level(logging.WARNING):
        assert store.records("search/x") == {0: {"score": 0.1}}
    assert "000001.json is damaged" in caplog.text
    results = together([lambda n=n: store.append("search/x", 1, {"writer": n}) for n in range(8)])
    assert all(result == store.records("search/x")[1] for result in results)


def test_many_records_come_back_in_order(store: Store) -> None:
    for index in range(40):
        store.append("log", index, {"i": index})
    assert store.records("log") == {index: {"i": index} for index in range(40)}


def test_a_checkpoint_is_replaced_whole_and_dropped(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert store.read_checkpoint(KEY) is None
    store.drop_checkpoint(KEY)  # nothing to drop is no error
    store.save_checkpoint(KEY, b"step 2")
    store.save_checkpoint(KEY, b"step 4")
    assert store.read_checkpoint(KEY) == b"step 4"
    assert store.read_checkpoint("0e" * 32) is None
    assert store.list() == []
    assert list(store.verify().problems) == []
    ((_, size),) = store.objects.sizes("checkpoints").items()
    assert size > len(b"step 4")
    store.drop_checkpoint(KEY)
    assert store.read_checkpoint(KEY) is None
    assert not any(
        path.endswith(".bin") for path in store.objects.sizes("checkpoints")
    )  # an S3 server may keep a folder
    assert caplog.text == ""


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:5], lambda data: b"", lambda data: data[:-1] + b"\0"]
)
def test_a_damaged_checkpoint_counts_as_none(
    store: Store, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    store.save_checkpoint(KEY, b"step 2")
    ((path, _),) = store.objects.sizes("checkpoints").items()
    content = store.objects.read(path)
    assert content is not None
    store.objects.write(path, damage(content))
    with caplog.at_level(logging.WARNING):
        assert store.read_checkpoint(KEY) is None
    (record,) = caplog.records
    assert f"checkpoint {KEY} in {store.url} is damaged and counts as not written" in record.getMessage()
    store.save_checkpoint(KEY, b"step 4")
    assert store.read_checkpoint(KEY) == b"step 4"


def test_a_full_disk_leaves_the_last_checkpoint(store: Store) -> None:
    store.save_checkpoint(KEY, b"step 2")
    with pytest.raises(StoreFull):
        faulty(store, 0, OSError(errno.ENOSPC, "full")).save_checkpoint(KEY, b"step 4")
    assert store.read_checkpoint(KEY) == b"step 2"


def test_a_full_disk_at_any_call_publishes_nothing_and_loses_nothing(store: Store) -> None:
    kept = publish(store, key="aa")
    error = OSError(errno.ENOSPC, "No space left on device")
    for nth in itertools.count():
        try:
            manifest = publish(faulty(store, nth, error), b"new")
            break
        except StoreFull:
            assert store.find("expert", KEY) is None
            assert store.find("expert", "aa") == kept
    assert nth == 8  # to touch and write the first; once it was kept: three looks at each, at the manifest, its write
    assert store.find("expert", KEY) == manifest


@pytest.mark.parametrize("after", [False, True])
def test_a_connection_lost_at_any_call_does_not_show(
    store: Store, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when the server did what it was asked and only its answer got lost (`after`)."""
    monkeypatch.setattr(objects, "RETRY_SECONDS", (0.0,))
    for nth in range(7):
        shaky = faulty(store, nth, ConnectionResetError("lost"), after)
        key = f"{nth:02x}"
        manifest = publish(shaky, b"new %d" % nth, key)
        assert shaky.append("log", nth, {"n": nth}) == {"n": nth}
        token = shaky.swap_pointer(f"p{nth}", {"n": 1}, None)
        shaky.swap_pointer(f"p{nth}", {"n": 2}, token)
        assert store.find("expert", key) == manifest
        assert store.read_pointer(f"p{nth}")[0] == {"n": 2}
        assert len(shaky.objects.backend.calls) > nth


class TestS3Access:
    """What a user reads when the S3 server cannot be used."""

    def open(self, server: Any, bucket: str | None = None, endpoint_url: str | None = None) -> str:
        with pytest.raises(StoreAccessError) as caught:
            Store.open(
                f"s3://{bucket or server.bucket}/x",
                endpoint_url=endpoint_url or server.endpoint_url,
                region="us-east-1",
            )
        text = str(caught.value)
        assert "\n" not in text
        assert caught.value.__suppress_context__
        assert server.access_key not in text
        assert server.secret_key not in text
        return text

    def test_a_wrong_secret(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        text = self.open(s3)
        assert "refused access (SignatureDoesNotMatch); check AWS_ACCESS_KEY_ID" in text
        assert "wrong-secret" not in text

    def test_a_wrong_key(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong-key")
        text = self.open(s3)
        assert "refused access (InvalidAccessKeyId)" in text
        assert "wrong-key" not in text

    def test_no_credentials(self, s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(variable)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        assert "no credentials for s3://" in self.open(s3)

    def test_no_bucket(self, s3: Any) -> None:
        assert "no bucket for s3://elsewhere/x at http" in self.open(s3, bucket="elsewhere")

    def test_nobody_listens(self, s3: Any) -> None:
        assert "cannot reach s3://" in self.open(s3, endpoint_url="http://127.0.0.1:9")

    def test_credentials_stay_out_of_everything_that_is_stored_or_shown(self, s3: Any) -> None:
        store = Store.open(f"s3://{s3.bucket}/secret", endpoint_url=s3.endpoint_url, region="us-east-1")
        publish(store)
        store.swap_pointer("champion", {"a": 1}, None)
        shown = repr(store) + json.dumps(store.spec) + store.url
        for path in store.objects.sizes(""):
            shown += path + str(store.objects.read(path))
        assert "manifests/expert" in shown
        assert s3.secret_key not in shown
        assert s3.access_key not in shown
