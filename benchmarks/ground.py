"""Trained experts of the lab as artifacts of a store, so that the product's own plans and driver search their merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab import WARM, Lab

from memmcl import seeds
from memmcl.adapters.format import Adapter, to_files
from memmcl.backbone.load import read_layers, resolve_base
from memmcl.backbone.resident import Base
from memmcl.config import RunConfig, parse_config
from memmcl.search.course import OnResult, Phase
from memmcl.search.local import LocalDriver
from memmcl.search.plan import SearchPlan
from memmcl.search.problem import REFERENCE, SELECTION, WEAK, SearchProblem
from memmcl.store import ArtifactRef, Store
from memmcl.suite.examples import to_table
from tasks.run.runtime import Run, read_rows
from tasks.stages.references import measure_rows

Refs = dict[str, ArtifactRef]


@dataclass(frozen=True)
class PublishedLab:
    """The lab's experts and rows, published, as a problem that searches solve."""

    lab: Lab
    store: Store
    problem: SearchProblem

    def with_search(self, settings: Mapping[str, Any], seed: int = 0) -> SearchProblem:
        """Return the problem with these settings of the search changed."""
        search = {**self.problem.search.model_dump(exclude_unset=True), **settings}
        return replace(self.problem, search=parse_config({"search": search}).search, seed=seed)


def carry_out(plan: SearchPlan, on_result: OnResult = lambda *_: None) -> Sequence[Phase]:
    """Carry a plan out in this process, and return its phases."""
    course = plan.course()
    LocalDriver().run(plan.problem, [course], on_result)
    return course.phases


def run_of(config: RunConfig, lab: Lab, store: Store) -> Run:
    """Return a run of the lab's base."""
    weights = resolve_base(config.model.name_or_path)
    base = Base(
        name=weights.name,
        digest=weights.digest,
        licence=None,
        device=lab.device,
        dtype=lab.dtype,
        layers=read_layers(weights),
        split=lab.backbone.split,
    )
    return Run(id="benchmark", config=config, base=base, store=store.spec, command="benchmarks")


def publish_lab(
    lab: Lab,
    warm: Adapter | None,
    experts: Mapping[str, Adapter],
    *,
    weak_rows: int,
    folder: Path,
    batch_size: int = 16,
) -> PublishedLab:
    """Publish experts, weak rows (the first `weak_rows`; the others are selection rows) and references."""
    store = Store.open(str(folder))
    tree: dict[str, Any] = {
        "data": {"subtasks": list(experts)},
        "model": {"name_or_path": lab.model, "dtype": lab.dtype},
        "evaluation": {"batch_size": batch_size},
    }
    run = run_of(parse_config({**tree, "search": {"blend": {"loglik": 1, "agree": 1}}}), lab, store)
    start = {WARM: _adapter(store, WARM, WARM, warm, [])} if warm else {}
    refs: Refs = {name: _adapter(store, "expert", name, one, list(start.values())) for name, one in experts.items()}
    splits: dict[str, Refs] = {WEAK: {}, SELECTION: {}}
    references: Refs = {}
    for name in experts:
        rows = lab.parts[name]["weak"]
        for split, chosen in ((WEAK, rows[:weak_rows]), (SELECTION, rows[weak_rows:])):
            if chosen:
                key = seeds.digest([name, split, [row.id for row in chosen]])
                splits[split][name] = store.publish(
                    "split", key, name=f"{name} {split}", files={"rows.parquet": to_table(chosen)}
                ).ref
        rows_of = {split: read_rows(run, refs_of[name]) for split, refs_of in splits.items() if name in refs_of}
        measured, files = measure_rows(run, run.subtask(name), rows_of, refs[name])
        references[name] = store.publish(
            "reference",
            seeds.digest([name, "reference"]),
            name=name,
            files={REFERENCE: json.dumps(measured).encode(), **files},
        ).ref
    config = parse_config(tree)
    problem = SearchProblem(
        store=store.spec,
        model=run.model,
        search=config.search,
        evaluation=config.evaluation,
        seed=config.seed,
        subtasks=dict(lab.subtasks),
        experts=refs,
        weak=splits[WEAK],
        references=references,
        selection=splits[SELECTION],
        base_adapters=start,
    )
    return PublishedLab(lab, store, problem)


def _adapter(store: Store, kind: str, name: str, factors: Adapter, inputs: list[ArtifactRef]) -> ArtifactRef:
    pair = next(iter(factors.values()))
    rank = len(pair.a)
    files = to_files(factors, base_name="base", rank=rank, alpha=pair.scale * rank)
    return store.publish(kind, seeds.digest([kind, name]), name=name, files=files, inputs=inputs).ref
