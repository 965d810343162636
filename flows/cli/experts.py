"""`memmcl experts`: LoRA adapters that a user brings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.app import App
from flows.cli.common import our_options, progress_bar, quiet_environment, read_texts
from flows.cli.screen import log_output
from flows.terminal import console, notes, output, table
from memmcl.config import DataConfig
from memmcl.errors import UsageError

if TYPE_CHECKING:
    from memmcl.api.anchoring import AnchoredExpert
    from memmcl.experts.train import Moved

ALL = "all"
SIX: tuple[str, ...] = DataConfig.model_fields["subtasks"].default
_AS_OPTIONS = ("adapter: ", "device: ", "subtask: unknown", "others: unknown", "others names", "template: ")
_OPTIONS = {
    "model.name_or_path": "--base",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "experts.learning_rate": "--learning-rate",
    "experts.micro_batch_size": "--batch-size",
    "weight must be": "--weight must be",
    "learning_rate must be": "--learning-rate must be",
    **{words: f"--{words}" for words in _AS_OPTIONS},
}
"""What messages of memmcl say -> the option that it is here."""

experts_app = App(help="LoRA adapters that you bring.")

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
BaseDtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Type of the base weights; auto: bfloat16 where the hardware has it"),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it runs; auto: a GPU where there is one")]
PromptTokens = Annotated[int, typer.Option(min=16, max=8192, help="A prompt's tokens; a longer text is cut at its end")]


@experts_app.command("anchor", works=True)
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
    dtype: BaseDtype = "auto",
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
    quiet_environment()
    with our_options(_OPTIONS), log_output():
        prompt = _prompt_of(subtask, template)
        named = None if others is None else [name.strip() for name in others.split(",") if name.strip()]
        with notes.status("reading adapter, texts and base model"):
            from memmcl.api import anchoring

            settings = anchoring.AnchorSettings(
                steps, weight, batch_size, learning_rate, every, rows, seed, dtype, max_prompt_tokens
            )
            anchored = anchoring.anchor_expert(
                base,
                adapter,
                read_texts(texts, "texts that cannot be used"),
                subtask=subtask,
                template=prompt,
                others=named,
                settings=settings,
                device=device,
            )
        record = _save(anchored, out, steps)
    _show("its own" if subtask is None else f"{subtask}, its own", record)
    console.print(f"adapter        {out}", soft_wrap=True)
    output.answer({"folder": out, "record": record})


def _save(anchored: AnchoredExpert, out: Path, steps: int) -> Mapping[str, Any]:
    """Train and write the anchored adapter, or find it there; return its record."""
    record = anchored.saved(out)
    if record is not None:
        notes.print(f"{out} is there already, made with the same arguments; it was:", soft_wrap=True)
        return record
    with progress_bar(steps, "measuring") as move:

        def moved(now: Moved) -> None:
            move(now.step, "anchoring", f"loss {now.loss:.4f}, {now.tokens_per_second:,.0f} tokens/s")

        say = partial(notes.print, "texts         ", soft_wrap=True)
        return anchored.save(out, progress=moved, say=say)


def _prompt_of(subtask: str | None, path: Path | None) -> str | None:
    """Return the prompt in a file, None where the subtask is named instead."""
    if (subtask is None) == (path is None):
        raise UsageError(
            f"expected one of --subtask and --template, got {'neither' if subtask is None else 'both'}; "
            "name the adapter's subtask, or give its prompt as a file with {text} in it"
        )
    if path is None:
        return None
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"--template: cannot read {path} ({error.strerror}); give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--template: {path} is not UTF-8; convert it") from error


def _show(own: str, record: Mapping[str, Any]) -> None:
    before, after = record["kl"]["before"], record["kl"]["after"]
    means = [sum(kl["others"].values()) / len(kl["others"]) for kl in (before, after)]
    distances = [
        (own, "itself before || now", before["itself"], after["itself"]),
        (own, "itself || base", before["own"], after["own"]),
        *((name, "base || itself", value, after["others"][name]) for name, value in before["others"].items()),
        ("others, mean", "base || itself", *means),
    ]
    rows = [(prompts, between, f"{first:.4f}", f"{last:.4f}") for prompts, between, first, last in distances]
    console.print(table("prompts of", "KL", "before", "after", rows=rows))
    console.print(f"KL in nats per answer token, on {record['held_out']} texts that were held out", soft_wrap=True)
