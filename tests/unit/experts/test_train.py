"""Training one adapter, against a plain loop with transformers and PEFT that shares and caches nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import MODULES, backbone_of, plain_model, probe_logits
from train_fixture import (
    PLAN,
    Plain,
    Rows,
    assert_same_factors,
    assert_same_state,
    assert_same_training,
    current_factors,
    distance,
    held_out_rows,
    initial_factors,
    loaded,
    merged,
    naive_kl,
    naive_loss,
    state_of,
    train,
)

from memmcl.adapters.format import Factors
from memmcl.backbone.activations import Activations
from memmcl.backbone.batches import TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.errors import TrainingError
from memmcl.experts.settings import Anchoring, Stopping
from memmcl.experts.train import Moved

SPLITS = (0, 2)


@pytest.fixture(scope="module", params=SPLITS)
def backbone(request: pytest.FixtureRequest, tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, request.param)


def test_the_loss_falls_and_the_backbone_stays(backbone: Backbone, rows: Rows, anchors: Rows) -> None:
    before, random = state_of(backbone.model), torch.random.get_rng_state()
    trained = train(backbone, rows, anchors, steps=10, learning_rate=1e-2, dropout=0.1, target_modules=MODULES)
    assert_same_state(before, state_of(backbone.model))
    assert torch.equal(torch.random.get_rng_state(), random), "the global random numbers were touched"
    assert len(trained.loss) == len(trained.anchor) == 10
    assert trained.loss[-1] < 0.5 * trained.loss[0]
    pulls = [pull for pull in trained.anchor if pull is not None]
    assert len(pulls) == 10
    assert pulls[0] == pytest.approx(0, abs=1e-6), "an untrained adapter is the base itself"
    assert min(pulls) > -1e-6
    assert pulls[-1] > 1e-4
    assert trained.seconds > 0
    assert (trained.validation, trained.best_step, trained.stopped_early) == ((), None, False)
    assert (trained.micro_batch, trained.gpu_bytes) == (4, None)
    assert set(trained.factors) == {f"model.layers.{i}.{part}" for i in range(backbone.split, 4) for part in _parts()}
    assert trained.parameters == sum(pair.a.numel() + pair.b.numel() for pair in trained.factors.values())
    for pair in trained.factors.values():
        assert pair.a.dtype == pair.b.dtype == torch.float32
        assert len(pair.a) == pair.b.shape[1] == 4
        assert pair.scale == 2.0
        assert pair.b.abs().max() > 0


def _parts() -> list[str]:
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    return [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


def test_the_same_seed_gives_the_same_bits_whatever_ran_before(
    tiny_base: Path, backbone: Backbone, rows: Rows, anchors: Rows
) -> None:
    fresh = train(backbone_of(tiny_base, backbone.split), rows, anchors, dropout=0.1, steps=3)
    train(backbone, {"irony": anchors["irony"]}, rows, seed=1, steps=1, rank=2, target_modules=("v_proj",))
    torch.manual_seed(123)
    shuffled = {name: anchors[name] for name in sorted(anchors, reverse=True)}
    resident = train(backbone, rows, shuffled, dropout=0.1, steps=3)
    assert_same_training(fresh, resident)
    other = train(backbone, rows, anchors, dropout=0.1, steps=3, seed=8)
    assert not any(torch.equal(other.factors[name].a, fresh.factors[name].a) for name in fresh.factors)
    assert other.loss != fresh.loss


def test_modules_start_from_different_numbers(tiny_base: Path, rows: Rows) -> None:
    start = initial_factors(backbone_of(tiny_base, 2), rows)
    q, v = (start[f"model.layers.3.self_attn.{name}_proj"].a for name in "qv")
    assert not torch.equal(q, v)
    bound = 1 / math.sqrt(64)
    assert 0.8 * bound < float(q.abs().max()) <= bound
    assert float(start["model.layers.3.self_attn.q_proj"].b.abs().max()) < 1e-20


@pytest.mark.parametrize("off", ["weight", "rows", "none"])
def test_without_an_anchor_there_is_no_anchor(backbone: Backbone, rows: Rows, anchors: Rows, off: str) -> None:
    if off == "weight":
        trained = train(backbone, rows, anchors, anchoring=Anchoring(0.0, 2), steps=2)
    elif off == "rows":
        trained = train(backbone, rows, {"irony": []}, steps=2)
    else:
        trained = train(backbone, rows, anchors, anchoring=None, steps=2)
    assert trained.anchor == (None, None)
    assert_same_training(trained, train(backbone, rows, {}, steps=2))


@torch.no_grad()
def test_the_anchor_keeps_the_expert_near_the_base_elsewhere(tiny_base: Path, rows: Rows, anchors: Rows) -> None:
    distances = {}
    base, backbone = plain_model(tiny_base), backbone_of(tiny_base, 2)
    for weight in (0.0, 20.0):
        with torch.enable_grad():
            trained = train(backbone, rows, anchors, anchoring=Anchoring(weight, 2), steps=12, learning_rate=2e-2)
        expert = merged(tiny_base, trained.factors)
        distances[weight] = {name: float(naive_kl(base, expert, shown)) for name, shown in anchors.items()}
        assert trained.loss[-1] < 0.5 * trained.loss[0]
    for name in anchors:
        assert distances[20.0][name] < 0.5 * distances[0.0][name]


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_training_equals_plain_training(
    tiny_base: Path, backbone: Backbone, rows: Rows, anchors: Rows, clip: float
) -> None:
    """Loss and anchor of each step, and the trained factors, are those of a loop without tricks."""
    plan = replace(
        PLAN,
        batch_size=6,  # each step takes all rows: their order cannot matter
        weight_decay=0.1,
        warmup=0.4,  # of 5 steps: 2
        clip=clip,
        learning_rate=3e-3,
    )
    start = initial_factors(backbone, rows, target_modules=MODULES)
    pulls = {step: (name, 20.0) for step, name in enumerate(("irony", "uabsa", "irony", "uabsa", "irony"))}
    factors, losses, distances = Plain(tiny_base, plan, 2, pulls).train(start, rows["sent2"], anchors)
    anchoring = Anchoring(20.0, 3)  # much, so that a wrong weight shows
    trained = train(backbone, rows, anchors, anchoring=anchoring, target_modules=MODULES, **vars(plan))
    assert trained.loss == pytest.approx(losses, abs=5e-5)
    assert trained.anchor == pytest.approx(distances, abs=5e-6)
    assert losses[-1] < losses[0] - 0.1
    assert max(distances) > 1e-3
    assert distance(trained.factors, factors) < 5e-3


def test_a_trained_adapter_is_the_same_model_in_peft(
    tiny_base: Path, tmp_path: Path, backbone: Backbone, rows: Rows, anchors: Rows
) -> None:
    """Our merge at coefficient 1, PEFT on the written folder, and the training's own forward agree."""
    during: list[dict[str, Factors]] = []

    def watch(moved: Moved) -> None:
        assert (moved.step, moved.steps) == (len(during) + 1, 4)
        assert math.isfinite(moved.loss)
        assert moved.tokens_per_second > 0
        during.append(current_factors(backbone))

    trained = train(backbone, rows, anchors, progress=watch, steps=4, batch_size=6, learning_rate=1e-2)
    assert len(during) == 4
    assert_same_factors(during[-1], trained.factors)
    for step, factors in enumerate(during):
        model: PeftModel = loaded(tiny_base, tmp_path / str(step), factors, rank=4, alpha=8.0)
        expert = merged(tiny_base, factors)
        torch.testing.assert_close(probe_logits(expert), probe_logits(model), rtol=0, atol=1e-4)
        if step + 1 < len(during):  # the loss of the next step is computed before it is taken
            with torch.no_grad():
                assert trained.loss[step + 1] == pytest.approx(float(naive_loss(model, rows["sent2"])), abs=1e-4)
    assert (probe_logits(expert) - probe_logits(backbone.model)).abs().max() > 0.1


