"""The champion's history: promotions and rollbacks, each one compare-and-swap."""

from __future__ import annotations

import pytest

from memmcl.errors import Conflict, CorruptArtifact, UsageError
from memmcl.store import Champions, Reign, Store, promote, read_champions, rollback

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    opened = Store.open(str(tmp_path_factory.mktemp("store")))
    for run_id in (A, B, C):
        opened.publish("run", run_id, name="run", files={"results.json": run_id.encode()})
    return opened


def reign(run_id: str) -> Reign:
    return Reign(run_id=run_id, name="run", since="2026-01-01T00:00:00+00:00", how="promotion", why="better")


def crowned(store: Store, *run_ids: str) -> Champions:
    champions = read_champions(store, "champion")
    for run_id in run_ids:
        champions = promote(store, champions, reign(run_id))
    return champions


def test_without_a_promotion_there_is_no_champion(store: Store) -> None:
    champions = read_champions(store, "champion")
    assert champions.current is None
    assert champions.history == champions.line == ()


def test_the_last_promotion_is_champion_and_the_history_is_kept(store: Store) -> None:
    crowned(store, A, B)
    champions = read_champions(store, "champion")
    assert champions.current is not None
    assert champions.current.run_id == B
    assert [entry.run_id for entry in champions.history] == [A, B]


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b'{"value": {}, "mark": "m"}',
    b'{"value": {"history": 5}, "mark": "m"}',
    b'{"value": {"history": [{"run_id": "a"}]}, "mark": "m"}',
    b'{"value": {"histoby": []}, "mark": "m"}',
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=str)
def test_a_damaged_history_is_one_line_and_is_not_written_over(store: Store, damaged: bytes) -> None:
    champions = crowned(store, A, B)
    store.objects.write("pointers/champions/champion.json", damaged)
    with pytest.raises(CorruptArtifact) as caught:
        read_champions(store, "champion")
    assert str(caught.value) == (
        f"the history of champion 'champion' is damaged ({store.url}/pointers/champions/champion.json); put a backup "
        "of that object in its place, or remove it to begin anew: the next retrain then makes the first champion"
    )
    with pytest.raises(Conflict):
        promote(store, champions, reign(C))
    assert store.objects.read("pointers/champions/champion.json") == damaged


@pytest.mark.timeout(20)
def test_a_long_history_is_read_in_seconds(store: Store) -> None:
    history = tuple(reign(run_id) for run_id in (*(f"{number:064x}" for number in range(10_000)), f"{4_000:064x}", A))
    promote(store, Champions("long", history, None), reign(B))
    champions = read_champions(store, "long")
    assert len(champions.history) == 10_003
    assert champions.line == (*(f"{number:064x}" for number in range(4_001)), A, B)
    assert len(champions.rolled_back) == 10_000 - 4_001


def test_champions_of_other_names_are_others(store: Store) -> None:
    crowned(store, A)
    assert read_champions(store, "german").current is None


def test_of_two_promotions_from_one_reading_the_second_loses(store: Store) -> None:
    read = crowned(store, A)
    promote(store, read, reign(B))
    with pytest.raises(Conflict):
        promote(store, read, reign(C))
    assert [entry.run_id for entry in read_champions(store, "champion").history] == [A, B]


def test_two_first_promotions_cannot_both_win(store: Store) -> None:
    nobody = read_champions(store, "champion")
    promote(store, nobody, reign(A))
    with pytest.raises(Conflict):
        promote(store, nobody, reign(B))


def test_rollbacks_walk_down_the_line(store: Store) -> None:
    champions = crowned(store, A, B, C)
    champions = rollback(store, champions)
    assert champions.line == (A, B)
    champions = rollback(store, champions)
    assert champions.line == (A,)
    assert champions.rolled_back == {B, C}
    assert [entry.how for entry in champions.history] == ["promotion"] * 3 + ["rollback"] * 2
    assert champions.history[-1].why == f"rolled back from run {B[:8]}"


def test_a_run_that_was_rolled_back_can_be_named_again(store: Store) -> None:
    champions = rollback(store, crowned(store, A, B))
    champions = rollback(store, champions, to="bb")
    assert champions.line == (A, B)
    assert champions.rolled_back == frozenset()


def test_what_cannot_be_rolled_back_is_said(store: Store) -> None:
    with pytest.raises(UsageError, match="no champion 'champion' to roll back"):
        rollback(store, read_champions(store, "champion"))
    champions = crowned(store, A)
    with pytest.raises(UsageError, match="only champion"):
        rollback(store, champions)
    with pytest.raises(UsageError, match="expected the id of one former champion, got 'cc'; former champions: none"):
        rollback(store, champions, to="cc")


def test_a_run_that_is_gone_cannot_be_champion_again(store: Store) -> None:
    champions = crowned(store, A, B)
    (blob,) = store.load(store.find("run", A).ref).blobs.values()  # type: ignore[union-attr]
    store.objects.write(f"blobs/{blob.sha256[:2]}/{blob.sha256}", b"damaged")
    with pytest.raises(UsageError, match="not whole"):
        rollback(store, champions)
    assert read_champions(store, "champion").line == (A, B)
