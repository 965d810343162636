"""Leases: who may take one over, and what its holder notices. Real kills are in the integration tests."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from memmcl.errors import LeaseHeld, StoreAccessError
from memmcl.store import Lease, Store, objects
from memmcl.store.processes import identity, process_start

RUN = "3f2a" * 16
BOOT = str(process_start(os.getpid())).rpartition(":")[0]
EARLIER = f"{BOOT}:17"
"""The start of a process of this boot that is gone, whoever has its pid by now."""


def hold(store: Store, **change: Any) -> None:
    """Write the lease of some other holder."""
    held = {**identity(), "run_id": RUN, "since": time.time(), "beat": time.time(), "ttl": 60.0}
    store.swap_pointer(f"leases/{RUN}", {**held, "owner": {"n": 1}, "abandoned": [], **change}, None)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "waited 5 s in vain"
        time.sleep(0.01)


def test_a_lease_is_exclusive_and_released_at_the_end(store: Store) -> None:
    with Lease(store, RUN, {"flow_run_id": "f1"}) as lease:
        assert lease.previous is None
        with pytest.raises(LeaseHeld, match=r"run 3f2a3f2a is being worked on by pid \d+ on host .* since 20"):
            Lease(store, RUN, {}).__enter__()
        with Lease(store, "other", {}):
            lease.check()
    assert store.read_pointer(f"leases/{RUN}") == (None, None)
    with Lease(store, RUN, {}) as again:
        assert again.previous is None


def test_a_look_refuses_a_live_holder_and_takes_nothing(store: Store) -> None:
    Lease(store, RUN, {}).refuse_if_held()
    with Lease(store, RUN, {}) as lease:
        with pytest.raises(LeaseHeld, match=r"is being worked on by pid \d+"):
            Lease(store, RUN, {}).refuse_if_held()
        lease.check()


def test_a_look_leaves_a_dead_holder_to_the_one_who_takes_over(store: Store) -> None:
    hold(store, process_start=EARLIER)
    Lease(store, RUN, {}).refuse_if_held()
    with Lease(store, RUN, {}) as lease:
        assert lease.abandoned == [{"n": 1}]


def test_it_is_released_when_the_block_fails(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), Lease(store, RUN, {}):
        raise ZeroDivisionError
    assert store.read_pointer(f"leases/{RUN}") == (None, None)


def test_a_reused_pid_is_not_the_holder(store: Store) -> None:
    hold(store, process_start=EARLIER)
    with Lease(store, RUN, {}) as lease:
        assert lease.previous == {"n": 1}


ELSEWHERE = [
    {"host": "elsewhere", "process_start": "another boot:17"},
    {"process_start": "another boot:17"},  # a virtual machine made from the same image: the same name
    {"process_start": None},
    {"process_start": ":17"},  # where the system does not tell its boot
    {"pid_namespace": "pid:[1]"},  # a container beside this one
]


@pytest.mark.parametrize("change", ELSEWHERE, ids=str)
def test_a_holder_elsewhere_is_given_its_time(store: Store, change: dict[str, Any]) -> None:
    """Whether a process of the same pid runs here says nothing about it."""
    hold(store, pid=1, beat=time.time() - 50, **change)
    for look in (Lease(store, RUN, {}).__enter__, Lease(store, RUN, {}).refuse_if_held):
        with pytest.raises(LeaseHeld, match=f"pid 1 on host {change.get('host', identity()['host'])}"):
            look()


@pytest.mark.parametrize("change", ELSEWHERE, ids=str)
def test_a_holder_elsewhere_that_stopped_renewing_is_taken_over(store: Store, change: dict[str, Any]) -> None:
    hold(store, beat=time.time() - 61, every=0.05, **change)
    Lease(store, RUN, {}).refuse_if_held()
    with Lease(store, RUN, {}) as lease:
        assert lease.previous == {"n": 1}


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_a_holder_that_renews_is_alive_whatever_its_clock_says(store: Store, skew: float) -> None:
    clock = time.time() + skew
    hold(store, process_start="another boot:17", beat=clock, ttl=30.0, every=30.0)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.05):
            value, token = store.read_pointer(f"leases/{RUN}")
            assert value is not None
            store.swap_pointer(f"leases/{RUN}", {**value, "beat": value["beat"] + 0.05}, token)

    holder = threading.Thread(target=renew)
    holder.start()
    try:
        with pytest.raises(LeaseHeld, match="is being worked on by pid"):
            Lease(store, RUN, {}).__enter__()
    finally:
        stop.set()
        holder.join()


def test_a_dead_holder_whose_clock_was_ahead_is_taken_over(store: Store) -> None:
    hold(store, process_start="another boot:17", beat=time.time() + 86400.0, ttl=0.2)
    with Lease(store, RUN, {}) as lease:
        assert lease.previous == {"n": 1}


NO_JSON = [b"", b"{", b"[]", b"\xff", b"null", b'{"value": 1}', b'{"value": {}, "mark": "m"}']
WRONG_FIELDS: list[dict[str, Any]] = [
    {"host": None},
    {"pid": "one"},
    {"process_start": 5},
    {"ttl": "long"},
    {"ttl": 1e300},
    {"ttl": -1},
    {"beat": None},
    {"since": 1e300},
    {"owner": []},
    {"abandoned": {"a": 1}},
    {"abandoned": [1]},
]


@pytest.mark.parametrize("malformed", [*NO_JSON, *WRONG_FIELDS], ids=str)
def test_a_malformed_lease_holds_nobody_up(store: Store, malformed: Any) -> None:
    if isinstance(malformed, dict):
        hold(store, **malformed)
    else:
        store.objects.write(f"pointers/leases/{RUN}.json", malformed)
    Lease(store, RUN, {}).refuse_if_held()
    with Lease(store, RUN, {}, ttl=1.0, beat=0.05) as lease:
        assert (lease.previous, lease.abandoned) == (None, [])
        lease.update(n=2)
    assert store.read_pointer(f"leases/{RUN}") == (None, None)


def test_a_lease_that_is_damaged_while_it_is_held_is_written_anew(store: Store) -> None:
    with Lease(store, RUN, {"n": 1}, ttl=5.0, beat=0.1) as lease:
        store.objects.write(f"pointers/leases/{RUN}.json", b"damaged")
        with pytest.raises(LeaseHeld, match=f"pid {os.getpid()} on host"):
            Lease(store, RUN, {}, ttl=5.0, beat=1.0).__enter__()
        lease.check()
        assert not lease.lost
    assert store.read_pointer(f"leases/{RUN}") == (None, None)


def test_runs_nobody_closed_are_remembered_until_settled(store: Store) -> None:
    hold(store, process_start=EARLIER, abandoned=[{"n": 0}])
    with Lease(store, RUN, {"n": 2}) as lease:
        assert lease.abandoned == [{"n": 0}, {"n": 1}]
        value, _ = store.read_pointer(f"leases/{RUN}")
        assert value is not None
        assert value["abandoned"] == [{"n": 0}, {"n": 1}]
        lease.settle()
        value, _ = store.read_pointer(f"leases/{RUN}")
        assert value is not None
        assert value["abandoned"] == []
        assert value["owner"] == {"n": 2}


def test_updates_and_beats_reach_the_store(store: Store) -> None:
    with Lease(store, RUN, {"a": 1}, ttl=1.0, beat=0.02) as lease:
        lease.update(flow_run_id="f2")
        first, token = store.read_pointer(f"leases/{RUN}")
        assert first is not None
        assert first["owner"] == {"a": 1, "flow_run_id": "f2"}
        wait_until(lambda: store.read_pointer(f"leases/{RUN}")[1] != token)
        later, _ = store.read_pointer(f"leases/{RUN}")
        assert later is not None
        assert later["beat"] > first["beat"]
        assert {**later, "beat": 0} == {**first, "beat": 0}


def test_a_lost_lease_is_noticed_and_left_to_its_new_holder(store: Store) -> None:
    with Lease(store, RUN, {}, ttl=1.0, beat=0.02) as lease:
        while not lease.lost:  # the holder may renew between our read and our swap
            value, token = store.read_pointer(f"leases/{RUN}")
            assert value is not None
            try:
                store.swap_pointer(f"leases/{RUN}", {**value, "pid": 99, "host": "elsewhere", "mark": "theirs"}, token)
            except Exception:
                continue
            wait_until(lambda: lease.lost)
        with pytest.raises(LeaseHeld, match="pid 99 on host elsewhere"):
            lease.check()
        with pytest.raises(LeaseHeld):
            lease.update(b=2)
    value, _ = store.read_pointer(f"leases/{RUN}")
    assert value is not None
    assert value["pid"] == 99


def test_a_store_out_of_reach_for_a_while_costs_no_lease(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Lease(store, RUN, {}, ttl=1.0, beat=0.02) as lease:
        with monkeypatch.context() as patch:

            def fail(*_: object) -> str:
                raise StoreAccessError("cannot reach it")

            patch.setattr(store, "swap_pointer", fail)
            wait_until(lambda: "was not renewed: cannot reach it" in caplog.text)
        _, token = store.read_pointer(f"leases/{RUN}")
        wait_until(lambda: store.read_pointer(f"leases/{RUN}")[1] != token)
        lease.check()


def test_a_beat_must_come_before_the_end(store: Store) -> None:
    with pytest.raises(ValueError, match="beat 60 s is not below ttl 60 s"):
        Lease(store, RUN, {}, ttl=60, beat=60)


def test_a_process_is_known_by_its_start() -> None:
    assert process_start(identity()["pid"]) == identity()["process_start"]
    assert process_start(2**22 + 1) is None  # above the kernel's largest pid


class AnswersLost:
    """A backend that does what it is asked for; while `lost`, nobody hears what came of a change."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.parallel, self.lost = backend, backend.parallel, False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.backend, name)

        def call(*arguments: Any) -> Any:
            answer = method(*arguments)
            if self.lost and name in {"create", "replace", "remove"}:
                raise ConnectionResetError("lost")
            return answer

        return call


