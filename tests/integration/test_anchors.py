"""Anchor rows: who lends them, what their key is made of, and what a retrain takes over from the champion."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from e2e_driver import tiny_config
from tiny import read_corpus

from memmcl.config import parse_config
from memmcl.errors import ConfigError, CorruptArtifact, DataError
from memmcl.store import ArtifactRef, Champions, StageSettings
from memmcl.store.manifest import manifest_path
from memmcl.suite.examples import Example, normalised
from memmcl.suite.sources import split_of
from memmcl.suite.splits import Splits
from memmcl.suite.subtasks import SUBTASKS
from tasks.run.inputs import Inputs, find_inputs
from tasks.run.journal import Pinned
from tasks.run.runtime import Run, open_store
from tasks.stages import anchors, data, experts, pins
from tasks.stages.anchors import Anchors, choose_anchors, publish_anchors, read_anchors
from tasks.stages.opening import open_run
from tasks.stages.pins import pins_of
from tasks.stages.promotion import Champion

MEMBERS = ("irony", "sent2", "uabsa")


@dataclass(frozen=True)
class Place:
    """A run and what it was opened with."""

    run: Run
    inputs: Inputs

    @property
    def splits(self) -> Splits:
        return self.inputs.splits

    def lent(self) -> Anchors:
        found = choose_anchors(self.run, self.splits)
        assert found is not None
        return found


Make = Callable[..., Place]


@pytest.fixture
def make(tmp_path: Path, tiny_base: Path) -> Make:
    """Open a run with other settings; all of them have one store."""

    def made(changes: dict[str, Any] | None = None, *, subtasks: tuple[str, ...] = MEMBERS, **settings: Any) -> Place:
        tree = tiny_config(tiny_base)
        tree["data"] |= {"subtasks": list(subtasks), "train_rows": 12}
        tree["experts"] |= settings
        for section, values in (changes or {}).items():
            tree[section] = tree.get(section, {}) | values
        tree["store"] = {"url": str(tmp_path / "store")}
        config = parse_config(tree)
        inputs = find_inputs(config)
        return Place(open_run(config, inputs), inputs)

    return made


def texts_of(rows: dict[str, list[Example]]) -> set[str]:
    return {normalised(row.text) for found in rows.values() for row in found}


def write_texts(path: Path, count: int, first: int = 0) -> Path:
    path.write_text("".join(f"Note {number}: the kettle of flat {number} hums.\n" for number in range(first, count)))
    return path


# -------------------------------------------------------------------------------------------------- who lends


def test_training_rows_are_lent_by_the_others(make: Make) -> None:
    place = make()
    lent = place.lent()
    assert lent.rows == {name: list(place.splits.parts[name]["train"][:4]) for name in MEMBERS}
    ref = publish_anchors(place.run, place.splits, lent)
    assert ref is not None
    assert ref.key == lent.key
    assert read_anchors(place.run, ref) == lent.rows
    assert publish_anchors(place.run, place.splits, lent) == ref


def test_the_key_is_that_of_the_rows_that_are_lent(make: Make) -> None:
    """More training rows behind those that are lent change nothing, another number or another source does."""
    key = make().lent().key
    assert make({"data": {"train_rows": 15}}).lent().key == key
    assert make(anchor_weight=0.9).lent().key == key
    others = [make(anchor_rows=3), make(anchor_source="corpus"), make(subtasks=(*MEMBERS, "emotion"))]
    assert len({key, *(place.lent().key for place in others)}) == 4


def test_where_nothing_is_held_to_the_base_nobody_lends(make: Make) -> None:
    place = make(anchor_weight=0)
    assert choose_anchors(place.run, place.splits) is None
    assert publish_anchors(place.run, place.splits, None) is None
    assert choose_anchors(make(anchor_weight=0, init="osrm").run, place.splits) is not None


@pytest.mark.parametrize("alone", [True, False])
def test_the_corpus_lends_rows_of_all_subtasks(make: Make, alone: bool) -> None:
    """Also where a run has one subtask alone, and nobody else is there to lend it rows."""
    changes = {"data": {"max_prompt_tokens": 400}}
    place = make(changes, subtasks=("irony",)) if alone else make(changes, anchor_source="corpus")
    lent = place.lent().rows
    assert lent.keys() == SUBTASKS.keys()
    assert {len(rows) for rows in lent.values()} == {4}
    found = {name: read_corpus(subtask) for name, subtask in SUBTASKS.items()}
    for name, rows in lent.items():
        known = {(row.text, row.gold, row.fields) for row in found[name]}
        assert {(row.text, row.gold, row.fields) for row in rows} <= known
        assert {split_of(row.text) for row in rows} == {"train"}
    tests = {normalised(row.text) for parts in place.splits.parts.values() for row in parts["test"]}
    assert texts_of(lent).isdisjoint(tests)


def test_the_corpus_lends_no_text_that_is_tested_here(make: Make, tmp_path: Path) -> None:
    first = [row.text for row in make(anchor_source="corpus").lent().rows["sent2"]]
    rows = [{"text": text, "label": ("irony", "non_irony")[number % 2]} for number, text in enumerate(first)]
    train = [{"text": f"A plain day, note {number}.", "label": "irony"} for number in range(20)]
    for name, content in (("test", rows), ("train", train)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = {"irony": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}}
    place = make({"data": {"sources": sources}}, subtasks=("irony",))
    lent = place.lent().rows
    assert texts_of(lent).isdisjoint(normalised(text) for text in first)
    assert len(lent["sent2"]) == 4, "others in their place"


def test_a_subtask_whose_question_does_not_fit_a_prompt_lends_nothing(make: Make) -> None:
    lent = make({"data": {"max_prompt_tokens": 120}}, subtasks=("irony", "sent2"), anchor_source="corpus").lent().rows
    assert {"irony", "sent2"} <= lent.keys() < SUBTASKS.keys()


def test_texts_are_dealt_in_turn_with_forced_answers(make: Make, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.txt", 30)
    place = make(anchor_source="texts", anchor_texts=str(file))
    lent = place.lent().rows
    assert {name: len(rows) for name, rows in lent.items()} == dict.fromkeys(MEMBERS, 4)
    assert len(texts_of(lent)) == 12, "each text goes to one subtask"
    assert {str(row.gold) for row in lent["irony"]} <= set(SUBTASKS["irony"].labels)
    assert all(isinstance(row.gold, tuple) for row in lent["uabsa"])
    (tmp_path / "other.txt").write_text("\n".join(reversed(file.read_text().splitlines())))
    again = make(anchor_source="texts", anchor_texts=str(tmp_path / "other.txt"))
    assert again.lent().key == place.lent().key, "the order of the lines, and where they lie, change nothing"
    assert again.run.id == place.run.id


def test_a_single_subtask_is_lent_texts_as_the_questions_of_others(make: Make, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.txt", 90)
    changes = {"data": {"max_prompt_tokens": 400}}
    lent = make(changes, subtasks=("irony",), anchor_source="texts", anchor_texts=str(file)).lent().rows
    assert lent.keys() == SUBTASKS.keys()


def test_texts_that_are_tested_or_too_few(make: Make, tmp_path: Path) -> None:
    tested = [row.text for row in make().splits.parts["sent2"]["test"]]
    file = write_texts(tmp_path / "texts.txt", 14)
    file.write_text(file.read_text() + "\n".join(tested))
    lent = make(anchor_source="texts", anchor_texts=str(file)).lent().rows
    assert texts_of(lent).isdisjoint(map(normalised, tested))
    file.write_text("\n".join([*file.read_text().splitlines()[:3], *tested]))
    said = rf"expected at least 12 texts for 3 subtasks, got 3 that can be used in {file} \({len(tested)} overlap"
    with pytest.raises(DataError, match=said):
        make(anchor_source="texts", anchor_texts=str(file))
    with pytest.raises(DataError, match="there is no"):
        make(anchor_source="texts", anchor_texts=str(tmp_path / "gone.txt"))
    with pytest.raises(ConfigError, match="anchor_texts goes with anchor_source: texts"):
        make(anchor_source="texts")


def test_texts_that_change_while_a_run_starts_are_refused(make: Make, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "texts.txt", 30)
    place = make(anchor_source="texts", anchor_texts=str(file))
    data.check_unchanged(place.run, place.splits, place.lent())
    write_texts(file, 50, first=20)
    with pytest.raises(DataError, match="the rows changed while run"):
        data.check_unchanged(place.run, place.splits, place.lent())


# ------------------------------------------------------------------------------------------ what is pinned


@pytest.fixture(autouse=True)
def _plain_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "log", partial(logging.getLogger, "memmcl.test"))
    monkeypatch.setattr(data, "log", partial(logging.getLogger, "memmcl.test"))


def champion_of(place: Place) -> Champion:
    """Return a champion with the anchor rows and the warm start that this run would make, its weights left out."""
    refs, lent, _ = data.publish_splits.fn(place.run)
    assert lent is not None
    train = [refs[name]["train"] for name in sorted(refs)]
    key = experts.warm_key(place.run, place.splits)
    assert key is not None
    store = open_store(place.run)
    warm = store.publish(
        "warm",
        key,
        name="warm start",
        files={},
        inputs=train,
        settings=StageSettings(experts.warm_config(place.run), place.run.config.seed, experts.STAGE_VERSION),
    )
    done = store.publish("run", place.run.id, name="tiny", files={}, inputs=[lent, warm.ref])
    found = {f"{ref.kind}:{ref.name}": ref for ref in done.inputs}
    return Champion(Champions("champion", (), None), done, place.run, found, MEMBERS)


def pinned(place: Place, champion: Champion) -> tuple[bool, bool]:
    """Return whether a retrain of this run takes over the champion's anchor rows, and its warm start."""
    found = pins_of(place.run, champion, place.splits)
    theirs = (champion.refs["anchors:anchor rows"], champion.refs["warm:warm start"])
    assert found.anchors in (None, theirs[0])
    assert found.warm in (None, theirs[1])
    return found.anchors is not None, found.warm is not None


