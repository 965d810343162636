"""Searches as they are planned, followed to their end, and published: phases, finalists, the document of the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from memmcl.config.strategies import STRATEGIES
from memmcl.errors import SearchError
from memmcl.evaluate.asking import evaluation_key
from memmcl.evolve import Proposal
from memmcl.merge.genome import Coefficients, Recipe
from memmcl.search.course import Course, Phase
from memmcl.search.document import EvaluatedCandidate, FinalistScore, SearchDocument, SearchedPhase
from memmcl.search.problem import SearchProblem
from memmcl.search.spec import Parts, SearchSpec
from memmcl.store import ArtifactRef, Manifest, StageSettings, cache_key
from memmcl.suite.subtasks import GROUPS

STAGE_VERSION = 3
FINAL, JOINT_PHASE = "final", "joint"
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
    """One search and the phases that follow it.

    first: the search itself. inputs: artifacts that it depends on. joint: candidates of a search over all coefficients
    of the experts, afterwards; 0: none. others: merges of other searches that may win. selection: whether selection
    rows decide between finalists; otherwise the weak rows do.
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
        """Return the search of all coefficients at once, which starts from the finalists so far."""
        experts = sorted({name for inner in self.first.parts.values() for name in inner})
        blocks, (low, high) = self.problem.search.blocks, self.problem.search.bounds
        alone: Parts = {name: {name: (1.0,) * blocks} for name in experts}
        compatible = [one for one in self.finalists(phases) if one.recipe.method == self.first.method]
        starts = {
            one.title: tuple(
                min(max(value, low), high) for name in experts for value in one.coefficients.get(name, (0.0,) * blocks)
            )
            for one in compatible
        }
        return make_spec(
            self.problem,
            self._joint_name,
            alone,
            self.first.subtasks,
            list(starts.items()),
            self.joint,
            [*self.inputs, self.first.key],
            SpecVariant(method=self.first.method),
        )

    def _final_spec(self, finalists: Sequence[Finalist]) -> SearchSpec:
        """Return the decision: every finalist on the selection rows."""
        blocks, names = self.problem.search.blocks, [f"{place} {one.title}" for place, one in enumerate(finalists)]
        ones = {name: [1.0 if other == name else 0.0 for other in names for _ in range(blocks)] for name in names}
        return make_spec(
            self.problem,
            f"{self.name} {FINAL}",
            {name: dict(one.coefficients) for name, one in zip(names, finalists, strict=True)},
            self.first.subtasks,
            list(ones.items()),
            len(names),
            [*self.inputs, self.first.key],
            SpecVariant(
                fixed=True,
                rows="selection",
                recipes={name: one.recipe for name, one in zip(names, finalists, strict=True)},
            ),
        )

    def finalists(self, phases: Sequence[Phase]) -> list[Finalist]:
        """Return who may win after these searches: the best and the best seed of each, and those of other searches."""
        finalists: list[Finalist] = []
        for phase in phases:
            records = phase.core.records
            ranked = phase.core.ranked()
            best = ranked[: self.problem.search.finalists]
            seeds = [proposal for proposal in ranked if proposal.generation == 0][:1]
            finalists += [
                self._finalist(phase.spec, one, records[one.index]["fitness"])
                for one in [*best, *(one for one in seeds if one not in best)]
            ]
        if not finalists:
            raise SearchError(f"search {self.name}: no candidate has a finite fitness; see the log for their genomes")
        finalists += self.others
        merges: dict[str, Finalist] = {}
        for one in sorted(finalists, key=lambda one: -one.fitness):  # stable: of equals the earlier
            merges.setdefault(json.dumps([one.coefficients, asdict(one.recipe)], sort_keys=True), one)
        return list(merges.values())

    def _finalist(self, spec: SearchSpec, one: Proposal, fitness: float) -> Finalist:
        coefficients, recipe = spec.coefficients(one.genome), spec.recipe(one.genome)
        return Finalist(spec.name, one.origin, one.index, coefficients, recipe, fitness)

    def publish(self, phases: Sequence[Phase], seconds: float) -> Manifest:
        """Publish the result: candidates of all phases, finalists, the winner and its merge."""
        searched = [phase for phase in phases if phase.spec.rows != "selection"]
        finalists = self.finalists(searched)
        final = phases[-1].core.records if phases[-1].spec.rows == "selection" else {}
        scores = [final[place]["fitness"] for place in range(len(finalists))] if final else []
        place = max(range(len(scores)), key=lambda one: (scores[one], -one)) if scores else 0
        winner = finalists[place]
        inside = next((number for number, one in enumerate(searched) if one.spec.name == winner.search), None)
        itself, *joint = [_searched(one, winner.index if inside == at else None) for at, one in enumerate(searched)]
        document = SearchDocument(
            **dict(itself),
            joint=joint[0] if joint else None,
            finalists=[
                FinalistScore(**vars(one), title=one.title, selection=scores[at] if scores else None, wins=at == place)
                for at, one in enumerate(finalists)
            ],
            coefficients=winner.coefficients,
            recipe=winner.recipe,
            fitness=winner.fitness,
        )
        return self.problem.open_store().publish(
            "search",
            self.key,
            name=f"search {self.name}",
            files={
                "search.json": json.dumps(document.model_dump(mode="json"), indent=1).encode(),
                "candidates.parquet": document.candidates_table(),
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


@dataclass(frozen=True)
class SpecVariant:
    """In what a search differs from the run's own.

    method: another merge method, with its default parameters. varied: (name, low, high) of parameters of the method
    that seeds have values for, behind the coefficients; None: the run's genes. fixed: the seeds are all that is
    evaluated. rows: weak or selection. recipes: by part of the genome, where each merges in a way of its own.
    """

    method: str | None = None
    varied: tuple[tuple[str, float, float], ...] | None = None
    fixed: bool = False
    rows: Literal["weak", "selection"] = "weak"
    recipes: Mapping[str, Recipe] = field(default_factory=dict)


def make_spec(
    problem: SearchProblem,
    name: str,
    parts: Parts,
    subtasks: Sequence[str],
    seeds: Sequence[tuple[str, Sequence[float]]],
    evaluations: int,
    inputs: Sequence[ArtifactRef | str],
    variant: SpecVariant = SpecVariant(),
) -> SearchSpec:
    """Return a search's spec; seeds are coefficients, and values of `variant.varied` behind them where it has any."""
    cfg, fixed, varied = problem.search, variant.fixed, variant.varied
    same_method = variant.method in (None, cfg.method)
    if varied is None:
        genes = cfg.genes if same_method and not fixed else {}
        varied = tuple((gene, low, high) for gene, (low, high) in sorted(genes.items()))
    config = {
        "name": name,
        "search": cfg.model_dump(mode="json", exclude=NOT_IN_KEYS),
        "evaluations": evaluations,
        "method": variant.method,
        "fixed": fixed,
        "rows": variant.rows,
        "varied": varied,
        "seeds": seeds,
        "recipes": {part: asdict(recipe) for part, recipe in variant.recipes.items()},
        "parts": parts,
        "evaluation": evaluation_key(problem.evaluation),
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
        method=variant.method or cfg.method,
        parameters=cfg.parameters if same_method else {},
        varied=varied,
        mask=cfg.mask and not fixed,
        recipes=dict(variant.recipes),
        objectives=_objectives(problem, subtasks) if STRATEGIES[cfg.strategy].objectives and not fixed else {},
        rows=variant.rows,
        fixed=fixed,
    )
    whole = [(origin, tuple(genome) if fixed else spec.genome(genome)) for origin, genome in seeds]
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


def _searched(phase: Phase, winner: int | None) -> SearchedPhase:
    """Return a phase with all its candidates."""
    records = phase.core.records
    return SearchedPhase(
        spec=phase.spec,
        genes=phase.spec.space.genes,
        stopped_early=phase.core.stopped_early,
        candidates=[EvaluatedCandidate(**{**asdict(one), **records[one.index]}) for one in phase.core.proposals],
        winner=winner,
    )
