"""One bit of a stored object is flipped; what do its readers say?

Every object of a store belongs to a sort, by its path and, for blobs, by the artifact whose file it is. `judge` reads a
damaged object as the product does, makes again what counts as absent, and says what came of it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memmcl.errors import CorruptArtifact, MemmclError
from memmcl.store import Lease, Manifest, StageSettings, Store, read_champions
from memmcl.store.index import summaries
from memmcl.store.manifest import blob_path, manifest_path

ABSENT = "counted as absent, made again"
REFUSED = "refused with one line"
ACCEPTED = "ACCEPTED with other content"
UNNOTICED = "read as it was"
INDEX = "index of manifests"
LOGS = {"searches": "record of a search", "runs": "journal of a run"}
POINTERS = {"leases": "lease of a run", "champions": "champion"}


@dataclass(frozen=True)
class Stored:
    """A directory store whose objects are damaged and restored, and what it holds undamaged."""

    root: Path
    store: Store
    manifests: dict[str, Manifest]
    owners: dict[str, Manifest]

    @classmethod
    def of(cls, root: Path) -> Stored:
        """Look at a store before anything is damaged."""
        store = Store.open(str(root))
        manifests = store.list()
        owners = {blob_path(info.sha256): one for one in manifests for info in one.blobs.values()}
        return cls(root, store, {manifest_path(one.kind, one.key): one for one in manifests}, owners)

    def sorts(self) -> dict[str, list[str]]:
        """Return the paths of all objects by sort.

        Raises:
            AssertionError: an object that this module has no case for.
        """
        found: dict[str, list[str]] = {}
        for path in self.store.objects.sizes(""):
            sort = self._sort(path)
            if sort is not None:
                found.setdefault(sort, []).append(path)
        return dict(sorted(found.items()))

    def _sort(self, path: str) -> str | None:
        folder, kind, *_ = path.split("/")
        if folder == "tmp" or (folder == "blobs" and path not in self.owners):
            return None  # half-written, or of no artifact: nobody reads it
        if folder == "blobs":
            return f"file of {self.owners[path].kind}"
        if folder == "manifests":
            return f"manifest of {kind}"
        known = {"logs": LOGS, "pointers": POINTERS}.get(folder, {}).get(kind)
        sort = {"checkpoints": "checkpoint", "index": INDEX}.get(folder, known)
        assert sort is not None, f"no case for {path}"
        return sort


def flip(root: Path, path: str, bit: int) -> None:
    """Flip a bit of a file."""
    data = bytearray((root / path).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (root / path).write_bytes(bytes(data))


@contextmanager
def kept(root: Path, path: str) -> Iterator[None]:
    """Whatever happens to a file in this block, at its end it is as it was."""
    file = root / path
    before = file.read_bytes()
    try:
        yield
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(before)


def draw_bits(stored: Stored, paths: list[str], count: int, draw: random.Random) -> list[tuple[str, int]]:
    """Return `count` pairs of an object and a bit of it; empty objects have none."""
    full = [path for path in paths if (stored.root / path).stat().st_size]
    chosen = [draw.choice(full) for _ in range(count)]
    return [(path, draw.randrange((stored.root / path).stat().st_size * 8)) for path in chosen]


def judge(stored: Stored, sort: str, path: str, bit: int) -> str:
    """Return what the readers of an object say with this bit of it flipped: one of the above, or what is wrong."""
    logging.disable(logging.CRITICAL)
    try:
        with kept(stored.root, path):
            expected = _read(stored, sort, path)
        with kept(stored.root, path):
            flip(stored.root, path, bit)
            try:
                found = _read(stored, sort, path)
            except MemmclError as error:
                return REFUSED if "\n" not in str(error) else f"an error of several lines: {error}"
            if sort == INDEX and found == expected:
                return ABSENT  # it is derived: what it does not tell is read from the manifests
            if found is not None:
                return UNNOTICED if found == expected else ACCEPTED
            make = MAKE.get(sort.split()[0])
            if make is not None:
                make(stored, path, expected)
                if _read(stored, sort, path) is None:
                    return "made again, and still counted as absent"
            return ABSENT
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    finally:
        logging.disable(logging.NOTSET)


def _read(stored: Stored, sort: str, path: str) -> Any:
    """Return what the product reads there; None where it counts as absent."""
    store = stored.store
    name = path.partition("/")[2].removesuffix(Path(path).suffix)
    if sort.startswith("manifest of"):
        owner = stored.manifests[path]
        found = store.find(owner.kind, owner.key)
        shown = [one for one in store.list(owner.kind) if manifest_path(one.kind, one.key) == path]
        return found if shown or found else None
    if sort.startswith("file of"):
        owner = stored.owners[path]
        (file, *_) = [file for file, info in owner.blobs.items() if blob_path(info.sha256) == path]
        try:
            return store.find(owner.kind, owner.key) and store.read(owner, file)
        except CorruptArtifact:
            return None
    if sort in LOGS.values():
        log, _, index = name.rpartition("/")
        return store.records(log).get(int(index))
    if sort == "checkpoint":
        return store.read_checkpoint(name)
    if sort == INDEX:
        return summaries(store, name)
    if sort == "champion":
        return read_champions(store, name.partition("/")[2]).history
    try:
        value, _ = store.read_pointer(name)
    except CorruptArtifact:
        value = None
    # Its holder is dead: whoever comes next gets it, after it has looked for a moment where that cannot be read.
    with Lease(store, name.partition("/")[2], {}, ttl=0.2, beat=0.05):
        return value


def _publish(stored: Stored, path: str, expected: Any) -> None:
    owner = stored.manifests.get(path) or stored.owners[path]
    places = {file: blob_path(info.sha256) for file, info in owner.blobs.items()}
    files = {file: expected if at == path else (stored.root / at).read_bytes() for file, at in places.items()}
    settings = StageSettings(owner.config)
    stored.store.publish(owner.kind, owner.key, name=owner.name, files=files, inputs=owner.inputs, settings=settings)


def _append(stored: Stored, path: str, record: Any) -> None:
    log, _, index = path.partition("/")[2].rpartition(".")[0].rpartition("/")
    stored.store.append(log, int(index), record)


def _save(stored: Stored, path: str, data: Any) -> None:
    stored.store.save_checkpoint(path.partition("/")[2].rpartition(".")[0], data)


MAKE: dict[str, Callable[[Stored, str, Any], None]] = {
    "manifest": _publish,
    "file": _publish,
    "record": _append,
    "journal": _append,
    "checkpoint": _save,
}
