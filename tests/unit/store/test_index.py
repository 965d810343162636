"""Finding and listing artifacts by an index that is derived: how much is read, and what a wrong one can do."""

from __future__ import annotations

import logging
from collections import Counter
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from memmcl.api.runs import find_run
from memmcl.errors import StoreFull, UsageError
from memmcl.store import Manifest, Store, newest, starting, summaries
from memmcl.store.index import WORTH_WRITING
from memmcl.store.manifest import manifest_path
from memmcl.store.objects import Objects

MANY = 60


class Counting:
    """A backend that counts its calls."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.parallel, self.calls = backend, backend.parallel, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.backend, name)

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return method(*arguments)

        return call


def counted(store: Store) -> tuple[Store, Counter[str]]:
    backend = Counting(store.objects.backend)
    return Store(Objects(backend, store.url), store.spec), backend.calls


def publish(store: Store, number: int, kind: str = "run") -> Manifest:
    return store.publish(kind, f"{number:08x}", name=f"{kind} {number}", files={"file": b"%d" % number})


@pytest.fixture
def many(store: Store) -> Store:
    for number in range(MANY):
        publish(store, number)
    publish(store, 1, "expert")
    return store


def test_summaries_say_what_the_manifests_say(many: Store) -> None:
    for _ in range(2):  # read, then from the index
        assert [(one.kind, one.key, one.name, one.created, one.seconds, one.size) for one in summaries(many)] == [
            (one.kind, one.key, one.name, one.created, one.seconds, sum(blob.size for blob in one.blobs.values()))
            for one in many.list()
        ]
    assert [one.key for one in summaries(many, "expert")] == ["00000001"]


def test_the_second_list_reads_no_manifest(many: Store) -> None:
    watched, calls = counted(many)
    summaries(watched)
    assert calls["read"] == 2 + MANY + 1
    calls.clear()
    summaries(watched)
    assert calls == {"folders": 1, "entries": 2, "read": 2 + 1}, "both indices; that of one expert is not worth writing"


def test_the_latest_run_is_found_without_reading_all(many: Store) -> None:
    latest = publish(many, 7_000)
    watched, calls = counted(many)
    assert newest(watched, "run") == latest
    assert calls["read"] <= 1 + MANY + 2, "all were written within minutes: nobody knows which is the newest"
    calls.clear()
    assert newest(watched, "run") == latest
    assert calls["read"] == 2, "the index, and the run"


def test_without_an_index_only_the_latest_manifests_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    past = datetime(2020, 1, 1, tzinfo=UTC)
    with monkeypatch.context() as patch:
        patch.setattr("memmcl.store.store.datetime", SimpleNamespace(now=lambda _: past))
        for number in range(MANY):
            publish(store, number)
    for file in store.objects.backend.fs.store.values():  # type: ignore[attr-defined]
        file.modified = past
    latest = publish(store, 7_000)
    watched, calls = counted(store)
    assert newest(watched, "run") == latest
    assert calls["read"] <= 1 + 16 + 1


def test_a_run_is_found_by_its_first_digits_without_reading_others(many: Store) -> None:
    watched, calls = counted(many)
    assert find_run(watched, "0000003").key == "0000003b"
    assert calls["read"] <= 1 + 16 + 1, "the index, those that begin so, the run"
    calls.clear()
    assert starting(watched, "0000001f") == [("run", "0000001f")]
    assert sorted(starting(watched, "00000001")) == [("expert", "00000001"), ("run", "00000001")]
    assert calls["read"] == 0


@pytest.mark.parametrize("damage", [b"", b"1 torn\n[]", b"\xff\xfe", b"2 of another version\n{}"])
def test_a_damaged_index_counts_as_none_and_is_replaced(many: Store, damage: bytes) -> None:
    before = summaries(many)
    whole = many.objects.read("index/run")
    many.objects.write("index/run", damage)
    assert summaries(many) == before
    assert many.objects.read("index/run") == whole


def test_an_index_is_never_trusted_over_manifests(many: Store) -> None:
    """Replaced, removed and torn manifests, and new ones: a list is that of the manifests, whatever the index says."""
    summaries(many)
    gone, torn, changed = (manifest_path("run", f"{number:08x}") for number in (1, 2, 3))
    many.objects.delete([gone])
    many.objects.write(torn, b"{")
    many.objects.delete([changed])
    many.publish("run", "00000003", name="other", files={})
    new = publish(many, 9_000)
    listed = summaries(many, "run")
    assert [one.key for one in listed] == [one.key for one in many.list("run")]
    assert [one.name for one in listed if one.key == "00000003"] == ["other"]
    assert listed[0].key == new.key
    many.objects.delete([manifest_path("run", new.key)])
    assert newest(many, "run") == many.list("run")[0]


def test_a_touched_manifest_is_read_again_and_no_other(many: Store) -> None:
    summaries(many)
    many.find("run", "00000004")
    watched, calls = counted(many)
    summaries(watched, "run")
    assert calls["read"] == 1 + 1


def test_an_index_that_lacks_much_is_written_anew(many: Store) -> None:
    summaries(many)
    before = many.objects.read("index/run")
    for number in range(100, 100 + WORTH_WRITING):
        publish(many, number)
    summaries(many)
    assert many.objects.read("index/run") == before
    publish(many, 200)
    summaries(many)
    watched, calls = counted(many)
    summaries(watched, "run")
    assert calls["read"] == 1


def test_a_store_that_cannot_be_written_is_listed_too(many: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreFull("no space left")

    watched, _ = counted(many)
    monkeypatch.setattr(watched.objects, "write", full)
    assert [one.key for one in summaries(watched)] == [one.key for one in many.list()]


def test_an_empty_store_has_no_newest_run(store: Store) -> None:
    assert newest(store, "run") is None
    assert summaries(store) == starting(store, "ab") == []
    with pytest.raises(UsageError, match="no finished run in"):
        find_run(store)


def test_a_torn_manifest_is_left_out_with_a_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    kept = publish(store, 1)
    store.objects.write(manifest_path("run", "ff"), b"{")
    with caplog.at_level(logging.WARNING):
        assert newest(store, "run") == kept
        assert [one.key for one in summaries(store)] == [kept.key]
    assert f"{manifest_path('run', 'ff')} is not a valid manifest" in caplog.text


def test_lists_are_as_wide_as_what_they_hold(many: Store) -> None:
    said = CliRunner().invoke(app, ["store", "ls", "run", "--store", many.url], catch_exceptions=False)
    lines = said.stdout.splitlines()
    assert len(lines) == 1 + MANY
    assert lines[0].split() == ["kind", "key", "name", "created", "seconds", "size"]
    assert lines[1].split()[:4] == ["run", f"{MANY - 1:08x}", "run", str(MANY - 1)]
    assert len({line.index("run ", 4) for line in lines[1:]}) == 1
