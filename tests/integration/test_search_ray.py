"""Merge searches on a real Ray: workers that come, go and die change nothing but the time it takes.

A search that ended with an error is carried on by the driver in this process where its test is not about workers: both
find the same, and one worker takes ten seconds to start.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
import pytest
import ray
from e2e_driver import frozen, tiny_config
from search_fixture import Published, problem_of, publish_experts

from memmcl.adapters import format as adapter
from memmcl.config import parse_config
from memmcl.errors import SearchError, ServiceError, StoreFull
from memmcl.evolve import LookAhead, Proposal, seed_genomes
from memmcl.search.course import Course, Driver, OnResult
from memmcl.search.local import LocalDriver
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import SearchSpec
from memmcl.store.manifest import blob_path
from tasks.run import cluster as cluster_checks
from tasks.run.runtime import Run, open_store
from tasks.search.driver import Multiplexer, RayDriver
from tasks.search.queue import Candidate, RayQueue
from tasks.search.worker import Worker
from tasks.stages.opening import open_run

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
pytestmark = pytest.mark.timeout(900)
MEMBERS = ("sent2", "irony", "emotion")
EVALUATIONS = {"pair": 12, "trio": 9}
KILL_AFTER = 7
TOLD_BEFORE = 5
Outcome = list[tuple[list[tuple[tuple[float, ...], float]], int]]


@dataclass
class Case:
    """Two searches over three random experts, in a store of their own, and what was seen while they ran."""

    run: Run
    specs: list[SearchSpec]
    published: Published
    told: list[str] = field(default_factory=list)

    @property
    def problem(self) -> SearchProblem:
        """What is searched on."""
        return problem_of(self.run, self.published)

    @property
    def root(self) -> Path:
        """The store's directory."""
        return Path(open_store(self.run).url.removeprefix("file://"))

    def search(
        self, after: Callable[[int], None] = lambda told: None, worker: type[Worker] = Worker
    ) -> list[LookAhead]:
        """Run the searches; `after` is called after each result with their number so far."""

        def told(spec: SearchSpec, proposal: Proposal, record: Mapping[str, Any]) -> None:
            assert set(record["values"]) == set(spec.subtasks)
            assert record["genome"] == list(proposal.genome)
            self.told.append(spec.name)
            after(len(self.told))

        return self._run(RayDriver(self.run.config.ray, worker), told)

    def resume_here(self) -> tuple[Outcome, list[tuple[str, tuple[float, ...]]]]:
        """Carry the searches on in this process; return what they found, and the candidates that were evaluated."""
        evaluated = []

        def note(spec: SearchSpec, proposal: Proposal, _: Mapping[str, Any]) -> None:
            evaluated.append((spec.name, proposal.genome))

        return outcome(self._run(LocalDriver(), note)), evaluated

    def _run(self, driver: Driver, note: OnResult) -> list[LookAhead]:
        courses = [Course(lambda phases, spec=spec: None if phases else spec) for spec in self.specs]
        driver.run(self.problem, courses, note)
        return [course.core for course in courses]


@pytest.fixture(scope="module")
def make_case(local_ray: None, tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[[int], Case]:
    """Make the same two searches in a new store; `workers` share them."""

    def make(workers: int) -> Case:
        tree = tiny_config(tiny_base)
        tree["data"]["subtasks"] = list(MEMBERS)
        tree["ray"] = {"workers": workers}
        tree["store"] = {"url": str(tmp_path_factory.mktemp("searches") / "store")}
        run = open_run(parse_config(tree))
        published = publish_experts(run, tiny_base, dict.fromkeys(MEMBERS, 6))
        cfg = run.config.search
        specs = []
        for number, (title, members) in enumerate({"pair": MEMBERS[1:], "trio": MEMBERS}.items()):
            specs.append(
                SearchSpec(
                    name=title,
                    key=f"{number:064x}",
                    strategy="cmaes",
                    subtasks=members,
                    parts={member: {member: (1.0,)} for member in members},
                    seeds=tuple(
                        (origin, tuple(genome))
                        for origin, genome in seed_genomes(list(members), cfg.blocks, cfg.bounds, cfg.lambdas)
                    ),
                    evaluations=EVALUATIONS[title],
                    blocks=cfg.blocks,
                    bounds=cfg.bounds,
                    mask_seed=run.seed("masks"),
                )
            )
        return Case(run, specs, published)

    return make


@pytest.fixture
def handed_out(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[float, ...]]]:
    """Every candidate that was handed out, in order: (name of the search, genome)."""
    seen: list[tuple[str, tuple[float, ...]]] = []
    put = RayQueue.put

    def watched(self: RayQueue, candidate: Candidate, first: bool = False) -> None:
        seen.append((json.loads(candidate["spec"])["name"], tuple(candidate["genome"])))
        put(self, candidate, first)

    monkeypatch.setattr(RayQueue, "put", watched)
    return seen


