"""`memmcl merge`: LoRA adapters that a user brings become one, apart from any run."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli import merge_common as shared
from flows.cli.app import App, with_output
from flows.cli.common import our_options, quiet_environment, read_texts
from flows.cli.merge_search import search
from flows.cli.screen import log_output
from flows.terminal import notes, output
from memmcl.errors import UsageError, shown

merge_app = App(invoke_without_command=True)

Weights = Annotated[
    str | None,
    typer.Option(metavar="W,... | NAME=W,...", help="Weight of each expert, in their order or by name; 1 by default"),
]
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
    base: shared.BaseName = None,
    expert: shared.Experts = None,
    out: shared.Out = None,
    weights: Weights = None,
    method: shared.Method = "linear",
    param: shared.Parameters = None,
    rank: shared.Rank = None,
    full: shared.Full = False,
    dtype: shared.Dtype = "auto",
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
        if base or expert or out or output.json or output.quiet or output.verbose:
            raise UsageError(f"options of `memmcl merge {context.invoked_subcommand}` go behind it; move them there")
        return
    base, named, out = shared.required(base, expert, out)
    quiet_environment()
    with our_options(shared.OPTIONS), log_output():
        from memmcl.api import merging
        from memmcl.merge.genome import Recipe

        numbers = weights_of(weights)
        recipe = Recipe(method, shared.parameters_of(method, param or []), seed)
        merging.check_form(recipe, rank, full, dtype)
        files = shared.named_values("--texts", texts or [], "FILE")
        used = [name for name, weight in merging.weights_of(numbers, list(named)).items() if weight]
        merging.check_texts(recipe, dict.fromkeys(files, ()), used)  # before any file is read
        with notes.status("reading the adapters and the base"):
            merged = merging.merge_experts(
                base,
                named,
                weights=numbers,
                method=method,
                parameters=recipe.parameters,
                rank=rank,
                full=full,
                dtype=dtype,
                texts={name: read_texts(place, f"texts of {name}") for name, place in files.items()},
                text_tokens=text_tokens,
                seed=seed,
            )
        record = shared.save(out, merged)
    shared.show_merge(out, record)


merge_app.callback()(with_output(merge, works=True))
merge_app.command("search", works=True)(search)


def weights_of(option: str | None) -> dict[str, float] | list[float] | None:
    """Return the numbers of --weights, in the order of the experts or by name."""
    if option is None:
        return None
    entries = [entry.strip() for entry in option.split(",")]
    if not any("=" in entry for entry in entries):
        return [shared.number(entry) for entry in entries]
    if not all("=" in entry for entry in entries):
        raise UsageError(
            f"--weights takes numbers in the order of the experts, or NAME=NUMBER each; got {shown(option)}"
        )
    pairs = [entry.partition("=") for entry in entries]
    weights = {name.strip(): shared.number(value) for name, _, value in pairs}
    if len(weights) < len(pairs):
        raise UsageError(f"--weights names an expert twice: {shown(option)}")
    return weights
