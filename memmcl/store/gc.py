"""Garbage collection: removes what no remaining run needs, and nothing that is in use or about to be reused.

**What stays.** The runs to keep: all of them, or with `keep_runs` the newest; the run of every champion and the one
that a rollback goes back to; runs that are at work. All artifacts that these name, directly or through their inputs.
Artifacts of no finished run, checkpoints, and the journals and records of unfinished runs stay until they have not
been used for `older_than` (a week by default, never less than an hour); if an unfinished run was at work within that
time, whatever was used since it first started. While a run is at work, whatever was used since it began, and in the
hour before. A judgement stays as long as both of its runs do.

**When something was used** is the time of the object's last change: reuse touches it. If a run that is removed needs an
object, use until that run ended is the run's own and protects nothing; later use does.

**Why a writer never loses what it relies on.** A writer that meets an artifact, or a blob that it need not
upload, (1) touches it, (2) waits while a collection is at work, (3) checks that it is there and whole. A collection
(a) takes the lease `gc`, (b) reads leases and champions, (c) lists the objects and their times, (d) removes objects,
manifests before blobs, (e) releases the lease. A touch before (c) is seen, and the object is kept as young. A touch
after (c) is also after (a): the writer waits for (e), sees at (3) what is left, and makes the rest again. A process
that takes the lease of a run waits in the same way, so that at (b) every run at work is known; what it touched is kept
while it works. The lease is renewed before every batch of removals; a writer that waits for a collection that died
takes its lease over, so that the collection cannot go on. A program that publishes without a lease is protected for an
hour, and by its touches.

A collection that is killed leaves artifacts without their run, or blobs without a manifest; the next one removes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from memmcl.errors import LeaseHeld, StoreError, UsageError
from memmcl.store.lease import COLLECTING, PAUSE, Lease
from memmcl.store.manifest import kind_and_key
from memmcl.store.marks import decide
from memmcl.store.plan import Policy, RemovalPlan
from memmcl.store.snapshot import RUN, StoreSnapshot, read_snapshot
from memmcl.store.store import Store

BATCH = 500  # objects between two renewals of the lease
ATTEMPTS = 3  # to remove a batch
PATIENCE = 3.0  # seconds until a lease that is held means that another collection is at work


def collect(store: Store, policy: Policy, *, delete: bool = False, now: float | None = None) -> RemovalPlan:
    """Return what goes and why the rest stays; with `delete` it is gone when this returns.

    now: seconds since 1970, the present by default.

    Raises:
        LeaseHeld: another garbage collection is at work.
        CorruptArtifact: a champion's pointer is damaged.
    """
    return _carried_out(store, lambda snapshot: decide(snapshot, policy, time.time() if now is None else now), delete)


def remove_run(store: Store, run_id: str, *, delete: bool = False) -> RemovalPlan:
    """Do the same for one run, finished or not, and what it alone needs. run_id: first digits, of one run.

    Raises:
        UsageError: there is no such run, or more than one; it is a champion, or may be in use.
        LeaseHeld: it is being worked on, or a garbage collection is at work.
    """

    def planned(snapshot: StoreSnapshot) -> RemovalPlan:
        only = _whole_id(store, snapshot, run_id)
        for name, line in snapshot.champions.items():
            if only in line[-1:]:
                raise UsageError(
                    f"run {only[:8]} is champion {name}; promote another first, or go back to the one before: "
                    "memmcl champion rollback"
                )
        Lease(store, only, {}).refuse_if_held()
        plan = decide(snapshot, Policy(only=only), time.time())
        if only in plan.runs:
            raise UsageError(f"run {only[:8]} stays: {plan.runs[only]}; try again when that has changed")
        return plan

    return _carried_out(store, planned, delete)


def _carried_out(store: Store, planned: Callable[[StoreSnapshot], RemovalPlan], delete: bool) -> RemovalPlan:
    before = read_snapshot(store)
    plan = planned(before)
    if not delete:
        return plan
    with _collecting(store) as lease:  # writers wait from here on, so that little is read again
        plan = planned(read_snapshot(store, before))
        paths = [item.path for item in plan.removed if not item.unfinished]
        for first in range(0, len(paths), BATCH):
            _delete(store, lease, paths[first : first + BATCH])
        lease.update()
        for item in plan.removed:
            if item.unfinished:
                store.objects.discard(item.path)
    return plan


def _delete(store: Store, lease: Lease, paths: Sequence[str]) -> None:
    """Delete right after renewing the lease, at each attempt: a process that took it over relies on what is there."""
    for attempt in range(ATTEMPTS):
        lease.update()
        try:
            store.objects.delete(paths)
            return
        except StoreError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE * 10**attempt)


@contextmanager
def _collecting(store: Store) -> Iterator[Lease]:
    """Hold the lease of collections. A writer that cleans up after one that died holds it for a moment too."""
    lease, deadline = Lease(store, COLLECTING, {}), time.monotonic() + PATIENCE
    while True:
        try:
            lease.refuse_if_held()
            break
        except LeaseHeld as error:
            if time.monotonic() > deadline:
                raise LeaseHeld("another garbage collection is at work on this store; wait for it to end") from error
            time.sleep(PAUSE)
    with lease:
        yield lease


def _whole_id(store: Store, snapshot: StoreSnapshot, run_id: str) -> str:
    damaged = {key for kind, key in map(kind_and_key, snapshot.unreadable) if kind == RUN}
    known = sorted(one for one in damaged | snapshot.finished | snapshot.journals.keys() if one.startswith(run_id))
    if len(known) != 1:
        what = "no run's" if not known else f"{len(known)} runs'"
        raise UsageError(f"{what} id starts with {run_id!r} in {store.url}; `memmcl store ls run` lists them")
    return known[0]
