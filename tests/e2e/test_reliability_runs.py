"""Whole runs whose processes are killed, whose S3 server answers wrongly, whose store is damaged bit by bit.

Each is started again until it ends; what it makes is, bit by bit, what an undisturbed run makes. What a user saw goes
into `docs/reliability.md`.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from disturbed_runs import (
    SMALL,
    VICTIMS,
    WENT_ON,
    Disturbance,
    await_end,
    await_moment,
    differences,
    find_victim,
    stage_of,
)
from e2e_driver import Desk, Running, desk, finished_desk
from fault_proxy import FAULTS, Fault, FaultProxy, fault_proxy
from flips import ABSENT, INDEX, REFUSED, Stored, draw_bits, flip, judge
from reliability_page import general, table, write_part
from seaweed import REGION
from servers import S3Process, s3_process

from memmcl.store import Reign, Store, index, promote, read_champions
from memmcl.store.index import summaries

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3500)]
SEED = 7
FLIPS = 20
KILLS = {"driver": 4, "worker of Ray": 4, "raylet": 3, "gcs_server": 3, "Prefect server": 3, "S3 server": 3}
LASTING = ("500 InternalError", "reset before the answer", "403 AccessDenied")
TOO_SLOW = "answer too late"
"""A run waits a minute for an answer: this kind is left to the work on a store."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Desk]:
    """A desk at which the small run went through undisturbed; to read, not to change."""
    with finished_desk(tmp_path_factory.mktemp("whole"), tiny_base, *SMALL) as place:
        yield place


@contextmanager
def on_s3(root: Path, base: Path) -> Iterator[tuple[Desk, S3Process]]:
    """A desk, and an S3 server that can be killed; the server's credentials are in the desk's environment and ours."""
    with s3_process() as s3, pytest.MonkeyPatch.context() as patch:
        for variable, value in s3.server.environment.items():
            patch.setenv(variable, value)
        with desk(root, base, environment=s3.server.environment) as place:
            yield place, s3


def settings(url: str, endpoint_url: str) -> tuple[str, ...]:
    chosen = {"store.url": url, "store.endpoint_url": endpoint_url, "store.region": REGION}
    return (*SMALL, *(part for key, value in chosen.items() for part in ("--set", f"{key}={value}")))


def disturbed_part(title: str, words: str, told: Sequence[Disturbance]) -> str:
    rows = [
        [
            one.what,
            one.stage,
            one.outcome if not one.wrong else f"WRONG: {general(one.wrong)}",
            general(one.said),
            "" if one.seconds is None else f"{one.seconds:.0f}",
            "" if one.left is None else f"{one.left:.0f}",
        ]
        for one in told
    ]
    header = ["what", "stage", "the run", "the terminal said", "ended after, s", "nothing left after, s"]
    return "\n\n".join([f"## {title}", words, f"Seed {SEED}.", table(header, rows)])


def kill(victim: str, s3: S3Process, running: Running) -> None:
    """SIGKILL the victim; the S3 server is started again at once, and is there when this returns."""
    if victim == "S3 server":
        s3.kill()
        s3.start()
        return
    for process in find_victim(running, victim):
        process.kill()


def test_kills_of_every_process(tmp_path: Path, tiny_base: Path, whole: Desk, page: Path) -> None:
    draw = random.Random(SEED)
    victims = [victim for victim, count in KILLS.items() for _ in range(count)]
    draw.shuffle(victims)
    told: list[Disturbance] = []
    differ: list[str] = []
    with on_s3(tmp_path / "s3", tiny_base) as (place, s3):
        number = 0
        while victims:
            left = len(victims)
            url = f"s3://{s3.server.bucket}/round{number}"
            number += 1
            store = Store.open(url, endpoint_url=s3.server.endpoint_url, region=REGION)
            while not _command(place, s3, store, victims, draw, told):
                pass
            assert len(victims) < left, f"a whole run, and no {victims[-1]} was found in it"
            differ += differences(store, whole)
    words = (
        "A small run on a real S3 server; one of its processes, or the S3 server, gets SIGKILL at a drawn moment. "
        "Where the run ends, the same command is started again, until it is finished: "
        f"{number} runs in all, whose experts and unified models are, bit by bit, those of an undisturbed run. "
        "The S3 server is started again at once, which takes it a while."
    )
    write_part(page, "kills", disturbed_part("Kills", words, told))
    assert len(told) >= 20
    assert {one.what for one in told} == {f"{victim} killed" for victim in VICTIMS}
    assert [one for one in told if one.wrong] == []
    assert differ == []


