"""Searches as they are planned, followed to their end, and published: phases, finalists, the document of the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from memmcl.config.strategies import STRATEGIES
from memmcl.errors import SearchError
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
        """That of the search itself."""
        return self.first.name

    @property
    def key(self) -> str:
        """The key of the artifact that `publish` writes."""
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
        if self.joint and len(phases) == 1:
            return self._joint_spec(phases)
        if self.selection and phases[-1].spec.rows != "selection":
            return self._final_spec(self.finalists(phases))
        return None

    def _joint_spec(self, phases: Sequence[Phase]) -> SearchSpec:
        """Return the search of all coefficients at once, which starts from the finalists so far."""
        experts = sorted({name for inner in self.first.parts.values() for name in inner})
        blocks, (low, high) = self.problem.search.blocks, self.problem.search.bounds
        alone: Parts = {name: {name: (1.0,) * blocks} for name in experts}
        starts = {}
        for one in self.finalists(phases):
            if one.recipe.method == self.first.method:
                values = (value for name in experts for value in one.coefficients.get(name, (0.0,) * blocks))
                starts[one.title] = tuple(min(max(value, low), high) for value in values)
        return make_spec(
            self.problem,
            f"{self.name} {JOINT_PHASE}",
            alone,
            self.first.subtasks,
            list(starts.items()),
            self.joint,
            [*self.inputs, self.first.key],
            SpecVariant(method=self.first.method),
        )

    def _final_spec(self, finalists: Sequence[Finalist]) -> SearchSpec:
        """Return the decision: every finalist on the selection rows."""
        blocks, by_name = self.problem.search.blocks, {f"{at} {one.title}": one for at, one in enumerate(finalists)}
        ones = [(name, [float(other == name) for other in by_name for _ in range(blocks)]) for name in by_name]
        return make_spec(
            self.problem,
            f"{self.name} {FINAL}",
            {name: dict(one.coefficients) for name, one in by_name.items()},
            self.first.subtasks,
            ones,
            len(by_name),
            [*self.inputs, self.first.key],
            SpecVariant(fixed=True, rows="selection", recipes={name: one.recipe for name, one in by_name.items()}),
        )

    def finalists(self, phases: Sequence[Phase]) -> list[Finalist]:
        """Return who may win after these searches: the best and the best seed of each, and `others`."""
        finalists: list[Finalist] = []
        for phase in phases:
            records = phase.core.records
            ranked = phase.core.ranked()
            best = ranked[: self.problem.search.finalists]
            best_seed = next((one for one in ranked if one.generation == 0), None)
            for proposal in [*best, *([best_seed] if best_seed and best_seed not in best else [])]:
                origin, index, genome = proposal.origin, proposal.index, proposal.genome
                merge = phase.spec.coefficients(genome), phase.spec.recipe(genome)
                finalists.append(Finalist(phase.spec.name, origin, index, *merge, records[index]["fitness"]))
        if not finalists:
            raise SearchError(f"search {self.name}: no candidate has a finite fitness; see the log for their genomes")
        finalists += self.others
        merges: dict[str, Finalist] = {}
        for one in sorted(finalists, key=lambda one: -one.fitness):  # stable: of equals the earlier
            merges.setdefault(json.dumps([one.coefficients, asdict(one.recipe)], sort_keys=True), one)
        return list(merges.values())

    def publish(self, phases: Sequence[Phase], seconds: float) -> Manifest:
        """Publish the result: candidates of all phases, finalists, the winner and its merge."""
        searched = [phase for phase in phases if phase.spec.rows != "selection"]
        finalists = self.finalists(searched)
        final = phases[-1].core.records if phases[-1].spec.rows == "selection" else {}
        scores = [final[place]["fitness"] for place in range(len(finalists))] if final else []
        place = scores.index(max(scores)) if scores else 0  # of equals the first
        winner = finalists[place]
        itself, *joint = [_searched(one, winner.index if one.spec.name == winner.search else None) for one in searched]
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
        "evaluation": problem.evaluation.key(),
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
    members = {group: tuple(name for name in subtasks if problem.subtasks[name].group == group) for group in GROUPS}
    groups = {group: names for group, names in members.items() if names}
    several = problem.search.objectives == "groups" and len(groups) > 1
    return groups if several else {name: (name,) for name in subtasks}


def _searched(phase: Phase, winner: int | None) -> SearchedPhase:
    records = phase.core.records
    return SearchedPhase(
        spec=phase.spec,
        genes=phase.spec.space.genes,
        stopped_early=phase.core.stopped_early,
        candidates=[EvaluatedCandidate(**{**asdict(one), **records[one.index]}) for one in phase.core.proposals],
        winner=winner,
    )
