"""Every JSON object of the store checks itself: its text stands behind a digest of that text and of its own path.

    ["3f9a...64 hex digits...",
    {
      "kind": "expert",
      ...
    }
    ]

The file is one JSON array, so that any tool reads it. Whatever bit of it changes, it is no longer what `seal` wrote;
nor does it become an object without a seal, as earlier versions wrote them and as they are still read: those begin
with a brace, and an array whose bracket turned into one is no JSON. An object that was copied to another path counts
as damaged too.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

_HEAD = len(f'["{"0" * 64}",\n')
_TAIL = b"\n]\n"


def seal(path: str, document: Any, indent: int | None = 2) -> bytes:
    """Return `document` as the bytes that are stored at `path`: UTF-8 JSON, indented or not, behind its digest.

    Raises TypeError for what JSON has no form for, ValueError for NaN or an infinity; write None instead.
    """
    return _envelope(path, json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False).encode())


def open_text(path: str, data: bytes) -> bytes | None:
    """Return the JSON text that was sealed at `path`; None when `data` is torn, changed, or belongs elsewhere.

    The text of an object without a seal is returned as it is.
    """
    if data.startswith(b"{"):
        return data
    text = data[_HEAD : -len(_TAIL)]
    return text if data == _envelope(path, text) else None


def unseal(path: str, data: bytes) -> dict[str, Any] | None:
    """Return the JSON object that was sealed at `path`; None when it is damaged, or anything but an object."""
    try:
        value = json.loads(open_text(path, data) or b"null")
    except (ValueError, RecursionError):  # ValueError: also UnicodeDecodeError
        return None
    return value if isinstance(value, dict) else None


def is_sealed(data: bytes) -> bool:
    """Return whether `data` begins as a sealed object does; what earlier versions wrote does not."""
    return data.startswith(b"[")


def _envelope(path: str, text: bytes) -> bytes:
    digest = hashlib.sha256(path.encode() + b"\n" + text).hexdigest()
    return f'["{digest}",\n'.encode() + text + _TAIL
