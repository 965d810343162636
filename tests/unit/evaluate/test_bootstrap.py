"""Bootstrap standard errors against closed forms."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest

from memmcl.errors import DataError
from memmcl.evaluate import bootstrap
from memmcl.evaluate.bootstrap import (
    mean_with_error,
    paired_difference,
    paired_mean_difference,
    row_values,
    standard_error,
)
from memmcl.suite.examples import Example
from memmcl.suite.metrics import datasets_of, row_counts, score_from_counts
from memmcl.suite.subtasks import SUBTASKS

Array = npt.NDArray[np.float64]


def accuracy(summed: Array) -> Array:
    return summed[:, 1] / summed[:, 0]


def micro_f1(summed: Array) -> Array:
    return 2 * summed[:, 0] / np.maximum(summed[:, 1] + summed[:, 2], 1)


def correct(right: npt.ArrayLike) -> Array:
    found = np.asarray(right, dtype=float)
    return np.stack([np.ones_like(found), found], axis=1)


@pytest.mark.parametrize(("rows", "share"), [(100, 0.5), (400, 0.1), (50, 0.8)])
def test_accuracy_has_the_binomial_error(rows: int, share: float) -> None:
    counts = correct(np.arange(rows) < rows * share)
    expected = math.sqrt(share * (1 - share) / rows)
    assert standard_error(counts, accuracy, samples=4000, seed=1) == pytest.approx(expected, rel=0.05)


def test_certain_scores_have_no_error() -> None:
    assert standard_error(correct([1] * 30), accuracy, seed=1) == 0.0
    assert standard_error(correct([1]), accuracy, seed=1) == 0.0


def test_micro_f1_matches_a_plain_loop_bootstrap() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 4, (60, 3)).astype(float)
    plain = [micro_f1(counts[rng.integers(0, 60, 60)].sum(axis=0, keepdims=True))[0] for _ in range(4000)]
    assert standard_error(counts, micro_f1, samples=4000, seed=2) == pytest.approx(np.std(plain), rel=0.07)


def test_seed_decides_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = correct(np.arange(40) % 3 == 0)
    value = standard_error(counts, accuracy, seed=4)
    assert value == standard_error(counts, accuracy, seed=4)
    assert value != standard_error(counts, accuracy, seed=5)
    monkeypatch.setattr(bootstrap, "_CHUNK", 40 * 7)
    assert value == pytest.approx(standard_error(counts, accuracy, seed=4), rel=1e-12)


def test_paired_difference_of_equal_answers_is_zero() -> None:
    counts = correct(np.arange(40) % 2)
    assert paired_difference(counts, counts, accuracy, seed=1) == (0.0, 0.0, 1.0)


def test_paired_difference_cancels_shared_noise() -> None:
    right = np.arange(200) % 2 == 0
    improved = right.copy()
    improved[1:20:2] = True  # ten more rows
    difference, error, p_value = paired_difference(correct(improved), correct(right), accuracy, samples=4000, seed=1)
    assert difference == pytest.approx(0.05)
    assert error == pytest.approx(math.sqrt(0.05 * 0.95 / 200), rel=0.05)  # d is 1 in ten of 200 rows
    assert error < standard_error(correct(right), accuracy, seed=1) / 2
    assert p_value < 0.01
    back = paired_difference(correct(right), correct(improved), accuracy, samples=4000, seed=1)
    assert back.difference == pytest.approx(-difference)
    assert back.p_value == pytest.approx(p_value)


def test_p_value_of_a_difference_that_is_noise() -> None:
    a = correct([1, 0] * 50)
    b = correct([0, 1] * 49 + [1, 0])
    found = paired_difference(a, b, accuracy, seed=3)
    assert found.difference == 0.0
    assert found.p_value > 0.7


def test_paired_mean_difference_by_hand() -> None:
    small = (correct([1, 1, 0, 0] * 25), correct([1, 0, 0, 0] * 25), accuracy)
    flat = (correct([1, 0] * 10), correct([1, 0] * 10), accuracy)
    difference, error, p_value = paired_mean_difference([small, flat], samples=4000, seed=1)
    assert difference == pytest.approx(0.125)
    assert error == pytest.approx(math.sqrt(0.25 * 0.75 / 100) / 2, rel=0.05)
    assert p_value < 0.01
    alone = paired_difference(*small[:2], accuracy, samples=4000, seed=1)
    assert error == pytest.approx(alone.standard_error / 2, rel=0.05)


def test_subtasks_of_the_same_rows_are_resampled_independently() -> None:
    pair = (correct([1, 1, 0, 0] * 25), correct([1, 0, 0, 0] * 25), accuracy)
    one = paired_mean_difference([pair], samples=4000, seed=1).standard_error
    two = paired_mean_difference([pair, pair], samples=4000, seed=1).standard_error
    assert two == pytest.approx(one / math.sqrt(2), rel=0.07)


def test_mean_with_error() -> None:
    mean, error = mean_with_error([(0.5, 0.03), (0.7, 0.04)])
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(0.025)  # sqrt(.03^2 + .04^2) / 2
    assert mean_with_error([(0.4, 0.1)]) == (0.4, 0.1)


def test_row_values_of_accuracy_are_the_rows() -> None:
    right = [1.0, 0.0, 1.0, 1.0]
    assert row_values(correct(right), accuracy) == pytest.approx(right)
    assert row_values(correct([1.0]), accuracy) == pytest.approx([1.0])


def test_row_values_of_a_pooled_metric_give_its_error() -> None:
    counts = np.random.default_rng(0).integers(1, 4, (200, 3)).astype(float)
    values = row_values(counts, micro_f1)
    whole = micro_f1(counts.sum(axis=0, keepdims=True))[0]
    assert values.shape == (200,)
    assert values.mean() == pytest.approx(whole, abs=0.005)
    expected = standard_error(counts, micro_f1, samples=4000, seed=1)
    assert values.std(ddof=1) / math.sqrt(200) == pytest.approx(expected, rel=0.07)


def test_the_suites_metrics_fit_in() -> None:
    subtask = SUBTASKS["uabsa"]
    examples = [Example.create("embedded_uabsa", f"text {i}", [("it", "positive")] * (i % 3 > 0)) for i in range(60)]
    answers = ["[('it', 'positive')]"] * 60
    counts = row_counts(subtask, examples, answers)
    score = partial(score_from_counts, subtask, datasets_of(examples))
    assert 0.01 < standard_error(counts, score, seed=1) < 0.1
    assert row_values(counts, score).mean() == pytest.approx(0.8, abs=0.02)  # P = 2/3, R = 1


@pytest.mark.parametrize("counts", [np.zeros((0, 2)), np.zeros(3), np.zeros((2, 2, 2))])
def test_bad_counts_are_refused(counts: Array) -> None:
    with pytest.raises(DataError, match="at least one row"):
        standard_error(counts, accuracy, seed=1)
    with pytest.raises(DataError, match="at least one row"):
        row_values(counts, accuracy)


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="same rows"):
        paired_difference(correct([1, 0]), correct([1]), accuracy, seed=1)
    with pytest.raises(DataError, match="at least one pair"):
        paired_mean_difference([], seed=1)
    with pytest.raises(DataError, match="at least one score"):
        mean_with_error([])
    with pytest.raises(DataError, match="at least 2 samples"):
        standard_error(correct([1, 0]), accuracy, samples=1, seed=1)
