"""Calibration of label scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memmcl.errors import DataError
from memmcl.evaluate.calibration import apply, fit


def logs(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows))


def test_offsets_by_hand() -> None:
    scores = logs([0.5, 0.5], [0.8, 0.2], [0.9, 0.1])
    assert fit(scores) == pytest.approx(np.log([0.8, 0.2]))


def test_median_calibration_splits_a_model_that_answers_one_label() -> None:
    scores = logs([0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4])
    assert scores.argmax(axis=1).tolist() == [0, 0, 0, 0]
    assert apply(scores, fit(scores)).argmax(axis=1).tolist() == [0, 0, 1, 1]


def test_the_offsets_of_one_row_are_its_scores() -> None:
    offsets = fit(logs([0.8, 0.2]))
    assert apply(logs([0.7, 0.3]), offsets) == pytest.approx(np.log([[0.7 / 0.8, 0.3 / 0.2]]))
    assert apply(logs([0.8, 0.2]), offsets) == pytest.approx(np.zeros((1, 2)))


@given(
    rows=st.lists(
        st.tuples(st.lists(st.floats(-20, 0), min_size=3, max_size=3), st.floats(-50, 50)), min_size=1, max_size=9
    )
)
def test_how_unlikely_a_row_is_as_a_whole_changes_no_offset(rows: list[tuple[list[float], float]]) -> None:
    plain = np.array([scores for scores, _ in rows])
    shifted = plain + np.array([[shift] for _, shift in rows])
    assert fit(shifted) == pytest.approx(fit(plain), abs=1e-9)


def test_bad_input_is_refused() -> None:
    for scores in (np.zeros((0, 2)), np.zeros((2, 0)), np.zeros(3)):
        with pytest.raises(DataError, match="not empty"):
            fit(scores)
    with pytest.raises(DataError, match="infinities"):
        fit(np.array([[0.0, -np.inf]]))
    with pytest.raises(DataError, match="3 labels"):
        apply(np.zeros((2, 3)), np.zeros(2))