def test_only_the_target_modules_of_the_top_layers_change(tiny_base: Path, rows: Rows) -> None:
    trained = train(backbone_of(tiny_base, 3), rows, target_modules=("v_proj", "down_proj"))
    assert set(trained.factors) == {"model.layers.3.self_attn.v_proj", "model.layers.3.mlp.down_proj"}


def test_every_row_is_seen_once_an_epoch(tiny_base: Path, rows: Rows, anchors: Rows) -> None:
    """With next to no learning, the steps of one row are the losses of all subtasks' rows in some order, then again."""
    backbone = backbone_of(tiny_base, 2)
    two = {"sent2": rows["sent2"][:4], "irony": anchors["irony"]}
    trained = train(backbone, two, steps=14, batch_size=1, learning_rate=1e-30)
    with torch.no_grad():
        expected = sorted(float(naive_loss(backbone.model, [row])) for shown in two.values() for row in shown)
    assert sorted(trained.loss[:7]) == pytest.approx(expected, abs=1e-4)
    assert sorted(trained.loss[7:]) == pytest.approx(expected, abs=1e-4)
    assert trained.loss[:7] != pytest.approx(trained.loss[7:], abs=1e-4), "both epochs have the same order"


def test_tokens_count_a_shared_prefix_once(tiny_base: Path) -> None:
    rows = [TokenizedRow((5, 6, 7, 8), ((9, 2),)), TokenizedRow((5, 6, 7, 10, 11), ((12, 2),))]
    others = [TokenizedRow((9, 4), ((3, 3, 2),)), TokenizedRow((9, 5), ((2,),))]
    backbone = backbone_of(tiny_base, 2)
    assert train(backbone, {"one": rows}, steps=3, batch_size=2).tokens == 3 * (3 + 2 + 3)
    trained = train(backbone, {"one": rows}, {"two": others}, steps=3, batch_size=2)
    assert trained.tokens == 3 * (3 + 2 + 3) + 3 * (1 + 3 + 1)


