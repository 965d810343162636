"""Metrics: SentiEval's edge cases by hand, the counts behind a bootstrap, constants."""

import random
from dataclasses import replace

import numpy as np
import pytest

from memmcl.errors import DataError
from memmcl.suite.examples import Example
from memmcl.suite.metrics import (
    DATASETS,
    balanced_accuracy,
    best_constant,
    datasets_of,
    row_counts,
    score,
    score_from_counts,
    score_subtask,
    subtask_of,
)
from memmcl.suite.subtasks import POLARITIES, SUBTASKS, Subtask

GOLD = [[("food", "positive"), ("wait", "negative")], [], [("Bar", "neutral")]]


def tuple_f1(true: int, false: int, missed: int) -> float:
    precision, recall = true / (true + false + 1e-7), true / (true + missed + 1e-7)
    return 2 * precision * recall / (precision + recall + 1e-7)


def test_the_26_data_sets_have_the_metrics_of_sentieval() -> None:
    by_metric: dict[str, set[str]] = {}
    for name, scoring in DATASETS.items():
        by_metric.setdefault(scoring.metric, set()).add(name)
    assert len(DATASETS) == 26
    assert by_metric["accuracy"] == {
        *("imdb", "yelp2", "yelp5", "mr", "sst2", "twitter", "sst5"),
        *("asc_lap14", "asc_rest14", "implicit", "compsent19"),
    }
    assert by_metric["tuple_f1"] == {
        *(f"{kind}_{name}" for kind in ("uabsa", "aste") for name in ("laptop14", "rest14", "rest15", "rest16")),
        "asqp_rest15",
        "asqp_rest16",
    }
    assert by_metric["label_f1"] == {"irony"}
    assert by_metric["macro_f1"] == {"emotion", "hate", "offensive", "stance"}
    assert DATASETS["stance"].scored_labels == ("against", "favor")
    with pytest.raises(DataError, match="no metric for data set 'imdb2'"):
        subtask_of("imdb2")
    with pytest.raises(DataError, match="no metric for data set 'sent2'"):
        subtask_of("sent2")


def test_classification_compares_stripped_and_lowered() -> None:
    assert (
        score("sst2", [" Positive\n", "negative", "pos", ""], ["positive", "NEGATIVE", "positive", "negative"]) == 0.5
    )
    assert score("embedded_irony", ["Irony ", "non_irony"], ["irony", "non_irony"]) == 1.0


def test_an_off_label_answer_costs_recall_only() -> None:
    golds = ["hate", "hate", "non-hate", "non-hate"]
    on_label = score("hate", ["hate", "non-hate", "non-hate", "non-hate"], golds)
    off_label = score("hate", ["hate", "no idea", "non-hate", "non-hate"], golds)
    assert on_label == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert off_label == pytest.approx((2 / 3 + 1) / 2)


def test_a_label_of_the_space_that_nobody_names_counts_as_zero() -> None:
    assert score("emotion", ["joy", "anger"], ["joy", "anger"]) == pytest.approx(2 / 4)
    assert score("irony", ["non_irony"], ["non_irony"]) == 0.0


def test_stance_leaves_none_out_of_the_mean_but_not_out_of_the_counts() -> None:
    golds = ["against", "favor", "none", "none"]
    assert score("stance", ["against", "favor", "against", "none"], golds) == pytest.approx((2 / 3 + 1) / 2)
    subtask = SUBTASKS["stance"]
    examples = [Example.create("stance", str(i), gold) for i, gold in enumerate(golds)]
    answers = ["against", "favor", "against", "none"]
    assert score_subtask(subtask, examples, answers) == score("stance", answers, golds)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[('food', 'positive'), ('wait', 'negative')]", (2, 0, 1)),
        ("[('wait', 'negative'), ('food', 'positive'), ('food', 'positive')]", (2, 0, 1)),
        ("[('Food', 'positive')]", (0, 1, 3)),
        ("[('food', 'positive'), ('food', 'positive', 'x')]", (1, 1, 2)),
        ("[('food', 'positive'), 'wait', 3]", (1, 2, 2)),
        ('[["food", "positive"]]', (0, 0, 3)),
        ("[('food', 'positive'), ['wait', 'negative']]", (0, 0, 3)),
        ("[('food', 'positive'), ('wait', [])]", (0, 0, 3)),
        ("('food', 'positive')", (0, 0, 3)),
        ("{('food', 'positive')}", (0, 0, 3)),
        ("[('food', 'positive')", (0, 0, 3)),
        ("Answer: [('food', 'positive')]", (0, 0, 3)),
        ("list([('food', 'positive')])", (0, 0, 3)),
        (" [('food', 'positive')]\n", (1, 0, 2)),
        ("", (0, 0, 3)),
    ],
)
def test_tuple_answers(answer: str, expected: tuple[int, int, int]) -> None:
    assert score("uabsa_rest14", [answer, "[]", "[]"], GOLD) == pytest.approx(tuple_f1(*expected), rel=1e-15)


