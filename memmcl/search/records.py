"""Records of a search as they lie in the store: how far it is, and what it spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def progress_of(records: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far a search with these records is: how many, the best, and what was spent; ready to be shown."""
    whole = {
        index: record
        for index, record in records.items()
        if record["fitness"] is not None and not record.get("stopped")
    }
    best = min(whole, key=lambda index: (-whole[index]["fitness"], index), default=None)
    return {
        "candidates": len(records),
        "stopped": sum(bool(record.get("stopped")) for record in records.values()),
        "failed": sum(record["fitness"] is None for record in records.values()),
        "rows": sum(record.get("rows", 0) for record in records.values()),
        "best": best,
        "fitness": whole[best]["fitness"] if best is not None else None,
        "values": whole[best]["values"] if best is not None else {},
        "seconds": {
            phase: sum(record["seconds"].get(phase, 0.0) for record in records.values())
            for phase in ("merge", "evaluate", "wait")
        },
    }
