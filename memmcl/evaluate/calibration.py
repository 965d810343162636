"""Calibration of label scores: take away what a prompt says about the labels before any text is seen.

A small model answers one label for everything, whatever its context; subtracting each label's typical score
lets the text decide. Offsets come from weak rows (their medians or means, no gold labels needed; they assume
labels of roughly equal frequency) or, content-free, from the one row of an input such as "N/A". References:
Zhao et al. 2021, Calibrate Before Use, arXiv 2102.09690 (content-free); Zhou et al. 2024, Batch Calibration,
arXiv 2309.17249 (means).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from memmcl.errors import ConfigError, DataError

Array = npt.NDArray[np.float64]

CALIBRATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda scores: np.zeros(scores.shape[1]),
    "median": lambda scores: np.asarray(np.median(scores, axis=0), dtype=np.float64),
    "mean": lambda scores: np.asarray(scores.mean(axis=0), dtype=np.float64),
}


def fit(scores: npt.ArrayLike, method: str) -> Array:
    """Return the offsets, (labels,) float64, that `apply` subtracts.

    scores: (rows, labels) log-probabilities of whole labels. Each row is first normalised over the labels, so
    that a row on which all labels are unlikely counts like any other. Give the one row of a content-free
    input for content-free calibration.

    Raises:
        ConfigError: an unknown method.
        DataError: no rows, no labels, or scores that are not finite.
    """
    if method not in CALIBRATIONS:
        raise ConfigError(f"unknown calibration `{method}`; choose one of {', '.join(CALIBRATIONS)}")
    return CALIBRATIONS[method](_normalised(_checked(scores)))


def apply(scores: npt.ArrayLike, offsets: npt.ArrayLike) -> Array:
    """Return scores - offsets, (rows, labels); the answer is each row's argmax.

    Raises:
        DataError: shapes that do not fit, or scores that are not finite.
    """
    rows = _checked(scores)
    shift = np.asarray(offsets, dtype=np.float64)
    if shift.shape != (rows.shape[1],):
        raise DataError(f"calibration has offsets of shape {shift.shape}, the scores have {rows.shape[1]} labels")
    return rows - shift


def _normalised(scores: Array) -> Array:
    """Return log-probabilities given that the answer is one of the labels: log-softmax over axis 1."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), dtype=np.float64)


def _checked(scores: npt.ArrayLike) -> Array:
    rows = np.asarray(scores, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise DataError(f"label scores must be (rows, labels) and not empty, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise DataError("label scores hold NaN or infinities; is the model's output finite?")
    return rows
