"""Faults injected into the work of `store_workload`, one at a time, each on a store of its own; and what came of each.

A plan is drawn from a seed: for each kind, at which of the requests or system calls that it is about it strikes, and
for how many of them. What must hold whatever was struck is in `judge`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from disk_faults import DISK_FAULTS, DiskFault, struck
from fault_proxy import FAULTS, Fault, FaultProxy
from seaweed import REGION, S3Server
from store_workload import LISTS, PART, PUBLISHED, STEPS, Work

from memmcl.errors import MemmclError
from memmcl.store import Store
from memmcl.store.objects import Objects, open_objects
from memmcl.store.s3 import S3Backend

LASTING = 12
"""Requests that a lasting fault strikes: `Objects` tries five times, and the HTTP client may send each try twice."""
READ_TIMEOUT = 0.7
"""Seconds that a client waits for an answer where answers are delayed; memmcl's own is a minute."""
MASKED = "went on by itself"
REPEATED = "one line; repeated, it went on"
KILLED = "killed; started again, it went on"
UNTOUCHED = "the fault had nothing to strike"
GOOD = (MASKED, REPEATED, KILLED, UNTOUCHED)


@dataclass(frozen=True)
class Injection:
    """One fault: where, which kind, the first call that it strikes, how many it strikes."""

    place: str
    kind: str
    first: int
    times: int


@dataclass
class Outcome:
    """What came of one injection: one of `GOOD`, or what is wrong; the lines that the user read; seconds."""

    injection: Injection
    what: str
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.what in GOOD


@dataclass
class Disturbed:
    """What happened while the steps were done: results by step, lines of errors, anything that is wrong."""

    results: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def attempt(name: str, work: Work, told: Disturbed) -> bool:
    """Do a step; an error that is no line for the user is wrong. Return whether it was done."""
    try:
        told.results[name] = json.loads(json.dumps(STEPS[name](work)))
    except MemmclError as error:
        line = str(error)
        told.lines.append(line)
        if "\n" in line or not line:
            told.wrong.append(f"{name}: an error of several lines, or none")
        return False
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told.wrong.append(
            f"{name}: raw {type(error).__name__}: {str(error)[:160]} ({Path(where.filename).name}:{where.lineno})"
        )
        return False
    return True


def do_all(work: Work, calm: Callable[[], None], done: Callable[[str], None] = lambda _: None) -> Disturbed:
    """Do all steps; what failed is done again at once, with the fault taken away by `calm`."""
    told = Disturbed()
    for name in STEPS:
        if not attempt(name, work, told):
            calm()
            if not attempt(name, work, told):
                told.wrong.append(f"{name} fails again without a fault: {(told.lines or ['?'])[-1][:200]}")
        done(name)
    return told


def judge(
    injection: Injection, told: Disturbed, work: Work, undisturbed: dict[str, Any], acknowledged: list[str]
) -> list[str]:
    """Return what is wrong: results that differ, damage that was committed, what was acknowledged and is lost."""
    wrong = list(told.wrong)
    for name, result in told.results.items():
        if not _same(name, result, undisturbed[name], incomplete=injection.kind == "stale listing"):
            wrong.append(f"{name} gives another result: {json.dumps(result)[:300]}")
    wrong += [f"damaged: {problem.where}" for problem in work.store.verify().problems]
    for kind, name in PUBLISHED:
        step = {"split": "publish_rows", "expert": "train", "run": "finish"}[kind]
        if step in acknowledged and work.store.find(kind, work.key(name)) is None:
            wrong.append(f"lost: {kind} {name}")
    for name in ("resume", "look"):  # once more, with nothing in between
        if json.loads(json.dumps(STEPS[name](work))) != undisturbed[name]:
            wrong.append(f"{name} shows another state at the end")
    return wrong


