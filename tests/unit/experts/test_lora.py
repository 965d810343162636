"""LoRA layers in the backbone: where they start, what they compute, and that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import MODULES, VOCABULARY, backbone_of, plain_model, probe_logits, random_factors
from torch import Tensor, nn
from train_fixture import (
    LORA,
    Rows,
    assert_same_factors,
    assert_same_state,
    merged,
    other_rows,
    own_rows,
    state_of,
    train,
)

from memmcl.backbone.activations import Activations
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.errors import TrainingError
from memmcl.experts.lora import adapted, factors_of, initial_factors, parameters_of, switched_off
from memmcl.experts.settings import LoraShape
from memmcl.experts.trunk import Trunk

KAIMING = LoraShape(MODULES, rank=4, alpha=8.0)
OSRM = LoraShape(MODULES, rank=4, alpha=8.0, init="osrm")


@pytest.fixture(scope="module", params=[0, 2])
def backbone(request: pytest.FixtureRequest, tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, request.param)


def start_of(backbone: Backbone, shape: LoraShape, others: Rows, seed: int = 7) -> dict[str, Any]:
    return initial_factors(backbone, shape, seed, Trunk(backbone, Activations(backbone), others.values()), others)


@pytest.fixture(scope="module")
def others() -> dict[str, list[TokenizedRow]]:
    """Rows of two other subtasks, one with a prefix that all share; enough tokens to span all directions."""
    rng = np.random.default_rng(8)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(3, VOCABULARY, length))

    shared = ids(20)
    return {
        "free": [TokenizedRow((3 + number, *ids(30)), (ids(4),)) for number in range(10)],
        "shared": [TokenizedRow((*shared, 3 + number, *ids(20)), (ids(2),)) for number in range(7)],
    }


def naive_moments(directory: Path, names: list[str], others: Rows) -> dict[str, Tensor]:
    """Return, by module, the second moment of its inputs in plain passes; a prefix that all share counts once."""
    model, kept = plain_model(directory), dict[str, list[Tensor]]()
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: kept.setdefault(name, []).append(inputs[0][0])
        )
    lengths = []
    for name, shown in others.items():
        for number, row in enumerate(shown):
            tokens = (*row.prompt, *row.continuations[0][:-1])
            lengths.append((20 if name == "shared" and number else 0, len(tokens)))
            with torch.no_grad():
                model(torch.tensor([tokens]))
    found = {}
    for name, parts in kept.items():
        features = torch.cat([part[start:] for part, (start, _) in zip(parts, lengths, strict=True)]).double()
        found[name] = features.T @ features
    return found


def test_osrm_starts_where_other_subtasks_features_are_least(
    tiny_base: Path, backbone: Backbone, others: dict[str, list[TokenizedRow]]
) -> None:
    """A's rows are orthogonal, as long as Kaiming's, and span the eigenvectors of the smallest eigenvalues."""
    before = state_of(backbone.model)
    start, kaiming = start_of(backbone, OSRM, others), start_of(backbone, KAIMING, others)
    assert_same_state(before, state_of(backbone.model))
    assert list(start) == list(kaiming)
    moments = naive_moments(tiny_base, list(start), others)
    seen: dict[str, list[float]] = {"osrm": [], "kaiming": []}
    for name, pair in start.items():
        assert not pair.b.any()
        assert pair.scale == kaiming[name].scale == 2.0
        size = float(kaiming[name].a.norm()) / 2  # the root mean square length of four rows
        torch.testing.assert_close(pair.a @ pair.a.T, size**2 * torch.eye(4), rtol=0, atol=1e-5)
        values, vectors = torch.linalg.eigh(moments[name])
        assert values[4] - values[3] > 1e-5 * values[-1], "the smallest four are not apart: nothing to compare"
        found, expected = (rows.T @ rows for rows in (pair.a.double() / size, vectors[:, :4].T))
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
        for kind, a in (("osrm", pair.a.double()), ("kaiming", kaiming[name].a.double())):
            seen[kind].append(float(torch.trace(a @ moments[name] @ a.T)))  # the sum of ||A h||^2
        assert seen["osrm"][-1] == pytest.approx(size**2 * float(values[:4].sum()), rel=1e-3)
    assert all(one < 0.5 * two for one, two in zip(seen["osrm"], seen["kaiming"], strict=True))
    assert sum(seen["osrm"]) < 0.2 * sum(seen["kaiming"])


def test_osrm_moves_other_subtasks_less(tiny_base: Path, others: dict[str, list[TokenizedRow]]) -> None:
    """After training on own rows, without an anchor, the update of the first adapted layers is smaller elsewhere."""
    backbone = backbone_of(tiny_base, 3)
    moved = {}
    for init in ("kaiming", "osrm"):
        trained = train(
            backbone,
            own_rows(tiny_base),
            others,
            anchoring=None,
            init=init,
            target_modules=("q_proj",),
            steps=6,
            learning_rate=1e-2,
        )
        (name, pair), *_ = trained.factors.items()
        moment = naive_moments(tiny_base, [name], others)[name]
        update = (pair.scale * pair.b @ pair.a).double()
        moved[init] = float(torch.trace(update @ moment @ update.T)) / float(update.norm()) ** 2
    assert moved["osrm"] < 0.3 * moved["kaiming"]


@pytest.mark.parametrize("others", [{}, {"irony": []}], ids=["no subtask", "an empty one"])
def test_osrm_needs_other_subtasks(tiny_base: Path, backbone: Backbone, others: Rows) -> None:
    before = state_of(backbone.model)
    with pytest.raises(TrainingError, match="osrm needs rows of other subtasks; give anchor rows, or use kaiming"):
        train(backbone, own_rows(tiny_base), others, init="osrm")
    assert_same_state(before, state_of(backbone.model))


def test_where_it_starts_depends_on_the_seed_alone(backbone: Backbone, others: dict[str, list[TokenizedRow]]) -> None:
    state = torch.random.get_rng_state()
    one, again, other = (start_of(backbone, LORA, others, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_same_factors(one, again)
    assert not any(torch.equal(one[name].a, other[name].a) for name in one)
    rslora = start_of(backbone, LoraShape(LORA.target_modules, 4, 8.0, rslora=True), others, 1)
    assert {pair.scale for pair in rslora.values()} == {4.0}


def peft_model(directory: Path, factors: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=sorted(factors))
    model = get_peft_model(plain_model(directory).to(dtype), config).eval()
    with torch.no_grad():
        for name, pair in factors.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.data = pair.a.clone()
            layer.lora_B["default"].weight.data = pair.b.clone()
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["by our formula", "by PEFT's layer"])
def test_outputs_and_gradients_are_those_of_peft(tiny_base: Path, dropout: float) -> None:
    """In eval mode dropout is none, so that both ways have the same oracle: a whole PEFT model with autograd."""
    backbone = backbone_of(tiny_base, 0)
    factors = random_factors(tiny_base, layers=(2, 3), seed=2)
    shape = LoraShape(tuple(factors), rank=3, alpha=6.0, dropout=dropout)
    oracle = peft_model(tiny_base, factors, torch.float32)
    tokens = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = oracle(tokens).logits
    expected.square().mean().backward()
    with adapted(backbone, shape, factors) as layers:
        for layer in layers.values():
            layer.lora_dropout["default"].eval()
        found = backbone.model(tokens).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        found.square().mean().backward()
        for name, parameter in parameters_of(layers).items():
            module, letter = name[:-2], name[-1]
            gradient = getattr(oracle.base_model.model.get_submodule(module), f"lora_{letter}")["default"].weight.grad
            assert float((parameter.grad - gradient).norm()) < 1e-4 * float(gradient.norm()), name
        assert_same_factors(factors_of(layers), factors)
        with switched_off(layers), torch.no_grad():
            base = plain_model(tiny_base)(tokens).logits
            torch.testing.assert_close(backbone.model(tokens).logits, base, rtol=0, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(backbone.model(tokens).logits, expected, rtol=0, atol=1e-4)


def test_bfloat16_is_as_near_to_the_exact_update_as_pefts_layer(tiny_base: Path) -> None:
    """Our formula rounds A and s B to bfloat16, PEFT computes them in float32: the error grows by a half at most."""
    factors = random_factors(tiny_base, layers=(2, 3), seed=2)
    exact = probe_logits(merged(tiny_base, factors))
    theirs = probe_logits(peft_model(tiny_base, factors, torch.bfloat16))
    backbone = backbone_of(tiny_base, 2, "bfloat16")
    with adapted(backbone, LoraShape(tuple(factors), 3, 6.0), factors):
        ours = probe_logits(backbone.model)
    assert float((ours - exact).norm()) < 1.5 * float((theirs - exact).norm())


def test_the_backbone_is_as_it_was_after_an_error(tiny_base: Path, backbone: Backbone) -> None:
    before, logits = state_of(backbone.model), probe_logits(backbone.model)
    factors = random_factors(tiny_base, layers=(2, 3), seed=2)
    shape = LoraShape(tuple(factors), rank=3, alpha=6.0)
    with pytest.raises(ZeroDivisionError), adapted(backbone, shape, factors):  # noqa: PT012
        assert (probe_logits(backbone.model) - logits).abs().max() > 0.1
        raise ZeroDivisionError
    assert_same_state(before, state_of(backbone.model))
    assert torch.equal(probe_logits(backbone.model), logits)


def test_the_given_factors_are_not_trained_in_place(tiny_base: Path) -> None:
    backbone = backbone_of(tiny_base, 2)
    factors = random_factors(tiny_base, layers=(2, 3), seed=2)
    kept = {name: (pair.a.clone(), pair.b.clone()) for name, pair in factors.items()}
    moved = train(backbone, own_rows(tiny_base), other_rows(tiny_base), start=factors, steps=2)
    for name, (a, b) in kept.items():
        assert torch.equal(factors[name].a, a)
        assert torch.equal(factors[name].b, b)
        assert not torch.equal(moved.factors[name].b, b)
