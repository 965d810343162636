"""What may be opened: the places that a user names, against schemes and against the prefixes of MEMMCL_ALLOWED_URLS.

Everything that is read or written because a configuration, a form or a command names it is checked here: its name, the
target of a link, and each address that a web server redirects to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from memmcl.errors import ConfigError
from memmcl.text import visible
from memmcl.urls import SCHEMES, public, scheme_of

VARIABLE = "MEMMCL_ALLOWED_URLS"
_DEFAULT_PORTS = {"https": 443, "http": 80}
_WEB = tuple(_DEFAULT_PORTS)


@dataclass(frozen=True)
class _Place:
    """A place in the one form that two of them are compared in. name: for messages."""

    scheme: str
    host: str
    path: tuple[str, ...]
    name: str

    def below(self, prefix: _Place) -> bool:
        """Return whether it is `prefix` or lies below it, by whole names of folders."""
        if self.scheme != prefix.scheme or prefix.host not in ("", self.host):
            return False
        return self.path[: len(prefix.path)] == prefix.path


def require(place: str, schemes: tuple[str, ...] = SCHEMES) -> None:
    """Refuse a path or URL that may not be opened. Of a local path all links are followed.

    Raises:
        ConfigError: another scheme than `schemes`, one protocol chained to another, a user in front of the host,
            control characters; or nothing that $MEMMCL_ALLOWED_URLS allows.
    """
    asked, prefixes = _parse(place, schemes), _prefixes()
    if prefixes is not None and not any(asked.below(prefix) for prefix in prefixes):
        raise ConfigError(
            f"{asked.name} may not be opened: {VARIABLE} allows {_listed(prefixes)}; name a place below that, or have "
            "the variable changed where this process is started"
        )


def require_files(folder: Path) -> None:
    """Raise ConfigError for a local folder that may not be read, or holds a link to what may not."""
    require(str(folder))
    if VARIABLE in os.environ:
        for path in folder.rglob("*"):
            require(str(path))


def require_hub(name: str, kind: str = "models") -> None:
    """Raise ConfigError for a model, an adapter or a data set (kind: "datasets") of the hub, hf://ORG/NAME."""
    require(f"hf://{'datasets/' if kind == 'datasets' else ''}{name}", ("hf",))


def require_endpoint(url: str) -> None:
    """Raise ConfigError for the address of an S3 server; http needs a prefix that allows it."""
    require(url, _WEB)


async def follow(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
    """Check each address that a web client (aiohttp, as its middleware) is about to ask, redirects included."""
    require(str(request.url), ("https",))
    return await handler(request)


def described() -> str:
    """Return what may be opened, as a line for logs."""
    prefixes = _prefixes()
    if prefixes is None:
        return (
            f"{VARIABLE} is not set: whoever sets a run's parameters may name any file, bucket and address that this "
            "process can read"
        )
    return f"{VARIABLE} allows {_listed(prefixes)}"


def local_path(place: str) -> str:
    """Return the absolute path of a path or a file:// URL; links are not followed."""
    path = Path(place.removeprefix("file://")).expanduser()
    return os.path.normpath(Path.cwd() / path)


def _listed(prefixes: tuple[_Place, ...]) -> str:
    return f"only {', '.join(prefix.name for prefix in prefixes)}" if prefixes else "nothing"


def _prefixes() -> tuple[_Place, ...] | None:
    """Return what the variable allows, None if it is not set. Raises ConfigError if one is no absolute path or URL."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    places = []
    for prefix in filter(None, re.split(r"[,\s]+", text)):
        try:
            if scheme_of(prefix) == "file" and not prefix.removeprefix("file://").startswith(("/", "~")):
                raise ConfigError(f"expected an absolute path or a URL, got {public(prefix)}")
            places.append(_parse(prefix, (*SCHEMES, "http"), whole=True))
        except ConfigError as error:
            raise ConfigError(f"{VARIABLE}: {error}") from error
    return tuple(places)


def _parse(place: str, schemes: tuple[str, ...], *, whole: bool = False) -> _Place:
    """Return the form of a place that is compared. whole: a scheme alone, as `hf://`, means all of it."""
    scheme, rest = scheme_of(place), place.partition("://")[2]
    name = public(place)
    if scheme not in schemes:
        known = ", ".join(one for one in schemes if one != "memory")
        raise ConfigError(f"cannot open {name}: expected a path or a URL of {known}")
    if visible(place) != place or "\n" in place or "\t" in place:
        raise ConfigError(f"cannot open {name}: control characters have no place in a path or URL")
    if "::" in place and "://" in place:
        raise ConfigError(f"cannot open {name}: one protocol may not be chained to another by ::")
    if scheme == "file":
        named = local_path(place)
        path = os.path.realpath(named)
        return _Place("file", "", _split(path[1:]), path if path == named or whole else f"{named} (a link to {path})")
    if whole and not rest:
        return _Place(scheme, "", (), place)
    return _parse_url(place, scheme, rest, name)


def _parse_url(place: str, scheme: str, rest: str, name: str) -> _Place:
    if scheme == "hf":
        path = tuple(segment.partition("@")[0] for segment in _split(rest))  # without the revision
        return _Place(scheme, "", _plain(path, name), name)
    if scheme == "memory":
        return _Place(scheme, "", _plain(_split(rest.lstrip("/")), name), name)
    if scheme not in _WEB:
        host, _, path_text = rest.partition("/")
        if not host or "@" in host:
            raise ConfigError(f"cannot open {name}: expected a bucket and nothing else behind {scheme}://")
        return _Place(scheme, host, _plain(_split(path_text), name), name)
    try:
        parts = urlsplit(place)
        port = parts.port or _DEFAULT_PORTS[scheme]
    except ValueError as error:
        raise ConfigError(f"cannot open {name}: no such address can be") from error
    host = (parts.hostname or "").rstrip(".")
    if not host or "@" in parts.netloc or not host.isascii() or set("\\% ") & set(parts.netloc):
        raise ConfigError(f"cannot open {name}: expected a host, without a user, behind {scheme}://")
    path = tuple(map(unquote, _split(parts.path.removeprefix("/"))))
    _plain(tuple(map(unquote, path)), name)  # what is escaped twice some servers read twice
    return _Place(scheme, f"{host}:{port}", _plain(path, name), name)


def _split(path: str) -> tuple[str, ...]:
    path = path.rstrip("/")
    return tuple(path.split("/")) if path else ()


def _plain(path: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Return `path`. Raises ConfigError for . and .. and for slashes in a name, which servers read as other folders."""
    if any(folder in (".", "..") or set("/\\") & set(folder) for folder in path):
        raise ConfigError(f"cannot open {name}: write the address without . and .. and escaped slashes")
    return path
