"""Splits: disjoint by content, balanced, independent of row order, and honest about what they drop."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import SENTIEVAL, needs_sentieval

from memmcl.errors import ConfigError, DataError
from memmcl.suite.examples import Example, normalised
from memmcl.suite.sources import SOURCE_SPLITS, Reading, Source
from memmcl.suite.splits import SPLITS, Splits, load_splits, prepare
from memmcl.suite.subtasks import SUBTASKS

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


def test_parts_come_out_whole_where_nothing_overlaps() -> None:
    splits = everything({"a": plain("one"), "b": plain("two")})
    assert splits.dropped == {}
    assert [{part: len(parts[part]) for part in SPLITS} for parts in splits.parts.values()] == [
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
        assert [len(splits.parts["a"][part]) for part in SOURCE_SPLITS] == [20, 20, 20]


def test_parts_are_disjoint_by_content_whatever_overlaps() -> None:
    generator = random.Random(1)
    refused = 0
    for _ in range(200):
        sources = {
            name: source(
                *(rows(name + str(generator.randrange(2)), generator.sample(range(60), 12)) for _ in SOURCE_SPLITS)
            )
            for name in "abc"
        }
        try:
            splits = prepare(sources, train_rows=None, weak_rows=3, selection_rows=2, test_rows=None, on_overlap="drop")
        except DataError:  # nothing left of a part
            refused += 1
            continue
        parts = [contents(splits, part) for part in SPLITS]
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
        name: {part: generator.sample(pool[part], len(pool[part])) for part in reversed(SOURCE_SPLITS)}
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
    assert len({first.digest("a", part) for part in SPLITS}) == 4


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
    train = [*rows("one", range(100)), *rows("two", range(100, 110)), *rows("three", range(200, 230), "negative")]
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


def test_repeated_rows_count_once_but_in_the_test_part() -> None:
    """Published scores count each test row, repeated or not."""
    one = plain("one")
    for part in SOURCE_SPLITS:
        one[part] += one[part][:3]
    one["test"].append(replace(one["test"][0], gold="negative"))
    splits = everything({"a": one})
    assert splits.dropped == {"repeated rows of a part": 6}
    assert {part: len(splits.parts["a"][part]) for part in SOURCE_SPLITS} == {"train": 20, "weak": 20, "test": 24}
    assert Counter(row.id for row in splits.parts["a"]["test"]) == Counter(row.id for row in one["test"])


LONG = "the soup at the harbour was worth the long trip"  # 38 letters


def test_rows_that_share_36_characters_with_any_test_text_are_dropped_and_counted() -> None:
    one, two = plain("one"), plain("two")
    two["test"].append(Example.create("two", f"Well, {LONG}. Really!", "positive"))
    one["train"] += [
        Example.create("one", f"They said {LONG.upper()}?", "positive"),
        Example.create("one", f"{LONG[:-2]} xyz", "positive"),  # 36 characters
        Example.create("one", f"{LONG[:-3]} xyz", "positive"),  # 35 characters
    ]
    two["weak"].append(Example.create("two", f"{LONG}", "negative"))  # of the same data set: not equal, no error
    two["train"].append(Example.create("three", f"Well {LONG} really", "negative"))
    splits = everything({"a": one, "b": two})
    assert splits.dropped == {
        "train rows that share 36 characters with a test text": 2,
        "weak rows that share 36 characters with a test text": 1,
        "train rows whose text is in a test part": 1,
    }
    assert f"{LONG[:-3]} xyz" in {row.text for row in splits.parts["a"]["train"]}


def test_without_weak_labels_weak_rows_are_drawn_without_looking_at_them() -> None:
    few = rows("one", [f"n{i}" for i in range(5)], "negative")
    sources = {"a": {**plain("one"), "weak": [*rows("one", [f"p{i}" for i in range(60)]), *few]}}
    blind = everything(sources, weak_rows=20, weak_labels=False).parts["a"]["weak"]
    assert Counter(row.gold for row in everything(sources, weak_rows=10).parts["a"]["weak"]) == {
        "positive": 5,
        "negative": 5,
    }
    flipped = {"a": {**sources["a"], "weak": [replace(row, gold="x" + row.id) for row in sources["a"]["weak"]]}}
    again = everything(flipped, weak_rows=20, weak_labels=False).parts["a"]["weak"]
    assert [row.id for row in blind] == [row.id for row in again]
    assert [row.id for row in blind] != [row.id for row in everything(sources, weak_rows=20).parts["a"]["weak"]]


@pytest.mark.parametrize("part", SOURCE_SPLITS)
def test_an_empty_part_is_refused(part: str) -> None:
    sources = {"a": plain("one"), "b": {**plain("two"), part: []}}
    with pytest.raises(
        DataError, match=rf"the {part} split of subtask 'b' is empty: its source has 0 usable {part} rows"
    ):
        everything(sources)
    with pytest.raises(DataError, match=f"{part}_rows is 0; ask for at least 1"):
        everything({"a": plain("one")}, **{f"{part}_rows": 0})
    with pytest.raises(ConfigError, match=f"{part}_rows must not be negative, got -1"):
        everything({"a": plain("one")}, **{f"{part}_rows": -1})


def test_a_selection_that_weak_rows_use_up_is_refused() -> None:
    with pytest.raises(
        DataError, match="the selection split of subtask 'a' is empty: its source has 20 usable weak rows"
    ):
        everything({"a": plain("one")}, weak_rows=20, selection_rows=1)


CAPS = {"train_rows": None, "weak_rows": 4, "selection_rows": 0, "test_rows": None}


def test_load_splits_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory"):
        load_splits([SUBTASKS["sent2"]], Reading(source=str(tmp_path / "nowhere")), **CAPS)


def write(folder: Path, **parts: str) -> Source:
    for part, lines in parts.items():
        (folder / f"{part}.csv").write_text("text,label\n" + lines)
    return Source(**{part: str(folder / f"{part}.csv") for part in parts})


def numbered(part: str, count: int) -> str:
    return "".join(f"{part} {i},{('positive', 'negative')[i % 2]}\n" for i in range(count))


def test_rows_that_cannot_be_used_are_an_error_that_names_the_first_five(tmp_path: Path) -> None:
    broken = "".join(f"broken {i},Positive\n" for i in range(6))
    made = write(
        tmp_path,
        train=numbered("train", 8) + broken,
        weak=numbered("weak", 8),
        test=numbered("test", 8) + ",positive\n",
    )
    with pytest.raises(DataError) as caught:
        load_splits([SUBTASKS["sent2"]], Reading(sources={"sent2": made}), **CAPS)
    message = str(caught.value)
    assert message.startswith("rows that cannot be used: 7 (6 unknown label, 1 empty text): the first 5: ")
    assert [f"train.csv, line {line}: unknown label 'Positive'" in message for line in range(9, 17)] == [
        False,
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert message.endswith("; correct them, or set data.on_error: skip; `memmcl data check` lists all")
    assert "\n" not in message


def test_rows_that_cannot_be_used_are_skipped_and_counted_where_that_is_wanted(tmp_path: Path) -> None:
    made = write(
        tmp_path,
        train=numbered("train", 8) + "x,Positive\ny,\nTest 1!,positive\nother 1,none\n",
        weak=numbered("weak", 8),
        test=numbered("test", 8) + "test 1,negative\n",
    )
    splits = load_splits(
        [SUBTASKS["sent2"]], Reading(sources={"sent2": made}), on_error="skip", on_overlap="drop", **CAPS
    )
    assert splits.dropped == {
        "rows that cannot be used: missing value": 1,
        "rows that cannot be used: unknown label": 2,
        "train rows whose text is in the test split of their data set": 1,
    }
    assert [(fault.place.rpartition("/")[2], fault.kind) for fault in splits.faults] == [
        ("train.csv, line 10", "unknown label"),
        ("train.csv, line 11", "missing value"),
        ("train.csv, line 13", "unknown label"),
    ]
    assert [(fault.place.rpartition("/")[2], fault.kind) for fault in splits.warnings] == [
        ("test.csv, line 10", "repeated row")
    ]
    assert [len(splits.parts["sent2"][part]) for part in SOURCE_SPLITS] == [8, 4, 9]


def test_with_pseudo_labels_the_weak_file_needs_none(tmp_path: Path) -> None:
    made = write(
        tmp_path, train=numbered("train", 8), weak="".join(f"w {i},\n" for i in range(8)), test=numbered("t", 8)
    )
    splits = load_splits([SUBTASKS["sent2"]], Reading(sources={"sent2": made}, weak_labels=False), **CAPS)
    assert [row.gold for row in splits.parts["sent2"]["weak"]] == [""] * 4
    with pytest.raises(DataError, match="8 missing value"):
        load_splits([SUBTASKS["sent2"]], Reading(sources={"sent2": made}), **CAPS)


@needs_sentieval
def test_sentieval_rows_fall_out_for_known_reasons() -> None:
    """The copy was cleaned of most overlaps; two tweets share 36 characters although neither holds the other."""
    splits = load_splits(list(SUBTASKS.values()), Reading(source=str(SENTIEVAL)), **CAPS)
    assert set(splits.dropped) == {
        "train rows whose text is in a weak part",
        "train rows that share 36 characters with a test text",
    }
    assert splits.dropped["train rows that share 36 characters with a test text"] == 1
