"""The champion gate: a challenger takes the champion's place only when it is better beyond noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from memmcl.errors import DataError
from memmcl.evaluate import bootstrap


class Pair(NamedTuple):
    """Both models on one subtask's test rows: counts (rows, k) each, and the score of summed counts (samples, k)."""

    challenger: npt.ArrayLike
    champion: npt.ArrayLike
    score: bootstrap.ScoreFunction


@dataclass(frozen=True)
class SubtaskDuel:
    """One subtask: both scores, and their paired difference (challenger - champion) with its standard error."""

    subtask: str
    rows: int
    challenger: float
    champion: float
    difference: float
    se: float


@dataclass(frozen=True)
class Judgement:
    """What the gate says: the paired difference of the means over subtasks, and whether it is beyond the margin."""

    promoted: bool
    reason: str
    difference: float
    se: float
    p: float
    margin: float
    duels: tuple[SubtaskDuel, ...]


def judge(pairs: Mapping[str, Pair], *, margin: float, samples: int, seed: int) -> Judgement:
    """Compare the means over subtasks on the same rows; promote when difference > margin * standard error.

    pairs: by subtask. The error is that of `bootstrap.paired_mean_difference`. Equal means are never enough.

    Raises:
        DataError: no pairs, or counts over different rows.
    """
    if not pairs:
        raise DataError("champion and challenger share no subtask; a champion of another name may hold other subtasks")
    names = sorted(pairs)
    overall = bootstrap.paired_mean_difference([pairs[name] for name in names], samples=samples, seed=seed)
    duels = tuple(_duel(name, pairs[name], samples, seed) for name in names)
    promoted = overall.difference > max(margin * overall.standard_error, 1e-12)
    return Judgement(promoted, _reason(promoted, overall, margin, duels), *overall, margin, duels)


def _duel(name: str, pair: Pair, samples: int, seed: int) -> SubtaskDuel:
    paired = bootstrap.paired_difference(*pair, samples=samples, seed=seed)
    counts = [np.asarray(one, dtype=np.float64) for one in (pair.challenger, pair.champion)]
    challenger, champion = (bootstrap.score_of(pair.score, rows) for rows in counts)
    return SubtaskDuel(name, len(counts[0]), challenger, champion, paired.difference, paired.standard_error)


def _reason(promoted: bool, overall: bootstrap.Difference, margin: float, duels: tuple[SubtaskDuel, ...]) -> str:
    rows = sum(duel.rows for duel in duels)
    facts = f"{overall.difference:+.3f} ± {overall.standard_error:.3f} over {len(duels)} subtasks, {rows} rows"
    if promoted:
        return f"better than the champion by {facts}"
    worst = min(duels, key=lambda duel: duel.difference)
    lost = f"; most lost on {worst.subtask} ({worst.difference:+.3f})" if worst.difference < 0 else ""
    which = "worse than" if overall.difference < 0 else "not better than"
    return f"{which} the champion beyond noise: {facts}, wanted more than {margin:g} standard errors{lost}"
