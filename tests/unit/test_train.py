"""Training one adapter, against a plain loop with transformers and PEFT that shares and caches nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import MODULES, answer_logits, backbone_of, plain_model, probe_logits, prompter_of, training_rows
from torch import nn

from memmcl.backbone.forward import Backbone, Row
from memmcl.errors import TrainingError
from memmcl.experts.adapter import Factors, from_files, to_files
from memmcl.experts.train import Trained, train_adapter
from memmcl.merge.build import Merger

SPLITS = (0, 1, 2)
DEFAULTS: dict[str, Any] = {
    "target_modules": MODULES,
    "rank": 4,
    "alpha": 8.0,
    "learning_rate": 5e-3,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "clip": 1.0,
    "steps": 5,
    "batch_size": 4,
    "anchor_weight": 0.5,
    "anchor_batch_size": 2,
    "seed": 7,
}


@pytest.fixture(scope="module")
def rows(tiny_base: Path) -> list[Row]:
    return training_rows(prompter_of(tiny_base), "sent2", 6)


@pytest.fixture(scope="module")
def anchors(tiny_base: Path) -> dict[str, list[Row]]:
    prompter = prompter_of(tiny_base)
    return {name: training_rows(prompter, name, 3) for name in ("irony", "uabsa")}


@pytest.fixture(scope="module", params=SPLITS)
def backbone(request: pytest.FixtureRequest, tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, request.param)


def train(backbone: Backbone, rows: Sequence[Row], anchors: Mapping[str, Sequence[Row]], **settings: Any) -> Trained:
    return train_adapter(backbone, rows, anchors, **DEFAULTS | settings)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a training could leave behind: weights, buffers, types, flags, hooks, attributes."""
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "flags": {name: (p.requires_grad, p.grad is None, p.dtype) for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "types": {name: type(m) for name, m in model.named_modules()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": sorted(model.__dict__),
    }


def assert_same_state(one: dict[str, Any], two: dict[str, Any]) -> None:
    for kind in ("flags", "types", "modes", "hooks", "attributes"):
        assert one[kind] == two[kind], kind
    for kind in ("parameters", "buffers"):
        assert one[kind].keys() == two[kind].keys()
        assert all(torch.equal(one[kind][name], two[kind][name]) for name in one[kind]), kind


def assert_same_factors(one: Mapping[str, Factors], two: Mapping[str, Factors]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name].a, two[name].a), name
        assert torch.equal(one[name].b, two[name].b), name


def test_the_loss_falls_and_the_backbone_stays(
    backbone: Backbone, rows: list[Row], anchors: dict[str, list[Row]]
) -> None:
    before, random = state_of(backbone.model), torch.random.get_rng_state()
    trained = train(backbone, rows, anchors, steps=12, learning_rate=1e-2)
    assert_same_state(before, state_of(backbone.model))
    assert torch.equal(torch.random.get_rng_state(), random), "the global random numbers were touched"
    assert len(trained.loss) == len(trained.anchor) == 12
    assert trained.loss[-1] < 0.5 * trained.loss[0]
    assert trained.anchor[0] == pytest.approx(0, abs=1e-6), "an untrained adapter is the base itself"
    assert min(trained.anchor) > -1e-6
    assert trained.anchor[-1] > 1e-4
    assert trained.seconds > 0
    layers = range(backbone.split, 4)
    names = {f"model.layers.{i}.{part}" for i in layers for part in _parts()}
    assert set(trained.factors) == names
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
    tiny_base: Path, backbone: Backbone, rows: list[Row], anchors: dict[str, list[Row]]
) -> None:
    fresh = train(backbone_of(tiny_base, backbone.split), rows, anchors)
    train(backbone, anchors["irony"], {"sent2": rows}, seed=1, rank=2, target_modules=("v_proj",))
    torch.manual_seed(123)
    resident = train(backbone, rows, anchors)
    assert_same_factors(fresh.factors, resident.factors)
    assert (fresh.loss, fresh.anchor, fresh.tokens) == (resident.loss, resident.anchor, resident.tokens)
    other = train(backbone, rows, anchors, seed=8)
    assert not any(torch.equal(other.factors[name].a, fresh.factors[name].a) for name in fresh.factors)
    assert other.loss != fresh.loss


