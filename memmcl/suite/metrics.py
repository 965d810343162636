"""SentiEval's metrics, and the counts per row from which a bootstrap gets them by a matrix product.

Reference: Zhang et al., "Sentiment Analysis in the Era of Large Language Models: A Reality Check" (NAACL
Findings 2024) and its evaluation script. Where we differ, on purpose: an answer is read with `ast.literal_eval`
instead of `eval`, and not at all beyond `parsing.MAX_LITERAL` characters; where the script fails we answer: golds
may hold lists in place of tuples, as JSON does, an F1 of a label that is neither gold nor predicted is 0 (irony,
stance), and no rows are a `DataError`.

Every metric is a function of counts summed over rows, so a score is always `score_from_counts(summed
row_counts)`. Columns of one data set's counts, n being the number of rows:

    accuracy             n, right answers
    macro_f1, label_f1   n, then per scored label: right answers, predicted, gold
    tuple_f1             n, true positives, false positives, false negatives
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memmcl.errors import DataError, shown
from memmcl.suite.examples import Example, format_tuples
from memmcl.suite.parsing import read_list, read_literal
from memmcl.suite.subtasks import SUBTASKS, Subtask

Floats = NDArray[np.float64]

EPSILON = 1e-7  # what SentiEval adds to the denominators of tuple precision, recall and F1

_MOST_FREQUENT = 20

DATASETS = {dataset: subtask for subtask in SUBTASKS.values() for dataset in subtask.datasets}
"""The subtask that scores each of SentiEval's 26 data sets."""


def subtask_of(dataset: str) -> Subtask:
    """Return the subtask of a data set: one of SentiEval's, or "embedded_SUBTASK". Raises DataError for any other."""
    if dataset in DATASETS:
        return DATASETS[dataset]
    name = dataset.removeprefix("embedded_")
    if name != dataset and name in SUBTASKS:
        return SUBTASKS[name]
    raise DataError(
        f"no metric for data set {shown(dataset)}; expected embedded_SUBTASK or one of SentiEval's: "
        f"{', '.join(DATASETS)}"
    )


def score(dataset: str, predictions: Sequence[str], golds: Sequence[Any]) -> float:
    """Return SentiEval's score of `dataset`, in [0, 1].

    predictions: the answers as text. golds, one each: a label; or a list, tuple or set of tuples (or lists), or its
    text as Python writes it.

    Raises:
        DataError: unknown data set, no rows, unequal lengths, or gold tuples that are none.
    """
    _check_lengths(len(golds), len(predictions))
    subtask = subtask_of(dataset)
    counts = np.array([_counts(subtask, gold, answer) for gold, answer in zip(golds, predictions, strict=True)])
    return float(_score_block(subtask, counts.sum(axis=0)))


def score_subtask(subtask: Subtask, examples: Sequence[Example], predictions: Sequence[str]) -> float:
    """Return the mean score of the data sets in `examples`. Raises DataError for no examples, or unequal lengths."""
    counts = row_counts(subtask, examples, predictions)
    return float(score_function(subtask, examples)(counts.sum(axis=0)))


def score_function(subtask: Subtask, examples: Iterable[Example]) -> Callable[[Floats], Floats]:
    """Return `score_from_counts` for the data sets in `examples`: what a bootstrap scores resampled counts by."""
    return partial(score_from_counts, subtask, datasets_of(examples))


def datasets_of(examples: Iterable[Example]) -> tuple[str, ...]:
    """Return the names of the data sets in `examples`, sorted: the order of the blocks in `row_counts`."""
    return tuple(sorted({example.dataset for example in examples}))


def row_counts(subtask: Subtask, examples: Sequence[Example], predictions: Sequence[str]) -> Floats:
    """Return the sufficient statistics per row: (rows, data sets * columns) float64, whole numbers.

    A row fills the block of its own data set (`datasets_of` gives their order) and holds zeros elsewhere.
    For a bootstrap: `score_from_counts(subtask, datasets, weights @ counts)`, weights (resamples, rows)
    being how often a row was drawn.

    Raises:
        DataError: no examples, or unequal lengths.
    """
    _check_lengths(len(examples), len(predictions))
    width = _width(subtask)
    offsets = {name: index * width for index, name in enumerate(datasets_of(examples))}
    counts = np.zeros((len(examples), len(offsets) * width))
    for row, (example, answer) in enumerate(zip(examples, predictions, strict=True)):
        offset = offsets[example.dataset]
        counts[row, offset : offset + width] = _counts(subtask, example.gold, answer)
    return counts


