"""Many kills at random moments of training, of the searches and of the evaluation: always the same bytes."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from e2e_driver import Desk, desk, frozen, runs_of, states

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3500)]
KILLS = 5
Files = dict[str, tuple[int, bytes]]
STAGES = {  # kills begin once something matches the first pattern, and end when the second does
    "training": ("manifests/anchors/*.json", "manifests/search/*.json"),
    "search": ("manifests/reference/*.json", "manifests/unified/*.json"),
    "evaluation": ("manifests/unified/*.json", "manifests/run/*.json"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_kills_at_random_moments_change_no_byte(stage: str, tmp_path: Path, tiny_base: Path, reference: Desk) -> None:
    begin, end = STAGES[stage]
    choose = random.Random(stage)
    with desk(tmp_path, tiny_base) as place:
        root = place.cwd / "memmcl-store"
        published: Files = {}
        kills = 0
        for _ in range(KILLS):
            wanted = len(published) + choose.randint(1, 4)
            with place.started("run", place.config) as running:
                running.wait_until(partial(_reached, root, begin, end, wanted), f"{stage} goes on")
                time.sleep(choose.uniform(0.0, 0.5))  # a moment that no event announces
                running.kill()
                kills += running.process.returncode == -signal.SIGKILL
            published = _grown(root, published)
            if any(root.glob(end)):
                break
        assert kills > 1, "the stage is long enough to be killed in"
        last = place.run("run", place.config)
        assert last.code == 0, last
        _grown(root, published)
        for kind in ("expert", "reference", "unified", "gate"):
            theirs = {one.key: one.blobs for one in reference.store.list(kind)}
            assert {one.key: one.blobs for one in place.store.list(kind)} == theirs, kind
        assert list(place.store.verify().problems) == []
        flows = Counter(state for name, state in runs_of(place.history) if name == "tiny")
        assert flows["Completed"] >= 1
        assert flows["Crashed"] + flows["Completed"] == flows.total() >= kills
        assert not {"Running", "Pending"} & {state for _, state in states(place.history, "task_run")}


def _reached(root: Path, begin: str, end: str, wanted: int) -> bool:
    """Whether the stage has begun and `wanted` files are published, or it is over."""
    return any(root.glob(end)) or (any(root.glob(begin)) and len(frozen(root)) >= wanted)


def _grown(root: Path, published: Files) -> Files:
    """Return what is published now, having made sure that what was published before is as it was."""
    now = frozen(root)
    assert {path: now[path] for path in published} == published
    return now
