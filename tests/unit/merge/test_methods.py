"""Merge methods by hand, the table that lists them, and each of them in a running model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_fixture import COEFFICIENTS, RECIPES, Adapters, moments, weights_of
from peft import PeftModel
from tiny import backbone_of, base_ref, in_lora_layers, plain_model, probe_logits, random_factors
from torch import Tensor

from memmcl import seeds
from memmcl.adapters.format import Factors
from memmcl.errors import ConfigError, GenomeError, ModelError
from memmcl.merge import METHODS, merge_task_vectors, methods, spectral
from memmcl.merge.build import Merger, merged_factors
from memmcl.merge.deltas import Deltas, WrittenOut
from memmcl.merge.export import adapter_files, compressed, merged_adapter, write_merge
from memmcl.merge.genome import Recipe
from memmcl.merge.table import run_method


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_ties_by_hand() -> None:
    vectors = tensor([4.0, -3.0, 1.0, 0.5], [-2.0, -6.0, 5.0, 0.1])
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    # trimmed: [4, -3, 0, 0] and [0, -6, 5, 0]; elected + - + +; averages 4, (-3 - 6 / 2) / 1.5, 5 * .5 / .5
    found = merge_task_vectors("ties", vectors, weights, density=0.5)
    torch.testing.assert_close(found, tensor([4.0, -4.0, 5.0, 0.0])[0])
    counted = merge_task_vectors("ties", vectors, weights, density=0.5, divide_by="count", scale=2.0)
    torch.testing.assert_close(counted, tensor([8.0, -6.0, 5.0, 0.0])[0])
    summed = merge_task_vectors("ties", vectors, weights, density=1.0, divide_by="none")
    torch.testing.assert_close(summed, tensor([4.0, -6.0, 3.5, 0.55])[0])


def test_an_expert_of_weight_zero_votes_only_where_votes_are_unweighted() -> None:
    vectors, weights = tensor([1.0], [-9.0]), torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert float(merge_task_vectors("ties", vectors, weights, density=1.0)) == 1.0
    assert float(merge_task_vectors("ties", vectors, weights, density=1.0, election="unweighted")) == 0.0


def test_breadcrumbs_by_hand() -> None:
    vector = tensor([1.0, -2.0, 3.0, -4.0, 5.0, 6.0, 7.0, 8.0, 9.0, -100.0])
    found = merge_task_vectors("breadcrumbs", vector, torch.ones(1, dtype=torch.float64), density=0.5, gamma=0.1)
    assert found.tolist() == [0, 0, 0, 0, 5, 6, 7, 8, 9, 0]
    found = merge_task_vectors("breadcrumbs", vector, torch.ones(1, dtype=torch.float64), density=0.9, gamma=0.3)
    assert found.tolist() == [1, -2, 3, -4, 5, 6, 7, 8, 9, 0], "the density wins over the outliers"


def test_slerp_by_hand() -> None:
    vectors = tensor([2.0, 0.0], [0.0, 2.0], [0.0, -2.0])
    two = merge_task_vectors("slerp", vectors[:2], torch.tensor([3.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(two, 2 * tensor([0.9238795325112867, 0.3826834323650898])[0])  # 22.5 degrees
    three = merge_task_vectors("slerp", vectors, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(three, 2**0.5 * tensor([1.0, -1.0])[0])
    opposite = merge_task_vectors("slerp", vectors[1:], torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert opposite.tolist() == [0, 0], "no great circle is the shortest: a straight line"


def test_entries_that_are_equally_large_are_kept_together() -> None:
    vector = tensor([1.0, -1.0, 1.0, 0.5])
    assert merge_task_vectors("ties", vector, torch.ones(1, dtype=torch.float64), density=0.25).tolist() == [
        1,
        -1,
        1,
        0,
    ]


def test_della_keeps_large_entries_more_often() -> None:
    vectors = torch.arange(1.0, 101.0).expand(1, 400, 100)
    found = merge_task_vectors("della", vectors, torch.ones(1), density=0.5, epsilon=0.4, rescale="none") != 0
    kept = found.float().mean(0)
    assert abs(float(kept[:10].mean()) - 0.14) < 0.03
    assert abs(float(kept[-10:].mean()) - 0.86) < 0.03


def test_the_table_says_what_the_functions_take() -> None:
    for name, method in METHODS.items():
        function = getattr(methods, name, None) or getattr(spectral, name)
        parameters = inspect.signature(function).parameters
        defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
        if "election" in defaults:
            defaults |= asdict(defaults["election"])
        assert {key: defaults[key] for key in method.defaults} == method.defaults, name
        assert set(defaults) - set(method.defaults) <= {"rank"}, name
        assert ("seeds" in parameters) == method.seeded, name
        assert ("grams" in parameters) == method.grams, name
        assert all(gene.low <= gene.default <= gene.high for gene in method.genes.values()), name


ONE = torch.ones(1, 2, 2)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("tie", {}, r"expected a merge method out of linear, ties, .*; got 'tie'"),
        ("linear", {"density": 0.5}, r"linear takes no parameter; got 'density'"),
        ("ties", {"epsilon": 0.5}, r"ties takes density, scale, election, majority, divide_by; got 'epsilon'"),
        ("ties", {"density": 1.5}, r"ties: density lies in \[0, 1\]; got 1\.5"),
        ("ties", {"density": float("nan")}, r"ties: density lies in \[0, 1\]; got nan"),
        ("ties", {"density": True}, r"ties: density lies in \[0, 1\]; got True"),
        ("ties", {"divide_by": "norm"}, r"ties: divide_by is one of weights, count, none; got 'norm'"),
        ("regmean", {}, r"regmean: needs `grams`"),
        ("ties", {"grams": [ONE[0]]}, r"ties: takes no `grams`"),
    ],
)
def test_parameters_that_a_method_does_not_take(method: str, parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        merge_task_vectors(method, ONE, torch.ones(1), **parameters)


@pytest.mark.parametrize(
    ("vectors", "weights", "said"),
    [
        (ONE, torch.ones(2), r"one weight for each of one or more .* weights \(2,\) for task vectors \(1, 2, 2\)"),
        (ONE[:0], torch.ones(0), r"weights \(0,\) for task vectors \(0, 2, 2\)"),
        (ONE, torch.tensor([float("inf")]), r"expected finite weights, got \[inf\]"),
    ],
)
def test_weights_that_do_not_fit(vectors: Tensor, weights: Tensor, said: str) -> None:
    with pytest.raises(GenomeError, match=said):
        merge_task_vectors("linear", vectors, weights)


def test_slerp_refuses_negative_weights() -> None:
    with pytest.raises(GenomeError, match=r"slerp needs weights of 0 and more, got -0\.5"):
        merge_task_vectors("slerp", torch.ones(2, 2, 2), torch.tensor([1.0, -0.5]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_a_method_in_the_model_is_the_method_on_dense_task_vectors(
    tiny_base: Path, adapters: Adapters, recipe: Recipe, dtype: str
) -> None:
    backbone = backbone_of(tiny_base, 1, dtype)
    pristine, grams = weights_of(backbone), moments(adapters)
    merger = Merger(backbone, adapters, blocks=2, grams=grams)
    merger.apply(COEFFICIENTS)
    merger.apply(COEFFICIENTS, recipe)
    found, method = weights_of(backbone), METHODS[recipe.method]
    for module in adapters["low"]:
        names = [name for name in adapters if module in adapters[name]]
        vectors = torch.stack(
            [adapters[n][module].scale * adapters[n][module].b @ adapters[n][module].a for n in names]
        )
        block = 0 if int(module.split(".")[2]) < 3 else 1
        weights = torch.tensor([COEFFICIENTS[name][block] for name in names])
        masks = {"seeds": [seeds.derive(5, "mask", module, n) for n in names]} if method.seeded else {}
        given = {"grams": [grams[name][module] for name in names]} if method.grams else {}
        merged = run_method(recipe.method, vectors, weights, **recipe.parameters, **masks, **given)
        expected = (pristine[f"{module}.weight"].float() + merged).to(pristine[f"{module}.weight"].dtype)
        # where the sum lies between two bfloat16 numbers, the last bit of float32 decides: half a bit of 1 is 2^-9
        tolerance = 1e-5 if dtype == "float32" else 2**-8
        torch.testing.assert_close(found[f"{module}.weight"], expected, rtol=0, atol=tolerance, msg=module)
    merger.apply(COEFFICIENTS, recipe)
    assert all(torch.equal(found[name], weight) for name, weight in weights_of(backbone).items()), "it drifts"
    merger.reset()
    assert all(torch.equal(pristine[name], weight) for name, weight in weights_of(backbone).items())


# but for iso_cts, which flattens the spectrum of a single expert too
@pytest.mark.parametrize("recipe", [Recipe(), *(r for r in RECIPES if r.method != "iso_cts")], ids=lambda r: r.method)
def test_a_single_expert_at_weight_one_is_the_expert(tiny_base: Path, adapters: Adapters, recipe: Recipe) -> None:
    parameters = {**recipe.parameters, **({"density": 1.0} if "density" in METHODS[recipe.method].genes else {})}
    parameters.pop("scale", None)
    expected = backbone_of(tiny_base, 1)
    Merger(expected, {"high": adapters["high"]}, blocks=1).apply({"high": (1.0,)})
    backbone = backbone_of(tiny_base, 1)
    merger = Merger(backbone, adapters, blocks=1, grams=moments(adapters))
    merger.apply({"high": (1.0,)}, Recipe(recipe.method, parameters))
    torch.testing.assert_close(probe_logits(backbone.model), probe_logits(expected.model), rtol=0, atol=2e-4)


def test_a_pinned_adapter_is_added_as_it_is(tiny_base: Path, adapters: Adapters) -> None:
    recipe = Recipe("ties", {"density": 0.3})
    with_start, alone = backbone_of(tiny_base, 1), backbone_of(tiny_base, 1)
    start = random_factors(tiny_base, layers=(1, 2, 3), seed=8)
    given = {**dict.fromkeys(adapters, (0.8,)), "start": (1.0,)}
    Merger(with_start, {**adapters, "start": start}, blocks=1, pinned=["start"]).apply(given, recipe)
    Merger(alone, adapters, blocks=1).apply(dict.fromkeys(adapters, (0.8,)), recipe)
    for module, pair in start.items():
        expected = alone.model.get_submodule(module).weight + pair.scale * pair.b @ pair.a
        torch.testing.assert_close(with_start.model.get_submodule(module).weight, expected, rtol=0, atol=1e-5)


def test_regmean_without_moments_is_refused(tiny_base: Path, adapters: Adapters) -> None:
    with pytest.raises(ConfigError, match="regmean needs the second moments of the experts' inputs"):
        Merger(backbone_of(tiny_base, 1), adapters, blocks=2).apply(COEFFICIENTS, Recipe("regmean"))


def test_task_vectors_are_written_out_when_they_are_read(adapters: Adapters) -> None:
    pair = adapters["low"]["model.layers.1.mlp.up_proj"]
    vectors = WrittenOut([pair, pair])
    assert len(vectors) == 2
    torch.testing.assert_close(vectors[1], pair.scale * pair.b @ pair.a)
    first = vectors[0]
    assert vectors[0] is not first, "they are kept"


def test_three_ways_to_the_same_model(tiny_base: Path, tmp_path: Path, adapters: Adapters) -> None:
    rebuilt = backbone_of(tiny_base, 1)
    Merger(rebuilt, adapters, blocks=2).apply(COEFFICIENTS)
    factors = merged_factors(adapters, COEFFICIENTS, lowest=1, layers=4)
    for name, data in adapter_files(factors, base_name="org/tiny").items():
        (tmp_path / name).write_bytes(data)
    exported = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).eval()
    backbone = backbone_of(tiny_base, 1)
    before = weights_of(backbone)
    with in_lora_layers(backbone, factors):
        in_space = probe_logits(backbone.model)
    logits = probe_logits(rebuilt.model)
    assert (logits - probe_logits(plain_model(tiny_base))).abs().max() > 1
    torch.testing.assert_close(in_space, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    torch.testing.assert_close(probe_logits(exported), logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(backbone).items())


def test_three_ways_in_bfloat16(tiny_base: Path, tmp_path: Path, adapters: Adapters) -> None:
    rebuilt, backbone = (backbone_of(tiny_base, 1, "bfloat16") for _ in range(2))
    Merger(rebuilt, adapters, blocks=2).apply(COEFFICIENTS)
    factors = merged_factors(adapters, COEFFICIENTS, lowest=1, layers=4)
    write_merge(tmp_path / "full", base_ref(tiny_base), {"one": factors}, {"one": (1.0,)}, dtype="bfloat16", split=1)
    exported = backbone_of(tmp_path / "full", 1, "bfloat16")
    assert torch.equal(probe_logits(exported.model), probe_logits(rebuilt.model)), "files and memory are cast alike"
    with in_lora_layers(backbone, factors):
        in_space = probe_logits(backbone.model)
    logits, scale = probe_logits(rebuilt.model), float(probe_logits(rebuilt.model).std())
    assert float((in_space - logits).abs().mean()) < 0.05 * scale  # measured .02: eight bits of weights and of sums


@pytest.mark.parametrize("method", ["tsv", "iso_cts"])
def test_merges_of_the_small_basis_have_an_exact_adapter(
    tiny_base: Path, tmp_path: Path, adapters: Adapters, method: str
) -> None:
    merged = merged_adapter(adapters, COEFFICIENTS, Recipe(method), lowest=1, layers=4)
    assert merged.errors == {}
    for name, data in adapter_files(merged.factors, base_name="org/tiny").items():
        (tmp_path / name).write_bytes(data)
    model = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).eval()
    backbone = backbone_of(tiny_base, 1)
    Merger(backbone, adapters, blocks=2).apply(COEFFICIENTS, Recipe(method))
    torch.testing.assert_close(probe_logits(model), probe_logits(backbone.model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe("tsv"), Recipe("ties", {"density": 0.3})], ids=lambda r: r.method)
def test_a_compressed_adapter_is_the_nearest_of_its_rank(adapters: Adapters, recipe: Recipe) -> None:
    rank = 2
    merged = merged_adapter(adapters, COEFFICIENTS, recipe, lowest=1, layers=4, rank=rank)
    deltas = Deltas(adapters, lowest=1, layers=4)
    assert merged.errors.keys() == merged.factors.keys() == adapters["low"].keys()
    for module, pair in merged.factors.items():
        factors, dense = deltas.delta(module, COEFFICIENTS, recipe)
        whole = torch.zeros(len(pair.b), pair.a.shape[1]).double()
        whole += dense.double() if dense is not None else 0
        whole += factors.b.double() @ factors.a.double() if factors is not None else 0
        values = torch.linalg.svdvals(whole)
        error = (whole - pair.scale * pair.b.double() @ pair.a.double()).norm()
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-4, atol=1e-5)
        assert len(pair.a) <= rank
        assert merged.errors[module] == pytest.approx(float(error / values.norm()), abs=1e-5)


def test_compressing_to_more_than_there_is_changes_nothing() -> None:
    pair = Factors(torch.ones(2, 4), torch.ones(3, 2), 0.5)
    kept, error = compressed(pair, 2)
    assert error == 0
    torch.testing.assert_close(kept.b @ kept.a, 0.5 * pair.b @ pair.a)
    nothing, error = compressed(Factors(torch.zeros(4, 4), torch.zeros(3, 4), 1.0), 2)
    assert error == 0
    assert not bool((nothing.b @ nothing.a).any())


def test_a_merge_of_full_rank_needs_a_rank(adapters: Adapters) -> None:
    with pytest.raises(ModelError, match="a merge by ties is not of low rank: give a rank to compress it to"):
        merged_adapter(adapters, COEFFICIENTS, Recipe("ties"), lowest=1, layers=4)


def test_nothing_merged_is_still_an_adapter(tiny_base: Path, tmp_path: Path, adapters: Adapters) -> None:
    merged = merged_adapter(adapters, dict.fromkeys(adapters, (0.0,)), Recipe("tsv"), lowest=1, layers=4)
    for name, data in adapter_files(merged.factors, base_name="org/tiny").items():
        (tmp_path / name).write_bytes(data)
    model = PeftModel.from_pretrained(plain_model(tiny_base), tmp_path).eval()
    torch.testing.assert_close(probe_logits(model), probe_logits(plain_model(tiny_base)), rtol=0, atol=1e-5)


def test_any_merge_can_be_written_in_full(tiny_base: Path, tmp_path: Path, adapters: Adapters) -> None:
    recipe = Recipe("dare_ties", {"density": 0.5}, seed=3)
    write_merge(tmp_path / "full", base_ref(tiny_base), adapters, COEFFICIENTS, recipe, dtype="float32", split=1)
    backbone = backbone_of(tiny_base, 1)
    Merger(backbone, adapters, blocks=2).apply(COEFFICIENTS, recipe)
    written: Mapping[str, Tensor] = plain_model(tmp_path / "full").state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in weights_of(backbone).items())


def test_coefficients_as_tensors_are_coefficients(adapters: Adapters) -> None:
    deltas = Deltas(adapters, lowest=1, layers=4)
    values = {"low": (0.5, 0.0), "high": (0.25, 1.5)}
    for module, parts in deltas.modules.items():
        pair = next(iter(parts.values()))
        sums = [torch.ones(len(pair.b), pair.a.shape[1]) for _ in range(2)]
        deltas.add_to(sums[0], module, values, Recipe())
        deltas.add_to(sums[1], module, {name: tuple(torch.tensor(row)) for name, row in values.items()}, Recipe())
        torch.testing.assert_close(*sums)
        assert not bool((sums[0] == 1).all()) or not {"low", "high"} & set(parts)


def test_factors_that_are_no_numbers_are_seen(adapters: Adapters) -> None:
    assert Deltas(adapters, lowest=1, layers=4).finite()
    broken = {
        module: Factors(pair.a, torch.full_like(pair.b, torch.inf), 1.0) for module, pair in adapters["low"].items()
    }
    assert not Deltas({**adapters, "low": broken}, lowest=1, layers=4).finite()
