"""Seed genomes of a linear merge."""

from __future__ import annotations

import pytest

from memmcl.errors import GenomeError
from memmcl.evolve import seed_genomes


def test_two_experts_one_block() -> None:
    assert seed_genomes(["sent2", "asc"], 1, (0.0, 1.5), grid=(0.3, 1.0)) == [
        ("base", (0.0, 0.0)),
        ("expert:sent2", (1.0, 0.0)),
        ("expert:asc", (0.0, 1.0)),
        ("uniform", (0.5, 0.5)),
        ("arithmetic:0.3", (0.3, 0.3)),
        ("arithmetic:1", (1.0, 1.0)),
    ]


def test_genes_run_expert_by_expert() -> None:
    seeds = dict(seed_genomes(["a", "b"], 3, (0.0, 1.5)))
    assert seeds["expert:a"] == (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    assert seeds["uniform"] == (0.5,) * 6


def test_equal_genomes_keep_their_first_name() -> None:
    names = [name for name, _ in seed_genomes(["a", "b"], 1, (0.0, 1.5), grid=(0.0, 0.5, 0.7, 0.7))]
    assert names == ["base", "expert:a", "expert:b", "uniform", "arithmetic:0.7"]
    single = [name for name, _ in seed_genomes(["a"], 1, (0.0, 1.5), grid=(1.0,))]
    assert single == ["base", "expert:a"]


def test_the_uniform_average_of_three_is_rounded() -> None:
    assert dict(seed_genomes(["a", "b", "c"], 1, (0.0, 1.5)))["uniform"] == (0.333333,) * 3


def test_what_leaves_the_bounds_is_left_out() -> None:
    names = [name for name, _ in seed_genomes(["a", "b"], 1, (0.1, 0.8), grid=(0.05, 0.3, 0.9))]
    assert names == ["uniform", "arithmetic:0.3"]
    by_gene = [name for name, _ in seed_genomes(["a", "b"], 1, [(0.0, 0.4), (0.0, 1.5)], grid=(0.3,))]
    assert by_gene == ["base", "expert:b", "arithmetic:0.3"]


@pytest.mark.parametrize(("experts", "blocks"), [([], 1), (["a", "a"], 1), (["a"], 0)])
def test_bad_shapes_are_refused(experts: list[str], blocks: int) -> None:
    with pytest.raises(GenomeError):
        seed_genomes(experts, blocks, (0.0, 1.5))
