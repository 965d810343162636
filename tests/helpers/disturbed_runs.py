"""Whole runs of a small configuration that are disturbed: which process is what, how far a run is, how it ended."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil
from e2e_driver import NO_RIVALS, ONE_WORKER, Desk, Running, settings, wait_until

from memmcl.errors import StoreError
from memmcl.store import Store

SMALL = (*ONE_WORKER, *settings("data.subtasks=[sent2, irony, emotion]"), *NO_RIVALS)
"""Three subtasks without rivals: everything that a run does, in as few seconds as it takes."""
SAME = ("split", "anchors", "warm", "expert", "reference", "unified", "gate")
"""Kinds of artifacts whose files are the same, bit by bit, however a run was disturbed."""
STAGES = (
    ("run", "finished"),
    ("unified", "evaluation"),
    ("search", "search"),
    ("reference", "search"),
    ("warm", "experts"),
    ("split", "experts"),
)
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE")
ENDS = 240.0
"""Seconds after which a run that should have ended, or processes that should be gone, count as hanging."""
WENT_ON = "the run went on"


@dataclass
class Disturbance:
    """What was done to a run, at which stage, and what came of it.

    said: the line that the user read; seconds: until the command ended; left: until nothing that it had started was
    left.
    """

    what: str
    stage: str
    outcome: str = WENT_ON
    said: str = ""
    seconds: float | None = None
    left: float | None = None
    wrong: str = ""


def stage_of(store: Store) -> str:
    """Return how far the run of a store is."""
    with suppress(StoreError):  # its server was killed a moment ago
        kinds = {path.split("/")[1] for path in store.objects.sizes("manifests")}
        return next((stage for kind, stage in STAGES if kind in kinds), "start")
    return "?"


def objects_of(store: Store) -> int:
    """Return how many objects a store holds; none while its server is not there."""
    with suppress(StoreError):
        return len(store.objects.sizes(""))
    return 0


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


VICTIMS: dict[str, Callable[[str], bool]] = {
    "driver": lambda command: False,
    "worker of Ray": lambda command: command.startswith("ray::") and not command.startswith(AGENTS),
    "raylet": lambda command: "/raylet/raylet" in command.split(" ")[0],
    "gcs_server": lambda command: "gcs_server" in command.split(" ")[0],
    "Prefect server": lambda command: "flows.own_server" in command,
    "S3 server": lambda command: False,
}
"""Whom a kill can hit, and the command line that it is known by among a run's processes."""


def find_victim(running: Running, victim: str) -> list[psutil.Process]:
    """Return the processes of a run that are the victim; of several workers of Ray, the first."""
    if victim == "driver":
        return [psutil.Process(running.process.pid)]
    found = [process for process in running.members() if VICTIMS[victim](_command(process))]
    return found[:1] if victim == "worker of Ray" else found


def await_moment(running: Running, store: Store, draw: random.Random, ready: Callable[[], object]) -> bool:
    """Wait for a moment that is drawn, at which `ready` holds; return False when the run ended before.

    Three times in four it comes after a few more objects were stored, else soon after `ready` holds.
    """
    wanted = objects_of(store) + draw.randint(1, 5) if draw.random() < 0.75 else 0

    def reached() -> bool:
        ended = running.process.poll() is not None
        return ended or (objects_of(store) >= wanted and bool(ready()))

    wait_until(reached, "the moment has come", every=0.2)
    time.sleep(draw.uniform(0.0, 1.0))  # a moment that no event announces
    return running.process.poll() is None


def await_end(running: Running, since: float, told: Disturbance) -> int | None:
    """Wait until the command and all that it had started have ended; write into `told` how that was."""
    while running.process.poll() is None:
        if time.monotonic() - since > ENDS:
            told.outcome, told.wrong = "it hung", f"still running after {ENDS:.0f} s"
            return None
        time.sleep(0.05)
    code = running.process.returncode
    told.seconds = time.monotonic() - since
    while left := running.members():
        if time.monotonic() - since > ENDS:
            told.wrong = f"left running: {sorted({process.name() for process in left})}"
            return code
        time.sleep(0.1)
    told.left = time.monotonic() - since
    out, err = running.texts()
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    told.said = lines[0] if lines else ""
    told.outcome = "ended" if code == 0 else "was killed" if code < 0 else "ended with one line"
    if "Traceback (most recent call last)" in out + err:
        told.wrong = "a traceback in the terminal"
    if code > 0 and (len(lines) != 1 or "defect of memmcl" in lines[0]):
        told.wrong = f"expected one line of an error that is ours, got {lines or err[-300:]}"
    return code


def differences(place: Store, whole: Desk) -> list[str]:
    """Return what in a finished store is not, bit by bit, what an undisturbed run makes."""
    problems = place.verify().problems
    named = [problem for problem in problems if "belongs to no artifact" not in problem.what]  # others are garbage
    found = [f"{problem.where}: {problem.what}" for problem in named]
    for kind in SAME:
        theirs = {one.key: one.blobs for one in whole.store.list(kind)}
        if {one.key: one.blobs for one in place.list(kind)} != theirs:
            found.append(f"{kind} is not that of an undisturbed run")
    return found
