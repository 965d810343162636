"""`memmcl experts`: LoRA adapters that a user brings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from flows.cli.common import console, our_options, quiet_environment
from memmcl import seeds
from memmcl.config import DataConfig
from memmcl.errors import ModelError, UsageError, shown
from memmcl.suite.subtasks import SUBTASKS, Subtask

if TYPE_CHECKING:
    from memmcl.backbone.load import BaseRef
    from memmcl.experts.after import Anchored
    from memmcl.experts.forced import Dealt
    from memmcl.experts.train import Moved, Progress
    from memmcl.suite.prompts import Prompter

ALL = "all"
SIX: tuple[str, ...] = DataConfig.model_fields["subtasks"].default
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_OPTIONS = {
    "model.name_or_path": "--base",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "experts.learning_rate": "--learning-rate",
    "experts.micro_batch_size": "--batch-size",
}
"""Settings of a run that messages of memmcl name -> the options that they are here."""

experts_app = typer.Typer(help="LoRA adapters that you bring.", no_args_is_help=True)

TextsFile = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Unlabelled texts, best of the kind that the adapter is for: one a line, or JSONL, CSV or Parquet with a "
        "column text",
    ),
]
TemplateFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Or its own prompt: all that the model is shown, to the last character (chat turns and special tokens "
        "too), with {text} where the text goes",
    ),
]
OwnRows = Annotated[
    int, typer.Option(min=1, help="Texts for each other subtask, at most; its own prompts get four times as many")
]
Others = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help=f"Subtasks on which it shall be like the base, or {ALL}; by default {', '.join(SIX)}, less its own",
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Type of the base weights; auto: bfloat16 where the hardware has it"),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it runs; auto: a GPU where there is one")]
PromptTokens = Annotated[int, typer.Option(min=16, max=8192, help="A prompt's tokens; a longer text is cut at its end")]


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for. Of subtask and template (a prompt with {text}) one is None."""

    base: str
    files: dict[str, bytes]
    texts: list[str]
    subtask: Subtask | None
    template: str | None
    others: list[Subtask]
    dealt: Dealt
    settings: dict[str, Any]


@experts_app.command("anchor")
def anchor(
    base: Annotated[str, typer.Option(help="The adapter's base model: hub id, directory, GGUF file, or pypi:NAME")],
    adapter: Annotated[Path, typer.Option(help="Folder of a finished LoRA adapter, as PEFT saves it")],
    texts: TextsFile,
    out: Annotated[Path, typer.Option(help="Folder for the anchored adapter; new or empty")],
    subtask: Annotated[str | None, typer.Option(metavar="NAME", help="The adapter's own subtask in the catalogue")] = (
        None
    ),
    template: TemplateFile = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps")] = 60,
    weight: Annotated[float, typer.Option(help="mu of the anchor, mu * KL(base || adapter)")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step, of its own and of another subtask each")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW")] = 5e-4,
    every: Annotated[int, typer.Option(min=1, help="An anchor on every so many steps, weighted by as much")] = 1,
    rows: OwnRows = 32,
    others: Others = None,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_prompt_tokens: PromptTokens = 192,
) -> None:
    """Disentangle a finished LoRA adapter, from unlabelled texts alone, so that it can be added to others.

    It stays close to itself on its own prompts, and to the base on those of other subtasks. Ranks, modules and scales
    stay as they are; the result is a PEFT folder. Both distances are shown, on texts that are held out.

    For example:

    $ memmcl experts anchor --base org/model --adapter my-lora --texts texts.txt --subtask sent2 --out anchored
    $ memmcl experts anchor --base org/model --adapter my-lora --texts rows.csv --template prompt.txt --out anchored
    """
    for name, value in (("weight", weight), ("learning-rate", learning_rate)):
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name} must be a number above 0, got {value:g}; leave it out for the default")
    settings = {
        "steps": steps, "weight": weight, "batch_size": batch_size, "learning_rate": learning_rate, "every": every,
        "rows": rows, "seed": seed, "dtype": dtype, "max_prompt_tokens": max_prompt_tokens,
    }  # fmt: skip
    quiet_environment()
    with our_options(_OPTIONS):
        asked = _read(base, adapter, texts, subtask, template, others, settings)
        with console.status("finding the base model"):
            from memmcl.backbone.load import resolve_base

            ref = resolve_base(base)
            from memmcl.experts import after
            from memmcl.files.folder import new_folder
        made_from = _made_from(asked, ref)
        record = after.made_before(out.absolute(), made_from)
        if record is not None:
            console.print(f"{out} is there already, made with the same arguments; it was:", soft_wrap=True)
        else:
            with new_folder(out.absolute()) as folder:
                anchored, files = _anchor(asked, ref, device)
                kl = {"before": asdict(anchored.before), "after": asdict(anchored.after)}
                held_out = len(asked.dealt.held_out)
                record = after.write_adapter(folder, files, {"made_from": made_from, "held_out": held_out, "kl": kl})
    _show(subtask, record)
    console.print(f"adapter        {out}", soft_wrap=True)


