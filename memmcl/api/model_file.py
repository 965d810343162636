"""What a sentiment model needs beside its adapter: the base, the settings, and how each subtask is asked, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, JsonValue, ValidationError

from memmcl.backbone.resident import Base
from memmcl.config import RunConfig
from memmcl.curriculum.context import context_of
from memmcl.errors import DataError, shown
from memmcl.files.untrusted import JSON_BYTES, parse_json, read_within
from memmcl.report.results import Results
from memmcl.store import Refs, Store
from memmcl.suite.configured import catalogue
from memmcl.suite.examples import Example, from_table
from memmcl.suite.prompts import Prompter
from memmcl.urls import redacted


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shown(_Strict):
    """A demonstration: a row of a subtask, with its gold answer."""

    subtask: str
    text: str
    gold: str | tuple[tuple[str, ...], ...]
    fields: dict[str, str]

    @property
    def example(self) -> Example:
        """The row."""
        return Example.create("demonstration", self.text, self.gold, self.fields)


class SubtaskPrompt(_Strict):
    """How a subtask is asked.

    context: its kind, as the gate chose it. demonstrations: those before the question. offsets: of its labels'
    log-probabilities, (labels,), that are taken from them; None where they are not calibrated.
    """

    context: str
    demonstrations: tuple[Shown, ...]
    offsets: tuple[FiniteFloat, ...] | None


class ModelFile(_Strict):
    """The content of the file. run: its id. config: its settings. prompts: by subtask, the easiest subtask first."""

    version: Literal[1] = 1
    run: str
    base: Base
    config: dict[str, JsonValue]
    prompts: dict[str, SubtaskPrompt]


def model_file_of(
    results: Results, base: Base, config: RunConfig, store: Store, artifacts: Refs, prompter: Prompter
) -> ModelFile:
    """Return the file of a run's unified model. artifacts: the run's, by `kind:name`.

    Raises:
        CorruptArtifact: rows or a gate are damaged.
    """
    order, subtasks = [subtask.name for subtask in results.subtasks], catalogue(config)
    rows = {name: from_table(store.read(artifacts[f"split:{name} train"], "rows.parquet")) for name in order}

    def prompt(name: str) -> SubtaskPrompt:
        gate = parse_json(store.read(artifacts[f"gate:context gate {name}"], "gate.json"))
        chosen = next(option for option in gate if option["chosen"])
        context = context_of(
            chosen["context"], config.curriculum, subtasks, subtasks[name], prompter, rows, order, config.seed
        )
        demonstrations = tuple(
            Shown(subtask=subtask, text=row.text, gold=row.gold, fields=dict(row.fields))
            for subtask, row in context.demonstrations
        )
        return SubtaskPrompt(context=context.kind, demonstrations=demonstrations, offsets=chosen["offsets"] or None)

    prompts = {name: prompt(name) for name in order}
    return ModelFile(run=results.run.run_id, base=base, config=redacted(results.run.config), prompts=prompts)


def read_model_file(path: Path) -> ModelFile:
    """Read the file.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        return ModelFile.model_validate(parse_json(read_within(path, JSON_BYTES)))
    except (OSError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise DataError(
            f"{shown(str(path))} does not describe an exported model ({shown(reason)}); export the run again: "
            "memmcl.open_run(...).save(folder)"
        ) from error
