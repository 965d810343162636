"""What lies in a store, read for a garbage collection: objects, manifests, leases, champions, journals of runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from memmcl.store.backends import Entry
from memmcl.store.champion import read_champions
from memmcl.store.lease import is_alive, parse_lease
from memmcl.store.manifest import Manifest, manifest_path, parse_manifest
from memmcl.store.reuse import COLLECTING
from memmcl.store.sealed import unseal
from memmcl.store.store import Store

RUN = "run"
JOURNALS, SEARCHES = "logs/runs/", "logs/searches/"
DAMAGED_SECONDS = 3600.0  # a lease that cannot be read, and that nobody wrote for so long, is nobody's


class Damaged:
    """Stands for a manifest that cannot be read."""


@dataclass(frozen=True)
class Noted:
    """What a record of a run's journal names: the key of a search, and manifests that an earlier run made."""

    search: str | None = None
    pinned: tuple[str, ...] = ()


Read = Manifest | type[Damaged] | Noted | None


@dataclass(frozen=True)
class Leased:
    """The lease of one run, which may be gone since. Times are seconds since 1970.

    since: when its holder began, 0 where that cannot be read. touched: when it was renewed.
    """

    run_id: str
    path: str
    since: float
    touched: float
    live: bool


@dataclass(frozen=True)
class Census:
    """A store at one moment. Everything is by path.

    unreadable: manifests that are damaged. champions: name -> run ids, the current one last, the one that a rollback
    goes back to before it. journals: run id -> what its records name. leftovers: what writers began and never ended.
    read: what was found under which stamp, for the next census.
    """

    entries: Mapping[str, Entry]
    manifests: Mapping[str, Manifest]
    unreadable: tuple[str, ...]
    leases: tuple[Leased, ...]
    champions: Mapping[str, tuple[str, ...]]
    journals: Mapping[str, tuple[Noted, ...]]
    leftovers: Mapping[str, Entry]
    read: Mapping[str, tuple[str, Read]]

    def touched(self, paths: Iterable[str]) -> float:
        """Return when the last of these objects was written or reused; -inf without any."""
        return max((self.entries[path].touched for path in paths), default=float("-inf"))

    def searches(self, run_id: str) -> list[str]:
        """Return the keys of the searches that a run has begun."""
        return [noted.search for noted in self.journals[run_id] if noted.search is not None]

    @cached_property
    def finished(self) -> frozenset[str]:
        """The ids of all finished runs."""
        return frozenset(found.key for found in self.manifests.values() if found.kind == RUN)

    @cached_property
    def held(self) -> frozenset[str]:
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
        found: dict[str, list[str]] = {}
        for path in self.entries:
            if path.startswith(folder):
                found.setdefault(path[len(folder) :].rpartition("/")[0], []).append(path)
        return found


def take_census(store: Store, before: Census | None = None) -> Census:
    """Read a store. Leases and champions come first: who holds one afterwards met the collection's own lease.

    before: an earlier census; what has not changed since then is taken from it.

    Raises:
        CorruptArtifact: a champion cannot be read: nobody knows which runs must stay.
    """
    objects = store.objects
    pointers = objects.entries("pointers")
    leases = [_leased(store, path, entry) for path, entry in pointers.items() if path.startswith("pointers/leases/")]
    champions = {name: read_champions(store, name).line[-2:] for name in _names(pointers, "pointers/champions/")}
    entries = objects.entries("")
    leftovers = objects.leftovers()
    paths = [path for path in entries if path.startswith("manifests/") and path.endswith(".json")]
    records = [path for path in entries if path.startswith(JOURNALS)]
    known = {} if before is None else before.read
    read = {path: found for path, found in known.items() if path in entries and entries[path].stamp == found[0]}
    unread = [path for path in (*paths, *records) if path not in read]
    parsed = objects.map(lambda path: (entries[path].stamp, _parsed(store, path)), unread)
    read |= dict(zip(unread, parsed, strict=True))
    journals: dict[str, list[Noted]] = {}
    for path in records:
        noted = journals.setdefault(path[len(JOURNALS) :].partition("/")[0], [])
        found = read[path][1]
        if isinstance(found, Noted):
            noted.append(found)
    return Census(
        entries={path: entry for path, entry in entries.items() if path not in leftovers},
        manifests={path: found for path in paths if isinstance(found := read[path][1], Manifest)},
        unreadable=tuple(path for path in paths if read[path][1] is Damaged),
        leases=tuple(lease for lease in leases if lease is not None and lease.run_id != COLLECTING),
        champions=champions,
        journals={run_id: tuple(noted) for run_id, noted in journals.items()},
        leftovers=leftovers,
        read=read,
    )


def _parsed(store: Store, path: str) -> Read:
    """Return a manifest, or what a record of a journal names; None where there is nothing."""
    data = store.objects.read(path)
    if data is None:
        return None
    if not path.startswith(JOURNALS):
        return parse_manifest(data, path) or Damaged
    record = unseal(path, data) or {}
    key, pinned = record.get("key"), record.get("pinned")
    refs = [ref for ref in pinned.values() if isinstance(ref, dict)] if isinstance(pinned, dict) else []
    paths = tuple(manifest_path(str(ref.get("kind")), str(ref.get("key"))) for ref in refs)
    return Noted(key if isinstance(key, str) else None, paths)


def _leased(store: Store, path: str, entry: Entry) -> Leased | None:
    (run_id,) = _names([path], "pointers/leases/")
    value, token = store.look_at_pointer(f"leases/{run_id}")
    if token is None:
        return None
    held = parse_lease(value)
    if held is None:  # its holder, if there is one, writes it anew
        return Leased(run_id, path, 0.0, entry.touched, live=time.time() - entry.touched < DAMAGED_SECONDS)
    return Leased(run_id, path, held.since, entry.touched, live=is_alive(held))


def _names(paths: Iterable[str], folder: str) -> list[str]:
    return [path.removeprefix(folder).removesuffix(".json") for path in paths if path.startswith(folder)]
