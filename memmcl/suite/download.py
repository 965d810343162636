"""One file over HTTP: tried a few times, waited for as the server asks, its digest checked."""

from __future__ import annotations

import hashlib
import math
import random
import threading
import time
from email.utils import parsedate_to_datetime

import httpx

from memmcl.errors import UsageError
from memmcl.files import allowed
from memmcl.urls import public
from memmcl.version import __version__

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between the tries for a file; the server's Retry-After may make a pause longer
LONGEST_PAUSE = 60.0  # a longer Retry-After is cut to this: the next try asks again, and the last one gives up
READ_SECONDS = 15.0
"""How long a server may be silent; Ctrl-C takes effect when a read returns, so this bounds that wait too."""
BODY_SECONDS = 300.0  # how long one body may take, so that a server which trickles cannot hold a download for ever
WRONG_BODIES = 2  # a proxy may have garbled one body; the second wrong one is what the server has
PASSING = {408, 425, 429}  # answers that may pass by themselves, as every 5xx may


class Unavailable(Exception):
    """A file that the server does not give; the text is the reason.

    passing: whether another try may succeed. seconds: how long the server asks to wait before that.
    """

    def __init__(self, reason: str, *, passing: bool = False, seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        self.seconds = seconds


class Stopped(Exception):
    """The caller set `stop`; nothing is wrong with the file."""


def base_of(url: str) -> httpx.URL:
    """Return the address to fetch from. Raises UsageError if it is not http(s), or holds credentials."""
    try:
        base = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise UsageError("the address to fetch from cannot be read; it must look like https://host/folder") from error
    if base.scheme not in {"http", "https"} or not base.host:
        raise UsageError("the address to fetch from must look like https://host/folder")
    if base.userinfo:
        raise UsageError("the address to fetch from holds credentials; take them out, published files need none")
    return base


def shown(base: httpx.URL) -> str:
    """Return the address for messages: without its query, which may hold a token."""
    return public(str(base)).rstrip("/")


def open_client(jobs: int, *, checked: bool = False) -> httpx.Client:
    """Return a client for `jobs` downloads at a time; it honours HTTPS_PROXY and its kin.

    checked: whether each address that is asked, redirects included, must be one that may be opened.

    Raises:
        UsageError: a proxy is set that cannot be used.
    """
    headers = {"User-Agent": f"memmcl/{__version__}", "Accept-Encoding": "identity"}
    limits = httpx.Limits(max_connections=jobs, max_keepalive_connections=jobs)
    try:
        return httpx.Client(
            headers=headers,
            limits=limits,
            timeout=httpx.Timeout(READ_SECONDS, connect=10.0),
            follow_redirects=True,
            event_hooks={"request": [_check] if checked else []},
        )
    except (ValueError, ImportError) as error:
        raise UsageError("the proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names cannot be used") from error


def _check(request: httpx.Request) -> None:
    allowed.require(str(request.url), ("https", "http"))


def download(client: httpx.Client, base: httpx.URL, path: str, sha256: str, size: int, stop: threading.Event) -> bytes:
    """Return the `size` bytes with the digest `sha256` (hex) that lie at `path` below `base`.

    Raises:
        Unavailable: they are not to be had; what the server gave instead is in the text.
        Stopped: `stop` was set meanwhile; pauses end at once, and a body after its next piece.
    """
    url = base.copy_with(path=f"{base.path.rstrip('/')}/{path}")
    wrong = 0
    for tries, pause in enumerate((*PAUSES, None), start=1):
        try:
            data = _body(client, url, size, stop)
            digest = hashlib.sha256(data).hexdigest()
            if digest == sha256:
                return data
            wrong += 1
            got = f"{len(data):,} bytes with sha256 {digest}" if len(data) <= size else "more bytes than that"
            reason = f"expected {size:,} bytes with sha256 {sha256}, got {got}"
            raise Unavailable(reason, passing=wrong < WRONG_BODIES)
        except Unavailable as failure:
            if not failure.passing:
                raise
            if pause is None:
                raise Unavailable(f"{failure}, {tries} times", passing=True) from failure
            # Downloads that failed together should not come back together.
            if stop.wait(max(failure.seconds, pause * random.uniform(0.5, 1.5))):
                break
    raise Stopped


def _body(client: httpx.Client, url: httpx.URL, size: int, stop: threading.Event) -> bytes:
    """Return a whole body; of one that is longer than `size` only enough to see that."""
    if stop.is_set():
        raise Stopped
    deadline = time.monotonic() + BODY_SECONDS
    data = bytearray()
    try:
        with client.stream("GET", url) as response:
            _check_status(response)
            for piece in response.iter_bytes():
                data += piece
                if len(data) > size:
                    return bytes(data)
                if stop.is_set():
                    raise Stopped
                if time.monotonic() > deadline:
                    raise Unavailable(f"no whole body in {BODY_SECONDS:.0f} seconds", passing=True)
            framed = {"content-length", "transfer-encoding"} & set(response.headers)
    except httpx.RequestError as error:
        raise Unavailable(_reason(error), passing=True) from error
    if len(data) < size and not framed:
        raise Unavailable(f"the connection ended after {len(data):,} of {size:,} bytes", passing=True)
    return bytes(data)


def _check_status(response: httpx.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    if status in PASSING or status >= 500:
        seconds = retry_after(response.headers.get("Retry-After"), time.time())
        raise Unavailable(f"HTTP {status}", passing=True, seconds=seconds)
    raise Unavailable("not found (HTTP 404)" if status == 404 else f"refused (HTTP {status})")


def retry_after(value: str | None, now: float) -> float:
    """Return the seconds to wait that a Retry-After header asks for, 0 to LONGEST_PAUSE.

    value: whole seconds or an HTTP date; anything else counts as 0. now: seconds since the epoch.
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_PAUSE) if math.isfinite(seconds) else 0.0


def _reason(error: httpx.RequestError) -> str:
    """Say what happened in words that hold no address: it may have a token in its query."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ConnectError):
        return f"no connection ({' '.join(str(error).split())})"
    if isinstance(error, httpx.ProxyError):
        return "the proxy refused the connection"
    if isinstance(error, (httpx.ReadError, httpx.RemoteProtocolError)):
        return "the connection broke before the whole body was there"
    return f"the answer could not be read ({type(error).__name__})"
