"""Places of data by path or URL: how one is opened, what messages call it, and what its failures mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memmcl.errors import DataError, MemmclError, short
from memmcl.files import allowed
from memmcl.files.failures import NO_CREDENTIALS, is_foreign
from memmcl.urls import public, scheme_of


def open_place(url: str, storage: Mapping[str, Any] | None = None) -> tuple[Any, str]:
    """Return the file system of `url` and the path in it; `storage` is for s3:// alone.

    Raises:
        ConfigError: a place that may not be opened.
        DataError: nothing installed reads such a URL.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    allowed.require(url)
    scheme = scheme_of(url)
    options: dict[str, Any] = {}
    if scheme == "file":
        return LocalFileSystem(), allowed.local_path(url)
    if scheme == "https":
        options = {"client_kwargs": {"middlewares": (allowed.follow,)}}
    if scheme == "s3":
        options = {"use_listings_cache": False, "skip_instance_cache": True, **(storage or {})}
        if options.get("endpoint_url"):
            allowed.require_endpoint(options["endpoint_url"])
    try:
        fs, path = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"cannot open {public(url)}: no installed package reads {scheme}://; install the one that fsspec names"
        ) from error
    return fs, str(path)


def open_file(fs: Any, path: str, **options: Any) -> Any:
    """Open a file that `open_place` or a listing gave. Raises ConfigError where it leads to what may not be opened."""
    allowed.require(_full_name(fs, path))
    return fs.open(path, "rb", **options)


def name_of(fs: Any, path: str) -> str:
    """Return what messages call a file: a path on this machine, otherwise its URL."""
    return public(_full_name(fs, path))


def is_local(fs: Any) -> bool:
    """Return whether `fs` is this machine's disk."""
    return "file" in protocols_of(fs)


def _full_name(fs: Any, path: str) -> str:
    if is_local(fs):
        return path
    return f"az://{path}" if "abfs" in protocols_of(fs) else str(fs.unstrip_protocol(path))


def protocols_of(fs: Any) -> tuple[str, ...]:
    """Return the schemes that `fs` serves."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what a disk, a server or an S3 client raises while `name` is read into a DataError of one line."""
    try:
        yield
    except Exception as error:
        chain = list(_chain(error))
        for step in chain:
            if isinstance(step, MemmclError):  # a web client may have wrapped what refused a redirect
                raise step from None
        if not (isinstance(error, OSError) or any(map(is_foreign, chain))):
            raise
        raise DataError(_explained(public(name), error, chain)) from None  # a library's text may name the key


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explained(name: str, error: BaseException, chain: Iterable[BaseException]) -> str:
    names = {cls.__name__ for step in chain for cls in type(step).__mro__}
    status = next((code for step in chain if isinstance(code := getattr(step, "status", None), int)), None)
    if names & NO_CREDENTIALS:
        return f"no credentials for {name}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"no access to {name}; check the credentials and who may read it"
    if isinstance(error, FileNotFoundError) and (status == 404 or not names & {"ClientError"}):
        return f"there is no {name}; correct the path, or put the file there"
    reason = f"HTTP status {status}" if status else getattr(error, "strerror", None) or type(error).__name__
    return f"cannot read {name} ({short(reason)[1:-1]}); check the address, the network and the server"


def existing_path(name: str) -> Path | None:
    """Return the file or directory of this name on this machine, None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name too long for the disk; ~user for an unknown user
        return None
