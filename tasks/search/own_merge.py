"""Merging adapters that a user brings, apart from any run: what is asked for, and the folder that is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from memmcl import __version__, seeds
from memmcl.adapters.format import Adapter
from memmcl.adapters.load import Brought
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, load_base, load_tokenizer
from memmcl.backbone.shapes import Shapes
from memmcl.errors import ModelError, StoreError
from memmcl.files.folder import check_room, disk, put, seal
from memmcl.merge.build import Merger, lowest_layer
from memmcl.merge.deltas import Grams
from memmcl.merge.export import adapter_files, merged_adapter, write_merge
from memmcl.merge.genome import Coefficients, Recipe
from memmcl.merge.grams import input_moments
from memmcl.merge.table import METHODS
from memmcl.report.merge_card import merge_card

STAGE_VERSION = 1
RECORD = "merge.json"
"""Beside the model: what it was made from, how, and the digests of its files."""
CARD = "README.md"
_LIBRARIES = ("torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Output:
    """What is written: an adapter, compressed to `rank` if there is one, or the whole model in `dtype`."""

    full: bool = False
    rank: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Texts:
    """Unlabelled texts by expert, at most `tokens` of each, and how the base is run over them."""

    by_expert: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tokens: int = 512
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class OwnMerge:
    """One merge of adapters on a base. coefficients: of every expert, by layer block; zeros take no part.

    weights: the base's files, for a merge that reads them: a whole model, a method that needs `texts`, a search.
    search: what is to be known of the search that found the coefficients, its `key` above all; tables: its files.
    """

    base: Shapes
    experts: Sequence[Brought]
    coefficients: Coefficients
    recipe: Recipe
    output: Output = Output()
    texts: Texts = Texts()
    weights: BaseRef | None = None
    search: Mapping[str, Any] | None = None
    tables: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters that take part."""
        return {expert.name: expert.factors for expert in self.experts if any(self.coefficients[expert.name])}

    @property
    def lowest(self) -> int:
        """The lowest layer that any expert changes: where blocks begin."""
        return lowest_layer([expert.factors for expert in self.experts])

    def made_from(self) -> dict[str, Any]:
        """Return all that decides the result, as plain values and digests."""
        texts = {name: seeds.digest(list(found)) for name, found in sorted(self.texts.by_expert.items())}
        run = {"tokens": self.texts.tokens, "dtype": self.texts.dtype} if texts else {}
        return {
            "base": {
                "name": self.base.name,
                "config": self.base.config_digest,
                "weights": self.weights.digest if self.weights else None,
            },
            "experts": [  # in their order, which some methods heed
                {"name": one.name, "coefficients": list(self.coefficients[one.name]), "sha256": one.digests}
                for one in self.experts
            ],
            "recipe": _plain(self.recipe),
            "output": asdict(self.output),
            "texts": {**texts, **run},
            "search": self.search["key"] if self.search else None,
            "version": STAGE_VERSION,
        }


