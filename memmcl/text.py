"""Untrusted text, made safe to show: control characters are spelled out, so that they do nothing."""

from __future__ import annotations

import re

# C0 and C1 but for tab and line feed; marks that turn or hide text (Unicode TR 36, 9); line separators; surrogates.
_ACTIVE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return `text` with each character that a terminal would obey, or that turns text around, as `\u001b`.

    Tabs and line feeds stay. What is visible already stays as it is, and JSON keeps its meaning.
    """
    return _ACTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def one_line(text: str) -> str:
    """Return `text` on one line, its white space and control characters harmless."""
    return visible(" ".join(text.split()))


def span(seconds: float) -> str:
    """Return how long something takes, for a person: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
