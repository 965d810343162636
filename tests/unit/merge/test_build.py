"""Merging, against task vectors written out in full in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from merge_fixture import weights_of
from tiny import backbone_of, make_tiny_base, plain_model

from memmcl.adapters.format import Adapter, Factors
from memmcl.errors import GenomeError, ModelError
from memmcl.merge.build import Merger, lowest_layer, merged_factors
from memmcl.merge.deltas import layer_of
from memmcl.merge.genome import GenomeSpace, block_of, compose


def dense(
    directory: Path, adapters: Mapping[str, Adapter], coefficients: Mapping[str, tuple[float, ...]], *, split: int
) -> dict[str, torch.Tensor]:
    """W0 + sum of lambda s B A in float64, with the block of each layer told by hand."""
    blocks = len(next(iter(coefficients.values())))
    merged = {name: weight.double() for name, weight in plain_model(directory).state_dict().items()}
    for expert, adapter in adapters.items():
        for module, pair in adapter.items():
            layer = int(module.split(".")[2])
            block = {1: 0, 2: 0 if layer < split + (5 - split) // 2 else 1}.get(blocks, layer - split)
            vector = pair.scale * pair.b.double() @ pair.a.double()
            merged[f"{module}.weight"] = (
                merged[f"{module}.weight"] + coefficients.get(expert, (0.0,) * blocks)[block] * vector
            )
    return merged


def assert_weights(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize(
    "coefficients",
    [
        {"low": (1.0,), "high": (0.0,), "top": (0.0,)},
        {"low": (0.7,), "high": (1.3,), "top": (0.31,)},
        {"low": (0.5,), "top": (1.5,)},
        {"low": (0.7, 0.2), "high": (0.0, 0.9), "top": (1.1, 0.4)},
        {"low": (-0.7, 0.2), "high": (0.3, 0.0), "top": (1.1, 0.0)},
    ],
)
def test_a_merge_is_the_sum_of_task_vectors(
    tiny_base: Path, adapters: dict[str, dict[str, Factors]], split: int, coefficients: dict[str, tuple[float, ...]]
) -> None:
    backbone = backbone_of(tiny_base, split)
    merger = Merger(backbone, adapters, blocks=len(coefficients["low"]))
    merger.apply(coefficients)
    expected = dense(tiny_base, adapters, coefficients, split=split)
    assert_weights(weights_of(backbone), expected, 1e-5)
    changed = {
        name
        for name, weight in plain_model(tiny_base).state_dict().items()
        if not torch.equal(weight, weights_of(backbone)[name])
    }
    assert changed == {f"{m}.weight" for m in adapters["low"]}, "something else than the adapted modules changed"


def test_a_block_per_layer(tiny_base: Path, adapters: dict[str, dict[str, Factors]]) -> None:
    coefficients = {"low": (0.2, 0.4, 0.6), "high": (9.0, 0.5, 0.0), "top": (9.0, 9.0, 1.0)}
    backbone = backbone_of(tiny_base, 1)
    Merger(backbone, adapters, blocks=3).apply(coefficients)
    assert_weights(weights_of(backbone), dense(tiny_base, adapters, coefficients, split=1), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_is_the_base_bit_for_bit(tiny_base: Path, adapters: dict[str, dict[str, Factors]], dtype: str) -> None:
    backbone = backbone_of(tiny_base, 1, dtype)
    base = weights_of(backbone)
    merger = Merger(backbone, adapters, blocks=1)
    for back in (lambda: merger.apply(dict.fromkeys(adapters, (0.0,))), merger.reset, lambda: merger.apply({})):
        merger.apply(dict.fromkeys(adapters, (0.9,)))
        assert not torch.equal(
            weights_of(backbone)["model.layers.3.self_attn.q_proj.weight"],
            base["model.layers.3.self_attn.q_proj.weight"],
        )
        back()
        found = weights_of(backbone)
        assert all(torch.equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_does_not_depend_on_those_before_it(
    tiny_base: Path, adapters: dict[str, dict[str, Factors]], dtype: str
) -> None:
    one = {"low": (0.3, 0.8), "high": (1.1, 0.2), "top": (0.4, 0.9)}
    two = {"low": (1.5, 0.0), "top": (0.0, 0.7)}
    backbone = backbone_of(tiny_base, 1, dtype)
    merger = Merger(backbone, adapters, blocks=2)
    merger.apply(one)
    first = weights_of(backbone)
    for _ in range(3):
        merger.apply(two)
        merger.apply(one)
    again = weights_of(backbone)
    assert all(torch.equal(first[name], again[name]) for name in first)
    fresh = backbone_of(tiny_base, 1, dtype)
    Merger(fresh, adapters, blocks=2).apply(one)
    assert all(torch.equal(first[name], weight) for name, weight in weights_of(fresh).items())


def test_bfloat16_is_summed_in_float32_and_cast_once(tiny_base: Path, adapters: dict[str, dict[str, Factors]]) -> None:
    coefficients = {"low": (0.7,), "high": (1.3,), "top": (0.31,)}
    backbone = backbone_of(tiny_base, 1, "bfloat16")
    pristine = weights_of(backbone)
    Merger(backbone, adapters, blocks=1).apply(coefficients)
    found = weights_of(backbone)
    base, target = (plain_model(tiny_base).state_dict(), dense(tiny_base, adapters, coefficients, split=1))
    for name in found:
        expected = (pristine[name].double() + target[name] - base[name].double()).bfloat16()
        differs = (found[name] != expected).double().mean()
        assert differs < 1e-3, f"{name}: {float(differs):.4f} of the weights are not the nearest bfloat16"


def test_merging_keeps_parameters_frozen_and_the_factors_as_they_were(
    tiny_base: Path, adapters: dict[str, dict[str, Factors]]
) -> None:
    backbone = backbone_of(tiny_base, 1)
    before = {name: (pair.a.clone(), pair.b.clone()) for name, pair in adapters["low"].items()}
    parameters = dict(backbone.model.named_parameters())
    Merger(backbone, adapters, blocks=1).apply(dict.fromkeys(adapters, (0.9,)))
    assert all(parameter is parameters[name] for name, parameter in backbone.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in parameters.values())
    for name, (a, b) in before.items():
        assert torch.equal(adapters["low"][name].a, a)
        assert torch.equal(adapters["low"][name].b, b)


def test_an_expert_of_another_base_is_refused(tiny_base: Path, adapters: dict[str, dict[str, Factors]]) -> None:
    module = "model.layers.2.mlp.up_proj"
    pair = adapters["low"][module]
    narrow = {**adapters["low"], module: Factors(pair.a[:, :32], pair.b, pair.scale)}
    with pytest.raises(
        ModelError, match=r"expert odd was trained on another base: \S+\.up_proj is \(128, 64\) here, \(128, 32\) there"
    ):
        Merger(backbone_of(tiny_base, 1), {"odd": narrow}, blocks=1)


def test_a_module_that_the_base_has_not_is_refused(tiny_base: Path, adapters: dict[str, dict[str, Factors]]) -> None:
    pair = adapters["low"]["model.layers.2.mlp.up_proj"]
    for module, said in (
        ("model.layers.9.mlp.up_proj", r"changes model\.layers\.9\.mlp\.up_proj, which the base model has not"),
        ("model.layers.2.mlp.c_fc", r"changes model\.layers\.2\.mlp\.c_fc, which the base model has not"),
        ("lm_head", r"expected an adapted module inside model\.layers; got lm_head"),
    ):
        with pytest.raises(ModelError, match=said):
            Merger(backbone_of(tiny_base, 1), {"odd": {module: pair}}, blocks=1)


def test_a_module_below_the_split_is_refused(tiny_base: Path, adapters: dict[str, dict[str, Factors]]) -> None:
    with pytest.raises(ModelError, match=r"changes model\.layers\.1\.\S+, below the split at layer 2"):
        Merger(backbone_of(tiny_base, 2), adapters, blocks=1)


def test_a_deeper_base_takes_experts_of_its_own_layers_only(
    tmp_path: Path, adapters: dict[str, dict[str, Factors]]
) -> None:
    shallow = make_tiny_base(tmp_path / "shallow", layers=3)
    with pytest.raises(ModelError, match=r"model\.layers\.3\.\S+, which the base model has not"):
        Merger(backbone_of(shallow, 1), adapters, blocks=1)


@pytest.mark.parametrize(
    ("coefficients", "said"),
    [
        ({"low": (1.0, 1.0), "nobody": (1.0, 1.0)}, r"other experts \['nobody'\]"),
        ({"low": (1.0,)}, r"have not 2 blocks \['low'\]"),
        ({"low": (1.0, 1.0), "high": (1.0, 1.0, 1.0)}, r"have not 2 blocks \['high'\]"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(
    tiny_base: Path, adapters: dict[str, dict[str, Factors]], coefficients: dict[str, tuple[float, ...]], said: str
) -> None:
    backbone = backbone_of(tiny_base, 1)
    before = weights_of(backbone)
    with pytest.raises(GenomeError, match=said):
        Merger(backbone, adapters, blocks=2).apply(coefficients)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(backbone).items())


def test_merged_factors_are_the_merge(tiny_base: Path, adapters: dict[str, dict[str, Factors]]) -> None:
    coefficients = {"low": (0.7, 0.2), "high": (0.0, 0.9), "top": (1.1, 0.4)}
    merged = merged_factors(adapters, coefficients, lowest=1, layers=4)
    assert list(merged) == sorted(adapters["low"])
    assert {pair.scale for pair in merged.values()} == {1.0}
    assert len(merged["model.layers.3.self_attn.q_proj"].a) == 3 + 2 + 5
    assert len(merged["model.layers.1.self_attn.q_proj"].a) == 3
    one, two = backbone_of(tiny_base, 1), backbone_of(tiny_base, 1)
    Merger(one, adapters, blocks=2).apply(coefficients)
    Merger(two, {"unified": merged}, blocks=1).apply({"unified": (1.0,)})
    assert_weights(weights_of(one), weights_of(two), 1e-5)


def test_layers(adapters: dict[str, dict[str, Factors]]) -> None:
    assert layer_of("model.layers.17.self_attn.q_proj") == 17
    assert lowest_layer(list(adapters.values())) == 1
    assert lowest_layer([adapters["high"], adapters["top"]]) == 2
    with pytest.raises(ModelError, match=r"expected an adapted module inside model\.layers; got model\.norm"):
        layer_of("model.norm")


def test_blocks_are_even_runs() -> None:
    assert [block_of(layer, 20, 30, 1) for layer in range(20, 30)] == [0] * 10
    assert [block_of(layer, 20, 30, 5) for layer in range(20, 30)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [block_of(layer, 20, 30, 3) for layer in range(20, 30)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [block_of(layer, 0, 4, 4) for layer in range(4)] == [0, 1, 2, 3]


SPACE = GenomeSpace(("b", "a"), 2, 0.0, 1.5)


def test_a_genome_space() -> None:
    assert SPACE.size == 4
    assert SPACE.genes == ("b/0", "b/1", "a/0", "a/1")
    assert SPACE.decode((0.0, 0.5, 1.0, 1.5)) == {"b": (0.0, 0.5), "a": (1.0, 1.5)}
    assert SPACE.encode({"a": (1.0, 1.5), "b": (0.0, 0.5)}) == (0.0, 0.5, 1.0, 1.5)


def test_a_genome_of_the_wrong_length() -> None:
    with pytest.raises(
        GenomeError, match="genome has 3 genes; 2 parts x 2 blocks needs 4; does it belong to other experts"
    ):
        SPACE.decode((0.1, 0.2, 0.3))


@pytest.mark.parametrize("gene", [-0.001, 1.501, float("nan"), float("inf")])
def test_a_gene_out_of_bounds(gene: float) -> None:
    with pytest.raises(GenomeError, match=rf"genes must lie in \[0\.0, 1\.5\]; got {gene}"):
        SPACE.decode((0.1, 0.2, gene, 0.3))
    with pytest.raises(GenomeError, match="genes must lie in"):
        SPACE.encode({"b": (0.1, 0.2), "a": (gene, 0.3)})


def test_coefficients_of_other_parts_or_blocks_have_no_genome() -> None:
    with pytest.raises(GenomeError, match=r"expected coefficients of \['b', 'a'\], got \['a', 'c'\]"):
        SPACE.encode({"a": (0.1, 0.2), "c": (0.1, 0.2)})
    for wrong in ({"b": (0.1, 0.2), "a": (0.1,)}, {"b": (0.1, 0.2, 0.3), "a": (0.1,)}):
        with pytest.raises(GenomeError, match=r"expected 2 blocks for each part; (a has 1|b has 3)"):
            SPACE.encode(wrong)


def test_compose_adds_what_several_group_models_hold() -> None:
    models = {"SC": {"asc": (0.5, 1.0), "sent2": (1.0, 1.0)}, "ABSA": {"asc": (0.25, 0.5), "aste": (2.0, 3.0)}}
    assert compose({"SC": (1.0, 2.0), "ABSA": (4.0, 0.0)}, models) == {
        "asc": (1.5, 2.0),
        "sent2": (1.0, 2.0),
        "aste": (8.0, 0.0),
    }


def test_group_models_that_do_not_fit_are_refused() -> None:
    models = {"SC": {"asc": (0.5, 1.0)}, "ABSA": {"aste": (2.0, 3.0)}}
    with pytest.raises(GenomeError, match=r"expected coefficients of the group models \['ABSA', 'SC'\], got \['SC'\]"):
        compose({"SC": (1.0, 1.0)}, models)
    with pytest.raises(GenomeError, match="group model SC has 2 blocks, stage 2 has 1"):
        compose({"SC": (1.0,), "ABSA": (1.0, 1.0)}, models)
    with pytest.raises(GenomeError, match="group model ABSA has 1 blocks, stage 2 has 2"):
        compose({"SC": (1.0, 1.0), "ABSA": (1.0, 1.0)}, {"SC": {"asc": (0.5, 1.0)}, "ABSA": {"asc": (2.0,)}})
