"""What every task needs: the run it works for, the store, the resident model, and the rule of reuse."""

from __future__ import annotations

import ctypes
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger
from prefect.states import Completed, State
from pydantic import BaseModel, ConfigDict

from memmcl import seeds
from memmcl.adapters import format as adapter
from memmcl.backbone.activations import Activations, activations_directory
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, check_device, load_base, load_tokenizer, resolve_base
from memmcl.config import RunConfig, parse_config
from memmcl.errors import CorruptArtifact, MemmclError, ModelError, StoreAccessError
from memmcl.store import ArtifactRef, Closure, Manifest, Store, cache_key
from memmcl.suite.examples import Example, from_table
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import Subtask
from memmcl.urls import redacted
from tasks.run.inputs import catalogue
from tasks.run.journal import Pinned
from tasks.ui.logs import clean_logs

Files = Mapping[str, bytes | Path]


clean_logs()  # Ray's workers import this module before they run anything


class Base(BaseModel):
    """The base model as every worker must find it: digest, and how it is run."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    licence: str | None
    dtype: str
    device: str
    layers: int
    split: int


class Run(BaseModel):
    """One run, as small JSON that travels to every task."""

    model_config = ConfigDict(frozen=True)

    id: str
    config: RunConfig
    base: Base
    store: dict[str, str | None]
    command: str
    rows: str = ""
    """Digest of the rows that the run was opened with, anchor rows included."""
    pinned: Pinned = Pinned()

    def subtask(self, name: str) -> Subtask:
        """Return a subtask of this run: of the catalogue, or the user's own."""
        return catalogue(self.config)[name]

    def seed(self, *names: str | int) -> int:
        """Return the seed of a named piece of this run."""
        return seeds.derive(self.config.seed, *names)

    def model_key(self) -> dict[str, Any]:
        """Return what the numbers of every stage depend on: weights, type, device, split, prompt length."""
        return {
            **self.base.model_dump(include={"digest", "dtype", "device", "split"}),
            "max_prompt_tokens": self.config.data.max_prompt_tokens,
        }