def _is_there(running: Running, victim: str) -> bool:
    return victim == "S3 server" or bool(find_victim(running, victim))


def _command(
    place: Desk, s3: S3Process, store: Store, victims: list[str], draw: random.Random, told: list[Disturbance]
) -> bool:
    """Start the run once, and kill what is next in the list as long as it lives; return whether it finished."""
    mine: list[Disturbance] = []
    struck = time.monotonic()
    with place.started("run", place.config, *settings(store.url, s3.server.endpoint_url)) as running:
        while victims:
            victim = victims[-1]
            if not await_moment(running, store, draw, partial(_is_there, running, victim)):
                break
            mine.append(Disturbance(f"{victims.pop()} killed", stage_of(store)))
            struck = time.monotonic()
            kill(victim, s3, running)
            if victim not in {"worker of Ray", "S3 server"}:
                break
        last = mine[-1] if mine else Disturbance("nothing", "")
        code = await_end(running, struck, last)
        if code == 0:
            last.outcome, last.seconds, last.left = WENT_ON, None, None
        told += mine if mine else [last] if last.wrong else []
    return code == 0


def test_faults_of_the_s3_server_in_a_whole_run(tmp_path: Path, tiny_base: Path, whole: Desk, page: Path) -> None:
    draw = random.Random(SEED)
    kinds = [(kind, 1) for kind in FAULTS if kind != TOO_SLOW] + [(kind, 12) for kind in LASTING]
    draw.shuffle(kinds)
    told: list[Disturbance] = []
    differ: list[str] = []
    with on_s3(tmp_path / "s3", tiny_base) as (place, s3), fault_proxy(s3.server.endpoint_url) as proxy:
        number = 0
        while kinds:
            url = f"s3://{s3.server.bucket}/round{number}"
            number += 1
            store = Store.open(url, endpoint_url=s3.server.endpoint_url, region=REGION)
            while not _struck_command(place, proxy, store, kinds, draw, told):
                pass
            differ += differences(store, whole)
    words = (
        "A small run reaches its S3 server through the proxy. A fault strikes one request, or twelve, of those that it "
        "is about; the next one comes some seconds later. Where the run ends, the same command is started again: "
        f"{number} runs in all, whose experts and unified models are, bit by bit, those of an undisturbed run."
    )
    write_part(page, "run", disturbed_part("Faults of the S3 server in a whole run", words, told))
    assert [one for one in told if one.wrong] == []
    assert differ == []


def _struck_command(
    place: Desk,
    proxy: FaultProxy,
    store: Store,
    kinds: list[tuple[str, int]],
    draw: random.Random,
    told: list[Disturbance],
) -> bool:
    """Start the run once, and let one fault after another strike as long as it lives; return whether it finished."""
    mine: list[Disturbance] = []
    struck = time.monotonic()
    with place.started("run", place.config, *settings(store.url, proxy.endpoint_url)) as running:
        while kinds and await_moment(running, store, draw, lambda: True):
            kind, times = kinds.pop()
            mine.append(Disturbance(f"{kind}, {times} {'request' if times == 1 else 'requests'}", stage_of(store)))
            proxy.arm(Fault(kind, draw.randint(0, 2), times, seed=SEED))
            struck = time.monotonic()
            while running.process.poll() is None and proxy.hits < times and time.monotonic() - struck < 20:
                time.sleep(0.1)
            if not proxy.hits:
                mine[-1].outcome = "it had nothing to strike"
            time.sleep(1.0)  # what it does shows before the next one comes
            proxy.arm(None)
        last = mine[-1] if mine else Disturbance("nothing", "")
        before = last.outcome
        code = await_end(running, struck, last)
        if code == 0:
            last.outcome, last.seconds, last.left = before, None, None
        told += mine if mine else [last] if last.wrong else []
    return code == 0


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Desk]:
    """A desk at which the small run was killed in a training, and again in a search."""
    with desk(tmp_path_factory.mktemp("unfinished"), tiny_base) as place:
        root = place.cwd / "memmcl-store"
        with place.started("run", place.config, *SMALL) as running:
            running.wait_until(lambda: any((root / "checkpoints").glob("*.bin")), "a training has a checkpoint")
            running.kill()
        shutil.copytree(root, place.root / "training")
        with place.started("run", place.config, *SMALL) as running:
            running.wait_until(lambda: len(list((root / "logs/searches").glob("*/*.json"))) > 2, "candidates are told")
            running.kill()
        yield place


