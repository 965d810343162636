"""Calibration of label scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memmcl.errors import ConfigError, DataError
from memmcl.evaluate.calibration import CALIBRATIONS, apply, fit


def logs(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows))


def test_offsets_by_hand() -> None:
    scores = logs([0.5, 0.5], [0.8, 0.2], [0.9, 0.1])
    assert fit(scores, "none") == pytest.approx([0.0, 0.0])
    assert fit(scores, "median") == pytest.approx(np.log([0.8, 0.2]))
    assert fit(scores, "mean") == pytest.approx([np.log(0.5 * 0.8 * 0.9) / 3, np.log(0.5 * 0.2 * 0.1) / 3])


def test_median_calibration_splits_a_model_that_answers_one_label() -> None:
    scores = logs([0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4])
    assert apply(scores, fit(scores, "none")).argmax(axis=1).tolist() == [0, 0, 0, 0]
    assert apply(scores, fit(scores, "median")).argmax(axis=1).tolist() == [0, 0, 1, 1]


def test_content_free_calibration_is_a_fit_on_one_row() -> None:
    offsets = fit(logs([0.8, 0.2]), "mean")
    assert apply(logs([0.7, 0.3]), offsets) == pytest.approx(np.log([[0.7 / 0.8, 0.3 / 0.2]]))
    assert apply(logs([0.8, 0.2]), offsets) == pytest.approx(np.zeros((1, 2)))


@pytest.mark.parametrize("method", sorted(CALIBRATIONS))
@given(
    rows=st.lists(
        st.tuples(st.lists(st.floats(-20, 0), min_size=3, max_size=3), st.floats(-50, 50)), min_size=1, max_size=9
    )
)
def test_how_unlikely_a_row_is_as_a_whole_changes_no_offset(method: str, rows: list[tuple[list[float], float]]) -> None:
    plain = np.array([scores for scores, _ in rows])
    shifted = plain + np.array([[shift] for _, shift in rows])
    assert fit(shifted, method) == pytest.approx(fit(plain, method), abs=1e-9)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="none, median, mean"):
        fit(logs([0.5, 0.5]), "mode")
    for scores in (np.zeros((0, 2)), np.zeros((2, 0)), np.zeros(3)):
        with pytest.raises(DataError, match="not empty"):
            fit(scores, "median")
    with pytest.raises(DataError, match="infinities"):
        fit(np.array([[0.0, -np.inf]]), "median")
    with pytest.raises(DataError, match="3 labels"):
        apply(np.zeros((2, 3)), np.zeros(2))