def _same(name: str, result: Any, expected: Any, *, incomplete: bool) -> bool:
    if result == expected:
        return True
    if not (incomplete and name in LISTS):
        return False
    if name == "resume":  # what the listing left out counts as not told, what it shows is as it was told
        return all(expected.get(index) == record for index, record in result.items())
    return all(one in expected["listed"] for one in result["listed"]) and result["found"] == expected["found"]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="mm"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Place:
    """Where faults are injected: how stores are opened there, and how often each kind finds something to strike."""

    name: str
    seed: int
    undisturbed: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def plan(self, count: int) -> list[Injection]:
        """Return about `count` injections, as many of each kind, at calls spread over the work; a third is lasting."""
        draw = random.Random(f"{self.seed} {self.name}")
        planned = []
        each = -(-count // len(self.calls))
        for kind, calls in self.calls.items():
            for number in range(each):
                low, high = calls * number // each, max(calls * number // each + 1, calls * (number + 1) // each)
                lasting = number % 3 == 2 and not self._once(kind)
                times = LASTING if lasting else 1
                planned.append(Injection(self.name, kind, min(draw.randrange(low, high), calls - 1), times))
        return planned

    def _once(self, kind: str) -> bool:
        return kind in DISK_FAULTS and DISK_FAULTS[kind].kills


@dataclass
class DiskPlace(Place):
    """Directories on this machine's disk."""

    def learn(self) -> None:
        """Do the work undisturbed, with its calls counted."""
        with scratch() as folder:
            none = DiskFault(frozenset(), lambda _: None, times=0)
            with struck(folder / "store", none):
                told = do_all(self._work(folder), lambda: None)
        assert (told.wrong, told.lines) == ([], []), told
        self.undisturbed = told.results
        self.calls = {name: sum(none.seen[call] for call in kind.about) for name, kind in DISK_FAULTS.items()}

    def inject(self, injection: Injection) -> Outcome:
        """Do the work once with one fault."""
        began = time.monotonic()
        with scratch() as folder:
            work = self._work(folder)
            made = DISK_FAULTS[injection.kind]
            fault = DiskFault(made.about, made.strike, injection.first, injection.times)
            if made.kills:
                acknowledged = _in_a_child_that_dies(work, folder / "store", fault)
                killed = acknowledged != list(STEPS)
                told = do_all(work, lambda: None)
                good = KILLED if killed else UNTOUCHED
            else:
                with struck(folder / "store", fault):
                    told = do_all(work, lambda: _end(fault))
                acknowledged = list(told.results)
                good = _good(told, fault.hits)
            wrong = judge(injection, told, work, self.undisturbed, acknowledged)
        return Outcome(injection, "; ".join(wrong) or good, told.lines, time.monotonic() - began)

    def _work(self, folder: Path) -> Work:
        return Work(Store.open(str(folder / "store")), self.seed, folder)


def _end(fault: DiskFault) -> None:
    fault.times = 0


def _good(told: Disturbed, hits: int) -> str:
    return UNTOUCHED if hits == 0 else REPEATED if told.lines else MASKED


def _in_a_child_that_dies(work: Work, root: Path, fault: DiskFault) -> list[str]:
    """Do the work in a process that the fault kills; return the steps that it had said were done."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:  # nothing but files is touched here, and nothing of the parent's is cleaned up
        try:
            os.close(reading)
            with struck(root, fault):
                do_all(work, lambda: None, lambda name: os.write(writing, f"{name}\n".encode()) and None)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        acknowledged = lines.read().split()
    os.waitpid(pid, 0)
    return acknowledged


@dataclass
class S3Place(Place):
    """Folders of a bucket on a real S3 server, reached through the proxy."""

    server: S3Server = field(kw_only=True)
    proxy: FaultProxy = field(kw_only=True)
    large: int = field(default=Work.large, kw_only=True)

    def learn(self) -> None:
        """Do the work undisturbed, with its requests counted."""
        self.proxy.arm(None)
        with scratch() as folder:
            told = do_all(self._work(folder), lambda: None)
        assert (told.wrong, told.lines) == ([], []), told
        self.undisturbed, self.calls = told.results, {kind: self.proxy.seen[kind] for kind in FAULTS}

    def inject(self, injection: Injection) -> Outcome:
        """Do the work once with one fault."""
        began = time.monotonic()
        with scratch() as folder:
            work = self._work(folder, injection.kind)
            self.proxy.arm(Fault(injection.kind, injection.first, injection.times, 2 * READ_TIMEOUT, self.seed))
            told = do_all(work, lambda: self.proxy.arm(None))
            hits = self.proxy.hits if not told.lines else 1
            self.proxy.arm(None)
            direct = replace(work, store=_open_s3(work.store.url, self.server.endpoint_url))
            wrong = judge(injection, told, direct, self.undisturbed, list(told.results))
        return Outcome(injection, "; ".join(wrong) or _good(told, hits), told.lines, time.monotonic() - began)

    def _work(self, folder: Path, kind: str = "") -> Work:
        url = f"s3://{self.server.bucket}/{uuid.uuid4().hex}"
        timeout = READ_TIMEOUT if kind == "answer too late" else None
        return Work(_open_s3(url, self.proxy.endpoint_url, timeout), self.seed, folder, self.large)


def _open_s3(url: str, endpoint_url: str, read_timeout: float | None = None) -> Store:
    """Open a store as `Store.open` does, but for the client, which is one for all stores."""
    backend = S3Backend(_client(endpoint_url, read_timeout), url.removeprefix("s3://"))
    return Store(Objects(backend, url, endpoint_url), {"url": url, "endpoint_url": endpoint_url, "region": REGION})


@cache
def _client(endpoint_url: str, read_timeout: float | None) -> Any:
    """Return memmcl's client for a server, which sends small parts, and waits less for an answer."""
    fs = cast(S3Backend, open_objects("s3://any/folder", endpoint_url, REGION).backend).fs
    if read_timeout is not None:
        fs.config_kwargs["read_timeout"] = read_timeout
    fs.put_file = partial(fs.put_file, chunksize=PART)
    return fs


@contextmanager
def short_pauses() -> Iterator[None]:
    """Let `Objects` try again as often as ever, after pauses a twentieth as long."""
    from memmcl.store import objects

    pauses = objects.RETRY_SECONDS
    objects.RETRY_SECONDS = tuple(pause / 20 for pause in pauses)
    try:
        yield
    finally:
        objects.RETRY_SECONDS = pauses


def campaign(place: DiskPlace | S3Place, count: int) -> list[Outcome]:
    """Inject about `count` faults, one after another."""
    with short_pauses():
        place.learn()
        return [place.inject(injection) for injection in place.plan(count)]
