"""The two stages of the merge search, and the unified model they end in."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State
from pydantic import BaseModel, ConfigDict

from memmcl.evolve import Proposal, seed_genomes
from memmcl.merge import METHODS
from memmcl.merge.export import adapter_files, merged_adapter
from memmcl.merge.genome import Recipe
from memmcl.search.plan import Coefficients, Finalist, SearchPlan, make_spec
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import Parts, SearchSpec
from memmcl.store import ArtifactRef, Refs
from memmcl.suite.subtasks import GROUPS
from tasks.run.journal import note_search
from tasks.run.models import WARM, start_of, with_start
from tasks.run.runtime import Run, load_adapter, open_store, reuse_or_make
from tasks.search.driver import RayDriver
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
"""How often the leaderboard of a stage is shown, and how many places it has a search."""
Winner = tuple[Coefficients, Recipe]


class Grounds(BaseModel):
    """What searches stand on, by subtask. selection: empty where weak rows decide between finalists."""

    model_config = ConfigDict(frozen=True)

    experts: dict[str, ArtifactRef]
    weak: dict[str, ArtifactRef]
    references: dict[str, ArtifactRef]
    selection: dict[str, ArtifactRef]

    def problem(self, run: Run) -> SearchProblem:
        """Return what searches on these grounds are about."""
        return SearchProblem(
            store=run.store,
            model=run.model,
            search=run.config.search,
            evaluation=run.config.evaluation,
            seed=run.config.seed,
            subtasks={name: run.subtask(name) for name in self.experts},
            experts=self.experts,
            weak=self.weak,
            references=self.references,
            selection=self.selection,
            base_adapters=start_of(run, self.experts),
        )


@task(name="stage 1", task_run_name="stage 1: group models", cache_policy=NO_CACHE)
def search_groups(run: Run, grounds: Grounds) -> State[dict[str, ArtifactRef]]:
    """Search a group model in every group, and beside them tune the baselines: one coefficient for all experts.

    All of them share the workers of one Tuner. Returns the searches by group, and the baselines' by name.
    """
    cfg, names, problem = run.config.search, sorted(grounds.experts), grounds.problem(run)
    itself: Parts = {name: {name: (1.0,) * cfg.blocks} for name in names}
    plans = []
    for group, members in groups_of(run, grounds.experts).items():
        seeds = seed_genomes(members, cfg.blocks, cfg.bounds, cfg.lambdas)
        inputs = problem.inputs(members)
        parts = {name: itself[name] for name in members}
        spec = make_spec(problem, group, parts, members, seeds, cfg.stage1_evaluations, inputs)
        plans.append(SearchPlan(problem, spec, inputs, selection=bool(grounds.selection)))
    inputs = problem.inputs(names)
    fixed = [
        seed
        for seed in seed_genomes(names, cfg.blocks, cfg.bounds, cfg.lambdas)
        if not seed[0].startswith(("base", "expert"))
    ]
    spec = make_spec(problem, ARITHMETIC, itself, names, fixed, len(fixed), inputs, method="linear", fixed=True)
    plans.append(SearchPlan(problem, spec, inputs))
    plans += [SearchPlan(problem, rival_spec(problem, rival, itself, names, inputs), inputs) for rival in cfg.rivals]
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
    return make_spec(problem, method, parts, names, seeds, len(seeds), inputs, method=method, varied=varied, fixed=True)


@task(name="stage 2", task_run_name="stage 2: unified model", cache_policy=NO_CACHE)
def search_unified(run: Run, stage1: Refs, grounds: Grounds) -> State[dict[str, ArtifactRef]]:
    """Search the unified model: one coefficient per group model and block, scored on all subtasks.

    A joint search of all coefficients may follow. The baselines of stage 1 are among those that may win.
    """
    cfg, names, problem = run.config.search, sorted(grounds.experts), grounds.problem(run)
    groups = {name: stage1[name] for name in sorted(stage1) if name in GROUPS}
    models: Parts = {group: winner_of(read_search(run, ref))[0] for group, ref in groups.items()}
    seeds = seed_genomes(sorted(models), cfg.blocks, cfg.bounds, cfg.lambdas)
    inputs = [*groups.values(), *problem.inputs(names)]
    spec = make_spec(problem, STAGE_2, models, names, seeds, cfg.stage2_evaluations, inputs)
    others = [_found(run, name, ref) for name, ref in sorted(stage1.items()) if name not in GROUPS]
    plan = SearchPlan(
        problem, spec, inputs, joint=cfg.joint_evaluations, others=others, selection=bool(grounds.selection)
    )
    return _run_stage(run, problem, [plan])


def _found(run: Run, name: str, ref: ArtifactRef) -> Finalist:
    """Return the winner of a search that is done, as one that may win another."""
    found = read_search(run, ref)
    won = next(one for one in found["finalists"] if one["wins"])
    return Finalist(name, won["origin"], won["index"], *winner_of(found), found["fitness"])


@task(name="unified model", task_run_name="unified model", cache_policy=NO_CACHE)
def build_unified(run: Run, search: ArtifactRef, experts: Refs) -> State[ArtifactRef]:
    """Write the unified model as one PEFT adapter on the plain base: what experts stand on is part of it.

    It is exact where the method has an exact one, otherwise the nearest of the rank that the configuration gives.
    """
    start = start_of(run, experts)
    adapters = {name: experts[name] for name in sorted(experts)} | start
    coefficients, recipe = winner_of(read_search(run, search))
    rank = None if METHODS[recipe.method].exact else run.config.search.adapter_rank

    def make() -> tuple[dict[str, bytes], dict[str, Any]]:
        merged = merged_adapter(
            {name: load_adapter(run, ref) for name, ref in adapters.items()},
            with_start(coefficients, start, run.config.search.blocks),
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
    found = {plan.name: store.find("search", plan.key) for plan in plans}
    done = {name: manifest.ref for name, manifest in found.items() if manifest is not None}
    missing = [plan for plan in plans if plan.name not in done]
    if not missing:
        announce(Update("search " + ", ".join(done), "search", "reused"))
        return Completed(name="Reused", message="all searches were in the store", data=done)
    started = time.perf_counter()
    board = Board({plan.name: plan.first.evaluations + plan.joint for plan in missing})
    title = "search " + ", ".join(board.best)
    with working(title, "search"), shown(title, board.total, kind="search", lines=20) as move:

        def told(spec: SearchSpec, proposal: Proposal, record: Mapping[str, Any]) -> None:
            board.take(spec, proposal, record, sum(phase.core.completed for one in courses for phase in one.phases))
            move(board.done, board.total, str(board), board.best_lines())
            if board.due:
                show_board(run, title, board.rows())

        courses = [plan.course(partial(note_search, store, run)) for plan in missing]
        RayDriver(run.config.ray).run(problem, courses, told)
    seconds = time.perf_counter() - started
    for plan, course in zip(missing, courses, strict=True):
        done[plan.name] = plan.publish(course.phases, seconds).ref
    return Completed(message=f"{len(missing)} searches in {seconds:.0f} s", data=done)


class Board:
    """How far searches are, and the best candidates of each."""

    def __init__(self, evaluations: Mapping[str, int]) -> None:
        self.best = dict.fromkeys(evaluations, float("-inf"))
        self._scores: dict[str, dict[str, float]] = {name: {} for name in evaluations}
        self.total = sum(evaluations.values())
        self.done = 0
        self.due = False
        """Whether it is time to show it."""
        self._seen: dict[str, list[tuple[float, int, Proposal, Mapping[str, Any]]]] = {}

    def take(self, spec: SearchSpec, proposal: Proposal, record: Mapping[str, Any], done: int) -> None:
        """Note a result, the `done`-th of all searches; one that failed or was stopped has no place."""
        self.total = max(self.total, done)
        self.due = done * BOARDS // self.total > self.done * BOARDS // self.total
        self.done = done
        fitness = record["fitness"]
        if fitness is None or record["stopped"]:
            return
        if spec.rows == "weak":
            name = next(name for name in self.best if spec.name.startswith(name))
            self.best[name] = max(self.best[name], fitness)
            found = f"candidate {proposal.index}" if spec.name == name else f"{spec.name} candidate {proposal.index}"
            self._scores[name][proposal.origin if proposal.origin.startswith(SEED) else found] = fitness
        ranked = self._seen.setdefault(spec.name, [])
        ranked.append((-fitness, proposal.index, proposal, record))
        ranked.sort(key=lambda one: one[:2])
        del ranked[PLACES:]

    def rows(self) -> list[dict[str, Any]]:
        """Return the leaderboard."""
        return [
            {
                "search": name,
                "place": place,
                "candidate": proposal.index,
                "from": proposal.origin,
                "fitness": round(record["fitness"], 4),
                "rows": record["rows"],
                **{subtask: round(value, 3) for subtask, value in record["values"].items() if value is not None},
            }
            for name, ranked in self._seen.items()
            for place, (_, _, proposal, record) in enumerate(ranked, start=1)
        ]

    def best_lines(self) -> list[str]:
        """Return a line for each search: its best candidate, and the best merge by hand that it beats."""
        said = []
        for name, scores in self._scores.items():
            best = max(scores, key=scores.__getitem__, default=None)
            if best is None:
                continue
            seeds = {seed: score for seed, score in scores.items() if seed.startswith(SEED) and score < scores[best]}
            rival = max(seeds, key=seeds.__getitem__, default=None)
            beats = f", beats {rival.removeprefix(SEED)} with {seeds[rival]:.3f}" if rival else ""
            said.append(f"{name}: best {scores[best]:.3f} ({best.removeprefix(SEED)}){beats}")
        return said

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self.best.items())