def test_a_retrain_takes_over_what_it_would_make_in_the_same_way(make: Make, tmp_path: Path) -> None:
    champion = champion_of(make())
    assert pinned(make(), champion) == (True, True)
    fewer = make({"data": {"train_rows": 9}})
    assert pinned(fewer, champion) == (True, True), "other rows, the same settings"
    run = open_run(fewer.run.config, fewer.inputs, lambda run: pins_of(run, champion, fewer.splits))
    assert run.pinned.warm == champion.refs["warm:warm start"]
    assert run.id != fewer.run.id
    same = open_run(make().run.config, make().inputs, lambda run: pins_of(run, champion, make().splits))
    assert same.id == champion.run.id, "it would have made the same"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"anchor_rows": 3}, (False, True)),
        ({"anchor_source": "corpus"}, (False, True)),
        ({"anchor_weight": 0.7, "anchor_every": 3}, (True, True)),
        ({"anchor_weight": 0}, (False, True)),
        ({"steps": 10}, (True, False)),
        ({"learning_rate": 1e-3}, (True, False)),
        ({"warm_start": 0}, (True, False)),
        ({"checkpoint_every": 9}, (True, True)),
    ],
)
def test_other_settings_leave_behind_what_they_would_change(
    make: Make, settings: dict[str, Any], expected: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    champion = champion_of(make())
    with caplog.at_level(logging.WARNING, logger="memmcl.test"):
        assert pinned(make(**settings), champion) == expected
    warned = "the champion's warm start was trained with other settings: a new one is trained, all experts retrain"
    assert (warned in caplog.text) == (not expected[1] and settings.get("warm_start") != 0)


def test_another_subtask_needs_another_warm_start(make: Make) -> None:
    champion = champion_of(make())
    assert pinned(make(subtasks=("irony", "sent2", "emotion")), champion) == (True, False)


def test_what_is_tested_now_is_not_taken_over(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training row of the champion has become a test row: neither anchors nor warm start may hold it."""
    before = make()
    champion = champion_of(before)
    tested = before.splits.parts["sent2"]["train"][0].text
    rows = {
        "test": [{"text": tested, "label": "irony"}, {"text": "Nothing of note.", "label": "non_irony"}],
        "train": [{"text": f"A plain day, note {number}.", "label": "irony"} for number in range(20)],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = {"irony": {name: str(tmp_path / f"{name}.jsonl") for name in rows}}
    with caplog.at_level(logging.WARNING, logger="memmcl.test"):
        assert pinned(make({"data": {"sources": sources}}), champion) == (False, False)
    assert "1 pinned anchor rows overlap with test rows now" in caplog.text
    assert "1 rows of the pinned warm start overlap with test rows now" in caplog.text


def test_without_a_champion_nothing_is_pinned(make: Make) -> None:
    place = make()
    assert pins_of(place.run, None, place.splits) == Pinned() == place.run.pinned
    ref = ArtifactRef(kind="anchors", key="ab" * 32, name="anchor rows")
    run = place.run.model_copy(update={"pinned": Pinned(anchors=ref)})
    assert anchors.anchors_key(run, None) == ref.key
    with pytest.raises(CorruptArtifact, match=r"'anchor rows' .*, which an earlier run made, is damaged in file://"):
        publish_anchors(run, place.splits, None)


def damage(place: Place, ref: ArtifactRef) -> None:
    """Tear the manifest of an artifact."""
    open_store(place.run).objects.write(manifest_path(ref.kind, ref.key), b"{")


def test_what_is_damaged_is_not_taken_over(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    place = make()
    champion = champion_of(place)
    assert pinned(place, champion) == (True, True)
    with caplog.at_level(logging.WARNING, logger="memmcl.test"):
        damage(place, next(ref for ref in champion.refs.values() if ref.kind == "anchors"))
        assert pinned(place, champion) == (False, True)
        warm = champion.refs["warm:warm start"]
        damage(place, open_store(place.run).load(warm).inputs[0])  # rows that the warm start was made from
        assert pinned(place, champion) == (False, False)
    assert "the champion's anchor rows are damaged: new ones are chosen" in caplog.text
    assert "the champion's warm start is damaged: a new one is trained" in caplog.text


def test_anchor_rows_that_were_taken_over_are_lent_again_where_the_rows_are_the_same(make: Make) -> None:
    place = make()
    ref = publish_anchors(place.run, place.splits, place.lent())
    assert ref is not None
    rows = read_anchors(place.run, ref)
    damage(place, ref)
    run = place.run.model_copy(update={"pinned": Pinned(anchors=ref)})
    assert publish_anchors(run, place.splits, None) == ref
    assert read_anchors(run, ref) == rows
    damage(place, ref)
    fewer = make(anchor_rows=3)
    run = fewer.run.model_copy(update={"pinned": Pinned(anchors=ref)})
    with pytest.raises(CorruptArtifact, match="repair that run by `memmcl store verify --repair`"):
        publish_anchors(run, fewer.splits, None)
