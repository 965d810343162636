"""Merge methods that work on the singular vectors of task vectors or on the inputs they see, and the Core Space.

All are pure functions of 2-D task vectors. `task_vectors` is read by index, one at a time and each once, so that it may
build them as they are asked for; an expert whose weight is zero is not read. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memmcl.adapters.format import Factors
from memmcl.errors import ConfigError, GenomeError, ModelError

NEGLIGIBLE = 1e-5
"""A singular value at most this much of its matrix's largest is zero: float32 leaves 1e-6 and less of a null one."""

DEPENDENT = 1e-4
"""Unit vectors whose stack has singular values at most this much of its largest are linearly dependent."""


@dataclass(frozen=True)
class Core:
    """The Core Space of the experts in one module: T_i = left @ matrices[i] @ right.

    left: (d_out, p), orthonormal columns; right: (q, d_in), orthonormal rows; matrices: (experts, p, q); all float32.
    p = min(d_out, sum of ranks), q = min(d_in, sum of ranks).
    """

    left: Tensor
    right: Tensor
    matrices: Tensor


@dataclass(frozen=True)
class _Components:
    """The leading components of a matrix. left: (d_out, k); values: (k,), positive and falling; right: (k, d_in)."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def scaled(self) -> Tensor:
        return self.left * self.values

    def top(self, count: int) -> _Components:
        return _Components(self.left[:, :count], self.values[:count], self.right[:count])


@torch.no_grad()
def tsv(task_vectors: Sequence[Tensor] | Tensor, weights: Tensor, *, rank: int | None = None) -> Tensor:
    """Merge the leading singular vectors of each expert, made orthogonal to those of all others.

    task_vectors: (experts, d_out, d_in) float32; weights: (experts,); returns (d_out, d_in) float32. `rank`: components
    to share out, by default the smaller of the ranks of the task vectors side by side and on top of each other. Each
    expert gets rank // experts of them, and one at least.

    An expert whose weight or task vector is zero does not count as one; a negative weight turns its task vector round.
    Directions that experts share exactly count once: only what has a non-negligible D in U = P D Q^T is used, so that
    two equal experts give the mean of both, not the sum. One expert comes back as it is, to 1e-5 of its norm. The
    result is arbitrary only where the last component kept is as large as the first one cut.

    Raises:
        ModelError: a task vector that is not a finite matrix, or not of the same shape as the others.
        GenomeError: not one finite weight per expert.
        ConfigError: `rank` below 1.

    Reference: TSV-Merge, Gargiulo et al. 2025, "Task Singular Vectors: Reducing Task Interference in Model Merging".
    Its code cuts at min(d_out, d_in) // experts, which keeps every component of a LoRA.
    """
    nothing, experts = _read(task_vectors, weights, "tsv")
    if not experts:
        return nothing
    each = max(1, _budget(experts, rank) // len(experts))
    chosen = [expert.top(each) for expert in experts]
    return _joined(chosen, torch.cat([expert.values for expert in chosen]))


@torch.no_grad()
def iso_cts(
    task_vectors: Sequence[Tensor] | Tensor, weights: Tensor, *, common: float = 0.8, rank: int | None = None
) -> Tensor:
    """Merge the leading directions of the weighted sum and those each expert has beside them, all equally strong.

    task_vectors: (experts, d_out, d_in) float32; weights: (experts,); returns (d_out, d_in) float32. Of `rank`
    components, as in `tsv`, round(common * rank) are the sum's, and each expert gets rest // experts: the leading ones
    of its weighted task vector without what lies in the left space of the common ones. What the division leaves over
    is not used; where neither would get any, the sum gets one. The strength is the mean singular value of all of them.

    Zero, negative and equal experts are treated as in `tsv`; negligible components are left out, also of the mean.

    Raises:
        ModelError, GenomeError: as `tsv`.
        ConfigError: `common` outside [0, 1], or `rank` below 1.

    Reference: Iso-CTS, Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
    Subspaces". Its code shares out min(d_out, d_in) components, null ones among them, rounds the part of
    an expert to the nearest, and gives the common part what is over.
    """
    if not 0 <= common <= 1:
        raise ConfigError(f"expected a common part in [0, 1], got {common}; the paper uses 0.8")
    nothing, experts = _read(task_vectors, weights, "iso_cts")
    if not experts:
        return nothing
    budget = _budget(experts, rank)
    shared = round(common * budget)
    own = (budget - shared) // len(experts)
    shared = shared if shared or own else 1

    largest = max(float(expert.values[0]) for expert in experts)
    total = torch.zeros_like(nothing, dtype=torch.float64)
    for expert in experts:
        total += expert.scaled @ expert.right
    sums = _decompose(total, largest).top(shared)
    chosen = [sums]
    for expert in experts:
        rest = expert.scaled - sums.left @ (sums.left.T @ expert.scaled)  # (I - U_c U_c^T) T_i, without its V_i
        specific = _decompose(rest, float(expert.values[0])).top(own)
        chosen.append(_Components(specific.left, specific.values, specific.right @ expert.right))
    values = torch.cat([expert.values for expert in chosen])
    return _joined(chosen, values.mean()) if len(values) else nothing


@torch.no_grad()
def regmean(
    task_vectors: Sequence[Tensor] | Tensor,
    weights: Tensor,
    *,
    grams: Sequence[Tensor],
    shrink: float = 0.9,
    scale: float = 1.0,
) -> Tensor:
    """Merge to the outputs that come nearest to each expert's own on its own inputs, by least squares.

    task_vectors: (experts, d_out, d_in) float32; weights: (experts,), not negative; grams: per expert (d_in, d_in),
    X^T X of its inputs X: (tokens, d_in); returns (d_out, d_in) float32. `shrink` multiplies what is off the diagonal
    of a Gram matrix. A common factor of the weights vanishes, `scale` is of the result; all zero give zero. Each row
    is merged by itself.

    Merging task vectors is merging weights: the base cancels. An input that is zero for all experts gets zero. With
    `shrink` near 1 the sum of Grams may be singular: inputs are then scaled to unit norm, and what lies along an
    eigenvector whose eigenvalue is below 1e-5 of the largest gets zero.

    Raises:
        ModelError: a task vector or a Gram matrix that is not a finite matrix of the right shape, not one Gram matrix
            per expert, or one that is no X^T X.
        GenomeError: not one finite weight per expert, or a negative one.
        ConfigError: `shrink` outside [0, 1].

    Reference: RegMean, Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models"; the
    weights of experts are ours.
    """
    factors = _factors(task_vectors, weights)
    if min(factors) < 0:
        raise GenomeError(f"regmean needs weights of 0 or more, got {min(factors)}; set the lower bound to 0")
    if not 0 <= shrink <= 1:
        raise ConfigError(f"expected a shrink in [0, 1], got {shrink}; the paper uses 0.9")
    if len(grams) != len(factors):
        raise ModelError(f"expected one Gram matrix per expert, got {len(grams)} for {len(factors)} experts")
    outputs: Tensor | None = None
    inputs: Tensor | None = None
    for expert in [expert for expert, factor in enumerate(factors) if factor] or [0]:
        gram = _matrix(grams[expert], expert, "regmean", inputs, "Gram matrix")
        vector = _matrix(task_vectors[expert], expert, "regmean", outputs)
        if gram.shape != (vector.shape[1],) * 2:
            raise ModelError(f"expected a Gram matrix of {vector.shape[1]} inputs, got one of {tuple(gram.shape)}")
        output = shrink * (vector @ gram) + (1 - shrink) * vector * gram.diagonal()  # times `shrink` off its diagonal
        outputs = output.mul_(factors[expert]) if outputs is None else outputs.add_(output, alpha=factors[expert])
        inputs = factors[expert] * gram if inputs is None else inputs.add_(gram, alpha=factors[expert])
    assert outputs is not None and inputs is not None
    return scale * _divide(outputs, inputs, shrink).float()


@torch.no_grad()
def core_space(factors: Sequence[Factors]) -> Core:
    """Return the small matrices that stand for the task vectors of one module, and the way back.

    factors: one per expert, of any ranks. left and right are isometries, so that methods that know only singular values
    and vectors, as `tsv` and `iso_cts`, may work on the matrices: left @ tsv(matrices, weights) @ right is the merge of
    the whole task vectors. No (d_out, d_in) matrix is computed.

    Raises:
        ModelError: no factors, or factors of different shapes.

    Reference: Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging in Core Space"; its
    bases are singular vectors of the stacked factors, ours their QR factors: the same spaces, turned.
    """
    shapes = {(len(pair.b), pair.a.shape[1]) for pair in factors}
    if len(shapes) != 1 or any(pair.b.shape[1] != len(pair.a) for pair in factors):
        shapes_in_words = [f"{tuple(pair.b.shape)} @ {tuple(pair.a.shape)}" for pair in factors]
        raise ModelError(f"expected factors of one module, (d_out, r) @ (r, d_in) each; got {shapes_in_words}")
    ranks = [len(pair.a) for pair in factors]
    left, b = torch.linalg.qr(torch.cat([pair.b.double() for pair in factors], dim=1))
    right, a = torch.linalg.qr(torch.cat([pair.a.double() for pair in factors]).T)
    matrices = [
        pair.scale * outer @ inner.T
        for pair, outer, inner in zip(factors, b.split(ranks, dim=1), a.split(ranks, dim=1), strict=True)
    ]
    return Core(left.float(), right.T.float(), torch.stack(matrices).float())


def _factors(task_vectors: Sequence[Tensor] | Tensor, weights: Tensor) -> list[float]:
    """Return the weights as numbers, one per expert."""
    if not len(task_vectors) or tuple(weights.shape) != (len(task_vectors),) or not bool(weights.isfinite().all()):
        raise GenomeError(
            f"expected one finite weight for each of {len(task_vectors)} experts, got {weights.tolist()}; "
            "does the genome belong to other experts?"
        )
    return list(map(float, weights.tolist()))


def _matrix(tensor: Tensor, expert: int, method: str, like: Tensor | None, what: str = "task vector") -> Tensor:
    """Return a matrix in float64, finite and of the shape of `like`."""
    shape = tuple(tensor.shape)
    if tensor.ndim != 2:
        raise ModelError(f"{method} needs a matrix, but the {what} of expert {expert} is {shape}; use linear there")
    if like is not None and tensor.shape != like.shape:
        raise ModelError(f"{what} of expert {expert} is {shape}, others are {tuple(like.shape)}; train all on one base")
    if not bool(tensor.isfinite().all()):
        raise ModelError(f"expected finite numbers, but the {what} of expert {expert} has NaN or infinity; retrain it")
    return tensor.double()


def _read(task_vectors: Sequence[Tensor] | Tensor, weights: Tensor, method: str) -> tuple[Tensor, list[_Components]]:
    """Return zeros of the result's shape, and the components of each weighted task vector that is not zero."""
    factors = _factors(task_vectors, weights)
    nothing: Tensor | None = None
    experts: list[_Components] = []
    for expert in [expert for expert, factor in enumerate(factors) if factor] or [0]:
        components = _decompose(_matrix(task_vectors[expert], expert, method, nothing))
        if nothing is None:
            nothing = components.left.new_zeros(len(components.left), components.right.shape[1], dtype=torch.float32)
        if factors[expert] and len(components.values):
            left = components.left if factors[expert] > 0 else -components.left
            experts.append(_Components(left, abs(factors[expert]) * components.values, components.right))
    assert nothing is not None
    return nothing, experts