def test_modules_start_from_different_numbers(tiny_base: Path, rows: list[Row]) -> None:
    start = initial_factors(backbone_of(tiny_base, 2), rows, {})
    q, k = (start[f"model.layers.3.self_attn.{name}_proj"].a for name in "qk")
    assert not torch.equal(q, k)
    bound = 1 / math.sqrt(64)
    assert 0.8 * bound < float(q.abs().max()) <= bound
    assert float(start["model.layers.3.self_attn.q_proj"].b.abs().max()) < 1e-20


@pytest.mark.parametrize("off", ["weight", "rows"])
def test_without_an_anchor_there_is_no_anchor(
    backbone: Backbone, rows: list[Row], anchors: dict[str, list[Row]], off: str
) -> None:
    if off == "weight":
        trained = train(backbone, rows, anchors, anchor_weight=0.0, steps=2)
    else:
        trained = train(backbone, rows, {"irony": []}, steps=2)
    assert trained.anchor == ()
    assert_same_factors(trained.factors, train(backbone, rows, {}, steps=2).factors)


def test_the_anchor_keeps_the_expert_near_the_base_elsewhere(
    tiny_base: Path, backbone: Backbone, rows: list[Row], anchors: dict[str, list[Row]]
) -> None:
    settings = {"steps": 15, "learning_rate": 1e-2}
    distances = {}
    for weight in (0.0, 5.0):
        trained = train(backbone, rows, anchors, anchor_weight=weight, **settings)
        adapted = backbone_of(tiny_base, backbone.split)
        Merger(adapted, {"one": trained.factors}, blocks=1).apply({"one": (1.0,)})
        distances[weight] = {name: divergence(backbone.model, adapted.model, shown) for name, shown in anchors.items()}
        assert trained.loss[-1] < 0.5 * trained.loss[0]
    for name in anchors:
        assert distances[5.0][name] < 0.5 * distances[0.0][name]


@torch.no_grad()
def divergence(base: nn.Module, adapted: nn.Module, rows: Sequence[Row]) -> float:
    return float(naive_kl(base, adapted, rows))


