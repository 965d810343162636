"""Looks at the validation rows, the adapter that is kept, and the curve of the rate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from train_fixture import (
    PLAN,
    Rows,
    assert_same_factors,
    current_factors,
    held_out_rows,
    merged,
    naive_loss,
    other_rows,
    train,
)

from memmcl.adapters.format import Factors
from memmcl.backbone.forward import Backbone
from memmcl.experts.settings import Curve, Optimisation, Stopping
from memmcl.experts.train import Moved, TrainedAdapter

WORSENS = {"learning_rate": 0.05, "curve": "constant", "batch_size": 6}
"""So fast that the held-out rows of another subtask suffer, after a while."""


def watched(backbone: Backbone, rows: Rows, **changed: object) -> tuple[TrainedAdapter, list[dict[str, Factors]]]:
    """Train, and return the factors after each step too."""
    during: list[dict[str, Factors]] = []

    def watch(moved: Moved) -> None:
        during.append(current_factors(backbone))

    return train(backbone, rows, progress=watch, **changed), during


@pytest.mark.parametrize(("every", "looks"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_a_look_is_a_plain_pass_over_the_validation_rows(
    tiny_base: Path, backbone: Backbone, rows: Rows, every: int, looks: list[int]
) -> None:
    """Rows of two subtasks count by their answer tokens; the last step is looked at too. Dropout stays out of it."""
    validation = held_out_rows(tiny_base) | {"uabsa": other_rows(tiny_base)["uabsa"][:2]}
    trained, during = watched(backbone, rows, validation=validation, stopping=Stopping(every), dropout=0.3)
    assert [step for step, _ in trained.validation] == looks
    pooled = [row for shown in validation.values() for row in shown]
    assert len({len(row.continuations[0]) for row in pooled}) > 1
    with torch.no_grad():
        for step, loss in trained.validation:
            assert loss == pytest.approx(float(naive_loss(merged(tiny_base, during[step - 1]), pooled)), abs=1e-4)
    best = min(loss for _, loss in trained.validation)
    assert (trained.best_step, best) in trained.validation
    assert not trained.stopped_early


def test_looking_changes_no_step(tiny_base: Path, backbone: Backbone, rows: Rows) -> None:
    plain, without = watched(backbone, rows, dropout=0.2)
    looking, during = watched(
        backbone, rows, dropout=0.2, validation=held_out_rows(tiny_base), stopping=Stopping(2, patience=9)
    )
    assert looking.loss == plain.loss
    for one, two in zip(during, without, strict=True):
        assert_same_factors(one, two)
    for stopping in (None, Stopping(1)):
        unasked = train(
            backbone,
            rows,
            dropout=0.2,
            stopping=stopping,
            validation={"sent2": []} if stopping else held_out_rows(tiny_base),
        )
        assert (unasked.validation, unasked.best_step) == ((), None)
        assert_same_factors(unasked.factors, plain.factors)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_the_best_adapter_is_kept_and_patience_ends(
    tiny_base: Path, backbone: Backbone, rows: Rows, patience: int
) -> None:
    validation = {"irony": other_rows(tiny_base)["irony"]}
    trained, during = watched(
        backbone, rows, steps=12, validation=validation, stopping=Stopping(1, patience=patience), **WORSENS
    )
    losses = [loss for _, loss in trained.validation]
    best = losses.index(min(losses)) + 1
    assert trained.best_step == best
    assert_same_factors(trained.factors, during[best - 1])
    assert best < 9, "the rows do not suffer: this test shows nothing"
    with torch.no_grad():
        kept = float(naive_loss(merged(tiny_base, trained.factors), validation["irony"]))
    assert kept == pytest.approx(min(losses), abs=1e-4)
    since = 0  # the rule by hand: how long no look was better than all before it
    lowest = math.inf
    ended = 12
    for step, loss in enumerate(losses, start=1):
        since, lowest = (0, loss) if loss < lowest else (since + 1, lowest)
        if patience and since >= patience:
            ended = step
            break
    assert len(trained.loss) == len(losses) == ended
    assert trained.stopped_early == (ended < 12) == (patience > 0)


def test_the_last_adapter_may_be_the_best(tiny_base: Path, backbone: Backbone, rows: Rows) -> None:
    trained, during = watched(backbone, rows, validation=rows, stopping=Stopping(2, patience=1))
    assert trained.best_step == 5
    assert_same_factors(trained.factors, during[-1])


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        # 10 steps, 3 of them rising: the third is at the peak, and so is the first of the curve
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("cosine", [1 / 3, 2 / 3, 1, *[0.5 + 0.5 * math.cos(math.pi * i / 7) for i in range(7)]]),
    ],
)
def test_the_rate_rises_and_follows_its_curve(curve: Curve, expected: list[float]) -> None:
    plan = Optimisation(steps=10, batch_size=1, learning_rate=9.0, warmup=0.3, curve=curve)
    assert [plan.rate(step) for step in range(10)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "warmup", "curve", "first", "last"),
    [
        (10, 0.0, "cosine", 1.0, 0.5 + 0.5 * math.cos(math.pi * 8 / 9)),  # at least one step rises, in full
        (10, 0.0, "linear", 1.0, 1 / 9),
        (10, 0.04, "constant", 1.0, 1.0),
        (10, 1.0, "cosine", 0.1, 1.0),  # nothing but the rise
        (1, 0.1, "cosine", 1.0, 1.0),
        (2, 0.5, "linear", 1.0, 1.0),
        (1000, 0.1, "cosine", 0.01, 0.5 + 0.5 * math.cos(math.pi * 899 / 900)),
    ],
)
def test_the_rates_of_the_first_and_the_last_step(
    steps: int, warmup: float, curve: Curve, first: float, last: float
) -> None:
    plan = Optimisation(steps=steps, batch_size=1, learning_rate=9.0, warmup=warmup, curve=curve)
    assert (plan.rate(0), plan.rate(steps - 1)) == pytest.approx((first, last), abs=1e-12)


@pytest.mark.parametrize("curve", ["cosine", "linear", "constant"])
def test_training_follows_the_curve(backbone: Backbone, rows: Rows, curve: Curve) -> None:
    """AdamW moves a number by the rate in its first step, whatever its gradient; later steps are as long or shorter."""
    trained, during = watched(backbone, rows, curve=curve, steps=4, warmup=0.5, learning_rate=1e-3, batch_size=6)
    plan = Optimisation(steps=4, batch_size=6, learning_rate=1e-3, warmup=0.5, curve=curve)
    name = "model.layers.3.mlp.down_proj"
    assert float(during[0][name].b.abs().max()) == pytest.approx(1e-3 * plan.rate(0), rel=1e-3)
    moved = [float((one[name].b - two[name].b).abs().max()) for one, two in zip(during[1:], during, strict=False)]
    bounds = [1e-3 * plan.rate(step) for step in (1, 2, 3)]
    assert all(0.7 * bound < step < 1.3 * bound for step, bound in zip(moved, bounds, strict=True)), (moved, bounds)
    assert trained.loss[-1] < trained.loss[0]
    assert PLAN.curve == "cosine"
