"""A store at one moment, read for a garbage collection: objects, manifests, leases, champions, journals of runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from memmcl.store.backends import Entry
from memmcl.store.champion import read_champions
from memmcl.store.lease import COLLECTING, is_alive, parse_lease
from memmcl.store.manifest import Manifest, manifest_path, parse_manifest
from memmcl.store.sealed import unseal
from memmcl.store.store import Store

RUN = "run"
JOURNALS, SEARCHES = "logs/runs/", "logs/searches/"
DAMAGED_SECONDS = 3600.0  # a damaged lease that was not written for so long has no holder


@dataclass(frozen=True)
class JournalRecord:
    """What a record of a run's journal names: the key of a search, and manifests of an earlier run that it uses."""

    search: str | None = None
    pinned: tuple[str, ...] = ()


Parsed = Manifest | JournalRecord | None  # a manifest (None where it is damaged), or a record of a journal


@dataclass(frozen=True)
class RunLease:
    """The lease of one run, which may be gone since. Times are seconds since 1970.

    since: when its holder began, 0 where that cannot be read. touched: when it was renewed.
    """

    run_id: str
    path: str
    since: float
    touched: float
    live: bool


@dataclass(frozen=True)
class StoreSnapshot:
    """A store at one moment. Everything is by path.

    champions: name -> run ids, the current one last, the one that a rollback goes back to before it. unfinished: what
    writers began and never ended. parsed: manifests and records of journals with the stamp of the object that they were
    read from, for the next snapshot.
    """

    entries: Mapping[str, Entry]
    leases: tuple[RunLease, ...]
    champions: Mapping[str, tuple[str, ...]]
    unfinished: Mapping[str, Entry]
    parsed: Mapping[str, tuple[str, Parsed]]

    def touched(self, paths: Iterable[str]) -> float:
        """Return when the last of these objects was written or reused; -inf without any."""
        return max((self.entries[path].touched for path in paths), default=float("-inf"))

    def searches(self, run_id: str) -> list[str]:
        """Return the keys of the searches that a run has begun."""
        return [record.search for record in self.journals[run_id] if record.search is not None]

    @cached_property
    def manifests(self) -> dict[str, Manifest]:
        """The manifests that can be read."""
        return {path: value for path, (_, value) in self.parsed.items() if isinstance(value, Manifest)}

    @cached_property
    def unreadable(self) -> list[str]:
        """Those that are damaged."""
        return [path for path, (_, value) in self.parsed.items() if value is None]

    @cached_property
    def journals(self) -> dict[str, list[JournalRecord]]:
        """Run id -> what the records of its journal name; nothing of a record that is gone since it was listed."""
        values = {path: value for path, (_, value) in self.parsed.items() if isinstance(value, JournalRecord)}
        return {
            run_id: [values[path] for path in paths if path in values] for run_id, paths in self.journal_records.items()
        }

    @cached_property
    def finished(self) -> frozenset[str]:
        """The ids of all finished runs."""
        return frozenset(manifest.key for manifest in self.manifests.values() if manifest.kind == RUN)

    @cached_property
    def working(self) -> frozenset[str]:
        """The ids of the runs at work."""
        return frozenset(lease.run_id for lease in self.leases if lease.live)

    @cached_property
    def journal_records(self) -> dict[str, list[str]]:
        """Run id -> paths of the records of its journal."""
        return self._logs(JOURNALS)

    @cached_property
    def search_records(self) -> dict[str, list[str]]:
        """Key of a search -> paths of its records."""
        return self._logs(SEARCHES)

    def _logs(self, folder: str) -> dict[str, list[str]]:
        logs: dict[str, list[str]] = {}
        for path in self.entries:
            if path.startswith(folder):
                logs.setdefault(path[len(folder) :].rpartition("/")[0], []).append(path)
        return logs


def read_snapshot(store: Store, before: StoreSnapshot | None = None) -> StoreSnapshot:
    """Read a store. Leases and champions come first: a later holder has met the collection's own lease.

    before: an earlier snapshot; what has not changed since then is taken from it.

    Raises:
        CorruptArtifact: a champion cannot be read, so that it is unknown which runs must stay.
    """
    objects = store.objects
    pointers = objects.entries("pointers")
    leases = [_lease(store, path, entry) for path, entry in pointers.items() if path.startswith("pointers/leases/")]
    champions = {name: read_champions(store, name).line[-2:] for name in _names(pointers, "pointers/champions/")}
    entries = objects.entries("")
    unfinished = objects.unfinished()
    known = {} if before is None else before.parsed
    paths = [
        path
        for path in entries
        if path.startswith(JOURNALS) or (path.startswith("manifests/") and path.endswith(".json"))
    ]
    unread = [path for path in paths if path not in known or known[path][0] != entries[path].stamp]
    read = dict(zip(unread, objects.map(lambda path: _parse(store, path, entries[path].stamp), unread), strict=True))
    parsed = {path: read.get(path, known.get(path)) for path in paths}
    return StoreSnapshot(
        entries={path: entry for path, entry in entries.items() if path not in unfinished},
        leases=tuple(lease for lease in leases if lease is not None and lease.run_id != COLLECTING),
        champions=champions,
        unfinished=unfinished,
        parsed={path: value for path, value in parsed.items() if value is not None},
    )


def _parse(store: Store, path: str, stamp: str) -> tuple[str, Parsed] | None:
    """Return an object's stamp and content; None where the object is gone."""
    data = store.objects.read(path)
    if data is None:
        return None
    if not path.startswith(JOURNALS):
        return stamp, parse_manifest(data, path)
    record = unseal(path, data) or {}
    key, pinned = record.get("key"), record.get("pinned")
    refs = [ref for ref in pinned.values() if isinstance(ref, dict)] if isinstance(pinned, dict) else []
    paths = tuple(manifest_path(str(ref.get("kind")), str(ref.get("key"))) for ref in refs)
    return stamp, JournalRecord(key if isinstance(key, str) else None, paths)


def _lease(store: Store, path: str, entry: Entry) -> RunLease | None:
    (run_id,) = _names([path], "pointers/leases/")
    value, token = store.look_at_pointer(f"leases/{run_id}")
    if token is None:
        return None
    record = parse_lease(value)
    if record is None:  # its holder, if there is one, writes it anew
        return RunLease(run_id, path, 0.0, entry.touched, live=time.time() - entry.touched < DAMAGED_SECONDS)
    return RunLease(run_id, path, record.since, entry.touched, live=is_alive(record))


def _names(paths: Iterable[str], folder: str) -> list[str]:
    return [path.removeprefix(folder).removesuffix(".json") for path in paths if path.startswith(folder)]
