"""The champion gate: only what is better beyond noise is promoted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.errors import DataError
from memmcl.evaluate.promotion import Judgement, Pair, judge


def accuracy(summed: np.ndarray) -> np.ndarray:
    return summed[..., 0] / summed[..., 1]


def pair(challenger: list[int], champion: list[int]) -> Pair:
    ours, theirs = ([[right, 1] for right in rights] for rights in (challenger, champion))
    return Pair(ours, theirs, accuracy)


def judged(challenger: list[int], champion: list[int], margin: float = 2.0) -> Judgement:
    return judge({"sent2": pair(challenger, champion)}, margin=margin, samples=4000, seed=1)


def test_a_clear_gain_is_promoted() -> None:
    found = judged([1] * 80 + [0] * 20, [1] * 50 + [0] * 50)
    assert found.promoted
    assert found.reason.startswith("better than the champion by +0.300 ±")


def test_difference_and_error_are_those_of_the_paired_rows() -> None:
    """By hand: d = mean of row differences, its standard error sqrt(variance / n)."""
    ours, theirs = [1] * 80 + [0] * 20, [1] * 50 + [0] * 50
    differences = np.array(ours) - np.array(theirs)
    found = judged(ours, theirs)
    assert found.difference == pytest.approx(differences.mean())
    assert found.se == pytest.approx(differences.std() / math.sqrt(len(differences)), rel=0.05)
    (duel,) = found.duels
    assert (duel.challenger, duel.champion, duel.rows) == (0.8, 0.5, 100)
    assert duel.difference == pytest.approx(found.difference)


def test_a_gain_within_noise_is_not() -> None:
    found = judged([1, 0, 1, 1, 0, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0, 0, 1, 1])
    assert found.difference == pytest.approx(0.1)
    assert not found.promoted
    assert "not better than the champion beyond noise" in found.reason
    assert "wanted more than 2 standard errors" in found.reason


def test_a_loss_says_where_it_came_from() -> None:
    pairs = {"irony": pair([1] * 9 + [0], [1] * 9 + [0]), "sent2": pair([0] * 10, [1] * 10)}
    found = judge(pairs, margin=2.0, samples=200, seed=1)
    assert not found.promoted
    assert found.reason.startswith("worse than the champion beyond noise: -0.500")
    assert found.reason.endswith("most lost on sent2 (-1.000)")


@pytest.mark.parametrize("margin", [0.0, 2.0])
def test_the_same_answers_are_no_reason_to_change(margin: float) -> None:
    found = judged([1] * 5 + [0] * 5, [1] * 5 + [0] * 5, margin)
    assert not found.promoted


def test_the_margin_decides() -> None:
    ours, theirs = [1] * 12 + [0] * 8, [1] * 9 + [0] * 11
    ratio = judged(ours, theirs).difference / judged(ours, theirs).se
    assert judged(ours, theirs, margin=ratio * 0.9).promoted
    assert not judged(ours, theirs, margin=ratio * 1.1).promoted


def test_no_common_subtask_is_an_error() -> None:
    with pytest.raises(DataError, match="share no subtask"):
        judge({}, margin=2.0, samples=100, seed=0)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30), margin=st.floats(0, 4))
def test_champion_and_challenger_cannot_both_beat_each_other(rows: list[tuple[int, int]], margin: float) -> None:
    ours, theirs = ([row[i] for row in rows] for i in (0, 1))
    forth = judge({"a": pair(ours, theirs)}, margin=margin, samples=100, seed=3)
    back = judge({"a": pair(theirs, ours)}, margin=margin, samples=100, seed=3)
    assert not (forth.promoted and back.promoted)
    assert forth.promoted == (forth.difference > max(margin * forth.se, 1e-12))
