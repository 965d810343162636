"""What a run made, as references; who is put to its test rows; how difficult its subtasks are."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from memmcl.curriculum.difficulty import DifficultyReport, difficulties, order_subtasks
from memmcl.store import ArtifactRef
from tasks.run.models import WARM, with_start
from tasks.run.runtime import Run, read_rows
from tasks.stages.data import SplitRefs
from tasks.stages.evaluate import Contestants
from tasks.stages.experts import JOINT, WEAK
from tasks.stages.merge import ARITHMETIC, STAGE_2, Grounds, Winner


class TrainedArtifacts(BaseModel):
    """What the first part of a run made, all by subtask but the special trainings."""

    model_config = ConfigDict(frozen=True)

    experts: dict[str, ArtifactRef]
    warm: ArtifactRef | None
    """What the experts stand on."""
    joint: ArtifactRef | None
    weak_lora: ArtifactRef | None
    weak: dict[str, ArtifactRef]
    """The rows that searches and gates saw: the weak splits, or those that the experts labelled."""
    selection: dict[str, ArtifactRef]
    """The rows that decide between finalists; empty without such."""
    references: dict[str, ArtifactRef]

    @property
    def grounds(self) -> Grounds:
        """What searches stand on."""
        return Grounds(experts=self.experts, weak=self.weak, references=self.references, selection=self.selection)

    def special(self) -> dict[str, ArtifactRef]:
        """Return the trainings that are no expert, by the name that coefficients and results have for them."""
        found = {WARM: self.warm, JOINT: self.joint, WEAK: self.weak_lora}
        return {name: ref for name, ref in found.items() if ref is not None}


class RunArtifacts(BaseModel):
    """References to everything a run made."""

    model_config = ConfigDict(frozen=True)

    splits: SplitRefs
    data: ArtifactRef
    """What was read: digests of all rows, and how many were left out why."""
    anchors: ArtifactRef | None
    trained: TrainedArtifacts
    searches: dict[str, ArtifactRef]
    unified: ArtifactRef
    gates: dict[str, ArtifactRef]
    evaluations: dict[str, ArtifactRef]
    model: ArtifactRef | None

    def refs(self) -> list[ArtifactRef]:
        """Return all references, the run's lineage."""
        trained = self.trained
        groups = (
            trained.special(),
            trained.experts,
            self._labelled(),
            trained.references,
            self.searches,
            self.gates,
            self.evaluations,
        )
        found = [ref for group in groups for _, ref in sorted(group.items())]
        rows = [ref for _, parts in sorted(self.splits.items()) for _, ref in sorted(parts.items())]
        others = (self.anchors, self.model)
        return [*rows, self.data, *found, self.unified, *(ref for ref in others if ref is not None)]

    def _labelled(self) -> dict[str, ArtifactRef]:
        parts = {"weak": self.trained.weak, "selection": self.trained.selection}
        return {
            f"{name} {part}": ref
            for part, refs in parts.items()
            for name, ref in refs.items()
            if ref != self.splits[name][part]
        }


def contestants(run: Run, trained: TrainedArtifacts, winners: Mapping[str, Winner], subtask: str) -> Contestants:
    """Return who is put to a subtask's test rows: what experts stand on is part of them and of every merge of them.

    winners: of the searches, by their names.
    """
    blocks = run.config.search.blocks
    ones, names = (1.0,) * blocks, sorted(trained.experts)
    start = {WARM: trained.warm} if trained.warm else {}
    tuned = {"arithmetic": ARITHMETIC, **{name: name for name in run.config.search.rivals}, "unified": STAGE_2}
    merges = {
        "experts": {subtask: ones},
        "uniform": {name: (1.0 / len(names),) * blocks for name in names},
        "sum": dict.fromkeys(names, ones),
        **{name: winners[search][0] for name, search in tuned.items()},
    }
    recipes = {name: winners[search][1] for name, search in tuned.items()}
    rivals = {name: {name: ones} for name in trained.special() if name != WARM}
    return Contestants(
        models={"base": {}, **{name: with_start(table, start, blocks) for name, table in merges.items()}, **rivals},
        alone={"base": {}, **{name: with_start({name: ones}, start, blocks) for name in names}},
        adapters=trained.experts | trained.special(),
        recipes={name: recipe for name, recipe in recipes.items() if recipe.method != "linear"},
        pinned=tuple(start),
    )


def measure_difficulty(run: Run, splits: SplitRefs) -> tuple[dict[str, DifficultyReport], tuple[str, ...]]:
    """Return the difficulty of every subtask and the curriculum's ascending order, from training rows."""
    subtasks = [run.subtask(name) for name in splits]
    rows = {name: read_rows(run, parts["train"]) for name, parts in splits.items()}
    reports = difficulties(subtasks, rows, run.config.curriculum.weights)
    return reports, order_subtasks({name: report.difficulty for name, report in reports.items()})
