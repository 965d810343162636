"""Spectral merges over all shapes, ranks and weights: symmetries they must have, and the Core Space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memmcl.adapters.format import Factors
from memmcl.merge.spectral import core_space, iso_cts, regmean, tsv

Merge = Callable[..., torch.Tensor]
BOTH = pytest.mark.parametrize("merge", [tsv, iso_cts])
WEIGHTS = st.one_of(st.floats(0.1, 1.5), st.floats(-1.5, -0.1))
RESOLVED = 1e-3
"""A relative gap between singular values, times an angle, that float32 inputs resolve to 1e-4 and better."""


@dataclass(frozen=True)
class Cut:
    """The leading singular vectors of a matrix as columns, and the relative gap to the next."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    gap: float

    @classmethod
    def of(cls, matrix: NDArray[np.float64], count: int) -> Cut:
        left, values, right = np.linalg.svd(matrix)
        rank = int((values > 1e-5 * values[0]).sum())
        gap = (values[count - 1] - values[count]) / values[0] if 0 < count < rank else 1.0
        count = min(count, rank)
        return cls(left[:, :count], right[:count].T, gap)


@dataclass(frozen=True)
class Stack:
    factors: list[Factors]
    weights: list[float]

    @property
    def task_vectors(self) -> list[torch.Tensor]:
        return [(pair.scale * pair.b.double() @ pair.a.double()).float() for pair in self.factors]

    def merged(self, merge: Merge) -> torch.Tensor:
        return merge(self.task_vectors, torch.tensor(self.weights))

    @property
    def well_posed(self) -> bool:
        """Whether no cut falls between almost equal singular values, and no two directions are almost the same."""
        matrices = [w * t.double().numpy() for t, w in zip(self.task_vectors, self.weights, strict=True)]
        budget = min(np.linalg.matrix_rank(join(matrices), rtol=1e-5) for join in (np.hstack, np.vstack))
        shared = round(0.8 * budget)
        sums = Cut.of(np.asarray(sum(matrices)), shared)
        own = [Cut.of(matrix, max(1, budget // len(matrices))) for matrix in matrices]
        rests = [Cut.of(m - sums.left @ sums.left.T @ m, (budget - shared) // len(matrices)) for m in matrices]
        sides = [side for cuts in (own, [sums, *rests]) for side in zip(*((cut.left, cut.right) for cut in cuts))]  # noqa: B905
        angles = [np.linalg.svd(np.hstack(side), compute_uv=False)[-1] for side in sides]
        return bool(min(cut.gap for cut in [sums, *own, *rests]) * min(angles) > RESOLVED)


@st.composite
def stacks(draw: st.DrawFn, largest: int = 24) -> Stack:
    """Up to five experts of ranks of their own, which together may exceed the shape."""
    height, width = draw(st.integers(2, largest)), draw(st.integers(2, largest))
    weights = draw(st.lists(WEIGHTS, min_size=1, max_size=5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    factors = []
    for _ in weights:
        rank, scale = draw(st.integers(1, 8)), draw(st.sampled_from([0.25, 1.0, 2.0]))
        a, b = torch.randn(rank, width, generator=random), torch.randn(height, rank, generator=random)
        factors.append(Factors(a, b, scale))
    return Stack(factors, weights)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance relative to the norm of what is expected."""
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@BOTH
@settings(max_examples=40, deadline=None)
@given(stack=stacks())
def test_merging_in_the_core_space_is_merging(merge: Merge, stack: Stack) -> None:
    assume(stack.well_posed)
    core = core_space(stack.factors)
    small = merge(core.matrices, torch.tensor(stack.weights))
    assert distance(core.left @ small @ core.right, stack.merged(merge)) < 1e-4


@BOTH
@settings(deadline=None)
@given(stack=stacks(), data=st.data())
def test_the_order_of_experts_does_not_matter(merge: Merge, stack: Stack, data: st.DataObject) -> None:
    assume(stack.well_posed)
    order = data.draw(st.permutations(range(len(stack.weights))))
    turned = Stack([stack.factors[i] for i in order], [stack.weights[i] for i in order])
    assert distance(turned.merged(merge), stack.merged(merge)) < 1e-4


@BOTH
@settings(deadline=None)
@given(stack=stacks(), factor=st.one_of(st.floats(0.01, 100), st.floats(-100, -0.01)))
def test_weights_scale_the_merge(merge: Merge, stack: Stack, factor: float) -> None:
    assume(stack.well_posed)
    scaled = Stack(stack.factors, [factor * weight for weight in stack.weights])
    assert distance(scaled.merged(merge), factor * stack.merged(merge)) < 1e-4


@BOTH
@settings(deadline=None)
@given(stack=stacks(), place=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_an_expert_of_weight_zero_changes_nothing(merge: Merge, stack: Stack, place: int, seed: int) -> None:
    shape = stack.task_vectors[0].shape
    vectors, weights = stack.task_vectors, list(stack.weights)
    vectors.insert(place, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    weights.insert(place, 0.0)
    assert torch.equal(merge(vectors, torch.tensor(weights)), stack.merged(merge))


@BOTH
@settings(deadline=None)
@given(stack=stacks(), copies=st.integers(2, 3))
def test_merges_are_finite_and_no_stronger_than_the_sum(merge: Merge, stack: Stack, copies: int) -> None:
    """Also of stacks that hold each expert several times; and again, bit for bit."""
    same = Stack(stack.factors * copies, stack.weights * copies)
    found = same.merged(merge)
    assert torch.equal(found, same.merged(merge))
    bound = sum(
        abs(w) * float(torch.linalg.matrix_norm(t.double(), 2))
        for w, t in zip(same.weights, same.task_vectors, strict=True)
    )
    assert float(torch.linalg.matrix_norm(found.double(), 2)) <= bound * (1 + 1e-5)  # False for NaN


@settings(deadline=None)
@given(stack=stacks(largest=10), data=st.data(), shrink=st.floats(0.0, 0.95), factor=st.floats(0.01, 100))
def test_regmean_knows_neither_order_nor_scale_nor_silent_experts(
    stack: Stack, data: st.DataObject, shrink: float, factor: float
) -> None:
    vectors, weights = stack.task_vectors, [abs(weight) for weight in stack.weights]
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    width = vectors[0].shape[1]
    inputs = [torch.from_numpy(draw.normal(size=(3 + 4 * i, width))) for i in range(len(vectors))]
    grams = [(x.T @ x).float() for x in inputs]
    found = regmean(vectors, torch.tensor(weights), grams=grams, shrink=shrink)
    assert torch.equal(
        regmean([*vectors, vectors[0] + 1], torch.tensor([*weights, 0.0]), grams=[*grams, grams[0]], shrink=shrink),
        found,
    )
    assume(float(found.norm()) > 1e-2)
    order = data.draw(st.permutations(range(len(vectors))))
    again = regmean(
        [vectors[i] for i in order],
        torch.tensor([factor * weights[i] for i in order]),
        grams=[grams[i] for i in order],
        shrink=shrink,
    )
    assert distance(again, found) < 1e-4
