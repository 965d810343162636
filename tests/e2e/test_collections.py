"""A store that is retrained again and again: what `memmcl store gc` leaves is what the runs that it keeps need."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from e2e_driver import Desk, Ended, desk, tiny_config
from servers import prefect_api_server

from memmcl.store import Manifest, Policy, Store, collect, marks, read_champions
from memmcl.store.manifest import manifest_path

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(7200)]
FOLDERS = {"sent2": "sc/mr", "irony": "mast/irony"}
LABELS = {"sent2": ("positive", "negative"), "irony": ("irony", "non_irony")}
RETRAINS, KEPT = 10, 2
LIMIT = 1.3
DECADE = 3e8  # seconds
MANY = """
import json, shutil, sys
from pathlib import Path
from flows.retrain import retrain
from memmcl.config import load_config
from tasks.run.ray_session import ray_session

settings = load_config(Path(sys.argv[1]))
with ray_session(settings.ray):
    for rows in sys.argv[2:]:
        shutil.copytree(rows, settings.data.source, dirs_exist_ok=True)
        state = retrain(settings, return_state=True)
        print(json.dumps([state.name, state.message]), flush=True)
"""
"""Retrain on one folder of rows after the other, on one Ray: most of what a small retrain takes is its start."""
DERIVED = ("run", "judgement", "evaluation")


@dataclass(frozen=True)
class Swept:
    """A store after ten retrains and a collection. runs: of the retrains, in their order. ended: what gc said."""

    desk: Desk
    runs: list[Manifest]
    before: int
    after: int
    ended: Ended

    @property
    def store(self) -> Store:
        return self.desk.store

    @property
    def kept(self) -> list[Manifest]:
        champion = read_champions(self.store, "champion").current
        assert champion is not None
        return [run for run in self.runs if run in self.runs[-KEPT:] or run.key == champion.run_id]


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with prefect_api_server(tmp_path_factory.mktemp("prefect-server")) as url:
        yield url


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, prefect_api: str) -> Iterator[Swept]:
    with desk(tmp_path_factory.mktemp("swept"), tiny_base, server=prefect_api) as place:
        configure(place, tiny_base)
        runs = retrains(place, range(RETRAINS))
        before = size_of(place.store)
        ended = place.run("store", "gc", "--keep-runs", str(KEPT), "--delete", "--config", place.config)
        assert ended.code == 0, ended
        yield Swept(place, runs, before, size_of(place.store), ended)


def test_the_store_is_as_large_as_one_that_made_only_what_is_kept(
    swept: Swept, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, prefect_api: str
) -> None:
    kept = [swept.runs.index(run) for run in swept.kept]
    with desk(tmp_path_factory.mktemp("only"), tiny_base, server=prefect_api) as place:
        configure(place, tiny_base)
        retrains(place, kept)
        only = size_of(place.store)
    print(
        f"bytes: {swept.before:,} after {RETRAINS} retrains, {swept.after:,} after gc, which kept those of {kept}; "
        f"{only:,} in a store that made only these: {swept.after / only:.2f}"
    )
    assert swept.after < swept.before
    assert swept.after <= LIMIT * only
    assert list(swept.store.verify().problems) == []


def test_only_the_newest_and_the_champion_stay(swept: Swept) -> None:
    assert {run.key for run in swept.store.list("run")} == {run.key for run in swept.kept}
    for run in swept.kept:
        assert f"kept     run {run.key[:8]}: " in swept.ended.out


def test_what_is_kept_still_reports_and_predicts(swept: Swept, tmp_path: Path) -> None:
    for run in swept.kept:
        key = run.key[:12]
        reported = swept.desk.run("report", key, "--config", swept.desk.config, "--out", tmp_path / key)
        assert reported.code == 0, reported
        assert (tmp_path / key / "adapter" / "adapter_model.safetensors").stat().st_size > 0
        said = swept.desk.run("predict", "The soup was cold.", "--run", key, "--config", swept.desk.config)
        assert said.code == 0, said
        assert "confidence" in said.out
    gone = next(run for run in swept.runs if run not in swept.kept)
    assert swept.desk.run("report", gone.key[:12], "--config", swept.desk.config).code == 2


def test_what_is_kept_is_gone_on_with(swept: Swept) -> None:
    """Asked for again they are found; the newest without its last artifact is finished from what is in the store."""
    for run in swept.kept:
        write_rows(swept.desk, swept.runs.index(run))
        again = swept.desk.run("retrain", swept.desk.config)
        assert again.code == 0, again
        assert again.out.splitlines()[-1].startswith("Unchanged: "), again
        resumed = swept.desk.run("search", "resume", run.key[:12], "--config", swept.desk.config)
        assert resumed.code == 0, resumed
    newest, before = swept.runs[-1], manifests(swept.store)
    assert newest.key[:8] in again.out
    judged = [one for one in swept.store.list("judgement") if newest.ref in one.inputs]
    for manifest in (newest, *judged):
        swept.store.objects.delete([manifest_path(manifest.kind, manifest.key)])
    resumed = swept.desk.run("retrain", swept.desk.config)
    assert resumed.code == 0, resumed
    assert swept.store.find("run", newest.key) is not None
    new = manifests(swept.store) - before
    assert {path.split("/")[1] for path in new} <= set(DERIVED), "nothing is trained or searched again"


@pytest.mark.parametrize("place", ["file", "s3"])
def test_a_run_at_work_comes_through_collections_that_keep_as_little_as_they_may(
    place: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_base: Path,
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older run, whose experts the new one reuses, goes piece by piece while the new one is looking for them."""
    environment, settings = {}, {"url": str(tmp_path / "store")}
    if place == "s3":
        server = request.getfixturevalue("s3")
        environment = dict(server.environment)
        settings = {"url": f"s3://{server.bucket}/{tmp_path.name}", "endpoint_url": server.endpoint_url}
    with desk(tmp_path / "desk", tiny_base, server=prefect_api, environment=environment) as at:
        configure(at, tiny_base)
        write_rows(at, 0)
        at.config.write_text(yaml.safe_dump(yaml.safe_load(at.config.read_text()) | {"store": settings}))
        store = Store.open(settings["url"], endpoint_url=settings.get("endpoint_url"))
        older = at.run("run", at.config)
        assert older.code == 0, older
        (before,) = store.list("run")
        monkeypatch.setattr(marks, "MARGIN", 0.0)  # what the run has not found itself is anybody's
        removed = collections = 0
        with at.started("run", at.config, "--set", "search.lambdas=[0.3, 0.5]") as running:
            running.wait_until(lambda: "pointers/leases/" in "".join(store.objects.sizes("pointers")), "it is at work")
            while running.process.poll() is None:
                policy = Policy(keep_runs=min(collections, 1), older_than=0)  # at first not even the older run
                plan = collect(store, policy, delete=True, now=time.time() + DECADE)
                removed += len(plan.removed)
                collections += 1
            ended = running.ended()
        assert ended.code == 0, ended
        collect(store, Policy(keep_runs=1), delete=True, now=time.time() + DECADE)
        (run,) = store.list("run")
        print(f"{place}: {collections} collections beside the run removed {removed} objects")
        assert run.key != before.key
        assert collections > 3
        assert list(store.verify().problems) == []
        assert all(store.find(ref.kind, ref.key) is not None for ref in run.inputs)
        said = at.run("predict", "The soup was cold.", "--config", at.config)
        assert said.code == 0, said


