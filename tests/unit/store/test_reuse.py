"""Reuse beside garbage collection: who waits for whom, and what is touched where that is not allowed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from gc_fixture import LATER, artifact, crown, finished_run

from memmcl.errors import LeaseHeld
from memmcl.store import Lease, Policy, Store, collect, read_champions, rollback
from memmcl.store.gc import PATIENCE
from memmcl.store.lease import COLLECTING
from memmcl.store.local import LocalBackend
from memmcl.store.manifest import manifest_path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def age(store: Store, path: str) -> None:
    os.utime(local(store).root / path, (0, 0))


def local(store: Store) -> LocalBackend:
    assert isinstance(store.objects.backend, LocalBackend)
    return store.objects.backend


def touched(store: Store, path: str) -> float:
    return store.objects.entries("")[path].touched


def test_what_is_found_is_touched_and_what_is_loaded_is_not(store: Store) -> None:
    manifest = artifact(store, "expert", "one")
    path = manifest_path("expert", manifest.key)
    age(store, path)
    store.load(manifest.ref)
    store.read(manifest.ref, "file")
    assert touched(store, path) == 0
    assert store.find("expert", manifest.key) == manifest
    assert touched(store, path) > 0


def test_a_blob_that_is_there_is_touched(store: Store) -> None:
    artifact(store, "expert", "one", content=b"same")
    (blob,) = store.objects.sizes("blobs")
    age(store, blob)
    artifact(store, "expert", "two", content=b"same")
    assert touched(store, blob) > 0


@pytest.mark.parametrize("kind", ["a run", "a rollback"])
def test_who_takes_a_lease_waits_for_a_collection(store: Store, kind: str) -> None:
    crown(store, finished_run(store, "first"), finished_run(store, "second"))
    entered = threading.Event()

    def enter() -> None:
        if kind == "a run":
            with Lease(store, "ab12", {}):
                entered.set()
        else:
            rollback(store, read_champions(store, "champion"))
            entered.set()

    with Lease(store, COLLECTING, {}):
        thread = threading.Thread(target=enter)
        thread.start()
        while not any("gc" not in path for path in store.objects.sizes("pointers/leases")):
            assert thread.is_alive()
        assert not entered.is_set()
    thread.join(60)
    assert entered.is_set()
    assert store.objects.sizes("pointers/leases") == {}


def test_of_two_collections_one_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memmcl.store.gc.PATIENCE", PATIENCE / 100)
    with Lease(store, COLLECTING, {}):
        assert collect(store, Policy()).removed == (), "who only looks disturbs nobody"
        with pytest.raises(LeaseHeld, match="another garbage collection is at work"):
            collect(store, Policy(), delete=True)


def test_a_deletion_that_fails_is_tried_again_with_the_lease_renewed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact(store, "expert", "one")
    calls: list[str] = []
    delete, update = LocalBackend.delete, Lease.update

    def failing(self: LocalBackend, paths: list[str]) -> None:
        calls.append("delete")
        if len(calls) < 4:
            raise TimeoutError("the disk is away")
        delete(self, paths)

    def renewed(self: Lease, **owner: object) -> None:
        calls.append("renew")
        update(self, **owner)

    monkeypatch.setattr(LocalBackend, "delete", failing)
    monkeypatch.setattr(Lease, "update", renewed)
    collect(store, Policy(), delete=True, now=time.time() + LATER)
    assert calls == ["renew", "delete", "renew", "delete", "renew"]
    assert store.list() == []


def test_a_file_of_another_user_is_copied_in_place_of_a_touch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = artifact(store, "expert", "one")
    path = manifest_path("expert", manifest.key)
    age(store, path)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refused)
        assert store.find("expert", manifest.key) == manifest
    assert touched(store, path) > 0


def test_a_store_that_may_only_be_read_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = artifact(store, "expert", "one")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(LocalBackend, "write", refused)
    assert store.find("expert", manifest.key) == manifest


def test_a_folder_that_a_collection_removes_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, target, removed = local(store), LocalBackend._target, []

    def emptied(self: LocalBackend, path: str) -> Path:
        found = target(self, path)
        if path.startswith("blobs/") and len(removed) < 3:
            removed.append(path)
            found.parent.rmdir()
        return found

    monkeypatch.setattr(LocalBackend, "_target", emptied)
    backend.write("blobs/ab/abcd", b"content")
    assert backend.create("blobs/cd/cdef", b"content") is not None
    assert len(removed) == 3
    assert set(store.objects.sizes("blobs")) == {"blobs/ab/abcd", "blobs/cd/cdef"}


def test_folders_that_become_empty_go(store: Store) -> None:
    store.append("runs/ab12", 0, {})
    store.objects.delete(list(store.objects.sizes("logs")))
    assert store.objects.folders("logs/runs") == []
