"""The context gate: which context a model uses for a subtask, decided on weak data alone ([ours])."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memmcl.errors import ConfigError, DataError

DEFAULT = "zero-shot"


@dataclass(frozen=True)
class Option:
    """A context as measured on a subtask's weak rows.

    kind: of `CONTEXTS`; calibrated: whether its label scores are; score: the subtask's metric; per_row: (rows,) what
    each row is worth (0/1 for accuracy, else `evaluate.bootstrap.row_values`), in the same order for all; tokens: the
    length of its demonstrations.
    """

    kind: str
    calibrated: bool
    score: float
    per_row: npt.NDArray[np.float64]
    tokens: int


def choose(options: Sequence[Option], *, margin: float, calibrated: bool = False) -> Option:
    """Return the option with the best score; zero-shot unless one beats it by more than noise.

    calibrated: whether the zero-shot option to beat is the calibrated one, as models are scored without a gate.

    To beat it, a score must be higher by more than `margin` standard errors of the paired difference over rows. Of such
    scores the highest wins; ties go to fewer tokens, then to the uncalibrated one, then to the earlier.

    Raises:
        ConfigError: a negative margin.
        DataError: not exactly one zero-shot option of that form, no rows, or options over different numbers of rows.
    """
    if margin < 0:
        raise ConfigError(f"gate margin is a number of standard errors of 0 or more, got {margin}")
    defaults = [option for option in options if option.kind == DEFAULT and option.calibrated == calibrated]
    if len(defaults) != 1:
        form = "calibrated" if calibrated else "uncalibrated"
        raise DataError(f"the gate needs exactly one {form} {DEFAULT} option, got {len(defaults)}")
    default = defaults[0]
    rows = {np.asarray(option.per_row).shape for option in options}
    if len(rows) != 1 or default.per_row.ndim != 1 or not len(default.per_row):
        raise DataError(
            f"the gate compares options over the same rows (one axis, not empty), got shapes {sorted(rows)}"
        )
    better = [
        option
        for option in options
        if option is not default and option.score - default.score > margin * _paired_error(option, default)
    ]
    if not better:
        return default
    return min(better, key=lambda option: (-option.score, option.tokens, option.calibrated))


def _paired_error(option: Option, default: Option) -> float:
    """Return the standard error of the mean row difference, s / sqrt(n) with n - 1 in s; inf for one row."""
    difference = np.asarray(option.per_row, dtype=np.float64) - np.asarray(default.per_row, dtype=np.float64)
    if len(difference) == 1:
        return float("inf")
    return float(difference.std(ddof=1) / np.sqrt(len(difference)))
