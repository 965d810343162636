"""What rows are like, by hand."""

from __future__ import annotations

import pytest

from memmcl.suite.examples import Example
from memmcl.suite.metrics import score_subtask
from memmcl.suite.stats import Constant, Leak, Lengths, constants, describe, leakage, lengths_of
from memmcl.suite.subtasks import SUBTASKS

HARBOUR = "the soup at the harbour was worth the long trip"
NO_ROWS: dict[str, list[Example]] = {"train": [], "weak": [], "test": []}


def test_a_part_is_described_by_rows_texts_repeats_labels_and_lengths() -> None:
    rows = [
        Example.create("mr", "Good soup.", "positive"),
        Example.create("mr", "good soup", "positive"),  # another question of the same content
        Example.create("mr", "Good soup.", "positive"),  # a repeat
        Example.create("mr", "A film that never ends", "positive"),
    ]
    (part,) = describe([SUBTASKS["sent2"]], {"sent2": {**NO_ROWS, "test": rows}})
    assert (part.subtask, part.dataset, part.part) == ("sent2", "mr", "test")
    assert (part.rows, part.texts, part.repeats) == (4, 2, 1)
    assert part.labels == {"positive": 4}
    assert part.missing == ("negative",)
    assert part.tuples is None
    assert part.words == Lengths(2.0, 2.0, pytest.approx(4.55), 5)
    assert part.characters.max == 22


def test_tuples_and_unlabelled_rows_have_no_label_balance() -> None:
    uabsa = [
        Example.create("uabsa_rest14", "a b", [("a", "positive"), ("b", "negative")]),
        Example.create("uabsa_rest14", "c", []),
        Example.create("uabsa_rest15", "d e", [("d", "positive")]),
    ]
    plain = [Example.create("mr", "no label here", "")]
    pools = {"uabsa": {**NO_ROWS, "train": uabsa}, "sent2": {**NO_ROWS, "weak": plain}}
    parts = describe([SUBTASKS["uabsa"], SUBTASKS["sent2"]], pools)
    assert [(part.dataset, part.part, part.tuples) for part in parts] == [
        ("uabsa_rest14", "train", 1.0),
        ("uabsa_rest15", "train", 1.0),
        ("mr", "weak", None),
    ]
    assert [(part.labels, part.missing) for part in parts] == [({}, ())] * 3


def test_percentiles_are_those_of_a_known_row_of_numbers() -> None:
    assert lengths_of(range(101)) == Lengths(5.0, 50.0, 95.0, 100)
    assert lengths_of([7]) == Lengths(7.0, 7.0, 7.0, 7)


def test_leakage_names_pairs_of_parts_and_test_parts_and_counts_rows() -> None:
    def row(dataset: str, text: str) -> Example:
        return Example.create(dataset, text, "positive")

    pools = {
        "sent2": {
            "train": [row("mr", f"Well, {HARBOUR}!"), row("mr", HARBOUR), row("mr", "good"), row("mr", "a good soup")],
            "weak": [row("sst2", "GOOD?"), row("sst2", "fine")],
            "test": [row("mr", "nothing else is like this"), row("sst2", "good")],
        },
        "sent5": {
            "train": [row("sst5", "alone")],
            "weak": [],
            "test": [row("sst5", HARBOUR.title()), row("sst5", "Good!")],
        },
    }
    assert leakage(pools) == [
        Leak("mr", "train", "sst2", equal=1, sharing=0),
        Leak("mr", "train", "sst5", equal=2, sharing=1),
        Leak("sst2", "weak", "sst2", equal=1, sharing=0),
        Leak("sst2", "weak", "sst5", equal=1, sharing=0),
    ]
    assert leakage({"sent2": NO_ROWS}) == []


def test_the_best_constant_is_chosen_on_train_and_scored_on_test() -> None:
    train = [Example.create("mr", str(i), "negative" if i < 6 else "positive") for i in range(10)]
    test = [Example.create("mr", f"t{i}", "negative" if i < 1 else "positive") for i in range(4)]
    subtasks = [SUBTASKS["sent2"], SUBTASKS["sent5"]]
    pools = {"sent2": {"train": train, "weak": [], "test": test}, "sent5": {**NO_ROWS, "test": test}}
    assert constants(subtasks, pools) == [Constant("sent2", "negative", 0.25)]
    assert score_subtask(SUBTASKS["sent2"], test, ["negative"] * 4) == 0.25
