"""Spectral merge methods, RegMean and the Core Space, against their definitions in NumPy and examples by hand."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from memmcl.adapters.format import Factors
from memmcl.errors import ConfigError, GenomeError, ModelError
from memmcl.merge.spectral import core_space, iso_cts, regmean, tsv

Matrix = NDArray[np.float64]
Merge = Callable[..., torch.Tensor]


def low_rank(shape: tuple[int, int], rank: int, seed: int) -> torch.Tensor:
    """A random task vector of an exact rank, float32."""
    draw = np.random.default_rng(seed)
    b, a = draw.normal(size=(shape[0], rank)), draw.normal(size=(rank, shape[1]))
    return torch.from_numpy(b @ np.diag(0.8 ** np.arange(rank)) @ a).float()


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(torch.tensor(values))


def dimension(stack: Matrix) -> int:
    values = np.linalg.svd(stack, compute_uv=False)
    return int((values > 1e-5 * values[0]).sum())


def dimension_of(matrices: Sequence[Matrix]) -> int:
    return min(dimension(np.hstack(matrices)), dimension(np.vstack(matrices)))


def polar(vectors: Matrix) -> Matrix:
    """U (U^T U)^-1/2, on the range of U^T U: the nearest orthogonal matrix without an SVD of U."""
    values, basis = np.linalg.eigh(vectors.T @ vectors)
    inverse = np.where(values > 1e-8 * values[-1], 1 / np.sqrt(np.maximum(values, 1e-300)), 0.0)
    return np.asarray(vectors @ (basis * inverse) @ basis.T)


def components(matrix: Matrix, count: int, floor: float) -> tuple[Matrix, Matrix, Matrix]:
    left, values, right = np.linalg.svd(matrix)
    count = min(count, int((values > floor).sum()))
    return left[:, :count], values[:count], right[:count]


def joined(parts: Sequence[tuple[Matrix, Matrix, Matrix]], isotropic: bool) -> Matrix:
    left, values, right = (np.concatenate(list(item), axis) for item, axis in zip(zip(*parts), (1, 0, 0), strict=True))  # noqa: B905
    strength = np.full_like(values, values.mean()) if isotropic else values
    return np.asarray(polar(left) @ np.diag(strength) @ polar(right.T).T)


def tsv_oracle(task_vectors: Sequence[torch.Tensor], weights: Sequence[float], rank: int | None = None) -> Matrix:
    matrices = [w * t.double().numpy() for t, w in zip(task_vectors, weights, strict=True) if w]
    each = max(1, (rank or dimension_of(matrices)) // len(matrices))
    return joined([components(m, each, 1e-5 * np.linalg.norm(m, 2)) for m in matrices], isotropic=False)


def iso_oracle(
    task_vectors: Sequence[torch.Tensor], weights: Sequence[float], common: float = 0.8, rank: int | None = None
) -> Matrix:
    matrices = [w * t.double().numpy() for t, w in zip(task_vectors, weights, strict=True) if w]
    budget = rank or dimension_of(matrices)
    shared = round(common * budget)
    own = (budget - shared) // len(matrices)
    largest = max(np.linalg.norm(m, 2) for m in matrices)
    sums = components(np.asarray(sum(matrices)), shared, 1e-5 * largest)
    outside = np.eye(len(matrices[0])) - sums[0] @ sums[0].T
    rest = [components(outside @ m, own, 1e-5 * np.linalg.norm(m, 2)) for m in matrices]
    return joined([sums, *rest], isotropic=True)


def assert_near(found: torch.Tensor, expected: Matrix | torch.Tensor, tolerance: float = 1e-4) -> None:
    """Within a tolerance relative to the norm of what is expected."""
    wanted = torch.as_tensor(expected).double()
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert float(wanted.norm()) > 0
    assert float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm())


STACKS = {
    "low ranks": ((20, 30), (3, 2, 4), (0.7, 1.2, 0.4)),
    "a negative weight": ((20, 30), (3, 3, 3), (0.7, -1.2, 0.4)),
    "full rank": ((9, 6), (6, 6), (1.0, 0.5)),
    "ranks beyond the width": ((16, 24), (8, 8, 8, 8), (1.0, 0.5, 0.8, 0.3)),
    "ranks beyond the height": ((24, 16), (8, 8, 8), (1.0, 0.5, 0.8)),
    "fewer components than its share": ((20, 30), (1, 7), (1.0, 1.0)),
    "one expert": ((8, 12), (4,), (0.9,)),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("rank", [None, 5, 12])
def test_tsv_is_its_definition(name: str, rank: int | None) -> None:
    shape, ranks, weights = STACKS[name]
    vectors = [low_rank(shape, r, seed) for seed, r in enumerate(ranks)]
    assert_near(tsv(vectors, torch.tensor(weights), rank=rank), tsv_oracle(vectors, weights, rank), 1e-5)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("rank", [None, 5, 12])
@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_its_definition(name: str, rank: int | None, common: float) -> None:
    shape, ranks, weights = STACKS[name]
    vectors = [low_rank(shape, r, seed) for seed, r in enumerate(ranks)]
    found = iso_cts(vectors, torch.tensor(weights), common=common, rank=rank)
    assert_near(found, iso_oracle(vectors, weights, common, rank), 1e-5)


def test_tsv_by_hand() -> None:
    """Two dimensions for two experts: one component each, e1 of strength 3 and e2 of strength 2."""
    vectors = [diagonal(3, 0), diagonal(1, 2)]
    assert_near(tsv(vectors, torch.ones(2)), diagonal(3, 2), 1e-6)
    assert_near(tsv(vectors, torch.tensor([1.0, -0.5])), diagonal(3, -1), 1e-6)


def test_tsv_turns_directions_apart_evenly() -> None:
    """Directions at 0 and 45 degrees are orthogonal once both give way by 22.5."""

    def along(degrees: float) -> torch.Tensor:
        direction = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
        return torch.outer(direction, direction)

    found = tsv([3 * along(0), 2 * along(45)], torch.ones(2))
    assert_near(found, 3 * along(-22.5) + 2 * along(67.5), 1e-6)


def test_iso_cts_by_hand() -> None:
    """Four dimensions, half of them common: e1 (6) and e2 (3) of the sum, then e3 (1) and e4 (0.5) of the experts."""
    vectors = [diagonal(4, 0, 1, 0), diagonal(2, 3, 0, 0.5)]
    assert_near(iso_cts(vectors, torch.ones(2), common=0.5), 2.625 * torch.eye(4), 1e-6)


def test_iso_cts_leaves_over_what_the_division_does() -> None:
    """round(0.8 * 4) = 3 are common, and one is too few for two experts: e4 gets nothing."""
    vectors = [diagonal(4, 0, 1, 0), diagonal(2, 3, 0, 0.5)]
    assert_near(iso_cts(vectors, torch.ones(2)), diagonal(10 / 3, 10 / 3, 10 / 3, 0), 1e-6)


def test_iso_cts_projects_the_left_side_only() -> None:
    """The common part is e1 e2^T (5); beside it are e2 e2^T (1), which shares the right vector, and e3 e1^T (2)."""
    first, second, expected = torch.zeros(3, 3, 3)
    first[0, 1], first[1, 1] = 5, 1
    second[2, 0], second[1, 1] = 2, -1
    expected[0, 1] = expected[1, 1] = 8 / 3 / math.sqrt(2)
    expected[2, 0] = 8 / 3
    assert_near(iso_cts([first, second], torch.ones(2), common=1 / 3, rank=3), expected, 1e-6)


@pytest.mark.parametrize("merge", [tsv, iso_cts])
def test_null_directions_are_not_counted(merge: Merge) -> None:
    """Zero rows and columns around the task vectors change nothing but the shape."""
    vectors = [low_rank((6, 7), 2, seed) for seed in range(3)]
    wide = [torch.nn.functional.pad(vector, (0, 20, 0, 30)) for vector in vectors]
    weights = torch.tensor([0.5, 1.0, 0.8])
    assert_near(merge(wide, weights), torch.nn.functional.pad(merge(vectors, weights), (0, 20, 0, 30)), 1e-6)


def test_a_weak_component_counts_in_the_dimension() -> None:
    vectors = [diagonal(1, 1e-3, 0, 0), diagonal(0, 0, 1, 1e-3)]
    torch.testing.assert_close(tsv(vectors, torch.ones(2)), diagonal(1, 1e-3, 1, 1e-3), rtol=0, atol=1e-6)


def test_a_weak_expert_counts_in_the_dimension() -> None:
    vectors = [diagonal(2, 1, 0, 0), diagonal(0, 0, 2, 1)]
    found = tsv(vectors, torch.tensor([1.0, 1e-6]))
    torch.testing.assert_close(found, diagonal(2, 1, 2e-6, 1e-6), rtol=1e-4, atol=1e-12)


def test_one_expert_comes_back_from_tsv() -> None:
    vector = low_rank((12, 9), 5, seed=4)
    assert_near(tsv(vector[None], torch.tensor([-0.7])), -0.7 * vector, 1e-5)


def test_one_expert_becomes_even_by_iso_cts() -> None:
    vector = low_rank((12, 9), 5, seed=4)
    left, values, right = torch.linalg.svd(vector.double(), full_matrices=False)
    assert_near(iso_cts([vector], torch.ones(1)), values[:5].mean() * left[:, :5] @ right[:5], 1e-5)


def test_equal_experts_give_the_mean_of_their_leading_half() -> None:
    """The stack has the dimension of one of them, so each keeps half of its components: the same ones."""
    vector = low_rank((12, 9), 4, seed=5)
    left, values, right = torch.linalg.svd(vector.double(), full_matrices=False)
    half = left[:, :2] * values[:2] @ right[:2]
    assert_near(tsv([vector, vector], torch.tensor([1.0, 0.5])), 0.75 * half, 1e-5)
    assert_near(tsv([vector, vector, vector], torch.ones(3), rank=12), vector, 1e-5)


@pytest.mark.parametrize("merge", [tsv, iso_cts])
def test_experts_equal_up_to_float32_add_no_noise(merge: Merge) -> None:
    """What differs by rounding only is not blown up to a direction of its own."""
    vector = low_rank((12, 9), 4, seed=5)
    again = (vector / 3) * 3
    assert not torch.equal(vector, again)
    assert_near(merge([vector, again], torch.ones(2), rank=8), merge([vector, vector], torch.ones(2), rank=8), 1e-5)


def test_opposite_experts_have_no_common_part_in_iso_cts() -> None:
    """Rounding is all there is of their sum, and no direction; each one's own part is cancelled by the other's."""
    vector = low_rank((12, 9), 4, seed=5)
    for other in (vector, (vector / 3) * 3):
        assert float(iso_cts([vector, other], torch.tensor([1.0, -1.0]), rank=8, common=0.5).abs().max()) < 1e-5
    vectors, weights = [diagonal(3, 2, 0), diagonal(3, 2, 0), diagonal(0, 0, 4)], torch.tensor([1.0, -1.0, 1.0])
    assert_near(iso_cts(vectors, weights, common=1 / 3, rank=3), diagonal(0, 0, 4), 1e-6)  # 2 // 3 = 0 for each


def test_a_budget_below_the_number_of_experts() -> None:
    """Each gets one component in tsv; in iso_cts the common part is all there is, be it one."""
    vectors = [diagonal(3, 1, 0), diagonal(0, 2, 1), diagonal(1, 0, 2)]
    assert_near(tsv(vectors, torch.ones(3), rank=1), diagonal(3, 2, 2), 1e-6)
    assert_near(iso_cts(vectors, torch.ones(3), rank=1, common=0.0), diagonal(4, 0, 0), 1e-6)
    assert_near(iso_cts([diagonal(3, 1, 0), diagonal(2, 1, 1)], torch.ones(2), rank=2), diagonal(3.5, 3.5, 0), 1e-6)


@pytest.mark.parametrize("merge", [tsv, iso_cts])
def test_more_experts_than_dimensions(merge: Merge) -> None:
    """Six directions in a plane form a tight frame, with no orthogonal columns to be had."""
    vectors = [low_rank((2, 3), 1, seed) for seed in range(6)]
    found = merge(vectors, torch.ones(6))
    assert_near(found, (tsv_oracle if merge is tsv else iso_oracle)(vectors, [1.0] * 6), 1e-5)


@pytest.mark.parametrize("merge", [tsv, iso_cts])
def test_an_expert_of_zeros_counts_as_none(merge: Merge) -> None:
    vectors = [low_rank((6, 7), 3, seed) for seed in range(2)]
    silent = [vectors[0], torch.zeros(6, 7), vectors[1]]
    assert torch.equal(merge(silent, torch.ones(3)), merge(vectors, torch.ones(2)))


@pytest.mark.parametrize("weights", [torch.zeros(2), torch.ones(2)])
@pytest.mark.parametrize("merge", [tsv, iso_cts])
def test_nothing_to_merge_is_exactly_zero(merge: Merge, weights: torch.Tensor) -> None:
    vectors = torch.ones(2, 3, 4) * (1 - weights[:, None, None])
    found = merge(vectors, weights)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.zeros(3, 4))


@pytest.mark.parametrize("merge", [tsv, iso_cts])
def test_signs_of_singular_vectors_do_not_matter(merge: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, weights = [low_rank((10, 14), 3, seed) for seed in range(4)], torch.tensor([0.5, 1.0, -0.8, 0.3])
    expected = merge(vectors, weights)
    svd, draw = torch.linalg.svd, torch.Generator().manual_seed(3)
    flipped = 0

    def flipping(matrix: torch.Tensor, full_matrices: bool = True) -> tuple[torch.Tensor, ...]:
        nonlocal flipped
        left, values, right = svd(matrix, full_matrices=full_matrices)
        signs = torch.randint(2, values.shape, generator=draw).double() * 2 - 1
        flipped += int((signs < 0).sum())
        return left * signs, values, right * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipping)
    assert_near(merge(vectors, weights), expected, 1e-6)
    assert flipped


class Counted(Sequence[torch.Tensor]):
    """Makes a tensor at each reading, and counts how many are alive."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self.reads: list[int] = []
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        made = self.tensors[index].clone()
        self.reads.append(index)
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made


