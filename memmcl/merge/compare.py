"""How the task vectors of experts relate: their length, their direction, and where their signs clash.

T_i = scale_i * b_i @ a_i per module, (d_out, d_in), at the coefficient 1; a module that an expert does not adapt is
zero. Lengths and directions come from the factors alone; signs need the entries, which are computed for one module, one
block of rows and one expert at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memmcl.adapters.format import Adapter, Factors
from memmcl.errors import ModelError
from memmcl.merge.deltas import layer_of

ENTRIES = 1 << 16
"""entries of a module that are dense at a time: six float32 buffers of them (1.5 MB) stay in a core's cache"""


@dataclass(frozen=True)
class Relation:
    """The experts' task vectors in one layer, or in all of them together. Rows and columns in the experts' order.

    norms: (experts,), Frobenius norms over all modules, in units of the base's weights.
    cosines: (experts, experts), in [-1, 1], symmetric; None where one of the two is zero.
    conflict: the share of pairs of experts, over all entries where both are non-zero, that differ in sign: 0 where all
        agree, about 0.5 where signs are independent. For two experts, the share of entries. None without such a pair.
    cancelled: 1 - sum |sum_i T_i| / sum sum_i |T_i|, over entries: the share of their summed magnitude that a plain sum
        loses. 0 where all agree, 1 where nothing is left; about 1 - 1 / sqrt(n) for n independent ones of one length.
        None where all are zero.
    """

    layer: int | None
    norms: tuple[float, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    conflict: float | None
    cancelled: float | None


@dataclass(frozen=True)
class Relations:
    """The result of `compare`: over all layers, and in each adapted layer, ascending."""

    experts: tuple[str, ...]
    overall: Relation
    layers: tuple[Relation, ...]


@torch.no_grad()
def compare(adapters: Mapping[str, Adapter]) -> Relations:
    """Return how the task vectors of `adapters` relate, per layer and over all layers; `asdict` makes it JSON.

    Of n experts, the share of entries at which any two differ in sign is 1 - 2^(1 - n) by chance alone, so that pairs
    are counted instead. Memory beside the adapters: a few MB, and the float64 factors of one module.

    Raises:
        ModelError: a module outside the layers, or one that experts adapt in different shapes.

    Reference: sign conflicts as in TIES, Yadav et al. 2023, section 3; there after trimming, here of all entries.
    """
    experts = tuple(adapters)
    modules: dict[str, dict[int, Factors]] = {}
    for place, adapter in enumerate(adapters.values()):
        for module, factors in adapter.items():
            modules.setdefault(module, {})[place] = factors
    layers = sorted({layer_of(module) for module in modules})
    inner = {layer: torch.zeros(len(experts), len(experts), dtype=torch.float64) for layer in (None, *layers)}
    sums = {layer: torch.zeros(4, dtype=torch.float64) for layer in (None, *layers)}
    for module, by_place in modules.items():
        adapted, places = list(by_place.values()), torch.tensor(list(by_place))
        shapes = {(len(pair.b), pair.a.shape[1]) for pair in adapted}
        if len(shapes) > 1:
            raise ModelError(
                f"expected task vectors of one base; {module} is {' or '.join(map(str, sorted(shapes)))}, by expert; "
                "train all of them on one base"
            )
        products, totals = _inner(adapted), _sums(adapted)
        for layer in (None, layer_of(module)):
            inner[layer][places[:, None], places] += products
            sums[layer] += totals
    overall, *by_layer = (_relation(layer, inner[layer], sums[layer]) for layer in inner)
    return Relations(experts, overall, tuple(by_layer))


def _inner(factors: Sequence[Factors]) -> Tensor:
    """Return <T_i, T_j> = s_i s_j tr((b_i^T b_j)(a_j a_i^T)) of one module: (experts, experts) float64.

    All ranks are stacked, so that both factors of the trace are one Gram matrix each, (sum of ranks, sum of ranks);
    the trace of a product of two matrices is the sum over their entries, X_kl Y_lk.
    """
    a = torch.cat([pair.a.double() for pair in factors])
    b = torch.cat([pair.scale * pair.b.double() for pair in factors], dim=1)
    owner = torch.arange(len(factors)).repeat_interleave(torch.tensor([len(pair.a) for pair in factors]))
    membership = torch.nn.functional.one_hot(owner, len(factors)).double()
    return membership.T @ ((b.T @ b) * (a @ a.T)) @ membership


def _sums(factors: Sequence[Factors]) -> Tensor:
    """Return four sums over the entries of one module, float64: |sum_i T_i|, sum_i |T_i|, pairs that clash, pairs.

    Of p positive and q negative experts, p * q pairs clash: ((p + q)^2 - (p - q)^2) / 4.
    """
    height, width = len(factors[0].b), factors[0].a.shape[1]
    rows = max(1, min(height, ENTRIES // width))
    result = torch.zeros(4, dtype=torch.float64)
    for start in range(0, height, rows):
        shape = min(rows, height - start), width
        vector, sign = torch.empty(shape), torch.empty(shape)
        total, magnitude, signs, present = (torch.zeros(shape) for _ in range(4))
        for pair in factors:
            torch.mm(pair.scale * pair.b[start : start + rows], pair.a, out=vector)
            torch.sign(vector, out=sign)
            total += vector
            signs += sign
            magnitude += vector.abs_()
            present += sign.abs_()
        pairs = present * (present - 1) / 2
        clashes = (present.square() - signs.square()) / 4
        result += torch.stack([one.sum(dtype=torch.float64) for one in (total.abs_(), magnitude, clashes, pairs)])
    return result


def _relation(layer: int | None, inner: Tensor, sums: Tensor) -> Relation:
    norms = inner.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms
    cosines = ((inner + inner.T) / (2 * scale)).clamp(-1, 1).tolist()  # symmetric to the bit
    left, magnitude, clashes, pairs = sums.tolist()
    return Relation(
        layer,
        norms=tuple(norms.tolist()),
        cosines=tuple(
            tuple(cosine if product > 0 else None for cosine, product in zip(*row, strict=True))
            for row in zip(cosines, scale.tolist(), strict=True)
        ),
        conflict=clashes / pairs if pairs else None,
        cancelled=1 - left / magnitude if magnitude else None,
    )
