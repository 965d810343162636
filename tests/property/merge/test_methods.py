"""What holds for every merge method, whatever the task vectors, weights and parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memmcl.merge import METHODS, merge_task_vectors
from memmcl.merge.table import run_method

CONSENSUS = {"ties": {}, "dare_ties": {"divide_by": "weights"}, "della": {}}
SEEDED = [name for name, method in METHODS.items() if method.seeded]
ONTO = {"rtol": 1e-4, "atol": 1e-4}
"""regmean solves linear equations, tsv and iso_cts decompose; the rest is float32 sums."""


@st.composite
def problems(draw: st.DrawFn, *, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Task vectors (experts, d_out, d_in) of full or low rank, and weights."""
    experts = draw(st.integers(1, 4))
    rows, columns = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    vectors = torch.randn(experts, rows, 2, generator=generator) @ torch.randn(experts, 2, columns, generator=generator)
    size = st.floats(0.1 if positive else -1.5, 1.5).map(lambda value: round(value, 2))
    return vectors, torch.tensor(draw(st.lists(size, min_size=experts, max_size=experts)))


def grams(method: str, experts: int, columns: int) -> dict[str, Any]:
    if method != "regmean":
        return {}
    inputs = torch.randn(experts, 20, columns, generator=torch.Generator().manual_seed(3))
    return {"grams": list(inputs.transpose(1, 2) @ inputs)}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "slerp"])
@settings(deadline=None, max_examples=40)
@given(problem=problems(positive=True), order=st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(method: str, problem: tuple[Tensor, Tensor], order: Any) -> None:
    vectors, weights = problem
    indices = list(range(len(vectors)))
    order.shuffle(indices)
    given_grams = grams(method, len(vectors), vectors.shape[2])
    permuted = {key: [value[index] for index in indices] for key, value in given_grams.items()}
    masks = {"seeds": list(range(len(vectors)))} if METHODS[method].seeded else {}
    same_masks = {"seeds": indices} if METHODS[method].seeded else {}
    merge = partial(run_method, method)
    torch.testing.assert_close(
        merge(vectors, weights, **masks, **given_grams),
        merge(vectors[indices], weights[indices], **same_masks, **permuted),
        **ONTO,
    )


@settings(deadline=None)
@given(problems(), st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 2**20))
def test_the_linear_merge_is_linear(problem: tuple[Tensor, Tensor], first: float, second: float, seed: int) -> None:
    vectors, weights = problem
    others = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
    whole = merge_task_vectors("linear", first * vectors + second * others, weights)
    parts = [merge_task_vectors("linear", each, weights) for each in (vectors, others)]
    torch.testing.assert_close(whole, first * parts[0] + second * parts[1], rtol=1e-5, atol=1e-5)
    by_weights = merge_task_vectors("linear", vectors, first * weights)
    torch.testing.assert_close(by_weights, first * parts[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CONSENSUS)
@settings(deadline=None)
@given(problem=problems(positive=True))
def test_all_entries_of_agreeing_signs_are_averaged(method: str, problem: tuple[Tensor, Tensor]) -> None:
    vectors, weights = problem
    vectors = vectors.abs() + 0.01
    mean = torch.einsum("e...,e->...", vectors, weights) / weights.sum()
    found = merge_task_vectors(method, vectors, weights, density=1.0, **CONSENSUS[method])
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=30)
@given(problem=problems())
def test_weights_of_zero_add_nothing(method: str, problem: tuple[Tensor, Tensor]) -> None:
    vectors, _ = problem
    found = merge_task_vectors(method, vectors, torch.zeros(len(vectors)), **grams(method, *vectors.shape[::2]))
    assert bool((found == 0).all())
    assert found.shape == vectors[0].shape


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=30)
@given(problem=problems(positive=True))
def test_one_expert_at_weight_one_is_itself(method: str, problem: tuple[Tensor, Tensor]) -> None:
    vectors = problem[0][:1]
    whole = {"density": 1.0} if "density" in METHODS[method].genes else {}
    found = merge_task_vectors(method, vectors, torch.ones(1), **whole, **grams(method, *vectors.shape[::2]))
    expected = vectors[0]
    if method == "iso_cts":  # which flattens a spectrum even if nothing is merged
        u, s, vh = torch.linalg.svd(expected, full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        expected = s[:rank].mean() * u[:, :rank] @ vh[:rank]
    torch.testing.assert_close(found, expected, **ONTO)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=30)
@given(problem=problems(positive=True), factor=st.floats(0.2, 5.0))
def test_a_common_factor_of_the_weights_scales_or_vanishes(
    method: str, problem: tuple[Tensor, Tensor], factor: float
) -> None:
    vectors, weights = problem
    given_grams = grams(method, *vectors.shape[::2])
    one, other = (merge_task_vectors(method, vectors, each, **given_grams) for each in (weights, factor * weights))
    expected = one if METHODS[method].normalises else factor * one
    torch.testing.assert_close(other, expected, rtol=1e-3, atol=1e-4)
    if "scale" in METHODS[method].genes:
        scaled = merge_task_vectors(method, vectors, weights, scale=0.5, **given_grams)
        torch.testing.assert_close(scaled, 0.5 * one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", SEEDED)
@settings(deadline=None, max_examples=30)
@given(problem=problems(positive=True), seed=st.integers(0, 2**31))
def test_a_seed_gives_the_same_masks(method: str, problem: tuple[Tensor, Tensor], seed: int) -> None:
    vectors, weights = problem
    before = torch.get_rng_state()
    found = [merge_task_vectors(method, vectors, weights, seed=seed) for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"


@pytest.mark.parametrize("method", ["dare_linear", "della"])
def test_what_is_kept_makes_up_for_what_is_dropped(method: str) -> None:
    vector = torch.randn(400, 400, generator=torch.Generator().manual_seed(1)).abs()
    found = merge_task_vectors(method, vector[None], torch.ones(1), seed=2, density=0.4)
    assert abs(float((found != 0).float().mean()) - 0.4) < 0.01
    assert abs(float(found.mean() / vector.mean()) - 1) < 0.02  # unbiased: 5 standard errors
