"""Merge searches on Ray Tune: several at once over shared workers, each with one resident model.

`Course` is one search with what follows it (a joint search, the decision between finalists), phase by phase.
`Multiplexer` is the Tune searcher: it hands out what the look-ahead cores of all courses have queued, in turn, and
gives results back to them. Every result is in the store before a strategy hears of it, so a killed search loses only
what was in flight. `Evaluator` is the Tune trainable: one actor keeps base and experts, and takes one candidate
after another.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from memmcl.errors import MemmclError, SearchError
from memmcl.evolve import LookAhead, Proposal, build_strategy
from memmcl.evolve.racing import Hurdle, Race
from memmcl.outside import FULL
from memmcl.store import Store
from tasks.bench import Bench
from tasks.cluster import check_room
from tasks.runtime import Run, open_store
from tasks.spec import SearchSpec

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
    """The Tune trainable: a worker that keeps its model from one candidate to the next."""

    def setup(self, config: dict[str, Any], bench: dict[str, Any] | None = None) -> None:
        """Load the model and the experts; `bench` holds the arguments of `Bench`."""
        assert bench is not None
        logging.getLogger("memmcl").setLevel(logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            # Tune ends its workers by SIGTERM; Ray's handler prints a traceback where it strikes in a finaliser.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        self._config = config
        self._specs: dict[str, SearchSpec] = {}
        self._error: str | None = None
        try:
            self._bench = Bench(**bench)
        except MemmclError as error:
            self._error = str(error)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next candidate without starting anew."""
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Evaluate the candidate of the present configuration."""
        if self._error is None:
            started = time.time()
            try:
                record = self._bench.evaluate(self._spec(), self._config["genome"], self._hurdles())
            except MemmclError as error:
                self._error = str(error)
            else:
                record["seconds"]["wait"] = max(0.0, started - self._config["asked"])
                return {"record": json.dumps(record), "done": True}  # Tune would flatten a dict
        return {"error": self._error, "done": True}

    def _spec(self) -> SearchSpec:
        told: str = self._config["spec"]
        if told not in self._specs:
            self._specs[told] = SearchSpec.model_validate_json(told)
        return self._specs[told]

    def _hurdles(self) -> list[Hurdle | None]:
        return [None if hurdle is None else Hurdle(*hurdle) for hurdle in json.loads(self._config["hurdles"])]

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the store has every result."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load: a retried candidate starts over."""


class Multiplexer(Searcher):
    """Hands candidates of several courses to Tune, and results back to them."""

    def __init__(self, run: Run, courses: Sequence[Course], told: Told) -> None:
        super().__init__()
        self._run = run
        self._store = open_store(run)
        self._courses = list(courses)
        self._told = told
        self._turn = 0
        self._open: dict[str, tuple[Phase, Proposal]] = {}
        self._losses: dict[tuple[str, int], int] = {}
        minutes = run.config.search.minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        self.error: MemmclError | None = None
        self.active = [course for course in self._courses if course.advance(run, self._store)]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next candidate, None to wait for results, or FINISHED."""
        try:
            return self._next(trial_id)
        except MemmclError as problem:
            self.error = problem
            return str(Searcher.FINISHED)

    def _next(self, trial_id: str) -> dict[str, Any] | str | None:
        if time.monotonic() > self._deadline:
            self._out_of_time()
        self.active = [course for course in self.active if course.advance(self._run, self._store)]
        if self.error is not None or not self.active:
            return str(Searcher.FINISHED)
        for _ in self.active:
            phase = self.active[self._turn % len(self.active)].phases[-1]
            self._turn += 1
            proposal = phase.core.next()
            if proposal is not None:
                self._open[trial_id] = (phase, proposal)
                hurdles = [
                    None if one is None else [one.least, one.offset] for one in phase.core.hurdles(proposal.index)
                ]
                return {
                    "spec": phase.spec.model_dump_json(), "genome": list(proposal.genome),
                    "hurdles": json.dumps(hurdles), "asked": time.time(),
                }  # fmt: skip
        return None

    def _out_of_time(self) -> None:
        """End what asks on and on; what is a list of candidates is looked at to its end."""
        for course in self.active:
            if not course.phases[-1].spec.fixed and not course.core.stopped_early:
                course.core.stop()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Store the result, then tell it; a candidate whose worker died goes out again."""
        phase, proposal = self._open.pop(trial_id)
        record = (result or {}).get("record")
        try:
            if record is not None:
                self._keep(phase, proposal, json.loads(record))
            elif result is not None and result.get("error"):
                self.error = SearchError(f"{phase.spec.name}: {result['error']}")
            else:
                self._lost(phase, proposal)
        except MemmclError as problem:  # an exception in here would stop Tune from reusing its workers
            self.error = problem

    def _keep(self, phase: Phase, proposal: Proposal, record: Mapping[str, Any]) -> None:
        stored = self._store.append(f"searches/{phase.spec.key}", proposal.index, record)
        phase.core.done(proposal.index, stored)
        self._told(phase.spec, proposal, stored)

    def _lost(self, phase: Phase, proposal: Proposal) -> None:
        losses = self._losses.get((phase.spec.key, proposal.index), 0) + 1
        self._losses[phase.spec.key, proposal.index] = losses
        if losses > RETRIES:
            raise SearchError(
                f"{phase.spec.name}: candidate {proposal.index} lost its worker {losses} times; "
                "look for memory limits in the Ray log, then run the same command again: nothing told is lost"
            )
        phase.core.retry(proposal.index)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a candidate has one result, and it completes the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store has every record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a search resumes from its records."""


def run_courses(
    run: Run, courses: Sequence[Course], bench: Mapping[str, Any], told: Told, evaluator: type[Evaluator] = Evaluator
) -> None:
    """Run all courses to their end in one Tuner; bench: the arguments of `Bench` but for the run.

    Raises:
        SearchError: a candidate cannot be evaluated, or keeps losing its worker, or there is no space left for Ray's
            own files; what was told is kept.
        ServiceError: no worker has room in the Ray cluster, nor ever will.
    """
    searcher = Multiplexer(run, courses, told)
    if not searcher.active:
        return
    cfg = run.config.ray
    check_room(cfg)
    trainable = tune.with_parameters(evaluator, bench={"run": run, **bench})
    resources = {"cpu": cfg.cpus_per_worker, "gpu": cfg.gpus_per_worker}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a base may be a folder relative to where the run was started
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the run, not only the search
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # it looks for the loggers' files
    try:
        with tempfile.TemporaryDirectory(prefix="memmcl-tune-") as scratch:
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                tune_config=tune.TuneConfig(
                    search_alg=searcher, num_samples=-1, max_concurrent_trials=cfg.workers, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=scratch,
                    verbose=0,
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
    if searcher.error is not None:
        raise searcher.error
    if any(course.advance(run, open_store(run)) for course in courses):
        raise SearchError("Ray Tune ended before the search did; run the same command again: nothing told is lost")


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
