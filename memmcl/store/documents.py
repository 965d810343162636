"""The small objects of a store that check themselves: records of logs, pointers, checkpoints.

    logs/<log>/000007.json       one record of an append-only log, write-once
    pointers/<name>.json         a value that moves by compare-and-swap only: a champion, the lease of a run
    checkpoints/<name>.bin       the last state of work in progress, removed when the work is published

A pointer is a small JSON object beside a mark that is new at every swap. The mark keeps tokens from ever
coming back (A, B, A again), and tells a writer whose answer was lost on the way whether its swap took place.

A checkpoint is no artifact: only the work that resumes from it reads it. A lease keeps two processes off the same work.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Mapping
from typing import Any

from memmcl.errors import Conflict, CorruptArtifact
from memmcl.store.manifest import check_name
from memmcl.store.objects import Objects
from memmcl.store.sealed import seal, unseal

logger = logging.getLogger(__name__)
_DIGEST = 32  # bytes of sha256 in front of the content of a checkpoint


class Documents:
    """Logs, pointers and checkpoints among `objects`; the base of `Store`."""

    objects: Objects

    def append(self, log: str, index: int, record: Mapping[str, Any]) -> dict[str, Any]:
        """Store record `index` (>= 0) of `log` once; return the record that is stored, this one or an earlier one.

        A record that is damaged is replaced.

        Raises:
            TypeError, ValueError: a bad log name or index, or a record that is not JSON.
        """
        if index < 0:
            raise ValueError(f"a record's index is 0 or more, not {index}")
        path = f"logs/{check_name(log)}/{index:06d}.json"
        stored = self.objects.write_once(path, seal(path, dict(record)), lambda data: unseal(path, data) is not None)
        return unseal(path, stored) or {}

    def records(self, log: str) -> dict[int, dict[str, Any]]:
        """Return the readable records of `log` by index, ascending; damaged ones are skipped with a warning."""
        prefix = f"logs/{check_name(log)}/"
        names = {path: path.removeprefix(prefix).removesuffix(".json") for path in self.objects.sizes(prefix)}
        paths = [path for path, name in names.items() if name.isdecimal()]
        records: dict[int, dict[str, Any]] = {}
        for path, data in zip(paths, self.objects.map(self.objects.read, paths), strict=True):
            record = None if data is None else unseal(path, data)
            if record is None:
                logger.warning("%s/%s is damaged and counts as not written", self.objects.url, path)
            else:
                records[int(names[path])] = record
        return dict(sorted(records.items()))

    def read_pointer(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        """Return a pointer's value and token, (None, None) for no pointer. Raises CorruptArtifact if it is damaged."""
        value, token = self.look_at_pointer(name)
        if value is None and token is not None:
            raise CorruptArtifact(
                f"pointer {name!r} is damaged; remove {self.objects.url}/{_pointer(name)} and set it again"
            )
        return value, token

    def look_at_pointer(self, name: str) -> tuple[dict[str, Any] | None, str | None]:
        """Return what `read_pointer` does, but for a damaged pointer no value and its token: it may be replaced."""
        versioned = self.objects.versioned(_pointer(name))
        return (None, None) if versioned is None else (parse_pointer(_pointer(name), versioned[0]), versioned[1])

    def swap_pointer(self, name: str, value: Mapping[str, Any], token: str | None) -> str:
        """Set the pointer if its token still is `token` (None: if it does not exist); return the new token.

        Atomic among all threads, processes and hosts: of any number of swaps from one token exactly one succeeds.

        Raises:
            Conflict: it moved, appeared or vanished since `token` was read.
            TypeError, ValueError: `value` is not JSON.
        """
        path, mark = _pointer(name), uuid.uuid4().hex
        data = seal(path, {"value": dict(value), "mark": mark})
        new = self.objects.create(path, data) if token is None else self.objects.replace(path, data, token)
        if new:
            return new
        versioned = self.objects.versioned(path)
        if versioned is not None and (unseal(path, versioned[0]) or {}).get("mark") == mark:
            self.objects.require(versioned[1])
            return versioned[1]  # the first answer got lost, and the second attempt failed; or it held no token
        raise _moved(name)

    def delete_pointer(self, name: str, token: str) -> None:
        """Remove the pointer if its token still is `token`. Raises Conflict if it moved or vanished."""
        if not self.objects.remove(_pointer(name), token):
            raise _moved(name)

    def save_checkpoint(self, name: str, data: bytes) -> None:
        """Put `data` in the place of the last checkpoint; a reader sees the old one or the new one, whole."""
        self.objects.write(_checkpoint(name), hashlib.sha256(data).digest() + data)

    def read_checkpoint(self, name: str) -> bytes | None:
        """Return the last checkpoint; None where there is none, or, with a warning, where it is damaged."""
        stored = self.objects.read(_checkpoint(name))
        data = None if stored is None else parse_checkpoint(stored)
        if stored is not None and data is None:
            logger.warning("checkpoint %s in %s is damaged and counts as not written", name, self.objects.url)
        return data

    def drop_checkpoint(self, name: str) -> None:
        """Remove the checkpoint, if there is one."""
        versioned = self.objects.versioned(_checkpoint(name))
        if versioned is not None:
            self.objects.remove(_checkpoint(name), versioned[1])


def parse_pointer(path: str, data: bytes) -> dict[str, Any] | None:
    """Return the value of the pointer stored at `path`; None when `data` is damaged."""
    value = (unseal(path, data) or {}).get("value")
    return value if isinstance(value, dict) else None


def parse_checkpoint(stored: bytes) -> bytes | None:
    """Return the content of a stored checkpoint; None when it does not match the digest in front of it."""
    digest, data = stored[:_DIGEST], stored[_DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else None


def _moved(name: str) -> Conflict:
    return Conflict(f"pointer {name!r} changed since it was read; read it again and decide anew")


def _pointer(name: str) -> str:
    return f"pointers/{check_name(name)}.json"


def _checkpoint(name: str) -> str:
    return f"checkpoints/{check_name(name)}.bin"
