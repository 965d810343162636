"""What training does to fit into memory changes no result: rows in parts, memory that runs out, layers run again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, backbone_of
from torch import Tensor, nn
from train_fixture import (
    PLAN,
    Plain,
    assert_same_state,
    assert_same_training,
    distance,
    initial_factors,
    naive_loss,
    other_rows,
    own_rows,
    state_of,
    train,
)

from memmcl.backbone.batches import Batch, TokenizedRow
from memmcl.backbone.forward import Backbone
from memmcl.errors import TrainingError
from memmcl.experts.checkpoint import decode, encode
from memmcl.experts.settings import Anchoring
from memmcl.experts.train import Moved

CPU_ERROR = "DefaultCPUAllocator: can't allocate memory"


@pytest.fixture(scope="module")
def uneven() -> dict[str, list[TokenizedRow]]:
    """Rows whose answers have 1 to 24 tokens."""
    rng = np.random.default_rng(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(3, VOCABULARY, length))

    return {name: [TokenizedRow(ids(6), (ids(length),)) for length in (1, 24, 2, 1, 17, 1)] for name in ("a", "b")}


def of_parts(size: int) -> Callable[[nn.Module, Sequence[TokenizedRow]], Tensor]:
    """Return the mistake: the mean over parts of each part's mean."""

    def loss(model: nn.Module, rows: Sequence[TokenizedRow]) -> Tensor:
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return torch.stack([naive_loss(model, part) for part in parts]).mean()

    return loss


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 6, 99])
def test_parts_are_weighted_by_their_answer_tokens(
    backbone: Backbone, uneven: dict[str, list[TokenizedRow]], micro_batch: int
) -> None:
    """The same factors as in one part; every part size, also where the last part is smaller."""
    settings = {"batch_size": 6, "steps": 3, "anchoring": Anchoring(5.0, 5)}
    whole = train(backbone, {"a": uneven["a"]}, {"b": uneven["b"]}, **settings)
    parts = train(backbone, {"a": uneven["a"]}, {"b": uneven["b"]}, micro_batch=micro_batch, **settings)
    assert (whole.micro_batch, parts.micro_batch) == (6, min(6, micro_batch))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.anchor == pytest.approx(whole.anchor, rel=1e-4, abs=1e-6)
    assert distance(parts.factors, whole.factors) < 2e-3


def test_a_mean_of_means_would_be_noticed(
    tiny_base: Path, backbone: Backbone, uneven: dict[str, list[TokenizedRow]]
) -> None:
    """The plain loop with that mistake is ten times as far away as what the test above lets pass."""
    rows, plan = uneven["a"], replace(PLAN, batch_size=6, steps=3)
    start = initial_factors(backbone, {"a": rows})
    parts = train(backbone, {"a": rows}, **vars(replace(plan, micro_batch=2)))
    right, _, _ = Plain(tiny_base, plan, 1, {}).train(start, rows, {})
    wrong, losses, _ = Plain(tiny_base, plan, 1, {}, of_parts(2)).train(start, rows, {})
    assert distance(parts.factors, right) < 2e-3
    assert distance(parts.factors, wrong) > 2e-2
    assert abs(losses[0] - parts.loss[0]) > 1e-2