def configure(place: Desk, base: Path) -> None:
    settings = tiny_config(base)
    settings["data"] |= {"subtasks": list(FOLDERS), "source": str(place.root / "rows"), "test_rows": 10}
    settings["experts"] |= {"steps": 8, "warm_start": 0.1}
    settings["search"] |= {"stage1_evaluations": 4, "stage2_evaluations": 4, "lambdas": [0.5]}
    settings["curriculum"] = {"contexts": ["zero-shot"]}
    settings["evaluation"] |= {"joint_lora": False, "weak_lora": False, "calibration": False}
    settings["store"] = {"url": str(place.cwd / "memmcl-store")}
    settings["ray"] = {"workers": 1}
    place.config.write_text(yaml.safe_dump(settings))


def write_rows(place: Desk, changed: int) -> None:
    """Write the rows of both subtasks; of those that sent2 trains on, row number `changed` is another one."""
    for subtask, folder in FOLDERS.items():
        for part, count in (("train", 24), ("dev", 8), ("test", 10)):
            rows = [row(subtask, part, index) for index in range(count)]
            if (subtask, part) == ("sent2", "train"):
                rows[changed] = row(subtask, part, 1000 + changed)
            path = place.root / "rows" / folder / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def row(subtask: str, part: str, index: int) -> dict[str, str]:
    draw = random.Random(f"{subtask} {part} {index}")
    thing, when = draw.choice(("soup", "screen", "ferry", "choir")), draw.choice(("today", "again", "on Monday"))
    return {
        "text": f"The {thing} was as it is {when}, {subtask} {part} {index}.",
        "label": draw.choice(LABELS[subtask]),
    }


def retrains(place: Desk, changed: Iterable[int]) -> list[Manifest]:
    """Retrain on rows of which this one is changed, one after the other, and return the runs."""
    folders = []
    for number in changed:
        write_rows(place, number)
        folders.append((place.root / "rows").rename(place.root / f"rows-{number}"))
    ended = place.run("-c", MANY, place.config, *folders, program=Path(sys.executable))
    assert ended.code == 0, ended
    said = [json.loads(line) for line in ended.out.splitlines() if line.startswith("[")]
    assert {name for name, _ in said} <= {"Promoted", "NotPromoted"}, said
    runs = sorted(place.store.list("run"), key=lambda run: run.created)
    assert len(runs) == len(folders)
    return runs


def manifests(store: Store) -> set[str]:
    return set(store.objects.sizes("manifests"))


def size_of(store: Store) -> int:
    return sum(store.objects.sizes("").values())
