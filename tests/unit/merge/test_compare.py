"""How task vectors relate, against task vectors written out in full in float64, and by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from memmcl.adapters.format import Adapter, Factors
from memmcl.errors import ModelError
from memmcl.merge import compare as module
from memmcl.merge.compare import Relation, compare

SHAPES = {"self_attn.q_proj": (12, 10), "mlp.up_proj": (30, 10), "mlp.down_proj": (10, 30)}
Q, UP = "model.layers.3.self_attn.q_proj", "model.layers.4.mlp.up_proj"


def name_of(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{part}"


def random_adapters() -> dict[str, Adapter]:
    """Four experts of other ranks, scales, layers and modules; one has zero rows, one is zero in a layer."""
    generator = torch.Generator().manual_seed(5)
    plan: dict[str, tuple[int, float, tuple[int, ...], tuple[str, ...]]] = {
        "all": (3, 2.0, (8, 9, 10), tuple(SHAPES)),
        "top": (2, 0.5, (9, 10), tuple(SHAPES)),
        "attention": (5, 1.0, (8, 9, 10), ("self_attn.q_proj",)),
        "lowest": (1, 4.0, (8,), ("mlp.down_proj", "mlp.up_proj")),
    }
    adapters: dict[str, dict[str, Factors]] = {}
    for expert, (rank, scale, layers, parts) in plan.items():
        adapters[expert] = {}
        for layer, part in itertools.product(layers, parts):
            height, width = SHAPES[part]
            a = torch.randn(rank, width, generator=generator)
            b = torch.randn(height, rank, generator=generator)
            b[:: 3 if expert == "top" else height + 1] = 0
            adapters[expert][name_of(layer, part)] = Factors(a, 0 * b if (expert, layer) == ("all", 9) else b, scale)
    return {**adapters}


def dense(adapters: Mapping[str, Adapter], layers: tuple[int, ...]) -> np.ndarray:
    """Return all entries of some layers: (experts, entries) float64."""
    rows = []
    for adapter in adapters.values():
        row = []
        for layer, (part, shape) in itertools.product(layers, SHAPES.items()):
            pair = adapter.get(name_of(layer, part))
            row.append(np.zeros(shape) if pair is None else (pair.scale * pair.b.double() @ pair.a.double()).numpy())
        rows.append(np.concatenate([one.ravel() for one in row]))
    return np.stack(rows)


def assert_relation(found: Relation, vectors: np.ndarray) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    assert found.norms == pytest.approx(norms, rel=1e-6)
    for i, j in itertools.product(range(len(vectors)), repeat=2):
        if norms[i] * norms[j] == 0:
            assert found.cosines[i][j] is None
        else:
            assert found.cosines[i][j] == pytest.approx(vectors[i] @ vectors[j] / (norms[i] * norms[j]), abs=1e-9)
            assert found.cosines[i][j] == found.cosines[j][i]
    pairs = clashes = 0
    for one, other in itertools.combinations(vectors, 2):
        pairs += np.count_nonzero(one * other)
        clashes += np.count_nonzero(one * other < 0)
    assert found.conflict == pytest.approx(clashes / pairs, abs=1e-9)
    assert found.cancelled == pytest.approx(1 - abs(vectors.sum(axis=0)).sum() / abs(vectors).sum(), abs=1e-6)


@pytest.mark.parametrize("entries", [1, 100, module.ENTRIES])
def test_every_number_is_that_of_the_task_vectors_in_full(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr(module, "ENTRIES", entries)
    adapters = random_adapters()
    found = compare(adapters)
    assert found.experts == tuple(adapters)
    assert [relation.layer for relation in (found.overall, *found.layers)] == [None, 8, 9, 10]
    for relation, layers in zip((found.overall, *found.layers), ((8, 9, 10), (8,), (9,), (10,)), strict=True):
        assert_relation(relation, dense(adapters, layers))
    assert found.layers[1].norms[0] == found.layers[1].norms[3] == 0, "zero there, and not adapted there"
    assert found.layers[1].cosines[0] == (None,) * 4


def outer(row: list[float], column: list[float], scale: float = 1.0) -> Factors:
    """Return a task vector of rank one: scale * column x row."""
    return Factors(torch.tensor([row]).float(), torch.tensor([column]).float().T, scale)


def test_by_hand() -> None:
    """T = [[1, 2], [0, 0]] and 2 [[1, -1], [1, -1]]: four entries, in two of which both are non-zero."""
    found = compare({"a": {Q: outer([1, 2], [1, 0])}, "b": {Q: outer([1, -1], [1, 1], 2.0)}})
    assert found.overall.norms == pytest.approx((5**0.5, 4.0))
    assert found.overall.cosines[0][1] == pytest.approx((2 - 4) / (4 * 5**0.5))
    assert [found.overall.cosines[place][place] for place in (0, 1)] == pytest.approx([1, 1])
    assert found.overall.conflict == 1 / 2  # 1 and 2 agree, 2 and -2 do not
    assert found.overall.cancelled == pytest.approx(1 - (3 + 0 + 2 + 2) / (1 + 2 + 2 + 2 + 2 + 2))
    assert (found.layers[0].layer, found.layers[0].conflict) == (3, 1 / 2)


def test_alike_and_opposed() -> None:
    one, other = outer([1, -3], [2, 5]), outer([-1, 3], [4, 10])
    alike = compare({"a": {Q: one}, "b": {Q: outer([3, -9], [2, 5])}}).overall
    assert (alike.cosines[0][1], alike.conflict, alike.cancelled) == (pytest.approx(1), 0, pytest.approx(0, abs=1e-7))
    opposed = compare({"a": {Q: one}, "b": {Q: other}}).overall
    assert (opposed.cosines[0][1], opposed.conflict, opposed.cancelled) == (pytest.approx(-1), 1, pytest.approx(2 / 3))
    erased = compare({"a": {Q: one}, "b": {Q: outer([-1, 3], [2, 5])}}).overall
    assert (erased.conflict, erased.cancelled) == (1, 1)
    three = compare({"a": {Q: one}, "b": {Q: one}, "c": {Q: other}}).overall
    assert three.conflict == pytest.approx(2 / 3), "two of three pairs"


def test_experts_without_a_common_module_neither_agree_nor_clash() -> None:
    found = compare({"a": {Q: outer([1, 2], [1, 1])}, "b": {UP: outer([1, 2, 3], [1, 1])}})
    assert found.overall.cosines[0][1] == 0
    assert (found.overall.conflict, found.overall.cancelled) == (None, 0)
    assert [relation.layer for relation in found.layers] == [3, 4]
    assert found.layers[0].cosines == ((pytest.approx(1), None), (None, None))
    assert found.layers[0].norms == pytest.approx((10**0.5, 0))


def test_independent_experts_clash_by_chance() -> None:
    """The two numbers that the docstring calls those of chance: 1/2, and 1 - 1 / sqrt(n)."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(shape, generator=generator) for shape in ((32, 200), (150, 32))] for _ in range(9)]
    found = compare({str(number): {Q: Factors(a, b, 1.0)} for number, (a, b) in enumerate(pairs)}).overall
    assert found.conflict == pytest.approx(1 / 2, abs=0.01)
    assert found.cancelled == pytest.approx(1 - 1 / 9**0.5, abs=0.02)


