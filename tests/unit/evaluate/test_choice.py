"""What labels have of each other's probability, against plain passes over all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import answer_logits, backbone_of, corpus, plain_model, prompter_of

from memmcl.errors import SearchError
from memmcl.evaluate.choice import Branches, Choices
from memmcl.evaluate.teacher_forced import TeacherForced
from memmcl.suite.subtasks import SUBTASKS, Subtask

NESTED = replace(SUBTASKS["emotion"], labels=("very sad", "very very glad", "very very calm", "glad", "sad"))
"""Labels of which three begin alike, and two of these go on alike."""


def shares_of(tiny_base: Path, subtask: Subtask, count: int, calibrated: bool) -> dict[str, np.ndarray]:
    """Return, by label, its log-share in each row, as if it were the row's answer."""
    backbone, prompter, rows = backbone_of(tiny_base, 2), prompter_of(tiny_base), corpus("emotion", count)
    found = {}
    for label in subtask.labels:
        forced = TeacherForced(backbone, prompter, subtask, rows, [label] * count, ends=[1, count])
        parts = [part.choices for part in forced.segments() if part.choices]
        found[label] = Choices.joined(parts).logshares(calibrated)
    return found


@pytest.mark.parametrize("subtask", [SUBTASKS["emotion"], NESTED], ids=["emotion", "nested"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_shares_of_all_labels_make_one(tiny_base: Path, subtask: Subtask, calibrated: bool) -> None:
    found = shares_of(tiny_base, subtask, 5, calibrated)
    np.testing.assert_allclose(sum(np.exp(share) for share in found.values()), 1.0, atol=1e-5)


def test_shares_are_those_of_answering_with_labels_alone(tiny_base: Path) -> None:
    """Token by token from whole distributions in float64, every token that leads to no label struck out."""
    model, prompter, rows = plain_model(tiny_base), prompter_of(tiny_base), corpus("emotion", 4)
    labels = {label: prompter.answer(label, NESTED) for label in NESTED.labels}
    assert len({ids[0] for ids in labels.values()}) < len(labels), "some begin alike"
    found = shares_of(tiny_base, NESTED, 4, calibrated=False)
    for at, row in enumerate(rows):
        for label, ids in labels.items():
            with torch.no_grad():
                logits = answer_logits(model, prompter.prompt(NESTED, row), ids).double()
            expected = 0.0
            for place, token in enumerate(ids):
                allowed = sorted({one[place] for one in labels.values() if one[:place] == ids[:place]})
                expected += float(logits[place, allowed].log_softmax(-1)[allowed.index(token)])
            assert found[label][at] == pytest.approx(expected, abs=1e-4)


def test_calibration_takes_what_all_rows_say_alike() -> None:
    """A bias of one label in every row changes nothing then, and only then."""
    draw = np.random.default_rng(0)
    choices = Choices(draw.normal(size=(7, 3)), draw.integers(0, 3, 7), -draw.random(7))
    biased = replace(choices, first=choices.first + np.array([2.0, 0.0, -1.0]))
    np.testing.assert_allclose(biased.logshares(calibrated=True), choices.logshares(calibrated=True))
    assert (biased.logshares(calibrated=False) != choices.logshares(calibrated=False)).all()


def test_an_answer_that_is_no_label_is_refused() -> None:
    with pytest.raises(SearchError, match="1 of 2 answers are none of the subtask's 2 labels"):
        Branches([(1, 9), (2, 9)], [(1, 9), (3, 9)])
