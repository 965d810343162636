"""Retraining against a champion: what is trained again, who is promoted, what is left alone, and who says when."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from e2e_driver import COMMAND, SECRETS, Desk, Ended, desk, frozen, planted, read_json, states_below, traces, wait_until
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import State
from servers import prefect_api_server

from flows.deploy import Applied, deploy
from flows.retrain import decide
from memmcl.config import PromotionConfig, load_config
from memmcl.store import ArtifactRef, Manifest, Reign, Store, promote, read_champions
from memmcl.store.champion import now
from memmcl.store.sealed import unseal
from tasks.run.runtime import reopen

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]
DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
FOLDERS = {"sent2": "sc/mr", "irony": "mast/irony"}
USUAL = {"sent2": "positive", "irony": "irony"}
"""Subtask -> the answer of nine test rows in ten: a model that always gives it scores .9, one that never does .1."""
SELDOM = {"sent2": "negative", "irony": "non_irony"}
TEST_ROWS = 20
EVERY_MINUTE = "* * * * *"

RETRAIN = """
import json, sys
from pathlib import Path
from flows.retrain import retrain
from memmcl.config import load_config

state = retrain(load_config(Path(sys.argv[1])), return_state=True)
print(json.dumps({"name": state.name, "type": state.type.value, "message": state.message,
                  "flow_run_id": str(state.state_details.flow_run_id)}))
"""

CONTEST = """
import json, sys, time
from pathlib import Path
from prefect import flow
from flows import retrain
from memmcl.config import PromotionConfig, load_config
from memmcl.store import Store
from tasks.run.runtime import reopen
from tasks.run.ray_session import ray_session
from tasks.stages import promotion

config, run_id, name, ready, go = Path(sys.argv[1]), *sys.argv[2:4], *map(Path, sys.argv[4:6])
store = Store.open(load_config(config).store.url)
challenger = store.find("run", run_id)
run, _, _ = reopen(store, challenger)
settings = run.config.model_copy(update={"promotion": PromotionConfig(champion=name)})
run = run.model_copy(update={"config": settings})
find_champion, take_place, challenge = promotion.find_champion, promotion.take_place, retrain.challenge
met = []

def finding(*arguments):
    champion = find_champion(*arguments)
    met.append(champion.run.id if champion else None)
    return champion

def waiting(*arguments):
    if len(met) == 1:
        ready.touch()
        while not go.exists():
            time.sleep(0.01)
    return take_place(*arguments)

def on_ray(*arguments):
    with ray_session(settings.ray):
        return challenge(*arguments)

promotion.find_champion, promotion.take_place, retrain.challenge = finding, waiting, on_ray

@flow(name="contest")
def contest():
    return retrain.decide(run, challenger)

state = contest(return_state=True)
print(json.dumps({"name": state.name, "message": state.message, "met": met}))
"""
"""Put a finished run to a champion by the retrain's own loop; it stops before its first swap until `go` is there."""


@dataclass(frozen=True)
class Outcome:
    """How one retrain ended, and what it left.

    files: of the store, as it left them. history: of the champion, as it left it. ray: whether it started Ray.
    """

    name: str
    type: str
    message: str
    flow_run_id: UUID
    seconds: float
    ray: bool
    files: dict[str, tuple[int, bytes]]
    history: tuple[Reign, ...]


@dataclass(frozen=True)
class Story:
    """Retrains of one store, in the order in which they ran.

    first: bad labels, no champion yet. same: the same rows. better: good labels. worse: other bad rows.
    turned_down: the same. After a rollback of `better`, back: its rows again. Then the rows are those of `first`.
    """

    desk: Desk
    first: Outcome
    same: Outcome
    better: Outcome
    worse: Outcome
    turned_down: Outcome
    rollback: Ended
    back: Outcome


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own, in place of the session's: it gets deployments, automations and a schedule."""
    with prefect_api_server(tmp_path_factory.mktemp("prefect-server")) as url:
        yield url


