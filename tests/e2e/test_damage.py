"""Damage in a store after its run has finished: it is said in one line, and made again to the same bits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_driver import Desk, Ended, desk, manifest

from memmcl.store import Manifest
from memmcl.store.manifest import blob_path, manifest_path

pytestmark = pytest.mark.timeout(1800)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, reference: Desk, prefect_api: str) -> Iterator[Desk]:
    """A desk with a copy of the finished run's store."""
    with desk(tmp_path, tiny_base, server=prefect_api) as found:
        shutil.copytree(reference.cwd / "memmcl-store", found.cwd / "memmcl-store")
        yield found


def flip(place: Desk, path: str) -> None:
    """Flip a bit in the middle of an object."""
    file = place.cwd / "memmcl-store" / path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def blob(found: Manifest, name: str) -> str:
    """Return the path of a file of an artifact."""
    return blob_path(found.blobs[name].sha256)


def line_of(ended: Ended) -> str:
    """Return the one line of an error."""
    assert ended.code == 1, ended
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in ended.err
    return line


def bits(place: Desk) -> dict[str, dict[str, str]]:
    """Return the digests of all files, but for those that hold times, by artifact."""
    return {
        f"{one.kind} {one.key}": {file: info.sha256 for file, info in one.blobs.items()}
        for one in place.store.list()
        if one.kind not in {"search", "run"}
    }


@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_what_is_damaged_after_the_end_is_made_again(place: Desk, more: bool) -> None:
    """With `more`, what a training and a search made is damaged too, and they are at work again."""
    store = place.store
    (done,) = store.list("run")
    whole = bits(place)
    unified, expert = manifest(store, "unified", "unified model"), manifest(store, "expert", "expert irony")
    gate, search = manifest(store, "gate", "context gate sent2"), manifest(store, "search", "search unified")
    record = next(iter(store.objects.sizes("logs/searches")))
    flip(place, blob(unified, WEIGHTS))
    (place.cwd / "memmcl-store" / blob(gate, "gate.json")).unlink()
    flip(place, record)
    flip(place, f"logs/runs/{done.key}/000000.json")
    if more:
        flip(place, manifest_path("expert", expert.key))
        (place.cwd / "memmcl-store" / manifest_path("search", search.key)).write_bytes(b"{")

    mend = f"`memmcl store verify --repair {done.key[:8]} --store {store.url}`"
    for command in (("report",), ("predict", "The food was great.")):
        line = line_of(place.run(*command))
        assert line.startswith(f"error: run {done.key[:8]} is damaged: '{WEIGHTS}' of unified 'unified model'")
        assert f"run its command again, or {mend}" in line
    assert place.run("store", "verify").code == 1

    ended = place.run("store", "verify", "--repair", done.key[:8])
    assert ended.code == 0, ended
    assert (f"{manifest_path('expert', expert.key)}: not a valid manifest" in ended.out) == more
    assert f"{record}: damaged, removed" in ended.out
    assert ended.out.splitlines()[-1] == f"run {done.key[:8]} is whole"
    assert "Traceback" not in ended.err

    assert bits(place) == whole
    assert store.find("run", done.key) == done, "the report of the run stays"
    assert store.load(unified.ref) == unified
    assert list(store.verify().problems) == []
    assert place.run("predict", "The food was great.").code == 0
    again = place.run("run", place.config)
    assert again.code == 0, again
    assert f"run {done.key[:8]} is finished; from the store:" in again.out


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["split", "warm", "expert", "reference", "search", "unified", "evaluation", "run"])
@pytest.mark.parametrize("what", ["manifest", "blob"])
def test_the_same_command_makes_again_what_is_damaged(place: Desk, kind: str, what: str) -> None:
    store = place.store
    (done,), whole = store.list("run"), bits(place)
    found = store.list(kind)[0]
    flip(place, manifest_path(kind, found.key) if what == "manifest" else blob(found, next(iter(found.blobs))))
    ended = place.run("run", place.config)
    assert ended.code == 0, ended
    assert "will be repaired" in ended.err
    assert bits(place) == whole
    assert store.closure("run", done.key).problems == ()
    assert [one.key for one in store.list("run")] == [done.key]
    asked = place.run("predict", "The food was great.")
    assert asked.code == 0, asked
