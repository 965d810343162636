"""`kill -9` of the whole process tree, in training and in a search; the same command brings the same bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_driver import ONE_WORKER, SUBTASKS, Desk, Ended, desk, frozen, lease_holder, manifest, runs_of, states

from memmcl.experts import checkpoint

Files = dict[str, tuple[int, bytes]]
pytestmark = pytest.mark.timeout(1800)
FIXED = ("split", "anchors", "warm", "expert", "reference", "unified", "gate")


@dataclass(frozen=True)
class Story:
    """A run that was killed twice and then ended, and the store's files as each of the three left them.

    refused: the same command while the first was at work, and its process; checkpoints: those that the first left, by
    name the step that each was made after; second: what the second said.
    """

    desk: Desk
    refused: tuple[Ended, int]
    trained: Files
    checkpoints: dict[str, int]
    second: str
    searched: Files
    whole: Files
    last: Ended


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Story]:
    """Kill the tree in the midst of a training, then while candidates are told, then let the command end."""
    with desk(tmp_path_factory.mktemp("kills"), tiny_base) as place:
        root = place.cwd / "memmcl-store"
        command = ("run", place.config, *ONE_WORKER, "--verbose")
        with place.started(*command) as running:
            running.wait_until(lambda: lease_holder(place.store), "it holds the lease")
            refused = place.run(*command), running.process.pid
            assert lease_holder(place.store) == running.process.pid
            running.wait_until(lambda: any((root / "checkpoints").glob("*.bin")), "a training has a checkpoint")
            assert running.kill() > 4, "the command, the Prefect server, Ray's daemons, its workers"
        trained = frozen(root)
        names = [path.stem for path in (root / "checkpoints").glob("*.bin")]
        under_way = [name for name in names if not any((root / "manifests").glob(f"*/{name}.json"))]
        left = {name: place.store.read_checkpoint(name) for name in under_way}
        steps = {name: checkpoint.decode(data)[0].step for name, data in left.items() if data is not None}
        with place.started(*command) as running:
            running.wait_until(lambda: len(list((root / "logs/searches").glob("*/*.json"))) > 2, "candidates are told")
            running.kill()
            second = (running.output / "err").read_text(errors="replace")
        searched = frozen(root)
        last = place.run(*command)
        yield Story(place, refused, trained, steps, second, searched, frozen(root), last)


def test_the_kills_came_in_the_middle(story: Story) -> None:
    experts = [path for path in story.trained if path.startswith("manifests/expert/")]
    assert len(experts) < len(SUBTASKS) + 2, "of six and two rivals"
    assert story.checkpoints, "a training was under way"
    assert all(step >= 2 for step in story.checkpoints.values())
    assert not any(path.startswith("logs/searches/") for path in story.trained)
    assert len([path for path in story.searched if path.startswith("manifests/expert/")]) == len(SUBTASKS) + 2
    assert any(path.startswith("logs/searches/") for path in story.searched)
    assert not any(path.startswith("manifests/search/") for path in story.searched)


def test_a_second_live_run_of_the_same_id_is_refused(story: Story) -> None:
    refused, first = story.refused
    assert refused.code == 1, refused
    (line,) = refused.err.strip().splitlines()  # before a server starts
    assert f"is being worked on by pid {first}" in line
    assert "Traceback" not in refused.out


def test_a_killed_training_goes_on_from_its_checkpoint(story: Story, reference: Desk) -> None:
    """The log says from which step; what comes of it is, bit by bit, what a training without a break makes."""
    trained = {one.key: one for kind in ("warm", "expert") for one in story.desk.store.list(kind)}
    for key, step in story.checkpoints.items():
        one = trained[key]
        label = {"warm start": "warm", "joint LoRA": "joint", "weak LoRA": "weak"}.get(one.name, one.name.split()[-1])
        steps = one.metrics["steps"]
        assert f"{label}: goes on from step {step} of {steps}" in story.second, story.second
        assert one.blobs == reference.store.load(one.ref).blobs
        assert len(one.metrics["loss"]) == steps
    assert story.desk.store.objects.sizes("checkpoints") == {}, "what is published needs none"


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