@pytest.fixture(scope="module")
def alone(make_case: Callable[[int], Case]) -> tuple[Case, Outcome]:
    """The searches on one worker, undisturbed, and what they found; to read, not to change."""
    case = make_case(1)
    return case, outcome(case.search())


def test_one_worker_and_two_find_the_same(
    alone: tuple[Case, Outcome], make_case: Callable[[int], Case], handed_out: list[Any]
) -> None:
    case, found = alone
    shared = make_case(2)
    assert outcome(shared.search()) == found
    assert len(handed_out) == len(set(handed_out)) == len(shared.told) == len(case.told), "each genome once"
    for evaluations, (candidates, winner) in zip(EVALUATIONS.values(), found, strict=True):
        assert len(candidates) == evaluations
        fitnesses = [fitness for _, fitness in candidates]
        assert fitnesses[winner] == max(fitnesses)
        assert len(set(fitnesses)) > evaluations / 2, "fitness tells candidates apart"


class Meeting(Worker):
    """A worker; to the first of them that has a second candidate in its hands something happens, once."""

    happened = ""

    @classmethod
    def noted(cls, path: Path) -> type[Worker]:
        """Return it with the file that notes what happened."""
        return type(cls.__name__, (cls,), {"happened": str(path)})

    def _open(self, problem: SearchProblem) -> None:
        self._happened, self._begun = Path(self.happened), 0
        super()._open(problem)

    def _evaluate(self, spec: SearchSpec, candidate: Candidate) -> dict[str, Any]:
        self._begun += 1
        if self._begun == 2:
            with suppress(FileExistsError), self._happened.open("x") as file:
                self._happen(file)
        return super()._evaluate(spec, candidate)

    def _happen(self, file: TextIO) -> None:
        raise NotImplementedError


