"""A lease: at most one live process works on a run.

The lease of a run is the pointer `leases/<run_id>`. Its holder renews it every `beat` seconds by compare-and-
swap. On the holder's own host a dead holder is recognised at once (its pid is gone, or belongs to a process
that started at another time); elsewhere, and across container boundaries, when it was not renewed for `ttl`
seconds, which takes clocks that differ by less than `ttl`. The worst that a wrong takeover can do is double
work: artifacts are write-once, and the old holder notices with its next beat.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from memmcl.errors import Conflict, LeaseHeld, StoreError
from memmcl.store.store import Store

logger = logging.getLogger(__name__)


class Lease:
    """Hold the lease of a run for the length of a `with` block.

        with Lease(store, run_id, {"flow_run_id": "..."}) as lease:
            lease.update(server="http://...")   # what a successor may need to know
            lease.check()                       # raises when the lease was lost

    `previous` is the owner info of the dead holder that was taken over, None when there was none. `abandoned`
    lists the owner info of all dead holders, oldest first, whose runs nobody has closed yet: it is kept in
    the lease, through further kills, until `settle()`.
    """

    def __init__(self, store: Store, run_id: str, owner: dict[str, Any], ttl: float = 60.0, beat: float = 10.0) -> None:
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
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease-{run_id[:8]}", daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease. Raises LeaseHeld when a live process holds it."""
        self._since = time.time()
        while self._token is None:
            held, token = self.store.read_pointer(self._name)
            if held is not None:
                if not self._is_dead(held):
                    raise LeaseHeld(self._describe(held))
                self.previous = dict(held["owner"])
                self.abandoned = [*held["abandoned"], self.previous]
            else:
                self.previous, self.abandoned = None, []
            try:
                self._token = self.store.swap_pointer(self._name, self._value(), token)
            except Conflict:  # another process was quicker; look again
                continue
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease; a store that is out of reach by now does not hide the block's own error."""
        self._stop.set()
        self._thread.join()
        if self.lost or self._token is None:
            return
        try:
            self.store.delete_pointer(self._name, self._token)
        except StoreError as problem:
            logger.warning("the lease of run %s was not released: %s", self.run_id[:8], problem)

    def refuse_if_held(self) -> None:
        """Raise LeaseHeld when a live process holds the lease; takes nothing, and promises nothing for later."""
        held, _ = self.store.read_pointer(self._name)
        if held is not None and not self._is_dead(held):
            raise LeaseHeld(self._describe(held))

    def check(self) -> None:
        """Raise LeaseHeld when another process has taken the lease over."""
        if self.lost:
            held, _ = self.store.read_pointer(self._name)
            if held is not None:
                raise LeaseHeld(self._describe(held))
            raise LeaseHeld(f"run {self.run_id[:8]} was taken over by a process that has ended; run it again")

    def update(self, **owner: Any) -> None:
        """Add to the owner info that a successor would read. Raises LeaseHeld when the lease was lost."""
        with self._lock:
            self._owner.update(owner)
            self._swap()
        self.check()

    def settle(self) -> None:
        """Forget `abandoned`: the caller has closed those runs. Raises LeaseHeld when the lease was lost."""
        with self._lock:
            self.abandoned = []
            self._swap()
        self.check()

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
            "owner": self._owner,
            "abandoned": self.abandoned,
        }

    def _swap(self) -> None:
        """Renew the lease under `_lock`; a lost race means that it is another's now."""
        if self.lost or self._token is None:
            return
        try:
            self._token = self.store.swap_pointer(self._name, self._value(), self._token)
        except Conflict:
            self.lost = True
            logger.warning("the lease of run %s was taken over by another process", self.run_id[:8])

    def _renew(self) -> None:
        while not self.lost and not self._stop.wait(self._beat):
            try:
                with self._lock:
                    self._swap()
            except StoreError as problem:  # it may come back; a takeover meanwhile shows as a Conflict
                logger.warning("the lease of run %s was not renewed: %s", self.run_id[:8], problem)

    def _is_dead(self, held: dict[str, Any]) -> bool:
        here = identity()
        if (held["host"], held["pid_namespace"]) == (here["host"], here["pid_namespace"]):
            return bool(process_start(held["pid"]) != held["process_start"])
        unrenewed: float = time.time() - held["beat"]
        return unrenewed > float(held["ttl"])

    def _describe(self, held: dict[str, Any]) -> str:
        since = datetime.fromtimestamp(held["since"]).strftime("%Y-%m-%d %H:%M")
        who = f"pid {held['pid']} on host {held['host']}"
        return f"run {self.run_id[:8]} is being worked on by {who} since {since}; wait for it, or stop it"


def identity() -> dict[str, Any]:
    """Return what tells this process from all others: host, pid namespace, pid, and when it started."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""  # no /proc: one namespace per host
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid_namespace": namespace,
        "pid": pid,
        "process_start": process_start(pid),
    }


def process_start(pid: int) -> str | None:
    """Return when process `pid` of this host started, as a text that no other holder of the pid shares.

    None when there is no such process, or only its unreaped remains. Without /proc the text is "alive".
    """
    if not Path("/proc/self/stat").exists():
        return "alive" if _exists(pid) else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name may hold blanks
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, ticks = fields[0], fields[19]  # proc(5): fields 3 (state) and 22 (starttime)
    return None if state in "ZX" else f"{boot}:{ticks}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is another user's
        return True
    return True
