"""Rows and subtasks as the settings of a run ask for them."""

from __future__ import annotations

import math

from memmcl.config import RunConfig, SubtaskConfig
from memmcl.errors import ConfigError, shown
from memmcl.suite.sources import Reading, Source
from memmcl.suite.splits import Splits, load_splits
from memmcl.suite.subtasks import SUBTASKS, Subtask, get_subtask

_TAKEN = ("base", "constant", "experts", "joint", "mean", "sum", "unified", "uniform", "warm", "weak")
"""Names that tables and adapters use for something else."""


def read_splits(config: RunConfig) -> Splits:
    """Read the rows that `config.data` asks for. Raises MemmclError where some are missing or cannot be used."""
    data = config.data
    pool = data.pseudo_pool if data.weak_source == "pseudo" else 1.0
    return load_splits(
        list(catalogue(config).values()),
        reading_of(config),
        train_rows=data.train_rows,
        weak_rows=math.ceil(data.weak_rows * pool),
        selection_rows=math.ceil(data.selection_rows * pool),
        test_rows=data.test_rows,
        on_overlap=data.on_overlap,
        on_error=data.on_error,
    )


def reading_of(config: RunConfig) -> Reading:
    """Return where the rows of a run are read from, and how."""
    data = config.data
    custom = {subtask.name: subtask.data for subtask in data.custom}
    region = {"client_kwargs": {"region_name": config.store.region}} if config.store.region else {}
    endpoint = {"endpoint_url": config.store.endpoint_url} if config.store.endpoint_url else {}
    return Reading(
        source=data.source,
        sources={name: Source(**source.model_dump()) for name, source in (custom | data.sources).items()},
        pool_rows=data.pool_rows,
        max_characters=data.max_characters,
        weak_labels=data.weak_source == "labelled",
        storage=endpoint | region,
    )


def catalogue(config: RunConfig) -> dict[str, Subtask]:
    """Return a run's subtasks by name, the user's own too, in its order. Raises ConfigError for a wrong name."""
    custom = {defined.name: _subtask(defined) for defined in config.data.custom}
    taken = sorted(set(custom) & {*SUBTASKS, *_TAKEN})
    if taken:
        raise ConfigError(f"the name {shown(taken[0])} is taken; call your subtask something else")
    return {name: custom[name] if name in custom else get_subtask(name) for name in config.data.subtasks}


def lenders(config: RunConfig) -> dict[str, Subtask]:
    """Return by name every subtask whose rows may serve as anchors: those of the catalogue and those of the run."""
    return {**SUBTASKS, **catalogue(config)}


def _subtask(defined: SubtaskConfig) -> Subtask:
    same = {"name", "group", "instruction", "labels", "tuple_fields", "needs", "positive_label", "figurative"}
    return Subtask(
        **defined.model_dump(include=same),
        title=defined.title or defined.name,
        metric=defined.scored_by,
        datasets=(defined.name,),
    )
