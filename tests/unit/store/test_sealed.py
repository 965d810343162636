"""Every object of a store checks itself: no bit of any of them changes unnoticed, and none is taken for another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memmcl.errors import CorruptArtifact
from memmcl.store import ArtifactRef, StageSettings, Store
from memmcl.store.sealed import is_sealed, seal, unseal

KEY = "0f" * 32
RECORD = {"genome": [0.25, -1.5], "fitness": 0.75, "values": {"irony": 0.5}, "seconds": {"merge": 0.1}}


def manifest(store: Store) -> Any:
    return store.find("expert", KEY)


def record(store: Store) -> Any:
    return store.records("searches/x").get(7)


def pointer(store: Store) -> Any:
    try:
        return store.read_pointer("champions/c")[0]
    except CorruptArtifact:
        return None


def checkpoint(store: Store) -> Any:
    return store.read_checkpoint(KEY)


def blob(store: Store) -> Any:
    try:
        return store.read(ArtifactRef(kind="expert", key=KEY, name=""), "a.json")
    except CorruptArtifact:
        return None


KINDS: dict[str, tuple[str, Callable[[Store], Any]]] = {
    "manifest": ("manifests/", manifest),
    "record": ("logs/", record),
    "pointer": ("pointers/", pointer),
    "checkpoint": ("checkpoints/", checkpoint),
    "blob": ("blobs/", blob),
}


def fill(store: Store) -> None:
    """Put one small object of each kind into the store."""
    store.publish(
        "expert", KEY, name="e", files={"a.json": b"{}"}, settings=StageSettings({"rank": 8}), metrics={"loss": 0.5}
    )
    store.append("searches/x", 7, RECORD)
    store.swap_pointer("champions/c", {"history": []}, None)
    store.save_checkpoint(KEY, b"step 2")


def flips(data: bytes) -> Iterator[bytes]:
    """Yield `data` with each of its bits flipped in turn."""
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_of_any_object_is_accepted(store: Store, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    fill(store)
    folder, look = KINDS[kind]
    assert store.verify().problems == ()
    assert look(store) is not None
    (path,) = store.objects.sizes(folder)
    data = store.objects.read(path)
    assert data is not None
    for changed in flips(data):
        store.objects.write(path, changed)
        assert look(store) is None, f"{changed!r} was accepted"
    assert [problem.where for problem in store.verify().problems] == [path]
    store.objects.write(path, data)
    assert store.verify().problems == ()


def test_an_object_says_what_it_is_and_any_tool_reads_it(store: Store) -> None:
    fill(store)
    for folder in ("manifests/", "logs/", "pointers/"):
        ((path, _),) = store.objects.sizes(folder).items()
        data = store.objects.read(path)
        assert data is not None
        digest, document = json.loads(data)
        assert len(digest) == 64
        assert unseal(path, data) == document
        assert seal(path, document) == data


@pytest.mark.parametrize("folder", ["manifests", "logs", "pointers"])
def test_an_object_at_another_place_is_not_accepted(store: Store, folder: str) -> None:
    fill(store)
    ((path, _),) = store.objects.sizes(folder).items()
    elsewhere = {
        "manifests": f"manifests/expert/{KEY[::-1]}.json",
        "logs": "logs/searches/x/000008.json",
        "pointers": "pointers/champions/d.json",
    }[folder]
    data = store.objects.read(path)
    assert data is not None
    store.objects.write(elsewhere, data)
    assert [problem.where for problem in store.verify().problems] == [elsewhere]


def test_what_earlier_versions_wrote_is_read_and_counted(store: Store) -> None:
    fill(store)
    before = (manifest(store), record(store), pointer(store))
    for folder in ("manifests/", "logs/", "pointers/"):
        ((path, _),) = store.objects.sizes(folder).items()
        data = store.objects.read(path)
        assert data is not None
        store.objects.write(path, json.dumps(unseal(path, data), indent=2).encode() + b"\n")
    assert (manifest(store), record(store), pointer(store)) == before
    assert store.append("searches/x", 7, {"fitness": 0.1}) == RECORD
    found = store.verify()
    assert (found.problems, found.unsealed) == ((), 3)
    token = store.read_pointer("champions/c")[1]
    store.swap_pointer("champions/c", {"history": [1]}, token)
    assert store.verify().unsealed == 2, "what is written now is sealed"


def test_a_damaged_object_is_replaced_by_the_next_write(store: Store) -> None:
    fill(store)
    kept = manifest(store)
    for folder in ("manifests/", "logs/"):
        ((path, _),) = store.objects.sizes(folder).items()
        data = store.objects.read(path)
        assert data is not None
        assert is_sealed(data)
        store.objects.write(path, data.replace(b"0.5", b"0.6"))
    assert (manifest(store), record(store)) == (None, None)
    fill_again = store.publish(
        "expert", KEY, name="e", files={"a.json": b"{}"}, settings=StageSettings({"rank": 8}), metrics={"loss": 0.5}
    )
    assert fill_again.blobs == kept.blobs
    assert store.append("searches/x", 7, RECORD) == RECORD
    assert store.verify().problems == ()


def test_an_artifact_that_a_run_names_and_that_is_gone_is_reported(store: Store) -> None:
    split = store.publish("split", "aa", name="irony train", files={"rows": b"1"})
    expert = store.publish("expert", "bb", name="expert irony", files={"w": b"2"}, inputs=[split.ref])
    store.publish("run", "cc", name="r", files={"results.json": b"3"}, inputs=[expert.ref])
    assert store.verify().problems == ()
    found = store.objects.versioned("manifests/split/aa.json")
    assert found is not None
    store.objects.remove("manifests/split/aa.json", found[1])
    (problem,) = store.verify().problems
    assert (problem.where, problem.what) == (
        "manifests/split/aa.json",
        "missing; split 'irony train' (aa) is an input of expert 'expert irony' (bb)",
    )
