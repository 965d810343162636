"""System calls of a store on a local disk that fail, or that a `kill -9` comes before: the n-th, then no more.

The calls are replaced where Python makes them (`os`, `io`), for paths below one folder alone, and every replacement
ends in the real call.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

CALLS = ("link", "replace", "fsync", "mkdir", "unlink", "scandir", "open")
"""Functions of `os` that a store on a disk rests on; files are opened, read and written through `io.open`."""


@dataclass
class DiskFault:
    """What happens at the calls number `first` to `first + times - 1` (from 0) that `about` is about.

    about: names of calls: those of `CALLS`, and `create` (a file for writing), `write`, `read`. strike: is called with
    the path in place of the call, or before it when it returns. hits: how often it did; seen: calls so far, by name.
    """

    about: frozenset[str]
    strike: Callable[[Path], None]
    first: int = 0
    times: int = 1
    hits: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    _busy: bool = field(default=False, repr=False)

    def before(self, call: str, path: Path) -> None:
        """Count a call, and strike when it is its turn."""
        if self._busy:
            return
        self.seen[call] += 1
        number = sum(self.seen[one] for one in self.about)
        if call in self.about and self.first < number <= self.first + self.times:
            self.hits += 1
            self._busy = True  # what a strike itself calls is not counted
            try:
                self.strike(path)
            finally:
                self._busy = False


def failing(number: int) -> Callable[[Path], None]:
    """Return a strike that raises the OSError of this number."""

    def strike(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return strike


def killed(_: Path) -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def folder_removed(path: Path) -> None:
    """Remove the folder that the call is about to use, with all that is in it."""
    shutil.rmtree(path if path.is_dir() else path.parent, ignore_errors=True)


@contextmanager
def struck(root: Path, fault: DiskFault) -> Iterator[DiskFault]:
    """Let `fault` see every system call on paths below `root` until the block ends."""
    inside = f"{root.resolve()}{os.sep}"

    def below(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and str(Path(path).absolute()).startswith(inside)

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            target = arguments[1] if name in {"link", "replace"} else arguments[0]
            if name == "fsync" and isinstance(target, int):
                target = os.readlink(f"/proc/self/fd/{target}")
            if below(target):
                fault.before(name, Path(target))
            return real(*arguments, **named)

        return call

    real_open = io.open

    def opened(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not below(file):
            return real_open(file, mode, *arguments, **named)
        writes = any(letter in mode for letter in "wax+")
        fault.before("create" if writes else "read", Path(file))
        stream = real_open(file, mode, *arguments, **named)
        return _Writer(stream, Path(file), fault) if writes and "b" in mode else stream

    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(patch.object(os, name, watched(name)))
        stack.enter_context(patch.object(io, "open", opened))
        yield fault


class _Writer:
    """A file open for writing: the fault sees each write, half of which has reached the disk by then."""

    def __init__(self, stream: Any, path: Path, fault: DiskFault) -> None:
        self._stream, self._path, self._fault = stream, path, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()

    def write(self, data: bytes) -> int:
        half = len(data) // 2
        self._stream.write(data[:half])
        self._stream.flush()
        self._fault.before("write", self._path)
        self._stream.write(data[half:])
        return len(data)


@dataclass(frozen=True)
class DiskKind:
    """A kind of fault on a disk: in words, at which calls, what strikes there."""

    what: str
    about: frozenset[str]
    strike: Callable[[Path], None]
    kills: bool = False


def _failing(what: str, number: int, *about: str) -> DiskKind:
    return DiskKind(what, frozenset(about), failing(number))


DISK_FAULTS: dict[str, DiskKind] = {
    "ENOSPC": _failing(
        "no space left: a write stops half-way, a file or folder is not made", errno.ENOSPC, "write", "create", "mkdir"
    ),
    "EDQUOT": _failing("the quota is used up, in a write or when it is flushed", errno.EDQUOT, "write", "fsync"),
    "EIO in a read": _failing("a file or folder cannot be read", errno.EIO, "read", "scandir"),
    "EACCES": _failing("no permission for a file or folder", errno.EACCES, "create", "read", "mkdir", "open"),
    "EROFS": _failing("the file system has become read-only", errno.EROFS, "create", "link", "replace"),
    "rename fails": _failing("a finished file cannot be moved into its place (EIO)", errno.EIO, "replace"),
    "link fails, EEXIST": _failing("something is said to be there where nothing is", errno.EEXIST, "link"),
    "link fails, EPERM": _failing("a file system without hard links", errno.EPERM, "link"),
    "fsync fails": _failing("what was written may not be on the disk (EIO)", errno.EIO, "fsync"),
    "folder removed": DiskKind(
        "the folder of half-written files is removed as one is made", frozenset({"create"}), folder_removed
    ),
    "kill -9 in a write": DiskKind("half of a file has reached the disk", frozenset({"write"}), killed, kills=True),
    "kill -9 between calls": DiskKind(
        "before any system call that changes the disk", frozenset({*CALLS, "create"}), killed, kills=True
    ),
}
