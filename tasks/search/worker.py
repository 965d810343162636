"""The Tune trainable: a trial is a worker that keeps base and experts, and takes one candidate after another."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from functools import lru_cache
from typing import Any

from ray import tune

from memmcl.errors import MemmclError
from memmcl.search.problem import SearchProblem
from memmcl.search.scorer import Scorer
from memmcl.search.spec import SearchSpec
from tasks.search.queue import Candidate, RayQueue


class Worker(tune.Trainable):
    """A worker of the search: its model stays loaded while candidates come from the queue."""

    def setup(
        self, config: dict[str, Any], problem: SearchProblem | None = None, queue: RayQueue | None = None
    ) -> None:
        """Load the model and the experts."""
        assert problem is not None and queue is not None
        logging.getLogger("memmcl").setLevel(logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            # Tune ends its workers by SIGTERM; Ray's handler prints a traceback where it strikes in a finaliser.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        self._queue = queue
        self._error: str | None = None
        try:
            self._open(problem)
        except MemmclError as error:
            self._error = str(error)

    def step(self) -> dict[str, Any]:
        """Evaluate the next candidate; a worker that meets a MemmclError reports it, and ends."""
        if self._error is not None:
            return {"error": self._error, "done": True}
        free = time.perf_counter()
        try:
            candidate = self._queue.take(self.trial_id)
        except MemmclError as error:
            return {"error": str(error), "done": True}
        if candidate is None:
            return {"done": True}
        waited, spec = time.perf_counter() - free, _spec(candidate["spec"])
        try:
            record = self._evaluate(spec, candidate)
        except MemmclError as error:
            return {"error": f"{spec.name}: {error}", "done": True}
        record["seconds"]["wait"] = waited
        return {"number": candidate["number"], "record": json.dumps(record)}  # Tune would flatten a dict

    def _open(self, problem: SearchProblem) -> None:
        self._scorer = Scorer(problem)

    def _evaluate(self, spec: SearchSpec, candidate: Candidate) -> dict[str, Any]:
        return self._scorer.evaluate(spec, candidate["genome"], candidate["hurdles"])

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the store has every result."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load: a worker that was lost is another one."""


@lru_cache(maxsize=64)
def _spec(text: str) -> SearchSpec:
    return SearchSpec.model_validate_json(text)
