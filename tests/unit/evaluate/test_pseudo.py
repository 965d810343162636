"""Weak rows labelled by an expert: its answers, how sure it is of them, and which rows are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import backbone_of, corpus, naive_logprob, training_rows
from torch import nn

from memmcl.backbone.forward import Backbone
from memmcl.errors import DataError
from memmcl.evaluate.pseudo import keep_confident, label_rows
from memmcl.evaluate.scoring import Probe
from memmcl.experts.settings import LoraShape, Optimisation, TrainingData, TrainingSettings
from memmcl.experts.train import train_adapter
from memmcl.merge.build import Merger
from memmcl.suite.examples import Example
from memmcl.suite.parsing import parse_tuples
from memmcl.suite.prompts import Prompter
from memmcl.suite.subtasks import SUBTASKS


@pytest.fixture(scope="module")
def backbone(tiny_base: Path) -> Backbone:
    return backbone_of(tiny_base, 2)


def unlabelled(name: str, count: int) -> list[Example]:
    """Rows of the corpus without their labels."""
    empty: str | tuple[()] = () if SUBTASKS[name].is_tuple else ""
    return [Example.create(row.dataset, row.text, empty, row.fields) for row in corpus(name, count)]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", ["asc", "emotion"])
def test_a_labels_confidence_is_its_share_of_the_label_space(
    backbone: Backbone, prompter: Prompter, model: nn.Module, name: str, calibrated: bool
) -> None:
    subtask, rows = SUBTASKS[name], unlabelled(name, 5)
    probe = Probe(backbone, prompter, subtask, rows, batch_size=2)
    scores = np.array(
        [
            [naive_logprob(model, prompter.prompt(subtask, row), prompter.answer(label)) for label in subtask.labels]
            for row in rows
        ]
    )
    offsets = scores.mean(axis=0) if calibrated else None
    probabilities = np.exp(scores if offsets is None else scores - offsets)
    shares = probabilities / probabilities.sum(axis=1, keepdims=True)
    found = label_rows(probe, offsets)
    assert [label for label, _ in found] == [subtask.labels[index] for index in shares.argmax(axis=1)]
    np.testing.assert_allclose([confidence for _, confidence in found], shares.max(axis=1), rtol=0, atol=1e-4)
    if calibrated:
        assert [label for label, _ in found] != [label for label, _ in label_rows(probe)]


class Speaking(Probe):
    """A probe that answers what it is told to, and is as sure of it as its weights are."""

    told: tuple[str, ...] = ()

    def answers(self, offsets: np.ndarray | None = None) -> list[str]:
        return list(self.told)


def test_a_tuples_confidence_is_the_generated_texts_mean_probability_per_token(
    backbone: Backbone, prompter: Prompter, model: nn.Module
) -> None:
    subtask, rows = SUBTASKS["uabsa"], unlabelled("uabsa", 6)
    probe = Speaking(backbone, prompter, subtask, rows, batch_size=4)
    probe.told = ("[('soup', 'positive')]", 'Well: [["soup", "negative"]]', "[]", "no list", "[('soup', 'great')]", "")
    found = label_rows(probe)
    assert [answer for answer, _ in found][:3] == ["[('soup', 'positive')]", "[('soup', 'negative')]", "[]"]
    assert [confidence for _, confidence in found][3:] == [0.0, 0.0, 0.0]
    for row, text, (_, confidence) in zip(rows[:3], probe.told, found, strict=False):
        answer = prompter.answer(text)
        mean = naive_logprob(model, prompter.prompt(subtask, row), answer) / len(answer)
        assert confidence == pytest.approx(np.exp(mean), abs=1e-4)
        assert confidence > 0


@pytest.mark.parametrize("name", ["emotion", "uabsa"])
def test_an_expert_recovers_the_labels_of_the_rows_it_was_fitted_to(
    tiny_base: Path, prompter: Prompter, name: str
) -> None:
    backbone, subtask, rows = backbone_of(tiny_base, 1), SUBTASKS[name], corpus(name, 4)
    trained = train_adapter(
        backbone,
        TrainingData({name: training_rows(prompter, name, 4)}),
        TrainingSettings(
            lora=LoraShape(("q_proj", "v_proj", "up_proj", "down_proj"), rank=16, alpha=32.0),
            optimisation=Optimisation(steps=60, batch_size=4, learning_rate=0.02),
            seed=3,
        ),
    )
    probe = Probe(backbone, prompter, subtask, unlabelled(name, 4), batch_size=3, max_new_tokens=80)
    before = label_rows(probe)
    Merger(backbone, {name: trained.factors}, blocks=1).apply({name: (1.0,)})
    after = label_rows(probe)
    assert [answer for answer, _ in after] == [row.answer for row in rows] != [answer for answer, _ in before]
    assert min(confidence for _, confidence in after) > 0.5
    kept = keep_confident(unlabelled(name, 4), after, keep=6, is_tuple=subtask.is_tuple)
    assert {row.id: row for row in kept} == {row.id: row for row in rows}


def made(count: int) -> list[Example]:
    return [Example.create("d", f"text {number}", "", {"aspect": "soup"}) for number in range(count)]


def test_the_most_confident_rows_are_kept_with_their_answers_label_by_label() -> None:
    labelled = [("a", 0.9), ("a", 0.95), ("a", 0.8), ("b", 0.4), ("c", 0.5), ("b", 0.6), ("a", 0.99)]
    kept = keep_confident(made(7), labelled, keep=5, is_tuple=False)
    assert [(row.text, row.gold) for row in kept] == [
        ("text 6", "a"),
        ("text 5", "b"),
        ("text 4", "c"),
        ("text 1", "a"),
        ("text 3", "b"),
    ]
    assert {row.id for row in kept} < {row.id for row in made(7)}
    assert all(row.fields == {"aspect": "soup"} and row.dataset == "d" for row in kept)


def test_tuples_take_turns_with_empty_lists() -> None:
    labelled = [("[]", 0.99), ("[]", 0.98), ("[]", 0.97), ("[('x', 'positive')]", 0.5), ("[('y', 'neutral')]", 0.6)]
    kept = keep_confident(made(5), labelled, keep=4, is_tuple=True)
    assert [row.gold for row in kept] == [(), (("y", "neutral"),), (), (("x", "positive"),)]


def test_equals_come_in_the_order_of_the_rows_and_no_confidence_is_never_kept() -> None:
    labelled = [("a", 0.0), ("a", 0.7), ("a", 0.7), ("b", 0.0), ("a", 0.7)]
    assert [row.text for row in keep_confident(made(5), labelled, keep=2, is_tuple=False)] == ["text 1", "text 2"]
    assert [row.text for row in keep_confident(made(5), labelled, keep=9, is_tuple=False)] == [
        "text 1",
        "text 2",
        "text 4",
    ]
    assert keep_confident(made(5), labelled, keep=0, is_tuple=False) == []
    assert keep_confident(made(1), [("[]", 0.0)], keep=3, is_tuple=True) == []
    assert keep_confident([], [], keep=3, is_tuple=True) == []


def test_an_answer_that_is_missing_is_an_error() -> None:
    with pytest.raises(DataError, match="expected one answer per row; got 1 for 2 rows"):
        keep_confident(made(2), [("a", 0.5)], keep=1, is_tuple=False)


def test_what_labels_a_tuple_row_is_what_people_see(backbone: Backbone, prompter: Prompter) -> None:
    """The base's own babble is unreadable, and none of it becomes a weak row."""
    rows = unlabelled("uabsa", 3)
    probe = Probe(backbone, prompter, SUBTASKS["uabsa"], rows, max_new_tokens=6)
    assert all(parse_tuples(text, 2).rejected for text in probe.answers())
    found = label_rows(probe)
    assert {confidence for _, confidence in found} == {0.0}
    assert keep_confident(rows, found, keep=3, is_tuple=True) == []
