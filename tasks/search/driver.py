"""Merge searches on Ray Tune: several at once over shared workers, each with one resident model.

`Course` is one search with what follows it (a joint search, the decision between finalists), phase by phase.
`Evaluator` is the Tune trainable: a trial of Tune is a worker, which keeps base and experts, and takes one candidate
after another from the queue. `Multiplexer` is the Tune searcher: it suggests as many workers as there is work for,
hands out what the look-ahead cores of all courses have, in turn, and gives results back to them. Every result is in
the store before a strategy hears of it, so a killed search loses only what was in flight.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from memmcl.config import RayConfig
from memmcl.errors import MemmclError, SearchError
from memmcl.evolve import LookAhead, Proposal, build_strategy
from memmcl.evolve.racing import Hurdle, Race
from memmcl.files.failures import FULL
from memmcl.store import Store
from tasks.run.cluster import check_room
from tasks.run.leftovers import work_folder
from tasks.run.private_ray import withhold_credentials
from tasks.run.runtime import Run, open_store
from tasks.search.bench import Bench
from tasks.search.queue import Candidate, Queue, RayQueue
from tasks.search.spec import SearchSpec

RETRIES = 3
WINDOWS = 2
"""Populations that a race's hurdles are taken from."""


@dataclass(frozen=True)
class Phase:
    """One search of a course, and its core."""

    spec: SearchSpec
    core: LookAhead


Next = Callable[[Sequence[Phase]], SearchSpec | None]
"""Returns the search that follows the phases that have ended, None at the end of the course."""

Told = Callable[[SearchSpec, Proposal, Mapping[str, Any]], None]
"""Called after each result."""


@dataclass
class Course:
    """A search and what follows it, over one set of rows and experts."""

    follow: Next
    begun: Callable[[SearchSpec], None] = lambda spec: None
    """Called as a phase begins."""
    phases: list[Phase] = field(default_factory=list)
    """Those that have ended, and the one at work."""

    @property
    def core(self) -> LookAhead:
        """The core at work."""
        return self.phases[-1].core

    def advance(self, run: Run, store: Store) -> bool:
        """Start the next phases for as long as those at hand have ended; return whether one is at work."""
        while not self.phases or self.core.finished:
            spec = self.follow(self.phases)
            if spec is None:
                return False
            self.begun(spec)
            self.phases.append(Phase(spec, core_of(run, spec, store)))
        return True


