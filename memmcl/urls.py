"""Places that a user names, as text: their scheme, what is secret in them, and how messages show them.

Nothing here touches disk or network; what may be opened is decided by `memmcl.files.allowed`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from memmcl.errors import VALUE, ConfigError
from memmcl.text import visible

SCHEMES = ("file", "s3", "gs", "az", "https", "hf", "memory")
"""Those of places that rows, texts and adapters are read from; a path without one is a file."""

SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING",
    "RAY_AUTH_TOKEN",
)
"""Variables of the environment whose values are never shown."""

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_HIDDEN = "***"
_SHOWN = 200  # no more characters of a place are shown
_WORDS = (
    *("signature", "sig$", "token", "secret", "passw", "passphrase", "pwd", "credential", "authoriz", "auth$", "jwt"),
    *("bearer", "api[-_]?key", "access[-_]?key", "accessid", "key[-_]?id", "pair-id"),
)
_WHOLE = ("key", "sas", "session", "code", "pass")
_SECRET_NAME = re.compile(rf"{'|'.join(_WORDS)}|(?:^|[-_.])(?:{'|'.join(_WHOLE)})$", re.IGNORECASE)
_PARAMETER = re.compile(r"(?<=[?&;#])([^=&;?#\s'\"<>]{1,200})=([^&;#\s'\"<>]*)")
_USER = re.compile(r"(?<=://)[^/?#\s'\"<>]*@")


def scheme_of(place: str) -> str:
    """Return the scheme of a URL, "file" for a path."""
    match = _SCHEME.match(place)
    return match[1] if match else "file"


def public(url: str) -> str:
    """Return `url` as messages may show it: without user, password, query and fragment, and not too long."""
    if "://" in url:
        try:
            parts = urlsplit(url)
        except ValueError:
            return f"{url.partition('://')[0][:20]}://..."
        user, at, host = parts.netloc.rpartition("@")
        url = f"{parts.scheme}://{user + at if parts.scheme == 'hf' else ''}{host}{parts.path}"
    return visible(url if len(url) <= _SHOWN else url[: _SHOWN - 3] + "...")


def secret_in(place: object) -> str | None:
    """Return what in a URL is a credential, in words that do not repeat it; None where nothing is."""
    if not isinstance(place, str) or "://" not in place:
        return None
    scheme, _, rest = place.partition("://")
    user, at, _ = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    if scheme != "hf" and at and user != _HIDDEN:
        return "user or password"
    for name, value in _PARAMETER.findall(rest):
        if value != _HIDDEN and _SECRET_NAME.search(unquote(name)):
            return f"the parameter {visible(unquote(name))[:40]}"
    return None


def refuse_secret(place: str) -> str:
    """Return `place`, which will be stored and shown. Raises ConfigError if it is a URL that holds a credential."""
    secret = secret_in(place)
    if secret is not None:
        raise ConfigError(
            f"a URL with {secret} in it would be stored: give credentials in the environment, or fetch the file first"
        )
    return place


def redact(text: str) -> str:
    """Return `text`, as a library wrote it, without what is secret in its URLs, and without the environment's keys."""
    text = _USER.sub(_without_user, text)
    text = _PARAMETER.sub(_without_value, text)
    for variable in SECRETS:
        value = os.environ.get(variable, "")
        if len(value) >= 6:  # shorter ones are words of their own, as `minio` and `test`
            text = text.replace(value, _HIDDEN)
    return text


def first_line(error: BaseException) -> str:
    """Return the first line of what a library said, redacted and no longer than a value, or the name of its error."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])[:VALUE]


def _without_user(match: re.Match[str]) -> str:
    at_hub = match.string.endswith("hf://", 0, match.start())  # a revision follows it
    return match[0] if at_hub else f"{_HIDDEN}@"


def _without_value(match: re.Match[str]) -> str:
    return f"{match[1]}={_HIDDEN}" if _SECRET_NAME.search(unquote(match[1])) else match[0]


def schema_pattern() -> str:
    """Return `refuse_secret` as a regular expression of JSON Schema, so that a Prefect server refuses such parameters.

    It knows no case-insensitive matching; a name with a percent sign in it is refused whatever it means.
    """
    words = "|".join(_either_case(word).replace("$", "(?==)") for word in _WORDS)
    whole = "|".join(_either_case(word) for word in _WHOLE)
    any_sign = "[^=&;?#]{0,99}"  # bounded, so that no text takes long
    name = rf"[?&;#](?:{any_sign}(?:{words}|%){any_sign}|(?:{any_sign}[-_.])?(?:{whole}))="
    return rf"^(?!(?!hf:)[^/]*://[^/?#]*@)(?![^/]*://.*{name})"


def _either_case(word: str) -> str:
    return "".join(f"[{sign}{sign.upper()}]" if sign.isalpha() else sign for sign in word)


def clean(text: str) -> str:
    """Return text of whatever origin as it may be shown: `redact`, and control characters spelled out."""
    return visible(redact(text))


def redacted(value: Any) -> Any:
    """Return a tree of plain values with `redact` applied to its texts: what an older version stored is read so."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(inner) for key, inner in value.items()}
    return [redacted(inner) for inner in value] if isinstance(value, list | tuple) else value