class Stopping(Meeting):
    """A worker that stops there, and says who it is."""

    def _happen(self, file: TextIO) -> None:
        print(os.getpid(), file=file, flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_killed_worker_costs_one_candidate_its_retry(
    alone: tuple[Case, Outcome], make_case: Callable[[int], Case], handed_out: list[Any], tmp_path: Path
) -> None:
    stopped, killed = tmp_path / "stopped", False

    def disturb(told: int) -> None:
        nonlocal killed
        if (
            not killed and told >= KILL_AFTER and stopped.exists() and stopped.read_text()
        ):  # the others came from the other worker
            psutil.Process(int(stopped.read_text())).kill()
            killed = True

    case = make_case(2)
    try:
        assert outcome(case.search(disturb, Stopping.noted(stopped))) == alone[1]
    finally:
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            psutil.Process(int(stopped.read_text())).kill()
    assert killed
    assert len(handed_out) == len(case.told) + 1, "one candidate went out a second time"
    assert len(set(handed_out)) == len(case.told) == len(alone[0].told)


def test_a_killed_queue_ends_the_search_with_one_line_and_loses_nothing(
    alone: tuple[Case, Outcome], make_case: Callable[[int], Case], capfd: pytest.CaptureFixture[str]
) -> None:
    """The process that hands out candidates; its worker says so, and Tune has no traceback to print."""

    def disturb(told: int) -> None:
        if told == TOLD_BEFORE:
            queue_of_ours().kill()

    case = make_case(1)
    with pytest.raises(SearchError, match=r"^the process that hands out candidates is gone; run the same command"):
        case.search(disturb)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert outcome(case.search()) == alone[1]
    assert len(case.told) == len(alone[0].told), "none was told twice"


def queue_of_ours() -> psutil.Process:
    """Return the process of the queue; others on this machine have queues too."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if process.cmdline()[:1] == ["ray::_Actor"]:
                return process
    raise AssertionError("no queue")


class Failing(Meeting):
    """A slow worker that notes what it ends, and fails there at once."""

    def _happen(self, file: TextIO) -> None:
        raise SearchError("it does not work")

    def _evaluate(self, spec: SearchSpec, candidate: Candidate) -> dict[str, Any]:
        record = super()._evaluate(spec, candidate)
        time.sleep(0.5)
        (self._happened.parent / f"{candidate['number']} ended").touch()
        return record


def test_what_other_workers_have_in_their_hands_when_one_fails_is_kept(
    make_case: Callable[[int], Case], tmp_path: Path
) -> None:
    case = make_case(2)
    with pytest.raises(SearchError, match=r"^(pair|trio): it does not work$"):
        case.search(worker=Failing.noted(tmp_path / "failed"))
    assert len(case.told) == len(list(tmp_path.glob("* ended"))) > 0
    store = open_store(case.run)
    assert sum(len(store.records(f"searches/{spec.key}")) for spec in case.specs) == len(case.told)


def test_a_corrupt_or_missing_expert_is_one_line_and_loses_nothing(
    alone: tuple[Case, Outcome], make_case: Callable[[int], Case]
) -> None:
    case = make_case(1)
    store, whole = open_store(case.run), open_store(alone[0].run)
    for spec in case.specs:  # as if it had been killed after the first records of each
        for index, record in list(whole.records(f"searches/{spec.key}").items())[:TOLD_BEFORE]:
            store.append(f"searches/{spec.key}", index, record)
    info = store.load(case.published["experts"]["irony"]).blobs[adapter.WEIGHTS_FILE]
    blob = case.root / blob_path(info.sha256)
    healthy = blob.read_bytes()
    flipped = healthy[:-1] + bytes([healthy[-1] ^ 1])
    for damaged, said in ((flipped, "does not match its digest"), (None, "is missing from")):
        if damaged is None:
            blob.unlink()
        else:
            blob.write_bytes(damaged)
        before = frozen(case.root)
        with pytest.raises(SearchError) as caught:
            case.search()
        message = str(caught.value)
        assert "\n" not in message
        assert "expert irony" in message
        assert said in message
        assert case.told == []
        assert frozen(case.root) == before

    blob.write_bytes(healthy)
    found, evaluated = case.resume_here()
    assert found == alone[1]
    after = frozen(case.root)
    records = {path for path in before if path.startswith("logs/")}
    assert {path: after[path] for path in records} == {path: before[path] for path in records}
    assert len(records) == TOLD_BEFORE * len(case.specs)
    assert len(evaluated) == len(alone[0].told) - len(records), "only what was missing"


def test_a_disk_that_is_full_when_a_result_comes_is_one_line_and_loses_nothing(
    alone: tuple[Case, Outcome], make_case: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(1)
    store = open_store(case.run)
    create = store.objects.backend.create

    def full(path: str, data: bytes) -> str | None:
        if len(case.told) >= TOLD_BEFORE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(store.objects.backend, "create", full)
        with pytest.raises(
            StoreFull, match=r"^no space left in .*; finished work is kept; free space and run"
        ) as caught:
            case.search()
    assert "\n" not in str(caught.value)
    before = frozen(case.root)
    assert len([path for path in before if path.startswith("logs/")]) == len(case.told) == TOLD_BEFORE
    assert list(store.verify().problems) == []

    found, evaluated = case.resume_here()
    assert found == alone[1]
    assert len(evaluated) == len(alone[0].told) - TOLD_BEFORE, "only what was missing"
    after = frozen(case.root)
    assert {path: after[path] for path in before} == before


def test_a_disk_that_is_full_under_rays_own_files_is_one_line_and_loses_nothing(
    alone: tuple[Case, Outcome], make_case: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Multiplexer, checkpoint_path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", checkpoint_path)

    case = make_case(1)
    with monkeypatch.context() as patch:  # Tune has the searcher write beside its own state
        patch.setattr(Multiplexer, "save", full)
        with pytest.raises(
            SearchError, match=r"^no space left for Ray's own files .*; free space there, or name other"
        ) as caught:
            case.search()
    assert "\n" not in str(caught.value)
    found, evaluated = case.resume_here()
    assert found == alone[1]
    assert len(case.told) + len(evaluated) == len(alone[0].told), "none was told twice"


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"cpus_per_worker": 3.0}, "3 CPUs and 0 GPUs"), ({"gpus_per_worker": 0.5}, "1 CPUs and 0.5 GPUs")],
    ids=lambda one: str(one),
)
def test_a_worker_that_no_node_has_room_for_is_said_within_seconds(
    make_case: Callable[[int], Case], monkeypatch: pytest.MonkeyPatch, asked: dict[str, float], named: str
) -> None:
    monkeypatch.setattr(cluster_checks, "ROOM_SECONDS", 1.0)
    case = make_case(1)
    ray_settings = case.run.config.ray.model_copy(update=asked)
    case.run = case.run.model_copy(update={"config": case.run.config.model_copy(update={"ray": ray_settings})})
    with pytest.raises(ServiceError) as caught:
        case.search()
    assert str(caught.value) == (
        f"no Ray node has {named} for a worker; the nodes there are have 2 CPUs and 0 GPUs; lower ray.cpus_per_worker "
        "or ray.gpus_per_worker, or start such a node, then run the same command again: no result is lost"
    )
    assert case.told == []


def outcome(cores: list[LookAhead]) -> Outcome:
    """Return, for each search, (genome, fitness) of all candidates in order, and the winner's index."""
    return [
        (
            [(proposal.genome, core.records[proposal.index]["fitness"]) for proposal in core.proposals],
            core.best()[0].index,
        )
        for core in cores
    ]