def score_from_counts(subtask: Subtask, datasets: Sequence[str], summed: Floats) -> Floats:
    """Return the subtask's score for counts summed over rows.

    summed: (..., data sets * columns) float64; returns (...) float64. A data set without a row in a resample
    takes no part in that resample's mean; where none has a row the score is 0.
    """
    blocks = summed.reshape(*summed.shape[:-1], len(datasets), _width(subtask))
    present = blocks[..., 0] > 0
    scores = np.where(present, _score_block(subtask, blocks), 0.0)
    return np.asarray(scores.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1))


def balanced_accuracy(golds: Sequence[str], predictions: Sequence[str]) -> float:
    """Return the mean over gold labels of the share answered right. Raises DataError for no rows, unequal lengths."""
    _check_lengths(len(golds), len(predictions))
    forms = [_form(gold) for gold in golds]
    total = Counter(forms)
    right = Counter(gold for gold, answer in zip(forms, predictions, strict=True) if gold == _form(answer))
    return float(np.mean([right[label] / total[label] for label in total]))


def best_constant(subtask: Subtask, train: Sequence[Example], test: Sequence[Example]) -> tuple[str, float]:
    """Return the one answer that scores best on all `train` rows, and its score on the `test` rows.

    Candidates are the labels, or for tuples "[]" and the 20 most frequent answers; of equals the first one wins.
    Raises DataError if `train` or `test` is empty.
    """
    if subtask.is_tuple:
        frequent = Counter(example.answer for example in train).most_common(_MOST_FREQUENT)
        candidates = list(dict.fromkeys([format_tuples(()), *(answer for answer, _ in frequent)]))
    else:
        candidates = list(subtask.labels)
    best = max(candidates, key=lambda answer: score_subtask(subtask, train, [answer] * len(train)))
    return best, score_subtask(subtask, test, [best] * len(test))


def _width(subtask: Subtask) -> int:
    """Return the number of columns of one data set's counts."""
    return {"accuracy": 2, "tuple_f1": 4}.get(subtask.metric, 1 + 3 * len(subtask.scored_labels))


def _counts(subtask: Subtask, gold: Any, answer: str) -> list[int]:
    """Return one row's counts; the columns are in the module's docstring."""
    if subtask.metric == "tuple_f1":
        expected, predicted = _gold_tuples(gold), _predicted_items(answer)
        return [1, len(expected & predicted), len(predicted - expected), len(expected - predicted)]
    right = _form(answer) == _form(gold)
    if subtask.metric == "accuracy":
        return [1, int(right)]
    counts = [1]
    for label in subtask.scored_labels:
        predicted_it, is_gold = _form(answer) == _form(label), _form(gold) == _form(label)
        counts += [int(predicted_it and is_gold), int(predicted_it), int(is_gold)]
    return counts


def _score_block(subtask: Subtask, summed: Floats) -> Floats:
    """Return the score of one data set's summed counts: (..., columns) -> (...)."""
    rows = np.maximum(summed[..., 0], 1)
    if subtask.metric == "accuracy":
        return np.asarray(summed[..., 1] / rows)
    if subtask.metric == "tuple_f1":
        true, false, missed = summed[..., 1], summed[..., 2], summed[..., 3]
        precision = true / (true + false + EPSILON)
        recall = true / (true + missed + EPSILON)
        return np.asarray(2 * precision * recall / (precision + recall + EPSILON))
    right, predicted, gold = (summed[..., column::3] for column in (1, 2, 3))
    f1 = 2 * right / np.maximum(predicted + gold, 1)  # 0 where a label is neither predicted nor gold
    return np.asarray(f1.mean(axis=-1))


def _form(label: object) -> str:
    # numpy, and so the scikit-learn that SentiEval asks, does not see NULs at the end of a string.
    return str(label).lower().strip().rstrip("\0")


def _gold_tuples(gold: Any) -> set[Hashable]:
    items: Any = read_literal(gold) if isinstance(gold, str) else gold
    try:
        if isinstance(items, list | tuple | set | frozenset):
            return {_frozen(item) for item in items}
    except (TypeError, RecursionError):
        pass
    raise DataError(
        f"expected gold tuples as a list, or its text as Python writes it; got {shown(gold, 60)}; correct the row"
    )


def _frozen(item: Any) -> Hashable:
    """Return `item` with lists as tuples: JSON knows no tuples."""
    return tuple(map(_frozen, item)) if isinstance(item, list | tuple) else item


def _predicted_items(answer: str) -> set[Hashable]:
    """Return the items of the answer as a set; anything but a list of hashable items is an empty answer."""
    items: list[Any] | None = read_list(answer)
    try:
        return set(items or ())
    except TypeError:  # a list among the items, as in [["food", "positive"]]
        return set()


def _check_lengths(golds: int, predictions: int) -> None:
    if golds != predictions:
        raise DataError(f"expected one prediction per row; got {predictions} for {golds} rows")
    if not golds:
        raise DataError("no rows to score; a score needs at least one")