@pytest.mark.parametrize("merge", [tsv, iso_cts, regmean])
def test_task_vectors_are_read_once_and_one_at_a_time(merge: Merge) -> None:
    vectors = Counted([low_rank((6, 5), 2, seed) for seed in range(4)])
    extra = {"grams": [gram_of(inputs(9, 5, seed)) for seed in range(4)]} if merge is regmean else {}
    weights = torch.tensor([0.5, 0.0, 1.0, 0.3])
    found = merge(vectors, weights, **extra)
    assert vectors.reads == [0, 2, 3]
    assert vectors.most == 1
    assert torch.equal(found, merge(torch.stack(list(vectors.tensors)), weights, **extra))


@pytest.mark.parametrize("merge", [tsv, iso_cts])
def test_what_is_no_stack_of_matrices_is_refused(merge: Merge) -> None:
    with pytest.raises(
        ModelError, match=r"needs a matrix, but the task vector of expert 0 is \(5,\); use linear there"
    ):
        merge(torch.ones(2, 5), torch.ones(2))
    with pytest.raises(ModelError, match=r"task vector of expert 1 is \(4, 3\), others are \(3, 4\); train all"):
        merge([torch.ones(3, 4), torch.ones(4, 3)], torch.ones(2))
    with pytest.raises(ModelError, match="the task vector of expert 1 has NaN or infinity"):
        merge([torch.ones(3, 4), torch.full((3, 4), math.nan)], torch.ones(2))
    with pytest.raises(GenomeError, match="one finite weight for each of 2 experts"):
        merge(torch.ones(2, 3, 4), torch.ones(3))
    with pytest.raises(GenomeError, match="one finite weight for each of 2 experts"):
        merge(torch.ones(2, 3, 4), torch.tensor([1.0, math.inf]))
    with pytest.raises(GenomeError, match="one finite weight for each of 0 experts"):
        merge([], torch.ones(0))
    with pytest.raises(ConfigError, match="rank of 1 or more, got 0"):
        merge(torch.ones(2, 3, 4), torch.ones(2), rank=0)


