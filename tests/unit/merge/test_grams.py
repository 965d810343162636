"""Second moments of module inputs, against a hook on a plain model that shares nothing with ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, plain_model

from memmcl.errors import DataError
from memmcl.merge.grams import input_moments

MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in (1, 3)
    for module in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def naive(model: torch.nn.Module, tokens: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return X^T X from all inputs of each module in one matrix, float64."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in MODULES}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, given: inputs[name].append(given[0][0].double())

    for name in MODULES:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    for row in tokens:
        model(torch.tensor([row]))
    stacked = {name: torch.cat(found) for name, found in inputs.items()}
    return {name: x.T @ x for name, x in stacked.items()}


def test_they_are_those_of_a_naive_hook(tiny_base: Path) -> None:
    tokens = rows(5, 1, 17, 9)
    found = input_moments(plain_model(tiny_base), MODULES, [*tokens, []])
    assert list(found) == MODULES
    for name, expected in naive(plain_model(tiny_base), tokens).items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == expected.shape
        assert torch.allclose(found[name].double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_modules_with_the_same_input_share_one_moment(tiny_base: Path) -> None:
    found = input_moments(plain_model(tiny_base), MODULES, rows(6, 4))
    assert found["model.layers.1.self_attn.q_proj"] is found["model.layers.1.self_attn.v_proj"]
    assert len({id(moment) for moment in found.values()}) == 8


def test_nothing_stays_behind_and_rows_are_not_padded(tiny_base: Path) -> None:
    model = plain_model(tiny_base)
    first, second = rows(7, 30)
    together = input_moments(model, MODULES[:1], [first, second])[MODULES[0]]
    apart = sum(input_moments(model, MODULES[:1], [row])[MODULES[0]] for row in (first, second))
    assert torch.allclose(together, apart, rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_rows(tiny_base: Path) -> None:
    with pytest.raises(DataError, match="at least one token, got none"):
        input_moments(plain_model(tiny_base), MODULES, [[]])
