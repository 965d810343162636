"""Metrics against independent oracles: scikit-learn for labels, brute force for tuples."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, classification_report

from memmcl.suite.examples import Example, format_tuples, from_table, to_table
from memmcl.suite.metrics import (
    DATASETS,
    balanced_accuracy,
    datasets_of,
    row_counts,
    score,
    score_from_counts,
    score_subtask,
)
from memmcl.suite.parsing import parse_tuples
from memmcl.suite.subtasks import SUBTASKS, Subtask

LABELLED = sorted(name for name, scoring in DATASETS.items() if scoring.metric != "tuple_f1")
WORDS = st.sampled_from(["food", "Food", "wait", "chef's", 'a "b"', "c\\d", "crème", "NULL", "[", ""])


def spelled(label: str) -> st.SearchStrategy[str]:
    return st.sampled_from([label, label, f" {label.upper()}\n", label.title()])


@st.composite
def classified(draw: st.DrawFn, dataset: str) -> tuple[list[str], list[str]]:
    """Gold labels of the data set and answers: right, wrong, spelled differently, or no label at all."""
    labels = DATASETS[dataset].labels
    golds = draw(st.lists(st.sampled_from(labels), min_size=1, max_size=25))
    off_label = st.sampled_from(["", "no idea", "positive.", "neutral negative", "unknown"])
    answer = st.one_of(st.sampled_from(labels).flatmap(spelled), off_label)
    return golds, [draw(answer) for _ in golds]


def sentieval_score(dataset: str, answers: list[str], golds: list[str]) -> float:
    """The metric as SentiEval's evaluation computes it, by scikit-learn."""
    true = [gold.lower().strip() for gold in golds]
    pred = [answer.lower().strip() for answer in answers]
    if DATASETS[dataset].metric == "accuracy":
        return float(accuracy_score(true, pred))
    if dataset in ("irony", "stance"):
        report = classification_report(true, pred, output_dict=True, zero_division=0)
        names = ["irony"] if dataset == "irony" else ["against", "favor"]
        return float(sum(report[name]["f1-score"] if name in report else 0.0 for name in names) / len(names))
    labels = list(DATASETS[dataset].labels)
    report = classification_report(true, pred, output_dict=True, zero_division=0, labels=labels)
    return float(report["macro avg"]["f1-score"])


