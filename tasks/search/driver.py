"""The search driver on Ray Tune: several courses at once over shared workers, each with one resident model.

`Multiplexer` is the Tune searcher: it suggests as many workers as there is work for, puts the candidates of all courses
into the queue, and gives results back. A trial of Tune is a worker (`tasks.search.worker`).
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from prefect.logging import disable_run_logger
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import class_cache
from ray.tune.search import Searcher

from memmcl.config import RayConfig
from memmcl.errors import ConfigError, MemmclError, SearchError
from memmcl.files.failures import FULL
from memmcl.search.course import Course, Dispatcher, OnResult
from memmcl.search.problem import SearchProblem
from memmcl.urls import first_line
from tasks.run.cluster import check_nodes, check_room
from tasks.run.leftovers import work_folder
from tasks.run.ray_session import ray_session
from tasks.search.queue import RayQueue
from tasks.search.worker import Worker

RETRIES = 3
T = TypeVar("T")


class Multiplexer(Searcher):
    """Hands candidates of several courses to the queue, and results back to them. To Tune it suggests workers."""

    def __init__(self, problem: SearchProblem, courses: Sequence[Course], on_result: OnResult, queue: RayQueue) -> None:
        super().__init__()
        self._dispatcher = Dispatcher(problem, courses, on_result)
        self._queue = queue
        self._workers: set[str] = set()
        self._losses: Counter[tuple[str, int] | None] = Counter()
        self.error: MemmclError | None = None
        self._hand_out()

    @property
    def active(self) -> list[Course]:
        """The courses that have not ended."""
        return self._dispatcher.active

    @property
    def ended(self) -> bool:
        """Whether no more is handed out."""
        return self.error is not None or not self.active

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a string
        """Return a worker, None while there are as many as candidates, or FINISHED."""
        if self.ended:
            return str(Searcher.FINISHED)
        if len(self._workers) >= len(self._dispatcher.open):
            return None
        self._workers.add(trial_id)
        return {}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store a result, tell its course, and hand out what follows, unless the search has failed."""
        if "number" in result:
            self._guarded(lambda: self._keep(result["number"], json.loads(result["record"])))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Hand out again the candidate of a worker that was lost."""
        self._workers.discard(trial_id)
        if self.ended:
            return
        self._guarded(lambda: self._lost(trial_id, (result or {}).get("error")), first=True)

    def _guarded(self, act: Callable[[], None], first: bool = False) -> None:
        """Act, then hand out; an exception that leaves a callback would leave Tune in disorder."""
        try:
            act()
            if self.error is None:
                self._hand_out(first)
        except MemmclError as problem:
            self.error = self.error or problem
        if self.ended:
            self._queue.close()

    def _hand_out(self, first: bool = False) -> None:
        """Queue all that the courses have; first: before what was queued and not taken yet."""
        for number, phase, proposal in self._dispatcher.hand_out():
            candidate = {
                "number": number,
                "spec": phase.spec.model_dump_json(),
                "genome": list(proposal.genome),
                "hurdles": phase.core.hurdles(proposal.index),
            }
            self._queue.put(candidate, first)

    def _keep(self, number: int, record: dict[str, Any]) -> None:
        del self._losses[None]
        self._dispatcher.keep(number, record)

    def _lost(self, worker: str, error: str | None) -> None:
        if error is not None:
            raise SearchError(error)
        number = self._queue.lost(worker)
        if number not in self._dispatcher.open:
            self._count(None, lambda losses: f"{losses} workers in a row were lost before they took a candidate")
            return
        phase, proposal = self._dispatcher.open.pop(number)
        which, name = (phase.spec.key, proposal.index), f"{phase.spec.name}: candidate {proposal.index}"
        self._count(which, lambda losses: f"{name} lost its worker {losses} times")
        phase.core.retry(proposal.index)

    def _count(self, which: tuple[str, int] | None, message: Callable[[int], str]) -> None:
        """Count a loss of a candidate, or of a worker that had none (None)."""
        self._losses[which] += 1
        if self._losses[which] > RETRIES:
            raise SearchError(
                f"{message(self._losses[which])}; look for memory limits in the Ray log, then run the same command "
                "again: no result is lost"
            )

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store has every record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a search resumes from its records."""