def test_one_expert_that_learned_nothing_and_no_expert_at_all() -> None:
    one = compare({"a": {Q: outer([1, 2], [0, 0])}}).overall
    assert (one.norms, one.cosines, one.conflict, one.cancelled) == ((0,), ((None,),), None, None)
    none = compare({})
    assert (none.experts, none.layers, none.overall.norms, none.overall.cosines) == ((), (), (), ())


def test_the_result_is_json() -> None:
    found = asdict(compare(random_adapters()))
    again: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    assert again["layers"][0]["layer"] == 8
    assert len(again["overall"]["cosines"]) == 4


def test_no_more_entries_are_dense_at_a_time_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    multiply = torch.mm

    def spy(b: torch.Tensor, a: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        sizes.append(out.numel())
        return multiply(b, a, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    monkeypatch.setattr(module, "ENTRIES", 1000)
    compare({name: {Q: Factors(torch.ones(1, 300), torch.ones(500, 1), 1.0)} for name in "ab"})
    assert max(sizes) == 900
    assert sum(sizes) == 2 * 300 * 500


def test_other_bases_and_modules_outside_the_layers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"q_proj is \(2, 2\) or \(2, 3\)"):
        compare({"a": {Q: outer([1, 2], [1, 0])}, "b": {Q: outer([1, 2, 3], [1, 0])}})
    with pytest.raises(ModelError, match=r"inside model\.layers"):
        compare({"a": {"lm_head": outer([1, 2], [1, 0])}})
