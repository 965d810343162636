"""`memmcl merge search`: how a user's adapters are best merged, by a search on a file of weak rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli import merge_common as shared
from flows.cli.common import Overrides, StoreUrl, open_store_of, our_options, progress_bar, quiet_environment
from flows.cli.screen import log_output
from flows.terminal import console, notes, table
from memmcl.config import RunConfig, load_config
from memmcl.errors import UsageError

if TYPE_CHECKING:
    from memmcl.api.search_result import MergeSearch, SearchResult
    from memmcl.evolve import Proposal
    from memmcl.search.course import Driver, OnResult
    from memmcl.search.spec import SearchSpec

_SETTINGS = shared.OPTIONS | {
    "data.max_prompt_tokens": "--set data.max_prompt_tokens",
    "ray.workers": "--workers",
    "store.url": "--store",
    **{f"search.{name}": f"--{name}" for name in ("method", "strategy", "fitness", "blocks")},
}

WeakFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Weak rows, as JSONL, CSV or Parquet: rows of a subtask with its name as subtask, or prompt and answer; "
        "expert names the one that a row is for",
    ),
]
SearchMethod = Annotated[
    str | None, typer.Option(metavar="NAME", help="How task vectors are merged, as in `memmcl merge`")
]
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
    base: shared.BaseName = None,
    expert: shared.Experts = None,
    weak: WeakFile = None,
    out: shared.Out = None,
    method: SearchMethod = None,
    param: shared.Parameters = None,
    evaluations: Evaluations = None,
    strategy: Strategy = None,
    fitness: Fitness = None,
    blocks: Blocks = None,
    rank: shared.Rank = None,
    full: shared.Full = False,
    dtype: shared.Dtype = "auto",
    store: StoreUrl = None,
    workers: Workers = None,
    seed: Seed = None,
    config: Settings = None,
    set_: Overrides = None,
) -> None:
    """Search the weights of LoRA adapters of your own on a few rows, and write the best merge.

    It starts with the base, each expert alone, their average and a grid of equal weights. A row is measured against the
    expert that it is for, otherwise against whichever of base and experts does best on such rows. A search that was
    killed goes on when the same command is given again, with any number of workers.

    For example:

    $ memmcl merge search --base org/model --expert a=lora-a --expert b=lora-b --weak weak.jsonl --out merged
    $ memmcl merge search --base org/model --expert a=a --expert b=b --weak weak.jsonl --method tsv --blocks 2 --out m
    """
    base, named, out = shared.required(base, expert, out)
    if not weak:
        raise UsageError("expected --weak, a file of weak rows, got none")
    given = {
        "model.name_or_path": base,
        "search.method": method,
        "search.strategy": strategy,
        "search.fitness": fitness,
        "search.blocks": blocks,
        "ray.workers": workers,
        "store.url": store,
        "seed": seed,
    }
    quiet_environment()
    with our_options(_SETTINGS), log_output():
        settings = _settings(config, set_ or [], given, param or [])
        from memmcl.api.merging import check_form
        from memmcl.merge.genome import Recipe

        check_form(Recipe(settings.search.method), rank, full, dtype)
        _check_out(out)
        result = _search(settings, base, named, weak, evaluations, out)
        _leaderboard(result)  # also where no merge is better than the base, and none is written
        record = shared.save(out, result.merge(rank=rank, full=full, dtype=dtype))
    shared.show_merge(out, record, winner=result.winner, references=result.references)
    console.print(f"candidates     {out / 'candidates.parquet'}", soft_wrap=True)


def _search(
    settings: RunConfig, base: str, experts: Mapping[str, str], weak: str, evaluations: int | None, out: Path
) -> SearchResult:
    """Search on Ray Tune, and say what is searched and how far it is."""
    from memmcl.api.searching import plan_search
    from tasks.search.driver import check_store

    with notes.status("reading adapters and rows"):
        store = open_store_of(settings)
        check_store(store.url)
        planned = plan_search(settings, store, base, experts, weak, evaluations)
    counts = ", ".join(f"{count} of {name}" for name, count in planned.counts.items())
    notes.print(f"weak rows      {counts}", soft_wrap=True)
    notes.print(f"search         {planned.plan.key[:8]}, store {store.url}", soft_wrap=True)
    _check_out(out, planned.plan.key)
    with _progress(planned) as on_result:
        return planned.run(_driver(settings), on_result)


def _driver(settings: RunConfig) -> Driver:
    from tasks.search.driver import RayDriver

    return RayDriver(settings.ray)


def _settings(
    config: Path | None, overrides: Sequence[str], given: Mapping[str, Any], parameters: Sequence[str]
) -> RunConfig:
    """Return the settings of a file and of --set, with what options gave in their place."""
    ours = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]
    settings = load_config(config, ours)
    if parameters:
        fixed = settings.search.parameters | shared.parameters_of(settings.search.method, parameters)
        settings = load_config(config, [*ours, f"search.parameters={json.dumps(fixed)}"])
    return settings


def _check_out(out: Path, key: str | None = None) -> None:
    """Refuse a folder that holds anything but the result of this search (of any, as long as its key is not known).

    Now, and not when the search is over.
    """
    from memmcl.api.merging import RECORD
    from memmcl.files.folder import made_before

    try:
        earlier = json.loads((out / RECORD).read_text())["made_from"]["search"]
    except (OSError, ValueError, KeyError, TypeError):
        made_before(out.absolute(), RECORD, {})  # raises if it is neither new nor empty
        return
    if earlier is None or key not in (None, earlier):
        raise UsageError(f"{out} holds what other arguments made; name a new or empty folder")


@contextmanager
def _progress(planned: MergeSearch) -> Iterator[OnResult]:
    """Show how far a search is: a bar in a terminal, about ten lines elsewhere."""
    total, before = planned.spec.evaluations, planned.progress
    done, best = before["candidates"], float("-inf") if before["fitness"] is None else before["fitness"]
    with progress_bar(total, "measuring references") as move:

        def show(_: SearchSpec, __: Proposal, record: Mapping[str, Any]) -> None:
            nonlocal best, done
            done += 1
            if record["fitness"] is not None and not record["stopped"]:
                best = max(best, record["fitness"])
            move(done, "searching", f"best {best:.4f}")
            if not notes.is_terminal and (done * 10 // total > (done - 1) * 10 // total):
                notes.print(f"searching      {done} of {total}, best {best:.4f}")

        yield show


def _leaderboard(result: SearchResult) -> None:
    """Print the merges that anyone would try by hand, and the winner; then what retention is measured in."""
    names, winner = list(result.search.spec.subtasks), result.winner
    columns = names if len(names) > 1 else []  # the only one is the fitness itself
    board = table("candidate", "fitness", *columns)
    seeds = [one for one in result.document.candidates if one.origin.startswith("seed:") and one.index != winner.index]
    for candidate in [*seeds, winner]:
        origin = candidate.origin.removeprefix("seed:")
        title, style = (f"winner ({origin})", "bold") if candidate is winner else (origin, None)
        numbers = [candidate.fitness, *(candidate.values[name] for name in columns)]
        board.add_row(title, *("failed" if one is None else f"{one:.4f}" for one in numbers), style=style)
    console.print(board)
    references = ", ".join(f"{name}: {model}" for name, model in result.references.items())
    console.print(f"retention      1 is what this model reaches: {references}", soft_wrap=True)
