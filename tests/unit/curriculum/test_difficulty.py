"""Difficulty from meta data, with features worked out by hand, and the order it gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from memmcl.curriculum import DEFAULT_WEIGHTS, difficulties, order_subtasks
from memmcl.curriculum.difficulty import label_entropy
from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example
from memmcl.suite.subtasks import SUBTASKS, Subtask

SENT2, ASC, UABSA, IRONY = (SUBTASKS[name] for name in ("sent2", "asc", "uabsa", "irony"))


def rows(subtask: Subtask, pairs: Sequence[tuple[str, str | list[tuple[str, ...]]]]) -> list[Example]:
    return [Example.create(f"embedded_{subtask.name}", text, gold) for text, gold in pairs]


EXAMPLES = {
    "sent2": rows(SENT2, [("good good", "positive"), ("bad bad", "negative")]),
    "uabsa": rows(
        UABSA,
        [
            ("Fine pizza, slow waiter.", [("pizza", "positive"), ("waiter", "negative")]),
            ("Nothing to say.", []),
            ("The soup, the bread, the wine: fine.", [("soup", "positive")]),
            ("ok", [("it", "neutral")]),
        ],
    ),
    "irony": rows(IRONY, [("oh great", "irony"), ("rain", "non_irony"), ("sun", "non_irony")]),
}


def test_raw_features_by_hand() -> None:
    reports = difficulties([SENT2, UABSA, IRONY], EXAMPLES)
    sent2, uabsa, irony = (reports[name].raw for name in ("sent2", "uabsa", "irony"))
    assert sent2 == {
        "classes": 2.0,
        "answer_arity": 1.0,
        "tuples_per_row": 1.0,
        "label_entropy": 1.0,
        "diversity": 0.5,  # 2 types in 4 tokens
        "mean_length": 2.0,
        "needs_target": 0.0,
        "figurative": 0.0,
    }
    assert (uabsa["classes"], uabsa["answer_arity"], uabsa["tuples_per_row"]) == (3.0, 2.0, 1.0)
    assert uabsa["label_entropy"] == pytest.approx(1.5)  # polarities 2 : 1 : 1
    assert uabsa["mean_length"] == pytest.approx((4 + 3 + 7 + 1) / 4)
    assert irony["label_entropy"] == pytest.approx(0.918296, abs=1e-6)  # 1 : 2
    assert irony["diversity"] == 1.0
    assert irony["figurative"] == 1.0


def test_scaling_weighting_and_sum_by_hand() -> None:
    weights = dict.fromkeys(DEFAULT_WEIGHTS, 0.0) | {"classes": 1.0, "answer_arity": 2.0, "figurative": 1.0}
    reports = difficulties([SENT2, UABSA, IRONY], EXAMPLES, weights)
    assert {name: report.difficulty for name, report in reports.items()} == {
        "sent2": 0.0,
        "uabsa": 0.75,  # (1 * 1 + 2 * 1 + 1 * 0) / 4
        "irony": 0.25,
    }
    assert reports["uabsa"].weighted["answer_arity"] == 0.5
    assert reports["uabsa"].scaled["tuples_per_row"] == 0.0  # 1 for all: constant


def test_default_reports_lie_in_the_unit_interval_and_add_up() -> None:
    for name, report in difficulties([SENT2, UABSA, IRONY], EXAMPLES).items():
        assert report.subtask == name
        assert set(report.raw) == set(report.scaled) == set(report.weighted) == set(DEFAULT_WEIGHTS)
        assert all(0.0 <= value <= 1.0 for value in report.scaled.values())
        assert sum(report.weighted.values()) == pytest.approx(report.difficulty)
        assert 0.0 <= report.difficulty <= 1.0


def test_needs_target() -> None:
    examples = {**EXAMPLES, "asc": rows(ASC, [("good food", "positive")])}
    reports = difficulties([SENT2, ASC], examples)
    assert (reports["sent2"].raw["needs_target"], reports["asc"].raw["needs_target"]) == (0.0, 1.0)


def test_diversity_is_over_as_many_words_for_every_subtask() -> None:
    many = rows(IRONY, [(f"word{i} again", "irony") for i in range(50)])
    reports = difficulties([SENT2, IRONY], {"sent2": EXAMPLES["sent2"], "irony": many})
    assert reports["irony"].raw["diversity"] == 0.75  # 4 words: two of them "again"


def test_order_of_rows_and_of_subtasks_does_not_matter() -> None:
    forward = difficulties([SENT2, UABSA, IRONY], EXAMPLES)
    backward = difficulties([IRONY, UABSA, SENT2], {name: found[::-1] for name, found in EXAMPLES.items()})
    assert list(backward) == ["irony", "uabsa", "sent2"]
    assert {name: report.difficulty for name, report in forward.items()} == pytest.approx(
        {name: report.difficulty for name, report in backward.items()}
    )


def test_a_suite_of_one_subtask() -> None:
    report = difficulties([UABSA], EXAMPLES)["uabsa"]
    assert report.difficulty == 0.0
    assert report.raw["answer_arity"] == 2.0


def test_tuples_without_any_row_filled() -> None:
    report = difficulties([UABSA], {"uabsa": rows(UABSA, [("Nothing here.", [])])})["uabsa"]
    assert (report.raw["label_entropy"], report.raw["tuples_per_row"], report.raw["classes"]) == (0.0, 0.0, 3.0)


def test_label_entropy() -> None:
    assert label_entropy(["a"] * 5) == 0.0
    assert label_entropy(["a", "b", "c", "d"]) == 2.0
    assert label_entropy([]) == 0.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"colour": 1.0}, "unknown difficulty weights"),
        ({"classes": -1.0}, "not negative"),
        ({"classes": float("nan")}, "finite"),
        (dict.fromkeys(DEFAULT_WEIGHTS, 0.0), "all difficulty weights are 0"),
    ],
)
def test_bad_weights_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        difficulties([SENT2], EXAMPLES, weights)


def test_missing_rows_are_refused() -> None:
    with pytest.raises(DataError, match="at least one subtask"):
        difficulties([], EXAMPLES)
    with pytest.raises(DataError, match="asc has 0 train rows"):
        difficulties([SENT2, ASC], EXAMPLES)
    with pytest.raises(DataError, match="no words"):
        difficulties([SENT2], {"sent2": rows(SENT2, [("...", "positive")])})


DIFFICULTY = {"b": 0.5, "a": 0.5, "hard": 0.9, "easy": 0.1}


def test_the_easiest_come_first_whatever_the_order_of_the_mapping() -> None:
    assert order_subtasks(DIFFICULTY) == ("easy", "a", "b", "hard")
    assert order_subtasks(dict(reversed(DIFFICULTY.items()))) == ("easy", "a", "b", "hard")