def _read(
    base: str, adapter: Path, texts: str, subtask: str | None, template: Path | None, others: str | None,
    settings: dict[str, Any],
) -> _Asked:  # fmt: skip
    """Read and check what can be checked before anything heavy is loaded."""
    from memmcl.experts.forced import deal, read_texts
    from memmcl.suite.faults import Faults

    if (subtask is None) == (template is None):
        raise UsageError(
            f"expected one of --subtask and --template, got {'neither' if subtask is None else 'both'}; "
            "name the adapter's subtask, or give its prompt as a file with {text} in it"
        )
    own = None if subtask is None else _known([subtask], "--subtask")[0]
    prompt = None if template is None else _read_template(template)
    asked_of = _others(others, own)
    files = _read_adapter(adapter)
    faults = Faults()
    found = read_texts(texts, faults=faults)
    if len(faults):
        console.print(f"left out: {len(faults)} texts that cannot be used, first {faults.first[0]}", soft_wrap=True)
    dealt = deal(found, [other.name for other in asked_of], settings["rows"], settings["seed"])
    return _Asked(base, files, found, own, prompt, asked_of, dealt, settings)


def _known(names: Sequence[str], option: str) -> list[Subtask]:
    unknown = [name for name in names if name not in SUBTASKS]
    if unknown:
        raise UsageError(f"{option}: unknown subtask {shown(unknown[0])}; known ones: {', '.join(SUBTASKS)}")
    return [SUBTASKS[name] for name in names]


def _others(given: str | None, own: Subtask | None) -> list[Subtask]:
    """Return the other subtasks, in the catalogue's order."""
    names = SIX if given is None else [name.strip() for name in given.split(",") if name.strip()]
    if names == [ALL]:
        names, given = list(SUBTASKS), None
    if given is not None and own is not None and own.name in names:
        raise UsageError(f"--others names {own.name}, which is the adapter's own subtask; leave it out")
    asked = _known(names, "--others")
    found = [subtask for subtask in SUBTASKS.values() if subtask in asked and subtask != own]
    if not found:
        raise UsageError(f"--others names no subtask; give some as {','.join(SIX[:3])}, or {ALL}")
    return found


def _read_template(path: Path) -> str:
    from memmcl.experts.forced import PLACE

    try:
        template = path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"--template: cannot read {path} ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--template: {path} is not UTF-8; convert it") from error
    if PLACE not in template:
        raise UsageError(f"--template: expected {PLACE} in {path}, found none; write it where the text goes")
    return template


def _read_adapter(folder: Path) -> dict[str, bytes]:
    from memmcl.adapters.load import read_folder

    try:
        return read_folder(folder)
    except ModelError as error:
        raise ModelError(f"--adapter: {error}") from error


def _made_from(asked: _Asked, base: BaseRef) -> dict[str, Any]:
    """Return all that decides the result, as plain values and digests."""
    from memmcl.experts import after, train

    own = asked.template if asked.subtask is None else asdict(asked.subtask)
    return {
        "base": {"name": asked.base, "digest": base.digest},
        "adapter": {name: hashlib.sha256(data).hexdigest() for name, data in asked.files.items()},
        "texts": {"count": len(asked.texts), "digest": seeds.digest(asked.texts)},
        "own": None if asked.subtask is None else asked.subtask.name,
        "others": [other.name for other in asked.others],
        "prompts": seeds.digest([own, *(asdict(other) for other in asked.others)]),
        "settings": asked.settings,
        "versions": [after.STAGE_VERSION, train.STAGE_VERSION],
    }


