"""When and how strongly training is anchored, and anchoring of a finished adapter, against the plain loop."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import backbone_of, plain_model, probe_logits, random_factors
from train_fixture import (
    PLAN,
    Plain,
    Rows,
    assert_same_factors,
    assert_same_state,
    distance,
    initial_factors,
    loaded,
    merged,
    naive_kl,
    naive_loss,
    state_of,
    train,
)

from memmcl.adapters.format import Factors
from memmcl.backbone.forward import Backbone
from memmcl.errors import TrainingError
from memmcl.experts.settings import Anchoring
from memmcl.experts.train import TrainedAdapter

NO = None


@pytest.mark.parametrize(
    ("every", "delay", "turns"),
    [
        (1, 0.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (2, 0.0, [0, NO, 1, NO, 2, NO, 3, NO, 4, NO]),
        (3, 0.0, [0, NO, NO, 1, NO, NO, 2, NO, NO, 3]),
        (1, 0.25, [NO, NO, 0, 1, 2, 3, 4, 5, 6, 7]),  # round(2.5) is 2
        (4, 0.3, [NO, NO, NO, 0, NO, NO, NO, 1, NO, NO]),
        (20, 0.0, [0, *[NO] * 9]),
        (1, 0.9, [*[NO] * 9, 0]),
        (1, 1.0, [NO] * 10),
    ],
)
def test_which_steps_are_anchored(every: int, delay: float, turns: list[int | None]) -> None:
    anchoring = Anchoring(1.0, 2, every=every, delay=delay)
    assert [anchoring.turn(step, 10) for step in range(10)] == turns


def test_fewer_anchors_pull_harder(tiny_base: Path, backbone: Backbone, rows: Rows, anchors: Rows) -> None:
    """Steps 2 and 4 of 6 are anchored, by one subtask each, and by `every` times the weight."""
    plan = replace(PLAN, steps=6, batch_size=6, learning_rate=3e-3)
    start = initial_factors(backbone, rows)
    pulls = {2: ("irony", 20.0), 4: ("uabsa", 20.0)}
    factors, losses, distances = Plain(tiny_base, plan, 1, pulls).train(start, rows["sent2"], anchors)
    trained = train(backbone, rows, anchors, anchoring=Anchoring(10.0, 3, every=2, delay=0.3), **vars(plan))
    assert [step for step, pull in enumerate(trained.anchor) if pull is not None] == [2, 4]
    assert trained.anchor == pytest.approx(distances, abs=5e-6)
    assert trained.loss == pytest.approx(losses, abs=5e-5)
    assert distance(trained.factors, factors) < 5e-3
    weaker, _, _ = Plain(tiny_base, plan, 1, {2: ("irony", 10.0), 4: ("uabsa", 10.0)}).train(
        start, rows["sent2"], anchors
    )
    assert distance(weaker, factors) > 2e-2, "a weight without `every` would not be noticed"


def trained_on(backbone: Backbone, rows: Rows, **changed: object) -> TrainedAdapter:
    return train(backbone, rows, **{"steps": 10, "batch_size": 6, "learning_rate": 1e-2} | changed)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_trained_adapter_in_peft(
    tiny_base: Path, tmp_path: Path, backbone: Backbone, rows: Rows, rslora: bool, dropout: float
) -> None:
    """PEFT on the files, our merge, and a resident backbone that goes on from the adapter agree."""
    trained = trained_on(backbone, rows, rslora=rslora, dropout=dropout)
    scale = 8.0 / math.sqrt(4) if rslora else 8.0 / 4
    assert {pair.scale for pair in trained.factors.values()} == {scale}
    model = loaded(tiny_base, tmp_path, trained.factors, rank=4, alpha=8.0, rslora=rslora)
    assert model.peft_config["default"].base_model_name_or_path == "org/tiny"
    torch.testing.assert_close(probe_logits(merged(tiny_base, trained.factors)), probe_logits(model), rtol=0, atol=1e-4)
    with torch.no_grad():
        expected = float(naive_loss(model, rows["sent2"]))
    again = train(backbone, rows, start=trained.factors, steps=1, batch_size=6)
    assert again.loss[0] == pytest.approx(expected, abs=1e-4)
    assert expected < trained.loss[0] - 0.5


def test_dropout_drops(backbone: Backbone, rows: Rows) -> None:
    """A training with dropout is another one, and reproducible."""
    without, once, again = (trained_on(backbone, rows, steps=3, dropout=dropout) for dropout in (0.0, 0.4, 0.4))
    assert once.loss == again.loss
    assert once.loss[0] == pytest.approx(without.loss[0], abs=1e-5), "B is zero: nothing to drop yet"
    assert abs(once.loss[2] - without.loss[2]) > 1e-3


def test_every_part_drops_other_numbers_and_what_is_only_read_none(
    tiny_base: Path, rows: Rows, anchors: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two parts and an anchor, through one adapted module; a second training drops the same."""
    plain, masks = torch.nn.Dropout.forward, []

    def watched(module: torch.nn.Dropout, features: torch.Tensor) -> torch.Tensor:
        kept = plain(module, features)
        if module.training:
            masks.append(kept[0, :60] != 0)
        return kept

    monkeypatch.setattr(torch.nn.Dropout, "forward", watched)
    backbone, settings = backbone_of(tiny_base, 3), {"target_modules": ("v_proj",), "dropout": 0.4, "batch_size": 6}
    for _ in range(2):
        trained = train(backbone, rows, anchors, steps=2, micro_batch=3, **settings)
    assert len(masks) == 2 * 6
    train(backbone, rows, anchors, steps=1, start=trained.factors, teacher="self", **settings)
    assert len(masks) == 2 * 6 + 2, "what it is held to was computed with dropout"
    assert all(torch.equal(one, two) for one, two in zip(masks[:6], masks[6:12], strict=True))
    for number, mask in enumerate(masks[:6]):
        assert float(mask.float().mean()) == pytest.approx(0.6, abs=0.05)
        for other in masks[:number]:
            assert float((mask == other).float().mean()) == pytest.approx(0.6**2 + 0.4**2, abs=0.05)


