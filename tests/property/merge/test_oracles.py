"""Merge methods against mergekit and PEFT, over invented shapes, weights and densities.

float64, so that nothing but a wrong rule can differ; random masks are drawn here and given to both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.merge_methods import merge_tensors
from mergekit.merge_methods.slerp import slerp as mergekit_slerp
from peft.utils import merge_utils
from torch import Tensor

from memmcl import seeds
from memmcl.merge import merge_task_vectors
from memmcl.merge.methods import uniform_field

TIGHT = {"rtol": 1e-6, "atol": 1e-6}
SEED = 7


@st.composite
def problems(draw: st.DrawFn, *, least: int = 1, positive: bool = False) -> tuple[Tensor, Tensor]:
    """Task vectors (experts, *shape) of one to three dimensions, and weights."""
    experts = draw(st.integers(least, 5))
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    vectors = torch.randn(experts, *shape, generator=generator, dtype=torch.float64)
    size = st.floats(0.01 if positive else -2.0, 2.0).map(lambda value: round(value, 3))
    return vectors, torch.tensor(draw(st.lists(size, min_size=experts, max_size=experts)), dtype=torch.float64)


DENSITIES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))


@contextmanager
def our_masks(shape: Sequence[int], experts: int) -> Iterator[None]:
    """Let torch.bernoulli keep what our fields keep, expert by expert."""
    fields = iter([uniform_field(shape, seeds.derive(SEED, index)) for index in range(experts)])

    def bernoulli(probabilities: Tensor) -> Tensor:
        return (next(fields).reshape(probabilities.shape) < probabilities).to(probabilities.dtype)

    with mock.patch("torch.bernoulli", bernoulli):
        yield


def by_mergekit(method: str, vectors: Tensor, weights: Tensor, **parameters: object) -> Tensor:
    """mergekit's merge onto a base of zeros."""
    tensors = [torch.zeros_like(vectors[0]), *vectors]
    return merge_tensors(tensors, method, base_index=0, parameters={"weight": weights.tolist(), **parameters})


@settings(deadline=None)
@given(problems())
def test_linear(problem: tuple[Tensor, Tensor]) -> None:
    vectors, weights = problem
    found = merge_task_vectors("linear", vectors, weights)
    torch.testing.assert_close(found, by_mergekit("task_arithmetic", vectors, weights), **TIGHT)
    torch.testing.assert_close(found, merge_utils.task_arithmetic(list(vectors), weights), **TIGHT)


@settings(deadline=None)
@given(problems(), DENSITIES, st.floats(0.1, 2.0), st.sampled_from(["weights", "none"]))
def test_ties_is_mergekits(problem: tuple[Tensor, Tensor], density: float, scale: float, divide_by: str) -> None:
    vectors, weights = problem
    found = merge_task_vectors("ties", vectors, weights, density=density, scale=scale, divide_by=divide_by)
    parameters = {"density": density, "lambda": scale, "normalize": divide_by == "weights"}
    torch.testing.assert_close(found, by_mergekit("ties", vectors, weights, **parameters), **TIGHT)


@settings(deadline=None)
@given(problems(), DENSITIES, st.sampled_from([("sum", "total"), ("count", "frequency")]))
def test_ties_is_pefts(problem: tuple[Tensor, Tensor], density: float, majority: tuple[str, str]) -> None:
    vectors, weights = problem
    if 0 < density < 1 / vectors[0].numel():
        density = 0.0  # PEFT keeps no entry there, mergekit and we keep one
    ours, theirs = majority
    found = merge_task_vectors(
        "ties", vectors, weights, density=density, election="unweighted", majority=ours, divide_by="count"
    )
    if density == 1.0:
        with pytest.warns(UserWarning, match="no pruning"):
            expected = merge_utils.ties(list(vectors), weights, density, theirs)
    else:
        expected = merge_utils.ties(list(vectors), weights, density, theirs)
    torch.testing.assert_close(found, expected, **TIGHT)


def signs_counted(vectors: Tensor, weights: Tensor) -> Tensor:
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    weighted = vectors * weights.reshape(-1, *[1] * (vectors.dim() - 1))
    return (weighted * get_mask(weighted, method="count")).sum(0)


