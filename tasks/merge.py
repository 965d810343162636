"""The two stages of the merge search, and the unified model they end in."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from memmcl.errors import SearchError
from memmcl.evolve import LookAhead, seed_genomes
from memmcl.merge import METHODS
from memmcl.merge.export import adapter_files, merged_adapter
from memmcl.merge.genome import Recipe
from memmcl.store import ArtifactRef, Manifest, cache_key
from memmcl.suite.subtasks import GROUPS
from tasks.models import WARM, start_of, with_start
from tasks.progress import shown
from tasks.runtime import Run, load_adapter, open_store, reuse_or_make
from tasks.search import STAGE_VERSION, Inner, SearchSpec, run_searches

UNIFIED_VERSION = 3
ARITHMETIC = "task arithmetic"
STAGE_2 = "unified"
Refs = Mapping[str, ArtifactRef]


@task(name="stage 1", task_run_name="stage 1: group models", cache_policy=NO_CACHE)
def search_groups(run: Run, experts: Refs, weak: Refs, references: Refs) -> State[dict[str, ArtifactRef]]:
    """Search a group model in every group, and beside them tune the baseline: one coefficient for all experts.

    All of them share the workers of one Tuner. Returns the searches by group, and the baseline's as ARITHMETIC.
    """
    cfg = run.config.search
    groups = groups_of(run, experts)
    blocks = cfg.blocks
    itself: Inner = {name: {name: (1.0,) * blocks} for name in experts}
    plans: list[tuple[SearchSpec, list[ArtifactRef]]] = []
    for group, members in groups.items():
        seeds = seed_genomes(members, blocks, cfg.bounds, cfg.lambdas)
        plans.append(
            make_plan(run, group, {m: itself[m] for m in members}, members, seeds, cfg.stage1_evaluations,
                  [*_inputs(members, experts, weak, references)])
        )  # fmt: skip
    names = sorted(experts)
    fixed = [
        seed
        for seed in seed_genomes(names, blocks, cfg.bounds, cfg.lambdas)
        if not seed[0].startswith(("base", "expert"))
    ]
    plans.append(
        make_plan(run, ARITHMETIC, {m: itself[m] for m in names}, names, fixed, len(fixed),
              [*_inputs(names, experts, weak, references)], linear=True)
    )  # fmt: skip
    return _run_stage(run, plans, experts, weak, references)


@task(name="stage 2", task_run_name="stage 2: unified model", cache_policy=NO_CACHE)
def search_unified(
    run: Run, groups: Refs, experts: Refs, weak: Refs, references: Refs
) -> State[dict[str, ArtifactRef]]:
    """Search the unified model: one coefficient per group model and block, scored on all subtasks."""
    cfg = run.config.search
    models: Inner = {group: coefficients_of(run, ref) for group, ref in sorted(groups.items())}
    seeds = seed_genomes(sorted(models), cfg.blocks, cfg.bounds, cfg.lambdas)
    names = sorted(experts)
    inputs = [*(groups[group] for group in sorted(groups)), *_inputs(names, experts, weak, references)]
    plan = make_plan(run, STAGE_2, models, names, seeds, cfg.stage2_evaluations, inputs)
    return _run_stage(run, [plan], experts, weak, references)


@task(name="unified model", task_run_name="unified model", cache_policy=NO_CACHE)
def build_unified(run: Run, search: ArtifactRef, experts: Refs) -> State[ArtifactRef]:
    """Write the unified model as one PEFT adapter on the plain base: what experts stand on is part of it.

    It is exact where the method has an exact one, otherwise the nearest of the rank that the configuration gives.
    """
    start = start_of(run, experts)
    adapters = {name: experts[name] for name in sorted(experts)} | start
    rank = None if METHODS[run.config.search.method].exact else run.config.search.adapter_rank

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        coefficients, recipe = coefficients_of(run, search), recipe_of(run, search)
        merged = merged_adapter(
            {name: load_adapter(run, ref) for name, ref in adapters.items()},
            with_start(coefficients, start, run.config.search.blocks),
            recipe, lowest=run.base.split, layers=run.base.layers, rank=rank, pinned=list(start),
        )  # fmt: skip
        metrics = {
            "coefficients": coefficients, "method": recipe.method, "parameters": dict(recipe.parameters),
            "warm_start": start[WARM].key if start else None, "relative_errors": merged.errors,
        }  # fmt: skip
        return adapter_files(merged.factors, base_name=run.base.name), metrics

    return reuse_or_make(
        run, "unified", name="unified model", inputs=[search, *adapters.values()],
        config={"model": run.model_key(), **({"rank": rank} if rank else {})}, stage_version=UNIFIED_VERSION, make=make,
    )  # fmt: skip


def groups_of(run: Run, subtasks: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the subtasks by group, in the groups' order; groups without subtasks are left out."""
    by_group = {group: sorted(name for name in subtasks if run.subtask(name).group == group) for group in GROUPS}
    return {group: members for group, members in by_group.items() if members}


def read_search(run: Run, ref: ArtifactRef) -> dict[str, Any]:
    """Return a search's document: spec, candidates, winner, coefficients."""
    document: dict[str, Any] = json.loads(open_store(run).read(ref, "search.json"))
    return document


