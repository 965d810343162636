"""How well a search keeps its workers busy: real Ray, real Tune, evaluations that sleep.

    python benchmarks/scaling.py [--workers 1 2 16] [--seconds 5] [--per-worker 10] [--out lines.jsonl]

Each evaluation sleeps for `seconds`, half as long to half as long again by its genome, as rows and races make real ones
differ; the CPUs are logical. Told of each number of workers: efficiency, the share of the workers' time that is
evaluation from the moment when all of them have begun until the last candidate was handed out; idle, the rest; and the
same of a search that waits for whole generations of as many candidates as there are workers, on the same evaluations by
Ray tasks. One run after the other on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray

from memmcl.backbone.resident import Base, ModelSpec
from memmcl.config import RunConfig, SearchConfig, parse_config
from memmcl.evolve import build_strategy
from memmcl.search.course import Course
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import SearchSpec
from memmcl.seeds import digest
from memmcl.store import Store
from tasks.search.driver import RayDriver
from tasks.search.queue import Candidate
from tasks.search.worker import Worker

GENES = 8
Spans = list[tuple[int, float, float]]
"""Of each evaluation: process, begin, end."""


def sleep(genome: Sequence[float], seconds: float) -> tuple[int, float, float]:
    """Stand for an evaluation; returns process, begin, end."""
    begin = time.time()
    share = int(digest(list(genome))[:8], 16) / 2**32
    time.sleep(seconds * (0.5 + share))
    return os.getpid(), begin, time.time()


def fitness(genome: Sequence[float]) -> float:
    """Return something to be searched for."""
    return -math.fsum((gene - 0.5) ** 2 for gene in genome)


class Sleeper(Worker):
    """A worker without a model."""

    pause = 0.0
    """Seconds that an evaluation takes in the mean."""

    def _open(self, problem: SearchProblem) -> None:
        pass

    def _evaluate(self, spec: SearchSpec, candidate: Candidate) -> dict[str, Any]:
        genome = candidate["genome"]
        pid, begin, end = sleep(genome, self.pause)
        return {
            "genome": list(genome),
            "fitness": fitness(genome),
            "values": {},
            "rungs": [],
            "stopped": False,
            "rows": 0,
            "span": [pid, begin, end],
            "seconds": {"merge": 0.0, "evaluate": end - begin},
        }


def asynchronous(workers: int, seconds: float, evaluations: int, folder: Path) -> Spans:
    """Return the spans of a search on Tune."""
    config = _config(workers)
    problem = _problem(config, folder)
    spec = SearchSpec(
        name="sleep",
        key="0" * 64,
        strategy=config.search.strategy,
        subtasks=(),
        seeds=(),
        evaluations=evaluations,
        blocks=1,
        bounds=config.search.bounds,
        mask_seed=0,
        parts={f"e{number}": {f"e{number}": (1.0,)} for number in range(GENES)},
    )
    spans: Spans = []

    def note(_: SearchSpec, __: object, record: Mapping[str, Any]) -> None:
        pid, begin, end = record["span"]
        spans.append((pid, begin, end))

    course = Course(lambda phases: None if phases else spec)
    worker = type("Sleeper", (Sleeper,), {"pause": seconds})
    RayDriver(config.ray, worker).run(problem, [course], note)
    return spans


def synchronous(workers: int, seconds: float, evaluations: int, _: Path) -> Spans:
    """Return the spans of a search that waits for whole generations."""
    strategy = build_strategy(
        SearchConfig().strategy, genes=GENES, bounds=SearchConfig().bounds, seeds=[], seed=0, population=max(4, workers)
    )
    remote = ray.remote(sleep)
    spans: Spans = []
    while len(spans) < evaluations:
        generation = [strategy.ask() for _ in range(max(4, workers))]
        spans += ray.get([remote.remote(proposal.genome, seconds) for proposal in generation])
        for proposal in generation:
            strategy.tell(proposal.index, fitness(proposal.genome))
    return spans


def _config(workers: int) -> RunConfig:
    return parse_config(
        {"search": {"lookahead": max(4, 2 * workers), "population": max(4, workers)}, "ray": {"workers": workers}}
    )


def _problem(config: RunConfig, folder: Path) -> SearchProblem:
    """Return a search without a model, rows or experts."""
    base = Base(name="none", digest="none", licence=None, dtype="float32", device="cpu", layers=1, split=0)
    return SearchProblem(
        store=Store.open(str(folder)).spec,
        model=ModelSpec(base=base, max_prompt_tokens=1),
        search=config.search,
        evaluation=config.evaluation,
        seed=config.seed,
        subtasks={},
        experts={},
        weak={},
        references={},
    )


def busy(spans: Spans, workers: int) -> float:
    """Return the share of the workers' time that is evaluation, from when all have begun to the last beginning.

    NaN where not all of them ever began: the run was shorter than their start.
    """
    if len({pid for pid, _, _ in spans}) < workers:
        return math.nan
    first = {pid: min(begin for other, begin, _ in spans if other == pid) for pid, _, _ in spans}
    start, stop = max(first.values()), max(begin for _, begin, _ in spans)
    inside = math.fsum(max(0.0, min(end, stop) - max(begin, start)) for _, begin, end in spans)
    return inside / (workers * (stop - start))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 16])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--per-worker", type=int, default=10, help="evaluations")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own table of trials
    print("| workers | search | evaluations | efficiency, % | idle, % |\n|---:|---|---:|---:|---:|")
    ways: dict[str, Callable[[int, float, int, Path], Spans]] = {
        "ours, ahead of results": asynchronous,
        "generation by generation": synchronous,
    }
    for workers in asked.workers:
        for way, search in ways.items():
            with tempfile.TemporaryDirectory(prefix="mmw") as folder:
                ray.init(num_cpus=workers, include_dashboard=False, logging_level="error", log_to_driver=False)
                try:
                    spans = search(workers, asked.seconds, workers * asked.per_worker, Path(folder) / "store")
                finally:
                    ray.shutdown()
            share = 100 * busy(spans, workers)
            print(f"| {workers} | {way} | {len(spans)} | {share:.1f} | {100 - share:.1f} |", flush=True)
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(json.dumps({"workers": workers, "way": way, "spans": spans}) + "\n")


if __name__ == "__main__":
    main()
