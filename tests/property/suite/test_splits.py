"""Splits of any rows: nothing leaks, and what is drawn depends neither on row order nor on other rows."""

from __future__ import annotations

import random
from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from memmcl.errors import DataError
from memmcl.suite.examples import Example, normalised
from memmcl.suite.overlap import WINDOW
from memmcl.suite.sources import SOURCE_SPLITS, split_of
from memmcl.suite.splits import SPLITS, Splits, prepare

Pools = dict[str, dict[str, list[Example]]]

SENTENCES = tuple(
    f"{who} thought that the {what} at the old harbour was {how}"
    for who in ("Everyone", "My brother", "Nobody we met")
    for what in ("fish soup", "waiting room", "evening concert")
    for how in ("worth the long trip", "a waste of money, plainly", "neither here nor there")
)
SHORT = ("good", "Good!", "bad", "!!!", "so so", "meh")


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A short text, or one or two sentences of which many share 36 characters."""
    found = draw(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=2))
    return draw(st.one_of(st.sampled_from(SHORT), st.integers(0, 30).map(str), st.just(". ".join(found))))


@st.composite
def pools(draw: st.DrawFn) -> Pools:
    """Up to three subtasks with two data sets each; every part has a row that nothing else touches."""
    made: Pools = {}
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        made[name] = {
            part: [
                Example.create(draw(st.sampled_from([f"{name}1", f"{name}2"])), text, draw(st.sampled_from("pqr")))
                for text in draw(st.lists(texts(), max_size=10))
            ]
            for part in SOURCE_SPLITS
        }
    return made


def everything(splits: Pools, **rules: object) -> Splits | None:
    """Prepared splits without caps; None where nothing is left of a part."""
    caps: dict[str, object] = {"train_rows": None, "weak_rows": 4, "selection_rows": 2, "test_rows": None}
    try:
        return prepare(splits, on_overlap="drop", **{**caps, **rules})  # type: ignore[arg-type]
    except DataError:
        return None


def contents(splits: Splits, part: str) -> list[str]:
    return [normalised(example.text) for parts in splits.parts.values() for example in parts[part]]


def windows(found: Iterable[str]) -> set[str]:
    return {text[i : i + WINDOW] for text in found for i in range(len(text) - WINDOW + 1)}


def padded(splits: Pools) -> Pools:
    """Give each part rows that nothing else shares, so that none is empty."""
    own = {part: [f"{part} {number}" for number in range(6)] for part in SOURCE_SPLITS}
    return {
        name: {
            part: [*rows, *(Example.create(f"{name}1", f"own {name} {text}", "p") for text in own[part])]
            for part, rows in parts.items()
        }
        for name, parts in splits.items()
    }


@settings(max_examples=150, deadline=None)
@given(pools())
def test_no_train_or_weak_row_repeats_or_shares_a_window_with_any_test_row(made: Pools) -> None:
    splits = everything(padded(made))
    assert splits is not None
    test = {normalised(row.text) for parts in made.values() for row in parts["test"]}
    for part in ("train", "weak", "selection"):
        assert not set(contents(splits, part)) & test
        assert not windows(contents(splits, part)) & windows(test)
    parts = [set(contents(splits, part)) for part in SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts))


@settings(max_examples=150, deadline=None)
@given(pools())
def test_every_row_is_in_a_part_or_counted_as_dropped(made: Pools) -> None:
    splits = everything(padded(made), weak_rows=10_000, selection_rows=0)
    assert splits is not None
    read = sum(len(rows) for parts in padded(made).values() for rows in parts.values())
    assert read == sum(len(rows) for parts in splits.parts.values() for rows in parts.values()) + sum(
        splits.dropped.values()
    )
    for name, parts in padded(made).items():
        assert sorted(row.id for row in splits.parts[name]["test"]) == sorted(row.id for row in parts["test"])


@settings(max_examples=100, deadline=None)
@given(pools(), st.randoms(use_true_random=False))
def test_the_order_of_rows_and_subtasks_does_not_matter(made: Pools, generator: random.Random) -> None:
    made = padded(made)
    shuffled = {
        name: {part: generator.sample(made[name][part], len(made[name][part])) for part in reversed(SOURCE_SPLITS)}
        for name in generator.sample(sorted(made), len(made))
    }
    first, second = everything(made), everything(shuffled)
    assert first is not None
    assert second is not None
    assert first.parts == second.parts
    assert first.dropped == second.dropped


@settings(max_examples=100, deadline=None)
@given(pools(), st.lists(st.integers(0, 10_000), max_size=8, unique=True))
def test_added_rows_that_touch_no_other_move_no_other(made: Pools, numbers: list[int]) -> None:
    """Those of one data set and label keep their order, too."""
    made = padded(made)
    added = {
        name: {
            part: [*rows, *(Example.create(f"{name}2", f"added {part} {number} {name}", "q") for number in numbers)]
            for part, rows in parts.items()
        }
        for name, parts in made.items()
    }
    caps = {"weak_rows": 10_000, "selection_rows": 0}
    first, second = everything(made, **caps), everything(added, **caps)
    assert first is not None
    assert second is not None
    assert first.dropped == second.dropped
    for name in made:
        for part in SOURCE_SPLITS:
            before, after = first.parts[name][part], second.parts[name][part]
            for group in {(row.dataset, row.gold) for row in before}:
                kept = [row for row in after if (row.dataset, row.gold) == group and not row.text.startswith("added ")]
                assert kept == [row for row in before if (row.dataset, row.gold) == group]
            assert len(after) == len(before) + len(numbers)


@settings(max_examples=100, deadline=None)
@given(pools(), st.randoms(use_true_random=False))
def test_without_weak_labels_the_drawn_texts_do_not_depend_on_labels(made: Pools, generator: random.Random) -> None:
    made = padded(made)
    relabelled = {
        name: {
            **parts,
            "weak": [
                Example.create(row.dataset, row.text, generator.choice("pqr"), row.fields) for row in parts["weak"]
            ],
        }
        for name, parts in made.items()
    }
    first, second = everything(made, weak_labels=False), everything(relabelled, weak_labels=False)
    assert first is not None
    assert second is not None
    for name in made:
        for part in SPLITS:
            assert [row.id for row in first.parts[name][part]] == [row.id for row in second.parts[name][part]]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_the_part_of_a_text_is_that_of_its_letters_and_digits(text: str) -> None:
    assert split_of(text) in SOURCE_SPLITS
    if any(character.isalnum() for character in text):
        assert split_of(f"«{text.upper().lower()}…»") == split_of(text.upper().lower())
        assert split_of(normalised(text)) == split_of(text)
