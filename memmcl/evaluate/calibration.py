"""Calibration of label scores: take away what a prompt says about the labels before any text is seen.

A small model answers one label for everything, whatever its context; subtracting each label's typical score
lets the text decide. Offsets are medians over weak rows: no gold labels are needed, labels are assumed to be of roughly
equal frequency. References: Zhao et al. 2021, Calibrate Before Use, arXiv 2102.09690 (offsets from a content-free
input); Zhou et al. 2024, Batch Calibration, arXiv 2309.17249 (means over rows; the median is ours).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from memmcl.errors import DataError
from memmcl.suite.metrics import Floats


def fit(scores: npt.ArrayLike) -> Floats:
    """Return the offsets, (labels,) float64, that `apply` subtracts: the median of each label's score.

    scores: (rows, labels) log-probabilities of whole labels. Each row is first normalised over the labels, so
    that a row on which all labels are unlikely counts like any other.

    Raises:
        DataError: no rows, no labels, or scores that are not finite.
    """
    rows = _checked(scores)
    shifted = rows - rows.max(axis=1, keepdims=True)
    logshares = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # log-softmax over labels
    return np.asarray(np.median(logshares, axis=0), dtype=np.float64)


def apply(scores: npt.ArrayLike, offsets: npt.ArrayLike) -> Floats:
    """Return scores - offsets, (rows, labels); the answer is each row's argmax.

    Raises:
        DataError: shapes that do not fit, or scores that are not finite.
    """
    rows = _checked(scores)
    shift = np.asarray(offsets, dtype=np.float64)
    if shift.shape != (rows.shape[1],):
        raise DataError(f"calibration has offsets of shape {shift.shape}, the scores have {rows.shape[1]} labels")
    return rows - shift


def _checked(scores: npt.ArrayLike) -> Floats:
    rows = np.asarray(scores, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise DataError(f"label scores must be (rows, labels) and not empty, got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise DataError("label scores hold NaN or infinities; is the model's output finite?")
    return rows
