"""The two stages of the merge search, and the unified model they end in."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from prefect import State
from prefect.states import Completed

from memmcl.evolve import seed_genomes
from memmcl.merge import METHODS
from memmcl.merge.export import adapter_files, merged_adapter
from memmcl.merge.genome import Recipe, with_base_adapters
from memmcl.search.course import Course
from memmcl.search.plan import Finalist, SearchPlan, SpecVariant, make_spec
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import Parts, SearchSpec
from memmcl.store import ArtifactRef, Refs
from memmcl.suite.subtasks import GROUPS
from tasks.run.journal import note_search
from tasks.run.models import WARM, base_adapters_of
from tasks.run.runtime import Run, load_adapter, open_store, reuse_or_make, stage_task
from tasks.search.driver import RayDriver
from tasks.stages.run_artifacts import TrainedArtifacts
from tasks.ui.artifacts import show_board
from tasks.ui.progress import shown
from tasks.ui.updates import Update, announce, working

UNIFIED_VERSION = 3
ARITHMETIC = "task arithmetic"
STAGE_2 = "unified"
SEED = "seed:"
"""What the origin of a merge by hand begins with, as the base, or the average of all experts."""
SCALES = (0.5, 1.0, 1.5, 2.5, 4.0)
"""Scales of a rival that averages; of others, the grid of task arithmetic is used."""
BOARDS, PLACES = 8, 5
"""How often a stage shows its leaderboard, and how many places of every search are on it."""
Winner = tuple[dict[str, tuple[float, ...]], Recipe]


@stage_task("stage 1", run_name="stage 1: group models")
def search_groups(run: Run, trained: TrainedArtifacts) -> State[dict[str, ArtifactRef]]:
    """Search a model of every group, and tune the baselines (one coefficient for all experts), on the same workers.

    Returns the searches by group, and the baselines' by name.
    """
    cfg, names, problem = run.config.search, sorted(trained.experts), trained.problem(run)
    each: Parts = {name: {name: (1.0,) * cfg.blocks} for name in names}
    plans = []
    for group, members in groups_of(run, trained.experts).items():
        seeds = seed_genomes(members, cfg.blocks, cfg.bounds, cfg.lambdas)
        inputs = problem.inputs(members)
        parts = {name: each[name] for name in members}
        spec = make_spec(problem, group, parts, members, seeds, cfg.stage1_evaluations, inputs)
        plans.append(SearchPlan(problem, spec, inputs, selection=bool(trained.selection)))
    inputs = problem.inputs(names)
    fixed = [
        seed
        for seed in seed_genomes(names, cfg.blocks, cfg.bounds, cfg.lambdas)
        if not seed[0].startswith(("base", "expert"))
    ]
    spec = make_spec(problem, ARITHMETIC, each, names, fixed, len(fixed), inputs, SpecVariant("linear", fixed=True))
    plans.append(SearchPlan(problem, spec, inputs))
    plans += [SearchPlan(problem, rival_spec(problem, rival, each, names, inputs), inputs) for rival in cfg.rivals]
    return _run_stage(run, problem, plans)


def rival_spec(
    problem: SearchProblem, method: str, parts: Parts, names: Sequence[str], inputs: Sequence[ArtifactRef]
) -> SearchSpec:
    """Return the grid of one other method: its scale, or one coefficient for all experts."""
    cfg, count = problem.search, len(names) * problem.search.blocks
    if METHODS[method].normalises:
        seeds = [(f"scale:{scale:g}", (*(1.0,) * count, scale)) for scale in SCALES]
        varied: tuple[tuple[str, float, float], ...] = (("scale", min(SCALES), max(SCALES)),)
    else:
        seeds = [(f"{method}:{value:g}", (value,) * count) for value in cfg.lambdas]
        varied = ()
    return make_spec(problem, method, parts, names, seeds, len(seeds), inputs, SpecVariant(method, varied, fixed=True))


@stage_task("stage 2", run_name="stage 2: unified model")
def search_unified(run: Run, stage1: Refs, trained: TrainedArtifacts) -> State[dict[str, ArtifactRef]]:
    """Search the unified model: one coefficient per group model and block, scored on all subtasks.

    A joint search of all coefficients may follow. The baselines of stage 1 are among those that may win.
    """
    cfg, names, problem = run.config.search, sorted(trained.experts), trained.problem(run)
    groups = {name: stage1[name] for name in sorted(stage1) if name in GROUPS}
    models: Parts = {group: winner_of(read_search(run, ref))[0] for group, ref in groups.items()}
    seeds = seed_genomes(sorted(models), cfg.blocks, cfg.bounds, cfg.lambdas)
    inputs = [*groups.values(), *problem.inputs(names)]
    spec = make_spec(problem, STAGE_2, models, names, seeds, cfg.stage2_evaluations, inputs)
    others = [_finalist(run, name, ref) for name, ref in sorted(stage1.items()) if name not in GROUPS]
    plan = SearchPlan(
        problem, spec, inputs, joint=cfg.joint_evaluations, others=others, selection=bool(trained.selection)
    )
    return _run_stage(run, problem, [plan])


def _finalist(run: Run, name: str, ref: ArtifactRef) -> Finalist:
    """Return the winner of a finished search, as a finalist of another."""
    search = read_search(run, ref)
    won = next(one for one in search["finalists"] if one["wins"])
    return Finalist(name, won["origin"], won["index"], *winner_of(search), search["fitness"])


@stage_task("unified model")
def build_unified(run: Run, search: ArtifactRef, experts: Refs) -> State[ArtifactRef]:
    """Write the unified model as one PEFT adapter on the plain base; the warm start is part of it.

    It is exact where the method has an exact one, otherwise the nearest of the rank that the configuration names.
    """
    start = base_adapters_of(run, experts)
    adapters = {name: experts[name] for name in sorted(experts)} | start
    coefficients, recipe = winner_of(read_search(run, search))
    rank = None if METHODS[recipe.method].exact else run.config.search.adapter_rank

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        merged = merged_adapter(
            {name: load_adapter(run, ref) for name, ref in adapters.items()},
            with_base_adapters(coefficients, start, run.config.search.blocks),
            recipe,
            lowest=run.base.split,
            layers=run.base.layers,
            rank=rank,
            pinned=list(start),
        )
        metrics = {
            "coefficients": coefficients,
            "method": recipe.method,
            "parameters": dict(recipe.parameters),
            "warm_start": start[WARM].key if start else None,
            "relative_errors": merged.errors,
        }
        return adapter_files(merged.factors, base_name=run.base.name), metrics

    return reuse_or_make(
        run,
        "unified",
        name="unified model",
        inputs=[search, *adapters.values()],
        config={"model": run.model.key(), **({"rank": rank} if rank else {})},
        stage_version=UNIFIED_VERSION,
        make=make,
    )


def groups_of(run: Run, subtasks: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the subtasks by group, in the groups' order; groups without subtasks are left out."""
    by_group = {group: sorted(name for name in subtasks if run.subtask(name).group == group) for group in GROUPS}
    return {group: members for group, members in by_group.items() if members}


