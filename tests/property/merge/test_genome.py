"""Genomes and their composition, over all parts, blocks and coefficients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from memmcl.errors import GenomeError
from memmcl.merge.genome import GenomeSpace, block_of, compose

LOW, HIGH = -0.5, 1.5
genes = st.floats(LOW, HIGH)
names = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=5, unique=True)


@st.composite
def genomes(draw: st.DrawFn) -> tuple[GenomeSpace, tuple[float, ...]]:
    space = GenomeSpace(tuple(draw(names)), draw(st.integers(1, 4)), LOW, HIGH)
    return space, tuple(draw(st.lists(genes, min_size=space.size, max_size=space.size)))


@given(genomes())
def test_encode_is_the_inverse_of_decode(case: tuple[GenomeSpace, tuple[float, ...]]) -> None:
    space, genome = case
    coefficients = space.decode(genome)
    assert tuple(coefficients) == space.parts
    assert space.encode(coefficients) == genome
    assert space.encode(dict(reversed(coefficients.items()))) == genome, "the order of the mapping matters"
    for name, gene in zip(space.genes, genome, strict=True):
        part, block = name.split("/")
        assert coefficients[part][int(block)] == gene


@given(genomes(), st.data())
def test_coefficients_with_other_blocks_have_no_genome(
    case: tuple[GenomeSpace, tuple[float, ...]], data: st.DataObject
) -> None:
    space, genome = case
    coefficients = space.decode(genome)
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=len(space.parts), max_size=len(space.parts)))
    assume(any(size != space.blocks for size in sizes))
    wrong = {part: (0.5,) * size for part, size in zip(coefficients, sizes, strict=True)}
    with pytest.raises(GenomeError, match=f"expected {space.blocks} blocks for each part"):
        space.encode(wrong)


@st.composite
def stages(draw: st.DrawFn) -> tuple[dict[str, tuple[float, ...]], dict[str, dict[str, tuple[float, ...]]]]:
    """Coefficients of group models, and group models; an expert may be in several."""
    blocks = draw(st.integers(1, 3))
    row = st.lists(genes, min_size=blocks, max_size=blocks).map(tuple)
    models = draw(
        st.dictionaries(
            st.sampled_from(["SC", "ABSA", "MAST"]), st.dictionaries(st.sampled_from("vwxyz"), row), min_size=1
        )
    )
    return {model: draw(row) for model in models}, models


@given(stages(), st.integers(0, 2**31))
def test_composing_equals_merging_the_dense_group_models(
    case: tuple[dict[str, tuple[float, ...]], dict[str, dict[str, tuple[float, ...]]]], seed: int
) -> None:
    """Stage 2 on the group models' dense task vectors and one merge of the experts are the same."""
    outer, models = case
    blocks, layers, lowest = len(next(iter(outer.values()))), 7, 2
    rng = np.random.default_rng(seed)
    vectors = {e: {layer: rng.standard_normal((3, 2)) for layer in range(lowest, layers)} for e in "vwxyz"}
    composed = compose(outer, models)
    assert set(composed) == {expert for inner in models.values() for expert in inner}
    for layer in range(lowest, layers):
        block = block_of(layer, lowest, layers, blocks)
        group_vectors = {
            model: sum((values[block] * vectors[expert][layer] for expert, values in inner.items()), np.zeros((3, 2)))
            for model, inner in models.items()
        }
        two_stages = sum((outer[model][block] * group_vectors[model] for model in models), np.zeros((3, 2)))
        one_stage = sum(
            (values[block] * vectors[expert][layer] for expert, values in composed.items()), np.zeros((3, 2))
        )
        np.testing.assert_allclose(one_stage, two_stages, rtol=0, atol=1e-9)


@given(st.integers(0, 20), st.integers(1, 40), st.integers(1, 40))
def test_blocks_are_even_runs_in_order(lowest: int, adapted: int, blocks: int) -> None:
    found = [block_of(layer, lowest, lowest + adapted, blocks) for layer in range(lowest, lowest + adapted)]
    assert found == sorted(found)
    assert found[0] == 0
    assert max(found) < blocks
    if blocks <= adapted:
        sizes = np.bincount(found, minlength=blocks)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.min() >= 1
