"""Searches over broken experts and over one weak row, without Ray; the searcher gets results as Tune gives them."""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from e2e_driver import tiny_config
from search_fixture import problem_of, publish_experts
from tiny import corpus

from memmcl.config import RayConfig, parse_config
from memmcl.errors import ModelError, SearchError, ServiceError
from memmcl.evolve import seed_genomes
from memmcl.evolve.bayesian import Process
from memmcl.evolve.racing import Hurdle
from memmcl.search.course import Course
from memmcl.search.local import LocalDriver
from memmcl.search.plan import SearchPlan, make_spec
from memmcl.search.problem import SearchProblem
from memmcl.search.scorer import Scorer
from tasks.run import cluster
from tasks.run.runtime import Run, open_store
from tasks.search.driver import Multiplexer
from tasks.search.queue import Candidate
from tasks.stages import references
from tasks.stages.opening import open_run

MEMBERS = ("sent2", "irony")
EVALUATIONS = 12
Made = tuple[Run, SearchPlan, SearchProblem]


@pytest.fixture
def make(tmp_path: Path, tiny_base: Path) -> Callable[..., Made]:
    """Plan a search over random experts, of which those in `broken` hold a value that is no number."""

    def made(broken: Sequence[str] = (), rows: Sequence[int] = (6, 6), store: str = "store", **settings: Any) -> Made:
        tree = tiny_config(tiny_base)
        tree["data"]["subtasks"] = list(MEMBERS)
        tree["search"] = {"population": 4, "lambdas": [0.3, 0.7], **settings}
        tree["store"] = {"url": str(tmp_path / store)}
        run = open_run(parse_config(tree))
        problem = problem_of(run, publish_experts(run, tiny_base, dict(zip(MEMBERS, rows, strict=True)), broken))
        cfg, inputs = run.config.search, problem.inputs(list(MEMBERS))
        seeds = seed_genomes(list(MEMBERS), cfg.blocks, cfg.bounds, cfg.lambdas)
        each = {name: {name: (1.0,) * cfg.blocks} for name in MEMBERS}
        spec = make_spec(problem, "both", each, MEMBERS, seeds, EVALUATIONS, inputs)
        return run, SearchPlan(problem, spec, inputs), problem

    return made


class Waiting:
    """A queue without Ray."""

    def __init__(self) -> None:
        self.candidates: deque[Candidate] = deque()

    def put(self, candidate: Candidate, first: bool = False) -> None:
        """Keep a candidate."""
        self.candidates.append(candidate)

    def lost(self, worker: str) -> int | None:
        """Say that the worker never took anything."""

    def close(self) -> None:
        """Nobody waits here."""


def search(made: Made) -> Course:
    """Run a planned search to its end."""
    _, plan, problem = made
    course = plan.course()
    LocalDriver().run(problem, [course], lambda *_: None)
    assert course.core.finished
    return course


def test_workers_that_are_lost_before_they_take_anything_end_the_search(make: Callable[..., Made]) -> None:
    _, plan, problem = make()
    queue = Waiting()
    searcher = Multiplexer(problem, [plan.course()], lambda *_: None, queue)
    handed_out = len(queue.candidates)
    for worker in "abc":
        assert searcher.suggest(worker) == {}
        searcher.on_trial_complete(worker, None, error=True)
    assert searcher.error is None
    assert searcher.suggest("d") == {}
    searcher.on_trial_complete("d", None, error=True)
    with pytest.raises(SearchError, match=r"^4 workers in a row were lost before they took a candidate; look for"):
        raise searcher.error or AssertionError
    assert searcher.suggest("e") == "FINISHED"
    assert len(queue.candidates) == handed_out, "no candidate went out again"


def test_a_result_that_comes_after_a_failure_is_kept_and_nothing_more_handed_out(make: Callable[..., Made]) -> None:
    run, plan, problem = make()
    queue = Waiting()
    searcher = Multiplexer(problem, [plan.course()], lambda *_: None, queue)
    first, second, *_ = queue.candidates
    handed_out = len(queue.candidates)
    searcher.on_trial_complete("one", {"error": "it does not work"})
    with closing(Scorer(problem)) as scorer:
        record = scorer.evaluate(plan.first, second["genome"], [])
    searcher.on_trial_result("two", {"number": second["number"], "record": json.dumps(record)})
    assert [found["genome"] for found in stored(run, plan)] == [second["genome"]] != [first["genome"]]
    assert len(queue.candidates) == handed_out
    assert str(searcher.error) == "it does not work"


def test_no_more_workers_are_asked_for_than_there_are_candidates(make: Callable[..., Made]) -> None:
    run, plan, problem = make()
    searcher = Multiplexer(problem, [plan.course()], lambda *_: None, Waiting())
    asked = [searcher.suggest(str(worker)) for worker in range(run.config.search.lookahead + 3)]
    assert asked == [{}] * (run.config.search.lookahead + 1) + [None] * 2