def coefficients_of(run: Run, ref: ArtifactRef) -> dict[str, tuple[float, ...]]:
    """Return the winner's coefficients over experts."""
    return {name: tuple(row) for name, row in read_search(run, ref)["coefficients"].items()}


def recipe_of(run: Run, ref: ArtifactRef) -> Recipe:
    """Return how the winner merges its experts."""
    found = read_search(run, ref)["recipe"]
    return Recipe(found["method"], found["parameters"], found["seed"])


def make_plan(
    run: Run, name: str, parts: Inner, subtasks: Sequence[str], seeds: Sequence[tuple[str, Sequence[float]]],
    evaluations: int, inputs: list[ArtifactRef], *, linear: bool = False,
) -> tuple[SearchSpec, list[ArtifactRef]]:  # fmt: skip
    """Return a search's spec. linear: coefficients alone are searched, whatever the method of the run."""
    cfg = run.config.search
    method = "linear" if linear else cfg.method
    varied = () if linear else tuple((gene, low, high) for gene, (low, high) in sorted(cfg.genes.items()))
    first = tuple(min(max(METHODS[method].genes[gene].default, low), high) for gene, low, high in varied)
    config = {
        "name": name,
        "search": cfg.model_dump(mode="json", exclude={"stage1_evaluations", "stage2_evaluations"}),
        "evaluations": evaluations,
        "evaluation": run.config.evaluation.model_dump(
            mode="json", include={"batch_size", "max_new_tokens", "calibration"}
        ),
        "model": run.model_key(),
    }
    key = cache_key("search", inputs=inputs, config=config, stage_version=STAGE_VERSION, seed=run.config.seed)
    spec = SearchSpec(
        name=name, key=key, strategy=cfg.strategy, parts=parts, subtasks=tuple(subtasks),
        seeds=tuple((origin, (*genome, *first)) for origin, genome in seeds), evaluations=evaluations,
        method=method, parameters={} if linear else cfg.parameters, varied=varied,
    )  # fmt: skip
    return spec, inputs


def _run_stage(
    run: Run, plans: Sequence[tuple[SearchSpec, list[ArtifactRef]]], experts: Refs, weak: Refs, references: Refs
) -> State[dict[str, ArtifactRef]]:
    store = open_store(run)
    found = {spec.name: store.find("search", spec.key) for spec, _ in plans}
    done = {name: manifest.ref for name, manifest in found.items() if manifest is not None}
    missing = [plan for plan in plans if plan[0].name not in done]
    if not missing:
        return Completed(name="Reused", message="all searches were in the store", data=done)
    started = time.perf_counter()
    best = {spec.name: float("-inf") for spec, _ in missing}
    total = sum(spec.evaluations for spec, _ in missing)
    with shown("search " + ", ".join(best), total, lines=20) as move:

        def told(number: int, record: Mapping[str, Any], done: int) -> None:
            name = missing[number][0].name
            best[name] = max(best[name], record["fitness"] if record["fitness"] is not None else float("-inf"))
            move(done, total, ", ".join(f"{name} {value:.3f}" for name, value in best.items()))

        cores = run_searches(run, [spec for spec, _ in missing], experts, weak, references, told)
    seconds = time.perf_counter() - started
    for (spec, inputs), core in zip(missing, cores, strict=True):
        done[spec.name] = publish_search(run, spec, inputs, core, seconds).ref
    return Completed(message=f"{len(missing)} searches in {seconds:.0f} s", data=done)


def publish_search(run: Run, spec: SearchSpec, inputs: list[ArtifactRef], core: LookAhead, seconds: float) -> Manifest:
    """Publish a finished search: its candidates, its winner, what that means."""
    try:
        winner, record = core.best()
    except SearchError as error:
        raise SearchError(f"search {spec.name}: {error}") from error
    records = core.records
    candidates = [
        {"index": p.index, "origin": p.origin, "generation": p.generation, **_plain(records[p.index])}
        for p in core.proposals
    ]
    document = {
        "spec": spec.model_dump(mode="json"),
        "genes": list(spec.space(run).genes),
        "candidates": candidates,
        "winner": winner.index,
        "coefficients": spec.coefficients(run, winner.genome),
        "recipe": asdict(spec.recipe(run, winner.genome)),
    }
    return open_store(run).publish(
        "search", spec.key, name=f"search {spec.name}", files={"search.json": json.dumps(document, indent=1).encode()},
        inputs=inputs, config=run.config.search.model_dump(mode="json"), seed=run.config.seed,
        stage_version=STAGE_VERSION, seconds=seconds,
        metrics={"fitness": record["fitness"], "origin": winner.origin, "evaluations": len(candidates)},
    )  # fmt: skip


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    fitness = record["fitness"]
    return {**record, "fitness": None if fitness == float("-inf") else fitness}


def _inputs(names: Sequence[str], experts: Refs, weak: Refs, references: Refs) -> list[ArtifactRef]:
    return [refs[name] for refs in (experts, weak, references) for name in names]
