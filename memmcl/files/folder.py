"""Output folders of commands: they appear under their name complete, or not at all, with a record of their inputs.

The record is a JSON file in the folder: `made_from`, which is all that decides the result, and the digests of all other
files. By it the same command recognises its folder; a folder with anything else in it is never written to.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memmcl.errors import StoreError, StoreFull, UsageError
from memmcl.files import allowed
from memmcl.files.failures import FULL, replace_file

_SCRATCH = re.compile(r"^\.(.*)\.[0-9a-f]{32}\.part$")
ABANDONED = 24 * 3600.0  # seconds after which a temporary folder or file was left by a killed command


def made_before(folder: Path, record: str, made_from: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of a folder that an equal `made_from` wrote, None for one that is new or empty.

    record: the name of its file.

    Raises:
        UsageError: there is something else.
        ConfigError: a place that may not be written to.
    """
    allowed.require(str(folder))
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder; name a new or empty one")
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        earlier: dict[str, Any] = json.loads((folder / record).read_text())
        same = earlier["made_from"] == made_from
        intact = all(file_digest(folder / name) == digest for name, digest in earlier["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = intact = False
        earlier = {}
    if not same or not intact:
        what = "what other arguments made" if earlier and not same else "other files, or some that changed since"
        raise UsageError(f"{folder} holds {what}; name a new or empty folder")
    return earlier


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `folder` if the block succeeds, and removed if it fails.

    Raises:
        StoreError: it cannot be written.
        ConfigError: a place that may not be written to.
    """
    allowed.require(str(folder))
    scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"
    oldest = time.time() - ABANDONED
    with disk(folder):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 32}.part"):
            if left.stat().st_mtime < oldest:
                shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir(parents=True)
    try:
        yield scratch
        with disk(folder):
            scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def seal(folder: Path, record: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the record `content` with the digests of all files in `folder`; return it. Raises StoreError."""
    with disk(folder):
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
    whole = {**content, "files": digests}
    put(folder, record, (json.dumps(whole, indent=1) + "\n").encode())
    return whole


def put(folder: Path, name: str, data: bytes) -> None:
    """Write one file into `folder`. Raises StoreError if it cannot be written."""
    with disk(folder):
        replace_file(folder / name, data)


def check_room(folder: Path, size: int) -> None:
    """Raise StoreFull unless the disk that `folder` will lie on has room for `size` bytes."""
    with disk(folder):
        above = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(above).free
    if free < size:
        raise StoreFull(
            f"{_named(folder)} will take {_gigabytes(size)}, and its disk has {_gigabytes(free)} free; make room, or "
            "name another place"
        )


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into one line about `folder`: StoreFull without space, StoreError for the rest."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in FULL else StoreError
        raise kind(
            f"cannot write {_named(folder)} ({error.strerror}); make room or permissions, or name another place"
        ) from error


def _named(folder: Path) -> Path:
    """Return the name that a place of `new_folder` will take; any other folder as it is."""
    match = _SCRATCH.match(folder.name)
    return folder.with_name(match[1]) if match else folder


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def file_digest(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
