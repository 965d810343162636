"""The merged model as files: an exact or a compressed PEFT adapter, or a plain Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memmcl.adapters.format import Adapter, Factors, to_files
from memmcl.backbone.forward import Backbone
from memmcl.backbone.load import BaseRef, load_base, load_tokenizer
from memmcl.errors import ModelError
from memmcl.merge.build import Merger, merged_factors
from memmcl.merge.deltas import Deltas, Grams
from memmcl.merge.genome import LINEAR, Coefficients, Recipe
from memmcl.merge.table import check_parameters


@dataclass(frozen=True)
class MergedAdapter:
    """A merge as factors. errors: by module, ||merge - factors|| / ||merge|| (Frobenius); empty: exact."""

    factors: dict[str, Factors]
    errors: dict[str, float]


def merged_adapter(
    adapters: Mapping[str, Adapter],
    coefficients: Coefficients,
    recipe: Recipe = LINEAR,
    *,
    lowest: int,
    layers: int,
    rank: int | None = None,
    pinned: Sequence[str] = (),
    grams: Grams | None = None,
) -> MergedAdapter:
    """Return a merge as one adapter: exact, or of the nearest that `rank` allows in each module.

    Linear merges are exact at the sum of the ranks, tsv and iso_cts at the rank of all factors stacked. The others need
    a `rank`, of which the truncated singular value decomposition is the nearest (Eckart and Young 1936).

    Raises:
        ModelError: no rank, for a method whose merges are not of low rank.
    """
    method = check_parameters(recipe.method, recipe.parameters)
    if recipe.method == "linear" and rank is None:
        return MergedAdapter(merged_factors(adapters, coefficients, lowest=lowest, layers=layers), {})
    if rank is None and not method.exact:
        raise ModelError(
            f"a merge by {recipe.method} is not of low rank: give a rank to compress it to, or write full weights"
        )
    deltas = Deltas(adapters, lowest=lowest, layers=layers, pinned=pinned, grams=grams)
    factors, errors = {}, {}
    for module, pairs in sorted(deltas.modules.items()):
        exact, dense = deltas.delta(module, coefficients, recipe)
        if dense is not None:
            whole = dense if exact is None else torch.addmm(dense, exact.b, exact.a)
            factors[module], errors[module] = _nearest(whole, rank or 1)
            continue
        if exact is None:
            first = next(iter(pairs.values()))
            exact = Factors(torch.zeros_like(first.a[:1]), torch.zeros_like(first.b[:, :1]), 1.0)
        factors[module], errors[module] = (exact, 0.0) if rank is None else compressed(exact, rank)
    return MergedAdapter(factors, {} if rank is None else errors)


def compressed(pair: Factors, rank: int) -> tuple[Factors, float]:
    """Return the nearest factors of `rank`, scale 1, and their relative error; as they are where they have no more.

    From the QR decompositions of both factors: nothing larger than (their rank)^2 is decomposed.
    """
    if len(pair.a) <= rank:
        return Factors(pair.a, pair.b * pair.scale, 1.0), 0.0
    left, upper = torch.linalg.qr(pair.b.double() * pair.scale)
    right, lower = torch.linalg.qr(pair.a.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    b, a = left @ (u[:, :rank] * s[:rank]), vh[:rank] @ right.T
    return Factors(a.float(), b.float(), 1.0), _share(s[rank:].square().sum(), s.square().sum())


def _nearest(whole: Tensor, rank: int) -> tuple[Factors, float]:
    """Return the nearest factors of `rank` to a dense (d_out, d_in): eigenvectors of its smaller Gram matrix."""
    matrix = whole.double() if whole.shape[0] <= whole.shape[1] else whole.double().T
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    top = vectors[:, -rank:]
    b, a = top.float(), (top.T @ matrix).float()
    pair = Factors(a, b, 1.0) if matrix.shape == whole.shape else Factors(b.T.contiguous(), a.T.contiguous(), 1.0)
    return pair, _share(values[:-rank].clamp(min=0).sum(), values.clamp(min=0).sum())


def _share(lost: Tensor, whole: Tensor) -> float:
    return float((lost / whole).sqrt()) if whole > 0 else 0.0


def adapter_files(factors: Mapping[str, Factors], *, base_name: str) -> dict[str, bytes]:
    """Return the files of a PEFT adapter folder for merged factors; modules may have different ranks."""
    rank = max(len(pair.a) for pair in factors.values())
    return to_files(factors, base_name=base_name, rank=rank, alpha=rank)


def write_merge(
    directory: Path,
    base: BaseRef,
    adapters: Mapping[str, Adapter],
    coefficients: Coefficients,
    recipe: Recipe = LINEAR,
    *,
    dtype: str,
    split: int,
    grams: Grams | None = None,
) -> None:
    """Write a Hugging Face model directory: any merge in the weights, in float32 and cast once, and the tokenizer."""
    model = load_base(base, dtype)
    blocks = len(next(iter(coefficients.values())))
    Merger(Backbone(model, 0, split), adapters, blocks, grams=grams).apply(coefficients, recipe)
    model.save_pretrained(directory)
    load_tokenizer(base).save_pretrained(directory)