def naive_kl(base: nn.Module, adapted: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Mean KL(base || adapted) over the answer positions, one plain pass per row."""
    found = []
    for row in rows:
        with torch.no_grad():
            reference = answer_logits(base, row.prompt, row.continuations[0]).softmax(-1)
        logprobs = answer_logits(adapted, row.prompt, row.continuations[0]).log_softmax(-1)
        found.append((reference * (reference.log() - logprobs)).sum(-1))
    return torch.cat(found).mean()


def naive_loss(model: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens, one plain pass per row."""
    logits = torch.cat([answer_logits(model, row.prompt, row.continuations[0]) for row in rows])
    return nn.functional.cross_entropy(logits, torch.tensor([token for row in rows for token in row.continuations[0]]))


def initial_factors(
    backbone: Backbone, rows: list[Row], anchors: dict[str, list[Row]], **settings: Any
) -> dict[str, Factors]:
    """The factors a training starts from: those after one step of next to no length."""
    return dict(train(backbone, rows, anchors, **settings | {"steps": 1, "learning_rate": 1e-30}).factors)


def rate(step: int, steps: int, rising: int) -> float:
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def plain_training(
    directory: Path,
    start: Mapping[str, Factors],
    rows: Sequence[Row],
    anchors: Mapping[str, Sequence[Row]],
    settings: Mapping[str, Any],
    rising: int,
) -> tuple[PeftModel, list[float], list[float]]:
    """The same training in the open: whole rows through a whole PEFT model, all rows in every step."""
    base = plain_model(directory)
    config = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=sorted(start))
    model = get_peft_model(plain_model(directory), config)
    model.eval()
    with torch.no_grad():
        for name, pair in start.items():
            layer = model.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.a)
            layer.lora_B["default"].weight.zero_()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * len(start)
    optimiser = torch.optim.AdamW(parameters, weight_decay=settings["weight_decay"])
    losses, distances = [], []
    for step in range(settings["steps"]):
        for group in optimiser.param_groups:
            group["lr"] = settings["learning_rate"] * rate(step, settings["steps"], rising)
        loss = naive_loss(model, rows)
        name = sorted(anchors)[step % len(anchors)]
        distance = naive_kl(base, model, anchors[name])
        optimiser.zero_grad()
        (loss + settings["anchor_weight"] * distance).backward()
        nn.utils.clip_grad_norm_(parameters, settings["clip"])
        optimiser.step()
        losses.append(float(loss.detach()))
        distances.append(float(distance.detach()))
    return model, losses, distances


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_training_equals_plain_training(
    tiny_base: Path, backbone: Backbone, rows: list[Row], anchors: dict[str, list[Row]], clip: float
) -> None:
    """Loss and anchor of each step, and the trained factors, are those of a loop without tricks."""
    settings = DEFAULTS | {
        "batch_size": len(rows),  # each step takes all rows: their order cannot matter
        "anchor_batch_size": 3,
        "weight_decay": 0.1,
        "warmup": 0.4,  # of 5 steps: 2
        "clip": clip,
        "anchor_weight": 20.0,  # much, so that a wrong weight shows
        "learning_rate": 3e-3,
    }
    start = initial_factors(backbone, rows, anchors, **settings)
    model, losses, distances = plain_training(tiny_base, start, rows, anchors, settings, rising=2)
    trained = train_adapter(backbone, rows, anchors, **settings)
    assert trained.loss == pytest.approx(losses, abs=5e-5)
    assert trained.anchor == pytest.approx(distances, abs=5e-6)
    assert losses[-1] < losses[0] - 0.1
    assert max(distances) > 1e-3
    for name, pair in trained.factors.items():
        layer = model.base_model.model.get_submodule(name)
        for found, factor in ((pair.a, layer.lora_A), (pair.b, layer.lora_B)):
            expected = factor["default"].weight.detach()
            assert float((found - expected).norm() / expected.norm()) < 5e-3, name


def test_a_trained_adapter_is_the_same_model_in_peft(
    tiny_base: Path, tmp_path: Path, backbone: Backbone, rows: list[Row], anchors: dict[str, list[Row]]
) -> None:
    """Our merge at coefficient 1, PEFT on the written folder, and the training's own forward agree."""
    during: list[dict[str, Factors]] = []

    def watch(step: int, steps: int, loss: float) -> None:
        assert (step, steps) == (len(during) + 1, 4)
        assert math.isfinite(loss)
        during.append(current_factors(backbone))

    settings = {"steps": 4, "batch_size": len(rows), "learning_rate": 1e-2}
    trained = train(backbone, rows, anchors, progress=watch, **settings)
    assert len(during) == 4
    assert_same_factors(during[-1], trained.factors)
    for step, factors in enumerate(during):
        folder = tmp_path / str(step)
        folder.mkdir()
        files = to_files(factors, base_name="org/tiny", rank=4, alpha=8.0)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        model = PeftModel.from_pretrained(plain_model(tiny_base), folder).eval()
        merged = backbone_of(tiny_base, backbone.split)
        Merger(merged, {"one": from_files(*files.values())}, blocks=1).apply({"one": (1.0,)})
        torch.testing.assert_close(probe_logits(merged.model), probe_logits(model), rtol=0, atol=1e-4)
        if step + 1 < len(during):  # the loss of the next step is computed before it is taken
            with torch.no_grad():
                assert trained.loss[step + 1] == pytest.approx(float(naive_loss(model, rows)), abs=1e-4)
    assert (probe_logits(merged.model) - probe_logits(backbone.model)).abs().max() > 0.1