def write_own_merge(
    folder: Path, merge: OwnMerge, *, warnings: Sequence[str] = (), search: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the merged model, its card and its record into `folder`; return the record.

    Raises:
        MemmclError: the base or the texts cannot be used, the method cannot take these weights, or the disk refuses.
    """
    grams = _grams(merge) if METHODS[merge.recipe.method].grams else None
    made = _write_full(folder, merge, grams) if merge.output.full else _write_adapter(folder, merge, grams)
    record = {
        "made_from": merge.made_from(),
        "base": {"name": merge.base.name, "licence": merge.base.licence},
        "experts": [_described(merge, expert) for expert in merge.experts],
        "method": _method(merge.recipe),
        **made,
        "search": dict(merge.search) if merge.search else None,
        "warnings": list(warnings),
        "versions": {"memmcl": __version__, **{name: version(name) for name in _LIBRARIES}},
    }
    for name, data in {CARD: merge_card(record).encode(), **merge.tables}.items():
        put(folder, name, data)
    return seal(folder, RECORD, record)


def _write_adapter(folder: Path, merge: OwnMerge, grams: Grams | None) -> dict[str, Any]:
    merged = merged_adapter(
        merge.adapters, merge.coefficients, merge.recipe,
        lowest=merge.lowest, layers=merge.base.layers, rank=merge.output.rank, grams=grams,
    )  # fmt: skip
    files = adapter_files(merged.factors, base_name=merge.base.name)
    check_room(folder, sum(len(data) for data in files.values()))
    for name, data in files.items():
        put(folder, name, data)
    rank = max(len(pair.a) for pair in merged.factors.values())
    return {"output": {"form": "adapter", "rank": rank}, "errors": _errors(merged.errors)}


def _write_full(folder: Path, merge: OwnMerge, grams: Grams | None) -> dict[str, Any]:
    check_room(folder, merge.base.size(merge.output.dtype))
    assert merge.weights is not None, "a whole model is written from the base's weights"
    try:
        with disk(folder):
            write_merge(
                folder, merge.weights, merge.adapters, {name: merge.coefficients[name] for name in merge.adapters},
                merge.recipe, dtype=merge.output.dtype, split=merge.lowest, grams=grams,
            )  # fmt: skip
    except SafetensorError as error:  # what its writer makes of a full disk
        raise StoreError(f"cannot write the model ({error}); make room, or name another place") from error
    return {"output": {"form": "full", "dtype": merge.output.dtype}, "errors": None}


def _grams(merge: OwnMerge) -> Grams:
    """Run the base with each expert by itself over that expert's texts, and take the second moments of what it sees."""
    assert merge.weights is not None, "texts are run through the base"
    tokenizer = load_tokenizer(merge.weights)
    backbone = Backbone(load_base(merge.weights, merge.texts.dtype, merge.texts.device), 0, merge.lowest)
    merger = Merger(backbone, merge.adapters, 1)
    found = {}
    for name, factors in merge.adapters.items():
        merger.apply({name: (1.0,)})
        rows = [tokenizer(text)["input_ids"][: merge.texts.tokens] for text in merge.texts.by_expert[name]]
        found[name] = input_moments(backbone.model, factors, rows)
        broken = [module for module, moment in found[name].items() if not bool(torch.isfinite(moment).all())]
        if broken:
            raise ModelError(
                f"expert {name}: what goes into {broken[0]} is not finite; does the adapter fit this base?"
            )
    return found


def _described(merge: OwnMerge, expert: Brought) -> dict[str, Any]:
    return {
        "name": expert.name,
        "place": expert.place,
        "coefficients": list(merge.coefficients[expert.name]),
        "rank": expert.rank,
        "modules": len(expert.factors),
        "base_name": expert.base_name,
        "sha256": expert.digests,
        "texts": len(merge.texts.by_expert.get(expert.name, ())) or None,
    }


def _method(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe with the defaults of what it leaves out, and where the method comes from."""
    row = METHODS[recipe.method]
    defaults: dict[str, float | str] = {name: gene.default for name, gene in row.genes.items()}
    defaults |= {name: values[0] for name, values in row.switches.items()}
    return {
        "name": recipe.method,
        "parameters": {**defaults, **recipe.parameters},
        "seed": recipe.seed if row.seeded else None,
        "reference": row.reference,
    }


def _plain(recipe: Recipe) -> dict[str, Any]:
    seeded = METHODS[recipe.method].seeded
    return {"method": recipe.method, "parameters": dict(recipe.parameters), "seed": recipe.seed if seeded else None}


def _errors(errors: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the relative errors of a compression: the mean over modules, the worst, and all of them."""
    if not errors:
        return None
    worst = max(errors, key=lambda module: (errors[module], module))
    mean = sum(errors.values()) / len(errors)
    return {"mean": mean, "worst": {"module": worst, "error": errors[worst]}, "modules": dict(errors)}
