"""Small stores for tests of garbage collection: runs that share an expert, and what lies about beside them."""

from __future__ import annotations

import hashlib
import time
from typing import Any

from memmcl.store import ArtifactRef, Manifest, Policy, Reign, RemovalPlan, Store, collect, promote, read_champions
from memmcl.store.marks import MARGIN, WEEK

DAY = 86400.0
LATER = WEEK + 2 * MARGIN
"""Seconds from now when whatever is written now is old."""


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def artifact(store: Store, kind: str, name: str, *inputs: Manifest, content: bytes | None = None) -> Manifest:
    """Publish an artifact; its content is its name where none is given."""
    return store.publish(
        kind,
        key_of(f"{kind} {name}"),
        name=name,
        files={"file": content or f"{kind} {name}".encode()},
        inputs=[one.ref for one in inputs],
    )


def finished_run(store: Store, name: str, *shared: Manifest) -> Manifest:
    """Publish a run with an expert of its own, its journal, and the records of its search."""
    expert = artifact(store, "expert", name)
    search = artifact(store, "search", name, expert, *shared)
    journal(store, key_of(f"run {name}"), name)
    return artifact(store, "run", name, expert, search, *shared)


def journal(store: Store, run_id: str, search: str, records: int = 2) -> None:
    """Note a run, finished or not, that has begun a search."""
    store.append(f"runs/{run_id}", 0, {"config": {}, "started": "2026-01-01T00:00:00+00:00"})
    store.append(f"runs/{run_id}", 1, {"name": search, "key": key_of(search)})
    for index in range(records):
        store.append(f"searches/{key_of(search)}", index, {"fitness": index})


def crown(store: Store, *runs: Manifest) -> None:
    for run in runs:
        reign = Reign(run_id=run.key, name="run", since="2026-01-01T00:00:00+00:00", how="promotion", why="better")
        promote(store, read_champions(store, "champion"), reign)


def gone_after(store: Store, *, later: float = 0.0, **policy: Any) -> RemovalPlan:
    """Collect for good, as if it were `later` seconds from now."""
    return collect(store, Policy(**policy), delete=True, now=time.time() + later)


def logs(store: Store, folder: str) -> list[str]:
    """Return the names of the logs in a folder that hold records; an S3 server may go on naming empty ones."""
    return sorted({path.split("/")[2] for path in store.objects.sizes(f"logs/{folder}")})


def names(store: Store, kind: str) -> set[str]:
    return {manifest.name for manifest in store.list(kind)}


def is_whole(store: Store) -> bool:
    """Return whether every artifact and all that it names is there and matches its digests."""
    refs: list[ArtifactRef] = [ref for manifest in store.list() for ref in (manifest.ref, *manifest.inputs)]
    return all(store.find(ref.kind, ref.key) is not None for ref in refs) and not store.verify().problems