@pytest.mark.parametrize("common", [-0.1, 1.1, math.nan])
def test_a_common_part_beyond_all_is_refused(common: float) -> None:
    with pytest.raises(ConfigError, match=r"common part in \[0, 1\]"):
        iso_cts(torch.ones(2, 3, 4), torch.ones(2), common=common)


def inputs(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs of an expert with features of very different sizes, as activations have."""
    draw = np.random.default_rng(100 + seed)
    return torch.from_numpy(draw.normal(size=(tokens, width)) * 10.0 ** draw.uniform(-1, 2, width))


def gram_of(rows: torch.Tensor) -> torch.Tensor:
    return (rows.T @ rows).float()


def least_squares(
    task_vectors: Sequence[torch.Tensor], weights: Sequence[float], rows: Sequence[torch.Tensor], shrink: float
) -> Matrix:
    """The minimum of sum_i w_i ||X_i (W - W_i)^T||^2; shrinking adds rows that see one input each."""
    left, right = [], []
    for task_vector, weight, x in zip(task_vectors, weights, rows, strict=True):
        alone = torch.diag(x.norm(dim=0))
        seen = math.sqrt(weight) * torch.cat([math.sqrt(shrink) * x, math.sqrt(1 - shrink) * alone])
        left.append(seen.numpy())
        right.append((seen @ task_vector.double().T).numpy())
    solution = np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=1e-12)[0]
    return np.asarray(solution.T)


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.5, 0.0])
def test_regmean_is_the_least_squares_solution(shrink: float) -> None:
    vectors = [low_rank((4, 6), 2, seed) for seed in range(3)]
    rows = [inputs(30, 6, seed) for seed in range(3)]
    weights = (0.5, 1.0, 0.2)
    found = regmean(vectors, torch.tensor(weights), grams=[gram_of(x) for x in rows], shrink=shrink)
    assert_near(found, least_squares(vectors, weights, rows, shrink))
    assert float((found - sum(w * v for w, v in zip(weights, vectors, strict=True)) / 1.7).norm()) > 0.1


def test_regmean_by_hand() -> None:
    """Without what is off the diagonal, each column is the mean weighted by its inputs' squares."""
    vectors = [torch.tensor([[2.0, 6.0]]), torch.tensor([[4.0, 0.0]])]
    grams = [torch.tensor([[3.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.5, 2.0]])]
    assert_near(regmean(vectors, torch.ones(2), grams=grams, shrink=0.0), torch.tensor([[2.5, 2.0]]), 1e-6)
    assert_near(regmean(vectors, torch.tensor([1.0, 3.0]), grams=grams, shrink=0.0), torch.tensor([[3.0, 6 / 7]]), 1e-6)


def test_regmean_of_weights_is_the_base_plus_that_of_task_vectors() -> None:
    base, vectors = low_rank((4, 6), 4, seed=9), [low_rank((4, 6), 2, seed) for seed in range(3)]
    grams, weights = [gram_of(inputs(30, 6, seed)) for seed in range(3)], torch.tensor([0.5, 1.0, 0.2])
    assert_near(
        regmean([base + vector for vector in vectors], weights, grams=grams),
        base + regmean(vectors, weights, grams=grams),
        1e-5,
    )


@pytest.mark.parametrize("shrink", [1.0, 0.9])
def test_regmean_of_one_expert_is_that_expert(shrink: float) -> None:
    vector = low_rank((4, 6), 3, seed=2)
    assert_near(regmean([vector], torch.tensor([0.3]), grams=[gram_of(inputs(30, 6, 0))], shrink=shrink), vector)


def test_an_input_no_expert_sees_gets_zero() -> None:
    rows = [inputs(30, 6, seed) for seed in range(2)]
    for x in rows:
        x[:, 2] = 0
    vectors = [low_rank((4, 6), 2, seed) for seed in range(2)]
    for shrink in (1.0, 0.9):
        found = regmean(vectors, torch.ones(2), grams=[gram_of(x) for x in rows], shrink=shrink)
        assert float(found[:, 2].abs().max()) < 1e-12
        assert_near(found, least_squares(vectors, (1.0, 1.0), rows, shrink))


def test_a_singular_sum_of_grams_gives_the_smallest_solution() -> None:
    """Five tokens do not fill eight dimensions: what fits all of them, smallest once inputs have unit norm."""
    rows = [inputs(3, 8, 0), inputs(2, 8, 1)]
    vectors = [low_rank((4, 8), 2, seed) for seed in range(2)]
    found = regmean(vectors, torch.ones(2), grams=[gram_of(x) for x in rows], shrink=1.0)
    norms = torch.cat(rows).norm(dim=0).numpy()
    wanted = np.vstack([(x @ vector.double().T).numpy() for x, vector in zip(rows, vectors, strict=True)])
    smallest = np.linalg.lstsq(torch.cat(rows).numpy() / norms, wanted, rcond=1e-6)[0].T / norms
    assert_near(found, smallest)


def test_regmean_without_experts_is_zero() -> None:
    grams = [gram_of(inputs(30, 6, seed)) for seed in range(2)]
    assert torch.equal(regmean(torch.ones(2, 3, 6), torch.zeros(2), grams=grams), torch.zeros(3, 6))


def test_what_regmean_cannot_merge_is_refused() -> None:
    vectors, grams = torch.ones(2, 3, 4), [torch.eye(4)] * 2
    with pytest.raises(GenomeError, match=r"weights of 0 or more, got -0\.5"):
        regmean(vectors, torch.tensor([1.0, -0.5]), grams=grams)
    with pytest.raises(ModelError, match="one Gram matrix per expert, got 1 for 2 experts"):
        regmean(vectors, torch.ones(2), grams=grams[:1])
    with pytest.raises(ModelError, match=r"Gram matrix of 4 inputs, got one of \(3, 3\)"):
        regmean(vectors, torch.ones(2), grams=[torch.eye(3)] * 2)
    with pytest.raises(ModelError, match=r"needs a matrix, but the task vector of expert 0 is \(4,\)"):
        regmean(torch.ones(2, 4), torch.ones(2), grams=grams)
    with pytest.raises(ModelError, match="not positive definite; gather them anew"):
        regmean(vectors, torch.ones(2), grams=[torch.eye(4) - 5 * (1 - torch.eye(4))] * 2)
    with pytest.raises(ConfigError, match=r"shrink in \[0, 1\], got 1\.5"):
        regmean(vectors, torch.ones(2), grams=grams, shrink=1.5)


def random_pair(shape: tuple[int, int], rank: int, scale: float, seed: int) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, shape[1], generator=draw), torch.randn(shape[0], rank, generator=draw), scale)