def test_a_killed_search_goes_on_from_its_records_without_a_fit_for_any_of_them(make: Callable[..., Made]) -> None:
    whole_run, whole_plan, _ = whole = make(store="whole", strategy="bayesian")
    with patch.object(Process, "fitted", side_effect=Process.fitted) as fits:
        finished = search(whole)
        assert fits.call_count > 0
        fits.reset_mock()
        assert search(make(store="whole", strategy="bayesian")).core.proposals == finished.core.proposals
        assert fits.call_count == 0, "of a finished search, everything is on record"

        killed = make(strategy="bayesian")
        kept = {index: record for index, record in records_of(whole_run, whole_plan).items() if index < EVALUATIONS - 2}
        for index, record in kept.items():
            open_store(killed[0]).append(f"searches/{killed[1].first.key}", index, record)
        resumed = search(killed)
        assert fits.call_count == 2
    assert resumed.core.proposals == finished.core.proposals
    assert resumed.core.best()[0] == finished.core.best()[0]


def test_a_record_of_another_genome_lends_its_fitness_to_nothing(make: Callable[..., Made]) -> None:
    undisturbed = search(make(store="undisturbed")).core
    run, plan, _ = made = make()
    foreign = {**undisturbed.records[3], "genome": [0.123456, 0.654321], "fitness": 99.0}
    open_store(run).append(f"searches/{plan.first.key}", 3, foreign)
    found = search(made).core
    assert found.proposals == undisturbed.proposals
    assert [found.records[index]["fitness"] for index in range(EVALUATIONS)] == [
        undisturbed.records[index]["fitness"] for index in range(EVALUATIONS)
    ]
    assert records_of(run, plan)[3]["fitness"] == 99.0, "the first record stands"


def records_of(run: Run, plan: SearchPlan) -> dict[int, dict[str, Any]]:
    return open_store(run).records(f"searches/{plan.first.key}")


def stored(run: Run, plan: SearchPlan) -> list[dict[str, Any]]:
    """Return the records of a search, read as JSON that knows no NaN."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(path.read_text(), parse_constant=refuse)[1] for path in record_files(run, plan)]


def record_files(run: Run, plan: SearchPlan) -> list[Path]:
    """Return the files of a search's records, in the order of asking."""
    folder = Path(open_store(run).url.removeprefix("file://"), "logs", "searches", plan.first.key)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("settings", "rungs", "rows"),
    [
        ({"rungs": []}, [], 12),
        ({"rungs": [0.4, 0.7]}, [None], 6),
        ({"fitness": "metric", "rungs": []}, [], 12),
        ({"fitness": "metric", "rungs": [0.4]}, [None], 6),
        ({"strategy": "nsga2", "objectives": "subtasks", "rungs": []}, [], 12),
        ({"strategy": "genetic", "rungs": [0.4]}, [None], 6),
    ],
    ids=str,
)
def test_a_candidate_whose_values_are_no_numbers_fails_and_never_wins(
    make: Callable[..., Made], settings: dict[str, Any], rungs: list[None], rows: int
) -> None:
    run, plan, problem = made = make(broken=["irony"], **settings)
    course = search(made)
    records = stored(run, plan)
    failed = [record for record in records if record["genome"][1] != 0]
    assert 3 < len(failed) < len(records)
    for record in failed:
        assert record["fitness"] is None
        assert set(record["values"].values()) == {None}
        assert (record["rungs"], record["stopped"], record["rows"]) == (rungs, bool(rungs), rows)
        assert record.get("objectives", [None, None]) == [None, None]
    assert all(math.isfinite(record["fitness"]) for record in records if record not in failed)
    again = search((run, plan, problem))
    assert again.core.records == course.core.records, "from the records alone"

    done = plan.publish(course.phases, 0.0)
    store = open_store(run)
    document = json.loads(store.read(done, "search.json"))
    assert document["coefficients"]["irony"] == [0.0]
    (store_path := Path(store.url.removeprefix("file://"), "candidates.parquet")).write_bytes(
        store.read(done, "candidates.parquet")
    )
    table = pq.read_table(store_path).to_pylist()
    assert [row["fitness"] is None for row in table] == [one["fitness"] is None for one in document["candidates"]]
    assert not any(row["winner"] and row["fitness"] is None for row in table)


