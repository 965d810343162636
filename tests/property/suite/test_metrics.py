"""Metrics against independent oracles: scikit-learn for labels, a restatement of SentiEval's script for tuples."""

import ast
import json
import warnings
from collections.abc import Callable, Iterable
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

ACCURACY = (
    *("imdb", "yelp2", "yelp5", "mr", "sst2", "twitter", "sst5", "asc_lap14", "asc_rest14"),
    *("implicit", "compsent19"),
)
F1 = ("emotion", "hate", "offensive", "irony", "stance")
TUPLES = (
    *("uabsa_laptop14", "uabsa_rest14", "uabsa_rest15", "uabsa_rest16"),
    *("aste_laptop14", "aste_rest14", "aste_rest15", "aste_rest16", "asqp_rest15", "asqp_rest16"),
)
SPACES = {
    **dict.fromkeys(("imdb", "yelp2", "mr", "sst2"), ("negative", "positive")),
    **dict.fromkeys(("twitter", "asc_lap14", "asc_rest14", "implicit"), ("negative", "neutral", "positive")),
    **dict.fromkeys(("yelp5", "sst5"), ("negative", "neutral", "positive", "very negative", "very positive")),
    "compsent19": ("better", "worse"),
    "emotion": ("anger", "joy", "optimism", "sadness"),
    "hate": ("hate", "non-hate"),
    "offensive": ("non-offensive", "offensive"),
    "irony": ("irony", "non_irony"),
    "stance": ("against", "favor", "none"),
}
"""The label spaces of SentiEval's `predict.get_label_space`."""

WORDS = st.sampled_from(["food", "Food", "wait", "chef's", 'a "b"', "c\\d", "crème", "NULL", "[", ""])


def spelled(label: str) -> st.SearchStrategy[str]:
    return st.sampled_from(
        [label, label, label, f" {label.upper()}\n", label.title(), f"{label}\0", f"\u00a0{label}\t"]
    )


@st.composite
def classified(draw: st.DrawFn, dataset: str) -> tuple[list[str], list[str]]:
    """Gold labels of the data set and answers: right, wrong, spelled differently, or no label at all.

    In some cases golds are spelled differently too, or lie outside of the label space.
    """
    labels = draw(st.sampled_from([SPACES[dataset], SPACES[dataset], SPACES[dataset][:1]]))
    off_label = st.one_of(
        st.sampled_from(
            ["", "no idea", "positive.", "neutral negative", "\u0130RONY", "accuracy", "macro avg", "1", "nan"]
        ),
        st.text(max_size=6),
    )
    gold = st.sampled_from(labels)
    if draw(st.booleans()):
        gold = st.one_of(gold, gold.flatmap(spelled), off_label)
    golds = draw(st.lists(gold, min_size=1, max_size=25))
    answer = st.one_of(st.sampled_from(SPACES[dataset]).flatmap(spelled), st.sampled_from(golds), off_label)
    return golds, [draw(answer) for _ in golds]


def sentieval_score(dataset: str, answers: list[str], golds: list[str]) -> float:
    """The metric as SentiEval's evaluation computes it, by scikit-learn."""
    true = [str(gold).lower().strip() for gold in golds]
    pred = [str(answer).lower().strip() for answer in answers]
    if dataset in ACCURACY:
        return float(accuracy_score(true, pred))
    if dataset in ("irony", "stance"):
        report = classification_report(true, pred, output_dict=True, zero_division=0)
        names = ["irony"] if dataset == "irony" else ["against", "favor"]
        # Where neither gold nor answer names the label, SentiEval stops with a KeyError.
        return float(sum(report[name]["f1-score"] if name in report else 0.0 for name in names) / len(names))
    report = classification_report(true, pred, output_dict=True, zero_division=0, labels=sorted(SPACES[dataset]))
    return float(report["macro avg"]["f1-score"])


def arity_of(dataset: str) -> int:
    """Return how many fields a tuple of the data set has."""
    return {"uabsa": 2, "aste": 3, "asqp": 4}[dataset.partition("_")[0]]


def test_every_data_set_is_compared() -> None:
    assert sorted([*ACCURACY, *F1, *TUPLES]) == sorted(DATASETS)
    assert {name: tuple(sorted(DATASETS[name].labels)) for name in SPACES} == SPACES


def distinct(names: Iterable[str], oracle: Callable[[str], object]) -> list[str]:
    """Return one data set of each way of scoring: those of one metric and labels that have the same oracle are one."""
    cases: dict[object, str] = {}
    for name in names:
        subtask = DATASETS[name]
        cases.setdefault((subtask.metric, frozenset(subtask.labels), subtask.tuple_fields, oracle(name)), name)
    return list(cases.values())


def test_data_sets_are_one_case_where_nothing_tells_them_apart() -> None:
    assert distinct(ACCURACY, SPACES.get) == ["imdb", "yelp5", "twitter", "compsent19"]
    assert distinct(F1, str) == list(F1)
    assert distinct(TUPLES, arity_of) == ["uabsa_laptop14", "aste_laptop14", "asqp_rest15"]


