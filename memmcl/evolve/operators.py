"""Crossover and mutation of genomes, in coordinates in which every gene's bounds are 0 and 1."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memmcl.evolve.strategy import Floats

Mask = npt.NDArray[np.bool_]

CROSSOVER_ETA = 15.0
MUTATION_ETA = 20.0


def sbx(first: Floats, second: Floats, rng: np.random.Generator, eta: float = CROSSOVER_ETA) -> tuple[Floats, Floats]:
    """Return two children, (genes,) each, by simulated binary crossover.

    Each gene is crossed with probability 1/2, and then which child has which of the two values is a coin's throw.
    Children may leave the bounds: clip them. Before that, their sum is the sum of the parents.

    Reference: Deb and Agrawal, Simulated binary crossover for continuous search space, Complex Systems 9, 1995; the
    coins as in the NSGA-II program of Deb et al.
    """
    u = rng.random(len(first))
    beta = np.where(
        u <= 0.5,
        (2.0 * u) ** (1.0 / (eta + 1.0)),  # Deb and Agrawal 1995: contracting, P(beta) = (eta + 1) beta^eta / 2
        (0.5 / (1.0 - u)) ** (1.0 / (eta + 1.0)),  # and expanding, P(beta) = (eta + 1) / (2 beta^(eta + 2))
    )
    crossed, swapped = rng.random((2, len(first))) < 0.5
    beta = np.where(crossed, np.where(swapped, -beta, beta), 1.0)
    middle, half = (first + second) / 2.0, beta * (first - second) / 2.0
    return middle + half, middle - half  # 0.5 [(1 +- beta) first + (1 -+ beta) second]


def polynomial(point: Floats, rng: np.random.Generator, eta: float = MUTATION_ETA) -> Floats:
    """Return `point`, (genes,) in [0, 1], with every gene moved by polynomial mutation; it stays in [0, 1].

    Reference: Deb and Deb, Analysing mutation schemes for real-parameter genetic algorithms, IJAISC 4, 2014.
    """
    u, power = rng.random(len(point)), 1.0 / (eta + 1.0)
    down = (2.0 * u + (1.0 - 2.0 * u) * (1.0 - point) ** (eta + 1.0)) ** power - 1.0
    up = 1.0 - (2.0 * (1.0 - u) + (2.0 * u - 1.0) * point ** (eta + 1.0)) ** power
    return np.clip(point + np.where(u < 0.5, down, up), 0.0, 1.0)


def cross(first: Floats, second: Floats, mask: Mask, rng: np.random.Generator) -> Floats:
    """Return one child, (genes,) in [0, 1]: SBX, and uniform crossover of the genes of `mask`, on or off."""
    child = sbx(first, second, rng)[int(rng.random() < 0.5)]
    taken = np.where(rng.random(len(first)) < 0.5, first, second)
    return np.where(mask, taken, np.clip(child, 0.0, 1.0))


def mutate(point: Floats, mask: Mask, rng: np.random.Generator, *, surely: bool = False) -> Floats:
    """Return `point`, (genes,) in [0, 1], each gene mutated with probability 1/genes: `mask` flips, others move.

    surely: one gene at least is mutated.
    """
    genes = len(point)
    chosen = rng.random(genes) < 1.0 / genes
    if surely and not chosen.any():
        chosen[rng.integers(genes)] = True
    return np.where(chosen, np.where(mask, 1.0 - point, polynomial(point, rng)), point)


def perturb(point: Floats, mask: Mask, sigma: float, rng: np.random.Generator) -> Floats:
    """Return `point`, (genes,) in [0, 1], moved by sigma * N(0, 1) and clipped; `mask` flips, each 1/genes."""
    moved = np.clip(point + sigma * rng.standard_normal(len(point)), 0.0, 1.0)
    flipped = np.where(rng.random(len(point)) < 1.0 / len(point), 1.0 - point, point)
    return np.where(mask, flipped, moved)
