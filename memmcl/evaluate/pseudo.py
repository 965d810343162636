"""Labels for weak rows that have none: an expert's own answers, kept where it is confident."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from memmcl.errors import DataError
from memmcl.evaluate import calibration
from memmcl.suite.examples import Example, format_tuples
from memmcl.suite.parsing import parse_tuples, read_list
from memmcl.suite.subtasks import POLARITIES

if TYPE_CHECKING:
    from memmcl.evaluate.scoring import Probe

Labelled = tuple[str, float]
"""An answer, and the confidence in it, in [0, 1]; 0 where the answer cannot be used."""


def label_rows(probe: Probe, offsets: npt.ArrayLike | None = None) -> list[Labelled]:
    """Return an answer and its confidence for every row of `probe`, under the current weights.

    Labels: the best label by scores less `offsets` ((labels,), None for none), and its softmax share over the labels.
    Tuples: the generated answer as `format_tuples` writes it, and exp of its mean log-probability per token, end token
    included; 0 for one that cannot be read, or has an unknown polarity. The examples' own golds play no part.

    Raises:
        DataError: scores that are not finite, or offsets of another shape.
    """
    if probe.subtask.is_tuple:
        return _label_tuples(probe)
    scores = probe.label_scores()
    shifted = calibration.apply(scores, np.zeros(scores.shape[1]) if offsets is None else offsets)
    shares = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return [(probe.subtask.labels[row.argmax()], float(row.max())) for row in shares]


def keep_confident(
    examples: Sequence[Example], labelled: Sequence[Labelled], *, keep: int, is_tuple: bool
) -> list[Example]:
    """Return the `keep` most confident of `examples`, with their answers as gold; fewer where there are not enough.

    The answers take turns, so that one does not take all: label by label, or answers with and without a tuple. Among
    equals the earlier row comes first; rows come in drawing order. A row of confidence 0 is never kept.

    Raises:
        DataError: not one answer per example.
    """
    if len(examples) != len(labelled):
        raise DataError(f"expected one answer per row; got {len(labelled)} for {len(examples)} rows")
    queues: dict[str | bool, list[int]] = {}
    for row in sorted(range(len(labelled)), key=lambda row: -labelled[row][1]):
        answer, confidence = labelled[row]
        if confidence > 0:
            queues.setdefault(answer == format_tuples(()) if is_tuple else answer, []).append(row)
    longest = max(map(len, queues.values()), default=0)
    turns = [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]
    return [_answered(examples[row], labelled[row][0], is_tuple) for row in turns[:keep]]


def _label_tuples(probe: Probe) -> list[Labelled]:
    fields, texts = probe.subtask.tuple_fields, probe.answers()
    polarities = [place for place, name in enumerate(fields) if name == "polarity"]
    labelled: list[Labelled] = []
    for text, logprob in zip(texts, probe.answer_logprobs(texts), strict=True):
        parsed = parse_tuples(text, len(fields), fields)
        known = all(item[place] in POLARITIES for item in parsed.tuples for place in polarities)
        usable = known and not parsed.rejected
        labelled.append((format_tuples(parsed.tuples), float(np.exp(logprob)) if usable else 0.0))
    return labelled


def _answered(example: Example, answer: str, is_tuple: bool) -> Example:
    # `label_rows` wrote the list itself, so that it always reads back.
    gold = cast(list[Sequence[str]], read_list(answer)) if is_tuple else answer
    return Example.create(example.dataset, example.text, gold, example.fields)
