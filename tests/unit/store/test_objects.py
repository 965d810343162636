"""URLs, and the one-line errors that failures of a disk or a server turn into."""

from __future__ import annotations

import errno
import fcntl
import os
import tracemalloc
from pathlib import Path

import pytest

from memmcl.errors import ConfigError, StoreAccessError, StoreError, StoreFull
from memmcl.store import Store, objects
from memmcl.store.local import TEMPORARY_SECONDS, LocalBackend
from memmcl.store.objects import Objects, normalise
from memmcl.store.translate import translate


def test_urls_become_absolute_and_lose_their_last_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert normalise("runs/a/") == f"file://{tmp_path}/runs/a"
    assert normalise("file://runs") == f"file://{tmp_path}/runs"
    assert normalise("~/runs") == f"file://{tmp_path}/runs"
    assert normalise("/x/../y") == "file:///y"
    assert normalise("s3://bucket/folder/") == "s3://bucket/folder"
    assert normalise("memory://m") == "memory://m"


@pytest.mark.parametrize("url", ["", "s3://", "s3:///", "memory://", "file://", "gs://bucket", "https://h/x"])
def test_urls_that_cannot_be_a_store_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        normalise(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        Store.open("s3://AKIAKEY:hunter2@bucket/folder")
    with pytest.raises(ConfigError) as endpoint:
        Store.open("s3://bucket", endpoint_url="http://AKIAKEY:hunter2@host:9000")
    for text in (str(caught.value), str(endpoint.value)):
        assert "hunter2" not in text
        assert "AKIAKEY" not in text


@pytest.mark.parametrize("endpoint", ["host:9000", "ftp://host", "http://", ""])
def test_an_endpoint_is_an_http_address(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="https://host:port"):
        Store.open("s3://bucket", endpoint_url=endpoint)


def test_a_store_opens_lazily_and_again_from_its_spec(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path / "deep" / "store"))
    assert not (tmp_path / "deep").exists()
    store.append("log", 0, {"a": 1})
    assert Store.from_spec(store.spec).records("log") == {0: {"a": 1}}
    assert store.spec == {"url": f"file://{tmp_path}/deep/store", "endpoint_url": None, "region": None}
    assert repr(store) == f"Store('file://{tmp_path}/deep/store')"


@pytest.mark.parametrize("below", ["file", "file/deep"])
def test_a_file_is_no_store(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreAccessError, match="is a file, not a directory"):
        Store.open(str(tmp_path / below))


def test_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def access(path: Path, mode: int) -> bool:  # root, who may run this, is allowed everything
        asked.append((str(path), mode))
        return False

    monkeypatch.setattr(os, "access", access)
    for url in (tmp_path, tmp_path / "new" / "store"):
        with pytest.raises(StoreAccessError, match=f"no permission for {tmp_path}; change its permissions"):
            Store.open(str(url))
    assert asked == [(str(tmp_path), os.R_OK | os.X_OK), (str(tmp_path), os.W_OK | os.X_OK)]


def test_a_disk_that_turned_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "x"))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreAccessError, match=f"no permission for {tmp_path}/x"):
        store.put_blob(b"data")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = Store.open(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with pytest.raises(StoreFull, match="finished work is kept; free space and run the same command again"):
            store.publish("expert", "aa", name="e", files={"f": b"data"})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert store.publish("expert", "aa", name="e", files={"f": b"data"}) == store.find("expert", "aa")


def test_other_failures_are_reported_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2secret")
    translated = translate(OSError(errno.EIO, "bad sector\nnear hunter2secret"), f"file://{tmp_path}")
    assert isinstance(translated, StoreError)
    assert "bad sector near ***;" in str(translated)
    assert "\n" not in str(translated)
    assert translate(ValueError("a bug"), "here") is None


def test_a_failure_that_may_pass_is_tried_again_and_a_bug_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "RETRY_SECONDS", (0.0, 0.0))
    place = Objects(LocalBackend(tmp_path), f"file://{tmp_path}")
    calls: list[str] = []

    def fail(error: Exception, times: int) -> None:
        def read(path: str) -> tuple[bytes, str]:
            calls.append(path)
            if len(calls) <= times:
                raise error
            return b"data", "token"

        monkeypatch.setattr(place.backend, "read", read)
        calls.clear()

    fail(ConnectionResetError(), times=2)
    assert place.read("x") == b"data"
    fail(ConnectionResetError(), times=3)
    with pytest.raises(StoreAccessError, match="cannot reach file://"):
        place.read("x")
    assert len(calls) == 3
    fail(ZeroDivisionError(), times=1)
    with pytest.raises(ZeroDivisionError):
        place.read("x")
    assert len(calls) == 1


def test_a_server_that_contradicts_itself_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Objects(LocalBackend(tmp_path), f"file://{tmp_path}")
    monkeypatch.setattr(place.backend, "create", lambda path, data: None)  # "it is there", and it is not
    with pytest.raises(StoreError, match="logs/x keeps changing"):
        place.write_once("logs/x", b"data", bool)


def test_disks_without_hard_links_still_create_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    backend = LocalBackend(tmp_path)
    assert backend.create("logs/a/0.json", b"first") is not None
    assert backend.create("logs/a/0.json", b"second") is None
    assert backend.read("logs/a/0.json")[0] == b"first"


def test_leftovers_of_killed_writers_are_swept_when_they_are_old(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    old, young = tmp_path / "tmp" / "old.part", tmp_path / "tmp" / "young.part"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    long_ago = old.stat().st_mtime - TEMPORARY_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    Store.open(str(tmp_path))
    assert not old.exists()
    assert young.exists()


def test_nobody_waits_for_a_flush_of_another_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend(tmp_path)
    token = backend.create("pointers/a.json", b"1")
    assert token is not None
    flushed, fsync = [], os.fsync

    def free(descriptor: int) -> None:
        with (tmp_path / "tmp/swap.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where the lock is held
        flushed.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", free)
    assert backend.replace("pointers/a.json", b"2", token) is not None
    assert len(flushed) == 2, "the file and its folder"
    assert backend.replace("pointers/a.json", b"3", token) is None
    assert backend.read("pointers/a.json")[0] == b"2"


def test_verification_holds_few_objects_in_memory(tmp_path: Path) -> None:
    store, size = Store.open(str(tmp_path)), 4 << 20
    for number in range(12):
        store.save_checkpoint(f"training-{number}", bytes(size))
    tracemalloc.start()
    try:
        assert store.verify().checkpoints == 12
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * size, "a few copies of one checkpoint"
