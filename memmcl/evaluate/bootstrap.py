"""Standard errors by bootstrap over rows, for every metric that is a function of summed counts.

`counts`, (rows, k) float64, has what each row adds (for accuracy: correct, and 1; for micro-F1: true positives,
predicted and gold tuples; for macro-F1: these per class); `score` maps summed counts (samples, k) to scores (samples,).
A resample of rows is a vector of multinomial weights, and all resamples are one matrix product.
Reference: Efron and Tibshirani, An Introduction to the Bootstrap, ch. 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memmcl.errors import DataError
from memmcl.seeds import derive
from memmcl.suite.metrics import Floats

ScoreFunction = Callable[[Floats], Floats]

SAMPLES = 1000
_CHUNK = 2_000_000  # weights held at a time


class Difference(NamedTuple):
    """A paired difference a - b: its value, its standard error, and the two-sided bootstrap p-value."""

    difference: float
    standard_error: float
    p_value: float


def standard_error(counts: npt.ArrayLike, score: ScoreFunction, *, samples: int = SAMPLES, seed: int) -> float:
    """Return the bootstrap standard error of score(sum of counts over rows); counts: (rows, k).

    Raises:
        DataError: no rows, or not two axes.
    """
    rows = _checked(counts)
    return _spread(score(_resample(rows, samples, seed)))


def paired_difference(
    a_counts: npt.ArrayLike, b_counts: npt.ArrayLike, score: ScoreFunction, *, samples: int = SAMPLES, seed: int
) -> Difference:
    """Return score(a) - score(b) over the same rows: both see the same resamples, so shared noise cancels.

    a_counts, b_counts: (rows, k). p = 2 min(P(d* <= 0), P(d* >= 0)) over resampled differences d*, each share
    with one added to numerator and denominator; at most 1.

    Raises:
        DataError: no rows, or different shapes.
    """
    return paired_mean_difference([(a_counts, b_counts, score)], samples=samples, seed=seed)


def paired_mean_difference(
    pairs: Sequence[tuple[npt.ArrayLike, npt.ArrayLike, ScoreFunction]], *, samples: int = SAMPLES, seed: int
) -> Difference:
    """Return the mean over subtasks of score(a) - score(b); a pair is (a_counts, b_counts, score).

    Every subtask has rows of its own, resampled independently of the others; see `paired_difference`.

    Raises:
        DataError: no pairs, no rows, or different shapes within a pair.
    """
    if not pairs:
        raise DataError("a paired mean difference needs at least one pair of counts, got none")
    observed = 0.0
    resampled = np.zeros(samples)
    for i, (a_counts, b_counts, score) in enumerate(pairs):
        a, b = _checked(a_counts), _checked(b_counts)
        if a.shape != b.shape:
            raise DataError(f"paired counts must be over the same rows, got shapes {a.shape} and {b.shape}")
        columns = a.shape[1]
        sums = _resample(np.concatenate([a, b], axis=1), samples, derive(seed, "pair", i))
        resampled += (score(sums[:, :columns]) - score(sums[:, columns:])) / len(pairs)
        observed += (score_of(score, a) - score_of(score, b)) / len(pairs)
    below = (1 + int((resampled <= 0).sum())) / (samples + 1)
    above = (1 + int((resampled >= 0).sum())) / (samples + 1)
    return Difference(observed, _spread(resampled), min(1.0, 2 * min(below, above)))


def mean_with_error(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return mean and standard error of independent (score, standard error) pairs: sqrt(sum of squares) / n.

    Raises:
        DataError: no scores.
    """
    if not scores:
        raise DataError("a mean score needs at least one score, got none")
    count = len(scores)
    mean = math.fsum(value for value, _ in scores) / count
    return mean, math.sqrt(math.fsum(error * error for _, error in scores)) / count


def row_values(counts: npt.ArrayLike, score: ScoreFunction) -> Floats:
    """Return what each row is worth, (rows,): jackknife pseudo-values n S - (n - 1) S_without_row, S for one row.

    For accuracy these are the rows' 0/1; for a pooled metric such as micro-F1 their mean is near the score, and their
    spread gives its standard error, so that paired tests over rows work for it too.

    Raises:
        DataError: no rows, or not two axes.
    """
    rows = _checked(counts)
    count = len(rows)
    whole = score_of(score, rows)
    if count == 1:
        return np.array([whole])
    without = score(rows.sum(axis=0, keepdims=True) - rows)
    return count * whole - (count - 1) * without


def _checked(counts: npt.ArrayLike) -> Floats:
    rows = np.asarray(counts, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise DataError(f"counts must be (rows, k) with at least one row, got shape {rows.shape}")
    return rows


def score_of(score: ScoreFunction, rows: Floats) -> float:
    """Return the score of all rows of counts (rows, k) together."""
    return float(score(rows.sum(axis=0, keepdims=True))[0])


def _spread(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _resample(rows: Floats, samples: int, seed: int) -> Floats:
    """Return summed counts (samples, k) of `samples` resamples of `rows` with replacement."""
    if samples < 2:
        raise DataError(f"a bootstrap needs at least 2 samples, got {samples}")
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    share = np.full(len(rows), 1.0 / len(rows))
    step = max(1, _CHUNK // len(rows))
    chunks = [
        rng.multinomial(len(rows), share, size=min(step, samples - start)) @ rows for start in range(0, samples, step)
    ]
    return np.concatenate(chunks)