@pytest.mark.parametrize(
    ("shape", "ranks", "size"),
    [
        ((40, 30), (3, 2, 4), (9, 9)),
        ((16, 16), (8, 8, 8, 8), (16, 16)),
        ((16, 40), (8, 8, 8), (16, 24)),
        ((40, 16), (8, 8, 8), (24, 16)),
        ((40, 30), (4,), (4, 4)),
    ],
)
def test_the_core_space_holds_every_expert(
    shape: tuple[int, int], ranks: tuple[int, ...], size: tuple[int, int]
) -> None:
    factors = [random_pair(shape, rank, 0.5 + seed, seed) for seed, rank in enumerate(ranks)]
    core = core_space(factors)
    assert tuple(core.matrices.shape) == (len(ranks), *size)
    torch.testing.assert_close(core.left.T @ core.left, torch.eye(size[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(core.right @ core.right.T, torch.eye(size[1]), rtol=0, atol=1e-6)
    for matrix, pair in zip(core.matrices, factors, strict=True):
        assert_near(core.left @ matrix @ core.right, pair.scale * pair.b.double() @ pair.a.double(), 1e-6)


def test_regmean_in_the_core_space_has_fewer_rows() -> None:
    factors = [random_pair((40, 6), 2, 0.5, seed) for seed in range(3)]
    grams, weights = [gram_of(inputs(30, 6, seed)) for seed in range(3)], torch.tensor([0.5, 1.0, 0.2])
    core = core_space(factors)
    small = regmean([matrix @ core.right for matrix in core.matrices], weights, grams=grams)
    assert tuple(small.shape) == (6, 6)
    dense = [pair.scale * pair.b @ pair.a for pair in factors]
    assert_near(core.left @ small, regmean(dense, weights, grams=grams), 1e-5)


def test_factors_of_different_modules_have_no_core_space() -> None:
    with pytest.raises(ModelError, match=r"factors of one module.*\(4, 2\) @ \(2, 6\).*\(5, 2\) @ \(2, 6\)"):
        core_space([random_pair((4, 6), 2, 1.0, 0), random_pair((5, 6), 2, 1.0, 1)])
    with pytest.raises(ModelError, match=r"factors of one module.*\(4, 3\) @ \(2, 6\)"):
        core_space([Factors(torch.ones(2, 6), torch.ones(4, 3), 1.0)])
    with pytest.raises(ModelError, match=r"factors of one module.*got \[\]"):
        core_space([])