@settings(deadline=None)
@given(problems())
def test_signs_counted_are_mergekits(problem: tuple[Tensor, Tensor]) -> None:
    vectors, weights = problem
    found = merge_task_vectors("ties", vectors, weights, density=1.0, majority="count", divide_by="none")
    torch.testing.assert_close(found, signs_counted(vectors, weights), **TIGHT)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@settings(deadline=None)
@given(problem=problems(), density=DENSITIES, rescale=st.booleans(), normalize=st.booleans())
def test_dare_is_mergekits(
    method: str, problem: tuple[Tensor, Tensor], density: float, rescale: bool, normalize: bool
) -> None:
    vectors, weights = problem
    with our_masks(vectors.shape[1:], len(vectors)):
        expected = by_mergekit(
            method, vectors, weights, density=density, rescale=rescale, normalize=normalize and method == "dare_ties"
        )
    convention = {"rescale": "l1" if rescale else "none"}
    if method == "dare_ties":
        convention["divide_by"] = "weights" if normalize else "none"
    found = merge_task_vectors(method, vectors, weights, seed=SEED, density=density, **convention)
    torch.testing.assert_close(found, expected, **TIGHT)


PEFT_DARE: dict[str, tuple[Callable[..., Tensor], dict[str, str]]] = {
    "dare_linear": (merge_utils.dare_linear, {}),
    "dare_ties": (merge_utils.dare_ties, {"election": "unweighted", "divide_by": "count"}),
}


@pytest.mark.parametrize("method", PEFT_DARE)
@settings(deadline=None)
@given(problem=problems(), density=st.floats(0.01, 0.999))
def test_dare_is_pefts(method: str, problem: tuple[Tensor, Tensor], density: float) -> None:
    vectors, weights = problem
    theirs, convention = PEFT_DARE[method]
    with our_masks(vectors.shape[1:], len(vectors)):
        expected = theirs(list(vectors), weights, density)
    found = merge_task_vectors(method, vectors, weights, seed=SEED, density=density, **convention)
    torch.testing.assert_close(found, expected, **TIGHT)


@settings(deadline=None)
@given(problems(), st.floats(0.1, 0.9), st.floats(0.0, 0.99), st.booleans())
def test_della_is_mergekits(problem: tuple[Tensor, Tensor], density: float, share: float, rescale: bool) -> None:
    vectors, weights = problem
    if (vectors.shape[1] if vectors.dim() == 2 else vectors.shape[2]) == 1:
        return  # mergekit's probability is 0 / 0 in a row of one
    epsilon = round(share * min(density, 1 - density, 0.5), 6)
    with our_masks(vectors.shape[1:], len(vectors)):
        expected = by_mergekit("della", vectors, weights, density=density, epsilon=epsilon, rescale=rescale)
    found = merge_task_vectors(
        "della", vectors, weights, seed=SEED, density=density, epsilon=epsilon, rescale="l1" if rescale else "none"
    )
    torch.testing.assert_close(found, expected, **TIGHT)


@settings(deadline=None)
@given(problems(), DENSITIES, st.floats(0.0, 0.5))
def test_breadcrumbs_is_mergekits(problem: tuple[Tensor, Tensor], density: float, gamma: float) -> None:
    vectors, weights = problem
    found = merge_task_vectors("breadcrumbs", vectors, weights, density=density, gamma=gamma)
    torch.testing.assert_close(
        found, by_mergekit("breadcrumbs", vectors, weights, density=density, gamma=gamma), **TIGHT
    )


@settings(deadline=None)
@given(problems(least=2, positive=True))
def test_slerp_is_mergekits(problem: tuple[Tensor, Tensor]) -> None:
    vectors, weights = problem[0][:2], problem[1][:2]
    share = weights[1:] / weights.sum()
    expected = mergekit_slerp(share, vectors[:1], vectors[1:])[0]
    torch.testing.assert_close(merge_task_vectors("slerp", vectors, weights), expected, **TIGHT)
