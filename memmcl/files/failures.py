"""What disks and object storage clients raise, taken apart; and a file that is written whole or not at all.

The artifact store, the readers of rows and the download of a benchmark each say in their own words what happened.
"""

from __future__ import annotations

import errno
import uuid
from pathlib import Path
from typing import Any, BinaryIO

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk, quota, limit on the size of a file
LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec"}
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}


def is_foreign(error: BaseException) -> bool:
    """Return whether an object storage client raised it."""
    return type(error).__module__.partition(".")[0] in LIBRARIES


def causes_of(error: BaseException) -> list[BaseException]:
    """Return an exception and those that it was raised from."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__
    return chain


def names_of(error: BaseException) -> set[str]:
    """Return the names of the classes of an exception and of its causes, and of their bases."""
    return {cls.__name__ for step in causes_of(error) for cls in type(step).__mro__}


def code_of(error: BaseException) -> str | None:
    """Return the S3 error code, such as NoSuchBucket, of an exception that an HTTP answer caused."""
    code = _response(error).get("Error", {}).get("Code")
    return None if code is None else str(code)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status of an exception that an S3 server's answer caused."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if status is None else int(status)


def replace_file(target: Path, data: bytes) -> None:
    """Write a file whole or not at all; its directory is made when it is missing."""
    temporary = _temporary(target)
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def open_temporary(target: Path) -> BinaryIO:
    """Open a new file beside `target`, to be moved there when it is whole; its directory is made when it is missing."""
    return _temporary(target).open("wb")


def _temporary(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")


def _response(error: BaseException) -> dict[str, Any]:
    responses = (getattr(step, "response", None) for step in causes_of(error))
    return next((response for response in responses if isinstance(response, dict)), {})
