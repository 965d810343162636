"""The results document: everything a report shows, as one frozen, JSON-able schema.

`Results.model_validate(document)` reads it, `results.model_dump(mode="json")` writes it, and
`Results.model_json_schema()` describes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import NonNegativeFloat, ValidationError, model_validator

from memmcl.errors import DataError
from memmcl.report import schema


class Results(schema.Section):
    """One run, as the report shows it."""

    run: schema.RunInfo
    subtasks: tuple[schema.SubtaskInfo, ...]
    models: tuple[schema.Model, ...]
    scores: tuple[schema.SubtaskScore, ...]
    means: tuple[schema.Mean, ...]
    comparisons: tuple[schema.Comparison, ...] = ()
    retention: tuple[schema.Retention, ...] = ()
    interference: tuple[schema.Interference, ...] = ()
    task_vectors: schema.TaskVectors | None = None
    searches: tuple[schema.SearchResult, ...] = ()
    merge: schema.MergeInfo | None = None
    experts: tuple[schema.ExpertResult, ...] = ()
    curriculum: schema.Curriculum = schema.Curriculum()
    timings: tuple[schema.Timing, ...] = ()
    wall_seconds: NonNegativeFloat
    peak_memory_gb: NonNegativeFloat | None = None
    data: schema.Data
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_references(self) -> Results:
        subtasks = _unique("subtask", (subtask.name for subtask in self.subtasks))
        models = _unique("model", (model.name for model in self.models))
        _unique("score", (f"{score.model} on {score.subtask}" for score in self.scores))
        _unique("mean", (mean.model for mean in self.means))
        _unique("retention", (f"{row.model} on {row.subtask}" for row in self.retention))
        _unique("interference", (f"{row.expert} on {row.subtask}" for row in self.interference))
        of_models: list[Any] = [*self.scores, *self.means, *self.retention]
        of_subtasks: list[Any] = [*self.scores, *self.retention, *self.interference]
        of_subtasks += [*self.curriculum.features, *self.curriculum.contexts]
        _known("model", models, (row.model for row in of_models))
        _known("model", models, (name for pair in self.comparisons for name in (pair.a, pair.b)))
        _known("subtask", subtasks, (*self.curriculum.order, *(row.subtask for row in of_subtasks)))
        _known("expert", subtasks | {schema.BASE}, (row.expert for row in self.interference))
        for search in self.searches:
            indices = _unique(f"candidate of {search.title}", (str(c.index) for c in search.candidates))
            if search.winner is not None:
                _known(f"candidate of {search.title}", indices, [str(search.winner)])
        if self.merge is not None:
            count, blocks = len(self.merge.experts), len(self.merge.blocks)
            shape = [len(row) for row in self.merge.coefficients]
            if shape != [blocks] * count:
                raise ValueError(f"coefficients need {count} experts x {blocks} blocks, got rows of {shape}")
        if self.task_vectors is not None:
            _known("expert", subtasks, _unique("task vector", self.task_vectors.experts))
            count = len(self.task_vectors.experts)
            for relation in (self.task_vectors.overall, *self.task_vectors.layers):
                shape = [len(row) for row in relation.cosines]
                if shape != [count] * count or len(relation.norms) != count:
                    raise ValueError(
                        f"task vectors need {count} norms and {count} x {count} cosines, "
                        f"got {len(relation.norms)} and rows of {shape}"
                    )
        return self

    def score_of(self, model: str, subtask: str) -> schema.SubtaskScore | None:
        """Return the test score of `model` on `subtask`, or None where it was not measured."""
        return next((s for s in self.scores if s.model == model and s.subtask == subtask), None)

    def curriculum_names(self) -> tuple[str, ...]:
        """Return the names of all subtasks, those of the curriculum in its order first."""
        return tuple(dict.fromkeys([*self.curriculum.order, *(subtask.name for subtask in self.subtasks)]))

    def names_by_group(self) -> dict[str, tuple[str, ...]]:
        """Return the names of all subtasks by group, both in the document's order."""
        groups = dict.fromkeys(subtask.group for subtask in self.subtasks)
        return {group: tuple(s.name for s in self.subtasks if s.group == group) for group in groups}

    def value_of(self, model: str, subtask: str | None) -> tuple[float, float] | None:
        """Return a model's score on a subtask (None: its mean) and the standard error; None if not measured."""
        if subtask is None:
            mean = self.mean_of(model)
            return (mean.mean, mean.se) if mean else None
        score = self.score_of(model, subtask)
        return (score.score, score.se) if score else None

    def mean_of(self, model: str) -> schema.Mean | None:
        """Return the mean score of `model` over the subtasks, or None where it was not measured."""
        return next((mean for mean in self.means if mean.model == model), None)

    def model_of(self, name: str) -> schema.Model | None:
        """Return the model called `name`, or None."""
        return next((model for model in self.models if model.name == name), None)


Document = Results | Mapping[str, Any]
"""What the functions of this package take: the schema itself, or its JSON form. One that does not follow the schema
raises DataError, as in `parse_results`."""


def parse_results(document: Document) -> Results:
    """Return `document` as `Results`.

    Raises:
        DataError: the document does not follow the schema; names the first place that does not.
    """
    if isinstance(document, Results):
        return document
    try:
        return Results.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "document"
        raise DataError(
            f"results document: expected the schema of memmcl.report.Results; at {place}: {first['msg']}; "
            f"write the report again with this version of memmcl"
        ) from error


def _unique(what: str, names: Iterable[str]) -> frozenset[str]:
    counts = Counter(names)
    for name, count in counts.items():
        if count > 1:
            raise ValueError(f"{what} {name!r} is there twice")
    return frozenset(counts)


def _known(what: str, known: frozenset[str], names: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r} is not one of {', '.join(sorted(known)) or 'none'}")
