"""Fitness of a candidate from its scores per subtask (METHOD.md 'Fitness'; all of it our decision, [ours]).

Fitness is maximised: the mean over subtasks of retention, the share of its own expert's score that a
candidate keeps. The third kind, agreement with the expert, is measured where rows are run:
`memmcl.evaluate.teacher_forced`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from memmcl.errors import SearchError

FLOOR = 0.05
CLIP = 1.2


def retention(score: float, reference: float, floor: float = FLOOR, clip: float = CLIP) -> float:
    """Return score / max(reference, floor), at most `clip`; `reference` is the subtask's own expert's score.

    The floor keeps a useless expert from making every candidate look excellent; the clip keeps one subtask
    from paying for the loss of another. NaN in, NaN out (it becomes -inf where fitness is told).
    """
    return min(score / max(reference, floor), clip)  # [ours] `metric` retention; min of NaN and a number is NaN


def loglik_retention(mean_logprob: float, reference_logprob: float, clip: float = CLIP) -> float:
    """Return exp(mean_logprob - reference_logprob), at most `clip`: smooth where a metric moves in steps.

    Both are mean gold log-probabilities per answer token (nats): the candidate's and its expert's.
    """
    difference = mean_logprob - reference_logprob  # [ours] `loglik` retention
    return clip if difference >= math.log(clip) else math.exp(difference)  # the clip before exp can overflow


def fitness(values: Mapping[str, float]) -> float:
    """Return the mean over subtasks of `values` (subtask -> retention), whatever their order.

    Raises:
        SearchError: no values.
    """
    if not values:
        raise SearchError("a fitness needs at least one subtask, got none; is the weak set empty?")
    return math.fsum(values.values()) / len(values)  # [ours] fsum is exact: the order of subtasks cannot matter


def blended(kinds: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the mean of one subtask's kinds of fitness by weight; kinds without a weight count if none has one.

    A kind that is not measured yet, as the metric of a candidate in a race, is left out of the mean.

    Raises:
        SearchError: no kinds.
    """
    if not kinds:
        raise SearchError("a blend of fitness needs at least one kind, got none")
    used = {kind: weights[kind] for kind in kinds if kind in weights} or dict.fromkeys(kinds, 1.0)
    return math.fsum(kinds[kind] * weight for kind, weight in used.items()) / math.fsum(used.values())


def shrunk(value: float, coefficients: Iterable[Sequence[float]], shrink: float) -> float:
    """Return a fitness less `shrink` times the mean squared coefficient: against over-fitting to a small weak set."""
    squares = [coefficient**2 for row in coefficients for coefficient in row]
    return value - shrink * math.fsum(squares) / max(len(squares), 1)  # [ours] ridge on the coefficients


def nai(merged: float, base: float, expert: float) -> float | None:
    """Return the normalised accuracy improvement (merged - base) / (expert - base), or None.

    0 is the base, 1 its expert. It has no meaning where expert and base differ by less than 1e-9 or a score
    is not finite. Reported beside retention, which a strong base makes look good without any merging.
    """
    if not all(math.isfinite(score) for score in (merged, base, expert)) or abs(expert - base) < 1e-9:
        return None
    return (merged - base) / (expert - base)