def test_flips_in_every_kind_of_object(
    tmp_path: Path, whole: Desk, unfinished: Desk, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit of one object at a time, then one of each kind at once: never is another content read."""
    draw = random.Random(SEED)
    stores = {
        "finished": whole.cwd / "memmcl-store",
        "in a training": unfinished.root / "training",
        "in a search": unfinished.cwd / "memmcl-store",
    }
    counts: dict[str, dict[str, int]] = {}
    unverified: list[str] = []
    for name, original in stores.items():
        root = tmp_path / name.replace(" ", "-")
        shutil.copytree(original, root)
        if name == "finished":
            monkeypatch.setattr(index, "WORTH_WRITING", 0)  # a small store has none otherwise
            _crown(Store.open(str(root)))
        stored = Stored.of(root)
        for sort, paths in stored.sorts().items():
            if sort in counts and name != "finished" and sort not in {"lease of a run", "checkpoint"}:
                continue  # the finished store has them all
            for path, bit in draw_bits(stored, paths, FLIPS, draw):
                outcome = judge(stored, sort, path, bit)
                counts.setdefault(sort, {}).setdefault(outcome, 0)
                counts[sort][outcome] += 1
        unverified += _unverified(stored, draw)
    good = {ABSENT, REFUSED}
    rows = [
        [
            sort,
            sum(found.values()),
            found.get(ABSENT, 0),
            found.get(REFUSED, 0),
            sum(count for what, count in found.items() if what not in good),
            ", ".join(sorted(what for what in found if what not in good)),
        ]
        for sort, found in sorted(counts.items())
    ]
    words = (
        "One bit of one object is flipped in a copy of a finished store, or of one whose run was killed; then its "
        "readers are asked. A file or record that counts as absent is made again, and is found. `memmcl store verify` "
        "names every damaged object but an index, which is derived: that is tried with one of each kind at once."
    )
    header = ["object", "flips", ABSENT, REFUSED, "wrong", ""]
    write_part(page, "flips", "\n\n".join(["## Flipped bits", words, f"Seed {SEED}.", table(header, rows)]))
    assert {
        INDEX,
        "record of a search",
        "journal of a run",
        "lease of a run",
        "champion",
        "checkpoint",
    } <= counts.keys()
    assert all(sum(found.values()) >= FLIPS for found in counts.values())
    assert [sort for sort, found in counts.items() if not found.keys() <= good] == []
    assert unverified == []


def _crown(store: Store) -> None:
    """Give a finished store what only retrains and long use bring: an index of each kind, and a champion."""
    summaries(store)
    (run,) = store.list("run")
    reign = Reign(run_id=run.key, name=run.name, since="2026-01-01", how="promotion", why="the first")
    promote(store, read_champions(store, "default"), reign)


def _unverified(stored: Stored, draw: random.Random) -> list[str]:
    """Flip a bit in one object of each kind at once; return the damaged objects that `verify` does not name."""
    flips = [draw_bits(stored, paths, 1, draw)[0] for sort, paths in stored.sorts().items() if sort != INDEX]
    for path, bit in flips:
        flip(stored.root, path, bit)
    named = {problem.where for problem in stored.store.verify().problems}
    for path, bit in flips:
        flip(stored.root, path, bit)
    return [path for path, _ in flips if path not in named]


@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_a_damaged_store_is_mended_by_the_same_command(
    state: str, tmp_path: Path, tiny_base: Path, whole: Desk, request: pytest.FixtureRequest
) -> None:
    """A bit in one object of every kind at once; the run makes again what is damaged, to the same bytes."""
    source: Desk = request.getfixturevalue("whole" if state == "finished" else "unfinished")
    draw = random.Random(f"{SEED} {state}")
    with desk(tmp_path / "mended", tiny_base) as place:
        root = place.cwd / "memmcl-store"
        shutil.copytree(source.cwd / "memmcl-store", root)
        stored = Stored.of(root)
        for paths in stored.sorts().values():
            ((path, bit),) = draw_bits(stored, paths, 1, draw)
            flip(root, path, bit)
        ended = place.run("run", place.config, *SMALL)
        assert ended.code == 0, ended
        assert "Traceback" not in ended.out + ended.err
        assert differences(place.store, whole) == []