def worth_retrying(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Tell Prefect whether a failed task run may do better the next time: our own errors would come again."""
    try:
        state.result()
    except StoreAccessError:
        return True
    except MemmclError:
        return False
    except Exception:
        return True
    return False


def open_store(run: Run) -> Store:
    """Return the run's store; one connection per process."""
    return _store(tuple(sorted(run.store.items())))


@lru_cache(maxsize=4)
def _store(spec: tuple[tuple[str, str | None], ...]) -> Store:
    return Store.from_spec(dict(spec))


def resident(run: Run) -> tuple[Backbone, Prompter]:
    """Return the base model and the prompter, loaded once per process.

    Whoever changes the backbone's weights puts them back before returning.
    """
    return _resident(*_residence(run)), resident_prompter(run)


def resident_activations(run: Run) -> Activations:
    """Return the trunk's activations of the resident model, in this process's memory and on this machine's disk."""
    return _activations(*_residence(run))


def resident_prompter(run: Run) -> Prompter:
    """Return the prompter without loading the model."""
    return _prompter(run.base, run.config.model.revision, run.config.data.max_prompt_tokens)


def _residence(run: Run) -> tuple[Base, str | None, int]:
    return run.base, run.config.model.revision, max(1, int(run.config.ray.cpus_per_worker))


@lru_cache(maxsize=1)
def _resident(base: Base, revision: str | None, threads: int) -> Backbone:
    import torch

    torch.set_num_threads(threads)
    found = _found(base, revision)
    tokenizer = load_tokenizer(found)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Backbone(load_base(found, base.dtype, check_device(base.device)), pad, base.split)


@lru_cache(maxsize=1)
def _activations(base: Base, revision: str | None, threads: int) -> Activations:
    backbone = _resident(base, revision, threads)
    return Activations(backbone, activations_directory(_found(base, revision), backbone))


@lru_cache(maxsize=1)
def _prompter(base: Base, revision: str | None, max_tokens: int) -> Prompter:
    return Prompter(load_tokenizer(_found(base, revision)), max_tokens)


@lru_cache(maxsize=1)
def _found(base: Base, revision: str | None) -> BaseRef:
    return find_base(base, revision)


def reopen(store: Store, done: Manifest) -> tuple[Run, dict[str, ArtifactRef], tuple[str, ...]]:
    """Return a finished run as it was, on this store; its artifacts by `kind:name`; its curriculum's order."""
    results = json.loads(store.read(done, "results.json"))
    run = Run(
        id=done.key,
        config=parse_config(redacted(results["run"]["config"]), f"run {done.key[:8]}"),
        base=Base.model_validate_json(store.read(done, "base.json")),
        store=store.spec,
        command=results["run"]["command"],
    )
    order = tuple(entry["name"] for entry in results["subtasks"])
    return run, {f"{ref.kind}:{ref.name}": ref for ref in done.inputs}, order


def release_memory() -> None:
    """Give freed memory back to the system: activations of many lengths leave the heap in pieces (glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def find_base(base: Base, revision: str | None) -> BaseRef:
    """Find the base on this machine, and make sure that it is the one the run was started with."""
    found = resolve_base(base.name, revision)
    if found.digest != base.digest:
        raise ModelError(
            f"{base.name} has the digest {found.digest[:12]} here, the run was started with {base.digest[:12]}; "
            "put the same model on every machine, or start a new run"
        )
    return found


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
    """Return the artifact of a stage: from the store if it is there and whole, else made and published.

    The key is the digest of the inputs, of `config` (what the stage reads) and of `stage_version`, so a rerun after
    any crash repeats nothing that was published. The state is called Reused or Completed accordingly.
    """
    store = open_store(run)
    key = cache_key(kind, inputs=inputs, config=config, stage_version=stage_version, seed=run.config.seed)
    found = store.find(kind, key)
    if found is not None:
        log().info("%s: in the store, reused", name)
        return Completed(name="Reused", message=f"{found.ref} was in the store", data=found.ref)
    started = time.perf_counter()
    files, metrics = make()
    seconds = time.perf_counter() - started
    manifest = store.publish(
        kind, key, name=name, files=files, inputs=inputs, config=config, seed=run.config.seed,
        stage_version=stage_version, seconds=seconds, metrics=metrics,
    )  # fmt: skip
    log().info("%s: done in %.0f s", name, manifest.seconds)
    return Completed(message=f"{manifest.ref} made in {seconds:.0f} s", data=manifest.ref)


def closure_of(store: Store, run_id: str) -> Closure:
    """Return all that a finished run is made of, and what of it is damaged.

    Anchor rows and warm start that it took over from an earlier run are among it; the rows that those were made from
    are the earlier run's own.
    """
    return store.closure("run", run_id, leaves=("anchors", "warm"))


def lost(run: Run, pinned: ArtifactRef) -> CorruptArtifact:
    """Return the error to raise where something that an earlier run made is damaged, and this one cannot make it."""
    return CorruptArtifact(
        f"{pinned}, which an earlier run made, is damaged in {run.store['url']}, and the rows of now make another one; "
        "mend that run by `memmcl store verify --repair`, or start anew by `memmcl run`"
    )


def log() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Return the logger of the Prefect run, which shows in its UI."""
    return get_run_logger()


def read_rows(run: Run, ref: ArtifactRef) -> list[Example]:
    """Return the rows of a split."""
    return from_table(open_store(run).read(ref, "rows.parquet"))


def load_adapter(run: Run, ref: ArtifactRef) -> dict[str, adapter.Factors]:
    """Return the factors of a trained adapter."""
    manifest = load_manifest(run, ref)
    store = open_store(run)
    return adapter.from_files(store.read(manifest, adapter.WEIGHTS_FILE), store.read(manifest, adapter.CONFIG_FILE))


def load_manifest(run: Run, ref: ArtifactRef) -> Manifest:
    """Return the manifest of an artifact."""
    return open_store(run).load(ref)
