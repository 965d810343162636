"""Ten kills at random moments of a search with races: of a worker, of the driver, of the whole tree."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import watched_search
from e2e_driver import Desk, Running, desk, tiny_config, wait_until

from memmcl.config import parse_config
from tasks.stages.opening import open_run

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3500)]
VICTIMS = ["worker"] * 6 + ["driver"] * 2 + ["tree"] * 2
START = 8.0
"""Seconds within which a kill may fall that does not wait for an evaluation."""
Candidate = tuple[str, tuple[float, ...]]
"""The key of its search, and its genome."""
Records = dict[str, dict[int, dict[str, Any]]]


@dataclass
class Place:
    """A desk with a case in a store of its own, and the notes of its workers."""

    desk: Desk
    notes: Path = field(init=False)

    def __post_init__(self) -> None:
        self.notes = self.desk.root / "notes"
        self.notes.touch()

    @property
    def arguments(self) -> tuple[Path, ...]:
        """What the program is started with."""
        return Path(watched_search.__file__), self.desk.root / "case.json", self.notes

    def begun(self) -> list[tuple[str, int, Candidate]]:
        """Return what workers began, in order: mark of the tree, process, candidate."""
        lines = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [(mark, pid, (key, tuple(genome))) for mark, pid, key, genome in lines]

    def begun_by(self) -> dict[Candidate, list[str]]:
        """Return, by candidate, the marks of the trees whose workers began it."""
        found: dict[Candidate, list[str]] = {}
        for mark, _, candidate in self.begun():
            found.setdefault(candidate, []).append(mark)
        return found

    def workers(self, running: Running) -> dict[int, Candidate]:
        """Return the processes that worked in a tree, each with what it began last."""
        return {pid: candidate for mark, pid, candidate in self.begun() if mark == running.mark}

    def records(self) -> Records:
        """Return all records without the seconds they took, by the search's key."""
        store = self.desk.store
        logs = {path.split("/")[2] for path in store.objects.sizes("logs/searches/")}
        return {
            log: {index: {**record, "seconds": None} for index, record in store.records(f"searches/{log}").items()}
            for log in logs
        }

    def told(self) -> set[Candidate]:
        """Return what has a record."""
        return {(key, tuple(one["genome"])) for key, found in self.records().items() for one in found.values()}


@pytest.fixture
def make(tmp_path: Path, tiny_base: Path) -> Any:
    """Make a place by its name; all of them hold the same case."""
    with ExitStack() as stack:

        def made(name: str) -> Place:
            place = stack.enter_context(desk(tmp_path / name, tiny_base))
            tree = tiny_config(tiny_base)
            tree["data"]["subtasks"] = list(watched_search.MEMBERS)
            tree["search"] = {"population": 4, "rungs": [0.4], "lambdas": [0.3, 0.7]}
            tree["store"] = {"url": str(place.cwd / "memmcl-store")}
            run = open_run(parse_config(tree))
            watched_search.write_case(run, tiny_base, place.root / "case.json")
            return Place(place)

        yield made


def test_ten_kills_of_a_search_change_nothing_that_it_finds(make: Callable[[str], Place]) -> None:
    whole = make("whole")
    expected = whole.desk.run(*whole.arguments, program=Path(sys.executable))
    assert expected.code == 0, expected
    counts = Counter(candidate for _, _, candidate in whole.begun())
    assert set(counts.values()) == {1}
    stopped = sum(record["stopped"] for records in whole.records().values() for record in records.values())
    assert 0 < stopped < counts.total() / 1.5, "hurdles stop some"

    killed, choose = make("killed"), random.Random("ten kills")
    victims = [*VICTIMS]
    choose.shuffle(victims)
    told = _kill_until_it_ends(killed, victims, choose)
    assert killed.records() == whole.records(), "fitness, values, rungs, stopped"
    assert told["winners"] == json.loads(expected.out.splitlines()[-1])
    assert set(killed.begun_by()) == set(counts), "the same candidates"
    again = {candidate: marks for candidate, marks in killed.begun_by().items() if len(marks) > 1}
    for candidate, marks in again.items():
        assert len(marks) - 1 <= told["cut"][candidate], f"{candidate} was evaluated again, but was not in flight"
    assert list(killed.desk.store.verify().problems) == []
    said = {
        "kills": len(VICTIMS),
        "commands": told["commands"],
        "candidates": len(counts),
        "stopped": stopped,
        "in flight at a kill": told["cut"].total(),
        "evaluated again": sum(len(marks) - 1 for marks in again.values()),
        "seconds until a dead driver's processes ended": told["seconds"],
    }
    print(json.dumps(said))


def _kill_until_it_ends(place: Place, victims: list[str], choose: random.Random) -> dict[str, Any]:
    """Start the program again and again, with a kill for each of `victims`; return what is known at its end.

    winners: what it printed; cut: by candidate, at how many kills it was in flight; seconds: how long the processes of
    drivers that were killed alone went on.
    """
    cut: Counter[Candidate] = Counter()
    seconds: list[float] = []
    commands = 0
    orphans: Running | None = None
    with ExitStack() as stack:
        while True:
            before = place.told()
            running = stack.enter_context(place.desk.started(*place.arguments, program=Path(sys.executable)))
            commands += 1
            if orphans is not None:  # they go while the next command is on its way
                since, gone = time.monotonic(), orphans
                wait_until(lambda gone=gone: not gone.members(), "what a dead driver started ends by itself")
                seconds.append(round(time.monotonic() - since, 1))
                cut.update(place.workers(orphans).values())
                orphans = None
            victim = "worker"
            while victims and victim == "worker":
                victim = victims.pop()
                _await_moment(place, running, choose, must=victim == "worker")
                if victim == "worker":
                    pid = choose.choice([pid for pid in place.workers(running) if psutil.pid_exists(pid)])
                    psutil.Process(pid).kill()
                    cut[place.workers(running)[pid]] += 1
            if victim == "tree":
                running.kill()
                cut.update(place.workers(running).values())
            if victim == "driver":
                running.process.kill()
                orphans = running
            ended = running.ended()
            again = before & {candidate for mark, _, candidate in place.begun() if mark == running.mark}
            assert not again, "they were told before"
            if victim == "worker":
                assert ended.code == 0, ended
                winners = json.loads(ended.out.splitlines()[-1])
                return {"winners": winners, "cut": cut, "seconds": seconds, "commands": commands}


def _await_moment(place: Place, running: Running, choose: random.Random, *, must: bool) -> None:
    """Wait until a few more candidates were begun, and then for a moment that no event announces; or for that alone."""
    if must or choose.random() < 0.75:
        wanted = len(place.begun()) + choose.randint(1, 3)
        running.wait_until(lambda: len(place.begun()) >= wanted, "candidates are begun")
        time.sleep(choose.uniform(0.0, 0.3))
    else:
        time.sleep(choose.uniform(0.0, START))
