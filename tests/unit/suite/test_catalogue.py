"""The catalogue of all 16 subtasks, from rows in SentiEval's layout to scores, difficulties and prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import SENTIEVAL, make_sixteen, prompter_of

from memmcl.config import load_config, parse_config
from memmcl.curriculum import difficulties, order_subtasks
from memmcl.errors import ConfigError, DataError
from memmcl.suite.configured import catalogue, read_splits
from memmcl.suite.examples import Example, normalised
from memmcl.suite.metrics import DATASETS
from memmcl.suite.parsing import match_label, parse_tuples
from memmcl.suite.prompts import query_text
from memmcl.suite.sources import SOURCE_SPLITS, Reading
from memmcl.suite.splits import Splits, load_splits
from memmcl.suite.subtasks import GROUPS, SUBTASKS

CATALOGUE = {
    "SC": ["doc2", "doc5", "sent2", "sent3", "sent5", "asc"],
    "ABSA": ["uabsa", "aste", "asqp"],
    "MAST": ["implicit", "compsent", "irony", "emotion", "hate", "offensive", "stance"],
}
NEEDS = {"asc": ("aspect",), "implicit": ("aspect",), "compsent": ("object_a", "object_b"), "stance": ("target",)}


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sixteen(tmp_path_factory.mktemp("sixteen"))


@pytest.fixture(scope="module")
def splits(sixteen: Path) -> Splits:
    return load_splits(
        list(SUBTASKS.values()),
        Reading(source=str(sixteen)),
        train_rows=None,
        weak_rows=16,
        selection_rows=8,
        test_rows=None,
        on_overlap="error",
    )


def test_sixteen_subtasks_in_three_groups_share_out_the_26_data_sets() -> None:
    assert list(SUBTASKS) == [name for group in GROUPS for name in CATALOGUE[group]]
    assert {name: subtask.group for name, subtask in SUBTASKS.items()} == {
        name: group for group, names in CATALOGUE.items() for name in names
    }
    dealt = Counter(dataset for subtask in SUBTASKS.values() for dataset in subtask.datasets)
    assert dealt == dict.fromkeys(DATASETS, 1)
    assert len({subtask.title for subtask in SUBTASKS.values()}) == 16


def test_what_a_subtask_needs_and_whether_its_meaning_is_literal() -> None:
    assert {name: subtask.needs for name, subtask in SUBTASKS.items() if subtask.needs} == NEEDS
    assert {name for name, subtask in SUBTASKS.items() if subtask.figurative} == {"implicit", "irony"}
    assert {name for name, subtask in SUBTASKS.items() if subtask.unscored_labels} == {"stance"}


def test_the_embedded_corpus_has_rows_of_every_part_for_every_subtask() -> None:
    embedded = load_splits(
        list(SUBTASKS.values()), train_rows=None, weak_rows=24, selection_rows=0, test_rows=None, on_overlap="error"
    )
    for name, parts in embedded.parts.items():
        sizes = {part: len(parts[part]) for part in SOURCE_SPLITS}
        assert sizes["train"] >= 64, (name, sizes)
        assert sizes["weak"] == 24, (name, sizes)
        assert sizes["test"] >= 32, (name, sizes)


def test_invented_rows_load_into_splits_and_hardly_overlap(splits: Splits) -> None:
    assert set(splits.dropped) <= {
        f"{part} rows that share 36 characters with a test text" for part in ("train", "weak")
    }
    lost = sum(splits.dropped.values())
    assert lost < 12  # of 1,152
    for name, parts in splits.parts.items():
        sizes = {part: len(rows) for part, rows in parts.items()}
        assert sizes["test"] == 24, name
        assert sizes["weak"] == 16, name
        assert sizes["train"] >= 24 - lost, name
        assert sizes["selection"] >= 8 - lost, name
    texts = Counter(normalised(row.text) for parts in splits.parts.values() for rows in parts.values() for row in rows)
    assert set(texts.values()) == {1}
    for name, subtask in SUBTASKS.items():
        for part in SOURCE_SPLITS:
            labels = {row.gold for row in splits.parts[name][part]}
            assert subtask.is_tuple or labels == set(subtask.labels), (name, part)


def test_invented_rows_depend_on_the_arguments_alone(sixteen: Path, tmp_path: Path) -> None:
    def content(root: Path) -> dict[str, bytes]:
        return {file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*.jsonl"))}

    first = content(sixteen)
    assert len(first) == 16 * 3
    assert content(make_sixteen(tmp_path / "again")) == first
    other = content(make_sixteen(tmp_path / "other", seed=1))
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)
    fewer = content(make_sixteen(tmp_path / "fewer", rows=5))
    assert {data.count(b"\n") for data in fewer.values()} == {5}


def test_tuples_of_invented_rows_are_those_of_their_texts(splits: Splits) -> None:
    for name in ("uabsa", "aste", "asqp"):
        arity = len(SUBTASKS[name].tuple_fields)
        golds = [row.gold for row in splits.parts[name]["train"]]
        assert {len(gold) for gold in golds} == ({0, 1, 2} if name == "uabsa" else {1, 2})
        for row in splits.parts[name]["train"]:
            assert parse_tuples(row.answer, arity).tuples == row.gold
            for item in row.gold:
                aspect = dict(zip(SUBTASKS[name].tuple_fields, item, strict=True))["aspect"]
                assert aspect == "NULL" or aspect in row.text


def test_difficulty_by_hand_where_it_comes_from_the_catalogue(splits: Splits) -> None:
    rows = {name: parts["train"] for name, parts in splits.parts.items()}
    reports = difficulties(list(SUBTASKS.values()), rows)
    raw = {name: report.raw for name, report in reports.items()}
    assert list(raw) == list(SUBTASKS)
    arity = {name: features["answer_arity"] for name, features in raw.items()}
    assert {name: value for name, value in arity.items() if value != 1} == {"uabsa": 2, "aste": 3, "asqp": 4}
    assert {name: features["classes"] for name, features in raw.items()} == {
        name: len(subtask.labels) or 3 for name, subtask in SUBTASKS.items()
    }
    assert {name for name, features in raw.items() if features["needs_target"]} == set(NEEDS)
    assert {name for name, features in raw.items() if features["figurative"]} == {"implicit", "irony"}
    assert raw["doc5"]["label_entropy"] == pytest.approx(2.319, abs=5e-3)  # log2 5, for 24 rows in turn
    assert raw["stance"]["label_entropy"] == pytest.approx(1.585, abs=5e-3)
    for name, report in reports.items():
        assert 0 <= report.difficulty <= 1, name
        assert report.difficulty == pytest.approx(sum(report.weighted.values()))
    order = order_subtasks({name: report.difficulty for name, report in reports.items()})
    assert sorted(order) == sorted(SUBTASKS)
    assert order.index("asqp") > order.index("aste") > order.index("uabsa") > order.index("sent2")


@pytest.mark.parametrize(
    ("name", "fields", "asked"),
    [
        ("stance", {"target": "climate"}, "Text: It rains.\nTarget: climate"),
        ("implicit", {"aspect": "the roof"}, "Text: It rains.\nAspect: the roof"),
        ("compsent", {"object_b": "Java", "object_a": "PHP"}, "Text: It rains.\nObject a: PHP\nObject b: Java"),
        ("doc5", {}, "Text: It rains."),
        ("asqp", {}, "Text: It rains."),
    ],
)
def test_a_question_names_the_fields_it_needs(name: str, fields: dict[str, str], asked: str) -> None:
    subtask = SUBTASKS[name]
    row = Example.create("d", "It rains.", "x", {**fields, "domain": "left out"})
    assert query_text(subtask, row.text, row) == asked
    for field in subtask.needs:
        lacking = Example.create("d", "It rains.", "x", {key: fields[key] for key in fields if key != field})
        with pytest.raises(DataError, match=f"{name} needs the field '{field}'"):
            query_text(subtask, row.text, lacking)


def test_every_subtask_is_asked_with_demonstrations_of_every_other(splits: Splits, tiny_base: Path) -> None:
    prompter = prompter_of(tiny_base)
    shots = [(subtask, splits.parts[name]["train"][0]) for name, subtask in SUBTASKS.items()]
    for name, subtask in SUBTASKS.items():
        row = splits.parts[name]["test"][0]
        shown = prompter.decode(prompter.prompt(subtask, row, shots))
        assert subtask.instruction in shown
        assert query_text(subtask, row.text, row) in shown
        for other, shot in shots:
            assert f"{query_text(other, shot.text, shot)}\nassistant\n{shot.answer}\n" in shown, other.name


def _answers() -> Iterator[tuple[str, str]]:
    return ((name, label) for name, subtask in SUBTASKS.items() for label in subtask.labels)


@pytest.mark.parametrize(("name", "label"), list(_answers()))
def test_a_label_is_read_from_its_own_text_and_from_a_sentence(name: str, label: str) -> None:
    labels = SUBTASKS[name].labels
    for said in (
        label,
        f" {label.title()}.\n",
        label.replace("-", " "),
        f"The answer is {label}.",
        f"{label}, I think",
    ):
        assert match_label(said, labels) == label, said


def test_rows_of_a_directory_keep_only_the_fields_a_subtask_needs(sixteen: Path, splits: Splits) -> None:
    for name, subtask in SUBTASKS.items():
        folder = sixteen / subtask.group.lower() / subtask.datasets[0]
        written = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
        by_text = {row["text"]: row for row in written}
        for row in splits.parts[name]["test"]:
            assert dict(row.fields) == {field: by_text[row.text][field] for field in subtask.needs}


@pytest.mark.parametrize("name", ["irony", "joint", "sum", "warm", "weak"])
def test_an_own_subtask_may_not_have_the_name_of_something_else(name: str) -> None:
    own = {"name": name, "group": "SC", "instruction": "Which?", "labels": ["a", "b"], "data": {"path": "a.csv"}}
    config = parse_config({"data": {"subtasks": [name], "custom": [own]}})
    with pytest.raises(ConfigError, match=f"the name '{name}' is taken; call your subtask something else"):
        catalogue(config)


def test_the_full_configuration_runs_all_sixteen_on_the_corpus_and_on_the_benchmark() -> None:
    path = Path(__file__).parents[3] / "deployments" / "configs" / "full.yaml"
    config = load_config(path)
    assert sorted(config.data.subtasks) == sorted(SUBTASKS)
    for source in ("embedded", *([str(SENTIEVAL)] if SENTIEVAL.is_dir() else [])):
        splits = read_splits(load_config(path, [f"data.source={source}"]))
        assert all(splits.parts[name][part] for name in SUBTASKS for part in ("train", "weak", "test"))