@pytest.fixture(scope="module")
def client(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """A client of that server; what this process does with Prefect goes there too."""
    settings = {PREFECT_API_URL: prefect_api, PREFECT_HOME: tmp_path_factory.mktemp("prefect-home")}
    with temporary_settings(settings), get_client(sync_client=True) as it:
        yield it


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, prefect_api: str) -> Iterator[Desk]:
    """A desk with the configuration of all retrains here; its rows are those that `write_rows` wrote last."""
    environment = {**SECRETS, "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
    with desk(tmp_path_factory.mktemp("retrain"), tiny_base, server=prefect_api, environment=environment) as it:
        it.config.write_text(yaml.safe_dump(retrain_config(it, tiny_base)))
        yield it


@pytest.fixture(scope="module")
def scheduled(client: SyncPrefectClient, place: Desk) -> tuple[Path, list[Applied]]:
    """The project's own deployments, the retrain of every minute: the file, and what the first `deploy` did.

    They are made before the story, so that runs are due by the time that a worker is there for them.
    """
    file = place.root / "deployments" / "prefect.yaml"
    file.parent.mkdir()
    wanted = yaml.safe_load((DEPLOYMENTS / file.name).read_text())
    (entry,) = [one for one in wanted["deployments"] if one["name"] == "retrain"]
    entry["schedules"][0]["cron"] = EVERY_MINUTE
    file.write_text(yaml.safe_dump(wanted))
    file.with_name("automations.yaml").write_text((DEPLOYMENTS / "automations.yaml").read_text())
    return file, deploy(file, load_config(place.config))


@pytest.fixture(scope="module")
def story(place: Desk, scheduled: object) -> Story:
    """Let the story happen: three whole retrains, three that find nothing to do, and a rollback."""
    write_rows(place, flipped=True)
    first, same = retrain(place), retrain(place)
    write_rows(place, flipped=False)
    better = retrain(place)
    write_rows(place, flipped=True, texts="later")
    worse, turned_down = retrain(place), retrain(place)
    rollback = place.run("champion", "rollback", "--config", place.config)
    write_rows(place, flipped=False)
    back = retrain(place)
    write_rows(place, flipped=True)
    return Story(place, first, same, better, worse, turned_down, rollback, back)


def test_the_first_retrain_makes_the_first_champion(story: Story) -> None:
    assert (story.first.name, story.first.type) == ("Promoted", "COMPLETED")
    (reign,) = story.first.history
    assert (reign.how, reign.why, reign.name) == ("promotion", "the first of its name", "tiny")
    assert reign.flow_run_id == str(story.first.flow_run_id)
    run = run_of(story, story.first)
    assert run.metrics["unified"] == reign.unified
    assert run.key[:8] in story.first.message
    assert story.first.ray
    assert list(story.desk.store.verify().problems) == []


def test_unchanged_rows_end_at_once(story: Story, client: SyncPrefectClient) -> None:
    champion = story.first.history[-1].run_id
    assert (story.same.name, story.same.type) == ("Unchanged", "COMPLETED")
    assert story.same.message == f"data and settings are those of the champion, run {champion[:8]}"
    assert not story.same.ray
    assert story.same.files == story.first.files
    assert story.same.history == story.first.history
    seen = client.read_flow_run(story.same.flow_run_id)
    assert seen.state is not None
    assert (seen.state.name, seen.state.message) == ("Unchanged", story.same.message)
    assert f"run {champion[:8]}" in seen.name
    print({name: round(outcome.seconds) for name, outcome in vars(story).items() if isinstance(outcome, Outcome)})


def test_only_the_expert_whose_rows_changed_is_trained(story: Story, client: SyncPrefectClient) -> None:
    for before, after in ((story.first, story.better), (story.better, story.worse)):
        experts = published(after, "expert").keys() - published(before, "expert").keys()
        assert [published(after, "expert")[path]["name"] for path in experts] == ["expert sent2"]
        ended = states_below(client, after.flow_run_id)
        assert ended["expert sent2"] == {"Completed"}
        assert ended["expert irony"] == {"Reused"}
        assert ended["reference irony"] == {"Reused"}
        assert ended["warm start"] == {"Reused"}, "it is part of the base, whatever rows it would be made from now"


def test_anchors_the_warm_start_and_the_rows_of_the_others_stay_the_same(story: Story) -> None:
    first, better = (refs(run_of(story, outcome)) for outcome in (story.first, story.better))
    same = {"anchors:anchor rows", "warm:warm start", "split:sent2 test"} | {
        *(f"split:irony {part}" for part in ("train", "weak", "test"))
    }
    changed = {"split:sent2 train", "split:sent2 weak", "expert:expert sent2", "unified:unified model"}
    assert {name for name in same | changed if first[name] == better[name]} == same
    assert len(published(story.worse, "anchors")) == len(published(story.worse, "warm")) == 1


def test_a_better_challenger_takes_the_place(story: Story) -> None:
    assert story.better.name == "Promoted"
    bad, good = story.better.history
    assert (bad,) == story.first.history
    assert good.run_id == run_of(story, story.better).key
    assert good.why in story.better.message
    assert good.why.startswith("better than the champion by +")
    found = judgement(story, story.better)
    assert found["promoted"]
    duels = {duel["subtask"]: duel for duel in found["duels"]}
    assert duels["sent2"]["difference"] > 0.5
    assert found["difference"] == pytest.approx(sum(duel["difference"] for duel in duels.values()) / 2)
    assert found["difference"] > found["margin"] * found["se"] > 0


def test_the_gate_scores_the_champion_as_its_own_report_did(story: Story) -> None:
    """Same model, same test rows, same context: the champion's score in the duel is that of its own run."""
    duels = {duel["subtask"]: duel for duel in judgement(story, story.better)["duels"]}
    scores = {
        score["subtask"]: score["score"]
        for score in read_json(story.desk.store, run_of(story, story.first), "results.json")["scores"]
        if score["model"] == "unified+context"
    }
    assert scores.keys() == duels.keys()
    for name, score in scores.items():
        assert duels[name]["champion"] == pytest.approx(score), name
        assert duels[name]["rows"] == TEST_ROWS


def test_a_worse_challenger_is_turned_down(story: Story) -> None:
    assert (story.worse.name, story.worse.type) == ("NotPromoted", "COMPLETED")
    assert story.worse.history == story.better.history
    found = judgement(story, story.worse)
    assert not found["promoted"]
    said = f"{found['difference']:+.3f} ± {found['se']:.3f} over 2 subtasks, {2 * TEST_ROWS} rows"
    assert f"is worse than the champion beyond noise: {said}, wanted more than 2 standard errors" in story.worse.message
    assert "most lost on sent2 (-" in story.worse.message
    assert found["difference"] < -found["margin"] * found["se"]


def test_what_was_turned_down_is_not_tried_again(story: Story) -> None:
    assert story.turned_down.name == "Unchanged"
    assert judgement(story, story.worse)["reason"] in story.turned_down.message
    assert not story.turned_down.ray
    assert story.turned_down.files == story.worse.files
    assert story.turned_down.history == story.worse.history


def test_the_command_line_retrains_too(story: Story) -> None:
    ended = story.desk.run("retrain", story.desk.config)
    assert ended.code == 0, ended
    champion = story.first.history[0].run_id[:8]
    assert ended.out.splitlines()[-1] == f"Unchanged: data and settings are those of the champion, run {champion}"


def test_what_was_rolled_back_is_not_promoted_again(story: Story) -> None:
    bad, good = (run_of(story, outcome).key for outcome in (story.first, story.better))
    assert story.rollback.code == 0, story.rollback
    assert story.rollback.out.split() == f"champion champion: run {bad[:8]}, tiny (was run {good[:8]})".split()
    assert story.back.name == "Unchanged"
    assert story.back.message == f"these data and settings made run {good[:8]}, which was champion and was rolled back"
    assert not story.back.ray
    assert story.back.files == story.turned_down.files
    assert [(reign.run_id, reign.how) for reign in story.back.history] == [
        (bad, "promotion"),
        (good, "promotion"),
        (bad, "rollback"),
    ]


def test_the_command_lists_the_history_of_the_champion(story: Story) -> None:
    ended = story.desk.run("champion", "history", "--config", story.desk.config)
    assert ended.code == 0, ended
    lines = [line.split() for line in ended.out.splitlines()[1:]]
    newest = [line for line in lines if line[3:4] in (["promotion"], ["rollback"])]
    assert [(line[1], line[3]) for line in newest] == [
        (reign.run_id[:8], reign.how) for reign in reversed(story.back.history)
    ]
    assert f"rolled back from run {story.better.history[-1].run_id[:8]}" in ended.out


def test_who_was_overtaken_is_compared_with_the_new_champion(story: Story, tmp_path: Path) -> None:
    """The challenger beat the champion that it read; before its swap, another run takes the place."""
    bad, good, worse = (run_of(story, outcome).key for outcome in (story.first, story.better, story.worse))
    store = story.desk.store
    crown(store, "overtaken", bad)
    ended = contest(story.desk, "overtaken", tmp_path, good, meanwhile=lambda: crown(store, "overtaken", worse))
    assert ended[good]["met"] == [bad, worse]
    assert ended[good]["name"] == "Promoted"
    history = read_champions(store, "overtaken").history
    assert [reign.run_id for reign in history] == [bad, worse, good]
    assert history[-1].why in ended[good]["message"]
    (found,) = [one for one in store.list("judgement") if one.name == f"run {good[:8]} against champion {worse[:8]}"]
    assert found.metrics["promoted"]


def test_of_two_promotions_at_once_one_wins_and_the_other_is_compared_with_it(story: Story, tmp_path: Path) -> None:
    """Two processes find no champion and swap at the same time; whoever wins, the better model is champion in the end.

    And neither took a place without being compared with the one who had it.
    """
    good, worse = (run_of(story, outcome).key for outcome in (story.better, story.worse))
    ended = contest(story.desk, "race", tmp_path, good, worse)
    history = [reign.run_id for reign in read_champions(story.desk.store, "race").history]
    winner, loser = (good, worse) if history[0] == good else (worse, good)
    assert (ended[winner]["name"], ended[winner]["met"]) == ("Promoted", [None])
    assert ended[loser]["met"] == [None, winner]
    assert ended[loser]["name"] == ("Promoted" if loser == good else "NotPromoted")
    assert history == ([worse, good] if loser == good else [good])


def test_who_is_champion_already_is_not_compared_with_itself(
    story: Story, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process retrained on the same rows, and promoted the run that this one was about to promote."""
    good, store = run_of(story, story.better), story.desk.store
    crown(store, "already", good.key)
    run, _, _ = reopen(store, good)
    settings = run.config.model_copy(update={"promotion": PromotionConfig(champion="already")})

    def refuse(*_: object) -> None:
        raise AssertionError("it was compared with itself")

    @flow(name="decision")
    def decision() -> State[ArtifactRef]:
        return decide(run.model_copy(update={"config": settings}), good)

    monkeypatch.setattr("flows.retrain.challenge", refuse)
    state = decision(return_state=True)
    assert (state.name, state.message) == ("Unchanged", f"run {good.key[:8]} is the champion")
    assert len(read_champions(store, "already").history) == 1


def test_deploying_again_changes_nothing(scheduled: tuple[Path, list[Applied]], place: Desk) -> None:
    file, applied = scheduled
    assert {one.done for one in applied} == {"created"}
    assert [one.name for one in applied if one.what == "work pool"] == ["memmcl"]
    assert {"pipeline/pipeline", "retrain/retrain"} <= {one.name for one in applied if one.what == "deployment"}
    again = deploy(file, load_config(place.config))
    assert {one.done for one in again} == {"unchanged"}
    assert [(one.what, one.name) for one in again] == [(one.what, one.name) for one in applied]


def test_cron_schedules_retrains_and_a_worker_runs_one(story: Story, client: SyncPrefectClient) -> None:
    before = frozen(story.desk.cwd / "memmcl-store")
    wait_until(lambda: [run for run in runs_of(client) if run.state_name in ("Scheduled", "Late")], "runs are planned")
    planned = runs_of(client)
    assert all(run.auto_scheduled for run in planned)
    times = sorted(run.expected_start_time for run in planned)
    assert len(times) > 1
    assert all(time.second == 0 for time in times)
    assert {(after - time).total_seconds() for time, after in pairwise(times)} == {60.0}
    worker = ("worker", "start", "--pool", "memmcl", "--type", "process", "--limit", "1")
    with story.desk.started(*worker, program=COMMAND.with_name("prefect")) as running:
        running.wait_until(lambda: ended_runs(client), "the worker has run one of them")
    run = ended_runs(client)[0]
    assert run.state is not None
    assert run.state.name == "Unchanged", run.state
    champion = read_champions(story.desk.store, "champion").history[-1].run_id
    assert run.state.message == f"data and settings are those of the champion, run {champion[:8]}"
    assert frozen(story.desk.cwd / "memmcl-store") == before


def test_no_secret_of_the_environment_is_in_anything_that_retrains_or_the_worker_wrote(
    story: Story, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What they printed, the store, the home, Ray's folder, and that of the Prefect server and its database."""
    servers = tmp_path_factory.getbasetemp().glob("prefect-server[0-9]*")
    assert traces(planted(), story.desk.root, story.desk.ray_folder, *servers) == []


def retrain_config(place: Desk, base: Path) -> dict[str, Any]:
    """Return settings that take a tiny model seconds to learn which answer is the usual one."""
    return {
        "name": "tiny",
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "data": {
            "source": str(place.root / "rows"),
            "subtasks": list(FOLDERS),
            "train_rows": 24,
            "weak_rows": 10,
            "test_rows": TEST_ROWS,
        },
        "experts": {
            "steps": 30,
            "batch_size": 4,
            "rank": 4,
            "alpha": 8,
            "adapt_layers": "top-2",
            "learning_rate": 1e-2,
            "warm_start": 0.1,
            "anchor_batch_size": 4,
            "anchor_rows": 4,
        },
        "search": {"stage1_evaluations": 6, "stage2_evaluations": 6, "blocks": 1, "population": 4, "lambdas": [0.5]},
        "curriculum": {"contexts": ["zero-shot"]},
        "evaluation": {
            "batch_size": 10,
            "max_new_tokens": 8,
            "bootstrap_samples": 200,
            "joint_lora": False,
            "calibration": False,
        },
        "store": {"url": str(place.cwd / "memmcl-store")},
        "ray": {"workers": 1},  # two would import everything twice, which is what takes the time
    }


def write_rows(place: Desk, *, flipped: bool, texts: str = "early") -> None:
    """Write the rows of both subtasks; flipped: sent2's train and weak rows teach the seldom answer.

    texts: another word, other train and weak texts of sent2. Test rows, and all rows of irony, are always the same.
    """
    for subtask, folder in FOLDERS.items():
        for part, count in (("train", 24), ("dev", 10), ("test", TEST_ROWS)):
            changes = subtask == "sent2" and part != "test"
            usual, seldom = USUAL[subtask], SELDOM[subtask]
            if changes and flipped:
                usual, seldom = seldom, usual
            word = texts if changes else "early"
            rows = [
                {"text": _text(f"{subtask} {part} {word} {index}"), "label": seldom if index % 10 == 9 else usual}
                for index in range(count)
            ]
            path = place.root / "rows" / folder / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _text(name: str) -> str:
    draw = random.Random(name)
    thing, when = draw.choice(("soup", "screen", "ferry", "choir")), draw.choice(("today", "again", "on Monday"))
    return f"The {thing} was as it is {when}, note {name}."


def retrain(place: Desk) -> Outcome:
    """Retrain in a process of its own, and return how it ended."""
    started = time.monotonic()
    ended = place.watch("-c", RETRAIN, place.config, program=Path(sys.executable))
    seconds = time.monotonic() - started
    assert ended.code == 0, ended
    said = json.loads(ended.out.splitlines()[-1])
    return Outcome(
        name=said["name"],
        type=said["type"],
        message=said["message"],
        flow_run_id=UUID(said["flow_run_id"]),
        seconds=seconds,
        ray="raylet" in (place.root / "sockets.txt").read_text(),
        files=frozen(place.cwd / "memmcl-store"),
        history=read_champions(place.store, "champion").history,
    )


def crown(store: Store, name: str, run_id: str) -> None:
    """Make a run champion of that name, whoever it was before."""
    reign = Reign(run_id=run_id, name="tiny", since=now(), how="promotion", why="a test says so")
    promote(store, read_champions(store, name), reign)


def contest(
    place: Desk, champion: str, folder: Path, *challengers: str, meanwhile: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Put finished runs to a champion, each in a process of its own; return what each said, by its run.

    All read the champion before any swaps; then `meanwhile` happens, then they go on.
    """
    go = folder / "go"
    with ExitStack() as stack:
        running = {
            run_id: stack.enter_context(
                place.started(
                    "-c", CONTEST, place.config, run_id, champion, folder / run_id, go, program=Path(sys.executable)
                )
            )
            for run_id in challengers
        }
        for run_id, one in running.items():
            one.wait_until((folder / run_id).exists, "it is about to take the place")
        if meanwhile is not None:
            meanwhile()
        go.touch()
        ended = {run_id: one.ended() for run_id, one in running.items()}
    for one in ended.values():
        assert one.code == 0, one
    return {run_id: json.loads(one.out.splitlines()[-1]) for run_id, one in ended.items()}


def run_of(story: Story, outcome: Outcome) -> Manifest:
    """Return the finished run that a retrain made: the one that was not there before."""
    outcomes = [one for one in vars(story).values() if isinstance(one, Outcome)]
    before = outcomes[outcomes.index(outcome) - 1] if outcome is not outcomes[0] else None
    known = published(before, "run").keys() if before else set()
    (path,) = published(outcome, "run").keys() - known
    found = story.desk.store.find("run", Path(path).stem)
    assert found is not None
    return found


def published(outcome: Outcome, kind: str) -> dict[str, Mapping[str, Any]]:
    """Return the manifests of one kind that a retrain left in the store, by path."""
    folder = f"manifests/{kind}/"
    return {
        path: unseal(path, content) or {} for path, (_, content) in outcome.files.items() if path.startswith(folder)
    }


def refs(run: Manifest) -> dict[str, str]:
    """Return the keys of a run's artifacts by kind and name."""
    return {f"{ref.kind}:{ref.name}": ref.key for ref in run.inputs}


def judgement(story: Story, outcome: Outcome) -> Any:
    """Return what the gate said about a retrain's run, from the store."""
    challenger = run_of(story, outcome).key[:8]
    paths = [
        path
        for path, manifest in published(outcome, "judgement").items()
        if manifest["name"].startswith(f"run {challenger} against champion ")
    ]
    (path,) = paths
    found = story.desk.store.find("judgement", Path(path).stem)
    assert found is not None
    return read_json(story.desk.store, found, "judgement.json")


def runs_of(client: SyncPrefectClient) -> list[FlowRun]:
    """Return all runs of the deployed retrain."""
    deployed = client.read_deployment_by_name("retrain/retrain").id
    return client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployed])))


def ended_runs(client: SyncPrefectClient) -> list[FlowRun]:
    """Return the runs of the deployed retrain that a worker ran to an end; one refused by the limit never ran."""
    return [run for run in runs_of(client) if run.run_count and run.state is not None and run.state.is_final()]
