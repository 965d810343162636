"""What a garbage collection keeps and why: ages, unfinished runs, leases, damage."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from gc_fixture import DAY, LATER, artifact, crown, finished_run, gone_after, is_whole, journal, key_of, names

from memmcl.errors import CorruptArtifact
from memmcl.store import Lease, Policy, Store, collect
from memmcl.store.manifest import blob_path, manifest_path
from memmcl.store.marks import MARGIN, WEEK


def age(store: Store, *paths: str, seconds: float) -> None:
    """Let objects be as old as if they had been written so long ago."""
    backend, then = store.objects.backend, datetime.fromtimestamp(time.time() - seconds, UTC)
    for path in paths:
        backend.fs.store[backend._key(path)].modified = then  # type: ignore[attr-defined]


def age_all(store: Store, seconds: float) -> None:
    age(store, *store.objects.sizes(""), seconds=seconds)


def test_without_options_no_run_goes_and_nothing_young(store: Store) -> None:
    finished_run(store, "done")
    artifact(store, "expert", "of no run")
    blob = blob_path(store.put_blob(b"of no artifact").sha256)
    store.save_checkpoint("open", b"state")
    journal(store, "ab12", "killed")
    assert collect(store, Policy()).removed == ()
    plan = gone_after(store, later=LATER)
    assert names(store, "expert") == names(store, "run") == {"done"}
    assert blob not in store.objects.sizes("blobs")
    assert store.read_checkpoint("open") is None
    assert store.objects.folders("logs/runs") == [key_of("run done")]
    assert store.objects.folders("logs/searches") == [key_of("done")]
    assert set(plan.totals()) == {
        "artifacts: expert",
        "files that no artifact names",
        "journals of runs",
        "records of searches",
        "checkpoints",
    }


def test_older_than_keeps_younger_runs_and_takes_loose_things_earlier(store: Store) -> None:
    finished_run(store, "old")
    artifact(store, "expert", "loose")
    age_all(store, 3 * DAY)
    finished_run(store, "young")
    finished_run(store, "newest")
    plan = gone_after(store, keep_runs=1, older_than=2 * DAY)
    assert names(store, "run") == names(store, "expert") == {"young", "newest"}
    assert plan.runs[key_of("run young")] == "not older than --older-than"
    assert is_whole(store)


def test_nothing_of_the_last_hour_goes_whatever_is_asked(store: Store) -> None:
    store.put_blob(b"being published")
    artifact(store, "expert", "just made")
    assert gone_after(store, older_than=0).removed == ()
    assert len(gone_after(store, older_than=0, later=MARGIN + 60).removed) == 3


def test_an_unfinished_run_that_was_at_work_lately_keeps_what_it_used(store: Store) -> None:
    artifact(store, "expert", "older")
    age_all(store, 30 * DAY)
    artifact(store, "expert", "of the run")
    journal(store, "ab12", "killed")
    store.save_checkpoint("open", b"state")
    expert = manifest_path("expert", key_of("expert of the run"))
    age(store, expert, "logs/runs/ab12/000000.json", "checkpoints/open.bin", seconds=20 * DAY)
    plan = gone_after(store)
    assert names(store, "expert") == {"of the run"}
    assert store.read_checkpoint("open") == b"state"
    assert plan.kept[-1].startswith("1 unfinished runs that were at work not long ago")
    gone_after(store, later=LATER)
    assert store.objects.sizes("") == {}


def test_a_journal_that_is_removed_between_listing_and_reading_ends_no_collection(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact(store, "expert", "of the run")
    journal(store, "ab12", "killed")
    age_all(store, 30 * DAY)
    read = store.objects.read
    monkeypatch.setattr(store.objects, "read", lambda path: None if path.startswith("logs/runs/") else read(path))
    plan = collect(store, Policy())
    assert {"logs/runs/ab12/000000.json", manifest_path("expert", key_of("expert of the run"))} <= {
        item.path for item in plan.removed
    }


def test_what_an_unfinished_run_has_taken_over_stays(store: Store) -> None:
    """Its champion may be gone by the time that it looks for them."""
    warm = artifact(store, "warm", "of the champion before", artifact(store, "split", "rows"))
    finished_run(store, "dropped", warm)
    age_all(store, 30 * DAY)
    pinned = {"warm": warm.ref.model_dump(), "anchors": None}
    store.append("runs/ab12", 0, {"config": {}, "started": "2026-01-01T00:00:00+00:00", "pinned": pinned})
    gone_after(store, keep_runs=0)
    assert names(store, "run") == names(store, "expert") == set()
    assert names(store, "warm") == {"of the champion before"}
    assert is_whole(store)
    gone_after(store, keep_runs=0, later=LATER)
    assert store.objects.sizes("") == {}


def test_a_live_lease_keeps_what_was_used_since_and_its_own_run(store: Store) -> None:
    dropped, own = finished_run(store, "dropped"), finished_run(store, "own")
    store.save_checkpoint("open", b"state")
    artifact(store, "expert", "reused")
    age_all(store, 30 * DAY)
    with Lease(store, own.key, {}):
        assert store.find("expert", key_of("expert reused")) is not None
        plan = gone_after(store, keep_runs=0)
        assert plan.runs == {own.key: "being worked on"}
        assert names(store, "expert") == {"own", "reused"}
        assert store.objects.folders("logs/searches") == [key_of("own")]
        gone_after(store, keep_runs=0, later=LATER)
        assert names(store, "expert") == {"own", "reused"}, "however long it has been at work"
    assert store.find("run", dropped.key) is None
    assert store.objects.sizes("checkpoints") == {}, "nobody went on with it for a month"


def test_what_only_removed_runs_used_goes_at_any_age_and_what_others_used_since_stays(store: Store) -> None:
    finished_run(store, "dropped")
    finished_run(store, "also dropped", artifact(store, "expert", "reused"))
    age_all(store, 60.0)
    finished_run(store, "kept")
    assert store.find("expert", key_of("expert reused")) is not None
    gone_after(store, keep_runs=1)
    assert names(store, "expert") == {"kept", "reused"}
    assert is_whole(store)


def test_a_blob_that_is_being_reused_stays_though_its_artifact_goes(store: Store) -> None:
    dropped = finished_run(store, "dropped")
    age_all(store, 60.0)
    finished_run(store, "kept")
    blob = store.put_blob(b"run dropped")
    gone_after(store, keep_runs=1)
    assert store.find("run", dropped.key) is None
    assert blob_path(blob.sha256) in store.objects.sizes("blobs")
    artifact(store, "expert", "new", content=b"run dropped")
    assert is_whole(store)


def test_a_checkpoint_goes_once_its_training_is_published(store: Store) -> None:
    key = artifact(store, "expert", "done").key
    store.save_checkpoint("open", b"state")
    store.save_checkpoint(key, b"state")
    age(store, f"checkpoints/{key}.bin", seconds=60.0)
    gone_after(store)
    assert list(store.objects.sizes("checkpoints")) == ["checkpoints/open.bin"]


def test_leases_and_marks_of_dead_processes_go_and_pointers_stay(store: Store) -> None:
    crown(store, finished_run(store, "done"))
    store.swap_pointer("checks/ab", {"mark": "ab"}, None)
    with Lease(store, "ab12", {}):
        value, _ = store.read_pointer("leases/ab12")
    assert value is not None
    boot = value["process_start"].rpartition(":")[0]
    store.swap_pointer("leases/ab12", value | {"pid": 2**22 + 1, "process_start": f"{boot}:0"}, None)
    gone_after(store)
    assert len(store.objects.sizes("pointers")) == 3, "the next run of the same id may want to know of it"
    gone_after(store, later=LATER)
    assert list(store.objects.sizes("pointers")) == ["pointers/champions/champion.json"]


def test_judgements_go_with_either_of_their_runs(store: Store) -> None:
    first, second, third = (finished_run(store, name) for name in ("first", "second", "third"))
    scored = artifact(store, "evaluation", "first on the rows of second")
    artifact(store, "judgement", "second against first", second, first, scored)
    artifact(store, "judgement", "third against first", third, first)
    crown(store, first)
    gone_after(store, keep_runs=1)
    assert names(store, "run") == {"first", "third"}
    assert names(store, "judgement") == {"third against first"}
    assert names(store, "evaluation") == set()
    assert is_whole(store)


def test_nothing_goes_while_the_manifest_of_a_run_is_torn(store: Store) -> None:
    run = finished_run(store, "done")
    artifact(store, "expert", "loose")
    path = manifest_path("run", run.key)
    store.objects.write(path, b"{")
    plan = gone_after(store, later=LATER, keep_runs=0)
    assert plan.removed == ()
    assert plan.problems[0] == f"{path} is not a valid manifest"


def test_no_file_goes_while_the_manifest_of_what_stays_is_torn(store: Store) -> None:
    run = finished_run(store, "done")
    (path,) = store.objects.sizes("manifests/expert")
    store.objects.write(path, b"{")
    loose = artifact(store, "expert", "loose")
    blobs = store.objects.sizes("blobs")
    plan = gone_after(store, later=LATER)
    assert store.objects.sizes("blobs") == blobs
    assert store.find("expert", loose.key) is None
    assert store.objects.read(path) == b"{"
    assert plan.problems[0] == f"{path} is not a valid manifest, and what stays names it"
    assert store.load(run.ref) == run


def test_a_torn_manifest_that_nobody_names_goes_when_it_is_old(store: Store) -> None:
    store.objects.write(manifest_path("expert", "ab"), b"{")
    gone_after(store)
    assert store.objects.sizes("manifests") != {}
    gone_after(store, later=LATER)
    assert store.objects.sizes("") == {}


def test_a_lease_that_cannot_be_read_keeps_everything_for_an_hour(store: Store) -> None:
    artifact(store, "expert", "loose")
    age_all(store, 30 * DAY)
    store.objects.write("pointers/leases/ab12.json", b"{")
    assert gone_after(store).removed == ()
    age_all(store, 30 * DAY)
    assert len(gone_after(store).removed) == 3
    assert store.objects.sizes("") == {}


def test_who_is_champion_must_be_known(store: Store) -> None:
    crown(store, finished_run(store, "done"))
    store.objects.write("pointers/champions/champion.json", b"{")
    with pytest.raises(CorruptArtifact, match="champion"):
        gone_after(store, later=2 * WEEK, keep_runs=0)
    assert names(store, "run") == {"done"}
