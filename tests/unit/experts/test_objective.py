"""Losses through the output layer, against torch's own losses with autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from memmcl.experts.objective import BLOCK, cross_entropy, divergence

WIDTH, VOCABULARY = 5, 11
COUNTS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 88)


class Head:
    """A frozen output layer that remembers how many positions it was asked for at once."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.weight = drawn((VOCABULARY, WIDTH), seed).to(dtype)
        self.asked: list[int] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        self.asked.append(len(hidden))
        logits = hidden @ self.weight.T
        return logits if logits.dtype == torch.float64 else logits.float()


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(kind: str, count: int) -> tuple[Head, Tensor, Tensor]:
    """Return an output layer, hidden states that want a gradient, and targets or reference states."""
    held_to = torch.arange(count) % VOCABULARY if kind == "cross-entropy" else drawn((count, WIDTH), 2)
    return Head(), drawn((count, WIDTH), 1).requires_grad_(), held_to


LOSSES: dict[str, Callable[..., Tensor]] = {"cross-entropy": cross_entropy, "divergence": divergence}


def oracle(kind: str, hidden: Tensor, held_to: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    if kind == "cross-entropy":
        return functional.cross_entropy(logits, held_to, reduction="sum")
    reference = (held_to @ weight.T).log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction="sum")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_are_torchs_own(kind: str, count: int) -> None:
    head, hidden, held_to = case(kind, count)
    loss = LOSSES[kind](hidden, held_to, head, head.weight)
    expected = oracle(kind, hidden, held_to, head.weight)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (found,) = torch.autograd.grad(-1.7 * loss / count, hidden)
    (gradient,) = torch.autograd.grad(-1.7 * expected / count, hidden)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=0)  # -1.7 / count went through the loss's float32
    assert max(head.asked) <= BLOCK
    assert sum(head.asked) == count * (1 if kind == "cross-entropy" else 2)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_is_the_slope_of_the_value(kind: str) -> None:
    head, hidden, held_to = case(kind, 3)
    loss = LOSSES[kind](hidden, held_to, head, head.weight)
    (gradient,) = torch.autograd.grad(loss, hidden)
    step = 1e-2
    for place in range(hidden.numel()):
        moved = torch.zeros(hidden.numel(), dtype=torch.float64)
        moved[place] = step
        ahead, behind = (
            LOSSES[kind](hidden.detach() + sign * moved.view_as(hidden), held_to, head, head.weight) for sign in (1, -1)
        )
        slope = (ahead.item() - behind.item()) / (2 * step)
        assert slope == pytest.approx(gradient.flatten()[place].item(), abs=1e-3)


@pytest.mark.parametrize("kind", LOSSES)
def test_bfloat16(kind: str) -> None:
    """Against float64 on the same rounded numbers; a bfloat16 number has 8 bits, logits here are up to 10."""
    count = BLOCK + 40
    _, hidden, held_to = case(kind, count)
    head = Head(torch.bfloat16)
    low = hidden.detach().bfloat16().requires_grad_()
    held_low = held_to if held_to.dtype == torch.int64 else held_to.bfloat16()
    loss = LOSSES[kind](low, held_low, head, head.weight)
    exact = low.detach().double().requires_grad_()
    held_exact = held_low if held_low.dtype == torch.int64 else held_low.double()
    expected = oracle(kind, exact, held_exact, head.weight.double())
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    (found,) = torch.autograd.grad(loss / count, low)
    (gradient,) = torch.autograd.grad(expected / count, exact)
    assert found.dtype == torch.bfloat16
    assert (found.double() - gradient).norm() < 2e-2 * gradient.norm()


def test_no_gradient_reaches_the_reference_or_the_output_layer() -> None:
    head, hidden, reference = case("divergence", 4)
    reference.requires_grad_()
    head.weight.requires_grad_()
    divergence(hidden, reference, head, head.weight).backward()
    assert hidden.grad is not None
    assert reference.grad is None
    assert head.weight.grad is None


@pytest.mark.parametrize("kind", LOSSES)
def test_what_waits_for_backward_is_as_wide_as_the_hidden_states(kind: str) -> None:
    head, hidden, held_to = case(kind, BLOCK + 3)
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Any:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LOSSES[kind](hidden, held_to, head, head.weight)
    assert kept == [hidden.shape]


def test_the_divergence_of_equals_is_zero_and_flat() -> None:
    head, hidden, _ = case("divergence", 7)
    loss = divergence(hidden, hidden.detach().clone(), head, head.weight)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("kind", LOSSES)
def test_no_positions(kind: str) -> None:
    head, hidden, held_to = case(kind, 0)
    loss = LOSSES[kind](hidden, held_to, head, head.weight)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)


def test_logits_far_apart_stay_finite() -> None:
    """Where a softmax underflows to zero, its share of the divergence is zero, and the loss is the distance."""
    weight = torch.eye(2, dtype=torch.float32)
    hidden = torch.tensor([[0.0, 900.0]], requires_grad=True)
    reference = torch.tensor([[900.0, 0.0]])
    loss = divergence(hidden, reference, lambda states: states @ weight.T, weight)
    loss.backward()
    assert loss.item() == pytest.approx(900)
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[-1.0, 1.0]]