def test_a_told_score_with_a_flipped_bit_is_not_believed(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loser that would win with another digit is evaluated again, and the winner stays."""
    run, plan, _ = made = make(rungs=[])
    whole = search(made)
    winner, _ = whole.core.best()
    path = next(file for file in record_files(run, plan) if int(file.stem) not in (0, winner.index))
    said = json.loads(path.read_text())[1]["fitness"]
    data = path.read_bytes()
    number = re.search(rb'"fitness": -?', data)
    assert number is not None
    place = number.end()  # its first digit
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert json.loads(path.read_text())[1]["fitness"] != said, "still JSON, with another score"
    evaluated = []
    evaluate = Scorer.evaluate

    def counting(scorer: Scorer, spec: Any, genome: Any, hurdles: Any) -> Any:
        evaluated.append(tuple(genome))
        return evaluate(scorer, spec, genome, hurdles)

    monkeypatch.setattr(Scorer, "evaluate", counting)
    again = search(made)
    assert evaluated == [whole.core.proposals[int(path.stem)].genome]
    assert again.core.best()[0] == winner
    assert {index: one["fitness"] for index, one in again.core.records.items()} == {
        index: one["fitness"] for index, one in whole.core.records.items()
    }
    assert open_store(run).verify().problems == ()


@pytest.mark.parametrize("rungs", [[], [0.4]])
def test_where_every_candidate_fails_the_search_ends_and_says_so(make: Callable[..., Made], rungs: list[float]) -> None:
    run, plan, problem = make(broken=MEMBERS, rungs=rungs)
    plan.first = plan.first.model_copy(update={"seeds": plan.first.seeds[1:]})  # without the base
    course = search((run, plan, problem))
    assert {record["fitness"] for record in stored(run, plan)} == {None}
    with pytest.raises(SearchError, match=r"^search both: no candidate has a finite fitness; see the log for their"):
        plan.publish(course.phases, 0.0)
    assert open_store(run).list("search") == []


def test_nothing_is_held_to_an_expert_whose_likelihoods_are_no_numbers(make: Callable[..., Made]) -> None:
    run, _, problem = make(broken=["irony"])
    rows = {"weak": corpus("irony", 6)}
    sound, _ = references.measure_rows(run, run.subtask("irony"), rows, problem.experts["sent2"])
    assert np.isfinite(sound["expert"]["logprobs"]).all()
    expected = r"^expert irony: the likelihoods of 6 of 6 rows of irony are not finite; look whether its weights are"
    with pytest.raises(ModelError, match=expected):
        references.measure_rows(run, run.subtask("irony"), rows, problem.experts["irony"])


@pytest.mark.parametrize("settings", [{}, {"fitness": "metric"}], ids=str)
def test_a_race_over_one_weak_row(make: Callable[..., Made], settings: dict[str, Any]) -> None:
    """A weak set of one row is at its end at the first rung, whatever the other has."""
    raced = make(rows=(1, 6), rungs=[0.3, 0.5], **settings)
    plain = make(rows=(1, 6), store="plain", **settings)
    course = search(raced)
    with closing(Scorer(plain[2])) as scorer:
        for record in stored(*raced[:2]):
            whole = scorer.evaluate(plain[1].first, record["genome"], [])
            assert record["rows"] in (1 + 2, 1 + 3) if record["stopped"] else record["rows"] == 1 + 6
            if not settings or not record["stopped"]:
                assert record["values"]["sent2"] == pytest.approx(whole["values"]["sent2"], rel=1e-5)
            if not record["stopped"]:
                assert record["fitness"] == pytest.approx(whole["fitness"], rel=1e-5)
    with closing(Scorer(raced[2])) as scorer:
        for hurdles in ([Hurdle(9.0, 0.25), None], [None, Hurdle(9.0, 0.25)]):
            record = scorer.evaluate(raced[1].first, [0.5, 0.5], hurdles)
            assert record["stopped"]
            assert record["rows"] == 1 + len(record["rungs"]) + 1
            assert record["fitness"] == pytest.approx(record["rungs"][-1] + 0.25)
            assert len(record["rungs"]) == 1 + hurdles.index(Hurdle(9.0, 0.25))
    assert raced[1].publish(course.phases, 0.0).metrics["evaluations"] == EVALUATIONS


def test_all_weak_sets_of_one_row(make: Callable[..., Made]) -> None:
    run, plan, _ = made = make(rows=(1, 1), rungs=[0.4])
    course = search(made)
    assert {record["rows"] for record in stored(run, plan)} == {2}
    for record in stored(run, plan):
        assert record["rungs"] == [pytest.approx(record["fitness"])]
    assert course.core.ranked()


def test_nodes_of_a_group_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoscaler starts nodes for what waits, so a cluster that may have one is waited for."""
    node = {"Alive": True, "Resources": {"CPU": 1.0}, "Labels": {cluster.GROUP: "cpu"}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    cluster.check_room(RayConfig(cpus_per_worker=4.0))
    monkeypatch.setattr(cluster, "ROOM_SECONDS", 0.0)
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Labels": {}}, {**node, "Alive": False}])
    with pytest.raises(ServiceError, match="the nodes there are have 1 CPUs and 0 GPUs;"):
        cluster.check_room(RayConfig(cpus_per_worker=4.0))


def test_out_of_minutes_what_was_asked_is_still_looked_at(make: Callable[..., Made]) -> None:
    run, plan, _ = made = make(minutes=1e-6)
    course = search(made)
    assert len(course.core.proposals) == run.config.search.lookahead + 1 < EVALUATIONS
    document = json.loads(open_store(run).read(plan.publish(course.phases, 0.0), "search.json"))
    assert document["stopped_early"]
    assert sum(one["wins"] for one in document["finalists"]) == 1