def test_bfloat16(tiny_base: Path, rows: Rows, anchors: Rows) -> None:
    backbone = backbone_of(tiny_base, 2, "bfloat16")
    before = state_of(backbone.model)
    trained, again = (train(backbone, rows, anchors, learning_rate=2e-2) for _ in range(2))
    assert_same_state(before, state_of(backbone.model))
    assert_same_training(trained, again)
    assert trained.loss[-1] < 0.8 * trained.loss[0]
    assert {pair.a.dtype for pair in trained.factors.values()} == {torch.float32}
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("rows", [{}, {"sent2": []}], ids=["no subtask", "an empty one"])
def test_no_rows(backbone: Backbone, rows: Rows) -> None:
    with pytest.raises(TrainingError, match=r"expected rows to train on, got none; check data\.train_rows"):
        train(backbone, rows)


def test_an_unknown_target_module(backbone: Backbone, rows: Rows) -> None:
    before = state_of(backbone.model)
    with pytest.raises(
        TrainingError, match=r"no linear layer named \['c_attn'\]; this model has \['down_proj', 'gate_proj'"
    ):
        train(backbone, rows, target_modules=("q_proj", "c_attn"))
    assert_same_state(before, state_of(backbone.model))


def poison_weight(backbone: Backbone) -> None:
    backbone.model.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")


def poison_gradient(backbone: Backbone) -> None:
    layer = backbone.model.model.layers[3].mlp.down_proj
    layer.lora_A["default"].weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("poison", "after", "told"),
    [
        (poison_weight, 0, "the loss became nan at step 1 of 5; lower experts.learning_rate"),
        (poison_weight, 2, "the loss became nan at step 3 of 5; lower experts.learning_rate"),
        (poison_gradient, 1, "the gradient became nan at step 2 of 5; lower experts.learning_rate"),
    ],
    ids=["weight at once", "weight in the third step", "gradient"],
)
def test_what_is_not_finite_is_named_with_its_step(
    tiny_base: Path, rows: Rows, poison: Callable[[Backbone], None], after: int, told: str
) -> None:
    backbone = backbone_of(tiny_base, 2)
    before = state_of(backbone.model)

    def watch(moved: Moved) -> None:
        if moved.step == after:
            poison(backbone)

    if after == 0:
        poison(backbone)
    with pytest.raises(TrainingError, match=told):
        train(backbone, rows, progress=watch)
    left = state_of(backbone.model)
    assert_same_state(before, left | {"parameters": before["parameters"]})


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("rows", "the loss became nan at step 1 of 5"),
        ("anchors", "the anchor became nan at step 1 of 5"),
        ("validation", "the validation loss became nan at step 2 of 5"),
    ],
)
def test_a_kept_activation_that_is_not_finite_is_named_with_its_step(
    tiny_base: Path, rows: Rows, anchors: Rows, which: str, told: str
) -> None:
    """Whatever broke what is kept: the error comes where its row is used, and the backbone is as it was."""
    backbone = backbone_of(tiny_base, 2)
    before = state_of(backbone.model)
    groups = {"rows": rows, "anchors": {"irony": anchors["irony"]}, "validation": held_out_rows(tiny_base)}
    (shown,) = groups[which].values()
    activations = Activations(backbone)
    for row in shown:
        activations.of((*row.prompt, *row.continuations[0][:-1])).fill_(float("nan"))
    with pytest.raises(TrainingError, match=told):
        train(
            backbone,
            groups["rows"],
            groups["anchors"],
            validation=groups["validation"],
            stopping=Stopping(2),
            activations=activations,
        )
    assert_same_state(before, state_of(backbone.model))
