"""A lease: at most one live process works on a run.

The lease of a run is the pointer `leases/<run_id>`. Its holder renews it every `beat` seconds by compare-and-swap.

A holder of the same boot of the same machine, in the same pid namespace, can be looked up: it is dead when its pid is
gone or belongs to a process that started at another time, or when it is this process and has released that lease (a
store that could not be reached keeps it). The host name is no proof: virtual machines made from one image share it.
Any other holder is judged by its lease alone. If the lease was renewed within `ttl` seconds, the holder is alive.
Otherwise, since clocks differ, this process watches it by its own clock: a holder that renews it meanwhile is alive.
The same goes for a lease that is damaged, which its holder writes anew at its next beat.

The worst result of a wrong takeover is double work: artifacts are write-once, and the old holder notices at its next
beat.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memmcl.errors import Conflict, LeaseHeld, StoreError
from memmcl.store.documents import Documents
from memmcl.store.processes import identity, process_start

logger = logging.getLogger(__name__)
COLLECTING = "gc"  # the lease of a garbage collection. No run has this id: those are hexadecimal digests
PAUSE = 0.1  # seconds between two looks at a collection that is at work
Seconds = Annotated[float, Field(gt=0, le=3600)]
Time = Annotated[float, Field(ge=0, le=1e11)]  # seconds since 1970, by the clock of the holder


class LeaseRecord(BaseModel):
    """Which process holds a lease, since when, when it was renewed, and what a successor must know.

    process_start: of `process_start`. every, ttl: after how many seconds it is renewed, and may be taken over.
    mark: tells this lease from any other; empty where an earlier version wrote it.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    host: str
    pid_namespace: str
    pid: int
    process_start: str | None
    since: Time
    beat: Time
    ttl: Seconds
    every: Seconds = 10.0
    owner: dict[str, Any]
    abandoned: list[dict[str, Any]]
    mark: str = ""


_LIVE: set[str] = set()  # marks of the leases that this process holds, or is about to take


