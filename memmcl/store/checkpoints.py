"""The last state of work in progress: one object a name, replaced whole, removed when the work is published.

No artifact: nobody reads it but the work that goes on from it. A lease keeps two processes off the same work.
"""

from __future__ import annotations

import hashlib
import logging

from memmcl.store.manifest import check_name
from memmcl.store.objects import Objects

logger = logging.getLogger(__name__)
_DIGEST = 32  # bytes of sha256 in front of the content


def save_checkpoint(objects: Objects, name: str, data: bytes) -> None:
    """Put `data` in the place of the last checkpoint; a reader sees the old one or the new one, whole."""
    objects.write(_path(name), hashlib.sha256(data).digest() + data)


def read_checkpoint(objects: Objects, name: str) -> bytes | None:
    """Return the last checkpoint; None where there is none, or, with a warning, where it is damaged."""
    found = objects.read(_path(name))
    if found is None:
        return None
    data = parse_checkpoint(found)
    if data is None:
        logger.warning("checkpoint %s in %s is damaged and counts as not written", name, objects.url)
    return data


def parse_checkpoint(stored: bytes) -> bytes | None:
    """Return the content of a stored checkpoint; None when it does not match the digest in front of it."""
    digest, data = stored[:_DIGEST], stored[_DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else None


def drop_checkpoint(objects: Objects, name: str) -> None:
    """Remove the checkpoint, if there is one."""
    found = objects.versioned(_path(name))
    if found is not None:
        objects.remove(_path(name), found[1])


def _path(name: str) -> str:
    return f"checkpoints/{check_name(name)}.bin"
