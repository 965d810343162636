"""What a run, a search, a retrain and its readers do to a store, in small: named steps, always in the same order.

Each step returns what a user would see, as JSON without times, so that an undisturbed store says what a disturbed one
must come to. Each can be repeated when it failed: it reads what is there before it changes anything.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from memmcl.errors import Conflict
from memmcl.seeds import digest
from memmcl.store import ArtifactRef, Lease, Reign, StageSettings, Store, promote, read_champions, rollback
from memmcl.store.index import summaries

PART = 5 << 20
"""Bytes of a part of an upload: the least that S3 allows, where memmcl itself takes 50 MB."""
IN_PARTS = 2 * PART + 7
"""Bytes of a file that goes to S3 in parts."""
LOG = "searches/" + digest("workload")


@dataclass(frozen=True)
class Work:
    """The store that a step works on, the seed that its contents come from, and a folder for its files.

    large: bytes of the expert's weights.
    """

    store: Store
    seed: int
    scratch: Path
    large: int = 300_000

    def content(self, name: str, size: int) -> bytes:
        """Return the bytes that are called `name`."""
        return _content(f"{self.seed} {name}", size)

    def key(self, name: str) -> str:
        """Return the key of the artifact that is called `name`."""
        return digest([self.seed, name])


@lru_cache(8)
def _content(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


Step = Callable[[Work], Any]


def publish_rows(work: Work) -> Any:
    """Publish the rows of two subtasks."""
    return [_publish(work, "split", name, {"rows.parquet": work.content(name, 900)}) for name in ("irony", "emotion")]


def train(work: Work) -> Any:
    """Save a checkpoint, replace it, go on from it, publish the expert with its large file, drop the checkpoint."""
    store, key = work.store, work.key("expert")
    for step in (2, 4):
        store.save_checkpoint(key, b"%d " % step + work.content("state", 3000))
    left = store.read_checkpoint(key)
    large = work.scratch / "adapter_model.safetensors"
    large.write_bytes(work.content("weights", work.large))
    files = {
        "adapter_model.safetensors": large,
        "adapter_config.json": b'{"r": 4}',
        "standalone/adapter_config.json": b'{"r": 8}',
    }
    split = ArtifactRef(kind="split", key=work.key("irony"), name="irony")
    published = _publish(work, "expert", "expert", files, inputs=[split])
    store.drop_checkpoint(key)
    return [_hash(left), published]


def read_expert(work: Work) -> Any:
    """Find the expert, read one of its files, and fetch all of them."""
    manifest = work.store.find("expert", work.key("expert"))
    if manifest is None:
        return None
    folder = Path(tempfile.mkdtemp(dir=work.scratch))
    work.store.fetch(manifest, folder)
    fetched = {path.relative_to(folder).as_posix(): _hash(path.read_bytes()) for path in folder.rglob("*.*")}
    return [_hash(work.store.read(manifest.ref, "adapter_model.safetensors")), fetched]


def search(work: Work) -> Any:
    """Tell three candidates, one of them twice."""
    told = [{"genome": [n / 7, -n], "fitness": n / 3} for n in range(3)]
    return [work.store.append(LOG, index, told[index]) for index in (0, 1, 2, 1)]


def resume(work: Work) -> Any:
    """Read what was told."""
    return {str(index): record for index, record in work.store.records(LOG).items()}


def hold(work: Work) -> Any:
    """Hold the lease of a run: take it, renew it, settle it, release it."""
    with Lease(work.store, work.key("run"), {"flow_run_id": "one"}) as lease:
        lease.update(server="http://127.0.0.1:4200")
        lease.settle()
        lease.check()
    return "held"


def finish(work: Work) -> Any:
    """Publish two runs."""
    return [
        _publish(work, "run", name, {"results.json": b'{"run": "%s"}' % name.encode(), "report.html": b"<html>"})
        for name in ("run", "next run")
    ]


def crown(work: Work) -> Any:
    """Promote the first run, then the second, then roll back; as three people do, who look before they act."""
    history = []
    for number, act in enumerate((_promote("run"), _promote("next run"), _roll_back)):
        champions = read_champions(work.store, "default")
        if len(champions.history) == number:  # not done in an earlier attempt
            act(work)
            champions = read_champions(work.store, "default")
        history.append([[reign.run_id, reign.how] for reign in champions.history[: number + 1]])
    return history


def swap(work: Work) -> Any:
    """Count a pointer up to three by compare-and-swap, and refuse an old token."""
    value, token = work.store.read_pointer("checks/count")
    first = token
    while value is None or value["n"] < 3:
        token = work.store.swap_pointer("checks/count", {"n": (value or {"n": 0})["n"] + 1}, token)
        value, token = work.store.read_pointer("checks/count")
    try:
        work.store.swap_pointer("checks/count", {"n": -1}, None if first != token else "0" * 32)
    except Conflict:
        return work.store.read_pointer("checks/count")[0]
    return "an old token was taken"


def look(work: Work) -> Any:
    """List everything, find everything, verify everything."""
    store = work.store
    listed = [[one.kind, one.key, _blobs(one)] for one in store.list()]
    found = [[kind, name, store.find(kind, work.key(name)) is not None] for kind, name in PUBLISHED]
    verified = store.verify()
    return {
        "listed": sorted(listed),
        "summed up": sorted([one.kind, one.key] for one in summaries(store)),
        "found": found,
        "manifests": verified.manifests,
        "blobs": verified.blobs - verified.unreferenced,
        "problems": [problem.where for problem in verified.problems],
    }


STEPS: dict[str, Step] = {
    step.__name__: step for step in (publish_rows, train, read_expert, search, resume, hold, finish, crown, swap, look)
}
PUBLISHED = (("split", "irony"), ("split", "emotion"), ("expert", "expert"), ("run", "run"), ("run", "next run"))
LISTS = {"resume", "look"}
"""Steps that rest on a listing of names, which nothing but the connection protects."""


def _publish(work: Work, kind: str, name: str, files: dict[str, Any], **more: Any) -> Any:
    settings = StageSettings({"of": name})
    return _blobs(work.store.publish(kind, work.key(name), name=name, files=files, settings=settings, **more))


def _blobs(manifest: Any) -> Any:
    return {file: info.sha256 for file, info in sorted(manifest.blobs.items())}


def _hash(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _promote(name: str) -> Step:
    def act(work: Work) -> None:
        reign = Reign(run_id=work.key(name), name=name, since="2026-01-01", how="promotion", why="better")
        promote(work.store, read_champions(work.store, "default"), reign)

    return act


def _roll_back(work: Work) -> None:
    rollback(work.store, read_champions(work.store, "default"))
