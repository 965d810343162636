"""Finding artifacts in a large store without reading every manifest.

What a listing tells (kind and key of every artifact, and a stamp that changes with its manifest) is always taken from
the listing. The few fields that people want of all artifacts at once are kept beside it, per kind, in the object
`index/<kind>`: a row per manifest under its stamp. It is derived. A row whose stamp is not the listing's, or that is
not there, is read from its manifest; a row without a manifest is dropped; an index that is damaged counts as empty; and
it is written anew once it lacks more than a few rows. Whatever is opened is read from its manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from memmcl.errors import ArtifactNotFound, StoreError
from memmcl.store.backends import Entry
from memmcl.store.manifest import ArtifactRef, Manifest, check_name, kind_and_key, manifest_path, read_manifest
from memmcl.store.objects import Objects
from memmcl.store.sealed import seal, unseal
from memmcl.store.store import Store

logger = logging.getLogger(__name__)
VERSION = 2
WORTH_WRITING = 32  # rows that an index lacks or has too many
CLOCKS = 60.0  # seconds by which a writer's clock may be ahead of that of the disk or the server
AT_ONCE = 16


@dataclass(frozen=True)
class Summary:
    """One artifact as lists show it. created: UTC, ISO 8601. seconds: of making it. size: bytes of its files."""

    kind: str
    key: str
    name: str
    created: str
    seconds: float
    size: int

    @property
    def order(self) -> tuple[str, str, str]:
        """The key that sorts artifacts by age, the newest last."""
        return self.created, self.kind, self.key


def summaries(store: Store, kind: str | None = None) -> list[Summary]:
    """Return all artifacts (of one kind), the newest first; manifests that cannot be read are left out."""
    kinds = store.objects.folders("manifests") if kind is None else [check_name(kind)]
    listings = store.objects.map(lambda one: _complete(store.objects, one), kinds)
    return sorted((row for rows in listings for row in rows), key=lambda row: row.order, reverse=True)


def newest(store: Store, kind: str, start: str = "") -> Manifest | None:
    """Return the newest artifact of a kind, of those whose key begins with `start`; None when there is none.

    Manifests are never older than what they say of themselves, so few of them need to be read.
    """
    listing = _Listing(store.objects, kind, start)
    best: dict[str, Summary] = dict(listing.known)
    unread = sorted(listing.unknown, key=lambda path: listing.entries[path].touched, reverse=True)
    while True:
        latest = max(best, key=lambda path: best[path].order, default=None)
        if unread and (latest is None or listing.entries[unread[0]].touched + CLOCKS >= _seconds(best[latest].created)):
            chunk, unread = unread[:AT_ONCE], unread[AT_ONCE:]
            best |= listing.read(chunk)
            continue
        listing.keep()
        if latest is None:
            return None
        try:
            return store.load(ArtifactRef(kind=kind, key=best[latest].key, name=best[latest].name))
        except ArtifactNotFound:  # removed, or damaged, since the index was written
            del best[latest]


def starting(store: Store, start: str) -> list[tuple[str, str]]:
    """Return (kind, key) of all artifacts whose key begins with `start`; reads no manifest."""
    kinds = store.objects.folders("manifests")
    listings = store.objects.map(lambda kind: list(_paths(store.objects, kind, start)), kinds)
    return [kind_and_key(path) for paths in listings for path in paths]


class _Listing:
    """The manifests of one kind: `entries` by path; `known`, those that the index has; `unknown`, the others."""

    def __init__(self, objects: Objects, kind: str, start: str = "") -> None:
        self.objects, self.kind = objects, kind
        self.entries = _paths(objects, kind, start)
        self.rows = _read_index(objects, kind)
        stamps = {path: entry.stamp for path, entry in self.entries.items()}
        self.known = {path: row for path, (stamp, row) in self.rows.items() if stamps.get(path) == stamp}
        self.unknown = [path for path in self.entries if path not in self.known]
        self._read: dict[str, Summary] = {}
        self._gone = 0 if start else len(self.rows.keys() - self.entries.keys())

    def read(self, paths: Iterable[str]) -> dict[str, Summary]:
        """Read manifests, and return the rows of those that are valid."""
        paths = list(paths)
        read = self.objects.map(lambda path: read_manifest(self.objects, path), paths)
        rows = {path: _summary(manifest) for path, manifest in zip(paths, read, strict=True) if manifest is not None}
        self._read |= rows
        return rows

    def keep(self) -> None:
        """Write the index anew where it is worth it; a store that cannot be written has none."""
        if len(self._read) + self._gone <= WORTH_WRITING:
            return
        rows = self.rows | {path: (self.entries[path].stamp, row) for path, row in self._read.items()}
        listed = [
            [stamp, row.key, row.name, row.created, row.seconds, row.size]
            for path, (stamp, row) in rows.items()
            if path in self.entries or not self._gone
        ]
        path = f"index/{self.kind}"
        try:
            self.objects.write(path, seal(path, {"version": VERSION, "rows": listed}, indent=None))
        except StoreError as error:
            logger.debug("no index: %s", error)


def _complete(objects: Objects, kind: str) -> list[Summary]:
    listing = _Listing(objects, kind)
    rows = listing.known | listing.read(listing.unknown)
    listing.keep()
    return list(rows.values())


def _paths(objects: Objects, kind: str, start: str) -> dict[str, Entry]:
    entries = objects.entries(f"manifests/{kind}", start)
    return {path: entry for path, entry in entries.items() if path.count("/") == 2 and path.endswith(".json")}


def _summary(manifest: Manifest) -> Summary:
    size = sum(blob.size for blob in manifest.blobs.values())
    return Summary(manifest.kind, manifest.key, manifest.name, manifest.created, manifest.seconds, size)


def _read_index(objects: Objects, kind: str) -> dict[str, tuple[str, Summary]]:
    """Return path -> stamp and row; empty when there is no index, or one that is damaged or of another version."""
    path = f"index/{kind}"
    index = unseal(path, objects.read(path) or b"") or {}
    if index.get("version") != VERSION:
        return {}
    rows = ((stamp, Summary(kind, *fields)) for stamp, *fields in index["rows"])
    return {manifest_path(kind, row.key): (stamp, row) for stamp, row in rows}


def _seconds(created: str) -> float:
    """Return a time as seconds since 1970; -inf for what is no time, so that nothing is taken for older."""
    try:
        return datetime.fromisoformat(created).timestamp()
    except ValueError:
        return float("-inf")
