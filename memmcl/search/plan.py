"""Searches as they are planned, followed to their end, and published: phases, finalists, the document of the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from memmcl.errors import SearchError
from memmcl.evolve import Proposal
from memmcl.merge.genome import Recipe
from memmcl.search.course import Course, Phase
from memmcl.search.document import candidates_table
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import Parts, SearchSpec
from memmcl.store import ArtifactRef, Manifest, StageSettings, cache_key
from memmcl.suite.subtasks import GROUPS

STAGE_VERSION = 3
FINAL, JOINT_PHASE = "final", "joint"
Coefficients = dict[str, tuple[float, ...]]
NOT_IN_KEYS = {"stage1_evaluations", "stage2_evaluations", "joint_evaluations", "finalists", "adapter_rank", "rivals"}


@dataclass(frozen=True)
class Finalist:
    """A merge that may be the winner. search: where it comes from; fitness: on the weak rows."""

    search: str
    origin: str
    index: int
    coefficients: Coefficients
    recipe: Recipe
    fitness: float

    @property
    def title(self) -> str:
        """What it is called among finalists."""
        return f"{self.search} {self.index} ({self.origin})"


@dataclass
class SearchPlan:
    """One search with what follows it. first: where it begins; inputs: what it is made from.

    joint: how many candidates a search over all coefficients of the experts gets afterwards. others: merges found
    elsewhere that may win. selection: whether selection rows decide between finalists; otherwise the weak rows do.
    """

    problem: SearchProblem
    first: SearchSpec
    inputs: list[ArtifactRef]
    joint: int = 0
    others: list[Finalist] = field(default_factory=list)
    selection: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return self.first.name

    @property
    def key(self) -> str:
        """The key of the artifact that it ends in."""
        cfg = self.problem.search
        config = {
            "first": self.first.key,
            "joint": self.joint,
            "finalists": cfg.finalists if self.selection else 0,
            "others": [[one.title, one.coefficients, asdict(one.recipe), one.fitness] for one in self.others],
        }
        return cache_key("search", inputs=self.inputs, config=config, stage_version=STAGE_VERSION, seed=0)

    def course(self, begun: Callable[[SearchSpec], None] = lambda spec: None) -> Course:
        """Return it, ready to run; `begun` is called as each of its searches begins."""
        return Course(self.follow, begun)

    def follow(self, phases: Sequence[Phase]) -> SearchSpec | None:
        """Return the next phase: the search itself, the joint one, the decision between finalists."""
        if not phases:
            return self.first
        names = [phase.spec.name for phase in phases]
        if self.joint and self._joint_name not in names:
            return self._joint_spec(phases)
        if self.selection and phases[-1].spec.rows != "selection":
            return self._final_spec(self.finalists(phases))
        return None

    @property
    def _joint_name(self) -> str:
        return f"{self.name} {JOINT_PHASE}"

    def _joint_spec(self, phases: Sequence[Phase]) -> SearchSpec:
        """Return the search of all coefficients at once, which begins with all that was found so far."""
        experts = sorted({name for inner in self.first.parts.values() for name in inner})
        blocks, (low, high) = self.problem.search.blocks, self.problem.search.bounds
        alone: Parts = {name: {name: (1.0,) * blocks} for name in experts}
        found = [one for one in self.finalists(phases) if one.recipe.method == self.first.method]
        starts = {
            one.title: tuple(
                min(max(value, low), high) for name in experts for value in one.coefficients.get(name, (0.0,) * blocks)
            )
            for one in found
        }
        return make_spec(
            self.problem,
            self._joint_name,
            alone,
            self.first.subtasks,
            list(starts.items()),
            self.joint,
            [*self.inputs, self.first.key],
            method=self.first.method,
        )

    def _final_spec(self, finalists: Sequence[Finalist]) -> SearchSpec:
        """Return the decision: every finalist on the selection rows."""
        blocks, names = self.problem.search.blocks, [f"{place} {one.title}" for place, one in enumerate(finalists)]
        ones = {name: [1.0 if other == name else 0.0 for other in names for _ in range(blocks)] for name in names}
        return make_spec(
            self.problem,
            f"{self.name} {FINAL}",
            {name: one.coefficients for name, one in zip(names, finalists, strict=True)},
            self.first.subtasks,
            list(ones.items()),
            len(names),
            [*self.inputs, self.first.key],
            fixed=True,
            rows="selection",
            recipes={name: one.recipe for name, one in zip(names, finalists, strict=True)},
        )

    def finalists(self, phases: Sequence[Phase]) -> list[Finalist]:
        """Return who may win after these searches: the best and the best seed of each, and those found elsewhere."""
        found: list[Finalist] = []
        for phase in phases:
            records = phase.core.records
            ranked = phase.core.ranked()
            best = ranked[: self.problem.search.finalists]
            seeds = [proposal for proposal in ranked if proposal.generation == 0][:1]
            found += [
                self._finalist(phase.spec, one, records[one.index]["fitness"])
                for one in [*best, *(one for one in seeds if one not in best)]
            ]
        if not found:
            raise SearchError(f"search {self.name}: no candidate has a finite fitness; see the log for their genomes")
        found += self.others
        merges: dict[str, Finalist] = {}
        for one in sorted(found, key=lambda one: -one.fitness):  # stable: of equals the one that was found first
            merges.setdefault(json.dumps([one.coefficients, asdict(one.recipe)], sort_keys=True), one)
        return list(merges.values())

    def _finalist(self, spec: SearchSpec, one: Proposal, fitness: float) -> Finalist:
        coefficients, recipe = spec.coefficients(one.genome), spec.recipe(one.genome)
        return Finalist(spec.name, one.origin, one.index, coefficients, recipe, fitness)

    def publish(self, phases: Sequence[Phase], seconds: float) -> Manifest:
        """Publish what was found: candidates of all phases, finalists, the winner, what that means."""
        searched = [phase for phase in phases if phase.spec.rows != "selection"]
        finalists = self.finalists(searched)
        final = phases[-1].core.records if phases[-1].spec.rows == "selection" else {}
        scores = [final[place]["fitness"] for place in range(len(finalists))] if final else []
        place = max(range(len(scores)), key=lambda one: (scores[one], -one)) if scores else 0
        winner = finalists[place]
        inside = next((number for number, one in enumerate(searched) if one.spec.name == winner.search), None)
        document = {
            **_searched(searched[0]),
            "winner": winner.index if inside == 0 else None,
            "joint": _searched(searched[1]) | {"winner": winner.index if inside == 1 else None}
            if len(searched) > 1
            else None,
            "finalists": [
                {
                    "title": one.title,
                    "search": one.search,
                    "index": one.index,
                    "origin": one.origin,
                    "fitness": one.fitness,
                    "selection": _json(scores[at]) if scores else None,
                    "wins": at == place,
                }
                for at, one in enumerate(finalists)
            ],
            "coefficients": winner.coefficients,
            "recipe": asdict(winner.recipe),
            "fitness": winner.fitness,
        }
        return self.problem.open_store().publish(
            "search",
            self.key,
            name=f"search {self.name}",
            files={
                "search.json": json.dumps(document, indent=1).encode(),
                "candidates.parquet": candidates_table(document),
            },
            inputs=self.inputs,
            settings=StageSettings(self.problem.search.model_dump(mode="json"), self.problem.seed, STAGE_VERSION),
            seconds=seconds,
            metrics={
                "fitness": winner.fitness,
                "origin": winner.origin,
                "winner": winner.title,
                "evaluations": sum(len(phase.core.proposals) for phase in phases),
            },
        )


def make_spec(
    problem: SearchProblem,
    name: str,
    parts: Parts,
    subtasks: Sequence[str],
    seeds: Sequence[tuple[str, Sequence[float]]],
    evaluations: int,
    inputs: Sequence[ArtifactRef | str],
    *,
    method: str | None = None,
    varied: tuple[tuple[str, float, float], ...] | None = None,
    fixed: bool = False,
    rows: str = "weak",
    recipes: Mapping[str, Recipe] | None = None,
) -> SearchSpec:
    """Return a search's spec; seeds are coefficients, and values of `varied` behind them where those are given.

    method: None for the run's, with its parameters and genes. fixed: the seeds are all that is looked at.
    """
    cfg = problem.search
    own = method is None or method == cfg.method
    if varied is None:
        varied = (
            tuple((gene, low, high) for gene, (low, high) in sorted(cfg.genes.items())) if own and not fixed else ()
        )
    config = {
        "name": name,
        "search": cfg.model_dump(mode="json", exclude=NOT_IN_KEYS),
        "evaluations": evaluations,
        "method": method,
        "fixed": fixed,
        "rows": rows,
        "varied": varied,
        "seeds": seeds,
        "recipes": {part: asdict(recipe) for part, recipe in (recipes or {}).items()},
        "parts": parts,
        "evaluation": problem.evaluation.model_dump(
            mode="json", include={"batch_size", "max_new_tokens", "calibration"}
        ),
        "model": problem.model.key(),
        "first": [one for one in inputs if isinstance(one, str)],
    }
    refs = [one for one in inputs if not isinstance(one, str)]
    spec = SearchSpec(
        name=name,
        key=cache_key("search", inputs=refs, config=config, stage_version=STAGE_VERSION, seed=problem.seed),
        strategy=cfg.strategy,
        parts=parts,
        subtasks=tuple(subtasks),
        seeds=(),
        evaluations=evaluations,
        blocks=cfg.blocks,
        bounds=cfg.bounds,
        mask_seed=problem.mask_seed,
        method=method or cfg.method,
        parameters=cfg.parameters if own else {},
        varied=varied,
        mask=cfg.mask and not fixed,
        recipes=dict(recipes or {}),
        objectives=_objectives(problem, subtasks) if cfg.strategy == "nsga2" and not fixed else {},
        rows=rows,
        fixed=fixed,
    )
    whole = [(origin, tuple(g) if fixed else spec.genome(g)) for origin, g in seeds]
    return spec.model_copy(update={"seeds": tuple(whole)})


def _objectives(problem: SearchProblem, subtasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the objectives of a multi-objective search, by name; a single group is traded off by its subtasks."""
    groups = {
        group: tuple(name for name in subtasks if problem.subtasks[name].group == group)
        for group in GROUPS
        if any(problem.subtasks[name].group == group for name in subtasks)
    }
    if problem.search.objectives == "groups" and len(groups) > 1:
        return groups
    return {name: (name,) for name in subtasks}


def _searched(phase: Phase) -> dict[str, Any]:
    """Return a phase with all its candidates."""
    records = phase.core.records
    return {
        "spec": phase.spec.model_dump(mode="json"),
        "genes": list(phase.spec.space.genes),
        "stopped_early": phase.core.stopped_early,
        "candidates": [
            {
                "index": one.index,
                "origin": one.origin,
                "generation": one.generation,
                "parents": list(one.parents),
                **records[one.index],
                "fitness": _json(records[one.index]["fitness"]),
            }
            for one in phase.core.proposals
        ],
    }


def _json(value: float) -> float | None:
    return None if value in (float("inf"), float("-inf")) else value
