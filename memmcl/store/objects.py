"""Objects on any supported fsspec URL: which backend, how often to try, and what failure to report.

This is the one place where exceptions of a disk or of an S3 client become `StoreError`s. No message holds a
credential: URLs with credentials are refused, and text that comes from a library is scrubbed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from memmcl.errors import ConfigError, StoreAccessError, StoreError, brief, shown
from memmcl.files import allowed
from memmcl.files.failures import code_of, open_temporary, replace_file
from memmcl.store.backends import Backend, Entry, MemoryBackend
from memmcl.store.local import LocalBackend
from memmcl.store.s3 import S3Backend
from memmcl.store.translate import may_pass, translate
from memmcl.urls import refuse_secret, scheme_of

T = TypeVar("T")

RETRY_SECONDS = (0.2, 0.6, 1.8, 5.0)  # pauses between attempts when a failure may pass by itself
CHECK_SECONDS = (0.2,)  # the same for the check at opening: a user waits at the terminal
WRITE_ONCE_ATTEMPTS = 100  # each failed one means that another writer got on


class Objects:
    """A backend with retries and translated errors. Paths are relative, with forward slashes."""

    def __init__(self, backend: Backend, url: str, endpoint_url: str | None = None) -> None:
        self.backend = backend
        self.url = url
        self.endpoint_url = endpoint_url
        self.where = brief(url if endpoint_url is None else f"{url} at {endpoint_url}")

    def check(self) -> None:
        """Raise StoreAccessError when the place cannot be used."""
        self._call(self.backend.check, CHECK_SECONDS)

    def read(self, path: str) -> bytes | None:
        """Return the content, or None when there is no such object."""
        versioned = self.versioned(path)
        return None if versioned is None else versioned[0]

    def versioned(self, path: str) -> tuple[bytes, str] | None:
        """Return the content and its token, or None when there is no such object."""
        return self._find(lambda: self.backend.read(path))

    def digest(self, path: str) -> tuple[str, int] | None:
        """Return the content's sha256 and size in bytes, or None when there is no such object."""

        def attempt() -> tuple[str, int]:
            digest, size = hashlib.sha256(), 0

            def take(piece: bytes) -> None:
                nonlocal size
                digest.update(piece)
                size += len(piece)

            self.backend.stream(path, take)
            return digest.hexdigest(), size

        return self._find(attempt)

    def fetch(self, path: str, target: Path, sha256: str) -> str | None:
        """Write the content to a file if it has this digest; return the digest that it has, None for no such object.

        The file is written whole or not at all, and the content is never in memory as a whole.

        Raises:
            StoreFull, StoreAccessError, StoreError: the file cannot be written.
        """
        here = _local(target)

        def attempt() -> str:
            digest = hashlib.sha256()
            temporary = here._call(lambda: open_temporary(target))
            try:

                def take(piece: bytes) -> None:
                    digest.update(piece)
                    here._call(lambda: temporary.write(piece))

                self.backend.stream(path, take)
                here._call(temporary.close)
                if digest.hexdigest() == sha256:
                    here._call(lambda: Path(temporary.name).replace(target))
                return digest.hexdigest()
            finally:
                with suppress(OSError):  # a full disk has been reported
                    temporary.close()
                Path(temporary.name).unlink(missing_ok=True)

        return self._find(attempt)

    def write(self, path: str, source: bytes | Path) -> None:
        """Store `source` whatever was there; every reader sees the old content or the new, whole."""
        self._call(lambda: self.backend.write(path, source))

    def create(self, path: str, data: bytes) -> str | None:
        """Store `data` where nothing is and return its token; None when something is there."""
        return self._call(lambda: self.backend.create(path, data))

    def replace(self, path: str, data: bytes, token: str) -> str | None:
        """Store `data` where the content of `token` is; return the new token, None if it is gone. See `require`."""
        self.require(token)
        return self._call(lambda: self.backend.replace(path, data, token))

    def remove(self, path: str, token: str) -> bool:
        """Remove the content of `token`; False if it is not there. See `require`."""
        self.require(token)
        return self._call(lambda: self.backend.remove(path, token))

    def require(self, token: str) -> None:
        """Raise StoreAccessError for an empty token: the place cannot compare and swap."""
        if not token:
            raise StoreAccessError(
                f"{self.where} answers without an ETag, which tells whether an object changed since it was read; "
                "use another server, or have the proxy before it pass the header ETag on"
            )

    def entries(self, folder: str, start: str = "") -> dict[str, Entry]:
        """Return every object below `folder` by path, sorted; with `start` those whose path in it begins so."""
        return dict(sorted(self._call(lambda: self.backend.entries(folder, start)).items()))

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of every object below `folder`, by path, sorted."""
        return {path: entry.size for path, entry in self.entries(folder).items()}

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders that lie in `folder`, sorted."""
        return self._call(lambda: self.backend.folders(folder))

    def touch(self, path: str) -> bool:
        """Make the object one that was written now, its content unchanged; False when nothing is there."""
        return self._call(lambda: self.backend.touch(path))

    def delete(self, paths: Sequence[str]) -> None:
        """Remove the objects, whatever they hold; what is not there is passed over.

        It is tried once: before another try, the caller must make sure that no writer relies on them by now.
        """
        self._call(lambda: self.backend.delete(paths), ())

    def unfinished(self) -> dict[str, Entry]:
        """Return what writers began and never ended, by a name for `discard`."""
        return self._call(self.backend.unfinished)

    def discard(self, unfinished: str) -> None:
        """Remove one of these."""
        self._call(lambda: self.backend.discard(unfinished))

    def write_once(self, path: str, data: bytes, accept: Callable[[bytes], bool]) -> bytes:
        """Store `data` unless an acceptable content is there, and return the content that is there now.

        Of any number of writers at once exactly one wins and all return its content; a content that `accept`
        refuses (torn, invalid) is replaced.

        Raises:
            StoreError: the place says by turns that something is there and that nothing is.
        """
        for _ in range(WRITE_ONCE_ATTEMPTS):
            if self.create(path, data) is not None:
                return data
            versioned = self.versioned(path)
            if versioned is not None:
                if accept(versioned[0]):
                    return versioned[0]
                if self.replace(path, data, versioned[1]) is not None:
                    return data
        raise StoreError(f"{self.url}/{path} keeps changing; does this server support conditional writes?")

    def map(self, call: Callable[[str], T], paths: Iterable[str]) -> list[T]:
        """Return `[call(path), ...]`, several at a time where the backend gains from it."""
        paths = list(paths)
        if self.backend.parallel == 1 or len(paths) < 2:
            return [call(path) for path in paths]
        with ThreadPoolExecutor(self.backend.parallel, thread_name_prefix="memmcl-store") as pool:
            return list(pool.map(call, paths))

    def _find(self, call: Callable[[], T]) -> T | None:
        """Return `call()`, None where there is no such object."""

        def attempt() -> T | None:
            try:
                return call()
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise
                return None

        return self._call(attempt)

    def _call(self, call: Callable[[], T], pauses: tuple[float, ...] | None = None) -> T:
        """Return `call()`; try again after failures that may pass by themselves."""
        pauses = RETRY_SECONDS if pauses is None else pauses
        for pause in (*pauses, None):
            try:
                return call()
            except Exception as error:
                if pause is None or not may_pass(error):
                    translated = translate(error, self.where)
                    if translated is None:
                        raise
                    raise translated from None  # the library's text may name the key
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


