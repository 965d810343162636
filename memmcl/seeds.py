"""Seeds derived by name, so that nothing depends on the order in which work happens."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def derive(seed: int, *names: str | int) -> int:
    """Return the 63-bit seed that belongs to `names` under the root `seed`.

    The same arguments give the same seed on every machine and in every process; `derive(s, "a", 1)` and
    `derive(s, "a1")` differ. Example: `derive(seed, "stage1", group, generation, i)`.
    """
    return int(digest([seed, *names])[:16], 16) >> 1


def digest(value: Any) -> str:
    """Return the sha256 (hex) of `value`'s canonical JSON: sorted keys, no spaces, UTF-8.

    Raises TypeError for what JSON has no form for, ValueError for NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
