"""Splits: disjoint by content, balanced, independent of row order, and honest about what they drop."""

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example, normalised
from memmcl.suite.splits import PARTS, PREPARED_PARTS, Splits, load_splits, prepare, split_embedded

Sources = dict[str, dict[str, list[Example]]]


def rows(dataset: str, words: Iterable[object], label: str = "positive") -> list[Example]:
    return [Example.create(dataset, f"{word} in words", label) for word in words]


def source(train: list[Example], weak: list[Example], test: list[Example]) -> dict[str, list[Example]]:
    return {"train": train, "weak": weak, "test": test}


def plain(dataset: str) -> dict[str, list[Example]]:
    return source(*(rows(dataset, [f"{dataset} {part} {i}" for i in range(20)]) for part in ("train", "weak", "test")))


def everything(splits: Sources, **rules: object) -> Splits:
    caps = {"train_rows": None, "weak_rows": 1000, "selection_rows": 0, "test_rows": None}
    return prepare(splits, **{**caps, **rules})  # type: ignore[arg-type]


def contents(splits: Splits, part: str) -> set[str]:
    return {normalised(example.text) for parts in splits.parts.values() for example in parts[part]}


def test_an_embedded_row_stays_where_its_content_puts_it() -> None:
    words = [f"sentence number {i}" for i in range(400)]
    first = split_embedded({"sent2": rows("embedded_sent2", words)})["sent2"]
    sizes = {part: len(first[part]) for part in PARTS}
    assert sum(sizes.values()) == 400
    assert 85 < sizes["test"] < 155  # 30 %, within about four standard deviations
    assert 50 < sizes["weak"] < 112  # 20 %
    loud = [word.upper() + "!" for word in words]
    random.Random(0).shuffle(loud)
    second = split_embedded({"other": rows("embedded_other", [*loud, "an added one"])})["other"]
    for part in PARTS:
        assert {normalised(e.text) for e in first[part]} <= {normalised(e.text) for e in second[part]}


def test_parts_come_out_whole_where_nothing_overlaps() -> None:
    splits = everything({"a": plain("one"), "b": plain("two")})
    assert splits.dropped == {}
    assert [{part: len(parts[part]) for part in PREPARED_PARTS} for parts in splits.parts.values()] == [
        {"train": 20, "weak": 20, "selection": 0, "test": 20}
    ] * 2


def test_test_texts_in_the_same_data_set_are_an_error_or_dropped() -> None:
    one = plain("one")
    one["train"] += [Example.create("one", "ONE test 3, in words!", "negative"), *rows("one", ["one test 4"])]
    message = r"overlapping splits: 2 train rows of 'a' .* in one; .* or set data\.on_overlap: drop"
    with pytest.raises(DataError, match=message) as caught:
        everything({"a": one})
    assert "test 3, in words" in str(caught.value) or "test 4 in words" in str(caught.value)
    splits = everything({"a": one}, on_overlap="drop")
    assert splits.dropped == {"train rows whose text is in the test split of their data set": 2}
    assert len(splits.parts["a"]["train"]) == 20

    weak = plain("one")
    weak["weak"] += rows("one", ["one test 0"])
    with pytest.raises(DataError, match="1 weak rows of 'a'"):
        everything({"a": weak})
    assert everything({"a": weak}, on_overlap="drop").dropped == {
        "weak rows whose text is in the test split of their data set": 1
    }


def test_texts_of_other_data_sets_and_subtasks_are_dropped_and_counted() -> None:
    one, two = plain("one"), plain("two")
    one["train"] += rows("one", ["two test 1", "two weak 1", "two weak 2", "one weak 1"])
    one["weak"] += rows("one", ["two test 2"])
    one["train"] += rows("one", ["two test 2"])
    one["train"] += rows("three", ["one test 5"])  # a sibling data set of the same subtask
    for rule in ("error", "drop"):
        splits = everything({"a": one, "b": two}, on_overlap=rule)
        assert splits.dropped == {
            "train rows whose text is in a test part": 3,
            "weak rows whose text is in a test part": 1,
            "train rows whose text is in a weak part": 3,
        }
        assert [len(splits.parts["a"][part]) for part in PARTS] == [20, 20, 20]


def test_parts_are_disjoint_by_content_whatever_overlaps() -> None:
    generator = random.Random(1)
    refused = 0
    for _ in range(200):
        sources = {
            name: source(*(rows(name + str(generator.randrange(2)), generator.sample(range(60), 12)) for _ in PARTS))
            for name in "abc"
        }
        try:
            splits = prepare(sources, train_rows=None, weak_rows=3, selection_rows=2, test_rows=None, on_overlap="drop")
        except DataError:  # nothing left of a part
            refused += 1
            continue
        parts = [contents(splits, part) for part in PREPARED_PARTS]
        assert sum(len(part) for part in parts) == len(set().union(*parts))
        read = sum(len(part) for pool in sources.values() for part in pool.values())
        weak_left = sum(len(pool["weak"]) for pool in everything(sources, on_overlap="drop").parts.values())
        kept = weak_left + sum(len(pool[part]) for pool in splits.parts.values() for part in ("train", "test"))
        assert read == kept + sum(splits.dropped.values())
    assert refused < 100


