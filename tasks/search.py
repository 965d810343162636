"""Merge searches on Ray Tune: several at once over shared workers, each with one resident model.

`Multiplexer` is the Tune searcher: it hands out what the look-ahead cores of all searches have queued, in turn, and
gives results back to them. Every result is in the store before a strategy hears of it, so a killed search loses only
what was in flight. `Evaluator` is the Tune trainable: one actor keeps base and experts, and takes one candidate
after another.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import tune
from ray.tune.search import Searcher

from memmcl.errors import MemmclError, SearchError
from memmcl.evaluate.scoring import Probe
from memmcl.evolve import LookAhead, Proposal, build_strategy
from memmcl.evolve.fitness import fitness, loglik_retention, retention
from memmcl.merge.build import Merger
from memmcl.merge.genome import GenomeSpace, Recipe, compose
from memmcl.store import ArtifactRef, Store
from tasks.models import make_probe, start_of, weak_values, with_start
from tasks.runtime import Run, load_adapter, open_store, read_rows, resident

STAGE_VERSION = 2
RETRIES = 3
Inner = dict[str, dict[str, tuple[float, ...]]]
"""By part of the genome, its coefficients over experts."""

Told = Callable[[int, Mapping[str, Any], int], None]
"""Called after each result with (number of the search, record, results in all searches)."""


class SearchSpec(BaseModel):
    """One search, as small JSON: what its genes stand for, what it is scored on, what is tried first."""

    model_config = ConfigDict(frozen=True)

    name: str
    key: str
    strategy: str
    parts: Inner
    subtasks: tuple[str, ...]
    seeds: tuple[tuple[str, tuple[float, ...]], ...]
    evaluations: int
    method: str = "linear"
    parameters: dict[str, float | str] = {}
    varied: tuple[tuple[str, float, float], ...] = ()
    """(name, low, high) of the method's parameters that are genes."""

    def space(self, run: Run) -> GenomeSpace:
        """Return the genome's layout."""
        low, high = run.config.search.bounds
        return GenomeSpace(tuple(self.parts), run.config.search.blocks, low, high, self.varied)

    def recipe(self, run: Run, genome: Sequence[float]) -> Recipe:
        """Return how a genome merges: its method, with the parameters that are fixed and those that are genes."""
        found = {**self.parameters, **self.space(run).decode_parameters(genome)}
        return Recipe(self.method, found, run.seed("masks"))

    def coefficients(self, run: Run, genome: Sequence[float]) -> dict[str, tuple[float, ...]]:
        """Return the coefficients over experts that a genome stands for."""
        return compose(self.space(run).decode(genome), self.parts)


class Bench:
    """What evaluates candidates: the resident model, all experts' factors, the weak rows of every subtask.

    What the experts stand on is part of every candidate, at the coefficient 1.
    """

    def __init__(self, run: Run, experts: Mapping[str, ArtifactRef], weak: Mapping[str, ArtifactRef],
                 references: Mapping[str, ArtifactRef]) -> None:  # fmt: skip
        self._run = run
        self._backbone, self._prompter = resident(run)
        self._start = start_of(run, experts)
        loaded = {name: load_adapter(run, ref) for name, ref in {**experts, **self._start}.items()}
        self._merger = Merger(self._backbone, loaded, run.config.search.blocks, pinned=list(self._start))
        self._weak = {name: read_rows(run, ref) for name, ref in weak.items()}
        store = open_store(run)
        self._reference = {
            name: json.loads(store.read(ref, "reference.json"))["expert"] for name, ref in references.items()
        }
        self._probes: dict[str, Probe] = {}

    def evaluate(self, spec: SearchSpec, genome: Sequence[float]) -> dict[str, Any]:
        """Return the record of one candidate: fitness, retention per subtask, seconds to merge and to evaluate."""
        started = time.perf_counter()
        coefficients = spec.coefficients(self._run, genome)
        whole = with_start(coefficients, self._start, self._run.config.search.blocks)
        self._merger.apply(whole, spec.recipe(self._run, genome))
        merged = time.perf_counter()
        try:
            values = {name: self._value(name) for name in spec.subtasks}
        finally:
            self._merger.reset()
        seconds = {"merge": merged - started, "evaluate": time.perf_counter() - merged}
        return {"genome": list(genome), "fitness": _json(fitness(values)), "values": values, "seconds": seconds}

    def _value(self, name: str) -> float:
        subtask, rows = self._run.subtask(name), self._weak[name]
        if name not in self._probes:
            self._probes[name] = make_probe(self._run, self._backbone, self._prompter, subtask, rows)
        probe, reference = self._probes[name], self._reference[name]
        if self._run.config.search.fitness == "loglik":
            return loglik_retention(probe.gold_logprob(), reference["loglik"])
        return retention(weak_values(self._run, probe, subtask, rows)["score"] or 0.0, reference["score"])


