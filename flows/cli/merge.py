"""`memmcl merge`: LoRA adapters that a user brings become one, apart from any run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.app import App, with_output
from flows.cli.common import our_options, quiet_environment, read_texts
from flows.cli.merge_common import (
    OPTIONS,
    BaseName,
    Dtype,
    Experts,
    Full,
    Method,
    Out,
    Parameters,
    Rank,
    named_values,
    number,
    parameters_of,
    recipe_of,
    required,
    save,
    show_merge,
)
from flows.cli.merge_search import search
from flows.cli.screen import log_output
from flows.terminal import notes, output
from memmcl.errors import UsageError, shown

if TYPE_CHECKING:
    from memmcl.merge.genome import Recipe

merge_app = App(invoke_without_command=True)

TextFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="For regmean, of each expert: unlabelled texts as it is shown them, one a line, or JSONL, CSV or Parquet "
        "with a column text",
    ),
]


def merge(
    context: typer.Context,
    base: BaseName = None,
    expert: Experts = None,
    out: Out = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="W,... | NAME=W,...", help="Weight of each expert, in their order or by name; 1 by default"
        ),
    ] = None,
    method: Method = "linear",
    param: Parameters = None,
    rank: Rank = None,
    full: Full = False,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the masks of dare_linear, dare_ties and della")] = 0,
    texts: TextFiles = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text that are run, at most")] = 512,
) -> None:
    """Merge LoRA adapters of your own into one, or search how: `memmcl merge search --help`.

    The result is an exact PEFT adapter (linear, tsv, iso_cts), a compressed one (--rank) or a whole model (--full),
    with a model card and a record of all it was made from. For an adapter, the base's config.json is enough.

    For example:

    $ memmcl merge --base org/model --expert a=lora-a --expert b=lora-b --weights 1,0.5 --out merged
    $ memmcl merge --base org/model --expert a=lora-a --expert b=lora-b --method ties --rank 32 --out merged
    $ memmcl merge --base org/model --expert a=s3://bucket/a --expert b=org/b --method dare_ties --full --out merged
    """
    if context.invoked_subcommand is not None:
        if base or expert or out or output.chosen:
            raise UsageError(f"options of `memmcl merge {context.invoked_subcommand}` go behind it; move them there")
        return
    base, named, out = required(base, expert, out)
    quiet_environment()
    with our_options(OPTIONS), log_output():
        from memmcl.api import merging

        taken = weights_of(weights, list(named))
        recipe = recipe_of(method, parameters_of(method, param or []), seed)
        merging.check_form(recipe, rank, full, dtype)
        files = _text_files(texts or [], recipe, merging.weights_of(taken, list(named)))
        with notes.status("reading the adapters and the base"):
            merged = merging.merge_experts(
                base,
                named,
                weights=taken,
                method=method,
                parameters=recipe.parameters,
                rank=rank,
                full=full,
                dtype=dtype,
                texts={name: read_texts(place, f"texts of {name}") for name, place in files.items()},
                text_tokens=text_tokens,
                seed=seed,
            )
        record = save(out, merged)
    show_merge(out, record)


merge_app.callback()(with_output(merge, works=True))
merge_app.command("search", works=True)(search)


def _text_files(texts: Sequence[str], recipe: Recipe, weights: Mapping[str, float]) -> dict[str, str]:
    """Return the file of texts of each expert, once it is known that the method needs them, and all of them."""
    from memmcl.api.merging import check_texts

    files = named_values("--texts", texts, "FILE")
    check_texts(recipe, dict.fromkeys(files, ()), [name for name, weight in weights.items() if weight])
    return files


def weights_of(given: str | None, names: Sequence[str]) -> dict[str, float] | list[float] | None:
    """Return the numbers of --weights, in the order of the experts or by name."""
    if given is None:
        return None
    parts = [part.strip() for part in given.split(",")]
    by_name = [part.partition("=") for part in parts if "=" in part]
    if not by_name:
        return [number(value) for value in parts]
    if len(by_name) != len(parts):
        raise UsageError(
            f"--weights takes numbers in the order of the experts, or NAME=NUMBER each; got {shown(given)}"
        )
    if len({name.strip() for name, _, _ in by_name}) < len(by_name):
        raise UsageError(f"--weights names an expert twice: {shown(given)}")
    return {name.strip(): number(value) for name, _, value in by_name}