class Lease:
    """Hold the lease of a run for the length of a `with` block.

        with Lease(store, run_id, {"flow_run_id": "..."}) as lease:
            lease.update(server="http://...")   # what a successor may need to know
            lease.check()                       # raises when the lease was lost

    `previous` is the owner info of the dead holder that was taken over, None when there was none. `abandoned`
    lists the owner info of all dead holders, oldest first, whose runs are not closed yet: it is kept in
    the lease, through further kills, until `settle()`.
    """

    def __init__(
        self, store: Documents, run_id: str, owner: dict[str, Any], ttl: float = 60.0, beat: float = 10.0
    ) -> None:
        if not 0 < beat < ttl:
            raise ValueError(f"a lease is renewed before it expires: beat {beat} s is not below ttl {ttl} s")
        self.store = store
        self.run_id = run_id
        self.lost = False
        self.previous: dict[str, Any] | None = None
        self.abandoned: list[dict[str, Any]] = []
        self._ttl = ttl
        self._beat = beat
        self._owner = dict(owner)
        self._since = 0.0
        self._token: str | None = None
        self._mark = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease-{run_id[:8]}", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease. Raises LeaseHeld when a live process holds it."""
        _LIVE.add(self._mark)
        try:
            self._take()
        except BaseException:  # the store may hold the lease even so, if its answer was lost
            _LIVE.discard(self._mark)
            raise
        self._thread.start()
        if self.run_id != COLLECTING:
            try:
                wait_for_collection(self.store)
            except BaseException as error:
                self.__exit__(type(error), error, error.__traceback__)
                raise
        return self

    def _take(self) -> None:
        self._since = time.time()
        while self._token is None:
            record, token = self._look()
            if token is not None and not self._is_free(record, token):
                continue
            self.previous = None if record is None else dict(record.owner)
            self.abandoned = [] if record is None else [*record.abandoned, dict(record.owner)]
            with suppress(Conflict):  # another process was quicker: look again
                self._token = self.store.swap_pointer(self._name, self._value(), token)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease; a store that is out of reach by now does not hide the block's own error."""
        self._stop.set()
        self._thread.join()
        try:
            self._release()
        except StoreError as problem:
            logger.warning("the lease of run %s was not released: %s", self.run_id[:8], problem)
        finally:
            _LIVE.discard(self._mark)

    def _release(self) -> None:
        if self.lost or self._token is None:
            return
        try:
            self.store.delete_pointer(self._name, self._token)
        except Conflict:
            record, token = self._look()
            if token is not None and self._is_ours(record):
                self.store.delete_pointer(self._name, token)

    def refuse_if_held(self) -> None:
        """Raise LeaseHeld when a live process holds the lease; takes nothing, and promises nothing for later."""
        record, _ = self._look()
        if record is not None and is_alive(record):
            raise self._held_by(record)

    def check(self) -> None:
        """Raise LeaseHeld when another process has taken the lease over."""
        if self.lost:
            record, _ = self._look()
            if record is not None:
                raise self._held_by(record)
            raise LeaseHeld(f"run {self.run_id[:8]} was taken over by a process that has ended; run it again")

    def update(self, **owner: Any) -> None:
        """Add to the owner info that a successor would read. Raises LeaseHeld when the lease was lost."""
        with self._lock:
            self._owner.update(owner)
            self._swap()
        self.check()

    def settle(self) -> None:
        """Forget `abandoned`: the caller has closed those runs. Raises LeaseHeld when the lease was lost."""
        self.abandoned = []
        self.update()

    @property
    def _name(self) -> str:
        return f"leases/{self.run_id}"

    def _value(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            **identity(),
            "since": self._since,
            "beat": time.time(),
            "ttl": self._ttl,
            "every": self._beat,
            "owner": self._owner,
            "abandoned": self.abandoned,
            "mark": self._mark,
        }

    def _is_ours(self, record: LeaseRecord | None) -> bool:
        """Whether it is this lease after all: renewed, when the store's answer was lost."""
        return record is not None and record.mark == self._mark

    def _look(self) -> tuple[LeaseRecord | None, str | None]:
        """The lease and its token; the token alone where the lease is damaged, nothing where there is none."""
        value, token = self.store.look_at_pointer(self._name)
        return parse_lease(value), token

    def _is_free(self, record: LeaseRecord | None, token: str) -> bool:
        """Whether the holder is dead; False when the lease changed meanwhile. Raises LeaseHeld if it is alive."""
        if record is not None and is_alive(record):
            raise self._held_by(record)
        seconds = self._watch_seconds(record)
        if not seconds:
            return True
        logger.warning(
            "run %s: looking for %.0f s whether the process that last worked on it still does", self.run_id[:8], seconds
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 10))
            now, its_token = self._look()
            if its_token != token:
                if now is not None:  # renewed or taken over by a live process, whatever the clocks say
                    raise self._held_by(now)
                return False
        return True

    def _watch_seconds(self, record: LeaseRecord | None) -> float:
        """How long a lease must go without renewal before it is taken over; 0 if its process is known to be gone."""
        if record is None:
            return 2 * self._beat
        if is_neighbour(record):
            return 0.0
        return record.ttl if record.beat > time.time() else min(record.ttl, 2 * record.every)

    def _swap(self) -> None:
        """Renew the lease under `_lock`; a lost race means that it is another's now."""
        if self.lost or self._token is None:
            return
        with suppress(Conflict):
            self._token = self.store.swap_pointer(self._name, self._value(), self._token)
            return
        record, token = self._look()
        if token is not None and (record is None or self._is_ours(record)):
            if record is None:
                logger.warning("the lease of run %s was damaged; writing it anew", self.run_id[:8])
            with suppress(Conflict):
                self._token = self.store.swap_pointer(self._name, self._value(), token)
                return
        self.lost = True
        logger.warning("the lease of run %s was taken over by another process", self.run_id[:8])

    def _renew(self) -> None:
        while not self.lost and not self._stop.wait(self._beat):
            try:
                with self._lock:
                    self._swap()
            except StoreError as problem:  # it may come back; a takeover meanwhile shows as a Conflict
                logger.warning("the lease of run %s was not renewed: %s", self.run_id[:8], problem)

    def _held_by(self, record: LeaseRecord) -> LeaseHeld:
        since = datetime.fromtimestamp(record.since).strftime("%Y-%m-%d %H:%M")
        who = f"pid {record.pid} on host {record.host}"
        return LeaseHeld(f"run {self.run_id[:8]} is being worked on by {who} since {since}; wait for it, or stop it")


def wait_for_collection(store: Documents) -> None:
    """Return at once when no garbage collection is at work, else when it has ended or its process has died."""
    warned = False
    while store.objects.read(f"pointers/leases/{COLLECTING}.json") is not None:
        try:
            with Lease(store, COLLECTING, {}):  # a dead collection's: taken over, so that it cannot wake up and go on
                return
        except LeaseHeld:
            if not warned:
                logger.warning("waiting for the garbage collection of %s to end", store.objects.url)
            warned = True
            time.sleep(PAUSE)


def parse_lease(value: dict[str, Any] | None) -> LeaseRecord | None:
    """Return what the value of a lease's pointer says; None where there is none, or it is damaged."""
    try:
        return None if value is None else LeaseRecord.model_validate(value)
    except ValidationError:
        return None


def is_alive(record: LeaseRecord) -> bool:
    """Return whether the holder is known to be at work: its process runs here, or it renewed the lease lately."""
    if is_neighbour(record):
        released = record.pid == os.getpid() and bool(record.mark) and record.mark not in _LIVE
        return process_start(record.pid) == record.process_start and not released
    return abs(time.time() - record.beat) <= record.ttl


def is_neighbour(record: LeaseRecord) -> bool:
    """Return whether pids mean the same to the holder and to this process: one boot, one pid namespace."""
    here = identity()
    boots = [(start or "").rpartition(":")[0] for start in (record.process_start, here["process_start"])]
    return bool(boots[0]) and (boots[0], record.pid_namespace) == (boots[1], here["pid_namespace"])