def test_gold_tuples_come_as_tuples_lists_or_text() -> None:
    answers = ["[('food', 'positive')]", "[('x', 'neutral')]", "[('Bar', 'neutral')]"]
    as_lists = [[list(item) for item in row] for row in GOLD]
    as_text = [repr(row) for row in GOLD]
    expected = tuple_f1(2, 1, 1)
    assert [score("uabsa_rest14", answers, gold) for gold in (GOLD, as_lists, as_text)] == [expected] * 3
    with pytest.raises(DataError, match="expected gold tuples"):
        score("uabsa_rest14", ["[]"], ["positive"])


def test_gold_tuples_keep_what_is_no_list() -> None:
    """SentiEval makes a set of what the text says; only lists, which have no hash, become tuples."""
    answers = ["['food', ('a', 'b'), ('c', ('d', 'e'))]"]
    for gold in (answers[0], "('food', ('a', 'b'), ['c', ['d', 'e']])", {"food", ("a", "b"), ("c", ("d", "e"))}):
        assert score("uabsa_rest14", answers, [gold]) == pytest.approx(tuple_f1(3, 0, 0), rel=1e-15)
    for gold in ("food", "'food'", "3", None, 3, "{}", [("a", {})]):
        with pytest.raises(DataError, match="expected gold tuples as a list, or its text as Python writes it; got"):
            score("uabsa_rest14", ["[]"], [gold])


def test_numbers_that_are_equal_are_one_item() -> None:
    assert score("uabsa_rest14", ["[1, 1.0, True, ('a', 0)]"], ["[1, ('a', False)]"]) == tuple_f1(2, 0, 0)


def test_an_answer_as_long_as_models_write_is_read() -> None:
    gold = [(f"the aspect number {number}", "positive") for number in range(2000)]
    assert len(str(gold)) > 60_000
    assert score("uabsa_rest14", [str(gold)], [gold]) == pytest.approx(1, abs=1e-6)


def test_labels_are_compared_as_scikit_learn_sees_them() -> None:
    assert score("mr", ["positive\0", "\u00a0POSITIVE\x1f", "POS\u0130TIVE"], ["positive"] * 3) == pytest.approx(2 / 3)
    assert score("mr", ["1", "nan"], [1, float("nan")]) == 1.0


def test_what_the_suite_exports_is_what_scores() -> None:
    import memmcl.suite as suite

    assert suite.score is score
    assert (suite.SUBTASKS, suite.Subtask, suite.Example) == (SUBTASKS, Subtask, Example)


def test_nothing_to_find_and_nothing_found_scores_zero_as_in_sentieval() -> None:
    assert score("aste_rest14", ["[]", "[]"], [[], []]) == 0.0


def test_a_subtask_scores_the_mean_of_its_data_sets() -> None:
    examples = [Example.create("mr", str(i), "positive") for i in range(3)]
    examples.append(Example.create("sst2", "other", "negative"))
    answers = ["positive", "negative", "negative", "negative"]
    assert datasets_of(examples) == ("mr", "sst2")
    assert score_subtask(SUBTASKS["sent2"], examples, answers) == pytest.approx((1 / 3 + 1) / 2)


def test_a_resample_without_a_data_set_leaves_it_out_of_the_mean() -> None:
    examples = [Example.create("mr", "a", "positive"), Example.create("sst2", "b", "negative")]
    counts = row_counts(SUBTASKS["sent2"], examples, ["positive", "positive"])
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    scores = score_from_counts(SUBTASKS["sent2"], ("mr", "sst2"), weights @ counts)
    assert scores.tolist() == [0.5, 1.0, 0.0, 0.0]


