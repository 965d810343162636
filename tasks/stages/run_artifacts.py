"""The artifacts of a run, as references: what its flows hand on from stage to stage."""

from __future__ import annotations

from pydantic import BaseModel

from memmcl.search.problem import SearchProblem
from memmcl.store import ArtifactRef
from tasks.run.models import JOINT, WARM, WEAK_LORA, base_adapters_of
from tasks.run.runtime import Run
from tasks.stages.data import SplitRefs


class TrainedArtifacts(BaseModel, frozen=True):
    """What trainings leave; `warm`, `joint` and `weak_lora` are single adapters, all else is by subtask."""

    experts: dict[str, ArtifactRef]
    weak: dict[str, ArtifactRef]
    """The rows that searches and gates see: the weak splits, or those that the experts labelled."""
    references: dict[str, ArtifactRef]
    selection: dict[str, ArtifactRef] = {}
    """The rows that decide between finalists; empty where the weak rows do."""
    warm: ArtifactRef | None = None
    """The adapter that the experts were trained on."""
    joint: ArtifactRef | None = None
    weak_lora: ArtifactRef | None = None

    @property
    def rivals(self) -> dict[str, ArtifactRef]:
        """The rivals of merging, by the name that coefficients and results have for them."""
        return {name: ref for name, ref in ((JOINT, self.joint), (WEAK_LORA, self.weak_lora)) if ref is not None}

    @property
    def warm_start(self) -> dict[str, ArtifactRef]:
        """The warm start by its name; empty without one."""
        return {WARM: self.warm} if self.warm else {}

    def problem(self, run: Run) -> SearchProblem:
        """Return the problem that searches solve: these experts, on these rows."""
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
            base_adapters=base_adapters_of(run, self.experts),
        )


class RunArtifacts(BaseModel, frozen=True):
    """References to all artifacts of a run."""

    splits: SplitRefs
    data: ArtifactRef
    """Digests of all rows, and how many were left out why."""
    anchors: ArtifactRef | None
    trained: TrainedArtifacts
    searches: dict[str, ArtifactRef]
    unified: ArtifactRef
    gates: dict[str, ArtifactRef]
    evaluations: dict[str, ArtifactRef]
    model: ArtifactRef | None

    def refs(self) -> list[ArtifactRef]:
        """Return all references, the run's lineage."""
        trained, splits = self.trained, [ref for _, by in sorted(self.splits.items()) for _, ref in sorted(by.items())]
        by_name = (
            trained.warm_start | trained.rivals,
            trained.experts,
            self._labelled(),
            trained.references,
            self.searches,
            self.gates,
            self.evaluations,
        )
        named = [ref for refs in by_name for _, ref in sorted(refs.items())]
        optional = [ref for ref in (self.anchors, self.model) if ref is not None]
        return [*splits, self.data, *named, self.unified, *optional]

    def _labelled(self) -> dict[str, ArtifactRef]:
        """Return the rows that experts labelled: they are none of the splits."""
        rows = {"weak": self.trained.weak, "selection": self.trained.selection}
        return {
            f"{name} {split}": ref
            for split, refs in rows.items()
            for name, ref in refs.items()
            if ref != self.splits[name][split]
        }
