"""The embedded corpus itself: its rows, its annotation, its data card, and what it must not share."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import SENTIEVAL, needs_sentieval, read_corpus

from memmcl import seeds
from memmcl.suite import embedded
from memmcl.suite.embedded import DINING, UNNAMED
from memmcl.suite.examples import Example, normalised
from memmcl.suite.sources import SOURCE_SPLITS, split_of
from memmcl.suite.subtasks import POLARITIES, SUBTASKS

CORPUS = Path(embedded.__file__).parent / "corpus"
CARD = (CORPUS / "README.md").read_text()
WINDOW = 36
FROM_QUADS = ("uabsa", "aste", "asqp", "asc")
OF_VERSION_1 = {
    "sent2": "a4605796116a87fb14d1abc3924f57164092507756103f051f2cafa5bf3b4b5a",
    "emotion": "62ea68f8caa8a372d765524717e40c832eeec6023ea98ae68d607c1d890fee70",
    "irony": "819b61aebbd5f7a2cd00b747d32c2875a44d7e8c791ed4a8a8883ce33ce93d51",
    "uabsa": "8cd4c2eec4c5fd601b317a5004392327a2d79e994ac74de4d9c41f5dd749c69f",
    "aste": "84068062acbbd04934ba33cc0653b9f3afa9386e3276491801a4f21eaf3aaaff",
    "asc": "8ef99904843a7a5ec1f3f36924e22c0bd1b87bf214b63654497ad3d273c6b587",
}
TWINS = {
    frozenset({"irony-016", "irony-195"}),
    frozenset({"irony-017", "irony-104"}),
    frozenset({"irony-039", "irony-072"}),
    frozenset({"irony-069", "irony-179"}),
    frozenset({"irony-107", "irony-140"}),
}
"""Rows of version 1 that open alike and have different labels; see the data card."""


@cache
def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CORPUS / name).read_text().splitlines()]


def all_rows() -> list[dict[str, Any]]:
    return [row for file in sorted(CORPUS.glob("*.jsonl")) for row in rows_of(file.name)]


def sentences() -> list[dict[str, Any]]:
    return [row for file in sorted(CORPUS.glob("absa_*.jsonl")) for row in rows_of(file.name)]


@cache
def examples(name: str) -> list[Example]:
    return read_corpus(SUBTASKS[name])


def in_parts(name: str) -> dict[str, list[Example]]:
    return {part: [row for row in examples(name) if split_of(row.text) == part] for part in SOURCE_SPLITS}


def windows(text: str) -> Iterator[str]:
    content = normalised(text)
    return (content[start : start + WINDOW] for start in range(len(content) - WINDOW + 1))


@pytest.mark.parametrize("name", SUBTASKS)
def test_a_subtask_has_enough_rows_in_every_part(name: str) -> None:
    sizes = {part: len(rows) for part, rows in in_parts(name).items()}
    assert sum(sizes.values()) >= 120
    assert sizes["train"] >= 64, sizes
    assert sizes["weak"] >= 24, sizes
    assert sizes["test"] >= 32, sizes
    assert len({row.id for row in examples(name)}) == sum(sizes.values())
    assert {row.dataset for row in examples(name)} == {f"embedded_{name}"}


@pytest.mark.parametrize("name", SUBTASKS)
def test_every_label_occurs_in_every_part(name: str) -> None:
    subtask = SUBTASKS[name]
    for part, rows in in_parts(name).items():
        if subtask.is_tuple:
            place = subtask.tuple_fields.index("polarity")
            counts, expected = Counter(item[place] for row in rows for item in row.gold), POLARITIES
        else:
            counts, expected = Counter(str(row.gold) for row in rows), subtask.labels
        assert set(counts) == set(expected), part
        assert min(counts.values()) >= 3, (part, counts)


def test_the_rows_of_version_1_are_what_they_were() -> None:
    digests = {
        name: seeds.digest([[row.id, row.dataset, row.text, row.gold, dict(row.fields)] for row in examples(name)])
        for name in OF_VERSION_1
    }
    assert digests == OF_VERSION_1


def test_ids_are_unique_and_texts_are_clean() -> None:
    rows = all_rows()
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({normalised(row["text"]) for row in rows}) == len(rows)
    for row in rows:
        assert row["text"] == row["text"].strip(), row["id"]
        assert "  " not in row["text"], row["id"]
        assert row["text"].isprintable(), row["id"]


def test_no_two_rows_share_36_letters_and_digits() -> None:
    first: dict[str, str] = {}
    sharing = set()
    for row in all_rows():
        for window in windows(row["text"]):
            other = first.setdefault(window, row["id"])
            if other != row["id"]:
                sharing.add(frozenset({other, row["id"]}))
    assert sharing == TWINS


@needs_sentieval
def test_no_row_repeats_or_shares_36_letters_and_digits_with_a_row_of_sentieval() -> None:
    files = sorted(SENTIEVAL.glob("*/*/*.jsonl"))
    assert len(files) >= 26 * 3
    published = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    found = repeated((row["text"] for row in all_rows()), published)
    assert found == set()
    borrowed = "Overheard in a queue: " + max(published[:100], key=len)
    assert repeated([borrowed, "Fresh."], published) == {borrowed}


def repeated(texts: Iterable[str], published: Iterable[str]) -> set[str]:
    """Return those of `texts` that equal a published text, or share a window with one."""
    own: dict[str, set[str]] = {}
    for text in texts:
        own.setdefault(normalised(text), set()).add(text)
        for window in windows(text):
            own.setdefault(window, set()).add(text)
    found: set[str] = set()
    for text in published:
        found |= own.get(normalised(text), set())
        for window in windows(text):
            found |= own.get(window, set())
    return found


def test_aspects_and_opinions_stand_in_their_sentences() -> None:
    for row in sentences():
        assert row["domain"], row["id"]
        for quad in row["quads"]:
            assert set(quad) == {"aspect", "opinion", "polarity", "category"}, row["id"]
            assert quad["opinion"] in row["text"], row["id"]
            assert quad["aspect"] in row["text"] or quad["aspect"] == UNNAMED, row["id"]
            assert quad["polarity"] in POLARITIES, row["id"]
        spans = Counter((quad["category"], quad["aspect"], quad["opinion"]) for quad in row["quads"])
        assert set(spans.values()) <= {1}, row["id"]


def test_dining_sentences_use_the_categories_that_the_question_names_and_all_of_them() -> None:
    named = re.search(r"Categories: (.*)\.$", SUBTASKS["asqp"].instruction)
    assert named is not None
    categories = set(named[1].split(", "))
    assert len(categories) == 13
    used = Counter(quad["category"] for row in sentences() if row["domain"] in DINING for quad in row["quads"])
    assert set(used) == categories
    assert {item[0] for row in in_parts("asqp")["train"] for item in row.gold} == categories
    unnamed = Counter(
        part for part, rows in in_parts("asqp").items() for row in rows for item in row.gold if item[1] == UNNAMED
    )
    assert unnamed.keys() == set(SOURCE_SPLITS)
    assert min(unnamed.values()) >= 3, unnamed


def test_asqp_has_the_dining_sentences_with_quads_and_no_others() -> None:
    expected = {row["text"] for row in sentences() if row["domain"] in DINING and row["quads"]}
    assert {row.text for row in examples("asqp")} == expected
    assert all(row.gold for row in examples("asqp"))


def test_one_annotation_gives_uabsa_aste_asqp_and_asc_the_same_answer() -> None:
    assert_consistent({name: examples(name) for name in FROM_QUADS}, shared=75)


def test_sentences_that_serve_asqp_alone_would_give_the_others_the_same_answer(tmp_path: Path) -> None:
    alone = [row for row in sentences() if "serves" in row]
    assert {tuple(row["serves"]) for row in alone} == {("asqp",)}
    lines = [json.dumps({key: value for key, value in row.items() if key != "serves"}) for row in alone]
    (tmp_path / "absa_all.jsonl").write_text("\n".join(lines))
    read = {name: read_corpus(SUBTASKS[name], tmp_path) for name in FROM_QUADS}
    unnamed = {row["text"] for row in alone if any(quad["aspect"] == UNNAMED for quad in row["quads"])}
    assert len(unnamed) >= 24
    assert {row.text for row in read["uabsa"]} == {row["text"] for row in alone} - unnamed
    assert {row.text for row in read["aste"]} == {row["text"] for row in alone} - unnamed
    assert UNNAMED not in {row.fields["aspect"] for row in read["asc"]}
    assert_consistent(read, shared=len(alone) - len(unnamed))


def assert_consistent(read: dict[str, list[Example]], *, shared: int) -> None:
    """Compare the answers about every text that several subtasks have; `shared` texts serve all three tuple ones."""
    quads, triplets, pairs = ({row.text: set(row.gold) for row in read[name]} for name in ("asqp", "aste", "uabsa"))
    assert len(quads.keys() & triplets.keys() & pairs.keys()) == shared
    for text, items in triplets.items():
        assert {(aspect, polarity) for aspect, _, polarity in items} == pairs[text], text
    for text, items in quads.items():
        if text in triplets:
            assert {item[1:] for item in items} == triplets[text], text
    assert {text for text, items in pairs.items() if items} == set(triplets)
    known = {**pairs, **{text: {(item[1], item[3]) for item in items} for text, items in quads.items()}}
    asked: dict[str, set[tuple[str, str]]] = {}
    for row in read["asc"]:
        asked.setdefault(row.text, set()).add((row.fields["aspect"], str(row.gold)))
    for text, items in known.items():
        if text in pairs or text in asked:
            polarities = Counter(aspect for aspect, _ in items)
            single = {item for item in items if polarities[item[0]] == 1 and item[0] != UNNAMED}
            assert asked.get(text, set()) == single, text


def test_the_aspect_of_an_implicit_row_stands_in_its_text() -> None:
    rows = rows_of("implicit.jsonl")
    assert all(row["aspect"] in row["text"] for row in rows)
    assert set(Counter(row["label"] for row in rows).values()) == {len(rows) // 3}


def test_compared_objects_stand_in_their_text_and_their_order_does_not_tell_the_answer() -> None:
    rows = rows_of("compsent.jsonl")
    orders: Counter[tuple[bool, str]] = Counter()
    for row in rows:
        places = [row["text"].find(row[name]) for name in ("object_a", "object_b")]
        assert min(places) >= 0, row["id"]
        assert places[0] != places[1], row["id"]
        orders[places[0] < places[1], row["label"]] += 1
    assert orders.keys() == {(first, label) for first in (True, False) for label in ("better", "worse")}
    assert Counter(row["label"] for row in rows) == {"better": len(rows) // 2, "worse": len(rows) // 2}


def test_the_data_card_counts_the_rows_and_labels_of_every_file() -> None:
    listed = re.findall(r"^\| `(\w+\.jsonl)` \| (\d+) \| (.*?) \|", CARD, flags=re.MULTILINE)
    assert [name for name, _, _ in listed] == sorted(file.name for file in CORPUS.glob("*.jsonl"))
    for name, count, said in listed:
        rows = rows_of(name)
        assert int(count) == len(rows), name
        if not name.startswith("absa_"):
            labels = Counter(row["label"] for row in rows)
            assert said == ", ".join(f"{label} {labels[label]}" for label in SUBTASKS[name[:-6]].labels), name
    total = len(all_rows())
    assert CARD.count(f"{total:,} short English texts") == 1
    assert CARD.count(f"version 2, {total:,} rows") == 1


def test_the_data_card_counts_the_rows_that_each_subtask_gets() -> None:
    listed = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", CARD, flags=re.MULTILINE)
    sizes = {name: [len(in_parts(name)[part]) for part in ("train", "weak", "test")] for name in SUBTASKS}
    assert listed == [(name, str(sum(counts)), *map(str, counts)) for name, counts in sizes.items()]
