"""A search of a user's adapters as an object: run it, then look at its result, merge by it, save it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memmcl.adapters.load import UserAdapter
from memmcl.api.merging import Merge, check_form, output_of
from memmcl.api.notebook import html_table, numbers
from memmcl.backbone.load import BaseRef
from memmcl.backbone.shapes import Shapes
from memmcl.errors import SearchError
from memmcl.merge.genome import Recipe
from memmcl.report.curve import curve_svg
from memmcl.search.course import Driver, OnResult
from memmcl.search.document import EvaluatedCandidate, SearchDocument
from memmcl.search.local import LocalDriver
from memmcl.search.plan import SearchPlan
from memmcl.search.problem import REFERENCE, SearchProblem
from memmcl.search.records import progress_of
from memmcl.search.reference import measure_references
from memmcl.search.spec import SearchSpec
from memmcl.store import Lease, Store


@dataclass(frozen=True, repr=False)
class SearchResult:
    """The best merge of a search, and all its candidates.

    document: as it is stored; references: by name of the rows, the model whose score counts as 1.
    """

    search: MergeSearch
    document: SearchDocument
    references: Mapping[str, str]

    @property
    def best(self) -> dict[str, tuple[float, ...]]:
        """The coefficients of the best merge, by expert, one per layer block."""
        return self.document.coefficients

    @property
    def fitness(self) -> float:
        """The fitness of the best merge on the weak rows: 1 is what the references reach."""
        return self.document.fitness

    @property
    def winner(self) -> EvaluatedCandidate:
        """The winning candidate."""
        return next(one for one in self.document.candidates if one.index == self.document.winner)

    @cached_property
    def candidates(self) -> pa.Table:
        """All candidates, one a row: genome, origin, fitness, values by subtask, rows, seconds."""
        return pq.read_table(io.BytesIO(self.document.candidates_table()))

    def merge(self, *, rank: int | None = None, full: bool = False, dtype: str = "auto") -> Merge:
        """Return the best merge, ready to be saved; rank, full, dtype: see `merge_experts`.

        Raises:
            SearchError: the base alone is best.
            UsageError: a form of the result that the method has not.
        """
        if not any(any(row) for row in self.best.values()):
            raise SearchError(
                "the base alone does best on these rows, so that there is nothing to write; look whether the rows are "
                "what the experts are for"
            )
        search, recipe = self.search, self.document.recipe
        check_form(Recipe(recipe.method), rank, full, dtype)
        return Merge(
            search.shapes,
            search.adapters,
            self.best,
            recipe,
            output_of(search.shapes, rank, full, dtype),
            weights=search.base,
            search=self._facts(),
            tables={"candidates.parquet": self.document.candidates_table()},
            warnings=search.warnings,
        )

    def save(
        self, folder: str | Path, *, rank: int | None = None, full: bool = False, dtype: str = "auto"
    ) -> dict[str, Any]:
        """Write the best merge into a new or empty folder; return its record. See `merge`."""
        return self.merge(rank=rank, full=full, dtype=dtype).save(folder)

    def _facts(self) -> dict[str, Any]:
        """Return what the record of the merge says of its search."""
        problem, cfg, winner = self.search.problem, self.search.problem.search, self.winner
        return {
            "key": self.search.plan.key,
            "store": self.search.store.url,
            "strategy": cfg.strategy,
            "fitness": cfg.fitness,
            "evaluations": len(self.document.candidates),
            "seed": problem.seed,
            "blocks": cfg.blocks,
            "rows": self.search.rows,
            "held_to": dict(self.references),
            "winner": winner.index,
            "origin": winner.origin,
            "best": winner.fitness,
            "values": winner.values,
        }

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {numbers(row)}" for name, row in self.best.items())
        return f"SearchResult(fitness {self.fitness:.4f} of {len(self.document.candidates)} candidates: {best})"

    def _repr_html_(self) -> str:
        rows = [(name, numbers(row)) for name, row in self.best.items()]
        table = html_table(("expert", "weight"), rows, caption=f"best merge, fitness {self.fitness:.4f}")
        return table + curve_svg([one.fitness for one in self.document.candidates if not one.stopped])


@dataclass(frozen=True, repr=False)
class MergeSearch:
    """A search that is ready to run: its adapters and rows are in the store.

    shapes, base: of the base model. adapters: the user's. rivals: by name of the rows, the models of which the best is
    the reference. counts: how many weak rows there are by name.
    """

    problem: SearchProblem
    plan: SearchPlan
    shapes: Shapes
    base: BaseRef
    adapters: Sequence[UserAdapter]
    rivals: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]
    warnings: tuple[str, ...] = ()

    @property
    def spec(self) -> SearchSpec:
        """What is searched."""
        return self.plan.first

    @property
    def store(self) -> Store:
        """The store."""
        return self.problem.open_store()

    @property
    def rows(self) -> int:
        """How many weak rows there are in all."""
        return sum(self.counts.values())

    @property
    def progress(self) -> dict[str, Any]:
        """How far it is, also when another process runs it; see `memmcl.search.records.progress_of`."""
        return progress_of(self.store.records(f"searches/{self.spec.key}"))

    def __repr__(self) -> str:
        cfg, experts = self.problem.search, ", ".join(self.problem.experts)
        what = f"{cfg.method} by {cfg.strategy}, {self.spec.evaluations} candidates"
        return f"MergeSearch({what}: {experts} on {self.rows} rows)"

    def _repr_html_(self) -> str:
        progress = {name: value for name, value in self.progress.items() if not isinstance(value, dict)}
        return html_table(("progress", ""), progress.items(), caption=repr(self))

    def result(self) -> SearchResult | None:
        """Return the result, None where the search is not finished."""
        manifest = self.store.find("search", self.plan.key)
        if manifest is None:
            return None
        document = SearchDocument.model_validate_json(self.store.read(manifest, "search.json"))
        read = {name: json.loads(self.store.read(ref, REFERENCE)) for name, ref in self.problem.references.items()}
        return SearchResult(self, document, {name: one["held_to"] for name, one in read.items()})

    def run(self, driver: Driver | None = None, on_result: OnResult = lambda *_: None) -> SearchResult:
        """Run the search to its end; candidates that the store has records of are not evaluated again.

        driver: where candidates are evaluated; None: in this process. on_result: called with every result.

        Raises:
            MemmclError: a candidate cannot be evaluated, or another process is at work on the same search.
        """
        done = self.result()
        if done is not None:
            return done
        driver, started = driver or LocalDriver(), time.perf_counter()
        with Lease(self.store, self.spec.key, {}), driver.session(self.problem):
            measure_references(self.problem, self.rivals, driver)
            course = self.plan.course()
            driver.run(self.problem, [course], on_result)
            self.plan.publish(course.phases, time.perf_counter() - started)
        result = self.result()
        assert result is not None, "it was just published"
        return result
