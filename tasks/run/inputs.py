"""The inputs of a run, read and checked before Prefect, Ray or torch are loaded: mistakes show at once."""

from __future__ import annotations

from dataclasses import dataclass

from memmcl.backbone.load import BaseRef, read_layers, resolve_base
from memmcl.config import RunConfig
from memmcl.store import Store
from memmcl.suite.configured import read_splits
from memmcl.suite.splits import Splits


@dataclass(frozen=True)
class Inputs:
    """The store, the rows, the base model and how many layers it has."""

    store: Store
    splits: Splits
    base: BaseRef
    layers: int


def find_inputs(config: RunConfig) -> Inputs:
    """Open the store, read the rows, find the base model; raise a MemmclError for what is missing or wrong."""
    store = Store.open(config.store.url, endpoint_url=config.store.endpoint_url, region=config.store.region)
    splits = read_splits(config)
    base = resolve_base(config.model.name_or_path, config.model.revision)
    return Inputs(store, splits, base, read_layers(base))
