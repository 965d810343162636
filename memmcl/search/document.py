"""The documents of a search in the store: references, candidates, the result; and all candidates as a table."""

from __future__ import annotations

import io
import math
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from memmcl.evaluate.choice import Choices
from memmcl.merge.genome import Recipe
from memmcl.search.spec import SearchSpec


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _is_none(value: object) -> bool:
    return value is None


Score = Annotated[float | None, BeforeValidator(_finite)]
"""A fitness; None: the candidate failed."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class EvaluatedCandidate(_Document):
    """A genome with its scores.

    origin, generation, parents: as in `memmcl.evolve.Proposal`. fitness: an estimate where `stopped`. values: by
    subtask. rungs: the score at each rung reached. stopped: whether it lost its race. rows: weak rows that it was
    scored on. seconds: by phase. reused_from: index of the earlier candidate with the same genome.
    """

    index: int
    origin: str
    generation: int
    parents: tuple[int, ...]
    genome: tuple[float, ...]
    fitness: Score
    values: dict[str, float | None]
    rungs: tuple[float | None, ...]
    stopped: bool
    rows: int
    objectives: tuple[float | None, ...] | None = Field(None, exclude_if=_is_none)
    seconds: dict[str, float]
    reused_from: int | None = Field(None, exclude_if=_is_none)


class ReferenceValues(_Document):
    """What one model reaches on rows: the unit that candidates are measured in.

    loglik: mean gold log-probability per answer token. choice: mean log of the gold label's share among the labels; of
    tuples, loglik. score: the metric; None where it was not needed. logprobs: by row, the summed log-probability of the
    gold answer. choices: by row, what makes its label's share; None of tuples. answers: where the fitness is agreement.
    """

    loglik: float | None = None
    choice: float | None = None
    score: float | None = None
    logprobs: tuple[float, ...] = ()
    choices: dict[str, list[Any]] | None = None
    answers: tuple[str, ...] | None = Field(None, exclude_if=_is_none)

    @property
    def brief(self) -> dict[str, float | None]:
        """The values without those of single rows."""
        return {"loglik": self.loglik, "choice": self.choice, "score": self.score}

    def label_choices(self) -> Choices | None:
        """Return the choices of the rows as arrays; None of tuples."""
        return Choices(**{name: np.array(value) for name, value in self.choices.items()}) if self.choices else None


class FinalistScore(_Document):
    """One of the merges that the winner was chosen from. selection: its fitness on selection rows, if they decided."""

    title: str
    search: str
    index: int
    origin: str
    fitness: float
    selection: Score
    wins: bool


class SearchedPhase(_Document):
    """One search with all its candidates. winner: index of the overall winner, if it is one of these."""

    spec: SearchSpec
    genes: tuple[str, ...]
    stopped_early: bool
    candidates: tuple[EvaluatedCandidate, ...]
    winner: int | None = None


class SearchDocument(SearchedPhase):
    """A search and what came of it. joint: the search over all coefficients that followed, if one did.

    coefficients, recipe, fitness: of the winner; fitness is that on the weak rows.
    """

    joint: SearchedPhase | None
    finalists: tuple[FinalistScore, ...]
    coefficients: dict[str, tuple[float, ...]]
    recipe: Recipe
    fitness: float

    def candidates_table(self) -> bytes:
        """Return all candidates as Parquet, those of the joint search too; the same document, the same bytes.

        One row each; genome by gene, values by subtask, the rest as in `EvaluatedCandidate`.
        """
        real, text, whole, truth = pa.float64(), pa.string(), pa.int64(), pa.bool_()
        schema = {
            "search": text,
            "index": whole,
            "origin": text,
            "generation": whole,
            "parents": pa.list_(whole),
            "genome": pa.map_(text, real),
            "fitness": real,
            "values": pa.map_(text, real),
            "rungs": pa.list_(real),
            "stopped": truth,
            "rows": whole,
            "seconds_merge": real,
            "seconds_evaluate": real,
            "seconds_wait": real,
            "reused": truth,
            "winner": truth,
        }
        phases = [self, *([self.joint] if self.joint else [])]
        rows = [_row(phase, candidate) for phase in phases for candidate in phase.candidates]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(schema.items()))), sink)
        return sink.getvalue()


def _row(phase: SearchedPhase, candidate: EvaluatedCandidate) -> dict[str, Any]:
    return {
        **dict(candidate),
        "search": phase.spec.name,
        "genome": list(zip(phase.genes, candidate.genome, strict=True)),
        "values": list(candidate.values.items()),
        **{f"seconds_{name}": candidate.seconds.get(name, 0.0) for name in ("merge", "evaluate", "wait")},
        "reused": candidate.reused_from is not None,
        "winner": candidate.index == phase.winner,
    }