def test_unequal_or_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="expected one prediction per row; got 1 for 2 rows"):
        score("mr", ["positive"], ["positive", "negative"])
    with pytest.raises(DataError, match="no rows to score"):
        score_subtask(SUBTASKS["sent2"], [], [])
    with pytest.raises(DataError, match="no rows to score"):
        balanced_accuracy([], [])


def test_best_constant_label_is_chosen_on_train_and_scored_on_test() -> None:
    train = [Example.create("irony", str(i), "irony" if i < 3 else "non_irony") for i in range(10)]
    test = [Example.create("irony", f"t{i}", "irony" if i < 1 else "non_irony") for i in range(4)]
    # F1 of "irony" is 0 for the majority answer, so the minority label is the better constant.
    assert best_constant(SUBTASKS["irony"], train, test) == ("irony", pytest.approx(2 / 5))
    polar = [Example.create("mr", str(i), "negative" if i < 6 else "positive") for i in range(10)]
    assert best_constant(SUBTASKS["sent2"], polar, polar[5:]) == ("negative", pytest.approx(1 / 5))


def test_best_constant_tuples() -> None:
    frequent = [("food", "positive")]
    train = [Example.create("uabsa_rest14", str(i), frequent if i < 2 else []) for i in range(9)]
    answer, value = best_constant(SUBTASKS["uabsa"], train, train[:4])
    assert answer == "[('food', 'positive')]"
    assert value == pytest.approx(tuple_f1(2, 2, 0))
    empty = [replace(example, gold=()) for example in train]
    assert best_constant(SUBTASKS["uabsa"], empty, train) == ("[]", 0.0)
    with pytest.raises(DataError, match="no rows to score"):
        best_constant(SUBTASKS["uabsa"], [], train)


def invented(subtask: Subtask, rows: int, seed: int) -> tuple[list[Example], list[str]]:
    """Rows of all the subtask's data sets, and answers: right, another row's, off the labels, or unreadable."""
    draw = random.Random(f"{subtask.name} {seed}")
    examples = []
    for number in range(rows):
        gold: str | list[tuple[str, ...]]
        if subtask.is_tuple:
            gold = [
                (*(draw.choice("abc") for _ in subtask.tuple_fields[:-1]), draw.choice(POLARITIES))
                for _ in range(draw.randrange(3))
            ]
        else:
            gold = draw.choice(subtask.labels)
        examples.append(Example.create(draw.choice(subtask.datasets), f"text {number}", gold))
    others = [example.answer for example in examples]
    answers = [
        draw.choice([example.answer, example.answer, draw.choice(others), draw.choice(["", "[(", "dunno"])])
        for example in examples
    ]
    return examples, answers


@pytest.mark.parametrize("name", list(SUBTASKS))
def test_summed_counts_score_every_subtask_as_its_data_sets_do(name: str) -> None:
    subtask = SUBTASKS[name]
    for seed in range(5):
        examples, answers = invented(subtask, 60, seed)
        counts = row_counts(subtask, examples, answers)
        summed = float(score_from_counts(subtask, datasets_of(examples), counts.sum(axis=0)))
        assert summed == score_subtask(subtask, examples, answers)
        each = []
        for dataset in subtask.datasets:
            rows = [(a, e.gold) for a, e in zip(answers, examples, strict=True) if e.dataset == dataset]
            each.append(score(dataset, [answer for answer, _ in rows], [gold for _, gold in rows]))
        assert summed == pytest.approx(sum(each) / len(subtask.datasets), rel=1e-12)
        assert 0.2 < summed < 0.95, "neither all right nor all wrong, or nothing is compared"
        assert score_subtask(subtask, examples, [example.answer for example in examples]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", list(SUBTASKS))
def test_no_constant_beats_the_best_constant_of_any_subtask(name: str) -> None:
    subtask = SUBTASKS[name]
    train, _ = invented(subtask, 60, 0)
    test, _ = invented(subtask, 30, 1)
    answer, value = best_constant(subtask, train, test)
    assert value == score_subtask(subtask, test, [answer] * len(test))
    reached = score_subtask(subtask, train, [answer] * len(train))
    for other in {*subtask.labels, *(example.answer for example in train[:5])}:
        assert score_subtask(subtask, train, [other] * len(train)) <= reached, other
    assert subtask.is_tuple or answer in subtask.labels
