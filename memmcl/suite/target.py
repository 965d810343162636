"""Where downloaded files go: a directory, or a folder that fsspec can write; each file whole or not at all.

This is a plain folder that other programs read. The artifact store, with its manifests, is `memmcl.store`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from memmcl.errors import DataError, StoreAccessError, StoreError, StoreFull, UsageError, shown
from memmcl.files.failures import FULL, NO_CREDENTIALS, causes_of, code_of, is_foreign, names_of, replace_file
from memmcl.files.folder import ABANDONED
from memmcl.files.places import is_local, open_place, protocols_of


@dataclass(frozen=True)
class Target:
    """A folder for files by relative path. `shown` is its name in messages and settings; `local` for a directory."""

    fs: Any
    root: str
    shown: str
    local: bool

    def read(self, path: str) -> bytes | None:
        """Return the content, None if there is no such file. Raises StoreAccessError if it cannot be read."""
        with self._translated():
            try:
                return bytes(self.fs.cat_file(f"{self.root}/{path}"))
            except FileNotFoundError as error:
                if code_of(error) == "NoSuchBucket":
                    raise
                return None

    def write(self, path: str, data: bytes) -> None:
        """Store the content, whole or not at all. Raises StoreAccessError or StoreFull if it cannot."""
        with self._translated():
            if self.local:
                replace_file(Path(self.root, path), data)
                return
            whole = f"{self.root}/{path}"
            if "s3" not in protocols_of(self.fs):  # a bucket has no folders, and s3fs would try to make the bucket
                self.fs.makedirs(whole.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(whole, data)

    def remove(self, path: str) -> None:
        """Remove a file if it is there. Raises StoreAccessError if that fails."""
        with self._translated():
            if self.local:
                Path(self.root, path).unlink(missing_ok=True)
            elif self.read(path) is not None:
                self.fs.rm_file(f"{self.root}/{path}")

    def prepare(self, paths: Iterable[str]) -> None:
        """Make a missing directory; remove what killed writers of `paths` left. Raises StoreAccessError, StoreFull."""
        if not self.local:
            return
        oldest = time.time() - ABANDONED
        with self._translated():
            Path(self.root).mkdir(parents=True, exist_ok=True)
            for whole in (Path(self.root, path) for path in paths):
                for temporary in whole.parent.glob(f".{whole.name}.*.part"):
                    if temporary.stat().st_mtime < oldest:
                        temporary.unlink(missing_ok=True)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._translate(error) from None  # a library's text may name the key

    def _translate(self, error: Exception) -> Exception:
        """Return what to raise for an exception of the disk or of an S3 client; any other exception as it is."""
        if isinstance(error, StoreError) or not any(
            isinstance(step, OSError) or is_foreign(step) for step in causes_of(error)
        ):
            return error
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL:
            return StoreFull(f"no space left in {self.shown}; free space and run the same command again to go on")
        if names_of(error) & NO_CREDENTIALS:
            return StoreAccessError(f"no credentials for {self.shown}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if isinstance(error, FileNotFoundError):
            return StoreAccessError(
                f"{self.shown} is not there and cannot be made; create the folder or bucket, or correct the address"
            )
        if isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)):
            where = error.filename or self.shown
            return StoreAccessError(f"{where} is in the way: a file where a folder belongs, or a folder for a file")
        if isinstance(error, PermissionError):
            return StoreAccessError(f"no permission for {self.shown}; correct its permissions, or the credentials")
        detail = error.strerror if isinstance(error, OSError) and error.errno is not None else None
        return StoreAccessError(
            f"{self.shown} cannot be used ({detail or type(error).__name__}); check that it can be reached, then run "
            "the same command again"
        )


def open_target(url: str, storage: Mapping[str, Any]) -> Target:
    """Return the folder that a path or URL names; touches neither disk nor network.

    storage: fsspec options for an s3:// URL.

    Raises:
        UsageError: no place, an unknown scheme, or a URL with credentials or a query (the message hides them).
        ConfigError: a place that may not be written to.
    """
    scheme, separator, rest = url.partition("://")
    if separator and ("@" in urlsplit(url).netloc or "?" in rest):
        raise UsageError(
            f"the {scheme}:// address to write to holds credentials or a query; take them out, credentials come from "
            "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    if not (rest if separator else url).strip("/ ") and url != "/":
        raise UsageError(
            f"{shown(url)} names no place to write to; give a directory, or a URL such as s3://bucket/folder"
        )
    patience = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60}}
    try:
        fs, root = open_place(url, {**patience, **storage})
    except DataError as error:
        raise UsageError(
            f"cannot write to {scheme}:// addresses; give a directory, or a URL such as s3://bucket/folder"
        ) from error
    if is_local(fs):
        return Target(fs, root, root, local=True)
    return Target(fs, root.rstrip("/"), url.rstrip("/"), local=False)
