"""How far work is, for whoever watches the run: `memmcl run` draws it in a terminal.

Work announces an `Update`. In the process of the run it goes to the watcher; in a Ray worker it becomes one line of
JSON on stdout with the mark of Ray's own progress bars, which Ray takes to the process of the run. Nothing heavy is
imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

State = Literal["working", "done", "reused", "failed"]
EXPERTS, SEARCH, EVALUATION, REPORT = STAGES = ("experts", "merge search", "evaluation", "report")
"""The stages of a run, in their order."""
GATE = "champion gate"
"""The stage that a retrain adds to them."""


@dataclass(frozen=True)
class Update:
    """How far one piece of work is.

    title: what it is, as "expert sent2"; updates of one title are about the same work. kind: "stage", or that of the
    artifact that comes of it. done, total: in steps or candidates, 0 where it has none. words: a few more, as the loss.
    seconds: of work that is done. lines: the best candidates of a search.
    """

    title: str
    kind: str
    state: State = "working"
    done: int = 0
    total: int = 0
    words: str = ""
    seconds: float = 0.0
    lines: tuple[str, ...] = ()


Watcher = Callable[[Update], None]
_watcher: Watcher | None = None


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Have the updates of this process and of its Ray workers go to `watcher`, from whatever thread."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def announce(update: Update) -> None:
    """Tell whoever watches the run; where nobody does, nothing happens."""
    if _watcher is not None:
        _watcher(update)
        return
    ray = sys.modules.get("ray")
    if ray is not None and ray._private.worker.global_worker.mode == ray.WORKER_MODE:
        from ray.experimental.tqdm_ray import RAY_TQDM_MAGIC

        print(json.dumps({"__magic_token__": RAY_TQDM_MAGIC, **asdict(update)}), flush=True)


@contextmanager
def working(title: str, kind: str) -> Iterator[None]:
    """Announce the begin and the end of a piece of work."""
    started = time.monotonic()
    announce(Update(title, kind))
    try:
        yield
    except BaseException:
        announce(Update(title, kind, "failed", seconds=time.monotonic() - started))
        raise
    announce(Update(title, kind, "done", seconds=time.monotonic() - started))


stage = partial(working, kind="stage")
"""Announces a stage of the run; see `STAGES`."""


@contextmanager
def receive_updates() -> Iterator[None]:
    """Take the updates that Ray brings from its workers while the block runs, in place of Ray's progress bars."""
    from ray.experimental import tqdm_ray

    class Receiver(tqdm_ray._BarManager):
        def process_state_update(self, state: dict[str, Any]) -> None:
            known = {name: value for name, value in state.items() if name in Update.__dataclass_fields__}
            if _watcher is not None and "title" in known:
                _watcher(Update(**{**known, "lines": tuple(known["lines"])}))

    receiver = Receiver()  # type: ignore[no-untyped-call]
    before, tqdm_ray._manager = tqdm_ray._manager, receiver
    try:
        yield
    finally:
        tqdm_ray._manager = before


def plain_worker_lines() -> None:
    """Have Ray bring the lines of workers without colours, where no person watches a terminal."""
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
