"""What a place for objects must do, and two of them: an S3 bucket and memory (`local.py` has the third).

Each backend offers the same operations on relative paths such as `blobs/ab/abcd...`. What they have in
common, and what the contract tests check: a write is all or nothing for every reader, `create` and `replace`
are atomic among all threads, processes and hosts that use the backend, and a token names one content. Raw
exceptions leave here untranslated.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

PIECE = 1 << 20
"""Bytes that are read at a time where a content is not held in memory."""


def sha256(data: bytes) -> str:
    """Return the sha256 (hex) of `data`."""
    return hashlib.sha256(data).hexdigest()


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

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the size in bytes of every object below the folder `prefix`, by path."""


class MemoryBackend:
    """fsspec's process-wide `memory://`, for tests and dry runs: gone with the process."""

    parallel = 1
    _lock = threading.RLock()

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root.rstrip("/")

    def check(self) -> None:
        """Memory is always there."""

    def read(self, path: str) -> tuple[bytes, str]:
        """Copy the bytes; the token is their sha256."""
        data: bytes = self.fs.cat_file(f"{self.root}/{path}")
        return data, sha256(data)

    def stream(self, path: str, take: Callable[[bytes], object]) -> None:
        """Give the bytes as they are: they are in memory."""
        take(self.read(path)[0])

    def write(self, path: str, source: bytes | Path) -> None:
        """Set the bytes under the lock."""
        data = source if isinstance(source, bytes) else source.read_bytes()
        with self._lock:
            self.fs.pipe_file(f"{self.root}/{path}", data)

    def create(self, path: str, data: bytes) -> str | None:
        """Look and set under the lock."""
        with self._lock:
            if self.fs.exists(f"{self.root}/{path}"):
                return None
            self.write(path, data)
        return sha256(data)

    def replace(self, path: str, data: bytes, token: str) -> str | None:
        """Compare and set under the lock."""
        with self._lock:
            if not self._holds(path, token):
                return None
            self.write(path, data)
        return sha256(data)

    def remove(self, path: str, token: str) -> bool:
        """Compare and delete under the lock."""
        with self._lock:
            if not self._holds(path, token):
                return False
            self.fs.rm_file(f"{self.root}/{path}")
        return True

    def sizes(self, prefix: str) -> dict[str, int]:
        """Filter all objects by prefix."""
        found = self.fs.find(f"{self.root}/{prefix}", detail=True)
        return {name[len(self.root) + 1 :]: info["size"] for name, info in found.items()}

    def _holds(self, path: str, token: str) -> bool:
        try:
            return self.read(path)[1] == token
        except FileNotFoundError:
            return False


class S3Backend:
    """A bucket, or a folder of one, through fsspec's S3 file system.

    Conditions are the server's own (If-None-Match, If-Match, also on delete); tokens are ETags. On a server
    that ignores conditional headers the last writer wins. An upload of more than 100 MB goes in parts: a
    killed one leaves parts that the bucket's lifecycle rule should expire.
    """

    parallel = 16

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.bucket, _, folder = root.strip("/").partition("/")
        self.folder = f"{folder}/" if folder else ""

    def check(self) -> None:
        """List at most one object: fails for a wrong bucket, endpoint or credential."""
        self.fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=self.folder, MaxKeys=1)

    def read(self, path: str) -> tuple[bytes, str]:
        """Get bytes and ETag in one request, so that they belong together."""
        from fsspec.asyn import sync

        answer = self.fs.call_s3("get_object", **self._object(path))
        data: bytes = sync(self.fs.loop, answer["Body"].read)
        return data, _token(answer)

    def stream(self, path: str, take: Callable[[bytes], object]) -> None:
        """Download piece by piece."""
        from fsspec.asyn import sync

        body = self.fs.call_s3("get_object", **self._object(path))["Body"]
        try:
            while piece := sync(self.fs.loop, _piece, body):
                take(piece)
        finally:
            sync(self.fs.loop, body.aclose)

    def write(self, path: str, source: bytes | Path) -> None:
        """Put the object, in parts when it is large."""
        target = f"{self.bucket}/{self.folder}{path}"
        if isinstance(source, bytes):
            self.fs.pipe_file(target, source)
        else:
            self.fs.put_file(str(source), target)

    def create(self, path: str, data: bytes) -> str | None:
        """Put with If-None-Match."""
        return self._put(path, data, IfNoneMatch="*")

    def replace(self, path: str, data: bytes, token: str) -> str | None:
        """Put with If-Match."""
        return self._put(path, data, IfMatch=token)

    def remove(self, path: str, token: str) -> bool:
        """Delete with If-Match."""
        try:
            self.fs.call_s3("delete_object", **self._object(path), IfMatch=token)
        except OSError as error:
            if _condition_failed(error):
                return False
            raise
        return True

    def sizes(self, prefix: str) -> dict[str, int]:
        """List the prefix, page by page."""
        root = f"{self.bucket}/{self.folder}"
        found = self.fs.find(f"{root}{prefix}", detail=True)
        return {name[len(root) :]: info["size"] for name, info in found.items()}

    def _object(self, path: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.folder}{path}"}

    def _put(self, path: str, data: bytes, **condition: str) -> str | None:
        try:
            answer = self.fs.call_s3("put_object", **self._object(path), Body=data, **condition)
        except OSError as error:
            if _condition_failed(error):
                return None
            raise
        return _token(answer)


async def _piece(body: Any) -> bytes:
    """Read up to PIECE bytes; fewer at the end only."""
    read = bytearray()
    while len(read) < PIECE and (more := await body.read(PIECE - len(read))):
        read += more
    return bytes(read)


def _token(answer: Mapping[str, Any]) -> str:
    """Return the ETag of an answer as If-Match takes it; empty where a server or a proxy left it out."""
    return str(answer.get("ETag") or "").removeprefix("W/")  # as weak ones proxies return those they compress


def _condition_failed(error: OSError) -> bool:
    """Whether the server refused a conditional request: the object is there, changed, or gone."""
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code in {"PreconditionFailed", "412", "NoSuchKey", "404"}