class _Ended(tune.Stopper):
    """Ends Tune, and workers that are still starting, as soon as all searches have their results.

    After a failure, workers first finish the candidates that they have: their results are kept.
    """

    def __init__(self, searcher: Multiplexer) -> None:
        self._searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No worker ends for its results."""
        return False

    def stop_all(self) -> bool:
        """Whether all searches have their results."""
        return not self._searcher.active


class RayDriver:
    """Evaluates candidates on workers of the Ray session that is open, through one Tuner."""

    def __init__(self, cfg: RayConfig, worker: type[Worker] = Worker) -> None:
        self._cfg = cfg
        self._worker = worker

    @contextmanager
    def session(self, problem: SearchProblem) -> Iterator[None]:
        """Open a `ray_session`, and check that every node of a cluster has what workers need, as `check_nodes` does."""
        with ray_session(self._cfg):
            if self._cfg.address:
                with disable_run_logger():  # there is no Prefect run
                    check_nodes(self._cfg, problem.store, problem.model)
            yield

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in a process that ends with it, model and all; SearchError if it is lost repeatedly."""
        cpus, gpus = self._cfg.cpus_per_worker, self._cfg.gpus_per_worker
        caller = ray.remote(_Caller).options(num_cpus=cpus, num_gpus=gpus, max_restarts=2, max_task_retries=2)
        worker: Any = caller.remote()
        try:
            result: T = ray.get(worker.call.remote(function, *arguments))
        except (RayActorError, OutOfMemoryError) as error:
            raise SearchError(
                f"the worker that measures references was lost ({first_line(error)}); look for memory limits in the "
                "Ray log, then run the same command again"
            ) from error
        finally:
            ray.kill(worker)
        return result

    def run(self, problem: SearchProblem, courses: Sequence[Course], on_result: OnResult) -> None:
        """Run all courses to their end; see `memmcl.search.course.Driver`. The results so far are kept after an error.

        Raises:
            SearchError: a candidate fails or keeps losing its worker, or no space is left for Ray's files.
            ServiceError: no worker has room in the Ray cluster, nor ever will.
        """
        queue = RayQueue()
        try:
            searcher = Multiplexer(problem, courses, _OnlyHere(on_result), queue)
            if searcher.ended:
                return
            check_room(self._cfg)
            _tune(self._cfg, searcher, tune.with_parameters(self._worker, problem=problem, queue=queue))
        finally:
            queue.kill()
        if searcher.error is not None:
            raise searcher.error
        if searcher.active:
            raise SearchError("Ray Tune ended before the search did; run the same command again: no result is lost")


class _OnlyHere:
    """Calls `on_result` in this process; copies do nothing, as Tune makes one of the whole searcher."""

    def __init__(self, on_result: OnResult) -> None:
        self._on_result: OnResult | None = on_result

    def __call__(self, *result: Any) -> None:
        if self._on_result is not None:
            self._on_result(*result)

    def __getstate__(self) -> dict[str, None]:
        return {"_on_result": None}


class _Caller:
    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def check_store(url: str) -> None:
    """Raise a ConfigError for a store that other processes cannot see."""
    if not url.startswith(("file://", "s3://")):
        raise ConfigError(f"store.url: workers are processes of their own and cannot see {url}; use file or s3")


def _tune(cfg: RayConfig, searcher: Multiplexer, trainable: type[tune.Trainable]) -> None:
    resources = {"cpu": cfg.cpus_per_worker, "gpu": cfg.gpus_per_worker}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a base may be a folder relative to where the run was started
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the run, not only the search
    # Tune writes the environment that it hands to workers to a log that all can read. They have credentials from the
    # environment that their node was started with.
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}
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
            "RAY_TMPDIR, then run the same command again: no result is lost"
        ) from problem
