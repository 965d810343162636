"""The context gate."""

from __future__ import annotations

import numpy as np
import pytest

from memmcl.curriculum import Option, choose
from memmcl.errors import ConfigError, DataError


def option(kind: str, right: list[int], *, calibrated: bool = False, tokens: int = 0) -> Option:
    return Option(kind, calibrated, float(np.mean(right)), np.array(right, dtype=float), tokens)


ZERO = option("zero-shot", [0, 0, 0, 0, 1, 1, 1, 1])


def test_zero_shot_stays_unless_beaten_by_more_than_the_margin() -> None:
    # difference per row: 1, 1, 0 x 6; mean .25, s = .4629, s / sqrt(8) = .16366: 1.5275 standard errors
    better = option("curriculum", [1, 1, 0, 0, 1, 1, 1, 1], tokens=90)
    assert choose([ZERO, better], margin=1.5) is better
    assert choose([ZERO, better], margin=1.55) is ZERO
    assert choose([better, ZERO], margin=1.5) is better


def test_a_worse_or_equal_option_never_wins() -> None:
    worse = option("own-shots", [0, 0, 0, 0, 0, 1, 1, 1])
    equal = option("random", [1, 0, 0, 0, 0, 1, 1, 1])
    assert choose([ZERO, worse, equal], margin=0.0) is ZERO
    assert choose([ZERO], margin=1.0) is ZERO


def test_the_best_of_those_that_beat_it_wins_and_ties_go_to_fewer_tokens() -> None:
    good = option("own-shots", [1, 1, 1, 0, 1, 1, 1, 1], tokens=50)
    best = option("curriculum", [1] * 8, tokens=200)
    cheap = option("reversed", [1] * 8, tokens=120)
    calibrated = option("random", [1] * 8, calibrated=True, tokens=120)
    assert choose([ZERO, good, best], margin=1.0) is best
    assert choose([ZERO, good, best, calibrated, cheap], margin=1.0) is cheap


def test_calibrated_zero_shot_must_beat_it_too() -> None:
    calibrated = option("zero-shot", [1, 0, 0, 0, 1, 1, 1, 1], calibrated=True)  # one standard error
    assert choose([ZERO, calibrated], margin=1.1) is ZERO
    assert choose([ZERO, calibrated], margin=0.9) is calibrated
    assert choose([ZERO, calibrated], margin=9.0, calibrated=True) is calibrated
    worse = option("zero-shot", [0] * 8, calibrated=True)
    assert choose([ZERO, worse], margin=1.1, calibrated=True) is ZERO


def test_a_noisy_higher_score_does_not_shadow_a_sure_one() -> None:
    zero = Option("zero-shot", False, 0.0, np.zeros(4), 0)
    noisy = Option("random", False, 0.3, np.array([3.0, -2.0, 2.0, -1.8]), 0)
    sure = Option("own-shots", False, 0.2, np.full(4, 0.2), 0)
    assert choose([zero, noisy, sure], margin=1.0) is sure


def test_one_row_decides_nothing() -> None:
    zero, other = (
        Option(kind, False, score, np.array([score]), 0) for kind, score in [("zero-shot", 0.0), ("random", 1.0)]
    )
    assert choose([zero, other], margin=0.0) is zero
    assert choose([zero, other], margin=1.0) is zero


def test_the_chosen_score_is_never_below_zero_shots() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        options = [option("zero-shot", list(rng.integers(0, 2, 12)))]
        options += [option("random", list(rng.integers(0, 2, 12)), calibrated=True) for _ in range(4)]
        assert choose(options, margin=float(rng.uniform(0, 2))).score >= options[0].score


def test_bad_options_are_refused() -> None:
    with pytest.raises(DataError, match="exactly one uncalibrated"):
        choose([option("own-shots", [1, 0])], margin=1.0)
    with pytest.raises(DataError, match="exactly one uncalibrated"):
        choose([ZERO, ZERO], margin=1.0)
    with pytest.raises(DataError, match="same rows"):
        choose([ZERO, option("random", [1, 0])], margin=1.0)
    with pytest.raises(DataError, match="not empty"):
        choose([Option("zero-shot", False, 0.0, np.array([]), 0)], margin=1.0)
    with pytest.raises(ConfigError, match="margin"):
        choose([ZERO], margin=-0.1)
