"""Named values that move by compare-and-swap only: the champion, and the leases of running pipelines.

A pointer is a small JSON object beside a mark that is new at every swap. The mark keeps tokens from ever
coming back (A, B, A again), and tells a writer whose answer was lost on the way whether its swap took place.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from memmcl.errors import Conflict, CorruptArtifact
from memmcl.store.manifest import check_name
from memmcl.store.objects import Objects
from memmcl.store.sealed import seal, unseal


def read_pointer(objects: Objects, name: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return the value of the pointer and its token; (None, None) when it does not exist.

    Raises:
        CorruptArtifact: the object is not a pointer that this module wrote.
    """
    value, token = look_at_pointer(objects, name)
    if value is None and token is not None:
        raise CorruptArtifact(f"pointer {name!r} is damaged; remove {objects.url}/{_path(name)} and set it again")
    return value, token


def look_at_pointer(objects: Objects, name: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return what `read_pointer` does, but for a damaged pointer no value and its token: it may be replaced."""
    found = objects.versioned(_path(name))
    return (None, None) if found is None else (parse_pointer(_path(name), found[0]), found[1])


def parse_pointer(path: str, data: bytes) -> dict[str, Any] | None:
    """Return the value of the pointer stored at `path`; None when `data` is damaged."""
    value = (unseal(path, data) or {}).get("value")
    return value if isinstance(value, dict) else None


def swap_pointer(objects: Objects, name: str, value: Mapping[str, Any], token: str | None) -> str:
    """Set the pointer if its token still is `token` (None: if it does not exist); return the new token.

    Atomic among all threads, processes and hosts: of any number of swaps from one token exactly one succeeds.

    Raises:
        Conflict: it moved, appeared or vanished since `token` was read.
        TypeError, ValueError: `value` is not JSON.
    """
    path = _path(name)
    mark = uuid.uuid4().hex
    data = seal(path, {"value": dict(value), "mark": mark})
    new = objects.create(path, data) if token is None else objects.replace(path, data, token)
    if new:
        return new
    found = objects.versioned(path)
    if found is not None and (unseal(path, found[0]) or {}).get("mark") == mark:
        objects.require(found[1])
        return found[1]  # ours: the first answer got lost, and what failed was the second attempt; or it held no token
    raise Conflict(f"pointer {name!r} changed since it was read; read it again and decide anew")


def delete_pointer(objects: Objects, name: str, token: str) -> None:
    """Remove the pointer if its token still is `token`.

    Raises:
        Conflict: it moved or vanished since `token` was read.
    """
    if not objects.remove(_path(name), token):
        raise Conflict(f"pointer {name!r} changed since it was read; read it again and decide anew")


def _path(name: str) -> str:
    return f"pointers/{check_name(name)}.json"
