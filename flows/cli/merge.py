"""`memmcl merge`: LoRA adapters that a user brings become one, apart from any run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.common import console, our_options, quiet_environment
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
    bring,
    check_form,
    named_values,
    number,
    output_of,
    recipe_of,
    required,
    show_merge,
    weights_at,
    write,
)
from flows.cli.merge_search import search
from memmcl.errors import UsageError, shown

if TYPE_CHECKING:
    from memmcl.merge.genome import Recipe
    from tasks.search.own_merge import Texts

merge_app = typer.Typer(invoke_without_command=True, no_args_is_help=True)

TextFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="For regmean, of each expert: unlabelled texts as it is shown them, one a line, or JSONL, CSV or Parquet "
        "with a column text",
    ),
]


@merge_app.callback()
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
        if base or expert or out:
            raise UsageError(f"options of `memmcl merge {context.invoked_subcommand}` go behind it; move them there")
        return
    base, named, out = required(base, expert, out)
    coefficients = {name: (weight,) for name, weight in weights_of(weights, list(named)).items()}
    quiet_environment()
    with our_options(OPTIONS):
        recipe = recipe_of(method, param or [], seed)
        check_form(recipe.method, rank, full, dtype)
        read = _texts(recipe, texts or [], [name for name, values in coefficients.items() if any(values)])
        shapes, experts, warnings = bring(base, named)
        from tasks.search.own_merge import OwnMerge

        asked = OwnMerge(
            shapes, experts, coefficients, recipe, output_of(shapes, rank, full, dtype), _run_texts(read, text_tokens),
            weights_at(base) if full or read else None,
        )  # fmt: skip
        show_merge(out, write(out, asked, warnings))


merge_app.command("search")(search)


def weights_of(given: str | None, names: Sequence[str]) -> dict[str, float]:
    """Return the weight of each expert."""
    if given is None:
        return dict.fromkeys(names, 1.0)
    parts = [part.strip() for part in given.split(",")]
    by_name = [part.partition("=") for part in parts if "=" in part]
    if by_name and len(by_name) != len(parts):
        raise UsageError(
            f"--weights takes numbers in the order of the experts, or NAME=NUMBER each; got {shown(given)}"
        )
    if not by_name and len(parts) != len(names):
        raise UsageError(f"--weights has {len(parts)} numbers for {len(names)} experts ({', '.join(names)})")
    pairs = [(name.strip(), value) for name, _, value in by_name] or list(zip(names, parts, strict=True))
    found = dict.fromkeys(names, 1.0)
    for name, value in pairs:
        if name not in found:
            raise UsageError(f"--weights names {name}, which is no expert; known ones: {', '.join(names)}")
        found[name] = number(value)
    if len({name for name, _ in pairs}) < len(pairs):
        raise UsageError(f"--weights names an expert twice: {shown(given)}")
    if not any(found.values()):
        raise UsageError("all weights are zero; the merge would be the base itself")
    return found


def _texts(recipe: Recipe, given: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the texts of each expert that takes part, for a method that needs them."""
    from memmcl.merge.table import METHODS

    files = named_values("--texts", given, "FILE")
    if not METHODS[recipe.method].grams:
        if files:
            raise UsageError(f"--texts is for regmean; {recipe.method} needs none")
        return {}
    unknown = [name for name in files if name not in names]
    missing = [name for name in names if name not in files]
    if unknown or missing:
        what = f"some for {unknown[0]}, which takes no part" if unknown else f"none for {', '.join(missing)}"
        raise UsageError(f"{recipe.method} needs unlabelled texts of each expert, --texts NAME=FILE; got {what}")
    from memmcl.experts.forced import read_texts
    from memmcl.suite.faults import Faults

    found = {}
    for name in names:
        faults = Faults()
        found[name] = read_texts(files[name], faults=faults)
        if len(faults):
            console.print(f"left out: {len(faults)} texts of {name}, first {faults.first[0]}", soft_wrap=True)
    return found


def _run_texts(read: Mapping[str, Sequence[str]], tokens: int) -> Texts:
    from tasks.search.own_merge import Texts

    if not read:
        return Texts()
    import torch

    from memmcl.backbone.load import resolve_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Texts(read, tokens, resolve_dtype("auto", device), device)