def _anchor(asked: _Asked, base: BaseRef, device: str) -> tuple[Anchored, dict[str, bytes]]:
    """Load the base and anchor the adapter; return what came of it, and the files of its PEFT folder."""
    import torch

    from memmcl.adapters.format import files_like
    from memmcl.adapters.load import read_adapter
    from memmcl.backbone.forward import Backbone
    from memmcl.backbone.load import load_base, load_tokenizer, read_layers, resolve_dtype
    from memmcl.experts import after
    from memmcl.experts.forced import OWN_SHARES
    from memmcl.experts.settings import Anchoring, Optimisation
    from memmcl.merge.build import lowest_layer
    from memmcl.suite.prompts import Prompter

    cfg, dealt = asked.settings, asked.dealt
    try:
        factors = read_adapter(weights=asked.files[_FILES[1]], config=asked.files[_FILES[0]])
        lowest, layers = lowest_layer([factors]), read_layers(base)
        if lowest >= layers:
            raise ModelError(f"it changes layer {lowest}, this base has {layers} layers; was it trained on another?")
    except ModelError as error:
        raise ModelError(f"--adapter: {error}") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device: expected a GPU, this process sees none; leave it out, or install torch with CUDA")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(
        f"texts          {len(dealt.own)} for its own prompts, {len(dealt.own) // OWN_SHARES} for each of "
        f"{len(dealt.others)} other subtasks, {len(dealt.held_out)} held out",
        soft_wrap=True,
    )
    with console.status("loading the base model"):
        tokenizer = load_tokenizer(base)
        model = load_base(base, resolve_dtype(cfg["dtype"], device), device)
        backbone = Backbone(model, pad=tokenizer.pad_token_id or 0, split=lowest)
    with console.status("asking the adapter for its own answers"):
        prompter = Prompter(tokenizer, cfg["max_prompt_tokens"])
        prompts = _own_prompts(asked, tokenizer, prompter)
        for other in asked.others:
            prompter.check(other)
        own = after.own_rows(backbone, factors, prompts, end=tokenizer.eos_token_id)
    cut, everywhere = len(dealt.own), dict.fromkeys(dealt.others, dealt.held_out)
    training, held_out = (
        after.Prompts(rows, after.other_rows(prompter, asked.others, texts, cfg["seed"]))
        for rows, texts in ((own[:cut], dealt.others), (own[cut:], everywhere))
    )
    with _bar(cfg["steps"]) as progress:
        anchored = after.anchor_adapter(
            backbone, factors, training, held_out,
            optimisation=Optimisation(cfg["steps"], cfg["batch_size"], cfg["learning_rate"]),
            anchoring=Anchoring(cfg["weight"], cfg["batch_size"], cfg["every"]), seed=cfg["seed"], progress=progress,
        )  # fmt: skip
    return anchored, files_like(asked.files[_FILES[0]], anchored.trained.factors, asked.base)


def _own_prompts(asked: _Asked, tokenizer: Any, prompter: Prompter) -> list[tuple[int, ...]]:
    """Return the adapter's own prompts: those to train on, then those that are held out."""
    from memmcl.experts.forced import TemplatePrompter, forced_rows

    texts = [*asked.dealt.own, *asked.dealt.held_out]
    if asked.subtask is None:
        assert asked.template is not None
        return TemplatePrompter(tokenizer, asked.settings["max_prompt_tokens"], asked.template).prompts(texts)
    prompter.check(asked.subtask)
    return [prompter.prompt(asked.subtask, row) for row in forced_rows(asked.subtask, texts, asked.settings["seed"])]


@contextmanager
def _bar(steps: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[at]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=steps, at="")

        def show(moved: Moved) -> None:
            at = f"loss {moved.loss:.4f}, {moved.tokens_per_second:,.0f} tokens/s"
            bar.update(task, completed=moved.step, description="anchoring", at=at)

        yield show


def _show(subtask: str | None, record: Mapping[str, Any]) -> None:
    before, after = record["kl"]["before"], record["kl"]["after"]
    own = "its own" if subtask is None else f"{subtask}, its own"
    rows = [
        (own, "itself before || now", before["itself"], after["itself"]),
        (own, "itself || base", before["own"], after["own"]),
    ]
    rows += [(name, "base || itself", value, after["others"][name]) for name, value in before["others"].items()]
    means = [sum(kl["others"].values()) / len(kl["others"]) for kl in (before, after)]
    table = Table("prompts of", "KL", "before", "after", box=None, header_style="bold")
    for prompts, between, *values in [*rows, ("others, mean", "base || itself", *means)]:
        table.add_row(prompts, between, *(f"{value:.4f}" for value in values))
    console.print(table)
    console.print(f"KL in nats per answer token, on {record['held_out']} texts that were held out", soft_wrap=True)