@pytest.mark.parametrize("dataset", [*distinct(ACCURACY, SPACES.get), *F1])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_label_metrics_agree_with_scikit_learn(dataset: str, data: st.DataObject) -> None:
    golds, answers = data.draw(classified(dataset))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sentieval_score(dataset, answers, golds)
    assert score(dataset, answers, golds) == pytest.approx(expected, abs=1e-12)


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


NUMBERS = st.sampled_from([0, 1, 1.0, True, False, None, 2, -1.5, 1j, b"x"])
ITEMS = st.recursive(
    st.one_of(WORDS, NUMBERS),
    lambda inner: st.one_of(
        st.tuples(inner, inner), st.lists(inner, max_size=2), st.dictionaries(WORDS, inner, max_size=1)
    ),
    max_leaves=4,
)
"""What an answer's list may hold beside tuples of strings; some of it has no hash."""


def hashable(item: Any) -> bool:
    try:
        hash(item)
    except TypeError:
        return False
    return True


def answers_of(arity: int) -> st.SearchStrategy[str]:
    fine = tuples_of(arity).map(repr)
    longer = tuples_of(arity + 1).map(repr)
    odd = st.lists(st.one_of(st.tuples(*[WORDS] * arity), ITEMS), max_size=4).map(repr)
    as_json = tuples_of(arity).map(lambda items: json.dumps(items, ensure_ascii=False))
    not_a_list = tuples_of(arity).flatmap(
        lambda items: st.sampled_from(
            [repr(tuple(items)), repr(set(items)), repr(dict.fromkeys(items)), f"list({items})"]
        )
    )
    spaced = tuples_of(arity).flatmap(
        lambda items: st.sampled_from([f"  {items}\n", f"\n{items}", f"{items} # so", f"\f{items}"])
    )
    broken = st.tuples(tuples_of(arity).map(repr), st.integers(0, 60)).map(lambda cut: cut[0][: cut[1]])
    prose = st.one_of(st.text(max_size=8), st.text(alphabet="[](){}'\",ab1.-+\\", max_size=16))
    long = tuples_of(arity).map(lambda items: repr(items * 400))
    return st.one_of(fine, fine, fine, longer, odd, as_json, not_a_list, spaced, broken, prose, long)


@st.composite
def extracted(draw: st.DrawFn, arity: int) -> tuple[list[list[tuple[Any, ...]]], list[str]]:
    """Golds of strings, in some cases of other things too, and answers: right, close to right, or unreadable."""
    gold = tuples_of(arity)
    if draw(st.booleans()):
        gold = st.lists(
            st.one_of(st.tuples(*[WORDS] * arity), ITEMS.filter(hashable).map(lambda item: (item,))), max_size=4
        )
    golds = draw(st.lists(gold, min_size=1, max_size=8))
    return golds, [draw(st.one_of(st.just(repr(gold)), answers_of(arity))) for gold in golds]


def sentieval_tuple_f1(golds: list[list[tuple[Any, ...]]], answers: list[str]) -> float:
    """SentiEval's micro-F1, by comparing every distinct pair one by one; an answer is read by `literal_eval`."""
    true = false = missed = 0
    for gold, answer in zip(golds, answers, strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                items = ast.literal_eval(answer)
        except Exception:
            items = []
        if not isinstance(items, list) or not all(map(hashable, items)):
            items = []
        distinct_gold = [item for i, item in enumerate(gold) if item not in gold[:i]]
        distinct = [item for i, item in enumerate(items) if item not in items[:i]]
        hits = sum(any(item == other for other in distinct_gold) for item in distinct)
        true += hits
        false += len(distinct) - hits
        missed += sum(all(item != other for other in distinct) for item in distinct_gold)
    precision, recall = true / (true + false + 1e-7), true / (true + missed + 1e-7)
    return 2 * (precision * recall) / (precision + recall + 1e-7)


@pytest.mark.parametrize("dataset", distinct(TUPLES, arity_of))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tuple_f1_agrees_with_a_restatement(dataset: str, data: st.DataObject) -> None:
    golds, answers = data.draw(extracted(arity_of(dataset)))
    expected = sentieval_tuple_f1(golds, answers)
    assert score(dataset, answers, golds) == pytest.approx(expected, abs=1e-12)
    form = data.draw(st.sampled_from([repr, lambda gold: repr(tuple(gold)), tuple, set, as_lists]))
    assert score(dataset, answers, [form(gold) for gold in golds]) == pytest.approx(expected, abs=1e-12)


def as_lists(item: Any) -> Any:
    """Tuples as JSON has them."""
    return [as_lists(part) for part in item] if isinstance(item, list | tuple) else item


@st.composite
def answered(draw: st.DrawFn) -> tuple[Subtask, list[Example], list[str]]:
    """A subtask, examples from one or more of its data sets, and answers."""
    subtask = draw(st.sampled_from(list(SUBTASKS.values())))
    names = st.sampled_from(subtask.datasets)
    if subtask.is_tuple:
        arity = len(subtask.tuple_fields)
        golds: list[Any] = draw(st.lists(tuples_of(arity), min_size=1, max_size=8))
        answers = [draw(st.one_of(st.just(repr(gold)), answers_of(arity))) for gold in golds]
    else:
        golds, answers = draw(classified(subtask.datasets[0]))
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
