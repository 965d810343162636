"""Losses at answer positions through a frozen output layer: forward and backward in one pass over the vocabulary.

Neither the logits nor their gradient outlive the call: what backward needs is the gradient by the hidden states,
(n, d). For logits z = h W^T, both losses have a gradient in closed form:

    cross-entropy        d/dz = softmax(z) - onehot(target)
    KL(p || softmax(z))  d/dz = softmax(z) - p

Rows are taken in blocks, so that memory does not grow with the number of answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

BLOCK = 256  # answer positions whose logits exist at once

Project = Callable[[Tensor], Tensor]  # hidden states (n, d) to logits (n, vocabulary) float32; linear, and frozen


def cross_entropy(hidden: Tensor, targets: Tensor, project: Project, weight: Tensor) -> Tensor:
    """Return the summed cross-entropy (nats) of `targets` (n,) int64 at hidden states (n, d).

    project: the output layer; weight: its matrix (vocabulary, d), frozen.
    """
    return _AtAnswers.apply(hidden, targets, None, project, weight)  # type: ignore[no-any-return,no-untyped-call]


def divergence(hidden: Tensor, reference: Tensor, project: Project, weight: Tensor) -> Tensor:
    """Return the summed KL(reference || hidden) in nats over positions; both are hidden states (n, d).

    project: the output layer of both; weight: its matrix (vocabulary, d), frozen. `reference` gets no gradient.
    """
    return _AtAnswers.apply(hidden, None, reference, project, weight)  # type: ignore[no-any-return,no-untyped-call]


class _AtAnswers(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor | None, reference: Tensor | None, project: Project, weight: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        gradients = []
        for block in (slice(start, start + BLOCK) for start in range(0, len(hidden), BLOCK)):
            log_p = project(hidden[block]).log_softmax(-1)
            if targets is not None:
                index = targets[block, None]
                total -= log_p.gather(1, index).sum(dtype=torch.float64)
                gradient = log_p.exp_()
                gradient.scatter_add_(1, index, -torch.ones_like(index, dtype=gradient.dtype))
            else:
                assert reference is not None
                log_q = project(reference[block]).log_softmax(-1)
                q = log_q.exp()
                total += (q * log_q.sub_(log_p)).sum(dtype=torch.float64)
                gradient = log_p.exp_().sub_(q)
            gradients.append(gradient.to(weight.dtype) @ weight)
        ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None
