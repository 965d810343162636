"""Folders for what a process needs while it works, and the removal of those whose process died.

They lie in $TMPDIR/memmcl-UID, which only this user can read; those of Ray in $RAY_TMPDIR where that is set. Each has a
file that its process keeps locked; the kernel frees the lock when the process ends, in whatever way. A process that
makes a folder first removes those that nobody locks.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memmcl.errors import ServiceError
from tasks.run.reaper import end_marked

MARK = "MEMMCL_RAY"
"""The variable that the processes of a local Ray carry; its value is their folder."""
ERRORS = "errors"
LOGS = "logs"
KEPT_DAYS = 30
"""For how long the tracebacks of unexpected errors, and the logs of commands, are kept."""
_OWNER = "owner"
_MADE = re.compile(r"(ray|prefect|tune|export)-[a-z0-9_]{8}")
_UNFINISHED = re.compile(r"\.new-[a-z0-9_]{8}")
_UNFINISHED_SECONDS = 3600.0


def home() -> Path:
    """Return this user's folder in the temporary directory, created if missing; ServiceError if that cannot be."""
    folder = Path(tempfile.gettempdir()).absolute() / f"memmcl-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ServiceError(
            f"cannot make the folder {folder} ({error.strerror}); name a place that can be written as TMPDIR"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ServiceError(f"{folder} is not a folder of this user's; name another place as TMPDIR, or remove it")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


@contextmanager
def work_folder(kind: str, place: Path | None = None, *, keep: bool = False) -> Iterator[Path]:
    """Make a folder, locked while the block runs and removed at its end; remove those whose owners died.

    kind: ray, prefect, tune, export. place: its parent; `home()` by default. keep: leave it after an error, for its
    logs, until the next start. Raises a ServiceError where it cannot be made.
    """
    ours = place or home()
    tidy(ours)
    try:
        ours.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=ours))
        lock = os.open(new / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = new.rename(new.with_name(new.name.replace(".new", kind, 1)))  # from now on others look at its lock
    except OSError as error:
        raise ServiceError(f"cannot make a folder in {ours} ({error.strerror}); free space there") from error
    remove = not keep
    try:
        yield folder
        remove = True
    finally:
        if remove:
            _erase(folder)
        os.close(lock)


def tidy(place: Path) -> None:
    """Remove the folders in `place` whose owners died, with what is left of their processes; old tracebacks, logs."""
    for entry in _entries(place):
        if _MADE.fullmatch(entry.name):
            _remove_unlocked(entry)
        elif _UNFINISHED.fullmatch(entry.name) and _age(entry) > _UNFINISHED_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)
    for entry in (*_entries(place / ERRORS), *_entries(place / LOGS)):
        if _age(entry) > KEPT_DAYS * 86400:
            with suppress(OSError):
                entry.unlink()


def keep_error(text: str) -> Path:
    """Write the traceback of an unexpected error to a new file, and return its path; raises what `new_file` does."""
    path = new_file(ERRORS, ".txt")
    path.write_text(text)
    return path


def new_file(folder: str, suffix: str) -> Path:
    """Make an empty file, for this user alone, in `ERRORS` or `LOGS`; ServiceError or OSError if it cannot be."""
    place = home() / folder
    place.mkdir(mode=0o700, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=time.strftime("%Y-%m-%d-"), suffix=suffix, dir=place)
    os.close(handle)
    return Path(name)


def _remove_unlocked(folder: Path) -> None:
    try:
        lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # not made by us, or gone by now
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.geteuid() and end_marked(f"{MARK}={folder}"):
            _erase(folder)
    except OSError:
        return  # its owner is alive
    finally:
        os.close(lock)


def _erase(folder: Path) -> None:
    """Remove a folder, the file that marks it as ours last."""
    for entry in _entries(folder):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != _OWNER:
            with suppress(OSError):
                entry.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _age(path: Path) -> float:
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