def test_the_same_rows_in_any_order_give_the_same_splits() -> None:
    sources = {"a": plain("one"), "b": plain("two")}
    caps = {"train_rows": 7, "weak_rows": 5, "selection_rows": 3, "test_rows": 6}
    first = everything(sources, **caps)
    generator = random.Random(2)
    shuffled = {
        name: {part: generator.sample(pool[part], len(pool[part])) for part in reversed(PARTS)}
        for name, pool in reversed(sources.items())
    }
    second = everything(shuffled, **caps)
    assert first.parts == second.parts
    assert first.digest("a", "train") == second.digest("a", "train")
    larger = everything(sources, **{**caps, "train_rows": 9})
    assert larger.parts["a"]["train"][:7] == first.parts["a"]["train"]


def test_the_digest_is_that_of_the_rows() -> None:
    first = everything({"a": plain("one")})
    changed = plain("one")
    changed["train"][0] = Example.create("one", changed["train"][0].text, "negative")
    second = everything({"a": changed})
    assert first.digest("a", "train") != second.digest("a", "train")
    assert first.digest("a", "test") == second.digest("a", "test")
    assert len({first.digest("a", part) for part in PREPARED_PARTS}) == 4


def test_weak_and_selection_rows_are_balanced_over_labels_then_data_sets() -> None:
    weak = [
        *rows("one", [f"p{i}" for i in range(90)], "positive"),
        *rows("one", [f"n{i}" for i in range(15)], "negative"),
        *rows("two", [f"q{i}" for i in range(50)], "positive"),
        *rows("two", [f"m{i}" for i in range(40)], "negative"),
        *rows("two", [f"u{i}" for i in range(10)], "neutral"),
    ]
    sources = {"a": {**plain("one"), "weak": weak}}
    parts = everything(sources, weak_rows=24, selection_rows=6).parts["a"]
    assert Counter(e.gold for e in parts["weak"]) == {"positive": 8, "negative": 8, "neutral": 8}
    assert Counter((e.gold, e.dataset) for e in parts["weak"])["positive", "one"] == 4
    assert Counter((e.gold, e.dataset) for e in parts["weak"])["negative", "two"] == 4
    assert Counter(e.gold for e in parts["weak"][:12]) == {"positive": 4, "negative": 4, "neutral": 4}
    assert Counter(e.gold for e in parts["selection"]) == {"positive": 2, "negative": 2, "neutral": 2}
    assert not {e.id for e in parts["weak"]} & {e.id for e in parts["selection"]}
    assert Counter(e.gold for e in everything(sources, weak_rows=60).parts["a"]["weak"]) == {
        "positive": 25,
        "negative": 25,
        "neutral": 10,
    }


def test_train_and_test_rows_are_balanced_over_data_sets_only() -> None:
    train = [
        *rows("one", range(100)),
        *rows("two", range(100, 110)),
        *rows("three", range(200, 230), "negative"),
    ]
    parts = everything({"a": {**plain("one"), "train": train}}, train_rows=30).parts["a"]
    assert Counter(e.dataset for e in parts["train"]) == {"one": 10, "two": 10, "three": 10}
    parts = everything({"a": {**plain("one"), "train": train}}, train_rows=60).parts["a"]
    assert Counter(e.dataset for e in parts["train"]) == {"one": 25, "two": 10, "three": 25}


def test_tuple_rows_are_balanced_over_data_sets() -> None:
    weak = [Example.create(name, f"{name} {i}", [("a", "positive")]) for name in ("p", "q") for i in range(30)]
    parts = everything({"a": {**plain("one"), "weak": weak}}, weak_rows=10).parts["a"]
    assert Counter(e.dataset for e in parts["weak"]) == {"p": 5, "q": 5}


def test_weak_and_selection_share_no_text_over_subtasks() -> None:
    shared = [f"shared {i}" for i in range(12)]
    sources = {name: {**plain(name), "weak": rows(name, shared)} for name in "abc"}
    splits = everything(sources, weak_rows=8, selection_rows=4)
    assert not contents(splits, "weak") & contents(splits, "selection")
    assert all(len(parts["weak"]) == 8 for parts in splits.parts.values())
    assert all(len(parts["selection"]) == 4 for parts in splits.parts.values())


def test_repeated_rows_are_kept_once() -> None:
    one = plain("one")
    one["test"] += one["test"][:3]
    splits = everything({"a": one})
    assert splits.dropped == {"repeated rows of a part": 3}
    assert len(splits.parts["a"]["test"]) == 20


@pytest.mark.parametrize("part", PARTS)
def test_an_empty_part_is_refused(part: str) -> None:
    sources = {"a": plain("one"), "b": {**plain("two"), part: []}}
    with pytest.raises(DataError, match=rf"the {part} part of subtask 'b' is empty: its source has 0 {part} rows"):
        everything(sources)
    with pytest.raises(DataError, match=f"{part}_rows is 0; ask for at least 1"):
        everything({"a": plain("one")}, **{f"{part}_rows": 0})
    with pytest.raises(ConfigError, match=f"{part}_rows must not be negative, got -1"):
        everything({"a": plain("one")}, **{f"{part}_rows": -1})


def test_a_selection_that_weak_rows_use_up_is_refused() -> None:
    with pytest.raises(DataError, match="the selection part of subtask 'a' is empty: its source has 20 weak rows"):
        everything({"a": plain("one")}, weak_rows=20, selection_rows=1)


def test_load_splits_refuses_what_is_not_there(tmp_path: Path) -> None:
    caps = {"train_rows": 1, "weak_rows": 1, "selection_rows": 0, "test_rows": 1}
    with pytest.raises(DataError, match="is not a directory"):
        load_splits(str(tmp_path / "nowhere"), ["sent2"], **caps)
    with pytest.raises(ConfigError, match="unknown subtask 'sent4'"):
        load_splits("embedded", ["sent4"], **caps)
