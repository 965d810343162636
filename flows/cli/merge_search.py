"""`memmcl merge search`: how a user's adapters are best merged, by a search on a file of weak rows."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from flows.cli.common import Overrides, StoreUrl, console, open_store_of, our_options, quiet_environment
from flows.cli.merge_common import (
    OPTIONS,
    BaseName,
    Dtype,
    Experts,
    Full,
    Out,
    Parameters,
    Rank,
    bring,
    check_form,
    output_of,
    recipe_of,
    required,
    show_merge,
    weights_at,
    write,
)
from memmcl.config import RunConfig, load_config
from memmcl.errors import SearchError, UsageError
from memmcl.urls import redact

if TYPE_CHECKING:
    from collections.abc import Callable

    from memmcl.adapters.load import UserAdapter
    from memmcl.backbone.load import BaseRef
    from memmcl.backbone.shapes import Shapes
    from memmcl.evolve import Proposal
    from tasks.search.driver import Told
    from tasks.search.own_search import OwnSearch
    from tasks.search.spec import SearchSpec

_SETTINGS = OPTIONS | {
    "data.max_prompt_tokens": "--set data.max_prompt_tokens",
    "search.method": "--method",
    "search.strategy": "--strategy",
    "search.fitness": "--fitness",
    "search.blocks": "--blocks",
    "ray.workers": "--workers",
    "store.url": "--store",
}

WeakFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Weak rows, as JSONL, CSV or Parquet: rows of a subtask with its name as subtask, or prompt and answer; "
        "expert names the one that a row is for",
    ),
]
Method = Annotated[str | None, typer.Option(metavar="NAME", help="How task vectors are merged, as in `memmcl merge`")]
Evaluations = Annotated[int | None, typer.Option(min=1, help="Candidates, seeds included; 40 by default")]
Strategy = Annotated[
    Literal["bayesian", "cmaes", "genetic", "random"] | None,
    typer.Option(help="What proposes candidates; bayesian by default"),
]
Fitness = Annotated[
    Literal["loglik", "choice", "metric", "agree"] | None,
    typer.Option(
        help="What retention is measured by: likelihood of the gold answers, the default; the gold label's share among "
        "the labels; the metric; or agreement with what a row's own expert expects, which needs no labels"
    ),
]
Blocks = Annotated[int | None, typer.Option(min=1, help="Layer blocks with a coefficient of their own; 1 by default")]
Workers = Annotated[int | None, typer.Option(min=1, help="Candidates at once, each with a model in memory")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the search, and of the masks of random methods")]
Settings = Annotated[
    Path | None, typer.Option("--config", help="YAML file of a run: its settings, and subtasks of your own")
]


def search(
    base: BaseName = None,
    expert: Experts = None,
    weak: WeakFile = None,
    out: Out = None,
    method: Method = None,
    param: Parameters = None,
    evaluations: Evaluations = None,
    strategy: Strategy = None,
    fitness: Fitness = None,
    blocks: Blocks = None,
    rank: Rank = None,
    full: Full = False,
    dtype: Dtype = "auto",
    store: StoreUrl = None,
    workers: Workers = None,
    seed: Seed = None,
    config: Settings = None,
    set_: Overrides = None,
) -> None:
    """Search the weights of LoRA adapters of your own on a few rows, and write the best merge.

    It starts with the base, each expert alone, their average and a grid of equal weights. A row is held to the expert
    that it is for, otherwise to whichever of base and experts does best on such rows. A search that was killed goes on
    when the same command is given again, with any number of workers.

    For example:

    $ memmcl merge search --base org/model --expert a=lora-a --expert b=lora-b --weak weak.jsonl --out merged
    $ memmcl merge search --base org/model --expert a=a --expert b=b --weak weak.jsonl --method tsv --blocks 2 --out m
    """
    base, named, out = required(base, expert, out)
    if not weak:
        raise UsageError("expected --weak, a file of weak rows, got none")
    given = {
        "model.name_or_path": base, "search.method": method, "search.strategy": strategy, "search.fitness": fitness,
        "search.blocks": blocks, "ray.workers": workers, "store.url": store, "seed": seed,
    }  # fmt: skip
    quiet_environment()
    with our_options(_SETTINGS):
        settings = _settings(config, set_ or [], given, param or [])
        check_form(settings.search.method, rank, full, dtype)
        _check_out(out)
        asked, shapes, experts, warnings, weights = _plan(settings, base, named, weak, evaluations)
        _check_out(out, asked.plan.key)
        from tasks.search.candidates import candidates_table
        from tasks.search.own_search import run_search

        with _bar(asked) as (told, say):
            document = run_search(asked, told, say)
        _leaderboard(asked, document)
        if not any(any(row) for row in document["coefficients"].values()):
            raise SearchError(
                "the base alone does best on these rows, so that there is nothing to write; look whether the rows are "
                "what the experts are for"
            )
        from memmcl.merge.genome import Recipe
        from tasks.search.own_merge import OwnMerge

        merge = OwnMerge(
            shapes, experts, {name: tuple(row) for name, row in document["coefficients"].items()},
            Recipe(**document["recipe"]), output_of(shapes, rank, full, dtype), weights=weights,
            search=_facts(asked, document), tables={"candidates.parquet": candidates_table(document)},
        )  # fmt: skip
        show_merge(out, write(out, merge, warnings))
    console.print(f"candidates     {out / 'candidates.parquet'}", soft_wrap=True)


def _settings(
    config: Path | None, overrides: Sequence[str], given: Mapping[str, Any], parameters: Sequence[str]
) -> RunConfig:
    """Return the settings of a file and of --set, with what options gave in their place."""
    ours = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]
    settings = load_config(config, ours)
    if parameters:
        fixed = settings.search.parameters | dict(recipe_of(settings.search.method, parameters, 0).parameters)
        settings = load_config(config, [*ours, f"search.parameters={json.dumps(fixed)}"])
    return settings


def _check_out(out: Path, key: str | None = None) -> None:
    """Refuse a folder that holds anything but the result of this search (of any, as long as its key is not known).

    Now, and not when the search is over.
    """
    from memmcl.files.folder import made_before
    from tasks.search.own_merge import RECORD

    try:
        found = json.loads((out / RECORD).read_text())["made_from"]["search"]
    except (OSError, ValueError, KeyError, TypeError):
        made_before(out.absolute(), RECORD, {})  # new or empty, or refused
        return
    if found is None or key not in (None, found):
        raise UsageError(f"{out} holds what other arguments made; name a new or empty folder")


def _plan(
    settings: RunConfig, base: str, places: Mapping[str, str], weak: str, evaluations: int | None
) -> tuple[OwnSearch, Shapes, list[UserAdapter], list[str], BaseRef]:
    """Read everything, refuse what does not fit, and return the search with what it is made of."""
    from memmcl.suite.weak import read_weak_rows
    from memmcl.suite.configured import lenders, read_arguments

    storage = read_arguments(settings)["storage"]
    rows = read_weak_rows(
        weak, catalogue=lenders(settings), experts=list(places), max_characters=settings.data.max_characters,
        storage=storage, labelled=settings.search.labelled,
    )  # fmt: skip
    shapes, experts, warnings = bring(base, places)
    weights = weights_at(base)
    with console.status("opening the store"):
        store = open_store_of(settings)
        from tasks.search.own_search import plan_search

        count = evaluations or settings.search.stage1_evaluations
        command = redact(shlex.join(["memmcl", *sys.argv[1:]]))
        planned = plan_search(settings, store, weights, shapes, experts, rows, count, command)
    told = ", ".join(f"{len(found.rows)} of {found.name}" for found in rows)
    console.print(f"weak rows      {told}", soft_wrap=True)
    console.print(f"search         {planned.plan.key[:8]}, store {store.url}", soft_wrap=True)
    return planned, shapes, experts, warnings, weights


@contextmanager
def _bar(asked: OwnSearch) -> Iterator[tuple[Told, Callable[[str], None]]]:
    """Show how far a search is: a bar in a terminal, about ten lines elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    total, before = asked.spec.evaluations, asked.standing
    done, best = before["candidates"], float("-inf") if before["fitness"] is None else before["fitness"]
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=total, best="")

        def told(_: SearchSpec, __: Proposal, record: Mapping[str, Any]) -> None:
            nonlocal best, done
            done += 1
            best = max(best, record["fitness"] if record["fitness"] is not None and not record["stopped"] else best)
            bar.update(task, completed=done, best=f"best {best:.4f}")
            if not console.is_terminal and (done * 10 // total > (done - 1) * 10 // total):
                console.print(f"searching      {done} of {total}, best {best:.4f}")

        yield told, lambda phase: bar.update(task, description=phase)


def _leaderboard(asked: OwnSearch, document: Mapping[str, Any]) -> None:
    """Print the merges that anyone would try by hand, and the winner; then what the rows were held to."""
    names = list(asked.spec.subtasks)
    table = Table("candidate", "fitness", *(names if len(names) > 1 else ()), box=None, header_style="bold")
    winner = document["winner"]
    shown = [one for one in document["candidates"] if one["origin"].startswith("seed:") and one["index"] != winner]
    best = next(one for one in document["candidates"] if one["index"] == winner)
    for candidate in [*shown, best]:
        origin = candidate["origin"].removeprefix("seed:")
        title = f"winner ({origin})" if candidate["index"] == winner else origin
        values = [_number(candidate["values"][name]) for name in names] if len(names) > 1 else []
        fitness = _number(candidate["fitness"])
        table.add_row(title, fitness, *values, style="bold" if candidate["index"] == winner else None)
    console.print(table)
    held = ", ".join(f"{name}: {found['held_to']}" for name, found in asked.measured().items())
    console.print(f"retention      1 is what this model reaches: {held}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _facts(asked: OwnSearch, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record of the merge says of its search."""
    winner = next(one for one in document["candidates"] if one["index"] == document["winner"])
    cfg = asked.run.config.search
    return {
        "key": asked.plan.key, "store": asked.store.url, "strategy": cfg.strategy, "fitness": cfg.fitness,
        "evaluations": len(document["candidates"]), "seed": asked.run.config.seed, "blocks": cfg.blocks,
        "rows": asked.rows, "held_to": {name: found["held_to"] for name, found in asked.measured().items()},
        "winner": winner["index"], "origin": winner["origin"], "best": winner["fitness"],
        "values": winner["values"],
    }  # fmt: skip