class Evaluator(tune.Trainable):
    """The Tune trainable: a worker that keeps its model from one candidate to the next."""

    def setup(self, config: dict[str, Any], bench: dict[str, Any] | None = None) -> None:
        """Load the model and the experts; `bench` holds the arguments of `Bench` and the search specs."""
        assert bench is not None
        logging.getLogger("memmcl").setLevel(logging.WARNING)
        if threading.current_thread() is threading.main_thread():
            # Tune ends its workers by SIGTERM; Ray's handler prints a traceback where it strikes in a finaliser.
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        self._config = config
        self._specs: list[SearchSpec] = bench["specs"]
        self._error: str | None = None
        try:
            self._bench = Bench(bench["run"], bench["experts"], bench["weak"], bench["references"])
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
                record = self._bench.evaluate(self._specs[self._config["search"]], self._config["genome"])
            except MemmclError as error:
                self._error = str(error)
            else:
                record["seconds"]["wait"] = max(0.0, started - self._config["asked"])
                return {"record": json.dumps(record), "done": True}  # Tune would flatten a dict
        return {"error": self._error, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to save: the store has every result."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load: a retried candidate starts over."""


class Multiplexer(Searcher):
    """Hands candidates of several searches to Tune, and results back to them."""

    def __init__(self, cores: Sequence[LookAhead], specs: Sequence[SearchSpec], store: Store,
                 told: Told) -> None:  # fmt: skip
        super().__init__()
        self._cores = list(cores)
        self._specs = list(specs)
        self._store = store
        self._told = told
        self._turn = 0
        self._open: dict[str, tuple[int, Proposal]] = {}
        self._losses: dict[tuple[int, int], int] = {}
        self.error: MemmclError | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next candidate, None to wait for results, or FINISHED."""
        if self.error is not None or all(core.finished for core in self._cores):
            return Searcher.FINISHED
        for _ in self._cores:
            number = self._turn % len(self._cores)
            self._turn += 1
            proposal = self._cores[number].next()
            if proposal is not None:
                self._open[trial_id] = (number, proposal)
                return {"search": number, "genome": list(proposal.genome), "asked": time.time()}
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Store the result, then tell it; a candidate whose worker died goes out again."""
        number, proposal = self._open.pop(trial_id)
        record = (result or {}).get("record")
        try:
            if record is not None:
                self._keep(number, proposal, json.loads(record))
            elif result is not None and result.get("error"):
                self.error = SearchError(f"{self._specs[number].name}: {result['error']}")
            else:
                self._lost(number, proposal)
        except MemmclError as problem:  # an exception in here would stop Tune from reusing its workers
            self.error = problem

    def _keep(self, number: int, proposal: Proposal, record: Mapping[str, Any]) -> None:
        spec, core = self._specs[number], self._cores[number]
        stored = self._store.append(f"searches/{spec.key}", proposal.index, record)
        core.done(proposal.index, stored)
        self._told(number, stored, sum(len(core.records) for core in self._cores))

    def _lost(self, number: int, proposal: Proposal) -> None:
        losses = self._losses.get((number, proposal.index), 0) + 1
        self._losses[number, proposal.index] = losses
        if losses > RETRIES:
            raise SearchError(
                f"{self._specs[number].name}: candidate {proposal.index} lost its worker {losses} times; "
                "look for memory limits in the Ray log, then run the same command again: nothing told is lost"
            )
        self._cores[number].retry(proposal.index)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: a candidate has one result, and it completes the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store has every record."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: a search resumes from its records."""


def run_searches(
    run: Run,
    specs: Sequence[SearchSpec],
    experts: Mapping[str, ArtifactRef],
    weak: Mapping[str, ArtifactRef],
    references: Mapping[str, ArtifactRef],
    told: Told,
) -> list[LookAhead]:
    """Run all searches to their end in one Tuner and return their cores, finished.

    Raises:
        SearchError: a candidate cannot be evaluated, or keeps losing its worker; what was told is kept.
    """
    store = open_store(run)
    cores = [_core(run, spec, store) for spec in specs]
    if all(core.finished for core in cores):
        return cores
    cfg = run.config.ray
    searcher = Multiplexer(cores, specs, store, told)
    bench = {
        "run": run,
        "specs": list(specs),
        "experts": dict(experts),
        "weak": dict(weak),
        "references": dict(references),
    }
    trainable = tune.with_parameters(Evaluator, bench=bench)
    resources = {"cpu": cfg.cpus_per_worker, "gpu": cfg.gpus_per_worker}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the run, not only the search
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # it looks for the loggers' files
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
    if searcher.error is not None:
        raise searcher.error
    if not all(core.finished for core in cores):
        raise SearchError("Ray Tune ended before the search did; run the same command again: nothing told is lost")
    return cores


def _core(run: Run, spec: SearchSpec, store: Store) -> LookAhead:
    cfg, space = run.config.search, spec.space(run)
    strategy = build_strategy(
        spec.strategy, genes=space.size, bounds=space.bounds, seeds=spec.seeds,
        seed=run.seed("search", spec.name), population=cfg.population, sigma=cfg.sigma,
    )  # fmt: skip
    records = store.records(f"searches/{spec.key}")
    return LookAhead(strategy, budget=spec.evaluations, lookahead=cfg.lookahead, records=records)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
