"""`kill -9` of the whole process tree, in training and in a search; the same command brings the same bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_driver import SUBTASKS, Desk, Ended, desk, frozen, manifest, runs_of, states

Files = dict[str, tuple[int, int, bytes]]
pytestmark = pytest.mark.timeout(1800)
FIXED = ("split", "anchors", "expert", "reference", "unified", "gate")


@dataclass(frozen=True)
class Story:
    """A run that was killed twice and then ended, and the store's files as each of the three left them."""

    desk: Desk
    trained: Files
    searched: Files
    whole: Files
    last: Ended


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Story]:
    """Kill the tree while experts train, then while candidates are told, then let the command end."""
    with desk(tmp_path_factory.mktemp("kills"), tiny_base) as place:
        root = place.cwd / "memmcl-store"
        with place.started("run", place.config) as running:
            running.wait_until(lambda: any((root / "manifests/expert").glob("*.json")), "an expert is published")
            assert running.kill() > 4, "the command, the Prefect server, Ray's daemons, its workers"
        trained = frozen(root)
        with place.started("run", place.config) as running:
            running.wait_until(lambda: len(list((root / "logs/searches").glob("*/*.json"))) > 2, "candidates are told")
            running.kill()
        searched = frozen(root)
        last = place.run("run", place.config)
        yield Story(place, trained, searched, frozen(root), last)


def test_the_kills_came_in_the_middle(story: Story) -> None:
    experts = [path for path in story.trained if path.startswith("manifests/expert/")]
    assert 0 < len(experts) <= len(SUBTASKS), "of six and the joint one"
    assert not any(path.startswith("logs/") for path in story.trained)
    assert len([path for path in story.searched if path.startswith("manifests/expert/")]) == len(SUBTASKS) + 1
    assert any(path.startswith("logs/searches/") for path in story.searched)
    assert not any(path.startswith("manifests/search/") for path in story.searched)


def test_the_same_command_finishes_the_run(story: Story, reference: Desk) -> None:
    assert story.last.code == 0, story.last
    assert "Traceback" not in story.last.out + story.last.err
    assert re.search(r"^unified .*\d", story.last.out, re.MULTILINE)
    verification = story.desk.store.verify()
    assert list(verification.problems) == []
    assert verification.manifests == len(reference.store.list())


def test_the_unified_model_is_that_of_an_uninterrupted_run(story: Story, reference: Desk) -> None:
    killed, whole = (manifest(place.store, "unified", "unified model") for place in (story.desk, reference))
    assert killed.blobs["adapter_model.safetensors"].sha256 == whole.blobs["adapter_model.safetensors"].sha256
    for kind in FIXED:
        theirs = {one.key: one.blobs for one in reference.store.list(kind)}
        assert {one.key: one.blobs for one in story.desk.store.list(kind)} == theirs, kind


def test_nothing_published_was_made_again(story: Story) -> None:
    """Same inode, same time, same bytes: no expert was trained twice, no candidate told twice."""
    for before, after in ((story.trained, story.searched), (story.searched, story.whole)):
        assert {path: after[path] for path in before} == before
    experts = list(story.desk.store.list("expert"))
    reused = Counter(name for name, state in states(story.desk.history, "task_run") if state == "Reused")
    for one in experts:
        path = f"manifests/expert/{one.key}.json"
        found = sum(path in files for files in (story.trained, story.searched))
        assert reused[one.name] == found, one.name


def test_told_candidates_were_not_evaluated_again(story: Story) -> None:
    """The first result that the last command reports comes after all that were told before."""
    told = sum(path.startswith("logs/searches/") for path in story.searched)
    counts = [int(found) for found in re.findall(r"search SC, .*: (\d+) of \d+,", story.last.err)]
    assert counts, story.last.err
    assert counts == sorted(set(counts))
    assert counts[0] > told


def test_killed_runs_are_crashed_in_the_history(story: Story) -> None:
    flows = Counter(runs_of(story.desk.history))
    assert flows["tiny", "Crashed"] == 2
    assert flows["tiny", "Completed"] == 1
    assert flows["experts", "Crashed"] == 1
    assert flows["merge", "Crashed"] == 1
    tasks = states(story.desk.history, "task_run")
    for name, state in [*flows, *tasks]:
        assert state in {"Completed", "Reused", "Crashed"}, f"{name} is {state}"
