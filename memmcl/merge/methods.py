"""Merge methods: pure functions from task vectors and weights to one merged task vector.

Shared by all: `vectors` holds n task vectors of one shape and one floating dtype. Items may be computed on access
(`vectors[i]`): every function holds one of them at a time, beside sums of the same shape. `weights`: (n,), any sign
unless said otherwise. Returned: shape and dtype of one task vector. Random masks are drawn from `seeds[i]`: the same
expert, the same mask, whatever the others are and in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from memmcl.errors import GenomeError

Rescale = Literal["kept", "l1", "none"]
"""After random pruning: divided by the probability of being kept (DARE, DELLA: unbiased), scaled to the L1 norm from
before (mergekit's default), or as it is."""

ALIGNED = 0.9995
"""|cosine| above which slerp is a straight line (mergekit's threshold)"""


@dataclass(frozen=True)
class Election:
    """How a sign is elected for each entry, and how the entries that agree with it are merged.

    election: the signs that vote are those of weighted task vectors (mergekit), or of the task vectors alone (PEFT).
    majority: a vote counts by its magnitude, or one each. divide_by: what the sum of those that agree is divided by:
    their weights (mergekit), their number (PEFT), or nothing.
    """

    election: Literal["weighted", "unweighted"] = "weighted"
    majority: Literal["sum", "count"] = "sum"
    divide_by: Literal["weights", "count", "none"] = "weights"


class Vectors(Protocol):
    """Some task vectors of one shape: a list, or an object that computes each on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


def linear(vectors: Vectors, weights: Tensor) -> Tensor:
    """Return sum_i w_i T_i.

    Reference: task arithmetic, Ilharco et al. 2023, eq. of section 2.
    """
    return _sum(vectors, weights, lambda index, vector: vector)


def ties(
    vectors: Vectors, weights: Tensor, *, density: float = 0.5, scale: float = 1.0, election: Election = Election()
) -> Tensor:
    """Trim to the largest magnitudes, elect a sign per entry, average those that agree with it.

    density: share of entries kept in each task vector, at least one of them unless it is 0; entries as large as the
    smallest that is kept are all kept. scale: of the whole result; the average forgets a common factor of the weights.

    Reference: TIES, Yadav et al. 2023, algorithm 1. Defaults as in mergekit 0.1.5; PEFT 0.21 is `unweighted`, `count`.
    """
    return scale * _consensus(vectors, weights, lambda _, vector: largest(vector, density), election)


def dare_linear(
    vectors: Vectors, weights: Tensor, *, seeds: Sequence[int], density: float = 0.5, rescale: Rescale = "kept"
) -> Tensor:
    """Drop entries at random, rescale the rest, and add up.

    density: probability that an entry is kept. At 0 nothing is left.

    Reference: DARE, Yu et al. 2024, eq. 2; its drop rate is 1 - density. PEFT: `kept`; mergekit: `l1`.
    """
    return _sum(vectors, weights, lambda index, vector: dropped(vector, density, seeds[index], rescale))


def dare_ties(
    vectors: Vectors,
    weights: Tensor,
    *,
    seeds: Sequence[int],
    density: float = 0.5,
    scale: float = 1.0,
    rescale: Rescale = "kept",
    election: Election = Election(divide_by="none"),
) -> Tensor:
    """Drop entries at random, rescale the rest, then elect signs and merge as TIES does.

    Reference: DARE, Yu et al. 2024, with TIES. Defaults as in mergekit 0.1.5, which does not average, but for
    `rescale`; PEFT 0.21 is `kept`, `unweighted` and `count`.
    """
    return scale * _consensus(
        vectors, weights, lambda index, vector: dropped(vector, density, seeds[index], rescale), election
    )


def della(
    vectors: Vectors,
    weights: Tensor,
    *,
    seeds: Sequence[int],
    density: float = 0.5,
    epsilon: float = 0.15,
    scale: float = 1.0,
    rescale: Rescale = "kept",
    election: Election = Election(),
) -> Tensor:
    """Drop entries at random, small ones sooner, rescale the rest, then elect signs and average as TIES does.

    density: mean probability of being kept. epsilon: it runs from density - epsilon at the smallest magnitude of a row
    to density + epsilon at its largest; cut down so that both stay inside [0, 1].

    Reference: DELLA, Deep et al. 2024, section 3. mergekit 0.1.5 rescales by `l1`, and refuses an epsilon that is cut.
    """
    return scale * _consensus(
        vectors, weights, lambda at, vector: dropped_by_rank(vector, density, epsilon, seeds[at], rescale), election
    )


def breadcrumbs(vectors: Vectors, weights: Tensor, *, density: float = 0.9, gamma: float = 0.01) -> Tensor:
    """Mask the largest magnitudes (outliers) and the smallest, and add up what lies between.

    density: share of entries kept; gamma: share of entries, the largest, that are masked as outliers, fewer where
    `density` leaves no room. Density 1 keeps all.

    Reference: Model Breadcrumbs, Davari and Belilovsky 2024; parameters and rounding as in mergekit 0.1.5.
    """
    return _sum(vectors, weights, lambda index, vector: between(vector, density, gamma))


def slerp(vectors: Vectors, weights: Tensor, *, scale: float = 1.0) -> Tensor:
    """Interpolate along great circles: expert by expert, each with its share of the weights so far.

    The angle is that between task vectors, not between whole weights, which hardly differ. More than two are taken in
    their order, which matters. scale: of the whole result; shares forget a common factor of the weights.

    Raises:
        GenomeError: a negative weight.

    Reference: Shoemake 1985; two of them as mergekit 0.1.5's slerp at t = w_2 / (w_1 + w_2).
    """
    if bool((weights < 0).any()):
        raise GenomeError(f"slerp needs weights of 0 and more, got {float(weights.min()):g}; they are shares")
    merged, before = torch.zeros_like(vectors[0]), 0.0
    for index, weight in enumerate(weights.tolist()):
        if weight:
            merged = _arc(merged, vectors[index], weight / (before + weight)) if before else vectors[index]
            before += weight
    return scale * merged


def largest(vector: Tensor, density: float) -> Tensor:
    """Return `vector` with all but its largest magnitudes set to zero (TIES, step "trim")."""
    if density >= 1:
        return vector
    if density <= 0 or not vector.numel():
        return torch.zeros_like(vector)
    keep = max(1, int(density * vector.numel()))
    magnitudes = vector.abs()
    (threshold,) = _order_statistics(magnitudes, vector.numel() - keep)
    return torch.where(magnitudes >= threshold, vector, 0)


def between(vector: Tensor, density: float, gamma: float) -> Tensor:
    """Return `vector` without its largest and its smallest magnitudes (Breadcrumbs' mask)."""
    if density >= 1:
        return vector
    count = vector.numel()
    keep = int(density * count)
    if keep <= 0:
        return torch.zeros_like(vector)
    first = max(0, count - keep - int(gamma * count))
    magnitudes = vector.abs()
    low, high = _order_statistics(magnitudes, first, first + keep - 1)
    return torch.where((magnitudes >= low) & (magnitudes <= high), vector, 0)


def dropped(vector: Tensor, density: float, seed: int, rescale: Rescale) -> Tensor:
    """Return `vector` with each entry kept with probability `density` (DARE's pruning)."""
    if density >= 1:
        return vector
    return _kept(vector, torch.full((), max(density, 0.0), dtype=vector.dtype, device=vector.device), seed, rescale)


def dropped_by_rank(vector: Tensor, density: float, epsilon: float, seed: int, rescale: Rescale) -> Tensor:
    """Return `vector` with entries kept by their rank in magnitude within a row (DELLA's MagPrune)."""
    if density >= 1:
        return vector
    if density <= 0 or not vector.numel():
        return torch.zeros_like(vector)
    rows = vector if vector.dim() > 1 else vector.unsqueeze(0)
    ranks = rows.abs().argsort(dim=1).argsort(dim=1).to(vector.dtype)
    # (0 .. n - 1) to (-1 .. 1); the only entry of a row of one is kept with the mean probability
    centred = 2 * ranks / (ranks.shape[1] - 1) - 1 if ranks.shape[1] > 1 else torch.zeros_like(ranks)
    reach = min(epsilon, density, 1 - density)
    return _kept(vector, (density + reach * centred).reshape(vector.shape), seed, rescale)


def uniform_field(shape: Sequence[int], seed: int) -> Tensor:
    """Return float32 numbers in [0, 1), on the CPU: what decides which entries a random method keeps."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _kept(vector: Tensor, probability: Tensor, seed: int, rescale: Rescale) -> Tensor:
    mask = uniform_field(vector.shape, seed).to(vector.device) < probability
    if rescale == "kept":
        return torch.where(mask, vector / probability, 0)
    kept = torch.where(mask, vector, 0)
    if rescale == "l1":
        before, after = vector.abs().sum(), kept.abs().sum()
        if min(before, after) >= 1e-7:  # mergekit's tolerance
            return kept * (before / after)
    return kept


def _sum(vectors: Vectors, weights: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for index, weight in enumerate(weights.tolist()):
        if weight:
            total.add_(change(index, vectors[index]), alpha=weight)
    return total


def _consensus(
    vectors: Vectors, weights: Tensor, change: Callable[[int, Tensor], Tensor], election: Election
) -> Tensor:
    """Return the merge of the entries that agree with the elected sign; task vectors are read twice, none is kept."""
    factors = weights.tolist()
    weighted = election.election == "weighted"
    # With a weighted vote an expert of weight 0 has no sign: it neither votes nor counts. Unweighted, it does both.
    voters = [(index, factor) for index, factor in enumerate(factors) if factor or not weighted]
    votes = torch.zeros_like(vectors[0])
    for index, factor in voters:
        vote = change(index, vectors[index]) * (factor if weighted else 1.0)
        votes += vote.sign() if election.majority == "count" else vote
    elected = torch.where(votes >= 0, 1, -1)  # mergekit and PEFT: a tie is positive
    total, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for index, factor in voters:
        changed = change(index, vectors[index])
        agrees = (changed * (factor if weighted else 1.0)).sign() == elected
        total.add_(torch.where(agrees, changed, 0), alpha=factor)
        divisor.add_(agrees, alpha=factor if election.divide_by == "weights" else 1.0)
    if election.divide_by == "none":
        return total
    return total / torch.where(divisor == 0, 1, divisor)


def _arc(start: Tensor, end: Tensor, share: float) -> Tensor:
    lengths = start.norm(), end.norm()
    if min(lengths) <= 1e-8:  # mergekit's tolerance
        return (1 - share) * start + share * end
    cosine = float((start.flatten() / lengths[0]) @ (end.flatten() / lengths[1]))
    if abs(cosine) > ALIGNED:
        return (1 - share) * start + share * end
    angle = math.acos(cosine)
    return (math.sin((1 - share) * angle) * start + math.sin(share * angle) * end) / math.sin(angle)


def _order_statistics(magnitudes: Tensor, *ranks: int) -> tuple[float, ...]:
    """Return the entries of these ranks, 0 the smallest. On the CPU numpy's selection, which is a few times faster."""
    flat = magnitudes.flatten()
    if flat.device.type == "cpu":
        selected = np.partition(flat.numpy(), ranks)
        return tuple(float(selected[rank]) for rank in ranks)
    return tuple(float(flat.kthvalue(rank + 1).values) for rank in ranks)
