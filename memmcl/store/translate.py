"""What a failure of a disk or of an S3 client means: whether it may pass by itself, and its `StoreError`."""

from __future__ import annotations

import errno
import os

from memmcl.errors import StoreAccessError, StoreError, StoreFull, brief
from memmcl.files.failures import FULL, NO_CREDENTIALS, code_of, is_foreign, names_of, status_of
from memmcl.urls import redact

UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "gaierror"}
UNREACHABLE |= {"ReadTimeoutError", "FSTimeoutError", "TimeoutError", "ConnectionRefusedError"}
BROKEN = {"ConnectionClosedError", "HTTPClientError", "ServerDisconnectedError", "ClientOSError"}
BROKEN |= {"ClientPayloadError", "ResponseParserError", "IncompleteReadError", "ResponseStreamingError"}
BROKEN |= {"ConnectionResetError", "ConnectionAbortedError", "BrokenPipeError"}
DAMAGED = {"FlexibleChecksumError"}  # the client's own: an answer whose checksum is another
BUSY_CODES = {"SlowDown", "RequestTimeout", "ConditionalRequestConflict", "OperationAborted"}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


def may_pass(error: Exception) -> bool:
    """Return whether another attempt may succeed."""
    status = status_of(error)
    busy = status == 429 or (status is not None and status >= 500 and status != 507)
    return busy or code_of(error) in BUSY_CODES or bool(names_of(error) & (UNREACHABLE | BROKEN | DAMAGED))


def translate(error: Exception, where: str) -> StoreError | None:
    """Return the StoreError to raise for a backend's exception; None for a bug of memmcl.

    where: what messages call the store.
    """
    if isinstance(error, StoreError) or not (isinstance(error, OSError) or is_foreign(error)):
        return None
    names, code, status = names_of(error), code_of(error), status_of(error)
    number, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
    place = redact(str(file or where))
    if number in FULL or status == 507:
        reason = f" ({os.strerror(number)})" if number in FULL - {errno.ENOSPC} else ""
        return StoreFull(
            f"no space left in {where}{reason}; finished work is kept; free space and run the same command again"
        )
    if code == "NoSuchBucket":
        return StoreAccessError(f"no bucket for {where}; create the bucket or correct the store's URL")
    if names & NO_CREDENTIALS:
        return StoreAccessError(f"no credentials for {where}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if status in {401, 403} or (isinstance(error, PermissionError) and code):
        return StoreAccessError(
            f"{where} refused access ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "and what they may do with this bucket"
        )
    if number in NO_PERMISSION:
        return StoreAccessError(f"no permission for {place}; change its permissions or choose another place")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return StoreAccessError(f"{place} is a file, not a directory; choose another place")
    if names & (UNREACHABLE | BROKEN):
        return StoreAccessError(
            f"cannot reach {where}; check that the server runs and that the endpoint is right, then run "
            "the same command again"
        )
    if names & DAMAGED:
        return StoreError(
            f"answers of {where} arrive damaged: their checksums do not match; run the same command again, and "
            "have the connection checked if it happens again"
        )
    if status is not None and status >= 500:
        return StoreError(f"{where} answered {code} (HTTP {status}) repeatedly; run the same command again later")
    reason = brief(" ".join(redact(str(error)).split()))
    return StoreError(f"{where} failed: {reason}; finished work is kept; run the same command again")