def current_factors(backbone: Backbone) -> dict[str, Factors]:
    return {
        name: Factors(m.lora_A["default"].weight.detach().clone(), m.lora_B["default"].weight.detach().clone(), 2.0)
        for name, m in backbone.model.named_modules()
        if hasattr(m, "lora_A")
    }


def test_only_the_target_modules_of_the_top_layers_change(tiny_base: Path, rows: list[Row]) -> None:
    trained = train(backbone_of(tiny_base, 3), rows, {}, target_modules=("v_proj", "down_proj"))
    assert set(trained.factors) == {"model.layers.3.self_attn.v_proj", "model.layers.3.mlp.down_proj"}


def test_every_row_is_seen_once_an_epoch(tiny_base: Path, rows: list[Row]) -> None:
    """With next to no learning, six steps of one row are the rows' own losses in some order, then again."""
    backbone = backbone_of(tiny_base, 2)
    trained = train(backbone, rows, {}, steps=12, batch_size=1, learning_rate=1e-30)
    with torch.no_grad():
        expected = sorted(float(naive_loss(backbone.model, [row])) for row in rows)
    assert sorted(trained.loss[:6]) == pytest.approx(expected, abs=1e-4)
    assert sorted(trained.loss[6:]) == pytest.approx(expected, abs=1e-4)
    assert trained.loss[:6] != pytest.approx(trained.loss[6:], abs=1e-4), "both epochs have the same order"


def test_tokens_count_a_shared_prefix_once(tiny_base: Path) -> None:
    rows = [Row((5, 6, 7, 8), ((9, 2),)), Row((5, 6, 7, 10, 11), ((12, 2),))]
    trained = train(backbone_of(tiny_base, 2), rows, {}, steps=3, batch_size=2)
    assert trained.tokens == 3 * (3 + 2 + 3)


def test_bfloat16(tiny_base: Path, rows: list[Row], anchors: dict[str, list[Row]]) -> None:
    backbone = backbone_of(tiny_base, 2, "bfloat16")
    before = state_of(backbone.model)
    trained, again = (train(backbone, rows, anchors, steps=6, learning_rate=1e-2) for _ in range(2))
    assert_same_state(before, state_of(backbone.model))
    assert_same_factors(trained.factors, again.factors)
    assert trained.loss[-1] < 0.8 * trained.loss[0]
    assert {pair.a.dtype for pair in trained.factors.values()} == {torch.float32}
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.bfloat16}


def test_no_rows(backbone: Backbone) -> None:
    with pytest.raises(TrainingError, match=r"expected rows to train on, got none; check data\.train_rows"):
        train(backbone, [], {})


def test_an_unknown_target_module(backbone: Backbone, rows: list[Row]) -> None:
    before = state_of(backbone.model)
    with pytest.raises(
        TrainingError, match=r"no linear layer named \['c_attn'\]; this model has \['down_proj', 'gate_proj'"
    ):
        train(backbone, rows, {}, target_modules=("q_proj", "c_attn"))
    assert_same_state(before, state_of(backbone.model))


@pytest.mark.parametrize(
    ("poison", "step"), [(lambda b: None, 1), (lambda b: 2, 3)], ids=["at once", "in the third step"]
)
def test_a_loss_that_is_not_finite_names_its_step(
    tiny_base: Path, rows: list[Row], poison: Callable[[Backbone], int | None], step: int
) -> None:
    backbone = backbone_of(tiny_base, 2)
    types = state_of(backbone.model)["types"]
    weight = backbone.model.model.layers[3].mlp.up_proj.weight
    after = poison(backbone)

    def watch(done: int, _: int, __: float) -> None:
        if done == after:
            weight.data[0, 0] = float("nan")

    if after is None:
        weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=f"the loss became nan at step {step} of 5; lower experts.learning_rate"):
        train(backbone, rows, {}, progress=watch)
    assert state_of(backbone.model)["types"] == types, "the adapter was left in the backbone"
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