def read_search(run: Run, ref: ArtifactRef) -> dict[str, Any]:
    """Return a search's document: spec, candidates, winner, coefficients."""
    document: dict[str, Any] = json.loads(open_store(run).read(ref, "search.json"))
    return document


def winner_of(search: Mapping[str, Any]) -> Winner:
    """Return the winner of a search's document: coefficients over experts, and how it merges them."""
    return {name: tuple(row) for name, row in search["coefficients"].items()}, Recipe(**search["recipe"])


def _run_stage(run: Run, problem: SearchProblem, plans: Sequence[SearchPlan]) -> State[dict[str, ArtifactRef]]:
    store = open_store(run)
    done = {plan.name: manifest.ref for plan in plans if (manifest := store.find("search", plan.key)) is not None}
    missing = [plan for plan in plans if plan.name not in done]
    if not missing:
        announce(Update("search " + ", ".join(done), "search", "reused"))
        return Completed(name="Reused", message="all searches were in the store", data=done)
    started, boards = time.perf_counter(), 0
    courses = {plan.name: plan.course(partial(note_search, store, run)) for plan in missing}
    title, planned = "search " + ", ".join(courses), sum(plan.first.evaluations + plan.joint for plan in missing)
    with working(title, "search"), shown(title, planned, kind="search", lines=20) as move:

        def on_result(*_: object) -> None:
            nonlocal boards
            finished = sum(phase.core.completed for course in courses.values() for phase in course.phases)
            total = max(planned, finished)
            words = ", ".join(f"{name} {_best(course):.3f}" for name, course in courses.items())
            move(finished, total, words, _best_lines(courses))
            if finished * BOARDS // total > boards:
                boards = finished * BOARDS // total
                show_board(run, title, _leaderboard(courses.values()))

        RayDriver(run.config.ray).run(problem, list(courses.values()), on_result)
    seconds = time.perf_counter() - started
    for plan in missing:
        done[plan.name] = plan.publish(courses[plan.name].phases, seconds).ref
    return Completed(message=f"{len(missing)} searches in {seconds:.0f} s", data=done)


def _best(course: Course) -> float:
    """Return the best fitness on all weak rows so far; -inf where there is none."""
    cores = [phase.core for phase in course.phases if phase.spec.rows == "weak"]
    bests = [core.records[proposal.index]["fitness"] for core in cores for proposal in core.ranked()[:1]]
    return max(bests, default=-math.inf)


def _best_lines(courses: Mapping[str, Course]) -> list[str]:
    """Return a line for each search: its best candidate, and the best merge by hand that it beats."""
    lines = []
    for name, course in courses.items():
        scores: dict[str, float] = {}
        for phase in (phase for phase in course.phases if phase.spec.rows == "weak"):
            records = phase.core.records  # a copy: once, not once a candidate
            for proposal in phase.core.ranked():
                candidate = f"candidate {proposal.index}"
                title = candidate if phase.spec.name == name else f"{phase.spec.name} {candidate}"
                seeded = proposal.origin.startswith(SEED)
                scores[proposal.origin if seeded else title] = records[proposal.index]["fitness"]
        if not scores:
            continue
        best = max(scores, key=scores.__getitem__)
        beaten = {seed: score for seed, score in scores.items() if seed.startswith(SEED) and score < scores[best]}
        rival = max(beaten, key=beaten.__getitem__, default=None)
        beats = f", beats {rival.removeprefix(SEED)} with {beaten[rival]:.3f}" if rival else ""
        lines.append(f"{name}: best {scores[best]:.3f} ({best.removeprefix(SEED)}){beats}")
    return lines


def _leaderboard(courses: Iterable[Course]) -> list[dict[str, Any]]:
    """Return the best candidates of every search so far, one a row; those that failed or were stopped have no place."""
    return [
        {
            "search": phase.spec.name,
            "place": place,
            "candidate": proposal.index,
            "from": proposal.origin,
            "fitness": round(records[proposal.index]["fitness"], 4),
            "rows": records[proposal.index]["rows"],
            **{name: round(value, 3) for name, value in records[proposal.index]["values"].items() if value is not None},
        }
        for course in courses
        for phase in course.phases
        for records in [phase.core.records]
        for place, proposal in enumerate(phase.core.ranked()[:PLACES], start=1)
    ]