class Memory:
    """Runs out when more than `rows` rows go through the top for a gradient; `after` says when it becomes so small."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, kind: str = "cuda") -> None:
        self.rows: float = rows
        self.kind = kind
        self.refused = 0
        self.asked: list[int] = []
        self.left: list[weakref.ref[Tensor]] = []
        self._top = Backbone.top
        monkeypatch.setattr(Backbone, "top", lambda backbone, *given: self.run(backbone, *given))

    def run(self, backbone: Backbone, hidden: Tensor, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            self.asked.append(len(batch.owners[:, 0].unique()))
            assert not [kept for kept in self.left if kept() is not None], "what did not fit is still held"
            if self.asked[-1] > self.rows:
                self.refused += 1
                held = self._top(backbone, hidden, batch)
                self.left.append(weakref.ref(held))
                if self.kind == "cuda":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                torch.empty(2**50)  # a real one
        return self._top(backbone, hidden, batch)


OUT: dict[str, Any] = {"steps": 5, "batch_size": 5, "anchoring": Anchoring(2.0, 3), "dropout": 0.1}


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_where_memory_runs_out_half_of_the_rows_are_run(
    tiny_base: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """From the step on where it ran out, as if that many had been asked for; and so after resuming."""
    rows, anchors = own_rows(tiny_base), other_rows(tiny_base)
    saves: list[bytes] = []
    free = train(backbone, rows, anchors, save=saves.append, save_every=1, **OUT)
    assert free.micro_batch == 5
    progressed, tensors = decode(saves[1])
    expected = train(backbone, rows, anchors, resume=encode(replace(progressed, micro_batch=2), tensors), **OUT)
    with monkeypatch.context() as patch:
        memory = Memory(patch, 99, kind)

        def shrink(moved: Moved) -> None:
            memory.rows = 99 if moved.step < 2 else 2

        saves.clear()
        trained = train(backbone, rows, anchors, progress=shrink, save=saves.append, save_every=1, **OUT)
        assert memory.refused == 1
        assert memory.asked == [5, 3, 5, 3, 5, *[2, 2, 1, 2, 1] * 3]
    assert trained.micro_batch == 2
    assert_same_training(trained, expected)
    assert trained.loss != free.loss  # other dropout, and sums in another order
    assert decode(saves[-1])[0].micro_batch == 2
    assert_same_training(train(backbone, rows, anchors, resume=saves[-1], **OUT), expected)


def test_a_part_that_was_run_before_memory_ran_out_does_not_count(
    tiny_base: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the anchor, when the gradient of the own rows is there already: it is computed anew."""
    rows, anchors = own_rows(tiny_base), {"irony": other_rows(tiny_base)["irony"]}
    settings = {"steps": 3, "batch_size": 2, "anchoring": Anchoring(2.0, 3)}
    expected = train(backbone, rows, anchors, micro_batch=1, **settings)
    memory = Memory(monkeypatch, 2)
    assert_same_training(train(backbone, rows, anchors, **settings), expected)
    assert memory.asked[:3] == [2, 3, 1]


@pytest.mark.parametrize("asked_for", [0, 99])
def test_anchors_in_larger_batches_are_halved_too(
    tiny_base: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, asked_for: int
) -> None:
    """What is halved is the largest batch that was run, not the own one, nor what was asked for and never reached."""
    rows, anchors = own_rows(tiny_base), {"irony": other_rows(tiny_base)["irony"]}
    memory = Memory(monkeypatch, 2)
    trained = train(backbone, rows, anchors, steps=2, batch_size=2, micro_batch=asked_for, anchoring=Anchoring(2.0, 4))
    assert memory.asked == [2, 4, 2, 2, 2, 2, 2, 2]
    assert trained.micro_batch == 2


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("settings", "later", "told"),
    [
        ({}, 1, "with 2 rows at once"),  # in the same step
        ({"micro_batch": 3}, 0, "with 1 rows at once"),
        ({"batch_size": 1, "anchoring": None}, 0, "with 1 rows at once"),
    ],
    ids=["at once", "asked for parts", "one row"],
)
def test_memory_that_runs_out_twice(
    tiny_base: Path,
    backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: dict[str, Any],
    later: int,
    told: str,
) -> None:
    before = state_of(backbone.model)
    Memory(monkeypatch, later, kind)
    with pytest.raises(
        TrainingError,
        match=rf"^memory ran out {told}; lower experts\.micro_batch_size or data\.max_prompt_tokens, adapt fewer",
    ):
        train(backbone, own_rows(tiny_base), other_rows(tiny_base), **OUT | settings)
    assert_same_state(before, state_of(backbone.model))