@pytest.mark.parametrize("dataset", LABELLED)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_label_metrics_agree_with_scikit_learn(dataset: str, data: st.DataObject) -> None:
    golds, answers = data.draw(classified(dataset))
    assert score(dataset, answers, golds) == pytest.approx(sentieval_score(dataset, answers, golds), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_balanced_accuracy_agrees_with_scikit_learn(data: st.DataObject) -> None:
    golds, answers = data.draw(classified("emotion"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = balanced_accuracy_score(
            [gold.lower().strip() for gold in golds], [answer.lower().strip() for answer in answers]
        )
    assert balanced_accuracy(golds, answers) == pytest.approx(expected, abs=1e-12)


def tuples_of(arity: int) -> st.SearchStrategy[list[tuple[str, ...]]]:
    return st.lists(st.tuples(*[WORDS] * arity), max_size=4)


Answer = tuple[str, list[Any]]
"""The text of an answer, and the items it stands for (empty where SentiEval counts it as empty)."""


def answers_of(arity: int) -> st.SearchStrategy[Answer]:
    fine = tuples_of(arity).map(lambda items: (repr(items), items))
    longer = tuples_of(arity + 1).map(lambda items: (repr(items), items))
    mixed = st.lists(st.one_of(WORDS, st.integers(), st.none()), max_size=3).map(lambda items: (repr(items), items))
    lists = tuples_of(arity).map(lambda items: (repr([list(item) for item in items]), []))
    not_a_list = tuples_of(arity).map(lambda items: (repr(tuple(items)), []))
    broken = tuples_of(arity).map(lambda items: (repr(items)[:-1], []))
    prose = st.text(alphabet="abc ,'", max_size=8).map(lambda text: (f"answer {text}", []))
    return st.one_of(fine, fine, fine, longer, mixed, lists, not_a_list, broken, prose)


@st.composite
def extracted(draw: st.DrawFn, arity: int) -> tuple[list[list[tuple[str, ...]]], list[Answer]]:
    golds = draw(st.lists(tuples_of(arity), min_size=1, max_size=8))
    right = [(repr(gold), list(gold)) for gold in golds]
    return golds, [draw(st.one_of(st.just(same), answers_of(arity))) for same in right]


def brute_force_f1(golds: list[list[tuple[str, ...]]], answers: list[Answer]) -> float:
    """Counts by comparing every distinct pair, one by one."""
    true = false = missed = 0
    for gold, (_, items) in zip(golds, answers, strict=True):
        distinct_gold = [item for i, item in enumerate(gold) if item not in gold[:i]]
        distinct = [item for i, item in enumerate(items) if item not in items[:i]]
        for item in distinct:
            if any(item == other for other in distinct_gold):
                true += 1
            else:
                false += 1
        missed += sum(1 for item in distinct_gold if all(item != other for other in distinct))
    precision, recall = true / (true + false + 1e-7), true / (true + missed + 1e-7)
    return 2 * (precision * recall) / (precision + recall + 1e-7)


@pytest.mark.parametrize(("dataset", "arity"), [("uabsa_rest15", 2), ("aste_laptop14", 3), ("asqp_rest16", 4)])
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_tuple_f1_agrees_with_brute_force(dataset: str, arity: int, data: st.DataObject) -> None:
    golds, answers = data.draw(extracted(arity))
    found = score(dataset, [text for text, _ in answers], golds)
    assert found == pytest.approx(brute_force_f1(golds, answers), rel=1e-12, abs=1e-15)


@st.composite
def answered(draw: st.DrawFn) -> tuple[Subtask, list[Example], list[str]]:
    """A subtask, examples from one or more of its data sets, and answers."""
    subtask = draw(st.sampled_from(list(SUBTASKS.values())))
    names = st.sampled_from(subtask.datasets)
    if subtask.is_tuple:
        golds, pairs = draw(extracted(len(subtask.tuple_fields)))
        answers = [text for text, _ in pairs]
    else:
        golds, answers = draw(classified(subtask.datasets[0]))  # type: ignore[assignment]
    examples = [Example.create(draw(names), f"text {i}", gold) for i, gold in enumerate(golds)]
    return subtask, examples, answers


@settings(max_examples=150, deadline=None)
@given(case=answered())
def test_a_subtask_is_the_mean_of_its_data_sets_and_its_counts_give_it_exactly(
    case: tuple[Subtask, list[Example], list[str]],
) -> None:
    subtask, examples, answers = case
    names = datasets_of(examples)
    counts = row_counts(subtask, examples, answers)
    total = score_subtask(subtask, examples, answers)
    assert float(score_from_counts(subtask, names, np.ones(len(examples)) @ counts)) == total
    each = []
    for name in names:
        rows = [i for i, example in enumerate(examples) if example.dataset == name]
        each.append(score(name, [answers[i] for i in rows], [examples[i].gold for i in rows]))
    assert total == pytest.approx(sum(each) / len(each), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(case=answered(), seed=st.integers(0, 2**32 - 1))
def test_a_bootstrap_by_matrix_product_equals_scoring_each_resample(
    case: tuple[Subtask, list[Example], list[str]], seed: int
) -> None:
    subtask, examples, answers = case
    drawn = np.random.default_rng(seed).integers(len(examples), size=(5, len(examples)))
    weights = np.stack([np.bincount(rows, minlength=len(examples)) for rows in drawn])
    counts = row_counts(subtask, examples, answers)
    scores = score_from_counts(subtask, datasets_of(examples), weights @ counts)
    assert scores.shape == (5,)
    for rows, value in zip(drawn, scores, strict=True):
        again = score_subtask(subtask, [examples[i] for i in rows], [answers[i] for i in rows])
        assert value == pytest.approx(again, rel=1e-12)


@settings(max_examples=120, deadline=None)
@given(gold=tuples_of(3), noise=st.text(alphabet="abc ,.\n", max_size=6))
def test_an_answer_in_prose_parses_back_to_its_tuples(gold: list[tuple[str, ...]], noise: str) -> None:
    parsed = parse_tuples(f"{noise}{format_tuples(gold)}{noise}", 3)
    assert parsed.tuples == tuple(dict.fromkeys(gold))
    assert not parsed.rejected


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="[](){}'\",\\ab1:-.\n", max_size=60), arity=st.integers(2, 4))
def test_no_text_breaks_the_parser(text: str, arity: int) -> None:
    parsed = parse_tuples(text, arity)
    assert not (parsed.rejected and parsed.tuples)
    assert all(len(item) == arity and all(isinstance(part, str) for part in item) for item in parsed.tuples)


VALID_TEXT = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            VALID_TEXT,
            st.one_of(VALID_TEXT, st.lists(st.tuples(VALID_TEXT, VALID_TEXT), max_size=3)),
            st.dictionaries(VALID_TEXT, VALID_TEXT, max_size=2),
        ),
        max_size=5,
    )
)
def test_tables_are_lossless(rows: list[tuple[str, Any, dict[str, str]]]) -> None:
    examples = [Example.create("d", text, gold, fields) for text, gold, fields in rows]
    assert from_table(to_table(examples)) == examples