@pytest.fixture
def network(store: Store, monkeypatch: pytest.MonkeyPatch) -> AnswersLost:
    monkeypatch.setattr(objects, "RETRY_SECONDS", (0.0,))
    network = AnswersLost(store.objects.backend)
    monkeypatch.setattr(store.objects, "backend", network)
    return network


def test_a_lease_whose_taking_was_not_answered_does_not_stand_in_the_way(store: Store, network: AnswersLost) -> None:
    network.lost = True
    with pytest.raises(StoreAccessError):
        Lease(store, RUN, {"flow_run_id": "f1"}).__enter__()
    network.lost = False
    with Lease(store, RUN, {"flow_run_id": "f2"}) as lease:
        assert lease.abandoned == [{"flow_run_id": "f1"}]
        with pytest.raises(LeaseHeld):
            Lease(store, RUN, {}).__enter__()
    assert store.read_pointer(f"leases/{RUN}") == (None, None)


@pytest.mark.parametrize("again", [True, False])
def test_a_renewal_that_was_not_answered_is_no_takeover(store: Store, network: AnswersLost, again: bool) -> None:
    with Lease(store, RUN, {}) as lease:
        network.lost = True
        with pytest.raises(StoreAccessError):
            lease.update(server="s")
        network.lost = False
        if again:
            lease.update(server="s")
        lease.check()
    assert store.read_pointer(f"leases/{RUN}") == (None, None)


def test_a_lease_that_could_not_be_released_is_taken_over_in_the_same_process(
    store: Store, network: AnswersLost, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(store, RUN, {"n": 1}):
        monkeypatch.setattr(network.backend, "remove", lambda *_: _raise(ConnectionResetError("lost")))
    assert store.read_pointer(f"leases/{RUN}")[0] is not None
    monkeypatch.undo()
    with Lease(store, RUN, {}) as lease:
        assert lease.abandoned == [{"n": 1}]


def _raise(error: Exception) -> None:
    raise error