def _decompose(matrix: Tensor, largest: float | None = None) -> _Components:
    """Return the components of a matrix that are not negligible beside `largest`, by default its own largest."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    floor = NEGLIGIBLE * (float(values[0]) if largest is None else largest)
    return _Components(left, values, right).top(int((values > floor).sum()))


def _budget(experts: Sequence[_Components], rank: int | None) -> int:
    """Return how many components to share out: `rank`, or the dimension of the stack, each expert at unit norm."""
    if rank is not None and rank < 1:
        raise ConfigError(f"expected a rank of 1 or more, got {rank}; leave it out to use the dimension of the stack")
    beside = torch.cat([expert.left * (expert.values / expert.values[0]) for expert in experts], dim=1)
    above = torch.cat([expert.right.T * (expert.values / expert.values[0]) for expert in experts], dim=1)
    return rank or min(_dimension(beside), _dimension(above))


def _dimension(vectors: Tensor) -> int:
    """Return the numerical rank of columns, from the eigenvalues of the smaller of their Gram matrices."""
    gram = vectors @ vectors.T if len(vectors) < vectors.shape[1] else vectors.T @ vectors
    values = torch.linalg.eigvalsh(gram)
    return int((values > NEGLIGIBLE**2 * values[-1]).sum())


def _joined(experts: Sequence[_Components], values: Tensor) -> Tensor:
    """Return U diag(values) V, with the vectors of all experts in U and V, each set made orthogonal."""
    left = _procrustes(torch.cat([expert.left for expert in experts], dim=1))
    return (left * values @ _procrustes(torch.cat([expert.right for expert in experts]))).float()


def _procrustes(vectors: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to `vectors`, or the nearest partial isometry where they are dependent."""
    left, values, right = torch.linalg.svd(vectors, full_matrices=False)
    kept = int((values > DEPENDENT * values[0]).sum())
    nearest: Tensor = left[:, :kept] @ right[:kept]  # P D Q^T -> P Q^T
    return nearest


def _divide(outputs: Tensor, gram: Tensor, shrink: float) -> Tensor:
    """Return outputs @ gram^-1, with what is off the diagonal of `gram` times `shrink`."""
    squares = gram.diagonal()
    norms = torch.where(squares > 0, squares, 1.0).sqrt()
    gram = (shrink * gram / (norms[:, None] * norms)).fill_diagonal_(1.0)
    outputs = outputs / norms
    # The eigenvalues now lie in [1 - shrink, d_in]. Where none can be small enough to cut, there is a faster way.
    if 1 - shrink > NEGLIGIBLE * len(gram):
        triangle, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise ModelError("expected Gram matrices X^T X, but their sum is not positive definite; gather them anew")
        merged: Tensor = torch.cholesky_solve(outputs.T, triangle).T
    else:
        merged = outputs @ torch.linalg.pinv(gram, rtol=NEGLIGIBLE, hermitian=True)
    return merged / norms
