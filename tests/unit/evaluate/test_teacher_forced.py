"""Given answers in segments: sums against one plain pass a row, agreement against whole distributions in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from tiny import backbone_of, corpus, naive_logprob, random_factors
from torch import nn

from memmcl.backbone.batches import Batch
from memmcl.backbone.forward import Backbone
from memmcl.errors import SearchError
from memmcl.evaluate.teacher_forced import Distributions, SegmentValues, TeacherForced, js_divergence
from memmcl.merge.build import Merger
from memmcl.suite.examples import Example
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import SUBTASKS

WHOLE = 600
"""More tokens than the tiny vocabulary has."""


@pytest.fixture(scope="module", params=[0, 2])
def backbone(request: pytest.FixtureRequest, tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, request.param)


def rows_of(name: str, count: int) -> list[Example]:
    return corpus(name, count)


@pytest.mark.parametrize("name", ["emotion", "uabsa"])
@pytest.mark.parametrize("ends", [[6], [1, 4, 6], [1, 2, 3, 4, 5, 6]])
def test_sums_in_segments_equal_one_plain_pass_a_row(
    backbone: Backbone, model: nn.Module, prompter: Prompter, name: str, ends: list[int]
) -> None:
    rows, subtask = rows_of(name, 6), SUBTASKS[name]
    answers = [row.answer for row in rows]
    segments = list(TeacherForced(backbone, prompter, subtask, rows, answers, ends=ends).segments())
    assert [len(segment.logprobs) for segment in segments] == np.diff([0, *ends]).tolist()
    ids = [prompter.answer(answer, subtask) for answer in answers]
    expected = [naive_logprob(model, prompter.prompt(subtask, row), one) for row, one in zip(rows, ids, strict=True)]
    np.testing.assert_allclose(np.concatenate([segment.logprobs for segment in segments]), expected, rtol=0, atol=1e-4)
    assert np.concatenate([segment.tokens for segment in segments]).tolist() == list(map(len, ids))
    assert all(segment.agreement is None for segment in segments)


def test_segments_that_nobody_asks_for_are_not_run(
    backbone: Backbone, prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of("emotion", 6)
    forced = TeacherForced(backbone, prompter, SUBTASKS["emotion"], rows, [row.answer for row in rows], ends=[2, 6])
    run: list[int] = []
    top = Backbone.top

    def counted(self: Backbone, hidden: torch.Tensor, batch: Batch, cache: None = None) -> torch.Tensor:
        run.append(len(set(batch.owners[:, 0].tolist())))
        return top(self, hidden, batch, cache)

    monkeypatch.setattr(Backbone, "top", counted)
    next(forced.segments())
    assert run == [2]


@pytest.mark.parametrize("size", [1, 90, 150, 2048])
def test_rows_that_are_too_many_for_one_pack_are_run_in_several(
    backbone: Backbone, prompter: Prompter, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of("uabsa", 7)
    answers = [row.answer for row in rows]

    def measured() -> list[SegmentValues]:
        expert = TeacherForced(backbone, prompter, SUBTASKS["uabsa"], rows, answers).distributions(5)
        forced = TeacherForced(backbone, prompter, SUBTASKS["uabsa"], rows, answers, ends=[3, 7], expert=expert)
        return list(forced.segments())

    whole = measured()
    monkeypatch.setattr("memmcl.evaluate.teacher_forced.PACK", size)
    for one, other in zip(measured(), whole, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_allclose(one.agreement, other.agreement, atol=1e-5)
        assert (one.tokens == other.tokens).all()


@pytest.mark.parametrize("top", [3, WHOLE])
@pytest.mark.parametrize("name", ["emotion", "uabsa"])
def test_agreement_is_that_of_whole_distributions_or_above(
    tiny_base: Path, model: nn.Module, prompter: Prompter, name: str, top: int
) -> None:
    backbone = backbone_of(tiny_base, 2)
    rows, subtask = rows_of(name, 5), SUBTASKS[name]
    answers = [row.answer for row in rows]
    merger = Merger(backbone, {"one": random_factors(tiny_base, layers=(2, 3), seed=3)}, blocks=1)
    merger.apply({"one": (1.0,)})
    expert = TeacherForced(backbone, prompter, subtask, rows, answers).distributions(top)
    whole = TeacherForced(backbone, prompter, subtask, rows, answers).distributions(WHOLE)
    forced = TeacherForced(backbone, prompter, subtask, rows, answers, ends=[2, 5], expert=expert)
    same = np.concatenate([segment.agreement for segment in forced.segments()])  # type: ignore[misc]
    np.testing.assert_allclose(same, 1.0, atol=1e-5)
    merger.reset()
    found = np.concatenate([segment.agreement for segment in forced.segments()])  # type: ignore[misc]

    expected, at = [], 0
    for row, answer in zip(rows, answers, strict=True):
        ids = prompter.answer(answer, subtask)
        prompt = prompter.prompt(subtask, row)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :].double()
        q = logits.softmax(-1).numpy()
        p = np.zeros_like(q)
        np.put_along_axis(p, whole.ids[at : at + len(ids)].numpy(), whole.logprobs[at : at + len(ids)].exp().numpy(), 1)
        expected.append(1.0 - np.mean(jensenshannon(p, q, base=2, axis=1) ** 2))
        at += len(ids)
    if top == WHOLE:
        np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        assert (found >= np.array(expected) - 1e-6).all()
        assert found.max() < 0.999
        assert not np.allclose(found, expected, atol=1e-3), "three tokens do not tell all"


def test_divergence_of_known_and_of_merged_outcomes() -> None:
    p = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.3, 0.3]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.25], [0.0, 1.0], [0.1, 0.2]], dtype=torch.float64)
    expected = [0.0, 1.0, jensenshannon([0.3, 0.3, 0.4], [0.1, 0.2, 0.7], base=2) ** 2]
    np.testing.assert_allclose(js_divergence(p.log(), q.log()).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ends": [1, 2]}, "the last at all rows"),
        ({"ends": [2, 1, 3]}, "rising"),
        ({"answers": ["joy"]}, "an answer for each of 3 rows"),
        ({"expert": Distributions(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))}, "other rows or answers"),
    ],
)
def test_what_does_not_fit_the_rows_is_refused(
    backbone: Backbone, prompter: Prompter, change: dict[str, object], message: str
) -> None:
    rows = rows_of("emotion", 3)
    arguments = {"answers": [row.answer for row in rows], **change}
    with pytest.raises(SearchError, match=message):
        TeacherForced(backbone, prompter, SUBTASKS["emotion"], rows, **arguments)  # type: ignore[arg-type]
