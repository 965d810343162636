"""What a place for objects must do, and memory as one; `local.py` has directories, `s3.py` has buckets.

Each backend offers the same operations on relative paths such as `blobs/ab/abcd...`. What they have in
common, and what the contract tests check: a write is all or nothing for every reader, `create` and `replace`
are atomic among all threads, processes and hosts that use the backend, and a token names one content. Raw
exceptions leave here untranslated.
"""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

PIECE = 1 << 20  # bytes that are read at a time where a content is not held in memory


def sha256(data: bytes) -> str:
    """Return the sha256 (hex) of `data`."""
    return hashlib.sha256(data).hexdigest()


def below(folder: str) -> str:
    """Return how the paths of all objects in a folder begin; "" is everything."""
    folder = folder.strip("/")
    return f"{folder}/" if folder else ""


@dataclass(frozen=True)
class Entry:
    """One object in a listing: size in bytes, when it was written or touched last, what changes with its content.

    touched: seconds since 1970, by the clock of the disk or the server.
    """

    size: int
    touched: float
    stamp: str


class Backend(Protocol):
    """Bytes by path. Every method may raise what its library raises; `objects.py` translates.

    `parallel` is how many calls at a time pay off.
    """

    parallel: int

    def check(self) -> None:
        """Make one cheap call that fails when the place cannot be used."""

    def read(self, path: str) -> tuple[bytes, str]:
        """Return the content and its token, which is empty where the place gives none. Raises FileNotFoundError."""

    def stream(self, path: str, take: Callable[[bytes], object]) -> None:
        """Give the content to `take`, piece by piece, without holding it in memory. Raises FileNotFoundError."""

    def write(self, path: str, source: bytes | Path) -> None:
        """Store `source` (or the file it names) under `path`, whatever was there."""

    def create(self, path: str, data: bytes) -> str | None:
        """Store `data` where nothing is and return its token; None when something is there."""

    def replace(self, path: str, data: bytes, token: str) -> str | None:
        """Store `data` where the content of `token` is and return the new token; None when it is not."""

    def remove(self, path: str, token: str) -> bool:
        """Remove the content of `token`; False when it is not there."""

    def entries(self, folder: str, start: str = "") -> dict[str, Entry]:
        """Return all objects below `folder`, by path; with `start` those whose path in it begins so."""

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders that lie in `folder`; an S3 server may name some that are empty by now."""

    def touch(self, path: str) -> bool:
        """Make the object one that was written now, its content unchanged; False when nothing is there."""

    def delete(self, paths: Sequence[str]) -> None:
        """Remove the objects, whatever they hold; what is not there is passed over."""

    def unfinished(self) -> dict[str, Entry]:
        """Return what writers began and never ended: files in `tmp/`, multipart uploads; by a name for `discard`."""

    def discard(self, unfinished: str) -> None:
        """Remove one of these."""


class LockedBackend(Backend):
    """A backend whose tokens are sha256s, compared under a lock of its own."""

    @abstractmethod
    def locked(self) -> AbstractContextManager[Any]:
        """Hold the lock that excludes other replacements and removals."""

    @abstractmethod
    def unlink(self, path: str) -> None:
        """Remove an object that is there."""

    def remove(self, path: str, token: str) -> bool:
        with self.locked():
            if not self._holds(path, token):
                return False
            self.unlink(path)
        return True

    def _holds(self, path: str, token: str) -> bool:
        try:
            return self.read(path)[1] == token
        except FileNotFoundError:
            return False


class MemoryBackend(LockedBackend):
    """fsspec's process-wide `memory://`, for tests and dry runs: gone with the process."""

    parallel = 1
    _lock = threading.RLock()

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = f"{fs._strip_protocol(root)}/"

    def check(self) -> None:
        """Memory is always there."""

    def locked(self) -> AbstractContextManager[Any]:
        return self._lock

    def read(self, path: str) -> tuple[bytes, str]:
        data: bytes = self.fs.cat_file(self._key(path))
        return data, sha256(data)

    def stream(self, path: str, take: Callable[[bytes], object]) -> None:
        take(self.read(path)[0])

    def write(self, path: str, source: bytes | Path) -> None:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with self._lock:
            self.fs.pipe_file(self._key(path), data)

    def create(self, path: str, data: bytes) -> str | None:
        with self._lock:
            if self._key(path) in self.fs.store:
                return None
            self.write(path, data)
        return sha256(data)

    def replace(self, path: str, data: bytes, token: str) -> str | None:
        with self._lock:
            if not self._holds(path, token):
                return None
            self.write(path, data)
        return sha256(data)

    def entries(self, folder: str, start: str = "") -> dict[str, Entry]:
        beginning, cut = self._key(below(folder) + start), len(self.root)
        with self._lock:
            files = {name: file for name, file in self.fs.store.items() if name.startswith(beginning)}
        times = {name: file.modified.timestamp() for name, file in files.items()}
        return {name[cut:]: Entry(file.size, times[name], f"{file.size}-{times[name]}") for name, file in files.items()}

    def folders(self, folder: str) -> list[str]:
        cut = len(below(folder))
        return sorted({path[cut:].partition("/")[0] for path in self.entries(folder) if "/" in path[cut:]})

    def touch(self, path: str) -> bool:
        with self._lock:
            file = self.fs.store.get(self._key(path))
            if file is not None:
                file.modified = datetime.now(UTC)
        return file is not None

    def unlink(self, path: str) -> None:
        self.delete([path])

    def delete(self, paths: Sequence[str]) -> None:
        with self._lock:
            for path in paths:
                self.fs.store.pop(self._key(path), None)

    def unfinished(self) -> dict[str, Entry]:
        return {}

    def discard(self, unfinished: str) -> None:
        """Nothing outlives a writer here."""

    def _key(self, path: str) -> str:
        return f"{self.root}{path}"
