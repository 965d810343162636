"""Trained experts of the lab as artifacts of a store, so that the product's own bench and plans search their merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import WARM, Lab
from tasks.search.bench import Bench

from memmcl import seeds
from memmcl.adapters.format import Adapter, to_files
from memmcl.backbone.load import read_layers, resolve_base
from memmcl.backbone.resident import Base
from memmcl.config import RunConfig, parse_config
from memmcl.evolve import Proposal
from memmcl.search.plan import SearchPlan
from memmcl.store import ArtifactRef, Store
from memmcl.suite.examples import to_table
from tasks.run.runtime import Run, open_store, read_rows
from tasks.search.driver import Phase
from tasks.stages.merge import Grounds
from tasks.stages.references import DOCUMENT, measure_rows

Refs = dict[str, ArtifactRef]
Told = Callable[[Phase, Proposal, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Ground:
    """What searches stand on. weak, selection: how many weak rows there are of each kind."""

    lab: Lab
    tree: dict[str, Any]
    store: Store
    grounds: Grounds

    def run(self, search: Mapping[str, Any], seed: int = 0) -> Run:
        """Return a run with these settings of the search."""
        tree = {**self.tree, "search": {**self.tree.get("search", {}), **search}, "seed": seed}
        return run_of(parse_config(tree), self.lab, self.store)

    def search(self, plan: SearchPlan, told: Told | None = None) -> Sequence[Phase]:
        """Carry a plan out in this process, and return its phases."""
        store, course = open_store(plan.run), plan.course()
        bench = Bench(plan.run, **self.grounds.bench())
        try:
            while course.advance(plan.run, store):
                phase = course.phases[-1]
                proposal = phase.core.next()
                assert proposal is not None, "one process evaluates one candidate after the other"
                record = bench.evaluate(phase.spec, proposal.genome, phase.core.hurdles(proposal.index))
                phase.core.done(proposal.index, record)
                if told is not None:
                    told(phase, proposal, record)
        finally:
            bench.close()
        return course.phases


def run_of(config: RunConfig, lab: Lab, store: Store) -> Run:
    """Return a run of the lab's base."""
    found = resolve_base(config.model.name_or_path)
    base = Base(
        name=found.name,
        digest=found.digest,
        licence=None,
        device=lab.device,
        dtype=lab.dtype,
        layers=read_layers(found),
        split=lab.backbone.split,
    )
    return Run(id="benchmark", config=config, base=base, store=store.spec, command="benchmarks")


def ground(
    lab: Lab,
    warm: Adapter | None,
    experts: Mapping[str, Adapter],
    *,
    weak_rows: int,
    folder: Path,
    search: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> Ground:
    """Publish experts, weak rows (the first `weak_rows`; the others are selection rows) and references."""
    store = Store.open(str(folder))
    tree = {
        "data": {"subtasks": list(experts)},
        "model": {"dtype": lab.dtype},
        "search": dict(search or {}),
        "evaluation": {"batch_size": batch_size},
    }
    run = run_of(parse_config({**tree, "search": {**tree["search"], "blend": {"loglik": 1, "agree": 1}}}), lab, store)
    start = [_adapter(store, WARM, WARM, warm, [])] if warm else []
    refs: Refs = {name: _adapter(store, "expert", name, one, start) for name, one in experts.items()}
    parts: dict[str, Refs] = {"weak": {}, "selection": {}}
    references: Refs = {}
    for name in experts:
        rows = lab.parts[name]["weak"]
        for part, found in (("weak", rows[:weak_rows]), ("selection", rows[weak_rows:])):
            if found:
                key = seeds.digest([name, part, [row.id for row in found]])
                parts[part][name] = store.publish(
                    "split", key, name=f"{name} {part}", files={"rows.parquet": to_table(found)}
                ).ref
        rows_of = {part: read_rows(run, found[name]) for part, found in parts.items() if name in found}
        measured, files = measure_rows(run, run.subtask(name), rows_of, refs[name])
        references[name] = store.publish(
            "reference",
            seeds.digest([name, "reference"]),
            name=name,
            files={DOCUMENT: json.dumps(measured).encode(), **files},
        ).ref
    return Ground(lab, tree, store, Grounds(experts=refs, references=references, **parts))


def _adapter(store: Store, kind: str, name: str, factors: Adapter, inputs: list[ArtifactRef]) -> ArtifactRef:
    pair = next(iter(factors.values()))
    rank = len(pair.a)
    files = to_files(factors, base_name="base", rank=rank, alpha=pair.scale * rank)
    return store.publish(kind, seeds.digest([kind, name]), name=name, files=files, inputs=inputs).ref
