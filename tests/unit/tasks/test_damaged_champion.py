"""A champion that is damaged: what a retrain says of it, and that it is mended where the retrain is its own run."""

from __future__ import annotations

import json
import uuid
from types import SimpleNamespace
from typing import Any, cast

import pytest

from memmcl.errors import ServiceError
from memmcl.store import Manifest, Reign, Store, promote, read_champions
from memmcl.store.manifest import blob_path
from tasks.stages.promotion import Champion, check_whole, find_champion, nothing_to_do

ID = "3f2a" * 16


@pytest.fixture
def store() -> Store:
    """A store with a champion: its report, unified model, warm start, and the rows that the warm start is made from."""
    opened = Store.open(f"memory://{uuid.uuid4().hex}")
    rows = opened.publish("split", "aa", name="rows of an earlier run", files={"rows.parquet": b"rows"})
    warm = opened.publish("warm", "bb", name="warm start", files={"w": b"warm"}, inputs=[rows.ref])
    unified = opened.publish("unified", "cc", name="unified model", files={"w": b"unified"}, inputs=[warm.ref])
    report = {"results.json": json.dumps({"run": {}}).encode()}
    opened.publish("run", ID, name="r", files=report, inputs=[unified.ref, warm.ref])
    reign = Reign(run_id=ID, name="r", since="2026-01-01", how="promotion", why="the first")
    promote(opened, read_champions(opened, "champion"), reign)
    return opened


def champion_of(store: Store) -> Champion:
    done = store.find("run", ID)
    assert done is not None
    run = cast("Any", SimpleNamespace(id=ID))
    return Champion(read_champions(store, "champion"), done, run, {}, ())


def damage(store: Store, found: Manifest | None) -> None:
    assert found is not None
    (info,) = found.blobs.values()
    store.objects.write(blob_path(info.sha256), b"damaged")


def test_a_retrain_of_the_same_rows_goes_on_where_its_champion_is_damaged(store: Store) -> None:
    champion = champion_of(store)
    reason = nothing_to_do(store, champion.run, champion, cast("Any", None))
    assert reason == "data and settings are those of the champion, run 3f2a3f2a"
    check_whole(store, champion)
    damage(store, store.find("unified", "cc"))
    assert nothing_to_do(store, champion.run, champion, cast("Any", None)) is None
    with pytest.raises(ServiceError) as caught:
        check_whole(store, champion)
    assert "the champion, run 3f2a3f2a, is not whole in memory://" in str(caught.value)
    assert "does not match its digest; belongs to 'w' of unified 'unified model'" in str(caught.value)
    assert "`memmcl store verify --repair 3f2a3f2a` makes it again" in str(caught.value)


def test_the_rows_that_an_earlier_run_made_its_warm_start_from_are_its_own(store: Store) -> None:
    damage(store, store.find("split", "aa"))
    champion = champion_of(store)
    check_whole(store, champion)
    assert nothing_to_do(store, champion.run, champion, cast("Any", None)) is not None
    damage(store, store.find("warm", "bb"))
    with pytest.raises(ServiceError, match="'w' of warm 'warm start'"):
        check_whole(store, champion)


def test_without_its_report_there_is_no_champion_to_challenge(store: Store) -> None:
    damage(store, store.find("run", ID))
    with pytest.raises(ServiceError, match="`memmcl store verify --repair 3f2a3f2a` makes it again; `memmcl champion"):
        find_champion(store, "champion")
