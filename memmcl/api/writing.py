"""A merge written into a folder: the model, its card, and the facts for its record."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from memmcl.adapters.load import UserAdapter
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import load_base, load_tokenizer
from memmcl.config.methods import METHODS
from memmcl.errors import ModelError, StoreError
from memmcl.files.folder import check_room, disk, put
from memmcl.merge.build import Merger
from memmcl.merge.deltas import Grams
from memmcl.merge.export import adapter_files, merged_adapter, write_merge
from memmcl.merge.grams import input_moments
from memmcl.report.merge_card import merge_card
from memmcl.version import __version__

if TYPE_CHECKING:
    from memmcl.api.merging import Merge

CARD = "README.md"
_LIBRARIES = ("torch", "transformers", "peft", "safetensors")


def write(folder: Path, merge: Merge) -> dict[str, Any]:
    """Write the model, its card and its tables into an empty folder; return the record of the merge.

    Raises:
        MemmclError: the base or the texts cannot be used, the method cannot take these weights, or the disk refuses.
    """
    recipe, row = merge.recipe, METHODS[merge.recipe.method]
    grams = _grams(merge) if row.grams else None
    written = _write_full(folder, merge, grams) if merge.output.full else _write_adapter(folder, merge, grams)
    record = {
        "made_from": merge.provenance(),
        "base": {"name": merge.base.name, "licence": merge.base.licence},
        "experts": [_described(merge, expert) for expert in merge.experts],
        "method": {
            "name": recipe.method,
            "parameters": {**row.defaults, **recipe.parameters},
            "seed": recipe.seed if row.seeded else None,
            "reference": row.reference,
        },
        **written,
        "search": dict(merge.search) if merge.search else None,
        "warnings": list(merge.warnings),
        "versions": {"memmcl": __version__, **{name: version(name) for name in _LIBRARIES}},
    }
    for name, data in {CARD: merge_card(record).encode(), **merge.tables}.items():
        put(folder, name, data)
    return record


def _write_adapter(folder: Path, merge: Merge, grams: Grams | None) -> dict[str, Any]:
    merged = merged_adapter(
        merge.adapters,
        merge.coefficients,
        merge.recipe,
        lowest=merge.lowest,
        layers=merge.base.layers,
        rank=merge.output.rank,
        grams=grams,
    )
    files = adapter_files(merged.factors, base_name=merge.base.name)
    check_room(folder, sum(len(data) for data in files.values()))
    for name, data in files.items():
        put(folder, name, data)
    rank = max(len(pair.a) for pair in merged.factors.values())
    return {"output": {"form": "adapter", "rank": rank}, "errors": _errors(merged.errors)}


def _write_full(folder: Path, merge: Merge, grams: Grams | None) -> dict[str, Any]:
    check_room(folder, merge.base.size(merge.output.dtype))
    assert merge.weights is not None, "a whole model is written from the base's weights"
    try:
        with disk(folder):
            write_merge(
                folder,
                merge.weights,
                merge.adapters,
                {name: merge.coefficients[name] for name in merge.adapters},
                merge.recipe,
                dtype=merge.output.dtype,
                split=merge.lowest,
                grams=grams,
            )
    except SafetensorError as error:  # what its writer makes of a full disk
        raise StoreError(f"cannot write the model ({error}); make room, or name another place") from error
    return {"output": {"form": "full", "dtype": merge.output.dtype}, "errors": None}


def _grams(merge: Merge) -> Grams:
    """Return the second moments of each expert's module inputs: it alone on the base, over its texts."""
    assert merge.weights is not None, "texts are run through the base"
    tokenizer = load_tokenizer(merge.weights)
    backbone = Backbone(load_base(merge.weights, merge.texts.dtype, merge.texts.device), 0, merge.lowest)
    merger = Merger(backbone, merge.adapters, 1)
    moments = {}
    for name, factors in merge.adapters.items():
        merger.apply({name: (1.0,)})
        rows = [tokenizer(text)["input_ids"][: merge.texts.tokens] for text in merge.texts.by_expert[name]]
        moments[name] = input_moments(backbone.model, factors, rows)
        broken = [module for module, moment in moments[name].items() if not bool(torch.isfinite(moment).all())]
        if broken:
            raise ModelError(f"expert {name}: what goes into {broken[0]} is not finite; does the adapter fit the base?")
    return moments


def _described(merge: Merge, expert: UserAdapter) -> dict[str, Any]:
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


def _errors(errors: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the relative errors of a compression: the mean over modules, the worst, and all of them."""
    if not errors:
        return None
    error, worst = max((error, module) for module, error in errors.items())
    mean = sum(errors.values()) / len(errors)
    return {"mean": mean, "worst": {"module": worst, "error": error}, "modules": dict(errors)}