def test_an_adapter_of_several_ranks_is_gone_on_from(
    tiny_base: Path, tmp_path: Path, backbone: Backbone, rows: Rows
) -> None:
    """Modules, ranks and scales are those of the start, whatever LoraShape says; one step of no length keeps it."""
    random = random_factors(tiny_base, layers=(2, 3), modules=("q_proj", "up_proj"), seed=1)
    start = {
        name: Factors(pair.a[:rank].clone(), pair.b[:, :rank].clone(), scale)
        for (name, pair), rank, scale in zip(random.items(), (1, 2, 3, 2), (0.5, 2.0, 1.0, 3.0), strict=True)
    }
    model = loaded(tiny_base, tmp_path, start, rank=3, alpha=6.0)
    with torch.no_grad():
        expected = float(naive_loss(model, rows["sent2"]))
    stayed = train(backbone, rows, start=start, steps=1, batch_size=6, learning_rate=0.0)
    assert stayed.loss[0] == pytest.approx(expected, abs=1e-4)
    assert_same_factors(stayed.factors, start)
    moved = train(backbone, rows, start=start, steps=4)
    assert {name: (pair.a.shape, pair.b.shape, pair.scale) for name, pair in moved.factors.items()} == {
        name: (pair.a.shape, pair.b.shape, pair.scale) for name, pair in start.items()
    }
    model = loaded(tiny_base, tmp_path, moved.factors, rank=3, alpha=6.0)
    torch.testing.assert_close(probe_logits(merged(tiny_base, moved.factors)), probe_logits(model), rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_adapter_is_anchored_after_the_fact(tiny_base: Path, backbone: Backbone, rows: Rows, anchors: Rows) -> None:
    """Held to itself at its own prompts and to the base at others': there it comes near the base, here it stays."""
    with torch.enable_grad():
        expert = trained_on(backbone, rows, steps=15).factors
        anchored = train(
            backbone,
            rows,
            anchors,
            start=expert,
            teacher="self",
            anchoring=Anchoring(3.0, 3),
            steps=20,
            batch_size=6,
            learning_rate=1e-2,
        )
    assert anchored.loss[0] == pytest.approx(0, abs=1e-6), "it starts as its own teacher"
    base, before, after = plain_model(tiny_base), merged(tiny_base, expert), merged(tiny_base, anchored.factors)
    assert anchored.anchor[0] == pytest.approx(float(naive_kl(base, before, anchors["irony"])), abs=1e-4)
    for shown in anchors.values():
        assert float(naive_kl(base, after, shown)) < 0.2 * float(naive_kl(base, before, shown))
    (own,) = rows.values()
    assert float(naive_kl(before, after, own)) < 0.1 * float(naive_kl(before, base, own))
    assert anchored.loss[-1] < 0.1 * float(naive_kl(before, base, own))


def test_the_own_loss_of_teacher_self_is_its_divergence_from_the_start(
    tiny_base: Path, backbone: Backbone, rows: Rows, anchors: Rows
) -> None:
    expert = trained_on(backbone, rows, steps=5).factors
    settings = {"start": expert, "teacher": "self", "anchoring": Anchoring(3.0, 3), "batch_size": 6}
    short, longer = (
        train(backbone, rows, anchors, steps=steps, curve="constant", warmup=0.0, **settings) for steps in (2, 3)
    )
    with torch.no_grad():
        expected = float(naive_kl(merged(tiny_base, expert), merged(tiny_base, short.factors), rows["sent2"]))
    assert longer.loss[2] == pytest.approx(expected, abs=1e-5)
    assert expected > 1e-3


def test_an_adapter_is_its_own_teacher_only_where_there_is_one(backbone: Backbone, rows: Rows) -> None:
    with pytest.raises(
        TrainingError, match=r'^teacher "self" distils an adapter into itself: give the adapter as `start`$'
    ):
        train(backbone, rows, teacher="self")


def odd_start(name: str, out: int = 64, into: int = 64) -> dict[str, Factors]:
    return {name: Factors(torch.zeros(2, into), torch.zeros(out, 2), 1.0)}


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (odd_start("model.layers.3.self_attn.q_proj", into=32), "q_proj of 64 x 32, this base has 64 x 64"),
        (odd_start("model.layers.3.mlp.up_proj"), "up_proj of 64 x 64, this base has 128 x 64"),
        (odd_start("model.layers.9.self_attn.q_proj"), "q_proj of 64 x 64, this base has no such linear layer"),
        (odd_start("model.layers.3.input_layernorm"), "input_layernorm of 64 x 64, this base has no such linear"),
        (odd_start("model.layers.1.self_attn.q_proj"), r"model\.layers\.1\.self_attn\.q_proj, below layer 2"),
    ],
    ids=["another width", "another height", "more layers", "no linear layer", "in the trunk"],
)
def test_a_start_of_another_base(backbone: Backbone, rows: Rows, start: dict[str, Factors], told: str) -> None:
    before = state_of(backbone.model)
    with pytest.raises(TrainingError, match=told):
        train(backbone, rows, start=start)
    assert_same_state(before, state_of(backbone.model))
