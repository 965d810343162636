"""Objects in a local directory: temp file, flush, then link or move; compare-and-swap under a file lock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from memmcl.store.backends import PIECE, Entry, LockedBackend, below, sha256

TEMPORARY = "tmp"  # half-written files of live and of killed writers; never read
TEMPORARY_SECONDS = 24 * 3600.0  # an older file in `tmp/` was left by a killed writer
MOVES = 100  # each failed one means that a folder was removed between two system calls
NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalBackend(LockedBackend):
    """A directory, created when the first object is written.

    Writes go to `tmp/` first and are then linked or moved into place, so a killed writer leaves at most a
    file in `tmp/`. Compare-and-swap holds an advisory lock (flock) on one file for the whole directory.
    """

    parallel = 1

    def __init__(self, root: Path) -> None:
        self.root = root

    def check(self) -> None:
        """Look at permissions, and remove old files of killed writers from `tmp/`."""
        if not self.root.exists():
            ancestor = next(parent for parent in self.root.parents if parent.exists())
            _require(ancestor, os.W_OK | os.X_OK)
            return
        _require(self.root, os.R_OK | os.X_OK)
        oldest = time.time() - TEMPORARY_SECONDS
        for path in (self.root / TEMPORARY).glob("*.part"):
            with suppress(FileNotFoundError, PermissionError):  # another process swept it, or it is not ours
                if path.stat().st_mtime < oldest:
                    path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._target(f"{TEMPORARY}/swap.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
            yield

    def unlink(self, path: str) -> None:
        (self.root / path).unlink()

    def read(self, path: str) -> tuple[bytes, str]:
        data = (self.root / path).read_bytes()
        return data, sha256(data)

    def stream(self, path: str, take: Callable[[bytes], object]) -> None:
        with (self.root / path).open("rb") as file:
            while piece := file.read(PIECE):
                take(piece)

    def write(self, path: str, source: bytes | Path) -> None:
        with self._temporary(source) as part:
            self._move(part.replace, path)
        _sync_directory(self._target(path).parent)

    def create(self, path: str, data: bytes) -> str | None:
        """Link a finished temporary file to the path, which only works where nothing is."""
        target = self._target(path)
        if target.exists():
            return None
        with self._temporary(data) as part:
            try:
                # fails when the target exists, and never shows half a file
                self._move(partial(os.link, part), path)
            except FileExistsError:
                return None
            except OSError as error:
                if error.errno not in NO_HARD_LINKS:
                    raise
                with self.locked():
                    if target.exists():
                        return None
                    part.replace(target)
        _sync_directory(target.parent)
        return sha256(data)

    def replace(self, path: str, data: bytes, token: str) -> str | None:
        """Compare and move a finished temporary file into place, both under the lock; no flush waits in it."""
        with self._temporary(data) as part, self.locked():
            if not self._holds(path, token):
                return None
            self._move(part.replace, path)
        _sync_directory(self._target(path).parent)
        return sha256(data)

    def entries(self, folder: str, start: str = "") -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        beginning, cut = f"{self.root}/{below(folder)}", len(f"{self.root}/")
        folders = [beginning.rstrip("/")]
        while folders:
            for entry in _entries(folders.pop()):
                if entry.is_dir():
                    folders.append(entry.path)
                    continue
                if not entry.path.startswith(beginning + start):
                    continue
                try:
                    status = entry.stat()
                except FileNotFoundError:  # removed since it was listed
                    continue
                stamp = f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"
                entries[entry.path[cut:]] = Entry(status.st_size, status.st_mtime, stamp)
        return entries

    def folders(self, folder: str) -> list[str]:
        return sorted(entry.name for entry in _entries(f"{self.root}/{folder}") if entry.is_dir())

    def touch(self, path: str) -> bool:
        """Set the time of the last change; without the right to, as for another user's file, write a copy."""
        try:
            os.utime(self.root / path)
        except FileNotFoundError:
            return False
        except PermissionError:
            self.write(path, self.root / path)
        return True

    def delete(self, paths: Sequence[str]) -> None:
        """Unlink them, and folders that this leaves empty."""
        for path in paths:
            (self.root / path).unlink(missing_ok=True)
        for parent in sorted({(self.root / path).parent for path in paths}, key=lambda one: -len(one.parts)):
            if parent.parent != self.root:
                with suppress(OSError):  # it is not empty, or being written into
                    parent.rmdir()

    def unfinished(self) -> dict[str, Entry]:
        return {path: entry for path, entry in self.entries(TEMPORARY).items() if path.endswith(".part")}

    def discard(self, unfinished: str) -> None:
        self.delete([unfinished])

    def _target(self, path: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _move(self, move: Callable[[Path], object], path: str) -> None:
        """Call `move(target)`; again where the folder was empty and `delete` removed it meanwhile."""
        for _ in range(MOVES):
            with suppress(FileNotFoundError):
                move(self._target(path))
                return
        move(self._target(path))

    @contextmanager
    def _temporary(self, source: bytes | Path) -> Iterator[Path]:
        """A flushed copy of `source` inside `tmp/`; gone at the end unless it was moved."""
        part = self._target(f"{TEMPORARY}/{uuid.uuid4().hex}.part")
        try:
            with part.open("wb") as output:
                if isinstance(source, Path):
                    with source.open("rb") as file:
                        shutil.copyfileobj(file, output, PIECE)
                else:
                    output.write(source)
                output.flush()
                os.fsync(output.fileno())
            yield part
        finally:
            part.unlink(missing_ok=True)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:  # nothing was written there yet
        return []


def _require(directory: Path, mode: int) -> None:
    if not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(directory))
    if not os.access(directory, mode):
        raise PermissionError(errno.EACCES, "no permission", str(directory))


def _sync_directory(directory: Path) -> None:
    """Make a new name in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