class Evaluator(tune.Trainable):
    """The Tune trainable: a worker, which keeps its model and takes one candidate after the other from the queue."""

    def setup(self, config: dict[str, Any], bench: dict[str, Any] | None = None, queue: RayQueue | None = None) -> None:
        """Load the model and the experts; `bench` holds the arguments of `Bench`."""
        assert bench is not None
        assert queue is not None
        logging.getLogger("memmcl").setLevel(logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            # Tune ends its workers by SIGTERM; Ray's handler prints a traceback where it strikes in a finaliser.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        self._queue = queue
        self._specs: dict[str, SearchSpec] = {}
        self._error: str | None = None
        try:
            self._open(bench)
        except MemmclError as error:
            self._error = str(error)

    def step(self) -> dict[str, Any]:
        """Evaluate the next candidate; a worker that meets an error of ours says it, and ends."""
        if self._error is not None:
            return {"error": self._error, "done": True}
        free = time.perf_counter()
        try:
            candidate = self._queue.take(self.trial_id)
        except MemmclError as error:
            return {"error": str(error), "done": True}
        if candidate is None:
            return {"done": True}
        waited, spec = time.perf_counter() - free, self._spec(candidate["spec"])
        try:
            record = self._evaluate(spec, candidate)
        except MemmclError as error:
            return {"error": f"{spec.name}: {error}", "done": True}
        record["seconds"]["wait"] = waited
        return {"number": candidate["number"], "record": json.dumps(record)}  # Tune would flatten a dict

    def _open(self, bench: dict[str, Any]) -> None:
        self._bench = Bench(**bench)

    def _evaluate(self, spec: SearchSpec, candidate: Candidate) -> dict[str, Any]:
        hurdles = [None if hurdle is None else Hurdle(*hurdle) for hurdle in candidate["hurdles"]]
        return self._bench.evaluate(spec, candidate["genome"], hurdles)

    def _spec(self, told: str) -> SearchSpec:
        if told not in self._specs:
            self._specs[told] = SearchSpec.model_validate_json(told)
        return self._specs[told]

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the store has every result."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load: a worker that was lost is another one."""


class Multiplexer(Searcher):
    """Hands candidates of several courses to the queue, and results back to them. To Tune it suggests workers."""

    def __init__(self, run: Run, courses: Sequence[Course], told: Told, queue: Queue) -> None:
        super().__init__()
        self._run = run
        self._store = open_store(run)
        self._told = told
        self._queue = queue
        self._workers: set[str] = set()
        self._handed_out = 0
        self._open: dict[int, tuple[Phase, Proposal]] = {}
        self._losses: Counter[tuple[str, int] | None] = Counter()
        minutes = run.config.search.minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        self.error: MemmclError | None = None
        self.active = list(courses)
        self._hand_out()

    @property
    def ended(self) -> bool:
        """Whether no more is handed out."""
        return self.error is not None or not self.active

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return a worker, None while there are as many as candidates, or FINISHED."""
        if self.ended:
            return str(Searcher.FINISHED)
        if len(self._workers) >= len(self._open):
            return None
        self._workers.add(trial_id)
        return {}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store a result, tell it, and hand out what follows; of a search that failed, store and tell it."""
        if "number" in result:
            self._guarded(lambda: self._keep(result["number"], json.loads(result["record"])))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Hand out again what a worker had that was lost."""
        self._workers.discard(trial_id)
        if self.ended:
            return
        self._guarded(lambda: self._lost(trial_id, (result or {}).get("error")), first=True)

    def _guarded(self, act: Callable[[], None], first: bool = False) -> None:
        """Act, then hand out; an exception that left a callback would leave Tune in disorder."""
        try:
            if time.monotonic() > self._deadline:
                self._out_of_time()
            act()
            if self.error is None:
                self._hand_out(first)
        except MemmclError as problem:
            self.error = self.error or problem
        if self.ended:
            self._queue.close()

    def _hand_out(self, first: bool = False) -> None:
        """Hand out all that the courses have, in turn; first: before what was handed out and not taken yet."""
        self.active = [course for course in self.active if course.advance(self._run, self._store)]
        turns = deque(self.active)
        while turns:
            course = turns.popleft()
            phase = course.phases[-1]
            proposal = phase.core.next()
            if proposal is None:
                continue
            turns.append(course)
            self._handed_out += 1
            self._open[self._handed_out] = phase, proposal
            candidate = {
                "number": self._handed_out, "spec": phase.spec.model_dump_json(), "genome": list(proposal.genome),
                "hurdles": [
                    None if one is None else [one.least, one.offset] for one in phase.core.hurdles(proposal.index)
                ],
            }  # fmt: skip
            self._queue.put(candidate, first)

    def _out_of_time(self) -> None:
        """End what asks on and on; what is a list of candidates is looked at to its end."""
        for course in self.active:
            if not course.phases[-1].spec.fixed and not course.core.stopped_early:
                course.core.stop()

    def _keep(self, number: int, record: Mapping[str, Any]) -> None:
        phase, proposal = self._open.pop(number)
        del self._losses[None]
        stored = self._store.append(f"searches/{phase.spec.key}", proposal.index, record)
        if stored.get("genome") != list(proposal.genome):  # the first record stands, and says nothing of this genome
            stored = dict(record)
        phase.core.done(proposal.index, stored)
        self._told(phase.spec, proposal, stored)

    def _lost(self, worker: str, error: str | None) -> None:
        if error is not None:
            raise SearchError(error)
        number = self._queue.lost(worker)
        if number not in self._open:
            self._count(None, lambda losses: f"{losses} workers in a row were lost before they took a candidate")
            return
        phase, proposal = self._open.pop(number)
        which, name = (phase.spec.key, proposal.index), f"{phase.spec.name}: candidate {proposal.index}"
        self._count(which, lambda losses: f"{name} lost its worker {losses} times")
        phase.core.retry(proposal.index)

    def _count(self, which: tuple[str, int] | None, said: Callable[[int], str]) -> None:
        """Count a loss of a candidate, or of a worker that had none (None)."""
        self._losses[which] += 1
        if self._losses[which] > RETRIES:
            raise SearchError(
                f"{said(self._losses[which])}; look for memory limits in the Ray log, then run the same command again: "
                "nothing told is lost"
            )

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store has every record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a search resumes from its records."""


class _Ended(tune.Stopper):
    """Ends Tune, and workers that are still on their way, as soon as all searches have their results.

    Of a search that failed, workers end what they have in their hands first: it is kept.
    """

    def __init__(self, searcher: Multiplexer) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No worker ends for its results."""
        return False

    def stop_all(self) -> bool:
        """Whether all searches have their results."""
        return not self._searcher.active


def run_courses(
    run: Run, courses: Sequence[Course], bench: Mapping[str, Any], told: Told, evaluator: type[Evaluator] = Evaluator
) -> None:
    """Run all courses to their end in one Tuner; bench: the arguments of `Bench` but for the run.

    Raises:
        SearchError: a candidate cannot be evaluated, or keeps losing its worker, or there is no space left for Ray's
            own files; what was told is kept.
        ServiceError: no worker has room in the Ray cluster, nor ever will.
    """
    cfg = run.config.ray
    queue = RayQueue()
    try:
        searcher = Multiplexer(run, courses, told, queue)
        if searcher.ended:
            return
        check_room(cfg)
        _tune(cfg, searcher, tune.with_parameters(evaluator, bench={"run": run, **bench}, queue=queue))
    finally:
        queue.kill()
    if searcher.error is not None:
        raise searcher.error
    if searcher.active:
        raise SearchError("Ray Tune ended before the search did; run the same command again: nothing told is lost")


def _tune(cfg: RayConfig, searcher: Multiplexer, trainable: type[tune.Trainable]) -> None:
    resources = {"cpu": cfg.cpus_per_worker, "gpu": cfg.gpus_per_worker}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a base may be a folder relative to where the run was started
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the run, not only the search
    withhold_credentials()
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # it looks for the loggers' files
    try:
        with work_folder("tune") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                tune_config=tune.TuneConfig(search_alg=searcher, num_samples=-1, max_concurrent_trials=cfg.workers),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=str(scratch),
                    verbose=0,
                    stop=_Ended(searcher),
                    failure_config=tune.FailureConfig(max_failures=0),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            )
            tuner.fit()
    except OSError as problem:
        if problem.errno not in FULL:
            raise
        raise SearchError(
            f"no space left for Ray's own files ({problem}); free space there, or name other places as TMPDIR and "
            "RAY_TMPDIR, then run the same command again: nothing told is lost"
        ) from problem


def core_of(run: Run, spec: SearchSpec, store: Store) -> LookAhead:
    """Return a search's core, with all that an earlier process found."""
    cfg, space = run.config.search, spec.space(run)
    options = {} if spec.fixed else {"update": cfg.update, "restarts": cfg.restarts, "objectives": len(spec.objectives)}
    strategy = build_strategy(
        "random" if spec.fixed else spec.strategy, genes=space.size, bounds=space.bounds, seeds=spec.seeds,
        seed=run.seed("search", spec.name), population=cfg.population, sigma=cfg.sigma, binary=space.binary, **options,
    )  # fmt: skip
    race = Race(cfg.rungs, cfg.keep, WINDOWS * cfg.population) if cfg.rungs and not spec.fixed else None
    return LookAhead(
        strategy, budget=spec.evaluations, lookahead=cfg.lookahead, records=store.records(f"searches/{spec.key}"),
        stagnation=None if spec.fixed else cfg.stagnation, race=race,
    )  # fmt: skip