def write_file(target: Path, data: bytes) -> None:
    """Write a file outside the store, whole or not at all. Raises StoreError, or ConfigError for a refused place."""
    allowed.require(str(target))
    _local(target)._call(lambda: replace_file(target, data))


def _local(file: Path) -> Objects:
    """Return the folder of a file outside the store, whose failures raise what the store's raise."""
    return Objects(LocalBackend(file.parent), str(file.parent))


def normalise(url: str) -> str:
    """Return `url` absolute, without a slash at its end. Raises ConfigError where no store can lie there."""
    scheme, rest = scheme_of(url), url.removeprefix(f"{scheme_of(url)}://")
    if not rest.strip("/") and not (scheme == "file" and rest):
        raise ConfigError(f"the store's URL {shown(url)} names no place; write file:///directory or s3://bucket/folder")
    if scheme == "file":
        return f"file://{Path(rest).expanduser().resolve()}"
    if scheme not in {"s3", "memory"}:
        raise ConfigError(f"a store cannot lie at {brief(scheme)}://; use a directory, s3:// or memory://")
    if "@" in rest.partition("/")[0]:
        raise ConfigError(
            "the store's URL holds credentials; take them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return f"{scheme}://{refuse_secret(url).removeprefix(f'{scheme}://').strip('/')}"


def open_objects(url: str, endpoint_url: str | None = None, region: str | None = None) -> Objects:
    """Return the objects below a URL that `normalise` made; touches neither disk nor network.

    Raises:
        ConfigError: `endpoint_url` is no http(s) address, or holds credentials; or a place that may not be opened.
        StoreAccessError: the package that fsspec needs for this scheme is not installed.
    """
    import fsspec

    allowed.require(url)
    if url.startswith("file://"):
        return Objects(LocalBackend(Path(url.removeprefix("file://"))), url)
    if url.startswith("memory://"):
        return Objects(MemoryBackend(*fsspec.url_to_fs(url)), url)
    if endpoint_url is not None:
        parts = urlsplit(endpoint_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
            raise ConfigError("the store's endpoint must look like https://host:port, without credentials")
        allowed.require_endpoint(endpoint_url)
    config = {"connect_timeout": 5, "read_timeout": 60, "retries": {"total_max_attempts": 1}}
    options = {
        "endpoint_url": endpoint_url,
        "client_kwargs": {"region_name": region} if region else {},
        "config_kwargs": config,
        "use_listings_cache": False,  # others write too
        "skip_instance_cache": True,  # the credentials of the environment as it is now
    }
    try:
        fs, root = fsspec.url_to_fs(url, **options)
    except ImportError as error:
        raise StoreAccessError(f"{url} needs the package s3fs: pip install s3fs") from error
    fs.retries = 1  # `Objects` tries again, and the library below does not on top of it
    return Objects(S3Backend(fs, root), url, endpoint_url)
