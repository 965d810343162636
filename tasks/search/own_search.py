"""The merge search on adapters and weak rows that a user brings: the pipeline's own, on artifacts made of them.

Adapters and rows are published as the kinds that the pipeline makes, so that the same searcher, the same workers and
the same records serve both. A search that was killed goes on when it is asked for again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.logging import disable_run_logger

from memmcl.adapters.load import Brought
from memmcl.backbone.load import BaseRef, resolve_device, resolve_dtype
from memmcl.backbone.shapes import Shapes
from memmcl.config import RunConfig
from memmcl.errors import ConfigError
from memmcl.evolve import Proposal, seed_genomes
from memmcl.merge.build import lowest_layer
from memmcl.merge.table import check_search
from memmcl.store import ArtifactRef, Lease, Store, cache_key
from memmcl.suite.examples import to_table
from memmcl.suite.splits import digest_of
from memmcl.suite.subtasks import Pairs
from memmcl.suite.weak import WeakRows
from tasks.run.cluster import check_nodes
from tasks.run.journal import standing
from tasks.run.runtime import Base, open_store, resident_prompter
from tasks.run.session import ray_session
from tasks.search.driver import Told, run_courses
from tasks.search.own_references import BASE, OwnRun, measure_references, reference_ref
from tasks.search.plans import Plan, make_spec
from tasks.search.spec import Inner, SearchSpec

STAGE_VERSION = 1
NAME = "own"
"""What the search is called, in the store and as a seed."""
Refs = dict[str, ArtifactRef]
Say = Callable[[str], None]


@dataclass(frozen=True)
class OwnSearch:
    """One search, planned: its artifacts are in the store, but for references and result.

    held_to: by name of the rows, the models of which the best is the unit of retention. rows: how many, in all.
    """

    run: OwnRun
    plan: Plan
    experts: Refs
    weak: Refs
    references: Refs
    held_to: dict[str, tuple[str, ...]]
    rows: int

    @property
    def spec(self) -> SearchSpec:
        """What is searched."""
        return self.plan.first

    @property
    def store(self) -> Store:
        """The store."""
        return open_store(self.run)

    @property
    def standing(self) -> dict[str, Any]:
        """How far it is, in whatever process; see `tasks.run.journal.standing`."""
        return standing(self.store.records(f"searches/{self.spec.key}"))

    def document(self) -> dict[str, Any] | None:
        """Return what the search found, None where it is not done."""
        found = self.store.find("search", self.plan.key)
        return None if found is None else dict(json.loads(self.store.read(found, "search.json")))

    def measured(self) -> dict[str, dict[str, Any]]:
        """Return, by name of the rows, which model they are held to, and its values."""
        return {name: json.loads(self.store.read(ref, "reference.json")) for name, ref in self.references.items()}


class _Here:
    """Calls `told` in this process; a copy of it, as Tune makes one of the whole searcher, tells nobody."""

    def __init__(self, told: Told) -> None:
        self._told: Told | None = told

    def __call__(self, spec: SearchSpec, proposal: Proposal, record: Mapping[str, Any]) -> None:
        if self._told is not None:
            self._told(spec, proposal, record)

    def __getstate__(self) -> dict[str, None]:
        return {"_told": None}


def plan_search(
    config: RunConfig, store: Store, base: BaseRef, shapes: Shapes, experts: Sequence[Brought],
    weak: Sequence[WeakRows], evaluations: int, command: str,
) -> OwnSearch:  # fmt: skip
    """Publish adapters and rows, and return the search of one coefficient per expert and layer block.

    Raises:
        MemmclError: settings that do not go together, or rows that do not fit into a prompt.
    """
    cfg = config.search
    if not store.url.startswith(("file://", "s3://")):
        raise ConfigError(f"store.url: workers are processes of their own and cannot see {store.url}; use file or s3")
    check_search(cfg.method, cfg.parameters, cfg.genes, cfg.bounds[0])
    if any(expert.name == BASE for expert in experts):
        raise ConfigError(f"{BASE} is what the base itself is called; give the expert another name")
    asked = {rows.name: rows.subtask for rows in weak}
    if any(isinstance(subtask, Pairs) for subtask in asked.values()) and {"metric", "agree"} & set(cfg.weights):
        raise ConfigError(
            "search.fitness: pairs of prompt and answer have no metric, and no labels to agree on; use loglik, or "
            "rows of subtasks"
        )
    nobodys = [found.name for found in weak if found.expert is None]
    if "agree" in cfg.weights and nobodys:
        raise ConfigError(
            f"search.fitness: agree holds rows to what one expert expects, and rows of {', '.join(nobodys)} name none; "
            'call an expert like the subtask, or give rows an "expert"'
        )
    run = OwnRun(
        id=NAME,
        config=config,
        base=_base(config, base, shapes, experts),
        store=store.spec,
        command=command,
        asked=asked,
    )
    _check_prompts(run, weak)
    names = [expert.name for expert in experts]
    brought = {expert.name: _publish_expert(store, expert) for expert in experts}
    rows = {found.name: _publish_rows(store, found) for found in weak}
    held_to = {found.name: (found.expert,) if found.expert else (BASE, *names) for found in weak}
    references = {name: reference_ref(run, name, models, brought, rows[name]) for name, models in held_to.items()}
    inputs = [refs[name] for refs in (brought, rows, references) for name in sorted(refs)]
    parts: Inner = {name: {name: (1.0,) * cfg.blocks} for name in names}
    seeds = seed_genomes(names, cfg.blocks, cfg.bounds, cfg.lambdas)
    spec = make_spec(run, NAME, parts, sorted(asked), seeds, evaluations, inputs)
    count = sum(len(found.rows) for found in weak)
    return OwnSearch(run, Plan(run, spec, inputs), brought, rows, references, held_to, count)


def run_search(search: OwnSearch, told: Told, say: Say) -> dict[str, Any]:
    """Run the search to its end, or find it done, and return its document; what was told before is not done again.

    Raises:
        MemmclError: a candidate cannot be evaluated, or another process is at work on the same search.
    """
    done = search.document()
    if done is not None:
        return done
    run, started = search.run, time.perf_counter()
    with Lease(search.store, search.spec.key, {}), ray_session(run.config.ray):
        if run.config.ray.address:
            with disable_run_logger():  # there is no Prefect run
                check_nodes(run)
        say("measuring what rows are held to")
        measure_references(run, search.held_to, search.references, search.experts, search.weak)
        say("searching")
        course = search.plan.course()
        bench = {"experts": search.experts, "weak": search.weak, "references": search.references, "selection": {}}
        run_courses(run, [course], bench, _Here(told))
        search.plan.publish(course.phases, time.perf_counter() - started)
    found = search.document()
    assert found is not None, "it was just published"
    return found


def _base(config: RunConfig, base: BaseRef, shapes: Shapes, experts: Sequence[Brought]) -> Base:
    device = resolve_device(config.model.device, config.ray.gpus_per_worker)
    local = Path(base.name).expanduser()
    return Base(
        name=str(local.absolute()) if local.exists() else base.name,  # Tune's workers work in folders of their own
        digest=base.digest, licence=shapes.licence, device=device,
        dtype=resolve_dtype(config.model.dtype, device), layers=shapes.layers,
        split=lowest_layer([expert.factors for expert in experts]),
    )  # fmt: skip


def _check_prompts(run: OwnRun, weak: Sequence[WeakRows]) -> None:
    """Find rows that no prompt has room for before any worker starts."""
    prompter = resident_prompter(run)
    for found in weak:
        if isinstance(found.subtask, Pairs):
            for row in found.rows:
                prompter.prompt(found.subtask, row)
        else:
            prompter.check(found.subtask)


def _publish_expert(store: Store, expert: Brought) -> ArtifactRef:
    config = {"brought": expert.digests, "name": expert.name}  # whose name is in the genome, and seeds its masks
    return _published(store, "expert", f"expert {expert.name}", {**expert.files}, config)


def _publish_rows(store: Store, weak: WeakRows) -> ArtifactRef:
    config = {"brought": digest_of(weak.rows, weak.subtask), "name": weak.name, "rows": len(weak.rows)}
    return _published(store, "split", f"{weak.name} weak", {"rows.parquet": to_table(weak.rows)}, config)


def _published(
    store: Store, kind: str, name: str, files: Mapping[str, bytes], config: Mapping[str, Any]
) -> ArtifactRef:
    key = cache_key(kind, inputs=(), config=config, stage_version=STAGE_VERSION, seed=0)
    found = store.find(kind, key)
    return (
        ArtifactRef(kind=kind, key=key, name=name)
        if found
        else store.publish(kind, key, name=name, files=files, config=config, stage_version=STAGE_VERSION).ref
    )