def test_memory_that_runs_out_again_in_a_later_step_or_session(
    tiny_base: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, anchors, saves = own_rows(tiny_base), other_rows(tiny_base), []
    memory = Memory(monkeypatch, 3)

    def shrink(moved: Moved) -> None:
        if moved.step == 3:
            memory.rows = 1

    with pytest.raises(TrainingError, match="memory ran out with 2 rows at once"):
        train(backbone, rows, anchors, progress=shrink, save=saves.append, save_every=1, **OUT)
    assert [decode(data)[0].step for data in saves] == [1, 2, 3]
    with pytest.raises(TrainingError, match="memory ran out with 2 rows at once"):
        train(backbone, rows, anchors, resume=saves[-1], **OUT)


def test_other_errors_are_not_taken_for_memory(
    tiny_base: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, asked = state_of(backbone.model), []

    def broken(*_: object) -> Tensor:
        asked.append(1)
        raise RuntimeError("a kernel was launched with the wrong shape")

    monkeypatch.setattr(Backbone, "top", broken)
    with pytest.raises(RuntimeError, match="wrong shape"):
        train(backbone, own_rows(tiny_base))
    assert len(asked) == 1
    assert_same_state(before, state_of(backbone.model))


def calls_of(layer: nn.Module, work: Callable[[], Any]) -> tuple[int, Any]:
    """Return how often the layer's MLP ran, and what the work returned."""
    calls: list[int] = []
    handle = layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        done = work()
    finally:
        handle.remove()
    return len(calls), done


@pytest.mark.parametrize(("dtype", "dropout"), [("float32", 0.0), ("float32", 0.2), ("bfloat16", 0.2)])
def test_recomputing_runs_layers_twice_and_changes_nothing(tiny_base: Path, dtype: str, dropout: float) -> None:
    """But bits: it attends under a dense mask. Also with dropout, whose numbers are drawn twice alike."""
    backbone = backbone_of(tiny_base, 2, dtype)
    settings = {"steps": 3, "dropout": dropout, "batch_size": 6, "micro_batch": 4}
    before = state_of(backbone.model)

    def work(recompute: bool) -> Any:
        return train(backbone, own_rows(tiny_base), other_rows(tiny_base), recompute=recompute, **settings)

    once, plain = calls_of(backbone.decoder.layers[2], lambda: work(False))
    twice, again = calls_of(backbone.decoder.layers[2], lambda: work(True))
    assert_same_state(before, state_of(backbone.model))
    reference = 2  # the base at the rows of two other subtasks
    assert (once, twice) == (3 * 3 + reference, 2 * 3 * 3 + reference)
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    assert again.loss == pytest.approx(plain.loss, rel=tolerance)
    assert again.anchor == pytest.approx(plain.anchor, rel=10 * tolerance, abs=tolerance)
    if dtype == "float32":  # AdamW's first steps take the noise of bfloat16 in a small gradient for its sign
        assert distance(again.factors, plain.factors) < 1e-3


def test_recomputing_keeps_less_for_backward(tiny_base: Path, backbone: Backbone) -> None:
    kept = {}
    for recompute in (False, True):
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train(backbone, own_rows(tiny_base), steps=1, recompute=recompute)
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_layers_are_as_they_were_after_recomputing(backbone: Backbone) -> None:
    """Every attribute is the same object as before, also after an error, and layers of the trunk are left alone."""
    layers = list(backbone.decoder.layers)
    before = [dict(layer.__dict__) for layer in layers]
    with pytest.raises(ZeroDivisionError), backbone.recomputing():  # noqa: PT012
        assert [layer.training for layer in layers] == [False, False, True, True]
        assert not any(part.training for layer in layers for part in layer.children())
        raise ZeroDivisionError
    for layer, attributes in zip(layers, before, strict=True):
        assert layer.__dict__.keys() == attributes.keys()
        assert all(layer.__dict__[name] is value for name, value in attributes.items())
        assert not layer.gradient_checkpointing
