"""Difficulty of a subtask from its meta data: d_t = sum_j w_j z_j(t) / sum_j w_j (METHOD.md 'Difficulty').

That a difficulty is a weighted score of meta data is published; the features, their scaling and their weights
are our decision [ours]. z_j is feature j scaled to [0, 1] over the suite at hand, so d_t lies in [0, 1] and
compares subtasks of one suite only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memmcl.errors import ConfigError, DataError
from memmcl.seeds import derive
from memmcl.suite.subtasks import POLARITIES, Subtask

if TYPE_CHECKING:
    from memmcl.suite.examples import Example

# [ours] What the answer must hold weighs most (its arity, how many tuples, how many classes, whether it is
# meant literally); label entropy repeats much of the number of classes, and surface properties of the text
# count half.
DEFAULT_WEIGHTS: dict[str, float] = {
    "classes": 1.0,
    "answer_arity": 1.5,
    "tuples_per_row": 1.0,
    "label_entropy": 0.5,
    "diversity": 0.5,
    "mean_length": 0.5,
    "needs_target": 0.5,
    "figurative": 1.0,
}

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DifficultyReport:
    """One subtask's difficulty in [0, 1] and where it comes from; the keys are those of `DEFAULT_WEIGHTS`.

    raw: the features in their own units; scaled: the same in [0, 1] over the suite; weighted: their shares of
    `difficulty`, which is their sum.
    """

    subtask: str
    raw: dict[str, float]
    scaled: dict[str, float]
    weighted: dict[str, float]
    difficulty: float


def difficulties(
    subtasks: Sequence[Subtask], examples: Mapping[str, Sequence[Example]], weights: Mapping[str, float] | None = None
) -> dict[str, DifficultyReport]:
    """Return a report per subtask name, in the order of `subtasks`.

    examples: train rows per subtask name. weights: replaces entries of `DEFAULT_WEIGHTS`. A feature that all subtasks
    share scales to 0, so that a single subtask has the difficulty 0.

    Raises:
        ConfigError: a weight of an unknown feature, a negative or non-finite one, or only zeros.
        DataError: no subtasks, or a subtask without rows or without a single word.
    """
    weight = _check_weights(weights or {})
    if not subtasks:
        raise DataError("difficulty needs at least one subtask, got none")
    words = {subtask.name: _words(subtask.name, examples.get(subtask.name, ())) for subtask in subtasks}
    shortest = min(len(tokens) for tokens in words.values())
    raw = {
        subtask.name: _features(subtask, examples[subtask.name], words[subtask.name][:shortest]) for subtask in subtasks
    }
    total = sum(weight.values())
    reports = {}
    for name, features in raw.items():
        scaled = {}
        for feature, value in features.items():
            column = [other[feature] for other in raw.values()]
            low, high = min(column), max(column)
            scaled[feature] = (value - low) / (high - low) if high > low else 0.0
        weighted = {feature: weight[feature] * scaled[feature] / total for feature in weight}
        reports[name] = DifficultyReport(name, features, scaled, weighted, sum(weighted.values()))
    return reports


def order_subtasks(difficulties: Mapping[str, float]) -> tuple[str, ...]:
    """Return the names of `difficulties` in the curriculum's order: the easiest first, equals by name."""
    return tuple(sorted(difficulties, key=lambda name: (difficulties[name], name)))


def label_entropy(labels: Sequence[str]) -> float:
    """Return the entropy of `labels`' distribution in bits; 0 for no labels."""
    counts = np.array(list(Counter(labels).values()), dtype=np.float64)
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # H = -sum p log2 p; + 0.0 turns -0.0 into 0.0


def _features(subtask: Subtask, rows: Sequence[Example], words: Sequence[str]) -> dict[str, float]:
    """Raw features; `words` are as many for every subtask, since type/token falls with the amount of text."""
    if subtask.is_tuple:
        fields = subtask.tuple_fields
        items = [item for row in rows if not isinstance(row.gold, str) for item in row.gold]
        places = [place for place, field in enumerate(fields) if field == "polarity"]
        labels = [item[place] for item in items for place in places]
        classes, arity, per_row = len(POLARITIES) if places else 0, len(fields), len(items) / len(rows)
    else:
        labels = [row.gold for row in rows if isinstance(row.gold, str)]
        classes, arity, per_row = len(subtask.labels), 1, 1.0
    return {
        "classes": float(classes),
        "answer_arity": float(arity),
        "tuples_per_row": per_row,
        "label_entropy": label_entropy(labels),
        "diversity": len(set(words)) / len(words),
        "mean_length": sum(len(_WORD.findall(row.text)) for row in rows) / len(rows),
        "needs_target": float(bool(subtask.needs)),
        "figurative": float(bool(subtask.figurative)),
    }


def _words(name: str, rows: Sequence[Example]) -> list[str]:
    """All lower-cased words, row after row in an order that depends on the rows' ids alone."""
    ordered = sorted(rows, key=lambda row: (derive(0, "difficulty", row.id), row.text))
    words = [word for row in ordered for word in _WORD.findall(row.text.lower())]
    if not words:
        raise DataError(f"subtask {name} has {len(rows)} train rows and no words; difficulty needs some text")
    return words


def _check_weights(changed: Mapping[str, float]) -> dict[str, float]:
    unknown = sorted(set(changed) - set(DEFAULT_WEIGHTS))
    if unknown:
        raise ConfigError(f"unknown difficulty weights {unknown}; known are {', '.join(DEFAULT_WEIGHTS)}")
    weight = {**DEFAULT_WEIGHTS, **changed}
    if not all(np.isfinite(value) and value >= 0 for value in weight.values()):
        raise ConfigError(f"difficulty weights must be finite and not negative, got {dict(changed)}")
    if sum(weight.values()) == 0:
        raise ConfigError("all difficulty weights are 0; give at least one feature a weight")
    return weight
