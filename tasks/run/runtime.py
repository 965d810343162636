"""What every task needs: the run, its store, and the rule of reuse."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from pydantic import BaseModel

from memmcl import seeds
from memmcl.adapters.format import Adapter
from memmcl.adapters.load import load_published
from memmcl.backbone.resident import Base, ModelSpec
from memmcl.config import RunConfig
from memmcl.errors import CorruptArtifact, MemmclError, StoreAccessError
from memmcl.search.problem import store_at
from memmcl.store import ArtifactRef, Manifest, StageSettings, Store, cache_key
from memmcl.suite.configured import catalogue
from memmcl.suite.examples import Example, from_table
from memmcl.suite.subtasks import Subtask
from tasks.run.journal import Pinned
from tasks.ui.logs import clean_logs, log
from tasks.ui.updates import Update, announce, working

Files = Mapping[str, bytes | Path]
P = ParamSpec("P")
T = TypeVar("T")


clean_logs()  # Ray's workers import this module before they run anything


class Run(BaseModel, frozen=True):
    """One run, as small JSON that travels to every task."""

    id: str
    config: RunConfig
    base: Base
    store: dict[str, str | None]
    command: str
    rows: str = ""
    """Digest of the rows that the run was opened with, anchor rows included."""
    pinned: Pinned = Pinned()

    def subtask(self, name: str) -> Subtask:
        """Return a subtask of this run: of the catalogue, or one that the user defines."""
        return catalogue(self.config)[name]

    def seed(self, *names: str | int) -> int:
        """Return the seed of a named piece of this run."""
        return seeds.derive(self.config.seed, *names)

    @property
    def model(self) -> ModelSpec:
        """The base model, and how a worker runs it."""
        cfg = self.config
        threads = max(1, int(cfg.ray.cpus_per_worker))
        return ModelSpec(
            base=self.base, revision=cfg.model.revision, threads=threads, max_prompt_tokens=cfg.data.max_prompt_tokens
        )


def worth_retrying(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Return whether a failed task run may succeed at a second try: a MemmclError would come again."""
    try:
        state.result()
    except Exception as error:
        return isinstance(error, StoreAccessError) or not isinstance(error, MemmclError)
    return False


def stage_task(
    name: str, *, run_name: str | None = None, retries: int = 0
) -> Callable[[Callable[P, State[T]]], Task[P, T]]:
    """Return the decorator of a Prefect task that returns its final state, whose data goes to the tasks that follow.

    run_name: of its task runs, with its parameters in braces; None: its name.
    """
    decorator = task(
        name=name,
        task_run_name=run_name or name,
        cache_policy=NO_CACHE,
        retries=retries,
        retry_condition_fn=worth_retrying,
    )
    return cast("Callable[[Callable[P, State[T]]], Task[P, T]]", decorator)


def open_store(run: Run) -> Store:
    """Return the run's store; one connection per process."""
    return store_at(run.store)


def reopen(store: Store, done: Manifest) -> tuple[Run, dict[str, ArtifactRef], tuple[str, ...]]:
    """Return a finished run with this store; its artifacts by `kind:name`; the order of its curriculum."""
    from memmcl.api.runs import FinishedRun  # not in every worker

    one = FinishedRun(store, done)
    run = Run(id=one.id, config=one.config, base=one.base, store=store.spec, command=one.results.run.command)
    return run, one.artifacts, one.order


def release_memory() -> None:
    """Give freed memory back to the system: activations of many lengths leave the heap in pieces (glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def reuse_or_make(
    run: Run,
    kind: str,
    *,
    name: str,
    inputs: Sequence[ArtifactRef],
    config: Mapping[str, Any],
    stage_version: int,
    make: Callable[[], tuple[Files, Mapping[str, Any]]],
) -> State[ArtifactRef]:
    """Return the artifact of a stage: from the store if it is there and whole, else from `make`, and published.

    Its key is the digest of the inputs, of `config` (the settings that the stage reads) and of `stage_version`, so a
    rerun repeats nothing that was published. The state is called Reused or Completed.
    """
    store = open_store(run)
    key = cache_key(kind, inputs=inputs, config=config, stage_version=stage_version, seed=run.config.seed)
    stored = store.find(kind, key)
    if stored is not None:
        log().info("%s: in the store, reused", name)
        announce(Update(name, kind, "reused"))
        return Completed(name="Reused", message=f"{stored.ref} was in the store", data=stored.ref)
    started = time.perf_counter()
    with working(name, kind):
        files, metrics = make()
        manifest = store.publish(
            kind,
            key,
            name=name,
            files=files,
            inputs=inputs,
            settings=StageSettings(config, run.config.seed, stage_version),
            seconds=time.perf_counter() - started,
            metrics=metrics,
        )
    log().info("%s: done in %.0f s", name, manifest.seconds)
    return Completed(message=f"{manifest.ref} made in {manifest.seconds:.0f} s", data=manifest.ref)


def publish_once(run: Run, kind: str, key: str, *, files: Callable[[], Files], **manifest: Any) -> ArtifactRef:
    """Return the artifact with this key, published unless it is in the store. manifest: see `Store.publish`."""
    store = open_store(run)
    return (store.find(kind, key) or store.publish(kind, key, files=files(), **manifest)).ref


def cannot_remake(run: Run, pinned: ArtifactRef) -> CorruptArtifact:
    """Return the error for a damaged artifact of an earlier run that this run's rows cannot make again."""
    return CorruptArtifact(
        f"{pinned}, which an earlier run made, is damaged in {run.store['url']}, and rows of today make another; "
        "repair that run by `memmcl store verify --repair`, or start anew by `memmcl run`"
    )


def read_rows(run: Run, ref: ArtifactRef) -> list[Example]:
    """Return the rows of a split."""
    return from_table(open_store(run).read(ref, "rows.parquet"))


def load_adapter(run: Run, ref: ArtifactRef) -> Adapter:
    """Return the LoRA factors of a trained adapter."""
    return load_published(open_store(run), ref)
